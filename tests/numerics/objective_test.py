"""The likelihood: ranks, slots and targets by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective

_B, _T, _V = 3, 7, 5


def _network(slots):
  """Logits from everything that a slot says of itself, and no more."""
  tokens, position, target = (
    x[..., None].astype(jnp.float32) for x in slots[:3]
  )
  v = jnp.arange(_V, dtype=jnp.float32)[None, None]
  return 2 * jnp.sin(tokens * (v + 1) + 0.7 * position + 1.3 * target * v)


@functools.cache
def _jitted(s):
  layout = tiny.layout(s, _V, _T)
  return jax.jit(functools.partial(objective.order_nll, _network, layout))


def _slow_nll(tokens, order, s):
  """Rank by rank, in float64, for one sequence."""
  nats = []
  for r, t in enumerate(order):
    if r > 0:
      token, position = tokens[order[r - 1] - 1], order[r - 1]
    else:  # The last sentinel predicts the first target.
      token, position = (_V, 0) if s == 1 else (_V + 1, len(order) + 1)
    v = np.arange(_V)
    logits = 2 * np.sin(token * (v + 1) + 0.7 * position + 1.3 * t * v)
    p = np.exp(logits) / np.exp(logits).sum()
    nats.append(-np.log(p[tokens[t - 1]]))
  return nats


class ObjectiveTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(tiny.rank_promotion_raises())

  @parameterized.product(s=(1, 2), dtype=(np.int32, np.uint8))
  def test_equals_a_slow_loop(self, s, dtype):
    tokens = tiny.tokens(_B, _T, _V)
    order = tiny.orders_of("two_stream", _B, _T)
    nll = _jitted(s)(tokens.astype(dtype), order)
    self.assertEqual(nll.dtype, jnp.float32)
    slow = [_slow_nll(*rows, s) for rows in zip(tokens, order)]
    np.testing.assert_allclose(nll, slow, atol=1e-4)

  def test_sequences_do_not_mix(self):
    tokens = tiny.tokens(_B, _T, _V)
    order = tiny.orders_of("two_stream", _B, _T)
    whole = _jitted(1)(tokens, order)
    other = tokens.copy()
    other[1:] = (other[1:] + 1) % _V
    np.testing.assert_array_equal(_jitted(1)(other, order)[0], whole[0])

  def test_the_gradient_is_softmax_less_one_hot(self):
    """Of the logits; and slot 0 of two sentinels is in no loss."""
    tokens = tiny.tokens(_B, _T, _V)
    order = tiny.orders_of("two_stream", _B, _T)
    logits = np.random.default_rng(0).normal(size=(_B, _T + 1, _V))
    logits = logits.astype(np.float32)

    def loss(logits):
      layout = tiny.layout(2, _V, _T)
      return objective.order_nll(
        lambda slots: logits, layout, tokens, order
      ).sum()

    gradient = jax.jit(jax.grad(loss))(logits)
    np.testing.assert_array_equal(gradient[:, 0], 0.0)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    targets = np.take_along_axis(tokens, order - 1, axis=1)
    np.testing.assert_allclose(
      gradient[:, 1:], p[:, 1:] - np.eye(_V)[targets], atol=1e-5
    )

  def test_shapes_must_agree(self):
    with self.assertRaises(AssertionError):
      _jitted(1)(np.zeros((2, 3), int), np.ones((2, 4), int))

  def test_ensembled_is_the_mean_probability(self):
    """Against numpy in float64, on likelihoods that underflow."""
    nats = np.random.default_rng(0).normal(600.0, 5.0, size=(4, _B))
    ensembled = objective.ensembled_nll(nats.astype(np.float32))
    least = nats.min(axis=0)
    want = least - np.log(np.exp(least - nats).mean(axis=0))
    np.testing.assert_allclose(ensembled, want, atol=1e-3)
    # Jensen: below the mean, and not below the least.
    self.assertTrue((ensembled < nats.mean(axis=0)).all())
    self.assertTrue((ensembled > least - 1e-3).all())

  def test_an_ensemble_of_one_or_of_equals_is_plain(self):
    nats = np.array([[3.0, 0.5, 7.0]], np.float32)
    np.testing.assert_allclose(objective.ensembled_nll(nats), nats[0])
    five = np.tile(nats, (5, 1))
    np.testing.assert_allclose(
      objective.ensembled_nll(five), nats[0], rtol=1e-6
    )


if __name__ == "__main__":
  absltest.main()
