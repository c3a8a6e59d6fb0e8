"""Tests of runs/metrics.py: metrics.jsonl."""

import json
import math
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.runs import disk, metrics


class MetricsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.file = self.workdir / "metrics.jsonl"

  def writer(self, start_step=0, *, primary=True):
    return metrics.Writer(self.workdir, start_step=start_step, primary=primary)

  def test_records_come_back(self):
    with self.writer() as writer:
      writer.write(
        np.int32(5),
        "valid",
        estimator="any_order",
        bits_per_char=np.float32(2.5),
        nats_per_token=jnp.float32(1.5),
        slot_curve_bits=np.array([4.0, 0.5]),
        mfu=None,
      )
    self.assertEqual(
      metrics.read(self.workdir),
      [
        dict(
          step=5,
          kind="valid",
          estimator="any_order",
          bits_per_char=2.5,
          nats_per_token=1.5,
          slot_curve_bits=[4.0, 0.5],
          mfu=None,
        )
      ],
    )

  def test_no_file_is_no_records(self):
    self.assertEqual(metrics.read(self.workdir), [])

  def test_a_record_is_on_disk_at_once(self):
    writer = self.writer()
    writer.write(1, "train", loss_nats_per_token=2.0)
    self.assertLen(metrics.read(self.workdir), 1)
    writer.close()
    writer.close()
    with self.assertRaisesRegex(ValueError, "closed"):
      writer.write(2, "train", loss_nats_per_token=2.0)

  def test_non_finite_values_are_null(self):
    with self.writer() as writer:
      writer.write(
        1, "train", a=math.nan, b=jnp.float32(jnp.inf), c=[1.0, -math.inf]
      )

    def refuse(token):
      raise AssertionError(f"{token} is not JSON")

    record = json.loads(self.file.read_text(), parse_constant=refuse)
    self.assertEqual(record["a"], None)
    self.assertEqual(record["b"], None)
    self.assertEqual(record["c"], [1.0, None])

  def test_a_value_that_cannot_be_written_is_named(self):
    with self.writer() as writer, self.assertRaisesRegex(TypeError, "metric a"):
      writer.write(1, "train", a=object())

  def _run(self, start, stop):
    """A run that validates when it starts and after every third step."""
    with self.writer(start) as writer:
      for step in range(start, stop + 1):
        if step > start:
          writer.write(step, "train", loss_nats_per_token=1 / step)
        if step % 3 == 0:
          for estimator in ("any_order", "left_to_right"):
            writer.write(step, "valid", estimator=estimator, bits_per_char=2.0)

  @parameterized.parameters(3, 6, 7)
  def test_resumed_file_equals_an_uninterrupted_one(self, resumed_from):
    self._run(0, 10)
    whole = self.file.read_text()
    self._run(0, 8)
    with open(self.file, "a") as file:
      file.write('{"step": 9, "kind": "tr')  # killed here
    self._run(resumed_from, 10)
    self.assertEqual(self.file.read_text(), whole)
    self.assertEqual(
      [p.name for p in self.workdir.iterdir()], ["metrics.jsonl"]
    )

  def test_a_run_from_the_start_starts_the_file_anew(self):
    self._run(0, 4)
    self._run(0, 2)
    self.assertEqual(metrics.read(self.workdir)[-1]["step"], 2)

  def test_partial_last_line_is_passed_over(self):
    self.file.write_bytes(b'{"step": 1, "kind": "train"}\n{"step": \xff')
    self.assertLen(metrics.read(self.workdir), 1)

  def test_damage_elsewhere_is_left_out_with_a_warning(self):
    """Metrics never keep a run from being resumed."""
    with self.writer() as writer:
      writer.write(1, "train", loss=1.0)
    path = self.workdir / "metrics.jsonl"
    path.write_text('{"st\n' + path.read_text())
    with self.assertLogs(level="WARNING") as log:
      self.assertLen(metrics.read(self.workdir), 1)
    self.assertRegex(log.output[0], r"metrics\.jsonl, line 1 is left out")

  def test_a_full_disk_is_named(self):
    """A write to an open file names no file by itself."""
    with self.writer() as writer:
      writer._file.close()
      writer._file = open("/dev/full", "w")  # noqa: SIM115
      with self.assertRaisesRegex(OSError, r"No space .*metrics\.jsonl"):
        writer.write(1, "train", loss=1.0)
      with self.assertRaisesRegex(OSError, r"No space .*metrics\.jsonl"):
        writer.close()
      writer._file = None

  def test_other_processes_write_nothing(self):
    with self.writer(primary=False) as writer:
      writer.write(1, "train", loss_nats_per_token=2.0)
    self.assertEmpty(list(self.workdir.iterdir()))

  def test_where_files_cannot_grow_the_file_is_rewritten(self):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(disk, "is_local", lambda path: False)
      with self.writer() as writer:
        writer.write(1, "train", loss_nats_per_token=2.0)
        self.assertEmpty(metrics.read(self.workdir))
        patch.setattr(metrics, "_REMOTE_FLUSH_SECONDS", -1.0)
        writer.write(2, "train", loss_nats_per_token=2.0)
        self.assertLen(metrics.read(self.workdir), 2)
        patch.setattr(metrics, "_REMOTE_FLUSH_SECONDS", 60.0)
        writer.write(3, "train", loss_nats_per_token=2.0)
    self.assertLen(metrics.read(self.workdir), 3)


if __name__ == "__main__":
  absltest.main()
