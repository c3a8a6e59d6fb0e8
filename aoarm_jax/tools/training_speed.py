"""Speed of one training step on one device, for several ways to compute it.

  python -m aoarm_jax.tools.training_speed --rowwise=xla,auto

Each row of the table is a model, a length T and one choice of compute.rowwise,
compute.attention, compute.loss_block, compute.scan_layers, compute.remat and
train.lora_rank. The choices of a model and a length run in interleaved rounds,
in one process, and the times are medians: what else the device does meets all
of them alike. Texts, orders and parameters are random.

  ms/step   of forward pass, backward pass and optimizer
  tokens/s  batch times T over that time
  MFU       FLOPs of the model over the device's bfloat16 peak (PaLM,
            appendix B)
  GB        of parameters, optimizer state and temporary arrays, as compiled
  kernels   in a step; needs --profile, on a GPU
  busy      share of the step in which they run; so does this
  nats      per token after all steps: the choices must agree

--profile names the kernels that take the most time, summed by name. A row that
cannot be measured says why, and the others go on. The exit status is 1 where no
row could be measured.
"""

import argparse
import dataclasses
import functools
import itertools
import operator
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import hlo, peaks, switches, trace
from aoarm_jax.model import cost
from aoarm_jax.runs import telemetry
from aoarm_jax.tools import arguments, scaling, table

# The columns of what is compared -> the flag that lists it, and its field.
_CHOICES = {
  "rowwise": ("rowwise", "compute.rowwise"),
  "attention": ("attention", "compute.attention"),
  "loss_block": ("loss_blocks", "compute.loss_block"),
  "scan": ("scan", "compute.scan_layers"),
  "remat": ("remat", "compute.remat"),
  "lora": ("lora", "train.lora_rank"),
}
# The columns of the table -> their width.
_WIDTHS = {
  "size": 10,
  "mechanism": 20,
  "T": 6,
  "rowwise": 10,
  "attention": 10,
  "loss_block": 10,
  "scan": 5,
  "remat": 5,
  "lora": 4,
  "ms/step": 8,
  "tokens/s": 9,
  "MFU": 6,
  "GB": 6,
  "kernels": 7,
  "busy": 6,
  "nats": 7,
}


def _values(field):
  """Returns the values that a field of config.compute can have."""
  fields = {f.name: f for f in dataclasses.fields(config_lib.Compute)}
  return fields[field].metadata["choices"]


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  made = arguments.parser("tools.training_speed", __doc__)
  several, whole = arguments.several, arguments.number(int, 1)
  for name, default, kind, doc in (
    (
      "--mechanisms",
      list(mechanisms.MECHANISMS)[:2],
      several(str, mechanisms.MECHANISMS),
      "names",
    ),
    ("--sizes", ["8m"], several(str, table.SIZES), "of the model"),
    ("--lengths", [128, 1024], several(whole), "T"),
    (
      "--vocabulary",
      0,
      arguments.number(int, 0),
      "symbols of the text, as of a bpe tokenizer; 0: 27 letters",
    ),
    ("--tokens", 65536, whole, "of a step"),
    ("--rowwise", ["xla", "auto"], several(str, _values("rowwise")), "ways"),
    ("--attention", ["auto"], several(str, _values("attention")), "ways"),
    ("--loss_blocks", [0], several(arguments.number(int, 0)), "sizes"),
    ("--scan", [0], several(int, (0, 1)), "1: layers are a loop"),
    ("--remat", [0], several(int, (0, 1)), "1: less memory"),
    ("--lora", [0], several(arguments.number(int, 0)), "ranks of adapters"),
    ("--steps", 30, whole, "of a round"),
    ("--rounds", 5, whole, "times that each choice is timed"),
    ("--profile", 0, arguments.number(int, 0), "kernels shown; 0: none"),
    ("--out", None, arguments.output, "CSV file"),
  ):
    made.add_argument(
      name, type=kind, default=default, help=f"{doc} (default: {default})"
    )
  return made


