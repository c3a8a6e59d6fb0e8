"""How long a program runs on the device that is here."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds(
  program: Callable[..., Any], arrays: tuple[Any, ...], calls: int
) -> float:
  """Return the seconds of one of several calls in a row."""
  jax.block_until_ready(program(*arrays))
  start = time.perf_counter()
  for _ in range(calls):
    results = program(*arrays)
  jax.block_until_ready(results)
  return (time.perf_counter() - start) / calls


def interleaved(
  programs: Mapping[str, Callable[..., Any]],
  given: Mapping[str, tuple[Any, ...]],
  rounds: int,
) -> dict[str, float]:
  """Return the median seconds of each program over interleaved rounds.

  Args:
    programs: jitted functions by name.
    given: the arguments of each.
    rounds: times that every program is measured.
  """
  times: dict[str, list[float]] = {name: [] for name in programs}
  calls = None
  for _ in range(rounds):
    for name, program in programs.items():
      if calls is None:
        calls = max(3, int(0.03 / seconds(program, given[name], 3)))
      times[name].append(seconds(program, given[name], calls))
  return {name: statistics.median(values) for name, values in times.items()}


def gpu(module: str) -> jax.Device:
  """Return the GPU, or end the program: the rows are too large for a CPU.

  Args:
    module: the name of the benchmark, for the message.
  """
  try:
    device = jax.devices()[0]
    if device.platform == "gpu":
      return device
    seen = f"JAX finds {device.device_kind!r}"
  # JAX_PLATFORMS names a device that is not here. JAX may say nothing at all.
  except (RuntimeError, AssertionError):
    seen = "JAX finds no device"
  sys.exit(
    f"python -m {module}: error: it needs an NVIDIA GPU, and {seen}; its rows "
    "are too large for a CPU"
  )


def rounds(text: str) -> int:
  """Convert an argument of the command line to a number of rounds."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
  return int(text)
