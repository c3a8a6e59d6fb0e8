"""Train, evaluate and sample any-order language models: the command line.

  python -m aoarm_jax.main --config=configs/two_stream.py:tiny
  python -m aoarm_jax.main --config=configs/two_stream.py:tiny --mode=sample

An error that a user can mend prints one line and ends the program with an exit
code that is not zero:

  1    The run failed.
  2    The command cannot be carried out as it was written.
  14   The run made no progress. The same command continues it.
  75   A SIGTERM stopped the run after a save. The same command continues it.
  76   Another process of the run was lost. The same command continues it.
  130  Ctrl-C stopped the run.
"""

import gc
import os
import sys

from aoarm_jax.devices import stopping

_IS_PROGRAM = (
  __name__ == "__main__" or os.path.basename(sys.argv[0]) == "aoarm_jax"
)
# The imports below take seconds, in which a signal may come, too. They leave
# little garbage, and to look for it would take a sixth of that time.
if _IS_PROGRAM:
  stopping.end_at_once()
  gc.disable()

import argparse
import dataclasses
import difflib
import errno
import functools
import glob
import pathlib
import re
import signal
import textwrap
import traceback
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import pallas_kernels
from aoarm_jax.benchmark import suite
from aoarm_jax.config import errors, exit_codes, experiments, explain, paths
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import distributed, meshes, switches, waits
from aoarm_jax.evaluation import evaluate, score
from aoarm_jax.generation import sample
from aoarm_jax.runs import (
  agreement,
  converting,
  exporting,
  opening,
  patience,
  telemetry,
  tracking,
)
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.study import sweep
from aoarm_jax.tools import arguments as argument_types
from aoarm_jax.tools import compile as pod
from aoarm_jax.tools import matching, prepare
from aoarm_jax.training import loop as train

if _IS_PROGRAM:
  gc.enable()
  gc.freeze()  # Modules stay, so the collector need not look at them again.

MODES = (
  *("train", "eval", "sample", "score", "benchmark"),
  *("config", "count", "study", "compile", "prepare", "export", "convert"),
)
_PRINTING = (
  *("sample", "score", "benchmark"),
  *("config", "count", "compile", "prepare"),
)
_READING_A_RUN = ("eval", "sample", "score", "benchmark")
# These modes touch no device, and they run in one process.
_WITHOUT_DEVICES = ("config", "compile", "prepare")
_HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
_NO_CONFIG = (
  "--config is missing: name an experiment, as in --config=two_stream:tiny, or "
  "its file, as in --config=configs/two_stream.py:tiny"
)

# The processes of a run must agree about these. A run directory may be mounted
# at different places.
_AGREED_FLAGS = ("mode", "prompt", "text", "topology")
# The other modes have nothing to keep when a signal comes.
_STOP_AFTER_A_BATCH = ("train", *_READING_A_RUN)
_GOES_ON = {
  "benchmark": ": the same command goes on with the unit that was lost",
  "study": ": the same command goes on with the cell that was lost",
  "prepare": ": the same command goes on with the shard that was lost",
}
_LESS_TRAINING = (
  "lower --config.train.batch_size, raise --config.compute.accumulate, or set "
  "--config.compute.remat=true"
)
_LESS_MEMORY = {
  "train": _LESS_TRAINING,
  "compile": _LESS_TRAINING,
  "config": "the model is too large",
  "prepare": "set JAX_PLATFORMS=cpu",
  "count": "the model is too large",
  "export": "set JAX_PLATFORMS=cpu",
  "convert": "spread the model with --config.mesh.fsdp=0, or set "
  "JAX_PLATFORMS=cpu",
  # This field is not part of a cell's identity, so finished cells stay valid.
  "study": "set --config.compute.remat=true",
} | {mode: f"lower --config.{mode}.batch_size" for mode in _READING_A_RUN}


