"""Tests of telemetry.py: log lines, speed, profile window, NaN guard."""

import importlib.util
import io
import logging as python_logging
import math
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from absl.testing import absltest, parameterized

from aoarm_jax.runs import telemetry


class _Device:
  def __init__(self, kind):
    self.device_kind = kind


class _Clock:
  """Seconds that pass only when told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class ProgressTest(parameterized.TestCase):
  def progress(self, devices=(), flops_per_token=None, start_step=0):
    self.clock = _Clock()
    return telemetry.Progress(
      total_steps=100,
      start_step=start_step,
      tokens_per_step=1000,
      flops_per_token=flops_per_token,
      devices=devices,
      clock=self.clock,
    )

  def test_nothing_is_known_before_two_ticks(self):
    progress = self.progress([_Device("NVIDIA H200")], 1e6)
    for _ in range(2):
      self.assertIsNone(progress.step_seconds)
      self.assertIsNone(progress.tokens_per_second)
      self.assertIsNone(progress.mfu)
      self.assertIsNone(progress.eta_seconds)
      progress.tick(1)

  def test_compilation_and_pauses_are_left_out(self):
    progress = self.progress()
    self.clock.now += 30.0  # compilation
    progress.tick(1)
    for step in range(2, 11):
      self.clock.now += 0.5
      progress.tick(step)
      with progress.pause():
        self.clock.now += 7.0
    self.assertAlmostEqual(progress.step_seconds, 0.5)
    self.assertAlmostEqual(progress.tokens_per_second, 2000.0)
    self.assertAlmostEqual(progress.eta_seconds, 45.0)

  def test_any_subset_of_the_steps_gives_the_speed(self):
    progress = self.progress(start_step=40)
    progress.tick(41)
    self.clock.now += 18.0
    progress.tick(50)
    self.assertAlmostEqual(progress.step_seconds, 2.0)

  def test_speed_follows_a_machine_that_slows_down(self):
    progress = self.progress()
    for step in range(1, 201):
      self.clock.now += 0.5 if step <= 100 else 2.0
      progress.tick(step)
    self.assertAlmostEqual(progress.step_seconds, 2.0)
    self.assertEqual(progress.eta_seconds, 0.0)

  def test_a_pause_that_fails_still_counts(self):
    progress = self.progress()
    progress.tick(1)
    with self.assertRaises(KeyError), progress.pause(jnp.ones(3)):
      self.clock.now += 9.0
      raise KeyError
    self.clock.now += 1.0
    progress.tick(2)
    self.assertAlmostEqual(progress.step_seconds, 1.0)

  def test_mfu(self):
    progress = self.progress(
      [_Device("NVIDIA H200")] * 2, flops_per_token=989e6
    )
    progress.tick(1)
    self.clock.now += 0.01
    progress.tick(2)
    self.assertAlmostEqual(progress.mfu, 1e5 * 989e6 / (2 * 989e12))
    for devices in ([_Device("cpu")], [_Device("NVIDIA H200"), _Device("?")]):
      progress = self.progress(devices, flops_per_token=989e6)
      progress.tick(1)
      self.clock.now += 0.01
      progress.tick(2)
      self.assertIsNone(progress.mfu)


class LogTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.2, "0s"),
    (12, "12s"),
    (59.7, "1m00s"),
    (200, "3m20s"),
    (3720, "1h02m"),
    (183600, "2d03h"),
  )
  def test_format_duration(self, seconds, text):
    self.assertEqual(telemetry.format_duration(seconds), text)

  @parameterized.parameters(
    (7, "7"),
    (870.2, "870"),
    (999.7, "1.00k"),
    (53_100, "53.1k"),
    (531_000, "531k"),
    (2_120_000, "2.12M"),
    (1_050_000_000, "1.05B"),
  )
  def test_format_count(self, count, text):
    self.assertEqual(telemetry.format_count(count), text)

  def test_log_line(self):
    values = dict(
      loss_nats_per_token=1.4431,
      bits_per_char=2.082,
      learning_rate=1.2e-3,
      gradient_norm=0.41,
      tokens_per_second=2.12e6,
      mfu=0.19,
      eta_seconds=200.0,
      something_for_the_file=3.0,
    )
    self.assertEqual(
      telemetry.log_line(1250, 2000, values),
      "step 1,250/2,000  loss 1.4431 nats/token  2.082 bits/char  lr 1.2e-03  "
      "grad 0.41  2.12M tokens/s  MFU 19%  ETA 3m20s",
    )
    values = dict(loss_nats_per_token=3.0, mfu=None)
    self.assertEqual(
      telemetry.log_line(50, 2000, values),
      "step    50/2,000  loss 3.0000 nats/token",
    )
    self.assertIn("MFU 0.4%", telemetry.log_line(1, 2, dict(mfu=0.004)))

  def test_setup_logging(self):
    handler = logging.get_absl_handler().python_handler
    stream = io.StringIO()
    self.addCleanup(logging.set_verbosity, logging.get_verbosity())
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(handler, "stream", stream)
      patch.setattr(sys, "stderr", stream)
      telemetry.setup_logging()
      telemetry.setup_logging()
      logging.info("training %s", "starts")
      logging.warning("beware")
      library = importlib.util.find_spec("orbax").submodule_search_locations[0]
      for level in (python_logging.INFO, python_logging.WARNING):
        handler_of_absl = logging.get_absl_handler()
        handler_of_absl.handle(
          logging.get_absl_logger().makeRecord(
            "absl", level, f"{library}/x.py", 1, "orbax speaks", (), None
          )
        )
      python_logging.getLogger("jax").info("chatter")
    lines = [
      line
      for line in stream.getvalue().splitlines()
      if "Logging before flag parsing" not in line  # absl's, without app.run
    ]
    stamps = [line[:9] for line in lines]
    self.assertEqual(
      [line[9:] for line in lines],
      ["training starts", "warning: beware", "warning: orbax speaks"],
    )
    for stamp in stamps:
      time.strptime(stamp, "%H:%M:%S ")

  @parameterized.parameters(
    ("RESOURCE_EXHAUSTED: Failed to allocate request for 1.0GiB", True),
    ("INTERNAL: Error preparing: Out of memory allocating 9 bytes.", True),
    ("INTERNAL: an illegal memory access", False),
  )
  def test_out_of_memory(self, message, is_one):
    error = jax.errors.JaxRuntimeError(message)
    self.assertEqual(telemetry.is_out_of_memory(error), is_one)

  def test_check_finite(self):
    telemetry.check_finite(7, {"loss": 1.0, "gradient norm": np.float32(2)})
    with self.assertRaises(telemetry.NonFiniteError) as raised:
      telemetry.check_finite(
        120, {"loss": jnp.float32(jnp.nan), "gradient norm": math.inf, "x": 1.0}
      )
    message = str(raised.exception)
    self.assertStartsWith(
      message, "loss is nan and gradient norm is inf at step 120"
    )
    self.assertIn("--config.optimizer.peak_learning_rate", message)


class ProfileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(
      self.enterContext(tempfile.TemporaryDirectory())
    )

  def test_window(self):
    profile = telemetry.ProfileWindow(self.workdir, 3, 2, True)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        jax.profiler, "start_trace", lambda f: calls.append("start")
      )
      patch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
      for step in range(1, 8):
        profile.before_step(step, wait_for=jnp.ones(2))
        with profile.annotation(step):
          calls.append(step)
      profile.close()
    self.assertEqual(calls, [1, 2, "start", 3, 4, "stop", 5, 6, 7])

  @parameterized.parameters((-1, True), (1, False))
  def test_no_window(self, start, primary):
    profile = telemetry.ProfileWindow(self.workdir, start, 2, primary)
    for step in range(5):
      profile.before_step(step)
    profile.close()
    self.assertFalse((self.workdir / "profile").exists())

  def test_close_ends_a_real_trace(self):
    profile = telemetry.ProfileWindow(self.workdir, 1, 100, True)
    profile.before_step(1)
    with profile.annotation(1):
      jnp.ones(3).block_until_ready()
    profile.close()
    profile.close()
    traces = (self.workdir / "profile").rglob("*")
    self.assertNotEmpty([path for path in traces if path.is_file()])


if __name__ == "__main__":
  absltest.main()
