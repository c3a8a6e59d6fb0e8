"""Every arm of configs/study_why.py, tiny, from training to the report."""

import csv
import pathlib
import tempfile

import helpers
import pytest
from absl.testing import absltest

_CONFIG = f"{helpers.ROOT / 'configs' / 'study_why.py'}:tiny"


class ArmsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_every_arm(self):
    self.check_cells("", 19)

  def check_cells(self, cells, runs):
    """Cells train, and the report has their runs."""
    self.enter_context(helpers.quick_compilation())
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    helpers.write_text(folder / "text", test=False)
    helpers.run(
      [
        f"--config={_CONFIG}",
        "--mode=study",
        f"--workdir={folder / 'run'}",
        f"--config.data.path={folder / 'text'}",
        "--config.eval.batches=1",
        f"--config.study.cells={cells}",
      ]
    )
    report = folder / "run" / "report"
    rows = list(csv.DictReader((report / "runs.csv").read_text().splitlines()))
    self.assertLen(rows, runs)
    if runs > 1:
      self.assertTrue((report / "f4_predictions.png").exists())
      lines = (report / "predictions.csv").read_text().splitlines()
      holds = {row["holds"] for row in csv.DictReader(lines)}
      self.assertEqual(holds, {"one seed", ""})


if __name__ == "__main__":
  absltest.main()