def define_flags(
  flag_values: flags.FlagValues, argv: list[str] | None = None
) -> None:
  """Define this program's flags.

  Args:
    flag_values: the flags are added to these.
    argv: command line that is searched for overrides of single fields. None
      takes sys.argv.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    "experiment and variant, by name, as in two_stream:tiny, or by file, as in "
    "configs/two_stream.py:tiny; single fields by --config.train.steps=100",
    flag_values=flag_values,
    sys_argv=argv,
  )
  flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train: train a model, or resume a run; eval: likelihood of a split; "
    "sample: generate texts or fill blanks; score: likelihood of given texts; "
    "benchmark: a report on a run; config: print every field; count: print "
    "the cost of every mechanism; study: run a sweep and write its report; "
    "compile: memory and bounds on a TPU slice; prepare: encode a text; "
    "export, convert: write a folder for other tools, or read one",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "workdir",
    "",
    "run directory; '' is runs/<config name>-<variant>",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "prompt",
    "",
    "sample: text with blanks, as in 'the qu___ of en_land'",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "text",
    "",
    "score: text, in which a part may be marked: 'the [qu]ick'",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "input",
    "",
    "sample, score: file of prompts or texts, one per line; '-' is standard "
    "input. The output is JSON lines; convert: folder of a model of Hugging "
    "Face",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "out",
    "",
    "prepare: folder of the prepared text, for --config.data.path; export: "
    "folder of the exported model, for aoarm_jax.load",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "html",
    "",
    "sample: HTML file to write, a page that replays how the texts came about",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "topology",
    "",
    "compile: the TPU slice, as in v5p:4x4x8",
    flag_values=flag_values,
  )


define_flags(flags.FLAGS)


def parse(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Parse the command line.

  Args:
    argv: the command line, as sys.argv.
    flag_values: the flags to set, see `define_flags`.

  Returns:
    The program's name, argv[0], in a list.

  Raises:
    flags.Error, ConfigError: the command line or the experiment's file is
      wrong.
  """
  for argument in argv[1:]:
    _check_override(argument)
  argv = [argv[0], *map(_expanded, argv[1:])]
  try:
    arguments = flag_values(_with_paths(argv))
    if len(arguments) > 1:
      raise flags.Error(f"unexpected argument {arguments[1]!r}")
    if not flag_values["config"].present:
      raise flags.Error(_NO_CONFIG)
    # An error in the experiment's file shows at the first access only.
    str(flag_values.config.name)
  except flags.UnrecognizedFlagError as error:
    # The fields of the config become flags only when --config is read.
    is_field = error.flagname.startswith("config.")
    message = _NO_CONFIG if is_field else f"{error}{_fields(error.flagname)}"
    raise flags.Error(message) from None
  # The experiment's file is a program of the user, so it can raise any type.
  except Exception as error:
    message = _in_experiment(error) or _in_flags(error, argv)
    if not message:
      raise
    raise config_lib.ConfigError(message) from error
  return arguments


def _with_paths(argv):
  """Return the command line with the path of the experiment for its name."""
  paths, is_value = [], False
  for argument in argv:
    flag, equals, value = argument.partition("=")
    if is_value and argument:
      argument = experiments.find(argument)
    elif flag in ("--config", "-config") and value:
      argument = f"{flag}={experiments.find(value)}"
    is_value = flag in ("--config", "-config") and not equals
    paths.append(argument)
  return paths


def _in_experiment(error):
  """Return file, line and message of an error in the experiment's file.

  Returns "" if the error does not come from that file.
  """
  while error is not None:
    # ml_collections imports the experiment's file under this module name.
    lines = [
      (frame.f_code.co_filename, line)
      for frame, line in traceback.walk_tb(error.__traceback__)
      if frame.f_globals["__name__"] == "config_config"
    ]
    if isinstance(error, SyntaxError) and os.path.exists(error.filename or ""):
      return f"{error.filename}, line {error.lineno}: not Python: {error.msg}"
    if lines and isinstance(error, config_lib.ConfigError):
      return str(error)
    if lines:
      words = "".join(traceback.format_exception_only(error)).split()
      return "{}, line {}: {}".format(*lines[-1], " ".join(words))
    error = error.__cause__ or error.__context__
  return ""


def _in_flags(error, argv):
  """Return the message for an error of parsing.

  Returns "" if the error is unexpected and its traceback is to be shown.
  """
  name = next((a for a in argv if re.match("--?config(=|$)", a)), "--config")
  # Up to Python 3.11.3, a null byte in the source is a ValueError.
  is_syntax = isinstance(error, SyntaxError) or "null bytes" in str(error)
  if isinstance(error, OSError) or is_syntax:
    line = _last_line(error)
    absent = re.search(r"No such file or directory: '(.+)'$", line)
    return f"{name}: {_no_file(absent[1]) if absent else line}"
  if isinstance(error, AttributeError):
    return (
      f"{name}: the file must define get_config(variant), which returns "
      "experiments.experiment(...), as configs/two_stream.py does"
    )
  kinds = (flags.IllegalFlagValueError, KeyError, TypeError, ValueError)
  return _last_line(error) if isinstance(error, kinds) else ""


