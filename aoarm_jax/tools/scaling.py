"""How training scales with devices.

  python -m aoarm_jax.tools.scaling --devices=1,2

Prints one table, with a row for every model, mechanism, length, mesh and number
of devices. With weak scaling the tokens of a step grow with the devices; with
strong scaling they stay the same. Texts, orders and parameters are random.

  tokens/s      of all devices together
  a device      tokens/s of each device
  MFU           FLOPs of the model over the devices' bfloat16 peak (PaLM,
                appendix B)
  GB a device   memory that the compiled step needs
  collectives   share of the time in which collectives run on the first device,
                from a profile
  alone         share of the time in which nothing else runs beside them
  idle          share of the time in which no kernel runs there
  efficiency    tokens/s per device, relative to the first row of its kind

The exit status is 1 where no row could be measured.

--dry-run uses 8 virtual CPU devices, which share one processor. By default it
measures a tiny model with two streams on 1 and on 4 of them: six programs,
some 4 minutes of processor time. Its times mean nothing, so it shows no
efficiency. Several processes, started by launch.local or launch.slurm, measure
all their devices only, and show no efficiency either.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import pallas_kernels
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import (
  distributed,
  hlo,
  peaks,
  sharding,
  switches,
  trace,
)
from aoarm_jax.model import cost
from aoarm_jax.runs import telemetry
from aoarm_jax.tools import arguments, table
from aoarm_jax.training import program as program_lib

_VOCABULARY = 27
_SCALING = ("weak", "strong")
# Name of a mesh -> number of devices -> sizes of its axes.
MESHES = {
  "data": lambda n: dict(data=n),
  "fsdp": lambda n: dict(data=1, fsdp=n),
  "tensor": lambda n: dict(data=1, tensor=n),
  "sequence": lambda n: dict(data=1, sequence=n),
  "data_fsdp": lambda n: dict(data=max(n // 2, 1), fsdp=min(n, 2)),
}
# Two streams and one stream: the package's own mechanisms come first.
_MECHANISMS = list(mechanisms.MECHANISMS)[:2]
# The defaults of --dry-run.
_DRY = dict(
  devices=[1, 4],
  models=["tiny"],
  mechanisms=_MECHANISMS[:1],
  lengths=[32],
  scaling=["weak"],
  tokens=512,
  steps=2,
)
_COLUMNS = (
  "scaling",
  "model",
  "mechanism",
  "T",
  "mesh",
  "devices",
  "batch",
  "ms/step",
  "tokens/s",
  "a device",
  "MFU",
  "GB a device",
  "collectives",
  "alone",
  "idle",
  "efficiency",
  "nats/token",
)


def configuration(
  flags: argparse.Namespace,
  scaling: str,
  model: str,
  mechanism: str,
  T: int,
  mesh: str,
  devices: int,
) -> config_lib.Config:
  """Returns the config of a row."""
  batch_size = max(flags.tokens // T, 1)
  if scaling == "weak":
    batch_size *= devices
  return config_lib.Config(
    model=config_lib.Model(mechanism=mechanism, T=T, **table.SIZES[model]),
    train=config_lib.Train(batch_size=batch_size, steps=1000),
    compute=config_lib.Compute(
      attention=flags.attention,
      scan_layers=flags.scan_layers,
      remat=flags.remat,
    ),
    mesh=config_lib.Mesh(**MESHES[mesh](devices)),
  )


class Program(NamedTuple):
  """The compiled training step of a row.

  Attributes:
    mesh: of the row's devices.
    init: (seed int32 []) -> state, compiled.
    step: (state, tokens) -> (state, sums).
    tokens: jax.ShapeDtypeStruct of a global batch.
  """

  mesh: jax.sharding.Mesh
  init: Callable
  step: jax.stages.Compiled
  tokens: jax.ShapeDtypeStruct


def compile_step(
  config: config_lib.Config, devices: Sequence[jax.Device]
) -> Program:
  """Compiles the training step of a row; allocates nothing on the devices.

  Args:
    config: of the row.
    devices: of the mesh.

  Raises:
    ConfigError: the mesh does not divide the model or the batch.
  """
  program = program_lib.make(config, "train", devices=devices)
  seed = jax.ShapeDtypeStruct((), np.int32)
  mesh = program.network.mesh
  assert mesh is not None
  with jax.set_mesh(mesh):
    return Program(
      mesh,
      program.init.lower(seed).compile(),
      program.step.lower(program.abstract, program.tokens).compile(),
      program.tokens,
    )


def measure(config: config_lib.Config, program: Program, steps: int) -> dict:
  """Trains for a few steps and measures them.

  Args:
    config: of the row.
    program: of the row.
    steps: how many are timed, and how many are profiled after that.

  Returns:
    Column of the table -> number, without the efficiency.
  """
  mesh, init, step, _ = program
  devices = list(mesh.devices.flat)
  B, T = config.train.batch_size, config.model.T
  with jax.set_mesh(mesh):
    state = init(np.int32(0))
    rows = sharding.local_rows(mesh, B)
    tokens = np.random.default_rng(0).integers(0, _VOCABULARY, (B, T), np.uint8)
    batch = sharding.put_batch(mesh, tokens[rows])

    def run(count):
      nonlocal state
      for _ in range(count):
        state, sums = step(state, batch)
      return float(sums["nats"] / sums["tokens"])

    run(3)
    start = time.perf_counter()
    loss = run(steps)
    seconds = (time.perf_counter() - start) / steps
    collectives, alone, idle = trace.shares(lambda: run(steps), devices[0])
  speed = B * T / seconds
  flops = cost.training_flops_per_token(config)
  peak = peaks.of_kind(devices[0].device_kind).flops
  return {
    "ms/step": 1e3 * seconds,
    "tokens/s": speed,
    "a device": speed / len(devices),
    "MFU": peak and speed * flops / (len(devices) * peak),
    "GB a device": hlo.memory_bytes(step) / 1e9,
    "collectives": collectives,
    "alone": alone,
    "idle": idle,
    "nats/token": loss,
  }


def _parser():
  parser = arguments.parser("tools.scaling", __doc__)
  whole = arguments.number(int, 1)

  several = arguments.several

  def add(name, default, kind, doc):
    parser.add_argument(
      name, type=kind, default=default, help=f"{doc} (default: {default})"
    )

  add(
    "--devices", None, several(whole), "numbers of devices; None: 1, 2, 4 ..."
  )
  add(
    "--meshes",
    list(MESHES),
    several(str, MESHES),
    "axes that they form; data_fsdp of 4, 6, 8 ... alone",
  )
  add("--models", ["base", "350m"], several(str, table.SIZES), "sizes")
  add(
    "--mechanisms",
    _MECHANISMS,
    several(str, mechanisms.MECHANISMS),
    "names",
  )
  add("--lengths", [1024, 4096], several(whole), "T")
  add("--scaling", list(_SCALING), several(str, _SCALING), "which is fixed")
  add("--tokens", 32768, whole, "of a step: a device (weak), in all (strong)")
  add("--steps", 20, whole, "timed, and then profiled, a row")
  add("--json", None, arguments.output, "file to which rows are added as lines")
  parser.add_argument(
    "--attention",
    default="auto",
    help="config.compute.attention",
    choices=("auto", *pallas_kernels.IMPLEMENTATIONS),
  )
  for name, doc in (
    ("--scan-layers", "config.compute.scan_layers: slower on GPUs"),
    ("--remat", "config.compute.remat: less memory"),
    (
      "--dry-run",
      "8 virtual CPU devices and a tiny model, whose times mean nothing; "
      f"other defaults: {', '.join(f'{k} {v}' for k, v in _DRY.items())}",
    ),
  ):
    parser.add_argument(name, action="store_true", help=doc)
  return parser


def parse(argv: list[str]) -> argparse.Namespace:
  """Returns the flags of a command line; --dry-run has its own defaults."""
  parser = _parser()
  if parser.parse_args(argv).dry_run:
    parser.set_defaults(**_DRY)
  return parser.parse_args(argv)


def rows(
  flags: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], config_lib.Config, int]]:
  """Yields the rows to be measured, as (columns, config, devices).

  The columns are those that are known before: name -> value.
  """
  total = jax.device_count()
  counts = flags.devices or [n for n in (1, 2, 4, 8, 16) if n <= total]
  if jax.process_count() > 1:
    counts = [total]
  for scaling, model, mechanism, T, n in itertools.product(
    flags.scaling, flags.models, flags.mechanisms, flags.lengths, counts
  ):
    for mesh in flags.meshes:
      # One device has only one mesh. data_fsdp needs an even number of
      # devices, at least 4.
      if (n == 1 and mesh != flags.meshes[0]) or (
        mesh == "data_fsdp" and n > 1 and (n < 4 or n % 2)
      ):
        continue
      config = configuration(flags, scaling, model, mechanism, T, mesh, n)
      row = dict(
        scaling=scaling,
        model=model,
        mechanism=mechanism,
        T=T,
        mesh=mesh,
        devices=n,
        batch=config.train.batch_size,
      )
      yield row, config, n


def main(argv: list[str]) -> int:
  flags = parse(argv)
  switches.fix_types()
  if flags.dry_run:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
  distributed.start(config_lib.Distributed())
  devices = arguments.devices()
  if jax.process_index() == 0:
    kind = devices[0].device_kind
    print(f"{len(devices)} x {kind}, jax {jax.__version__}", flush=True)
  chosen = list(rows(flags))
  most = max((n for _, _, n in chosen), default=0)
  if most > len(devices):
    _parser().error(f"--devices={most}: there are {len(devices)}, ask for less")
  if not chosen:
    _parser().error("--meshes=data_fsdp: it takes 4 devices, or 6, or 8 ...")
  if not _fill(chosen, devices, flags):
    print("no row could be measured; each says why", file=sys.stderr)
    return 1
  return 0


def _fill(chosen, devices, flags):
  """Measures, prints and saves; returns whether any row could be measured."""
  speaks = jax.process_index() == 0
  programs = {
    config: functools.partial(compile_step, config, devices[:n])
    for _, config, n in chosen
  }
  if speaks:
    print(f"compiling {len(programs)} training steps", file=sys.stderr)
  compiled = table.compile_all(programs)
  if speaks:
    _print_row(_COLUMNS)
    _print_row(["---"] * len(_COLUMNS))

  @functools.cache  # On one device, the weak and the strong row are the same.
  def measure_once(config):
    return measure(config, compiled[config].result(), flags.steps)

  first: dict[tuple[Any, ...], float | None] = {}
  is_any, all_written = False, True
  for (row, config, _), result, failure in table.measured(
    chosen, lambda item: measure_once(item[1])
  ):
    row |= {"failed": failure} if failure else result
    kind = tuple(row[c] for c in ("scaling", "model", "mechanism", "T"))
    base = first.setdefault(kind, row.get("a device"))
    if not failure:
      is_any = True
      no_base = not base or flags.dry_run or jax.process_count() > 1
      row["efficiency"] = None if no_base else row["a device"] / base
    if speaks:
      shown = [_cell(row, column) for column in _COLUMNS if column in row]
      _print_row(shown + ([failure] if failure else []))
      if flags.json:
        all_written &= table.append_json(
          flags.json, row | {"config": dataclasses.asdict(config)}
        )
  if not all_written:
    sys.exit(f"--json={flags.json}: not all rows are written, see above")
  return is_any


def _print_row(cells):
  print("|", " | ".join(cells), "|", flush=True)


def _cell(row, column):
  value = row[column]
  if column in ("MFU", "collectives", "alone", "idle", "efficiency"):
    return "-" if value is None else f"{100 * value:.1f}%"
  if column in ("tokens/s", "a device"):
    return telemetry.format_count(value)
  return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  with distributed.failing_at_once():
    sys.exit(main(sys.argv[1:]))
