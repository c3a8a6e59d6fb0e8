"""The flags of the program, and what is wrong with a command line."""

import dataclasses
import difflib
import functools
import glob
import os
import pathlib
import re
import sys
import textwrap
import traceback
from typing import Any

from absl import flags
from ml_collections import config_flags

from aoarm_jax.config import experiments, explain, paths
from aoarm_jax.config import schema as config_lib

MODES = (
  *("train", "eval", "sample", "score", "benchmark"),
  *("config", "count", "study", "compile", "prepare", "export", "convert"),
)
HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
_NO_CONFIG = (
  "--config is missing: name an experiment, as in --config=two_stream:tiny, or "
  "its file, as in --config=configs/two_stream.py:tiny"
)


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
    check_override(argument)
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


def help_text(
  about: str, argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> str:
  """Return what --help prints: the flags, and every field of the config.

  Args:
    about: what the program is, above its flags.
    argv: the command line. If it names an experiment, the values of its fields
      are shown, else the defaults.
    flag_values: the flags to set, see `define_flags`.

  Raises:
    flags.Error, ConfigError: see `parse`.
  """
  config = config_lib.Config()
  argv = [argument for argument in argv if argument not in HELP]
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
      f"{about.strip()}\n\nFlags:\n" + "\n".join(map(indented, lines)),
      "Experiments:\n" + indented(", ".join(experiments.names())),
      "Variants of most experiments:\n"
      + indented(", ".join(experiments.VARIANTS)),
      f"Fields of {config.name}:{config.variant}:",
      explain.table(config),
    )
  )


def _with_paths(argv):
  """Return the command line with the path of the experiment for its name."""
  arguments, is_value = [], False
  for argument in argv:
    flag, equals, value = argument.partition("=")
    if is_value and argument:
      argument = experiments.find(argument)
    elif flag in ("--config", "-config") and value:
      argument = f"{flag}={experiments.find(value)}"
    is_value = flag in ("--config", "-config") and not equals
    arguments.append(argument)
  return arguments


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
    line = last_line(error)
    absent = re.search(r"No such file or directory: '(.+)'$", line)
    return f"{name}: {_no_file(absent[1]) if absent else line}"
  if isinstance(error, AttributeError):
    return (
      f"{name}: the file must define get_config(variant), which returns "
      "experiments.experiment(...), as configs/two_stream.py does"
    )
  kinds = (flags.IllegalFlagValueError, KeyError, TypeError, ValueError)
  return last_line(error) if isinstance(error, kinds) else ""


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
  names = [path for path, _, _ in config_lib.leaves(config_lib.Config())]
  similar = [f"--{path}" for path in names if path.endswith(f".{name}")]
  return f"; did you mean {' or '.join(similar)}?" if similar else ""


def _expanded(argument: str) -> str:
  """Return a --config=~/file.py with the home folder instead of ~.

  A shell leaves a ~ after the sign of equality as it is.
  """
  flag, _, path = argument.partition("=")
  if flag not in ("--config", "-config") or not path.startswith("~"):
    return argument
  return f"{flag}={paths.of(path, flag)}"


def check_override(argument: str) -> None:
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


def last_line(error: Exception) -> str:
  """Return the message of an error whose text may hold a whole traceback."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[-1].removeprefix("aoarm_jax.config.schema.ConfigError: ")
