"""The report of made-up cells: one page that is true at any state of them."""

import tempfile

import studies
from absl.testing import absltest
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import measure, sweep
from aoarm_jax.study import results as results_lib

_FIGURES = ("f1_bits", "f2_delay", "f4_predictions", "f5_masked")


def _bits(cell):
  if cell.mechanism == "mdlm":
    return 2.3 + 0.001 * cell.seed
  one = cell.mechanism == "decoupled_rope"
  return 2.1 - 1e-5 * cell.steps + 0.03 * one + 0.001 * cell.seed


class ReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = epath.Path(folder)
    config, cells = studies.expanded("study_budget")
    masked = config.replace(
      "study.sweep", "mechanism=mdlm T=128 seed=11,12 steps=1000,4000"
    )
    # No trial of a rate is done, so no cell of the sweep is known to be done.
    self.config = config.replace("study.part", "report")
    self.budget = config, cells + cells_lib.expand(masked)

  def write(self, name, study, bits=_bits, done=lambda cell: True):
    studies.write_cells(self.folder / name, studies.runs(study, bits, done))

  def report(self, **study):
    """Return the words of the page, and the names of the files."""
    report = self.folder / "report"
    config = self.config
    for field, value in ({"report": str(report)} | study).items():
      config = config.replace(f"study.{field}", value)
    sweep.study(config, self.folder / "budget")
    text = (report / "README.md").read_text()
    names = {path.name for path in report.iterdir()}
    for name in names - {"README.md"}:
      self.assertIn(f"({name})", text)
    return " ".join(text.split()), names

  def test_one_page_of_two_studies(self):
    self.write("budget", self.budget)
    self.write("why", studies.expanded("study_why"))
    text, names = self.report(also=str(self.folder / "why"))
    self.assertContainsSubset({f"{name}.png" for name in _FIGURES}, names)
    self.assertContainsSubset(
      {"runs.csv", "differences.csv", "delays.csv", "predictions.csv"}, names
    )
    for line in (
      "At T = 128 one stream needs 0.030 ± 0.000 bits per character more than "
      "two streams (1.05 billion characters, 3 seeds): worse.",
      "mdlm needs 0.210 ± 0.000 bits per character more than one stream (262 "
      "million characters, 2 seeds): worse.",
      "one stream lacks capacity, 4 predictions should hold (2 hold, 2 fail).",
      "and T = 1,024 changes by +0.000 ± 0.000 bits (3 seeds)",
      "F3** is not drawn",
      "0 of 78 of `study_budget` are done",
    ):
      self.assertIn(line, text)
    # Figures and tables whose cells are gone do not stay.
    for path in (self.folder / "why" / "cells").glob("*/result.json"):
      path.unlink()
    for path in (self.folder / "budget" / "cells").glob("*/result.json"):
      if not path.parent.name.startswith("two_stream-128"):
        path.unlink()
    text, names = self.report(also=str(self.folder / "why"))
    self.assertContainsSubset({"f1_bits.png", "runs.csv"}, names)
    self.assertNoCommonElements({"f2_delay.png", "delays.csv"}, names)
    self.assertIn("No pair of runs is done yet at T = 128 and 1,024.", text)
    self.assertIn("4 predictions should hold (4 not run)", text)
    self.assertIn("F5** is not drawn", text)

  def test_one_seed_decides_nothing(self):
    self.write("budget", self.budget, done=lambda cell: cell.seed == 11)
    text, _ = self.report()
    self.assertIn("1 seed): one seed decides nothing.", text)
    self.assertNotIn("worse.", text)
    self.assertNotIn("nan", text)

  def test_failures_are_named(self):
    config, cells = studies.expanded("study_why")
    results = results_lib.Results(config, self.folder / "budget")
    folder = results.folder(cells[1])
    measure.note_failure(folder, "loss is nan", again=False)
    self.config = config.replace("study.part", "report")
    text, names = self.report()
    self.assertIn(f"Failed: {cells[1].label}: loss is nan", text)
    self.assertEqual(names, {"README.md", "predictions.csv"})

  def test_a_report_of_nothing_is_refused(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, f"no cell of this study in {self.folder}/budget"
    ):
      self.report()
    self.assertEqual(list(self.folder.iterdir()), [])

  def test_a_damaged_cell_is_named(self):
    self.write("budget", self.budget, done=lambda cell: cell.seed == 11)
    path = next((self.folder / "budget" / "cells").glob("*/windows.npz"))
    path.write_bytes(path.read_bytes()[:-1])
    with self.assertRaisesRegex(ValueError, f"{path}: damaged"):
      self.report()


if __name__ == "__main__":
  absltest.main()
