"""The command line: every error is one line that names what to mend."""

import contextlib
import errno
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from unittest import mock

import helpers
import jax
import pytest
from absl import flags
from absl.testing import absltest, parameterized

from aoarm_jax import command_line, main
from aoarm_jax.config import errors
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.devices import switches
from aoarm_jax.runs import exported

TINY = f"--config={helpers.TINY}"
NEW_CONFIG = """
from aoarm_jax.config import experiments

def get_config(variant="default"):
  return experiments.experiment("new", variant, {changes})
"""


class StartTest(absltest.TestCase):
  def test_processes_are_joined_before_any_look_at_a_device(self):
    """To count parameters, as a match does, starts JAX's backend."""
    calls = mock.Mock()
    calls.resolve.side_effect = lambda config, *_: config
    calls.table.return_value = ""
    with (
      mock.patch.object(main.distributed, "start", calls.start),
      mock.patch.object(main.matching, "resolve", calls.resolve),
      mock.patch.object(main.matching, "table", calls.table),
    ):
      helpers.run([f"--config={helpers.TINY}", "--mode=count"])
    order = [call[0] for call in calls.method_calls]
    self.assertEqual(order, ["start", "resolve", "table"])

  def test_the_match_knows_the_overrides(self):
    resolve = mock.Mock(side_effect=lambda config, *_: config)
    with (
      mock.patch.object(main.matching, "resolve", resolve),
      mock.patch.object(main.matching, "table", return_value=""),
    ):
      helpers.run([TINY, "--mode=count", "--config.model.D=128"])
    config, path, overridden = resolve.call_args.args
    self.assertEqual(config.model.D, 128)
    self.assertEqual(path, helpers.TINY)
    self.assertEqual(list(overridden), ["model.D"])

  def test_the_model_of_a_run_is_not_matched_again(self):
    with (
      tempfile.TemporaryDirectory() as folder,
      mock.patch.object(main.evaluate, "evaluate") as evaluate,
    ):
      trained = helpers.config_of([TINY]).replace("model.mlp_width", 40)
      path = pathlib.Path(folder) / "config.json"
      path.write_text(config_lib.to_json(trained))
      match = [
        f"--config.match.{name}"
        for name in ("to=causal", "by=parameters", "change=mlp_width")
      ]
      helpers.run([TINY, "--mode=eval", f"--workdir={folder}", *match])
    self.assertEqual(evaluate.call_args.args[0].model.mlp_width, 40)

  def test_the_cache_folder_is_the_user_s(self):
    for value, folder in (
      ("/cache", "/cache/aoarm_jax"),
      # To be ignored: no absolute path.
      ("relative", "/home/me/.cache/aoarm_jax"),
      ("", "/home/me/.cache/aoarm_jax"),
    ):
      environment = {"XDG_CACHE_HOME": value, "HOME": "/home/me"}
      with mock.patch.dict(os.environ, environment):
        self.assertEqual(switches.cache_folder(), pathlib.Path(folder))


class ParseTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def refused(self, *command):
    """The message of a command that may not be; nothing may be written."""
    command = (f"--workdir={self.folder / 'run'}", *command)
    taken = absltest.mock.patch.object(
      corpora, "load", side_effect=AssertionError("the command was taken")
    )
    with self.assertRaises((errors.UserError, flags.Error)) as caught, taken:
      helpers.run(command)
    self.assertEqual(os.listdir(self.folder), [])
    # What parse raises is reprinted by its last line, what run raises whole.
    message = str(caught.exception)
    self.assertLen(message.splitlines(), 1)
    return message

  @parameterized.parameters(
    (
      "--config.train.stepz=3",
      "config.train.stepz: no such field; config.train has: steps, batch_size",
    ),
    ("--config.trian.steps=3", "config.trian: no such field; config has: name"),
    ("--noconfig.compute.rematt", "config.compute.rematt: no such field"),
    ("-config.train.stepz=3", "config.train.stepz: no such field"),
    ("--config.train.steps.x=3", "config.train.steps.x: config.train.steps"),
    ("--config.train=3", "config.train: a section; set one of its fields"),
  )
  def test_unknown_field(self, override, message):
    self.assertStartsWith(self.refused(TINY, override), message)

  @parameterized.parameters(
    ("train.steps", "many", "int"),
    ("train.steps", "1.5", "int"),
    ("train.steps", "1e3", "int"),
    ("train.steps", "", "int"),
    ("optimizer.b1", "high", "float"),
    ("optimizer.b1", "", "float"),
    ("compute.remat", "yes", "bool"),
    ("compute.remat", "7", "bool"),
    ("orders.given", "(1,2", "tuple"),
  )
  def test_wrong_type(self, path, value, kind):
    message = self.refused(TINY, f"--config.{path}={value}")
    self.assertIn(f"config.{path}=", message)
    self.assertIn(value, message)
    self.assertIn(kind, message)

  def test_wrong_type_as_an_argument_of_its_own(self):
    message = self.refused(TINY, "--config.train.steps", "many")
    self.assertIn("config.train.steps=many", message)

  @parameterized.parameters(
    ("train.steps", "0", "must be at least 1"),
    ("train.steps", "-3", "must be at least 1"),
    ("seed", "99999999999999999999", "must be at most"),
    ("optimizer.b1", "1.5", "must be below 1"),
    ("optimizer.peak_learning_rate", "nan", "must be finite"),
    ("model.mechanism", "mamba", "'mamba' is not one of two_stream"),
    ("model.N", "3", "must divide config.model.D=64"),
    ("compute.accumulate", "5", "must divide config.train.batch_size=32"),
    ("eval.estimators", "5", "5 is not one of any_order"),
    ("eval.estimators", "('any_order','typo')", "'typo' is not one of"),
    ("eval.estimators", "()", "at least one"),
    ("orders.given", "(1,2)", "must be a permutation of 1..64"),
    ("mesh.data", "9999", "use at most that many, or 0 for all"),
  )
  def test_impossible_value(self, path, value, message):
    got = self.refused(TINY, f"--config.{path}={value}")
    self.assertStartsWith(got, f"config.{path}=")
    self.assertIn(message, got)

  def test_overrides_arrive_with_their_types(self):
    config = helpers.config_of(
      [
        TINY,
        "--config.train.steps",
        "5",
        "--config.optimizer.b1=1",
        "--config.compute.remat",
        "--config.eval.estimators=ensembled",
        "--config.orders.given=(2,1)",
        "--config.data.path=a=b c",
      ],
    )
    self.assertEqual(config.train.steps, 5)
    self.assertIs(type(config.optimizer.b1), float)
    self.assertIs(config.compute.remat, True)
    self.assertEqual(config.eval.estimators, ("ensembled",))
    self.assertEqual(config.orders.given, (2, 1))
    self.assertEqual(config.data.path, "a=b c")
    config = helpers.config_of([TINY, "--noconfig.compute.remat"])
    self.assertIs(config.compute.remat, False)

  def test_unknown_variant(self):
    path = helpers.TINY.removesuffix(":tiny")
    self.assertEqual(
      self.refused(f"--config={path}:huge"),
      "configs/two_stream.py has no variant 'huge'; it has: default, long, "
      "bpe, base, 124m, 1b, 7b, qwen3-0.6b, qwen3-1.7b, qwen3-8b, tiny",
    )

  @parameterized.parameters(
    ("--config=configs/absent.py", "configs/absent.py"),
    ("-config=configs/absent.py", "configs/absent.py"),
    (
      "--config=configs/twostream.py:tiny",
      "configs/twostream.py:tiny: no file "
      "configs/twostream.py; did you mean configs/two_stream.py?",
    ),
    ("--config=config/causal.py", "did you mean configs/causal.py?"),
    ("--config=configs", "configs"),
    ("--config=", "--config="),
    ("--config", "--config"),
    ("--config.train.steps=3", "--config is missing"),
    ("--seed=3", "--config is missing: name an experiment, as in"),
  )
  def test_no_experiment(self, argument, message):
    command = [] if argument == "--seed=3" else [argument]
    self.assertIn(message, self.refused(*command))

  @parameterized.parameters(
    ("model={'width': 3}", "width"),
    ("model={'D': 'wide'}", "config.model.D='wide'"),
    ("model={'N': 3}", "config.model.N=3"),
  )
  def test_wrong_experiment_file(self, changes, message):
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
      file.write(NEW_CONFIG.format(changes=changes))
      file.flush()
      self.assertIn(message, self.refused(f"--config={file.name}"))

  @parameterized.parameters(
    ("def get_config(_=0):\n  return nothing", "x.py, line 2: NameError: name"),
    ("def get_config(_=0):\n  open('/no')", "x.py, line 2: FileNotFoundError"),
    ("assert 0", "x.py, line 1: AssertionError"),
    ("def get_config(_=0):\n  int('a\\nb')", "x.py, line 2: ValueError: inv"),
    ("def get_config(_=0:", "x.py, line 1: not Python: "),
    ("import nothing", "x.py, line 1: ModuleNotFoundError: No module named"),
    ("[][1]\0", "--config={}: source code string cannot contain null bytes"),
    ("def get_config(_=0):\n  return 1", "--config={}: the file must define"),
    ("def get_config(_=0):\n  pass", "--config={}: the file must define"),
  )
  def test_file_that_is_no_experiment(self, source, message):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "x.py"
      path.write_text(source)
      got = self.refused(f"--config={path}")
    self.assertIn(message.format(path), got)

  @parameterized.parameters(
    ("--foo=1", "'foo'"),
    ("--steps=5", "flag 'steps'; did you mean --config.train.steps or --conf"),
    ("--orders.family=block", "did you mean --config.orders.family?"),
    ("--mode=fly", "--mode=fly: value should be one of <train|eval|sample"),
    ("--prompt=a_b", "--prompt needs --mode=sample"),
    ("--html=x.html", "--html needs --mode=sample"),
    ("extra", "unexpected argument 'extra'"),
    ("train.steps=3", "unexpected argument 'train.steps=3'"),
  )
  def test_other_flags(self, argument, message):
    self.assertIn(message, self.refused(TINY, argument))

  def test_prompt_needs_sample_in_eval_too(self):
    message = self.refused(TINY, "--mode=eval", "--prompt=a_b")
    self.assertEqual(message, "--prompt needs --mode=sample")

  @parameterized.parameters(
    ("x.html", "--input=x", "--html goes without --input"),
    ("", "", "--html is empty: leave it out, or name a file"),
    ("{}", "", "--html='.*': name a file, not a folder"),
    ("/dev/null", "", "--html='/dev/null': is a device or a pipe"),
  )
  def test_page_that_cannot_be(self, path, more, message):
    page = f"--html={path.format(self.folder)}"
    got = self.refused(TINY, "--mode=sample", page, *filter(None, [more]))
    self.assertRegex(got, f"^{message}")

  @parameterized.parameters(
    ("ab", "'ab' has no blank '_'"),
    ("_" * 65, "65 tokens.*at most 64 .config.model.T"),
  )
  def test_prompt_that_cannot_be(self, prompt, message):
    # The longer one is known after the model is: there is none here.
    if "_" in prompt:
      with self.assertRaisesRegex(errors.UserError, "no checkpoint in"):
        helpers.run(
          [
            TINY,
            f"--workdir={self.folder}",
            "--mode=sample",
            f"--prompt={prompt}",
          ]
        )
      return
    got = self.refused(TINY, "--mode=sample", f"--prompt={prompt}")
    self.assertRegex(got, message)

  def test_tensorboard_that_is_not_installed(self):
    with absltest.mock.patch("importlib.util.find_spec", lambda _: None):
      message = self.refused(TINY, "--config.telemetry.tensorboard")
    self.assertStartsWith(message, "config.telemetry.tensorboard=True")
    self.assertIn("pip install 'aoarm_jax[tensorboard]'", message)

  @parameterized.parameters("eval", "sample")
  def test_without_a_checkpoint(self, mode):
    """Said before the text is read."""
    unread = mock.patch.object(corpora, "load", side_effect=AssertionError)
    no_checkpoint = self.assertRaisesRegex(
      errors.UserError, "no checkpoint in .*train first, or .*--workdir"
    )
    with no_checkpoint, unread:
      helpers.run(helpers.arguments(self.folder / "run", {}, f"--mode={mode}"))
    self.assertFalse((self.folder / "run").exists())

  def test_text_that_is_not_there(self):
    with self.assertRaisesRegex(
      errors.UserError, "config.data.path=/absent: no such file or folder"
    ):
      helpers.run(
        helpers.arguments(self.folder / "run", {"data.path": "/absent"})
      )
    self.assertFalse((self.folder / "run").exists())

  def test_a_sweep_is_not_trained_as_one_run(self):
    config = str(helpers.ROOT / "configs" / "study_tradeoff.py")
    with self.assertRaisesRegex(
      flags.Error, "study_tradeoff is a sweep of many runs: --mode=study"
    ):
      helpers.run([f"--config={config}:tiny"])

  def test_base_without_its_text(self):
    path = helpers.TINY.removesuffix(":tiny")
    with self.assertRaisesRegex(errors.UserError, "get it from http.*text8"):
      helpers.run([f"--config={path}:base", f"--workdir={self.folder}"])

  def test_an_experiment_by_name(self):
    """Beside its path; the value may be an argument of its own."""
    by_path = helpers.config_of([TINY])
    for command in (
      ["--config=two_stream:tiny"],
      ["--config", "two_stream:tiny"],
      ["-config=two_stream:tiny"],
    ):
      self.assertEqual(helpers.config_of(command), by_path)
    values, _ = helpers.parse(["--config=causal", "--workdir=two_stream"])
    self.assertEqual(values.config.name, "causal")
    self.assertEqual(values.workdir, "two_stream")
    self.assertIn(
      "did you mean two_stream?", self.refused("--config=twostream:tiny")
    )

  def test_help_shows_flags_and_fields(self):
    values = flags.FlagValues()
    command_line.define_flags(values, ["main.py"])
    text = command_line.help_text(main.__doc__, ["main.py", "--help"], values)
    for flag in (*values, "config.model.T=128"):
      self.assertIn(f"--{flag}", text)
    self.assertIn("two_stream", text)
    argv = ["main.py", "--config=two_stream:tiny", "-h"]
    argv.append("--config.model.D=96")
    values = flags.FlagValues()
    command_line.define_flags(values, argv)
    text = command_line.help_text(main.__doc__, argv, values)
    self.assertIn("--config.model.D=96\n", text)
    self.assertIn("--config.model.T=64\n", text)
    self.assertIn("default 128", text)

  def test_a_mode_that_shows_the_fields(self):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
      helpers.run(
        [
          f"--config={helpers.TINY.replace('two_stream', 'decoupled_rope')}",
          "--mode=config",
          "--config.match.to=two_stream",
        ]
      )
    self.assertIn("--config.train.steps=3740\n", shown.getvalue())

  def test_an_answer_has_a_place(self):
    """Without standard output it would be lost in silence."""
    for mode, *more in (("score", "--text=a"), ("config",), ("count",)):
      with (
        mock.patch.object(sys, "stdout", None),
        self.assertRaisesRegex(flags.Error, f"closed, and --mode={mode} prin"),
      ):
        helpers.run([f"--config={helpers.TINY}", f"--mode={mode}", *more])

  def test_help_that_cannot_be_written(self):
    full = OSError(errno.ENOSPC, "full")
    err = io.StringIO()
    with (
      mock.patch.object(command_line, "help_text", side_effect=full),
      contextlib.redirect_stderr(err),
      self.assertRaises(SystemExit) as caught,
    ):
      main._parse_or_exit(["main.py", "--help"])
    self.assertEqual(caught.exception.code, 1)
    self.assertStartsWith(
      err.getvalue(),
      "aoarm_jax: error: No space left on device: standard output, probably",
    )
    self.assertLen(err.getvalue().splitlines(), 1)

  def test_flags_can_be_defined_anew(self):
    for steps in (3, 4):
      config = helpers.config_of([TINY, f"--config.train.steps={steps}"])
      self.assertEqual(config.train.steps, steps)
    self.assertFalse(flags.FLAGS["config"].present)


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters(*command_line.MODES)
  def test_out_of_memory_is_one_line_that_names_fields_there_are(self, mode):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    stderr = io.StringIO()
    with (
      mock.patch.object(main, "run", side_effect=error),
      mock.patch.object(main.flags, "FLAGS", mock.Mock(mode=mode)),
      mock.patch.object(main.switches, "keep_compilations"),
      mock.patch.object(main.telemetry, "setup_logging"),
      mock.patch.object(main.stopping, "end_at_once"),
      mock.patch.object(main.stopping, "forget_signals"),
      contextlib.redirect_stderr(stderr),
      self.assertRaises(SystemExit) as stop,
    ):
      main.main([])
    self.assertEqual(stop.exception.code, 1)
    (line,) = stderr.getvalue().splitlines()
    self.assertStartsWith(line, "aoarm_jax: error: out of device memory: ")
    for field in re.findall(r"--config\.[\w.]+", line):
      command_line.check_override(field)


