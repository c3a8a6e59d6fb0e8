"""Distillation: which rows have the teacher's context, and what is added."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective, orders
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import distilled

T, V = 3, 3
TEACHER = tiny.make("causal", 1, T=T, V=V, L=1)
WEIGHTS = tiny.sharp(TEACHER, 1)
MORE_CASES = (("decoupled_rope", 2), ("causal", 1))


def natural(B):
  return np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))


@functools.cache
def network(mechanism, sentinels, **fields):
  made = tiny.make(mechanism, sentinels, T=T, V=V, **fields)
  return made, tiny.sharp(made, 2)


def has_text_before(order, r, known):
  """By definition: rank r predicts the position behind the first `known`."""
  return order[r] == known + 1 and set(order[:known]) == {*range(1, known + 1)}


class ContextTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_every_order(self, s):
    for T in (3, 4):
      every = tiny.all_orders(T)
      slots = orders.to_slots(0 * every, every, tiny.layout(s, V, T))
      got = orders.continues(slots, s)
      want = [[has_text_before(o, r, r) for r in range(T)] for o in every]
      np.testing.assert_array_equal(got[:, s - 1 :], want)
      # The slot before the last sentinel predicts nothing.
      self.assertFalse(got[:, : s - 1].any())

  @parameterized.parameters(1, 2)
  def test_groups_and_chosen_ranks(self, s):
    """A rank knows the groups before its own."""
    every, T = tiny.all_orders(4), 4
    layout = tiny.layout(s, V, T)
    for starts in itertools.product((False, True), repeat=T - 1):
      group_start = np.tile([True, *starts], (len(every), 1))
      first = np.maximum.accumulate(np.where(group_start[0], np.arange(T), 0))
      want = np.array(
        [[has_text_before(o, r, first[r]) for r in range(T)] for o in every]
      )
      slots = orders.to_slots(0 * every, every, layout, group_start)
      got = orders.continues(slots, s)[:, s - 1 :]
      np.testing.assert_array_equal(got, want)
      ranks = np.tile(np.array([1, 3], np.int32), (len(every), 1))
      slots = orders.to_slots(0 * every, every, layout, group_start, ranks)
      got = orders.continues(slots, s)
      np.testing.assert_array_equal(got, want[:, [1, 3]])


@functools.cache
def programs(mechanism, sentinels, **fields):
  """Jitted (both, weights, texts, order, temperature) -> Terms, and others.

  The others are the plain nats of student and teacher, and the logits of the
  two, by position of an order from left to right and by rank.
  """
  student, _ = network(mechanism, sentinels, **fields)

  def of_both(params, weights, texts, order, temperature):
    both = distilled.Distilled(
      student.bind(params), TEACHER.bind(weights), texts, temperature
    )
    return objective.order_nll(both, student.layout, texts, order)

  def plain(params, weights, texts, order):
    along = natural(len(texts))
    pairs = (student, params, order), (TEACHER, weights, along)
    return [
      (
        objective.order_nll(made.bind(p), made.layout, texts, o),
        made.apply(p, orders.to_slots(texts, o, made.layout)),
      )
      for made, p, o in pairs
    ]

  return tiny.quick_jit(of_both), tiny.quick_jit(plain)


class TermsTest(parameterized.TestCase):
  def test_the_sum_is_the_divergence_of_the_laws_of_texts(self):
    self.check_the_sum("two_stream", 1)

  @parameterized.parameters(*MORE_CASES)
  @pytest.mark.slow
  def test_the_sum_for_more_mechanisms(self, mechanism, s):
    self.check_the_sum(mechanism, s)

  def check_the_sum(self, mechanism, s):
    """From left to right, by the chain rule of the divergence."""
    _, params = network(mechanism, s)
    texts = tiny.all_sequences(V, T)
    order = natural(len(texts))
    of_both, plain = programs(mechanism, s)
    got = of_both(params, WEIGHTS, texts, order, 1.0)
    (of_student, _), (of_teacher, _) = plain(params, WEIGHTS, texts, order)
    tiny.assert_same(got.nats, of_student)
    p = np.exp(-np.asarray(of_teacher.sum(axis=1), np.float64))
    self.assertAlmostEqual(p.sum(), 1.0, places=5)
    want = (p * (of_student - of_teacher).sum(axis=1)).sum()
    self.assertGreater(want, 0.1)
    found = (p * got.divergence.sum(axis=1)).sum()
    self.assertAlmostEqual(found / want, 1.0, places=5)
    self.assertTrue((np.asarray(got.matched) == 1).all())

  def test_other_orders_count_where_the_context_is_the_text_before(self):
    _, params = network("two_stream", 1)
    texts, order = tiny.tokens(6, T, V), tiny.all_orders(T)
    of_both, plain = programs("two_stream", 1)
    got = of_both(params, WEIGHTS, texts, order, 1.0)
    (nats, logits), (_, of_teacher) = plain(params, WEIGHTS, texts, order)
    tiny.assert_same(got.nats, nats)
    matched = np.array(
      [[has_text_before(o, r, r) for r in range(T)] for o in order]
    )
    np.testing.assert_array_equal(got.matched, matched.astype(np.float32))
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (of_teacher, logits))
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    want = np.where(matched, (p * np.log(p / q)).sum(axis=-1), 0)
    np.testing.assert_allclose(got.divergence, want, rtol=1e-4, atol=1e-6)

  @pytest.mark.thorough
  def test_a_teacher_has_nothing_to_teach_itself(self):
    texts, order = tiny.tokens(5, T, V), natural(5)

    @tiny.quick_jit
    @jax.value_and_grad
    def run(params):
      both = distilled.Distilled(
        TEACHER.bind(params), TEACHER.bind(WEIGHTS), texts, 2.0
      )
      found = objective.order_nll(both, TEACHER.layout, texts, order)
      return found.divergence.sum()

    divergence, gradient = run(WEIGHTS)
    self.assertAlmostEqual(float(divergence), 0.0, places=5)
    for leaf in jax.tree.leaves(gradient):
      self.assertLess(float(jnp.abs(leaf).max()), 1e-5)

  def test_temperature_divides_the_logits(self):
    """As if the last weights of both were smaller."""
    _, params = network("two_stream", 1)
    texts, order = tiny.tokens(6, T, V), natural(6)
    of_both, _ = programs("two_stream", 1)
    got = of_both(params, WEIGHTS, texts, order, 4.0)
    params, weights = (x | {"head": x["head"] / 4} for x in (params, WEIGHTS))
    want = of_both(params, weights, texts, order, 1.0)
    tiny.assert_same(got.divergence, want.divergence)

  def test_chosen_ranks_and_blocks_of_symbols(self):
    """The mean over chosen ranks is the loss, in parts of memory, too."""
    student, params = network("two_stream", 1, loss_block=2)
    texts, order = tiny.tokens(6, T, V), tiny.all_orders(T)
    of_both, _ = programs("two_stream", 1)
    every = of_both(params, WEIGHTS, texts, order, 1.5)

    @tiny.quick_jit
    def of_ranks(params, ranks):
      both = distilled.Distilled(
        student.bind(params), TEACHER.bind(WEIGHTS), texts, 1.5
      )
      draws = objective.Draws(jnp.asarray(order), ranks=ranks)
      return objective.training_nll(both, student.layout, texts, draws)

    found = 0.0
    for ranks in ([0, 1], [0, 2], [1, 2]):
      ranks = np.tile(np.array(ranks, np.int32), (6, 1))
      found += np.stack(of_ranks(params, ranks)) / 3
    want = np.stack([x.sum(axis=1) for x in every])
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-5)


class FieldsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(distill_weight=0.0), "must be above 0"),
    (dict(distill_temperature=0.0), "must be above 0"),
  )
  def test_what_cannot_be(self, fields, message):
    config = config_lib.Config(train=config_lib.Train(distill="x", **fields))
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      config_rules.validate(config)


if __name__ == "__main__":
  absltest.main()
