"""A tiny budget curve from end to end: shared trunks, kills, the report."""

import csv
import json
import pathlib
import tempfile

import helpers
import numpy as np
import pytest
from absl.testing import absltest
from etils import epath

from aoarm_jax.runs import exported
from aoarm_jax.study import dissection, measure, trunks

pytestmark = pytest.mark.thorough

_CONFIG = str(helpers.ROOT / "configs" / "study_budget.py")
_FILES = ("training.npz", "windows.npz", "weights.npz")


class TrunkTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    helpers.write_text(self.folder / "text", test=False)
    self.enter_context(helpers.quick_compilation())

  def study(self, workdir, *options):
    helpers.run(
      [
        f"--config={_CONFIG}:tiny",
        "--mode=study",
        f"--workdir={self.folder / workdir}",
        f"--config.data.path={self.folder / 'text'}",
        "--config.eval.batches=1",
        "--config.study.part=cells",
        *options,
      ]
    )

  def files(self, workdir, steps):
    """{name: bytes} of the cell of two_stream with so many steps."""
    (cell,) = (self.folder / workdir / "cells").glob(f"two_*-steps{steps}-*")
    self.assertTrue((cell / measure.RESULT).exists())
    self.assertFalse((cell / trunks.BRANCH).exists())
    return {name: (cell / name).read_bytes() for name in _FILES}

  def taken(self, workdir, steps):
    """Steps that the process which ended this run has taken."""
    (path,) = (self.folder / workdir / "cells").glob(
      f"two_*-steps{steps}-*/{measure.RESULT}"
    )
    return json.loads(path.read_text())["steps_taken"]

  def test_branches_of_a_trunk_are_runs_from_the_start(self):
    two = "--config.study.cells=two_stream"
    self.study("shared", two)
    self.study("alone", f"{two} steps=80")
    self.assertEqual(self.files("shared", 80), self.files("alone", 80))
    # The second run began where the branch of the first one did.
    self.assertEqual(self.taken("shared", 40), 40)
    self.assertEqual(self.taken("shared", 80), 80 - 32)
    self.assertEqual(self.taken("alone", 80), 80)
    self.check_the_average_is_evaluated_beside_the_parameters("shared")
    self.check_another_text_is_refused()
    self.check_interrupted(two)
    self.study("shared", "--config.study.part=all")
    self.check_report(self.folder / "shared" / "report")
    self.check_measures("shared")
    self.check_export("shared")

  def check_interrupted(self, two):
    """Time is up once in the trunk and once in the branch."""
    stops, save = [30, 70], trunks.Keeper.save

    def stopped(keeper, step, *state):
      if step in stops:
        stops.remove(step)
        keeper._deadline = 0.0
      save(keeper, step, *state)

    with absltest.mock.patch.object(trunks.Keeper, "save", stopped):
      for done in (False, False, True):
        self.study("pieces", f"{two} steps=80")
        results = list((self.folder / "pieces").glob("cells/*/result.json"))
        self.assertEqual(bool(results), done)
    self.assertEqual(self.files("pieces", 80), self.files("shared", 80))
    self.assertEqual(self.taken("pieces", 80), 80 - 70)

  def check_another_text_is_refused(self):
    helpers.write_text(self.folder / "other", seed=1, test=False)
    for path in (self.folder / "alone" / "cells").glob("*/result.json"):
      path.unlink()
    with self.assertRaisesRegex(Exception, "is of another text"):
      self.study("alone", f"--config.data.path={self.folder / 'other'}")

  def check_report(self, report):
    rows = {
      name: list(
        csv.DictReader((report / f"{name}.csv").read_text().splitlines())
      )
      for name in ("runs", "differences", "delays")
    }
    runs = {(r["arm"], r["steps"]): r for r in rows["runs"]}
    self.assertLen(runs, 4)
    two, one = runs["two_stream", "80"], runs["decoupled_rope", "113"]
    self.assertAlmostEqual(
      float(one["training_flops"]) / float(two["training_flops"]), 1, places=2
    )
    (row,) = (
      r
      for r in rows["differences"]
      if (r["equal"], r["steps"]) == ("flops", "80")
    )
    self.assertAlmostEqual(
      float(row["difference_bits"]),
      float(one["any_order"]) - float(two["any_order"]),
      places=4,
    )
    self.assertEqual((row["seeds"], row["answer"]), ("1", "one seed"))
    self.assertLen(rows["delays"], 2)
    for name in ("f1_bits.png", "f2_delay.png", "README.md"):
      self.assertGreater((report / name).stat().st_size, 500)

  def check_measures(self, workdir):
    """The weights that were kept are measured, once."""
    report = self.folder / workdir / "report"
    options = (
      "--config.study.part=measure",
      "--config.study.cells=steps=80 two_stream",
      "--config.study.measure_windows=2",
      "--config.study.knockouts=nearest:2",
      "--config.study.layer_knockouts=nearest:2",
    )
    self.study(workdir, *options)
    names = ("knockouts", "probes", "characters", "locality")
    rows = {
      name: list(
        csv.DictReader((report / f"{name}.csv").read_text().splitlines())
      )
      for name in names
    }
    self.assertEqual(
      [(r["stream"], r["layer"]) for r in rows["knockouts"]],
      [
        *((name, "all") for name in ("content", "query", "all")),
        *(("content", "1"), ("query", "1"), ("query", "2")),
      ],
    )
    # The last layer has no content, so the content's one layer is all of them.
    self.assertEqual(*(r["rise_bits"] for r in rows["knockouts"][::3]))
    for row in rows["knockouts"]:
      self.assertNotEqual(float(row["rise_bits"]), 0)
      self.assertBetween(float(row["mass"]), 1e-3, 1)
    own, *_ = rows["probes"]
    self.assertEqual(
      (own["by"], own["offset"], own["layer"]), ("recency", "0", "0")
    )
    self.assertGreater(float(own["accuracy"]), 0.8)
    self.assertLen(rows["locality"], 2 * (1 + 2))
    for name in ("f3_locality", "f4_knockouts"):
      self.assertGreater((report / f"{name}.png").stat().st_size, 1000)
    before = (report / "knockouts.csv").read_bytes()
    patch = absltest.mock.patch.object
    with patch(dissection, "_measure_all", side_effect=AssertionError):
      self.study(workdir, *options)
    self.assertEqual((report / "knockouts.csv").read_bytes(), before)

  def check_export(self, workdir):
    """The exported model has the weights and the bits of the cell."""
    self.study(
      workdir,
      "--config.study.part=export",
      "--config.study.cells=steps=80 two_stream",
    )
    (folder,) = (self.folder / workdir / "exports").iterdir()
    model = exported.Exported(epath.Path(folder))
    cell = self.folder / workdir / "cells" / folder.name
    result = json.loads((cell / "result.json").read_text())
    (evaluation,) = (
      row
      for row in model.record["evaluations"]
      if row["estimator"] == "any_order"
    )
    self.assertEqual(
      evaluation["bits_per_char"], result["estimates"][0]["bits_per_char"]
    )
    with np.load(cell / "weights.npz") as arrays:
      kept = {name: arrays[name] for name in arrays}
    for name, leaf in model.arrays().items():
      np.testing.assert_array_equal(
        leaf.view(np.uint16), kept[name.replace(".", "/")]
      )
    log = (folder / "training.csv").read_text().splitlines()
    self.assertEqual(log[-1].split(",")[0], "80")

  def check_the_average_is_evaluated_beside_the_parameters(self, workdir):
    (cell,) = (self.folder / workdir / "cells").glob("two_*-steps40-*")
    with np.load(cell / "windows.npz") as arrays:
      self.assertSetEqual(
        set(arrays),
        {
          f"{kind}{suffix}"
          for kind in ("nats", "slots")
          for suffix in ("", "_ema", "_left_to_right", "_left_to_right_ema")
        },
      )
      self.assertFalse(np.allclose(arrays["nats"], arrays["nats_ema"]))
      self.assertAlmostEqual(
        arrays["nats"].mean(), arrays["slots"].sum(), places=3
      )


if __name__ == "__main__":
  absltest.main()
