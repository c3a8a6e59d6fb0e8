"""Speed of generation: python -m aoarm_jax.tools.generation_speed

A cell of the table is a model size, a length T, a batch B and a method. --only
is a regular expression that picks cells by names such as "8m T1024 B64
sequential". Weights are random unless --workdir names a run. Then the run's own
model is timed, and speculative decoding accepts the drafts of a trained model.

sequential    one token per step, from a cache (exact)
parallel-m    m tokens per step (not exact)
speculative-m m drafts per round of two passes (exact). With random weights
              nearly all drafts pass: only the time of a round means something
adaptive      the surest of all targets, one per step; every step scores all
uncached      every step computes its visible content rows and one query row
mdlm          masked diffusion of the same size: T and T / 4 full passes

A cell times --steps steps in the middle of a text, or steps at two lengths, and
scales them to a whole text. The column `timed` says which. --whole times whole
texts. `floor` is the time that one step needs for the bytes that each of its
passes must read, the weights and half of a full cache, or for its FLOPs.
`floors` is the time of a step over its floor; both are - where the bandwidth is
not known. `launches` counts the kernels of a step in the compiled program.
"""

import argparse
import csv
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence

import jax

import pallas_kernels
from aoarm_jax.config import mechanisms, paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import peaks, switches
from aoarm_jax.runs import checkpoint, figures, opening
from aoarm_jax.tools import (
  arguments,
  decode_cells,
  decode_programs,
  decode_timing,
  table,
)

_METHODS = (
  "sequential",
  "parallel-4",
  "parallel-16",
  "speculative-4",
  "adaptive",
  "uncached",
  decode_cells.MASKED,
)
_NUMBERED = ("parallel", "speculative")
# The columns that the picture needs.
_COLUMNS = {"size", "T", "B", "method", "tokens_per_second", "device"}
_QUICK = f"(sequential|parallel-16|uncached|{decode_cells.MASKED})$"


def cells(
  options: argparse.Namespace, config: config_lib.Config | None
) -> Iterator[decode_cells.Cell]:
  """Yields a cell for every size, length, batch and method of the options.

  Args:
    options: the parsed command line.
    config: of the run that is timed; None for random weights.

  Raises:
    ConfigError: the mechanism does not have a method that is asked for.
  """
  models = [
    (
      size,
      config_lib.Model(mechanism=options.mechanism, T=T, **table.SIZES[size]),
    )
    for size in options.sizes
    for T in options.T
  ]
  if config is not None:
    models = [(config.name, config.model)]
  methods = _methods(options.methods, models[0][1])
  for size, model in models:
    for B in options.batches:
      for method in methods:
        yield decode_cells.Cell(size, model, B, method)


def _methods(asked, model):
  """Returns the methods that are asked for, or all that the model has."""

  def has(method):
    # A masked model of the same size is timed beside every other model. It has
    # no cache, and its rows are the whole text.
    if method == decode_cells.MASKED or model.kind.masked:
      return method == decode_cells.MASKED
    return method == "uncached" or _family(method) in model.kind.methods

  possible = list(filter(has, _METHODS))
  for method in asked or ():
    if not has(method):
      raise config_lib.ConfigError(
        f"--methods {method}: a model of mechanism {model.mechanism} does not "
        f"generate so; of it can be timed: {', '.join(possible)}"
      )
  return asked or possible


def _family(method):
  """Returns a method's name without its number, as in parallel-4."""
  return method.partition("-")[0]


def _method(name):
  """The type of an argument that is a method."""
  plain = [method for method in _METHODS if _family(method) not in _NUMBERED]
  numbered = re.fullmatch(rf"({'|'.join(_NUMBERED)})-[1-9]\d*", name)
  if name not in plain and not numbered:
    choices = (*plain, *(f"{family}-M" for family in _NUMBERED))
    raise argparse.ArgumentTypeError(
      f"{name!r} is not one of {', '.join(choices)}, where M is any whole "
      "number from 1"
    )
  return name