def _no_file(path):
  """Return the message for an experiment's file that does not exist."""
  folder = glob.escape(os.path.dirname(path))
  files = glob.glob(os.path.join(folder, "*.py")) + glob.glob("configs/*.py")
  name = pathlib.Path(path).stem
  near = difflib.get_close_matches(path, files, 1)
  near = near or difflib.get_close_matches(name, experiments.names(), 1)
  return f"no file {path}" + "".join(f"; did you mean {p}?" for p in near)


def _fields(name):
  """Return a hint if an unknown flag has the name of fields, else ""."""
  paths = [path for path, _, _ in config_lib.leaves(config_lib.Config())]
  similar = [f"--{path}" for path in paths if path.endswith(f".{name}")]
  return f"; did you mean {' or '.join(similar)}?" if similar else ""


def _expanded(argument: str) -> str:
  """Return a --config=~/file.py with the home folder instead of ~.

  A shell leaves a ~ after the sign of equality as it is.
  """
  flag, _, path = argument.partition("=")
  if flag not in ("--config", "-config") or not path.startswith("~"):
    return argument
  return f"{flag}={paths.of(path, flag)}"


def _check_override(argument: str) -> None:
  """Check that a --config.a.b=value fits the schema.

  Other arguments are not checked here.

  Raises:
    ConfigError: the schema has no such field, or the value has another type.
  """
  match = re.match(
    r"--?(?:no)?config\.([\w.]+)(?:=(.*))?$", argument, re.DOTALL
  )
  if not match:
    return
  path = "config"
  node: Any = config_lib.Config()
  for name in match[1].split("."):
    if not dataclasses.is_dataclass(node):
      raise config_lib.ConfigError(f"{path}.{name}: {path} has no fields")
    fields = [field.name for field in dataclasses.fields(node)]
    if name not in fields:
      raise config_lib.no_such_field(path, name, node)
    path, node = f"{path}.{name}", getattr(node, name)
  if dataclasses.is_dataclass(node):
    raise config_lib.ConfigError(f"{path}: a section; set one of its fields")
  if match[2] is not None and not _reads_as(type(node), match[2]):
    raise config_lib.ConfigError(
      f"{path}={match[2]!r}: must be {config_lib.KINDS[type(node)]}"
    )


def _reads_as(kind, text):
  """Return whether the text of an override can be read as type `kind`."""
  if kind is bool:
    return text.lower() in ("true", "false", "t", "f", "1", "0")
  try:
    return kind not in (int, float) or kind(text) is not None
  except ValueError:
    return False


