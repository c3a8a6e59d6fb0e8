"""What the tests of whole runs share: a text, a tiny run, the program."""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
import tiny
from absl import flags
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from aoarm_jax import api, command_line, main
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes
from aoarm_jax.evaluation import evaluate, score
from aoarm_jax.generation import texts
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import checkpoint
from aoarm_jax.study import programs
from aoarm_jax.training import program as program_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "two_stream.py:tiny")
SMALLEST = {
  "model.T": 16,
  "model.D": 16,
  "model.L": 2,
  "model.N": 2,
  "train.batch_size": 8,
  "compute.dtype": "float32",
  "optimizer.warmup_steps": 5,
  "optimizer.peak_learning_rate": 1e-2,
}
_TIMEOUT_SECONDS = 240
_environment: dict[str, str] = {}
# What holds jitted functions, and what the runs of this process have made.
_MAKERS = (
  (network_lib, "Network"),
  (program_lib, "make"),
  (evaluate, "Evaluator"),
  (texts, "Sampler"),
  (score, "Scorer"),
  (programs, "compiled"),
)
_made: dict[Any, Any] = {}


def around_module(
  *contexts: contextlib.AbstractContextManager,
) -> tuple[Callable[[], None], Callable[[], None]]:
  """Returns setUpModule and tearDownModule that enter and leave contexts."""
  stack = contextlib.ExitStack()

  def set_up():
    for context in contexts:
      stack.enter_context(context)

  return set_up, stack.close


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
  """Compiles badly, fast and once, here and in processes started meanwhile.

  The same code on both sides, so that results may be compared bit by bit. Runs
  of one config in this process share their programs: to trace one again takes
  longer than all else in a tiny run.
  """
  with contextlib.ExitStack() as stack:
    folder = os.environ.get("AOARM_TEST_COMPILED")  # See conftest.py.
    folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
    options = {
      "jax_disable_most_optimizations": True,
      "jax_compilation_cache_dir": folder,
      "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in options}
    _environment.update({k.upper(): str(v) for k, v in options.items()})
    try:
      _configure(options)
      yield
    finally:
      _configure(before)
      _environment.clear()
      _made.clear()


def _configure(options):
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # It looks at the folder's name once.


def in_memory(network: network_lib.Network, seed=0) -> api.Model:
  """A model with the sharp parameters of a network, for calls from Python."""
  config, params = network.config, tiny.sharp(network, seed)
  if config.model.kind.left_to_right:
    config = config.replace("eval.estimators", ("left_to_right",))
    for field in ("orders.family", "sample.order"):
      config = config.replace(field, "left_to_right")
  return api.Model.of(
    config, params, tokenizer=network.tokenizer, progress=False
  )


@functools.cache
def model_of(
  letters: str,
  mechanism: str = "two_stream",
  sentinels: int = 1,
  *,
  data: config_lib.Data | None = None,
  orders: config_lib.Orders | None = None,
  **fields: Any,
) -> api.Model:
  """A model with sharp parameters, for calls from Python.

  Args:
    letters: the alphabet.
    mechanism: of the network.
    sentinels: of the network.
    data: the section of the config; None: the default one.
    orders: the section of the config; None: the default one.
    **fields: other sizes and options, as tiny.make takes them.

  Returns:
    The same model for equal arguments, so that it compiles once.
  """
  config = tiny.make(mechanism, sentinels, **fields).config
  config = config.replace("data", data or config.data)
  config = config.replace("orders", orders or config.orders)
  alphabet = tokenizers.Tokenizer(letters, letters.encode())
  return in_memory(network_lib.Network(config, None, alphabet))


def write_text(folder: pathlib.Path, seed: int = 0, *, test: bool = True):
  """Splits of a Markov source: letters walk round the alphabet by 1 or 2.

  The symbols are equally frequent, so whatever is learned is context.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  symbols = np.frombuffer(b" abcdefghijklmnopqrstuvwxyz", np.uint8)
  lengths = {"train": 20_000, "valid": 1_000}
  if test:
    lengths["test"] = 1_000
  for name, length in lengths.items():
    walk = rng.integers(1, 3, length).cumsum() % len(symbols)
    (folder / f"{name}.txt").write_bytes(symbols[walk].tobytes())


def arguments(
  workdir: pathlib.Path,
  changes: Mapping[str, Any],
  *more: str,
  experiment: str = TINY,
) -> list[str]:
  """The command line of a run that differs from SMALLEST by `changes`."""
  overrides = {**SMALLEST, **changes}
  return [
    f"--config={experiment}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in overrides.items()),
    *more,
  ]


def command_in(
  folder: pathlib.Path,
  base: Mapping[str, Any],
  name: str,
  *more: str,
  **changes: Any,
) -> list[str]:
  """The command line of the run `name` in a folder that has its text.

  Args:
    folder: where the text and the run are.
    base: fields of all runs of a module, by their paths.
    name: of the run.
    *more: other flags.
    **changes: fields of this run, as model__T=8.
  """
  named = {path.replace("__", "."): value for path, value in changes.items()}
  changes = {**base, "data.path": folder / "text", **named}
  return arguments(folder / name, changes, *more)


def launcher(
  processes: int, command: Sequence[str], *flags: str, code: str = ""
) -> list[str]:
  """The launcher of so many processes of the program, as a command.

  Args:
    processes: how many.
    command: the program's flags.
    *flags: of the launcher.
    code: Python to be run before the program starts, in each process.
  """
  return [
    *(sys.executable, "-m", "launch.local", f"--processes={processes}"),
    *(*flags, "--", *program(code), *command),
  ]


def parse(command: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
  """(flags, argv) of one command, without the program's global flags."""
  argv = ["main.py", *command]
  values = flags.FlagValues()
  command_line.define_flags(values, argv)
  with warnings.catch_warnings():
    # ml_collections loads the experiment file in an old way.
    warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)
    command_line.parse(argv, values)
  return values, argv