def _parser():
  parser = arguments.parser("tools.generation_speed", __doc__)
  add, whole = parser.add_argument, arguments.number(int, 1)
  add(
    "--only", type=arguments.pattern, help="regular expression of cells' names"
  )
  add(
    "--quick",
    action="store_true",
    help="other defaults: four methods at 8m T1024 B64; on a CPU tiny T128 B8",
  )
  add("--sizes", nargs="+", default=["8m", "base"], choices=table.SIZES)
  add(
    "--methods",
    nargs="+",
    type=_method,
    help="default: all that the mechanism has",
  )
  add("--T", nargs="+", type=whole, default=[128, 1024, 4096])
  add(
    "--batches",
    nargs="+",
    type=arguments.number(int, 0),
    default=[1, 64, 0],
    help="0: the best",
  )
  chain = [name for name, m in mechanisms.MECHANISMS.items() if not m.masked]
  add("--mechanism", default=config_lib.Model().mechanism, choices=chain)
  add(
    "--attention",
    default="auto",
    help="of uncached and mdlm passes",
    choices=("auto", *pallas_kernels.IMPLEMENTATIONS),
  )
  add("--steps", type=whole, default=128, help="steps timed a cell")
  add("--whole", action="store_true", help="time whole texts")
  add(
    "--bandwidth",
    type=arguments.number(float, 0),
    default=0.0,
    help="bytes/s, for the floor; 0: this device's, where devices/peaks.py "
    "knows it, or no floor",
  )
  add(
    "--workdir",
    type=arguments.place,
    help="a run, instead of random weights",
  )
  add("--out", type=arguments.output, help="CSV file")
  add(
    "--plot",
    type=arguments.place,
    help="draw this CSV file beside it, and no more",
  )
  return parser


def _parse(argv):
  parser = _parser()
  options = parser.parse_args(argv)
  if options.quick and not options.plot:
    size, T, B = "8m", 1024, 64
    arguments.devices()
    if jax.default_backend() == "cpu":
      size, T, B = "tiny", 128, 8
    parser.set_defaults(
      only=re.compile(_QUICK), sizes=[size], T=[T], batches=[B]
    )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a line for each cell as it is measured, and writes the CSV file."""
  options = _parse(argv)
  if options.plot:
    return _plot(options.plot)
  switches.fix_types()
  try:
    run, every = _restore(options)
  except (config_lib.ConfigError, checkpoint.CheckpointError) as error:
    sys.exit(f"aoarm_jax: error: {error}")
  only = options.only or re.compile("")
  chosen = [cell for cell in every if only.search(str(cell))]
  if not chosen:
    sys.exit(
      f"no cell has a name with {only.pattern!r}; the first one's is {every[0]}"
    )
  device = arguments.devices()[0].device_kind
  how = _how(options, device)
  print(f"jax {jax.__version__}, {device}")
  if run is None and options.quick and jax.default_backend() == "cpu":
    print(
      "--quick on a CPU is of a tiny model; choose by --sizes, --T, --batches"
    )
  if not _fill(decode_timing.Benchmark(how, run), chosen, options.out, device):
    sys.exit("no cell could be measured; each says why")


def _how(options, device):
  """Returns how to measure on a device of that kind."""
  peak = peaks.of_kind(device)
  bandwidth = options.bandwidth or peak.attainable_bandwidth
  if not bandwidth:
    print(
      f"the memory bandwidth of {device!r} is not known: no floors, unless "
      "--bandwidth gives it"
    )
  return decode_programs.Options(
    options.steps,
    options.whole,
    bandwidth,
    peak.attainable_flops,
    options.attention,
  )


def _fill(benchmark, chosen, path, device):
  """Measures, prints and saves; returns whether any cell could be measured."""
  benchmark.compile(chosen)
  print(decode_cells.header(), flush=True)
  saved, is_written = [], True
  for cell, results, failure in table.measured(chosen, benchmark.measure):
    if failure:
      print(f"{cell}: {failure}", flush=True)
      continue
    assert results is not None
    for result in results:
      print(result, flush=True)
      saved.append(
        dataclasses.asdict(result) | {"device": device, "jax": jax.__version__}
      )
    if path:
      is_written = table.write_csv(path, saved)
  if not is_written:
    sys.exit(f"--out={path}: not written; the table above is all")
  return bool(saved)


def _restore(options):
  """Returns the run to be timed, or None, and all cells."""
  if not options.workdir:
    return None, list(cells(options, None))
  workdir = paths.reached(options.workdir, "--workdir")
  config = opening.read_config(workdir)
  every = list(cells(options, config))
  config = config.replace("mesh", config_lib.Mesh(data=1))
  return opening.open_run(workdir, config), every


def _plot(path):
  try:
    reader = csv.DictReader(io.StringIO(path.read_text()))
  except OSError as error:
    sys.exit(f"--plot={path}: {error.strerror}")
  except UnicodeDecodeError:
    sys.exit(f"--plot={path}: no CSV file that --out has written")
  missing = _COLUMNS.difference(reader.fieldnames or ())
  if missing:
    sys.exit(
      f"--plot={path}: no CSV file that --out has written: it has no column "
      f"{min(missing)}"
    )
  rows = list(reader)
  title = "speed of generation"
  figures.decode_speed(rows, path.with_suffix(".png"), title=title)
  print(path.with_suffix(".png"))


if __name__ == "__main__":
  main()