def configs(
  flags: argparse.Namespace,
) -> Iterator[list[config_lib.Config]]:
  """Yields the choices of each model and length, which run side by side."""
  for size, mechanism, T in itertools.product(
    flags.sizes, flags.mechanisms, flags.lengths
  ):
    base = config_lib.Config(
      name=size,
      data=_data(flags.vocabulary),
      model=config_lib.Model(mechanism=mechanism, T=T, **table.SIZES[size]),
      train=config_lib.Train(batch_size=max(flags.tokens // T, 1), steps=1000),
      mesh=config_lib.Mesh(data=1),
    )
    lists = [getattr(flags, flag) for flag, _ in _CHOICES.values()]
    yield [_chosen(base, values) for values in itertools.product(*lists)]


def _chosen(config, values):
  """Returns the config with a value for each of _CHOICES."""
  for (_, field), value in zip(_CHOICES.values(), values):
    config = config.replace(field, value)
  return config


def _data(vocabulary):
  """Returns the section of the config for a text with so many symbols."""
  if not vocabulary:
    return config_lib.Data()
  return config_lib.Data(tokenizer="bpe", vocabulary=vocabulary)


class Runner:
  """A training run of one row: compiled, with its state on the device."""

  def __init__(self, config: config_lib.Config, program: scaling.Program):
    self.config, self.program = config, program
    self.seconds: list[float] = []
    self.nats = float("nan")
    tokens, V = program.tokens, config.data.vocabulary or 27
    text = np.random.default_rng(0).integers(0, V, tokens.shape, tokens.dtype)
    with jax.set_mesh(program.mesh):
      self._state = program.init(np.int32(0))
      self._tokens = jax.device_put(text, program.mesh.devices.item())
    self.run(3)

  def run(self, steps: int) -> None:
    """Trains, and waits for the device."""
    for _ in range(steps):
      self._state, sums = self.program.step(self._state, self._tokens)
    self.nats = float(sums["nats"] / sums["tokens"])

  def time(self, steps: int) -> None:
    """Adds the seconds of a step in a round of so many steps."""
    start = time.perf_counter()
    self.run(steps)
    self.seconds.append((time.perf_counter() - start) / steps)

  def profile(self) -> trace.Kernels:
    """Returns the kernels of one step; none where the device is no GPU."""
    device, steps = self.program.mesh.devices.item(), 3
    return trace.kernels(lambda: self.run(steps), device, steps)

  def row(self) -> dict[str, Any]:
    """Returns the columns of the table that are known without a profile."""
    config, seconds = self.config, statistics.median(self.seconds)
    peak = peaks.of_kind(self.program.mesh.devices.item().device_kind).flops
    speed = config.train.batch_size * config.model.T / seconds
    flops = cost.training_flops_per_token(config)
    return name(config) | {
      "ms/step": 1e3 * seconds,
      "tokens/s": speed,
      "MFU": speed * flops / peak if peak else None,
      "GB": hlo.memory_bytes(self.program.step) / 1e9,
      "nats": self.nats,
    }


def name(config: config_lib.Config) -> dict[str, Any]:
  """Returns the columns that tell a row from others."""
  chosen = {
    column: operator.attrgetter(field)(config)
    for column, (_, field) in _CHOICES.items()
  }
  model = config.model
  return dict(size=config.name, mechanism=model.mechanism, T=model.T) | chosen


def main(argv: Sequence[str] | None = None) -> int:
  """Prints a line for every row, and writes the CSV file."""
  flags = parser().parse_args(argv)
  switches.fix_types()
  device = arguments.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
  groups = list(configs(flags))
  programs = table.compile_all(
    {
      config: functools.partial(scaling.compile_step, config, [device])
      for config in itertools.chain(*groups)
    }
  )
  print(_line({column: column for column in _WIDTHS}), flush=True)
  saved: list[dict[str, Any]] = []
  for group in groups:
    runners = list(_started(group, programs))
    for _ in range(flags.rounds):
      for runner in runners:
        runner.time(flags.steps)
    for runner in runners:
      row, kernels = runner.row(), []
      if flags.profile:
        kernels, seconds = runner.profile()
        if kernels:
          row["kernels"] = sum(kernel.launches for kernel in kernels)
          row["busy"] = 1e3 * seconds / row["ms/step"]
      saved.append(row)
      print(_line(row), flush=True)
      for kernel in kernels[: flags.profile]:
        time_of = f"{1e3 * kernel.seconds:8.3f} ms"
        print(f"    {time_of} {kernel.launches:4} x {kernel.name}")
  if flags.out and saved and not table.write_csv(flags.out, saved):
    sys.exit(f"--out={flags.out}: not written; the table above is all")
  return 0 if saved else 1


def _started(group, programs):
  """Yields the runners of a group, and says why there is none for a row."""
  for config, runner, why in table.measured(
    group, lambda config: Runner(config, programs[config].result())
  ):
    if runner is None:
      print(_line(name(config)), why, flush=True)
    else:
      yield runner


def _line(row):
  """Returns a row as text; a column that is not there stays empty."""
  return "  ".join(
    f"{_text(column, row.get(column)):>{width}}"
    for column, width in _WIDTHS.items()
  )


def _text(column, value):
  if value is None:
    return "-"
  if column in ("MFU", "busy") and not isinstance(value, str):
    return f"{100 * value:.1f}%"
  if column == "tokens/s" and not isinstance(value, str):
    return telemetry.format_count(value)
  return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  sys.exit(main())
