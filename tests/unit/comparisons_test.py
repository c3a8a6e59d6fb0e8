"""Comparisons of arms whose differences are made up, and so are known."""

import math
import re
import tempfile

import numpy as np
import studies
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import comparisons, records, statistics

# Bits above two_stream of each arm of configs/study_why.py.
_GAPS = {
  "two_stream": 0.0,
  "two_stream content_sees=self": 0.03,
  "two_stream content_sees=last:8": 0.002,
  "two_stream content_sees=nearest:8": 0.004,
  "two_stream content_sees=random:8": 0.05,
  "two_stream_untied": -0.02,
  "two_stream N=8": 0.0,
  "register": 0.0,
  "decoupled_rope": 0.08,
  "decoupled_rope_added": 0.078,
  "decoupled_rope L=18": 0.03,
  "decoupled_rope D=344": 0.06,
  "decoupled_rope N=8": 0.05,
}
# What these gaps say of the predictions, in their order.
_HOLDS = (
  *("yes", "yes", "no", "yes", "yes", "no", "yes", "yes", "yes", "yes", "yes"),
  *("yes", "no", "no", "no"),
  "no",
)


def _gap(cell):
  """decoupled_rope is worse by 0.02 at 66 million, 0.05 at 1.05 billion."""
  gap = {1000: 0.02, 4000: 0.03, 16000: 0.05, 5000: 0.04}[cell.steps]
  return gap + 0.05 * (cell.budget == "steps")


def _budget(cell):
  """Bits of the budget study; a seed is off by the same in both arms."""
  level = 3.0 - 0.1 * math.log2(cell.steps) + 0.1 * cell.seed
  return level + _gap(cell) * (cell.mechanism == "decoupled_rope")


def _why(cell):
  return 2.0 + 0.1 * cell.seed + _GAPS[cell.name]


