"""The embedding and the loss of large vocabularies against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective, orders
from aoarm_jax.model import vocabulary

_B, _R, _D, _V = 2, 9, 6, 37


def _rows(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


class SumBySymbolTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("spread", lambda n: np.random.default_rng(0).integers(0, 50, n)),
    ("few", lambda n: np.random.default_rng(1).choice([0, 3, 49], n)),
    ("one", lambda n: np.full(n, 7)),
    ("in_order", lambda n: np.arange(n) // 128 % 50),
  )
  def test_equals_a_sum_one_by_one(self, draw):
    for n in (1, 128, 700):
      tokens, rows = draw(n), np.asarray(_rows(2, n, 5))
      wanted = np.zeros((50, 5))
      np.add.at(wanted, tokens, rows.astype(np.float64))
      got = jax.jit(vocabulary.sum_by_symbol, static_argnums=2)(
        rows, tokens, 50
      )
      # Sums of n numbers around 1.
      np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=3e-7 * n)

  def test_a_large_table_takes_it(self):
    """Also bfloat16 rows are summed in float32."""
    V = vocabulary.LARGE
    tokens = jnp.full((2, 400), V - 1).at[0, :7].set(3)
    table = jnp.zeros((V, 2), jnp.bfloat16)
    gradient = jax.jit(
      jax.grad(lambda table: vocabulary.embed(table, tokens).sum())
    )(table)
    self.assertEqual(gradient[3, 0], 7)
    self.assertEqual(gradient[V - 1, 1], jnp.bfloat16(793))
    self.assertEqual(np.count_nonzero(gradient), 4)


class NllTest(parameterized.TestCase):
  @parameterized.product(block=(1, 5, 16, 36, 37), barred=(False, True))
  def test_equals_the_plain_loss(self, block, barred):
    x, head = _rows(0, _B, _R, _D), _rows(1, _D, _V)
    targets = jnp.arange(_B * _R).reshape(_B, _R) * 2
    weights = _rows(2, _B, _R)
    bar = objective.Barred(35, weights > 0) if barred else None

    def plain(x, head):
      logits = vocabulary.logits(x, head)
      return objective.nats_of_logits(logits, targets, bar)

    def blocks(x, head):
      return vocabulary.nll(x, head, targets, block, bar)

    def both(nll):
      def weighted(x, head):
        nats = nll(x, head)
        return (nats * weights).sum(), nats

      return jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(x, head)

    for got, wanted in zip(
      jax.tree.leaves(both(blocks)), jax.tree.leaves(both(plain)), strict=True
    ):
      # Float32 rounding of sums over the vocabulary.
      scale = np.abs(wanted).max()
      np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * scale)

  def test_no_array_of_all_logits(self):
    V, block = 4096, 256
    x, head = _rows(0, 4, 64, 8), _rows(1, 8, V)
    targets = jnp.zeros((4, 64), jnp.int32)
    step = jax.grad(
      lambda x, head: vocabulary.nll(x, head, targets, block).sum(), (0, 1)
    )
    memory = jax.jit(step).lower(x, head).compile().memory_analysis()
    logits = 4 * 64 * V * 4
    self.assertLess(memory.temp_size_in_bytes, logits / 2)

  @parameterized.parameters(tiny.ALTERNATING[0], (tiny.MASKED[0], 1))
  def test_the_training_loss(self, mechanism, sentinels):
    self.check_training_loss(mechanism, sentinels)

  @pytest.mark.slow
  def test_the_training_loss_of_one_more_mechanism(self):
    self.check_training_loss(*tiny.ALTERNATING[1])

  def check_training_loss(self, mechanism, sentinels):
    """Logits in blocks give the gradients of all logits together."""

    def both(block):
      network = tiny.make(mechanism, sentinels, loss_block=block)
      config, T = network.config, network.model.T
      tokens = tiny.tokens(2, T, network.vocabulary)

      def loss(params):
        draws = objective.draw(
          jax.random.key(1),
          2,
          T,
          config.orders,
          config.train,
          config.model.kind,
          jnp.int32(0),
        )
        return objective.training_nll(
          network.bind(params), network.layout, tokens, draws
        ).sum()

      return tiny.quick_jit(jax.value_and_grad(loss))(tiny.sharp(network))

    def check(got, wanted):
      # Float32 rounding through two layers.
      scale = max(1, np.abs(wanted).max())
      np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * scale)

    jax.tree.map(check, both(2), both(0))


class TiedTest(absltest.TestCase):
  def test_the_head_is_the_embedding(self):
    plain, tied = tiny.make(), tiny.make(tied=True)
    params = tiny.sharp(tied)
    self.assertNotIn("head", params)
    slots = orders.to_slots(
      tiny.tokens(2, 7, 5), tiny.orders_of("two_stream", 2, 7), tied.layout
    )
    head = params["embedding"][:5].T
    # The two programs may sum in different orders.
    tiny.assert_same(
      jax.jit(tied.apply)(params, slots),
      jax.jit(plain.apply)(params | {"head": head}, slots),
    )


if __name__ == "__main__":
  absltest.main()
