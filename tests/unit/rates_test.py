"""Learning rates that a study searches and checks by its own trials."""

import math

from absl.testing import absltest, parameterized
from studies import config

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import rates


def _cell(rate, steps=16000, T=128):
  study = config(
    f"rate={rate} steps={steps} T={T} budget=flops seed=11", decay_share=0.2
  )
  (cell,) = cells_lib.expand(study)
  return study, cell


class Trials:
  """What trials give, by their rates; notes which were asked for."""

  def __init__(self, bits):
    self.bits, self.done = bits, {}

  def search(self, study, cell):
    """Runs trials until the rate is known: (rate, trials in their order)."""
    for _ in range(50):
      trials, rate = rates.plan(cell, study, self.done.get)
      if rate is not None:
        return rate, list(dict.fromkeys(trials))
      todo = [trial for trial in trials if trial not in self.done]
      for trial in todo:
        numeric = rates.parse(trial.rate) is None
        value = float(trial.rate) if numeric else self.search(study, trial)[0]
        self.done[trial] = self.bits(trial, value)
    raise AssertionError("the search does not end")


def _parabola(best):
  """Bits that are least at a rate, by halves and doubles."""
  return lambda cell, rate: 2 + 0.1 * math.log2(rate / best) ** 2


class SearchTest(parameterized.TestCase):
  @parameterized.parameters(0.004, 0.0011, 0.03, 0.0005)
  def test_the_best_rate_ends_up_inside_the_grid(self, best):
    study, cell = _cell("search:0.004")
    rate, trials = Trials(_parabola(best)).search(study, cell)
    self.assertLess(abs(math.log2(rate / best)), 0.51)
    first = [float(t.rate) for t in trials if t.seed == 101]
    self.assertLess(min(first), rate)
    self.assertGreater(max(first), rate)

  def test_trials_are_at_the_tuning_budget_and_on_tuning_seeds(self):
    study, cell = _cell("search:0.004", T=1024)
    _, trials = Trials(_parabola(0.004)).search(study, cell)
    self.assertEqual({t.seed for t in trials}, {101, 102})
    self.assertEqual({(t.steps, t.budget) for t in trials}, {(4000, "flops")})
    self.assertEqual({t.T for t in trials}, {1024})
    self.assertLen(trials, 5)

  def test_the_mean_over_two_seeds_decides_between_the_two_best(self):
    table = {(0.002, 101): 2.10, (0.004, 101): 2.00, (0.008, 101): 2.01}
    table |= {(0.004, 102): 2.05, (0.008, 102): 2.02}
    study, cell = _cell("search:0.004")
    rate, _ = Trials(lambda t, rate: table[rate, t.seed]).search(study, cell)
    self.assertEqual(rate, 0.008)

  def test_a_rate_that_diverges_is_worse_than_any(self):
    def bits(cell, rate):
      return math.inf if rate > 0.003 else _parabola(0.001)(cell, rate)

    study, cell = _cell("search:0.016")
    rate, _ = Trials(bits).search(study, cell)
    self.assertEqual(rate, 0.001)

  def test_an_endless_descent_is_said(self):
    study, cell = _cell("search:0.004")
    with self.assertRaisesRegex(config_lib.ConfigError, "start the search"):
      Trials(lambda cell, rate: rate).search(study, cell)

  def test_a_factor_is_of_the_rate_that_is_found(self):
    study, cell = _cell("search:0.004*0.5")
    self.assertEqual(Trials(_parabola(0.008)).search(study, cell)[0], 0.004)


class CheckTest(parameterized.TestCase):
  @parameterized.parameters((0.0051, 0.002), (0.0049, 0.004))
  def test_the_other_rate_is_taken_where_it_gains_enough(self, gain, want):
    def bits(cell, rate):
      if cell.steps == 4000:
        return _parabola(0.004)(cell, rate)
      self.assertEqual((cell.T, cell.seed, cell.steps), (1024, 101, 16000))
      return 1.9 - gain * (rate == 0.002)

    study, cell = _cell("checked:0.004*0.5")
    rate, trials = Trials(bits).search(study, cell)
    self.assertEqual(rate, want)
    # The check's own length is searched as well.
    self.assertEqual({t.T for t in trials if t.steps == 4000}, {128, 1024})

  @parameterized.parameters(
    "checked:0.004", "search:0", "search:x", "checked:1*"
  )
  def test_what_cannot_be_read_is_refused(self, rate):
    with self.assertRaisesRegex(config_lib.ConfigError, "rate="):
      _cell(rate)


if __name__ == "__main__":
  absltest.main()
