"""Two streams over groups of ranks, and over some of the ranks."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective, orders
from aoarm_jax.config import schema as config

# On the older Python alone, for time.
pytestmark = pytest.mark.once

_B, _T, _V = 3, 7, 5


def _starts(*sizes):
  """bool [T] with groups of these sizes."""
  start = np.zeros(sum(sizes), bool)
  start[np.cumsum([0, *sizes[:-1]])] = True
  return start


_GROUPS = np.stack([_starts(2, 3, 2), _starts(1, 1, 4, 1), _starts(7)])


@functools.cache
def _nll(s, T=_T, V=_V, **shape):
  """Jitted (tokens, order, group_start) -> nats by rank."""
  made = tiny.make("two_stream", s, T=T, V=V, **shape)
  params = tiny.sharp(made)
  run = tiny.quick_jit(
    lambda tokens, order, groups, ranks: objective.order_nll(
      made.bind(params),
      made.layout,
      tokens,
      order,
      group_start=groups,
      ranks=ranks,
    )
  )
  return lambda tokens, order, groups=None, ranks=None: np.asarray(
    run(tokens, order, groups, ranks), np.float64
  )


class GroupsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(_B, _T, _V)
    self.order = tiny.orders_of("two_stream", _B, _T)

  @parameterized.parameters(1, 2)
  def test_what_each_row_sees(self, s):
    slots = orders.to_slots(
      self.tokens, self.order, tiny.layout(s, _V, _T), group_start=_GROUPS
    )
    for b, start in enumerate(_GROUPS):
      ends = [*np.flatnonzero(start)[1:], _T]
      for i in range(_T + s - 1):
        content, query = slots.visible[b, i]
        if i < s:
          self.assertEqual(content, i + 1)
        else:  # Slot i holds rank i - s: to the end of its group.
          end = next(e for e in ends if e > i - s)
          self.assertEqual(content, min(end + s, _T + s - 1))
        if i >= s - 1:  # It predicts rank i - s + 1: to the start of its group.
          rank = i - s + 1
          self.assertEqual(query, start[: rank + 1].nonzero()[0][-1] + s)

  @parameterized.parameters(1, 2)
  def test_groups_of_one_are_the_chain_rule(self, s):
    ones = np.ones((_B, _T), bool)
    tiny.assert_same(
      _nll(s)(self.tokens, self.order, ones),
      _nll(s)(self.tokens, self.order),
    )

  @parameterized.parameters(1, 2)
  def test_law_sums_to_one(self, s):
    T, V = 4, 3
    texts, every = tiny.all_sequences(V, T), tiny.all_orders(T)
    tokens = np.tile(texts, (len(every), 1))
    order = np.repeat(every, len(texts), axis=0)
    nll = _nll(s, T, V, D=8, N=2)
    for rest in itertools.product((False, True), repeat=T - 1):
      groups = np.tile([True, *rest], (len(tokens), 1))
      p = np.exp(-nll(tokens, order, groups).sum(axis=1)).reshape(24, -1)
      np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)

  @parameterized.parameters(1, 2)
  def test_only_groups_before_move_a_rank(self, s):
    """Bitwise: its own group and later ones do not, all before it do."""
    base = self.logits(s, self.tokens)
    for r in range(_T):
      other, at = self.tokens.copy(), self.order[:, r : r + 1] - 1
      new = (np.take_along_axis(other, at, axis=1) + 1) % _V
      np.put_along_axis(other, at, new, axis=1)
      moved = (self.logits(s, other) != base).any(axis=-1)
      for b, start in enumerate(_GROUPS):
        group = np.cumsum(start)
        np.testing.assert_array_equal(moved[b], group > group[r])

  def logits(self, s, tokens):
    params, run = _logits(s)
    slots = orders.to_slots(
      tokens, self.order, tiny.layout(s, _V, _T), group_start=_GROUPS
    )
    return np.asarray(run(params, slots))[:, s - 1 :]

  def test_order_inside_a_group_is_no_order(self):
    """The same tokens in groups: any order inside gives the same nats."""
    groups = np.tile(_starts(2, 3, 2), (_B, 1))
    permuted = self.order[:, [1, 0, 4, 2, 3, 6, 5]]
    got = _nll(1)(self.tokens, permuted, groups)
    want = _nll(1)(self.tokens, self.order, groups)
    tiny.assert_same(got, want[:, [1, 0, 4, 2, 3, 6, 5]])
    # Without groups it is one.
    apart = _nll(1)(self.tokens, permuted).sum(axis=1)
    self.assertGreater(
      np.abs(apart - _nll(1)(self.tokens, self.order).sum(axis=1)).min(), 1e-3
    )

  def test_draws(self):
    def draw(B=500, first_row=0, **options):
      options = config.Orders(**options)
      return np.asarray(
        orders.draw_groups(
          jax.random.key(0), B, 8, options, first_row=first_row
        )
      )

    np.testing.assert_array_equal(
      draw(3, groups="fixed", group_width=3), [_starts(3, 3, 2)] * 3
    )
    np.testing.assert_array_equal(
      draw(3, groups="given", group_sizes=(1, 4, 3)), [_starts(1, 4, 3)] * 3
    )
    self.assertIsNone(
      orders.draw_groups(jax.random.key(0), 3, 8, config.Orders())
    )
    start = draw(groups="random", group_width=4)
    self.assertTrue(start[:, 0].all())
    self.assertAlmostEqual(start[:, 1:].mean(), 0.25, delta=0.03)
    # A row depends on its index alone.
    np.testing.assert_array_equal(
      start[7:10], draw(3, first_row=7, groups="random", group_width=4)
    )


@functools.cache
def _logits(s):
  made = tiny.make("two_stream", s)
  run = jax.jit(made.apply)
  return tiny.sharp(made), run


class QueryFractionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(_B, _T, _V)
    self.order = tiny.orders_of("two_stream", _B, _T)

  @parameterized.product(s=(1, 2), groups=(None, _GROUPS))
  def test_ranks_are_those_of_the_whole(self, s, groups):
    ranks = np.array([[0, 3, 6], [1, 2, 5], [4, 5, 6]])
    got = _nll(s)(self.tokens, self.order, groups, ranks)
    want = _nll(s)(self.tokens, self.order, groups)
    tiny.assert_same(got, np.take_along_axis(want, ranks, axis=1))

  def test_the_loss_is_unbiased(self):
    """The mean over all choices of 2 of 7 ranks is the whole; so of slopes."""
    made = tiny.make("two_stream", 1)
    params = tiny.sharp(made)

    def loss(params, ranks):
      draws = objective.Draws(self.order, ranks=ranks)
      return objective.training_nll(
        made.bind(params), made.layout, self.tokens, draws
      ).sum()

    value_and_slope = tiny.quick_jit(jax.value_and_grad(loss))
    want = value_and_slope(params, None)
    parts = [
      value_and_slope(params, np.tile(np.array(pair), (_B, 1)))
      for pair in itertools.combinations(range(_T), 2)
    ]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
      mean,
      want,
    )
    self.assertGreater(np.abs(parts[0][0] - want[0]), 0.1)

  def test_draws(self):
    """Distinct ranks in order, every one as often as any other."""
    draws = objective.draw(
      jax.random.key(0),
      4000,
      _T,
      config.Orders(),
      config.Train(query_fraction=0.4),
      config.Model().kind,
      np.int32(0),
    )
    ranks = np.asarray(draws.ranks)
    self.assertEqual(ranks.shape, (4000, 3))
    self.assertTrue((np.diff(ranks, axis=1) > 0).all())
    share = np.bincount(ranks.reshape(-1), minlength=_T) / 4000
    np.testing.assert_allclose(share, 3 / _T, atol=0.04)


if __name__ == "__main__":
  absltest.main()
