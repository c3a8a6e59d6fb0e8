"""The law of one draw: temperature, top-k, top-p, with ties, by enumeration."""

from unittest import mock

import jax
import numpy as np
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax.generation import law as sampling
from aoarm_jax.model import vocabulary


def law_of(temperature=1.0, top_k=0, top_p=1.0):
  return sampling.Sampling(
    np.float32(temperature), np.int32(top_k), np.float32(top_p)
  )


def slow_law(logits, law):
  """Probabilities of one conditional, in float64, by sorting and adding."""
  logits = np.asarray(logits, np.float64)
  V = len(logits)
  by_size = sorted(range(V), key=lambda i: (-logits[i], i))
  if law.temperature == 0:
    return np.eye(V)[by_size[0]]
  logits = logits / np.float64(law.temperature)
  p = np.exp(logits - logits.max())
  k = int(law.top_k) or V
  p[by_size[k:]] = 0
  p /= p.sum()
  total, kept = 0.0, []
  for i in by_size:
    kept.append(i)
    total += p[i]
    if law.top_p < 1 and total >= law.top_p - 1e-7:
      break
  cut = np.zeros(V)
  cut[kept] = p[kept]
  return cut / cut.sum()


class LawTest(parameterized.TestCase):
  large = vocabulary.LARGE

  def setUp(self):
    super().setUp()
    self.enterContext(tiny.rank_promotion_raises())
    self.enterContext(mock.patch.object(vocabulary, "LARGE", self.large))

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Traced anew for each class, because `large` decides what is traced.
    cls.log_law = staticmethod(jax.jit(lambda *args: sampling.log_law(*args)))

  def law(self, logits, law):
    log_p = self.log_law(np.asarray(logits, np.float32), law)
    return np.exp(np.asarray(log_p, np.float64))

  @parameterized.product(
    temperature=(0.3, 1.0, 2.5), top_k=(0, 1, 3, 7, 99), top_p=(1e-6, 0.6, 1.0)
  )
  def test_equals_a_slow_one(self, temperature, top_k, top_p):
    law = law_of(temperature, top_k, top_p)
    logits = np.random.default_rng(0).normal(size=(3, 2, 7)).astype(np.float32)
    got = self.law(logits, law)
    for index in np.ndindex(3, 2):
      want = slow_law(logits[index], law)
      np.testing.assert_allclose(got[index], want, atol=1e-5)
      np.testing.assert_array_equal(got[index] == 0, want == 0)

  def test_temperature_zero_is_the_likeliest(self):
    logits = [[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]]
    for law in (law_of(0), law_of(0, 2, 0.5)):
      np.testing.assert_array_equal(
        self.law(logits, law), [[0, 1, 0], [1, 0, 0]]
      )

  @parameterized.parameters(
    (1, 1.0, [1, 0, 0, 0]),
    (2, 1.0, [1, 1, 0, 0]),
    (3, 1.0, [1, 1, 1, 0]),
    (0, 0.25, [1, 0, 0, 0]),
    (0, 0.5, [1, 1, 0, 0]),
    (0, 0.51, [1, 1, 1, 0]),
    # top-p counts what top-k has left.
    (2, 0.5, [1, 0, 0, 0]),
    (2, 0.6, [1, 1, 0, 0]),
  )
  def test_ties_go_to_the_lower_id(self, top_k, top_p, kept):
    got = self.law(np.zeros(4), law_of(1.0, top_k, top_p))
    np.testing.assert_allclose(got, np.array(kept) / sum(kept), atol=1e-6)

  def test_a_tiny_temperature_does_not_overflow(self):
    """Large logits over a small temperature are no infinity, no NaN."""
    logits = [[50.0, 49.0, -30.0], [-90.0, -80.0, -80.0]]
    np.testing.assert_allclose(
      self.law(logits, law_of(1e-37)), [[1, 0, 0], [0, 0.5, 0.5]], rtol=1e-6
    )

  def test_no_cut_keeps_every_token(self):
    """Rare ones too, whose probability float32 sums cannot hold."""
    logits = np.array([20.0, 0.0, -5.0, 19.0, -30.0], np.float32)
    got = self.log_law(logits, law_of())
    np.testing.assert_allclose(got, jax.nn.log_softmax(logits), rtol=1e-6)


class LargeLawTest(LawTest):
  """The same laws, with the cuts of large vocabularies."""

  large = 1

  @parameterized.product(
    law=((50, 1.0), (0, 0.9), (3000, 0.7), (99999, 0.98), (1, 0.5)),
    step=(0.0, 0.5),
  )
  def test_a_large_vocabulary(self, law, step):
    """Also where many tokens have one of few probabilities."""
    V, (top_k, top_p) = 9001, law
    logits = 2 * np.random.default_rng(1).normal(size=(2, V))
    if step:
      logits = step * np.round(logits / step)
    logits = logits.astype(np.float32)
    got = self.law(logits, law_of(1.0, top_k, top_p))
    for row, kept in zip(logits.astype(np.float64), got > 0):
      by_size = np.argsort(-row, kind="stable")[: top_k or V]
      p = np.exp(row[by_size] - row.max())
      before = np.cumsum(p / p.sum()) - p / p.sum()
      want = np.zeros(V, bool)
      want[by_size[(before < top_p) | (top_p >= 1)]] = True
      # Sums in float32 may err by so much about one token at the border.
      near = by_size[np.abs(before - top_p) < 3e-6]
      self.assertLessEqual(len(near), 1)
      want[near] = kept[near]
      np.testing.assert_array_equal(kept, want)
    # The sort keeps the same tokens, with the same probabilities.
    with mock.patch.object(vocabulary, "LARGE", V + 1):
      again = jax.jit(lambda *args: sampling.log_law(*args))(
        logits, law_of(1.0, top_k, top_p)
      )
    np.testing.assert_array_equal(got, np.exp(np.asarray(again, np.float64)))


if __name__ == "__main__":
  absltest.main()
