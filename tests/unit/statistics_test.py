"""Means, their errors, and how often an effect is seen where there is none."""

import numpy as np
from absl.testing import absltest

from aoarm_jax.study import statistics


class StatisticsTest(absltest.TestCase):
  def test_over_seeds(self):
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    self.assertAlmostEqual(found.value, 2.0)
    self.assertAlmostEqual(found.error, 1 / 3**0.5)
    self.assertAlmostEqual(found.half, 4.303 / 3**0.5, places=3)
    self.assertTrue(np.isnan(statistics.over_seeds([1.0]).half))

  def test_windows_that_are_alike_tell_less(self):
    generator = np.random.default_rng(0)
    books = np.repeat(generator.normal(size=24), 50)
    alike = statistics.over_windows(books)
    apart = statistics.over_windows(generator.permutation(books))
    self.assertAlmostEqual(alike.error, books[::50].std(ddof=1) / 24**0.5)
    self.assertLess(apart.error, alike.error / 3)
    self.assertEqual(alike.seeds, 1)

  def test_what_windows_leave_open_no_seed_closes(self):
    generator = np.random.default_rng(0)
    text = generator.normal(size=240)
    same = statistics.over_both([text, text, text])
    one = statistics.over_both([text])
    self.assertAlmostEqual(same.error, one.error)
    self.assertEqual((same.seeds, one.seeds), (3, 1))
    # Seeds that differ have the few degrees of freedom of seeds.
    apart = statistics.over_both([text, text + 5, text - 5])
    self.assertEqual(apart.degrees, 2)
    # So have seeds that lie together, as two may by luck.
    self.assertEqual(statistics.over_both([text, text + 1e-9]).degrees, 1)
    self.assertAlmostEqual(apart.value, same.value)

  def test_effects(self):
    for value, error, least, wanted in (
      (0.1, 0.01, 0.02, 1),
      (-0.1, 0.01, 0.02, -1),
      (0.1, 0.1, 0.02, None),
      (0.01, 0.001, 0.02, 0),
      (0.01, 0.001, 0.0, 1),
      (0.0, 0.0, 0.0, 0),
      (0.1, float("nan"), 0.0, None),
    ):
      found = statistics.Estimate(value, error, 2, 3)
      self.assertEqual(statistics.effect(found, least), wanted)

  def test_a_false_alarm_is_rare_whatever_the_seeds(self):
    """Where nothing is there, 5% of the studies see an effect."""
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 5):
      effects = [
        statistics.effect(statistics.over_seeds(x))
        for x in generator.normal(size=(2000, seeds))
      ]
      alarms = np.mean([effect is not None for effect in effects])
      self.assertAlmostEqual(alarms, 0.05, delta=0.02)


if __name__ == "__main__":
  absltest.main()