SIGNALS = """
import os, sys, threading, time
def signal_repeatedly():
  for _ in range(5):
    os.kill(os.getpid(), int(os.environ["NUMBER"]))
    time.sleep(0.003)
"""
SIGNALLED_IN_IMPORT = (
  SIGNALS
  + """
class Finder:
  def find_spec(self, name, *_):
    if name == "jax":
      signal_repeatedly()
sys.meta_path.insert(0, Finder())
"""
)
# From a thread, so that the main thread is unwinding when the last ones come.
SIGNALLED_IN_COUNT = (
  SIGNALS
  + """
from aoarm_jax.tools import matching
def table(config):
  threading.Thread(target=signal_repeatedly).start()
  time.sleep(60)
matching.table = table
"""
)
UNWINDS = (
  SIGNALS
  + """
from aoarm_jax.devices import stopping
stopping.end_at_once(unwinds=True)
try:
  threading.Thread(target=signal_repeatedly).start()
  time.sleep(60)
finally:
  time.sleep(0.1)
  print("closed")
"""
)
# The first Ctrl-C is noted, the second one interrupts. JAX is not needed.
SECOND_WISH = (
  SIGNALS
  + """
import signal, types
several = types.SimpleNamespace(is_initialized=lambda: False)
sys.modules["jax"] = types.SimpleNamespace(distributed=several)
from aoarm_jax.devices import stopping
stopping.end_at_once(unwinds=True)
interrupts = 0
with stopping.Signals("step", (signal.SIGINT,)) as signals:
  signal_repeatedly()
  time.sleep(0.6)
  thread = threading.Thread(target=signal_repeatedly)
  for act in (thread.start, lambda: None):
    try:
      act()
      time.sleep(0.1)
    except KeyboardInterrupt:
      interrupts += 1
print(signals.received, interrupts)
"""
)


class ProcessTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("unknown_flag", [TINY, "--foo=1"], 2, "'foo'"),
    (
      "no_text",
      [TINY, "--config.data.path=/absent"],
      1,
      "config.data.path=/absent",
    ),
  )
  @pytest.mark.thorough
  def test_one_line_and_the_exit_code(self, command, exit_code, message):
    self.check_error(command, exit_code, message)

  @parameterized.named_parameters(
    (
      "unknown_field",
      [TINY, "--config.train.stepz=3"],
      2,
      "config.train.stepz: no such field",
    ),
    ("impossible_value", [TINY, "--config.model.N=3"], 2, "config.model.N=3"),
    (
      "workdir_is_a_file",
      [TINY, f"--workdir={__file__}"],
      2,
      "main_test.py is a file; name a folder",
    ),
  )
  @pytest.mark.slow
  def test_one_line_for_more_errors(self, command, exit_code, message):
    self.check_error(command, exit_code, message)

  def check_error(self, command, exit_code, message):
    with tempfile.TemporaryDirectory() as folder:
      process = helpers.start(command, folder=folder)
      code, out, err = helpers.finish(process)
      self.assertEqual((code, out), (exit_code, ""), err)
      self.assertLen(err.splitlines(), 1, err)
      self.assertStartsWith(err, "aoarm_jax: error: ")
      self.assertIn(message, err)
      self.assertEqual(os.listdir(folder), [])

  @parameterized.parameters((signal.SIGTERM, 75), (signal.SIGINT, 130))
  @pytest.mark.thorough
  def test_a_signal_in_the_first_second(self, number, exit_code):
    """While modules are imported, and more than once."""
    process = helpers.start(
      [TINY], code=SIGNALLED_IN_IMPORT, NUMBER=str(number)
    )
    code, out, err = helpers.finish(process)
    self.assertEqual((code, out), (exit_code, ""), err)
    self.assertLen(err.splitlines(), 1, err)
    self.assertStartsWith(err, "aoarm_jax: ")

  @pytest.mark.thorough
  def test_an_impatient_ctrl_c(self):
    process = helpers.start(
      [TINY, "--mode=count"],
      code=SIGNALLED_IN_COUNT,
      NUMBER=str(signal.SIGINT),
    )
    code, out, err = helpers.finish(process)
    self.assertEqual((code, out), (130, ""), err)
    self.assertEqual(err, "aoarm_jax: error: interrupted\n")

  def test_what_ends_at_once_closes_what_is_open(self):
    done = subprocess.run(
      [sys.executable, "-c", UNWINDS],
      env=helpers.environment(NUMBER=str(signal.SIGTERM)),
      capture_output=True,
      text=True,
    )
    self.assertEqual((done.returncode, done.stdout), (75, "closed\n"))
    self.assertEqual(
      done.stderr, "aoarm_jax: SIGTERM: start the same command again\n"
    )

  def test_a_second_ctrl_c_interrupts_once(self):
    done = subprocess.run(
      [sys.executable, "-c", SECOND_WISH],
      env=helpers.environment(NUMBER=str(signal.SIGINT)),
      capture_output=True,
      text=True,
    )
    self.assertEqual((done.returncode, done.stdout), (0, "2 1\n"))
    self.assertIn("SIGINT: stopping after this step", done.stderr)
    self.assertNotIn("Traceback", done.stderr)

  @pytest.mark.slow
  def test_a_wheel_is_usable(self):
    """pip install, then the command in a folder without a checkout."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    source = pathlib.Path(folder) / "source"
    shutil.copytree(
      helpers.ROOT, source, ignore=shutil.ignore_patterns(".git", "docs")
    )
    model = source / "aoarm_jax" / "models" / "stand-in"
    model.mkdir(parents=True)
    for name in exported.FILES:
      (model / name).write_text("")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    wheels, site = os.path.join(folder, "wheels"), os.path.join(folder, "site")
    subprocess.run(
      [*pip, "wheel", "--no-deps", "-w", wheels, source], check=True
    )
    (name,) = os.listdir(wheels)
    wheel = os.path.join(wheels, name)
    models = f"aoarm_jax/models/{model.name}"
    self.assertContainsSubset(
      [
        *(f"{models}/{name}" for name in exported.FILES),
        "aoarm_jax/generation/replay.html",
      ],
      zipfile.ZipFile(wheel).namelist(),
    )
    subprocess.run(
      [*pip, "install", "--no-deps", "-t", site, wheel], check=True
    )
    shown = subprocess.run(
      [
        os.path.join(site, "bin", "aoarm_jax"),
        "--config=two_stream:tiny",
        "--mode=count",
      ],
      cwd=folder,
      env=os.environ | {"PYTHONPATH": site, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    self.assertStartsWith(shown, "mechanism")

  @pytest.mark.thorough
  def test_devices_that_are_not_here(self):
    process = helpers.start([TINY, "--mode=count"], JAX_PLATFORMS="cuda")
    code, out, err = helpers.finish(process)
    if code:  # There may be a GPU.
      self.assertEqual((code, out), (2, ""))
      error = err.splitlines()[-1]
      self.assertStartsWith(
        error, "aoarm_jax: error: JAX_PLATFORMS=cuda: JAX finds no such device"
      )


if __name__ == "__main__":
  absltest.main()
