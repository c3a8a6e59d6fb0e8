"""The report of a curve over budgets, from results that are made up."""

import math
import runpy

import helpers
import numpy as np
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import curve

_WINDOWS = 48


def _cells(variant="default"):
  path = helpers.ROOT / "configs" / "study_budget.py"
  get_config = runpy.run_path(str(path))["get_config"]
  config = config_lib.from_config_dict(get_config(variant))
  return config, cells_lib.expand(config)


class Results:
  """What a sweep would know: bits of a cell, by a function of the cell."""

  def __init__(self, config, bits, done=lambda cell: True):
    self.config, self.bits, self.done = config, bits, done

  def result(self, cell):
    if not self.done(cell):
      return None
    resolved = cells_lib.resolve(cell, self.config, 1e-3)
    return {
      "config": {
        "train": {
          "steps": resolved.train.steps,
          "batch_size": resolved.train.batch_size,
        },
        "optimizer": {"peak_learning_rate": 1e-3},
      },
      "training_flops": resolved.train.steps
      * (1.0 if cell.mechanism == "decoupled_rope" else 1.787),
    }

  def arrays(self, cell, name):
    del name
    draw = np.random.default_rng(cell.T)  # The same windows for all cells.
    text = 0.1 * draw.normal(size=_WINDOWS)
    nats = (self.bits(cell) + text - text.mean()) * math.log(2) * cell.T
    return {"nats": nats}


def _bits(cell):
  """decoupled_rope is worse by 0.02 at 66 million, 0.05 at 1.05 billion."""
  gap = {1000: 0.02, 4000: 0.03, 16000: 0.05, 5000: 0.04}[cell.steps]
  one = cell.mechanism == "decoupled_rope"
  if one and cell.budget == "steps":
    gap += 0.05
  level = 3.0 - 0.1 * math.log2(cell.steps) + 0.001 * cell.seed
  return level + one * gap


class CurveTest(parameterized.TestCase):
  def collect(self, bits=_bits, done=lambda cell: True, variant="default"):
    config, cells = _cells(variant)
    results = Results(config, bits, done)
    return curve.collect(cells, results)

  def test_differences_of_three_seeds(self):
    rows = curve.differences(self.collect(), "two_stream")
    found = {
      (row["T"], row["equal"], row["steps"]): row["difference_bits"]
      for row in rows
    }
    for T in (128, 1024):
      self.assertAlmostEqual(found[T, "flops", 1000], 0.02)
      self.assertAlmostEqual(found[T, "flops", 16000], 0.05)
      # Runs of equal steps are taken as they are, not between two others.
      self.assertAlmostEqual(found[T, "steps", 4000], 0.08)
      self.assertAlmostEqual(found[T, "steps", 16000], 0.10)
    self.assertLen(rows, 12)
    self.assertEqual({row["seeds"] for row in rows}, {3})
    self.assertEqual({row["answer"] for row in rows}, {"worse"})

  def test_the_contrast_is_the_change_of_the_difference(self):
    rows = curve.contrasts(self.collect(), "two_stream")
    self.assertEqual([row["T"] for row in rows], [1024, 128])
    for row in rows:
      self.assertAlmostEqual(row["change_bits"], 0.03)
      self.assertEqual((row["from_steps"], row["to_steps"]), (1000, 16000))

  def test_checked_rates_count_once_all_seeds_have_them(self):
    def bits(cell):
      return _bits(cell) - 0.2 * cell.rate.startswith("checked")

    def done(cell):
      is_last = cell.rate.startswith("checked") and cell.seed == 13
      return not (is_last and cell.steps == 16000)

    by_rule = {
      (run.cell.steps, run.cell.rate.partition(":")[0])
      for run in self.collect(bits, done)
      if run.cell.budget == "flops"
    }
    self.assertSetEqual(
      by_rule, {(1000, "checked"), (4000, "search"), (16000, "search")}
    )

  def test_one_seed_is_no_answer(self):
    runs = self.collect(done=lambda cell: cell.seed == 11)
    rows = curve.differences(runs, "two_stream")
    self.assertEqual({row["answer"] for row in rows}, {"one seed"})
    delays = curve.delays(runs, "two_stream", 0)
    self.assertLen(delays, 6)
    self.assertIn("see the difference", delays[-1]["second_stream"])

  def test_seeds_that_miss_a_budget_are_in_no_delay(self):
    missing = ("decoupled_rope", 16000, 12)
    runs = self.collect(
      done=lambda c: (c.mechanism, c.steps, c.seed) != missing
    )
    rows = curve.delays(runs, "two_stream", 0)
    self.assertEqual({row["seeds"] for row in rows}, {2})

  def test_every_recipe_of_the_control_has_its_row(self):
    rows = curve.differences(self.collect(variant="control"), "two_stream")
    recipes = [row["recipe"] for row in rows if row["equal"] == "flops"]
    self.assertLen(recipes, 7)
    self.assertLen(set(recipes), 7)
    self.assertIn("", recipes)
    self.assertIn("rate=0.004", recipes)
    self.assertIn("rate=0.004 train.batch_size:2048", recipes)

  def test_the_sweep_is_what_its_docstring_declares(self):
    config, cells = _cells()
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
