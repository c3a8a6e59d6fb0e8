"""The table of training steps."""

import contextlib
import csv
import io
import pathlib
import tempfile

import helpers
import pytest
from absl.testing import absltest

from aoarm_jax.tools import training_speed


class TrainingSpeedTest(absltest.TestCase):
  def test_choices_of_a_model_run_side_by_side(self):
    flags = training_speed.parser().parse_args(
      ["--lengths=8,16", "--tokens=64", "--rowwise=xla,auto"]
    )
    groups = list(training_speed.configs(flags))
    names = [[training_speed.name(config) for config in g] for g in groups]
    self.assertLen(names, 4)
    for first, second in names:
      self.assertEqual(first | {"rowwise": "auto"}, second)
    self.assertEqual([g[0].train.batch_size for g in groups], [8, 4, 8, 4])

  def test_an_unknown_choice(self):
    error = io.StringIO()
    with (
      contextlib.redirect_stderr(error),
      self.assertRaises(SystemExit) as caught,
    ):
      training_speed.main(["--rowwise=cuda"])
    self.assertEqual(caught.exception.code, 2)
    self.assertIn(
      "'cuda' is not one of auto, xla, mosaic_gpu", error.getvalue()
    )

  @pytest.mark.thorough
  def test_a_row_that_runs_and_one_that_cannot(self):
    self.enter_context(helpers.quick_compilation())
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path, out = pathlib.Path(folder) / "speed.csv", io.StringIO()
    words = "sizes=tiny lengths=8 tokens=16 rounds=1 steps=1 profile=2"
    with contextlib.redirect_stdout(out):
      status = training_speed.main(
        [
          *(f"--{word}" for word in words.split()),
          "--mechanisms=decoupled_rope",
          "--rowwise=xla,mosaic_gpu",
          f"--out={path}",
        ]
      )
    self.assertEqual(status, 0)
    self.assertRegex(
      out.getvalue(), r"mosaic_gpu .* does not support device 'cpu'"
    )
    (row,) = csv.DictReader(io.StringIO(path.read_text()))
    speed = float(row["tokens/s"])
    self.assertAlmostEqual(speed * float(row["ms/step"]), 16e3, places=3)


if __name__ == "__main__":
  absltest.main()
