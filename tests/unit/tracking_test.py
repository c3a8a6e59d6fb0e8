"""Metrics for TensorBoard and for Weights & Biases."""

import importlib.util
import sys
import tempfile
import types
from unittest import mock

from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import metrics, tracking


def _config(**telemetry):
  return config_lib.Config(telemetry=config_lib.Telemetry(**telemetry))


class _Run:
  """Keeps values as Weights & Biases does: no step comes before an older."""

  offline, dir = True, "offline"

  def __init__(self):
    self.steps, self.codes = {}, []

  def log(self, values, step):
    if step >= max(self.steps, default=0):
      self.steps.setdefault(step, {}).update(values)

  def finish(self, exit_code):
    self.codes.append(exit_code)


class _Service(types.ModuleType):
  """The part of the library wandb that is used, with its runs by id."""

  def __init__(self, error=None):
    super().__init__("wandb")
    self.runs, self.calls, self.error = {}, [], error

  def Settings(self, **values):
    return values

  def init(self, **options):
    if self.error:
      raise self.error
    self.calls.append(options)
    return self.runs.setdefault(options["id"], _Run())


class TrackingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def run_steps(self, start, stop, config, fails_at=None):
    """A run that validates after every third step, and may fail."""
    with metrics.Writer(
      self.workdir,
      start_step=start,
      primary=True,
      trackers=tracking.start(config, self.workdir, start),
    ) as writer:
      for step in range(start, stop + 1):
        if step == fails_at:
          raise ZeroDivisionError
        if step > start:
          writer.write(
            step, "train", loss_nats_per_token=1 / step, mfu=None, unit="char"
          )
        if step % 3 == 0:
          writer.write(step, "valid", estimator="elbo", bits_per_char=2.0)

  def service(self, **options):
    service = _Service(**options)
    self.enterContext(mock.patch.dict(sys.modules, wandb=service))
    # Installed or not, the library is not looked for.
    self.enterContext(mock.patch.object(tracking, "check"))
    return service

  @parameterized.parameters(
    (dict(tensorboard=True), "tensorboard=True: tensorboardX", "tensorboard"),
    (dict(wandb="team/x"), "wandb=team/x: wandb is not installed", "wandb"),
  )
  def test_a_missing_library_names_the_extra(self, telemetry, start, extra):
    with (
      mock.patch.object(importlib.util, "find_spec", return_value=None),
      self.assertRaises(config_lib.ConfigError) as raised,
    ):
      tracking.start(_config(**telemetry), self.workdir, 0)
    message = str(raised.exception)
    self.assertStartsWith(message, f"config.telemetry.{start}")
    self.assertIn(f"pip install 'aoarm_jax[{extra}]'", message)
    self.assertNotIn("\n", message)

  def test_a_folder_of_its_name_is_no_library(self):
    """Weights & Biases itself makes ./wandb, where it runs."""
    (self.workdir / "wandb").mkdir()
    self.enterContext(mock.patch.object(sys, "path", [str(self.workdir)]))
    self.enterContext(mock.patch.dict(sys.modules))
    sys.modules.pop("wandb", None)
    with self.assertRaisesRegex(config_lib.ConfigError, "is not installed"):
      tracking.check(_config(wandb="x").telemetry)

  def test_a_run_that_dies_has_failed(self):
    service = self.service()
    with self.assertRaises(ZeroDivisionError):
      self.run_steps(0, 3, _config(wandb="x"), fails_at=2)
    (run,) = service.runs.values()
    self.assertEqual(run.codes, [1])

  def test_nothing_is_sent_unless_asked_for(self):
    service = self.service()
    self.assertEqual(tracking.start(_config(), self.workdir, 0), [])
    self.assertEmpty(service.calls)
    self.assertEmpty(list(self.workdir.iterdir()))

  def test_tensorboard_events(self):
    for start, stop in ((0, 3), (2, 3)):
      self.run_steps(start, stop, _config(tensorboard=True))
    events = list((self.workdir / "tensorboard").iterdir())
    written = b"".join(path.read_bytes() for path in events)
    self.assertIn(b"train/loss_nats_per_token", written)
    self.assertIn(b"valid/elbo/bits_per_char", written)

  def test_a_resumed_run_continues_its_run(self):
    service, config = self.service(), _config(wandb="team/speed")
    self.run_steps(0, 5, config)
    self.run_steps(3, 7, config)  # Killed after step 5, saved at step 3.
    (run,) = service.runs.values()
    self.assertEqual(run.codes, [0, 0])
    wanted = {
      step: {"train/loss_nats_per_token": 1 / step} for step in range(1, 8)
    } | {0: {}}
    for step in (0, 3, 6):
      wanted[step]["valid/elbo/bits_per_char"] = 2.0
    self.assertEqual(run.steps, wanted)
    first, second = service.calls
    self.assertEqual(first, second)
    self.assertEqual((first["entity"], first["project"]), ("team", "speed"))
    self.assertEqual(first["resume"], "allow")
    self.assertEqual(first["config"]["telemetry"]["wandb"], "team/speed")

    # A run that begins anew is another run.
    self.run_steps(0, 1, config)
    self.assertLen(service.runs, 2)

  def test_a_run_goes_on_without_the_service(self):
    self.service()
    with (
      mock.patch.object(_Run, "log", side_effect=OSError("no network\nmore")),
      self.assertLogs("absl", "WARNING") as logs,
    ):
      self.run_steps(0, 5, _config(wandb="x"))
    (line,) = logs.output
    self.assertRegex(line, "takes no more metrics: no network; .*goes on$")
    self.assertLen(metrics.read(self.workdir), 7)

  def test_a_refusal_is_one_line(self):
    self.service(error=RuntimeError("api_key not configured\nmore"))
    with self.assertRaises(config_lib.ConfigError) as raised:
      tracking.start(_config(wandb="x"), self.workdir, 0)
    self.assertRegex(
      str(raised.exception),
      "config.telemetry.wandb=x: .*: api_key not configured; log in .*offline",
    )
    self.assertNotIn("\n", str(raised.exception))


if __name__ == "__main__":
  absltest.main()