def run(command: Sequence[str]) -> None:
  """The program in this process; what it would report is raised."""
  flags.FLAGS.mark_as_parsed()  # As absl.app.run does; loaders ask for it.
  with contextlib.ExitStack() as stack:
    if _environment:  # In quick_compilation.
      for module, name in _MAKERS:
        shared = _shared(getattr(module, name))
        stack.enter_context(mock.patch.object(module, name, shared))
    main.run(*parse(command))


def _of_no_cells(argument):
  """The config without the part of a study that one command runs."""
  if not isinstance(argument, config_lib.Config):
    return argument
  study = config_lib.Study()
  for name in ("cells", "part", "limit_seconds"):
    argument = argument.replace(f"study.{name}", getattr(study, name))
  return argument


def _shared(make):
  """The function, which makes one thing for equal arguments."""

  def made(*args, **kwargs):
    # A test may put another training step in its place.
    key = make, program_lib.make_step, *map(_of_no_cells, args)
    key += tuple(kwargs.items())
    if key not in _made:
      _made[key] = make(*args, **kwargs)
    return _made[key]

  return made


def config_of(command: Sequence[str]) -> config_lib.Config:
  return config_lib.from_config_dict(parse(command)[0].config)


def environment(**more: str) -> dict[str, str]:
  """Of a process of ours: on the CPU, and compiling as this one does."""
  paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
  ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
  return os.environ | ours | _environment | more


def program(code: str = "") -> list[str]:
  """The program as a command; `code` is run before it, in its process."""
  if not code:
    return [sys.executable, "-m", "aoarm_jax.main"]
  code += (
    "\nimport runpy\n"
    "runpy.run_module('aoarm_jax.main', run_name='__main__', alter_sys=True)"
  )
  return [sys.executable, "-c", code]


def start(
  command: Sequence[str], *, code: str = "", folder=None, **more: str
) -> subprocess.Popen:
  """The program in a process group of its own, on the CPU.

  Args:
    command: its flags.
    code: Python to be run before the program starts, in its process.
    folder: where it runs; None: here.
    **more: variables of its environment.

  Returns:
    The process. Its stderr is a short pipe: it cannot run far ahead of the
    lines that were read.
  """
  process = subprocess.Popen(
    [*program(code), *command],
    cwd=folder,
    env=environment(**more),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    bufsize=0,
    pipesize=4096,
    start_new_session=True,
  )
  guard = threading.Timer(_TIMEOUT_SECONDS, process.kill)
  guard.daemon = True
  guard.start()
  return process


def read_until(process: subprocess.Popen, text: str, more: int = 0) -> str:
  """Reads stderr to the line with `text` and `more` lines beyond."""
  lines = []
  while not lines or text not in lines[-1]:
    line = process.stderr.readline().decode()
    assert line, f"ended before {text!r}:\n{''.join(lines)}"
    lines.append(line)
  lines += [process.stderr.readline().decode() for _ in range(more)]
  return "".join(lines)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
  """(exit code, stdout, stderr) of what is left to read."""
  out, err = process.communicate()
  return process.returncode, out.decode(), err.decode()


def final_state(workdir: pathlib.Path, config: config_lib.Config):
  """(Saved, TrainState) of a run's newest checkpoint, on one device."""
  mesh = meshes.make_mesh(config.mesh)
  abstract = _shared(program_lib.make)(config, mesh=mesh).abstract
  checkpoints = checkpoint.Checkpoints(
    epath.Path(workdir) / "checkpoints", keep_last=1, keep_best=0
  )
  saved = checkpoints.newest()
  return saved, checkpoints.restore(saved, abstract)


def distance(got: Any, want: Any) -> float:
  """Norm of the difference of two pytrees of arrays, by that of the second."""
  want = jax.device_get(want)
  apart = jax.tree.map(np.subtract, jax.device_get(got), want)
  squares = [
    sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(tree))
    for tree in (apart, want)
  ]
  return float(np.sqrt(squares[0] / squares[1]))


def leaves_as_bytes(tree: Any) -> dict[str, bytes]:
  """Every array of a pytree by its path, bit by bit."""

  def plain(leaf):
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

  return {
    jax.tree_util.keystr(path): plain(leaf).tobytes()
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file below, by its relative name."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }
