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
import errno
import signal

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import pallas_kernels
from aoarm_jax import command_line
from aoarm_jax.benchmark import suite
from aoarm_jax.config import errors, exit_codes, explain, paths
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

_PRINTING = (
  *("sample", "score", "benchmark"),
  *("config", "count", "compile", "prepare"),
)
_READING_A_RUN = ("eval", "sample", "score", "benchmark")
# These modes touch no device, and they run in one process.
_WITHOUT_DEVICES = ("config", "compile", "prepare")

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


command_line.define_flags(flags.FLAGS)


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


@distributed.failing_at_once()
def _parse_or_exit(argv):
  """Parse the command line, or end the program with exit code 2."""
  try:
    if not set(command_line.HELP).isdisjoint(argv[1:]):
      print(command_line.help_text(__doc__, argv), flush=True)
      sys.exit(0)
    return command_line.parse(argv)
  except OSError as error:
    return _fail_by_system(error)
  except (errors.UserError, flags.Error) as error:
    return _fail(command_line.last_line(error), exit_codes.REFUSED)


def command() -> None:
  """Run the command aoarm_jax; it is the same as python -m aoarm_jax.main."""
  try:
    app.run(main, flags_parser=_parse_or_exit)
  except SystemExit as end:
    stopping.leave_compilations(end.code)
    raise


if __name__ == "__main__":
  command()