def _last_line(error: Exception) -> str:
  """Return the message of an error whose text may hold a whole traceback."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1].removeprefix("aoarm_jax.config.schema.ConfigError: ")


def run(flag_values: flags.FlagValues, argv: list[str]) -> None:
  """Run the mode that the flags ask for.

  Args:
    flag_values: the parsed flags.
    argv: the command line, which is written to the run directory.

  Raises:
    UserError: the run failed for a reason that the user can mend; Preempted
      and ConfigError are such errors.
    flags.Error: the flags do not go together.
  """
  workdir = paths.of(
    flag_values.workdir
    or f"runs/{flag_values.config.name}-{flag_values.config.variant}",
    "--workdir",
  )
  if flag_values.mode not in ("count", *_WITHOUT_DEVICES):
    paths.reached(workdir, "--workdir")
  run_dir.check_workdir(workdir)
  config = config_lib.from_config_dict(flag_values.config)
  overridden = config_flags.get_override_values(flag_values["config"])
  reads_a_run = flag_values.mode in (*_READING_A_RUN, "export")
  if reads_a_run:
    config = opening.as_trained(config, workdir, overridden)
  config = config_rules.validate(config)
  _check_flags(flag_values)
  switches.fix_types()
  _join(config, workdir if reads_a_run else None, flag_values)
  if flag_values.mode == "prepare":
    out = paths.of(flag_values.out, "--out")
    print(prepare.prepare(config, out))
    return
  # The model of a run was matched when the run started.
  if not (reads_a_run and (workdir / "config.json").exists()):
    config_file = config_flags.get_config_filename(flag_values["config"])
    config = matching.resolve(config, config_file, overridden)
    config = config_rules.validate(config)
  if flag_values.mode == "train" and config.study.sweep:
    raise flags.Error(
      f"--config={config.name} is a sweep of many runs: --mode=study runs them"
    )
  tracking.check(config.telemetry)
  patience.set_seconds(config.telemetry.patience_seconds)
  match flag_values.mode:
    case "train":
      train.train(config, workdir, argv)
    case "eval":
      evaluate.evaluate(config, workdir)
    case "sample":
      page = flag_values.html and paths.of(flag_values.html, "--html")
      sample.sample(
        config, workdir, flag_values.prompt, flag_values.input, page
      )
    case "score":
      score.score(config, workdir, flag_values.text, flag_values.input)
    case "benchmark":
      suite.benchmark(config, workdir)
    case "config":
      print(explain.table(config))
    case "count":
      print(matching.table(config))
    case "study":
      sweep.study(config, workdir)
    case "export":
      exporting.export(config, workdir, paths.of(flag_values.out, "--out"))
    case "convert":
      folder = paths.of(flag_values.input, "--input")
      converting.convert(config, folder, workdir, argv, overridden)
    case "compile":
      print(pod.estimate(config, flag_values.topology))


def _join(config, run, flag_values):
  """Join the other processes, if any, and check that they do the same.

  Args:
    config: the config of this process.
    run: run directory that is read, else None.
    flag_values: the parsed flags.
  """
  # JAX must know the other processes before anything looks at a device.
  distributed.start(config.distributed)
  keeps_nothing = flag_values.mode not in _STOP_AFTER_A_BATCH
  if jax.distributed.is_initialized() and keeps_nothing:
    stopping.end_at_once(unwinds=True)  # JAX has taken SIGTERM for itself.
  with waits.ending_at_sigterm(0):
    if run:
      agreement.check_disk(run, writes=False)
    agreement.check_command(
      config, {name: flag_values[name].value for name in _AGREED_FLAGS}
    )
    if flag_values.mode not in _WITHOUT_DEVICES:
      meshes.all_devices()
      agreement.check_devices()


def _check_flags(flag_values):
  """Raise flags.Error for a flag that the mode does not read, or lacks."""
  mode = flag_values.mode
  for name, modes in (
    ("prompt", ("sample",)),
    ("text", ("score",)),
    ("input", ("sample", "score", "convert")),
    ("topology", ("compile",)),
    ("out", ("prepare", "export")),
    ("html", ("sample",)),
  ):
    if flag_values[name].value and mode not in modes:
      needs = " or ".join(f"--mode={mode}" for mode in modes)
      raise flags.Error(f"--{name} needs {needs}")
  if sys.stdout is None and mode in _PRINTING:
    raise flags.Error(
      f"standard output is closed, and --mode={mode} prints its answer there"
    )
  for name, needing, what, example in (
    ("topology", "compile", "a TPU slice", "v5p:4x4x8"),
    ("out", "prepare", "the folder of the prepared text", "prepared/books"),
    ("out", "export", "the folder of the exported model", "models/books"),
    (
      "input",
      "convert",
      "the folder of a model of Hugging Face",
      "models/Qwen3-0.6B",
    ),
  ):
    if mode == needing and not flag_values[name].value:
      raise flags.Error(f"--mode={mode} needs {what}, as in --{name}={example}")
  for name, what in (
    ("prompt", "give a text"),
    ("input", "give a text"),
    ("html", "name a file"),
  ):
    if flag_values[name].present and not flag_values[name].value:
      raise flags.Error(f"--{name} is empty: leave it out, or {what}")
  if flag_values.html:
    _check_page(flag_values)
  text = flag_values.text or flag_values.prompt
  if text and flag_values.input:
    raise flags.Error("--input goes without --prompt and --text")
  if mode == "score" and not (text or flag_values.input):
    raise flags.Error(
      "--mode=score needs --text='the [qu]ick fox', or --input=FILE with one "
      "text a line ('-' is standard input)"
    )


def _check_page(flag_values):
  """Raise flags.Error if --html cannot be written, before texts are drawn."""
  if flag_values.input:
    raise flags.Error(
      "--html goes without --input: it replays the texts of one --prompt"
    )
  try:
    argument_types.output(flag_values.html)
  except argparse.ArgumentTypeError as error:
    raise flags.Error(f"--html={error}") from error


@distributed.failing_at_once()
def main(argv: list[str]) -> None:
  """Run the command line; end the program with its exit code.

  Args:
    argv: the arguments that are not flags. There are none: the whole command
      is in sys.argv.
  """
  del argv
  telemetry.setup_logging()
  switches.keep_compilations()
  stopping.end_at_once(unwinds=True)
  try:
    with distributed.blaming_neighbours():
      run(flags.FLAGS, sys.argv)
  except stopping.Stopped as stop:
    logging.warning("%s", stop)
    sys.exit(stop.exit_code)
  except KeyboardInterrupt:
    goes_on = _GOES_ON.get(flags.FLAGS.mode, "")
    _fail("interrupted" + goes_on, exit_codes.INTERRUPTED)
  except flags.Error as error:
    _fail(error, exit_codes.REFUSED)
  except errors.UserError as error:
    _fail(error, error.exit_code)
  except pallas_kernels.UnsupportedError as error:
    _fail(f"config.compute.attention: {error}", exit_codes.REFUSED)
  except OSError as error:
    _fail_by_system(error)
  except jax.errors.JaxRuntimeError as error:
    if not telemetry.is_out_of_memory(error):
      raise
    hint = _LESS_MEMORY[flags.FLAGS.mode]
    _fail(f"out of device memory: {hint}", exit_codes.FAILED)
  finally:
    stopping.forget_signals()


def _fail_by_system(error):
  """Print what the operating system refused, and end the program."""
  if error.errno is None:
    raise error
  # The reader of the output has ended, as `| head` does.
  if error.errno == errno.EPIPE:
    _end_without_reader()
  is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  # Errors of files name the file; errors of a stream name nothing.
  place = error.filename or ("standard output, probably" if is_full else "")
  where = f": {place}" if place else ""
  hint = " (free some space and start the same command again)"
  _fail(f"{os.strerror(error.errno)}{where}{hint * is_full}", exit_codes.FAILED)


def _end_without_reader():
  """End the program whose output nobody reads any more."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(128 + signal.SIGPIPE)