class ComparisonsTest(parameterized.TestCase):
  def settings(self, study, bits, done=lambda cell: True):
    """Return (settings, trials) of a study with results that are made up."""
    runs = studies.runs(study, bits, done)
    trials = records.Trials(runs, study[0].study.tune_seeds)
    return records.settings(runs, trials), trials

  def budget(self, bits=_budget, done=lambda cell: True, variant="default"):
    return self.settings(studies.expanded("study_budget", variant), bits, done)[
      0
    ]

  def predicted(self, bits=_why, done=lambda cell: True, variants=("default",)):
    """Return the rows of predictions at equal steps."""
    config, cells = studies.expanded("study_why")
    for variant in variants[1:]:
      cells = cells + studies.expanded("study_why", variant)[1]
    settings, trials = self.settings((config, cells), bits, done)
    rows = comparisons.predictions(settings, "two_stream", trials)
    return [row for row in rows if row["equal"] == "steps"]

  def test_differences_are_paired_by_seed_and_window(self):
    """Seeds differ by far more than arms, and the intervals are narrow."""
    rows = comparisons.differences(self.budget(), "two_stream")
    found = {
      (row["T"], row["equal"], row["steps"]): row["difference_bits"]
      for row in rows
    }
    for T in (128, 1024):
      self.assertAlmostEqual(found[T, "flops", 1000], 0.02)
      self.assertAlmostEqual(found[T, "flops", 16000], 0.05)
      self.assertAlmostEqual(found[T, "steps", 4000], 0.08)
      self.assertAlmostEqual(found[T, "steps", 16000], 0.10)
    self.assertLen(rows, 12)
    self.assertEqual({row["seeds"] for row in rows}, {3})
    self.assertEqual({row["answer"] for row in rows}, {"worse"})
    self.assertLess(max(row["half_of_95_percent"] for row in rows), 1e-6)

  def test_only_seeds_of_both_arms_count(self):
    settings = self.budget(
      done=lambda cell: (cell.mechanism, cell.seed) != ("two_stream", 12)
    )
    rows = comparisons.differences(settings, "two_stream")
    self.assertEqual({row["seeds"] for row in rows}, {2})
    self.assertAlmostEqual(rows[0]["difference_bits"], 0.02)
    self.assertAlmostEqual(
      rows[0]["arm_bits"] - rows[0]["reference_bits"], 0.02
    )

  @parameterized.parameters(
    (0.0, 0.001, "equal"),
    (0.008, 0.001, "undecided"),
    (0.008, 0.0001, "equal"),
    (0.02, 0.001, "worse"),
    (-0.02, 0.001, "better"),
    (-0.02, 0.01, "undecided"),
  )
  def test_answers(self, value, error, wanted):
    found = statistics.Estimate(value, error, 2, 3)
    self.assertEqual(comparisons.answer(found), wanted)
    one = statistics.Estimate(value, error, 23, 1)
    self.assertEqual(comparisons.answer(one), "one seed")

  def test_the_contrast_is_the_change_of_the_difference(self):
    rows = comparisons.contrasts(self.budget(), "two_stream")
    self.assertEqual([row["T"] for row in rows], [128, 1024])
    for row in rows:
      self.assertAlmostEqual(row["difference_bits"], 0.03)
      self.assertEqual((row["from_steps"], row["to_steps"]), (1000, 16000))

  def test_one_seed_is_no_answer(self):
    settings = self.budget(done=lambda cell: cell.seed == 11)
    rows = comparisons.differences(settings, "two_stream")
    self.assertEqual({row["answer"] for row in rows}, {"one seed"})
    delays = comparisons.delays(settings, "two_stream", 0)
    self.assertLen(delays, 6)
    self.assertEqual(delays[-1]["bound"], ">")

  def test_seeds_that_miss_a_budget_are_in_no_delay(self):
    missing = ("decoupled_rope", 16000, 12)
    settings = self.budget(
      done=lambda c: (c.mechanism, c.steps, c.seed) != missing
    )
    rows = comparisons.delays(settings, "two_stream", 0)
    self.assertEqual({row["seeds"] for row in rows}, {2})
    ratios = [row["cost_ratio"] for row in rows]
    np.testing.assert_allclose(ratios, [1.755] * 3 + [1.787] * 3, atol=1e-3)

  def test_every_recipe_of_the_control_has_its_row(self):
    settings = self.budget(variant="control")
    rows = comparisons.differences(settings, "two_stream")
    arms = [row["arm"] for row in rows if row["equal"] == "flops"]
    self.assertLen(set(arms), len(arms))
    self.assertIn("decoupled_rope", arms)
    self.assertIn("decoupled_rope rate=0.004", arms)
    self.assertIn("decoupled_rope batch_size=2048", arms)
    self.assertLen(arms, 7)

  def test_predictions_and_their_outcomes(self):
    rows = self.predicted()
    self.assertLen(rows, len(comparisons.PREDICTIONS))
    self.assertEqual(tuple(row["holds"] for row in rows), _HOLDS)
    values = {row["contrast"]: row["difference_bits"] for row in rows}
    self.assertAlmostEqual(values["decoupled_rope L=18 - two_stream"], 0.03)
    gap = "decoupled_rope N=8 - two_stream N=8 - decoupled_rope + two_stream"
    self.assertAlmostEqual(values[gap], -0.03)

  def test_predictions_at_any_state_of_the_cells(self):
    for done, wanted in (
      (lambda cell: False, {"not run"}),
      (lambda cell: cell.mechanism == "register", {"not run"}),
      (lambda cell: cell.seed == 12, {"one seed"}),
      (
        lambda cell: cell.name in ("two_stream", "register"),
        {"not run", "no", "yes"},
      ),
    ):
      holds = {row["holds"] for row in self.predicted(done=done)}
      self.assertEqual(holds, wanted)

  def test_seeds_that_part_leave_a_prediction_undecided(self):
    def bits(cell):
      return _why(cell) + 0.05 * (cell.name == "register") * (cell.seed - 12)

    rows = [r for r in self.predicted(bits) if "register" in r["contrast"]]
    self.assertEqual([row["holds"] for row in rows], ["undecided"] * 2)

  def test_an_arm_that_has_a_better_rate_runs_again(self):
    """Its outcome is taken from the new runs, when they are there."""

    def bits(cell):
      return _why(cell) - 0.02 * (cell.mechanism == "register") * (
        cell.rate == "0.0056"
      )

    variants = ("default", "rates")
    rows = self.predicted(bits, variants=variants)
    found = {row["holds"] for row in rows if "register" in row["contrast"]}
    self.assertEqual(found, {"rate"})
    config, cells = studies.expanded("study_why")
    cells += studies.expanded("study_why", "rates")[1]
    shared = "T=128 steps=2000 seed=11,12,13 budget=flops,steps"
    again = config.replace(
      "study.sweep", f"mechanism=register rate=0.0056 {shared}"
    )
    study = (config, cells + cells_lib.expand(again))
    settings, trials = self.settings(study, bits)
    rows = comparisons.predictions(settings, "two_stream", trials)
    row = next(row for row in rows if row["contrast"].startswith("register"))
    self.assertAlmostEqual(row["difference_bits"], -0.02)

  @parameterized.parameters("default", "long", "tiny")
  def test_every_arm_of_the_sweep_is_in_a_prediction(self, variant):
    _, cells = studies.expanded("study_why", variant)
    arms = {cell.name for cell in cells}
    used = set()
    for _, contrast, _ in comparisons.PREDICTIONS:
      for words in re.split(" [-+] ", contrast):
        (arm,) = [arm for arm in arms if comparisons._matches(arm, words)]
        used.add(arm)
    self.assertEqual(used, arms)


