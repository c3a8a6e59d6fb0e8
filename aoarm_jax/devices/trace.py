"""Reads a profile: when a device communicates, computes, or does nothing."""

import glob
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Shares(NamedTuple):
  """Shares of the time in which a device does something; None: not known.

  Attributes:
    collectives: a collective runs.
    alone: a collective runs, and nothing else.
    idle: no kernel runs.
  """

  collectives: float | None = None
  alone: float | None = None
  idle: float | None = None


def shares(work: Callable[[], Any], device: jax.Device) -> Shares:
  """Profiles work and returns the Shares of a GPU, all None for other devices.

  Args:
    work: is called once, and returns when the device is done.
    device: a device of this process.
  """
  unknown = Shares()
  if device.platform != "gpu":
    return unknown
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      start = time.perf_counter()
      work()
      seconds = time.perf_counter() - start
    paths = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    if not paths:
      return unknown
    profile = jax.profiler.ProfileData.from_file(paths[0])
  name = f"/device:GPU:{device.local_hardware_id}"
  plane = next((p for p in profile.planes if p.name == name), None)
  if plane is None:
    return unknown
  network: list[tuple[float, float]] = []
  other: list[tuple[float, float]] = []
  for line in plane.lines:
    if not line.name.startswith("Stream"):
      continue
    for event in line.events:
      into = network if "nccl" in event.name.lower() else other
      into.append((event.start_ns, event.start_ns + event.duration_ns))
  return _shares(network, other, 1e9 * seconds)


def _shares(network, other, total):
  """Returns the Shares of a timeline.

  Args:
    network: (start, end) of every collective.
    other: (start, end) of every other kernel.
    total: length of the timeline.
  """
  both = _covered(network + other)
  alone = both - _covered(other)
  return Shares(_covered(network) / total, alone / total, 1 - both / total)


def _covered(intervals):
  """Returns the length of the union of intervals (start, end)."""
  total, reached = 0.0, -np.inf
  for start, end in sorted(intervals):
    total += max(end - max(start, reached), 0)
    reached = max(reached, end)
  return total