def _fail(error, code):
  """Print an error in one line and end the program."""
  print(f"aoarm_jax: error: {error}", file=sys.stderr)
  sys.exit(code)


def help_text(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> str:
  """Return what --help prints: the flags, and every field of the config.

  Args:
    argv: the command line. If it names an experiment, the values of its fields
      are shown, else the defaults.
    flag_values: the flags to set, see `define_flags`.

  Raises:
    flags.Error, ConfigError: see `parse`.
  """
  config = config_lib.Config()
  argv = [argument for argument in argv if argument not in _HELP]
  if any(re.match("--?config(=|$)", argument) for argument in argv):
    parse(argv, flag_values)
    config = config_lib.from_config_dict(flag_values.config)
  ours = flag_values.get_key_flags_for_module(sys.modules[__name__])
  lines = [f"--{flag.name}: {flag.help}" for flag in ours]
  indented = functools.partial(
    textwrap.fill, width=80, initial_indent="  ", subsequent_indent="      "
  )
  return "\n\n".join(
    (
      f"{__doc__.strip()}\n\nFlags:\n" + "\n".join(map(indented, lines)),
      "Experiments:\n" + indented(", ".join(experiments.names())),
      "Variants of most experiments:\n"
      + indented(", ".join(experiments.VARIANTS)),
      f"Fields of {config.name}:{config.variant}:",
      explain.table(config),
    )
  )


@distributed.failing_at_once()
def _parse_or_exit(argv):
  """Parse the command line, or end the program with exit code 2."""
  try:
    if not set(_HELP).isdisjoint(argv[1:]):
      print(help_text(argv), flush=True)
      sys.exit(0)
    return parse(argv)
  except OSError as error:
    return _fail_by_system(error)
  except (errors.UserError, flags.Error) as error:
    return _fail(_last_line(error), exit_codes.REFUSED)


def command() -> None:
  """Run the command aoarm_jax; it is the same as python -m aoarm_jax.main."""
  try:
    app.run(main, flags_parser=_parse_or_exit)
  except SystemExit as end:
    stopping.leave_compilations(end.code)
    raise


if __name__ == "__main__":
  command()