class RecordsTest(absltest.TestCase):
  def test_checked_rates_count_once_all_seeds_have_them(self):
    def done(cell):
      is_last = cell.rate.startswith("checked") and cell.seed == 13
      return not (is_last and cell.steps == 16000)

    runs = studies.runs(studies.expanded("study_budget"), _budget, done)
    settings = records.settings(runs, records.Trials(runs, (101, 102)))
    by_rule = {
      (run.cell.steps, run.cell.rate.partition(":")[0])
      for run in records.listed(settings)
      if run.cell.budget == "flops"
    }
    self.assertSetEqual(
      by_rule, {(1000, "checked"), (4000, "search"), (16000, "search")}
    )

  def written(self):
    """Return (folder, content of result.json) of three cells."""
    folder = self.enter_context(tempfile.TemporaryDirectory())
    study = studies.expanded("study_budget")
    runs = studies.runs(study, _budget, lambda cell: cell.seed == 11)
    return studies.write_cells(folder, runs[:3])

  def test_what_is_written_is_read(self):
    every = self.written()
    for run, (folder, result) in zip(records.read(every), every, strict=True):
      self.assertEqual((run.folder, run.result), (folder, result))
      self.assertAlmostEqual(run.bits.mean(), _budget(run.cell))
      self.assertEqual(run.characters, run.steps * 65536)

  def test_cells_of_two_texts_are_refused(self):
    every = self.written()
    every[1][1]["text"] = {"train": "2"}
    with self.assertRaisesRegex(config_lib.ConfigError, "different texts"):
      records.read(every)

  def test_a_result_of_another_form_is_named(self):
    every = self.written()
    del every[1][1]["config"]["variant"]
    with self.assertRaisesRegex(ValueError, "damaged .'variant'.*; delete"):
      records.read(every)


class DeclarationTest(absltest.TestCase):
  def test_the_budget_sweep_is_what_its_docstring_declares(self):
    config, cells = studies.expanded("study_budget")
    self.assertEqual({cell.seed for cell in cells}, {11, 12, 13})
    self.assertEqual({cell.T for cell in cells}, {128, 1024})
    self.assertEqual({cell.steps for cell in cells}, {1000, 4000, 16000})
    self.assertNoCommonElements({11, 12, 13}, config.study.tune_seeds)
    # The runs of a trunk follow each other, and ascend: none is taken again.
    for mechanism in ("two_stream", "decoupled_rope"):
      steps = [
        cells_lib.resolve(cell, config, 1e-3).train.steps
        for cell in cells
        if (cell.mechanism, cell.T, cell.seed) == (mechanism, 1024, 11)
        and cell.rate.startswith("search")
      ]
      self.assertEqual(steps, sorted(steps))
      self.assertLen(steps, 3 if mechanism == "two_stream" else 6)


if __name__ == "__main__":
  absltest.main()
