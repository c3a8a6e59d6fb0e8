"""The delay between curves whose delay is known."""

import math

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.study import delay

pytestmark = pytest.mark.thorough

_STEPS = np.array([1000, 1800, 7200, 28800])
_BUDGETS = np.array([1000, 4000, 16000])


def _law(steps):
  """A loss that falls with the logarithm of the steps."""
  return 3.0 - 0.25 * np.log2(np.asarray(steps, float))


def _runs(bits, seeds=3, windows=240, noise=0.0, seed=0):
  """[runs, seeds, windows] around the bits of each run.

  All runs and seeds read the same windows, of which neighbours are alike; a
  run of a seed is off by `noise` as a whole.
  """
  text = np.random.default_rng(7).normal(size=windows // 10)
  text = np.repeat(0.3 * (text - text.mean()), 10)
  draw = np.random.default_rng(seed)
  own = noise * draw.normal(size=(len(bits), seeds, 1))
  return np.asarray(bits)[:, None, None] + text + own


class DelayTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 1.4, 1.75)
  def test_a_curve_that_is_shifted_has_its_shift(self, shift):
    """The arm needs `shift` times the steps at every loss."""
    found = delay.delays(
      _BUDGETS, _runs(_law(_BUDGETS)), _STEPS, _runs(_law(_STEPS / shift))
    )
    self.assertEqual([one.bound for one in found], ["", "", ""])
    np.testing.assert_allclose([one.value for one in found], shift, rtol=1e-6)

  def test_curves_that_part_have_a_growing_delay(self):
    found = delay.delays(
      _BUDGETS,
      _runs(_law(_BUDGETS) - 0.02 * np.log2(_BUDGETS / 1000)),
      _STEPS,
      _runs(_law(_STEPS)),
    )
    # log2 of the delay is 0.02 / 0.25 of the budget's doublings.
    want = (_BUDGETS / 1000) ** (0.02 / 0.25)
    np.testing.assert_allclose([one.value for one in found], want, rtol=1e-6)

  def test_a_loss_beyond_the_curve_is_bounded(self):
    found = delay.delays(
      _BUDGETS, _runs(_law(4 * _BUDGETS)), _STEPS, _runs(_law(_STEPS))
    )
    self.assertEqual([one.bound for one in found], ["", "", ">"])
    self.assertAlmostEqual(found[2].value, 28800 / 16000)
    (early,) = delay.delays([2000], _runs([3.0]), _STEPS, _runs(_law(_STEPS)))
    self.assertEqual((early.value, early.bound), (0.5, "<"))

  def test_intervals_of_three_seeds_hold_the_delay_as_often_as_they_say(self):
    """And the range over resamples does not, as its docstring says."""
    shift, trials = 1.5, 150
    inside, resampled = 0, 0
    for seed in range(trials):
      own = _runs(_law(_BUDGETS), noise=0.005, seed=seed)
      arm = _runs(_law(_STEPS / shift), noise=0.005, seed=1000 + seed)
      one = delay.delays(_BUDGETS, own, _STEPS, arm, resamples=100)[1]
      self.assertLess(one.low, one.high)
      inside += one.low <= shift <= one.high
      resampled += one.resampled[0] <= shift <= one.resampled[1]
    # 95% of 150 are 142.5; fewer than 132 have a probability of 1e-4.
    self.assertGreaterEqual(inside, 132)
    self.assertLess(resampled, 125)

  def test_text_that_differs_between_arms_widens_the_interval(self):
    """The arms part on some stretches of the text, for all seeds alike."""
    own, arm = _runs(_law(_BUDGETS)), _runs(_law(_STEPS / 1.5))
    narrow = delay.delays(_BUDGETS, own, _STEPS, arm)[1]
    apart = np.repeat(np.random.default_rng(1).normal(size=24), 10)
    wide = delay.delays(_BUDGETS, own, _STEPS, arm + 0.05 * apart)[1]
    self.assertLess(narrow.high - narrow.low, 1e-6)
    self.assertGreater(wide.high - wide.low, 0.1)

  def test_intervals_that_reach_beyond_the_curve_are_open(self):
    own = _runs(_law([4000, 17500]), noise=0.05)
    found = delay.delays(
      [4000, 16000], own, _STEPS, _runs(_law(_STEPS / 1.6)), resamples=100
    )
    self.assertTrue(math.isfinite(found[0].high))
    self.assertEqual(found[1].bound, "")
    self.assertEqual(found[1].high, math.inf)
    self.assertEqual(found[1].resampled[1], math.inf)

  def test_a_curve_that_rises_again_counts_as_its_best(self):
    steps, bound = delay.steps_to(2.0, [1, 2, 4, 8], [2.5, 2.1, 2.2, 1.9])
    self.assertEqual(bound, "")
    self.assertBetween(steps, 2.0, 8.0)
    self.assertEqual(delay.steps_to(2.1, [1, 2, 4], [2.5, 2.1, 2.2]), (2, ""))


if __name__ == "__main__":
  absltest.main()
