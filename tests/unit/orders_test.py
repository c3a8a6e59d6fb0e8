"""Orders: permutations of the promised structure, slots, alignment."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.config import schema as config

_B, _T, _WIDTH = 3, 7, 3
_MANY = 30_000
_GIVEN = (4, 1, 7, 2, 6, 3, 5)

_jitted = tiny.quick_jit(orders.draw, static_argnames=("batch", "T", "options"))


@functools.cache
def _draw(family, B=_MANY, T=_T, seed=0, step=0, first_row=0, **overrides):
  options = dict(block_width=_WIDTH, given=_GIVEN, left_to_right_share=0.3)
  options = config.Orders(family=family, **options | overrides)
  key = jax.random.key(seed)
  return np.asarray(_jitted(key, B, T, options, step=step, first_row=first_row))


def _mean_ranks(x):
  """Ranks from 0; ties take their mean."""
  x = np.asarray(x)
  return np.array([(x < a).sum() + ((x == a).sum() - 1) / 2 for a in x])


def _slow_alignment(order):
  """Spearman's correlation by the definition, target by target."""
  correlations = []
  for r in range(2, len(order)):
    known = np.array(order[:r])
    x = _mean_ranks(np.arange(r))  # Later is more recent.
    y = _mean_ranks(-np.abs(known - order[r]))  # Less far is nearer.
    defined = x.std() > 0 and y.std() > 0
    correlations.append(np.corrcoef(x, y)[0, 1] if defined else 0.0)
  return np.mean(correlations)


class _Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(tiny.rank_promotion_raises())


class DrawTest(_Test):
  @parameterized.parameters(*config.ORDER_FAMILIES)
  def test_every_row_is_a_permutation(self, family):
    drawn = _draw(family, step=300)
    self.assertEqual((drawn.shape, drawn.dtype), ((_MANY, _T), np.int32))
    self.assertTrue((np.sort(drawn, axis=1) == np.arange(1, _T + 1)).all())

  @parameterized.parameters(
    "uniform", "mixture", "growing_blocks", "shuffled_blocks"
  )
  def test_a_row_depends_on_its_index_alone(self, family):
    """Neither batch size nor the split over devices changes a row."""
    whole = _draw(family)
    np.testing.assert_array_equal(_draw(family, B=3), whole[:3])
    part = _draw(family, B=3, first_row=997)
    np.testing.assert_array_equal(part, whole[997:1000])

  def test_keys_and_rows_differ(self):
    drawn = _draw("uniform")
    other = _draw("uniform", seed=1)
    for pair in ((drawn, other), (drawn[1:], drawn[:-1])):
      same = np.mean((pair[0] == pair[1]).all(axis=1))
      self.assertLess(same, 5 / math.factorial(_T))

  def test_the_fixed_families(self):
    natural = np.tile(np.arange(1, _T + 1), (_MANY, 1))
    np.testing.assert_array_equal(_draw("left_to_right"), natural)
    np.testing.assert_array_equal(_draw("right_to_left"), natural[:, ::-1])
    np.testing.assert_array_equal(_draw("given"), np.tile(_GIVEN, (_MANY, 1)))

  def test_an_unknown_family_is_named(self):
    with self.assertRaisesRegex(ValueError, "unknown order family 'spiral'"):
      _draw("spiral")

  @parameterized.parameters(
    ("uniform", 4, 24),
    # Windows 123, 456 and the ragged 7: 3! * 3! orders, all alike.
    ("block", 7, 36),
    # The same windows in 3! orders.
    ("shuffled_blocks", 7, 6),
  )
  def test_every_order_comes_equally_often(self, family, T, outcomes):
    drawn = _draw(family, T=T)
    values, counts = np.unique(drawn, axis=0, return_counts=True)
    self.assertLen(values, outcomes)
    law = np.full(outcomes, 1 / outcomes)
    self.assertGreater(tiny.p_value(counts, law), 1e-4)
    # The test has the power to see one order drawn 30% too often.
    law[0] *= 1.3
    self.assertLess(tiny.p_value(counts, law / law.sum()), 1e-4)

  def test_blocks_grow(self):
    """The law at a step is that of the family block at the step's width."""
    options = config.Orders(family="growing_blocks", curriculum_start=100)
    steps = np.arange(0, 1300, 10)
    widths = np.array([orders.curriculum_width(s, _T, options) for s in steps])
    powers = _T ** np.clip((steps - 100) / 1000, 0, 1)
    np.testing.assert_array_less(np.abs(widths - powers), 0.5 + 1e-6)
    self.assertEqual(set(widths), set(range(1, _T + 1)))
    for step in (300, 700, 900):
      width = int(orders.curriculum_width(step, _T, options))
      grown = _draw("growing_blocks", step=step, curriculum_start=100)
      np.testing.assert_array_equal(grown, _draw("block", block_width=width))

  def test_one_program_serves_all_steps_of_a_curriculum(self):
    traced = []

    @jax.jit
    def draw(step):
      traced.append(step)
      options = config.Orders(family="growing_blocks", curriculum_steps=9)
      return orders.draw(jax.random.key(0), 2, _T, options, step=step)

    drawn = [draw(step) for step in range(12)]
    self.assertLen(traced, 1)
    np.testing.assert_array_equal(drawn[0][0], np.arange(1, _T + 1))
    np.testing.assert_array_equal(drawn[9], drawn[11])

  @parameterized.parameters((7, 3), (7, 9), (8, 4))
  def test_blocks_come_from_left_to_right(self, T, width):
    drawn = _draw("block", T=T, block_width=width)
    self.assertTrue(((drawn - 1) // width == np.arange(T) // width).all())

  @parameterized.parameters((7, 3), (7, 9), (8, 4))
  def test_shuffled_blocks_run_left_to_right_inside(self, T, width):
    for row in _draw("shuffled_blocks", T=T, block_width=width)[:50]:
      window = (row - 1) // width
      inside = window[1:] == window[:-1]
      np.testing.assert_array_equal(np.diff(row)[inside], 1)
      # Each window comes once, in one piece.
      self.assertEqual((~inside).sum(), math.ceil(T / width) - 1)

  @parameterized.parameters(
    ("mixture", 0, dict(left_to_right_share=0.3), 0.3),
    ("mixture", 300, dict(left_to_right_share=0.3), 0.3),
    ("mixture", 0, dict(left_to_right_share=1.0), 1.0),
    ("curriculum", 0, {}, 1.0),
    ("curriculum", 250, {}, 0.75),
    ("curriculum", 1000, {}, 0.0),
    ("curriculum", 9000, {}, 0.0),
    ("curriculum", 250, dict(curriculum_start=250), 1.0),
    ("curriculum", 500, dict(curriculum_start=250), 0.75),
    ("curriculum", 500, dict(curriculum_left_to_right_share=0.2), 0.6),
    ("growing_blocks", 0, {}, 1.0),
    ("growing_blocks", 1000, {}, 0.0),
    ("growing_blocks", 1000, dict(curriculum_left_to_right_share=0.2), 0.2),
  )
  def test_share_of_left_to_right(self, family, step, options, share):
    drawn = _draw(family, step=step, **options)
    natural = (drawn == np.arange(1, _T + 1)).all(axis=1)
    expected = share + (1 - share) / math.factorial(_T)
    deviation = 4.5 * math.sqrt(expected * (1 - expected) / _MANY)
    self.assertAlmostEqual(natural.mean(), expected, delta=deviation + 1e-9)
    # The others are uniform: so is where they begin.
    if share < 1:
      starts = np.bincount(drawn[~natural, 0], minlength=_T + 1)[1:]
      self.assertGreater(tiny.p_value(starts, np.full(_T, 1 / _T)), 1e-4)


class SlotsTest(_Test):
  def test_layout_with_one_sentinel(self):
    tokens, order = jnp.array([[10, 20, 30, 40]]), jnp.array([[3, 1, 4, 2]])
    slots = orders.to_slots(tokens, order, orders.Layout(1, 99, 6))
    np.testing.assert_array_equal(slots.tokens, [[99, 30, 10, 40]])
    np.testing.assert_array_equal(slots.position, [[0, 3, 1, 4]])
    np.testing.assert_array_equal(slots.target_position, [[3, 1, 4, 2]])

  @parameterized.parameters(5, 9)
  def test_layout_with_two_sentinels(self, end):
    tokens, order = jnp.array([[10, 20, 30, 40]]), jnp.array([[3, 1, 4, 2]])
    slots = orders.to_slots(tokens, order, orders.Layout(2, 99, end))
    np.testing.assert_array_equal(slots.tokens, [[99, 100, 30, 10, 40]])
    np.testing.assert_array_equal(slots.position, [[0, end, 3, 1, 4]])
    np.testing.assert_array_equal(slots.target_position, [[0, 3, 1, 4, 2]])

  @parameterized.parameters(1, 2)
  def test_slot_by_slot(self, s):
    """Slot i holds rank i - s and predicts rank i - s + 1."""
    tokens = tiny.tokens(_B, _T, 5).astype(np.uint8)
    order = _draw("uniform")[:_B]
    slots = orders.to_slots(jnp.asarray(tokens), order, orders.Layout(s, 5, 4))
    chex.assert_shape(slots[:3], (_B, _T + s - 1))
    chex.assert_type(list(slots[:3]), jnp.int32)
    self.assertEqual(slots[3:], (None, None))
    for b in range(_B):
      for i in range(s, _T + s - 1):
        c, t = order[b, i - s], order[b, i - s + 1]
        self.assertEqual(slots.tokens[b, i], tokens[b, c - 1])
        self.assertEqual(slots.position[b, i], c)
        self.assertEqual(slots.target_position[b, i], t)

  def test_one_target(self):
    slots = orders.to_slots(
      jnp.array([[3]]), jnp.array([[1]]), orders.Layout(2, 5, 2)
    )
    np.testing.assert_array_equal(slots.tokens, [[5, 6]])
    np.testing.assert_array_equal(slots.target_position, [[0, 1]])

  def test_shapes_must_agree(self):
    with self.assertRaises(AssertionError):
      orders.to_slots(
        jnp.ones((2, 3), int), jnp.ones((2, 4), int), orders.Layout(1, 5, 4)
      )

  def test_known_first(self):
    order = _draw("uniform")[:32]
    known = np.random.default_rng(0).random((32, _T)) < 0.5
    known[0], known[1] = True, False
    moved = orders.known_first(jnp.asarray(order), jnp.asarray(known))
    for row, is_known, result in zip(order, known, moved):
      front = sorted(p for p in row if is_known[p - 1])
      blanks = [p for p in row if not is_known[p - 1]]
      np.testing.assert_array_equal(result, front + blanks)


class AlignmentTest(_Test):
  def alignment(self, order):
    return np.asarray(jax.jit(orders.alignment)(np.asarray(order)))

  def test_equals_the_slow_definition(self):
    drawn = np.concatenate(
      [_draw(family, step=300)[:4] for family in config.ORDER_FAMILIES]
    )
    slow = [_slow_alignment(row) for row in drawn]
    self.assertGreater(np.std(slow), 0.2)
    np.testing.assert_allclose(self.alignment(drawn), slow, atol=1e-5)

  @parameterized.parameters(3, 4)
  def test_every_order_of_a_few_positions(self, T):
    every = tiny.all_orders(T)
    slow = [_slow_alignment(row) for row in every]
    np.testing.assert_allclose(self.alignment(every), slow, atol=1e-5)

  def test_limits(self):
    """1 in both directions, about 0 for uniform, between them for blocks."""
    T, natural = 65, np.arange(1, 66)
    uniform = np.random.default_rng(0).permuted(
      np.tile(natural, (64, 1)), axis=1
    )
    block = np.concatenate(
      [np.random.default_rng(1).permutation(b) for b in np.split(natural, 5)]
    )
    result = self.alignment([natural, natural[::-1], block, *uniform])
    self.assertLen(natural, T)
    np.testing.assert_allclose(result[:2], 1.0, atol=1e-5)
    self.assertGreater(result[2], 0.5)
    self.assertAlmostEqual(result[3:].mean(), 0.0, delta=0.02)


class NearestTest(parameterized.TestCase):
  def test_equals_a_slow_one(self):
    order = np.stack(
      [np.random.default_rng(b).permutation(9) + 1 for b in range(5)]
    )
    got = jax.jit(orders.nearest)(order)
    for b, row in enumerate(order):
      self.assertEqual((got.distance[b, 0], got.recency[b, 0]), (0, 0))
      for r in range(1, 9):
        # Nearest first, then the most recent.
        distance, recency = min(
          (abs(int(row[j]) - int(row[r])), r - j) for j in range(r)
        )
        self.assertEqual(got.distance[b, r], distance)
        self.assertEqual(got.recency[b, r], recency)

  def test_left_to_right(self):
    near = orders.nearest(np.arange(1, 6)[None])
    self.assertEqual(near.distance.tolist(), [[0, 1, 1, 1, 1]])
    self.assertEqual(near.recency.tolist(), [[0, 1, 1, 1, 1]])


class GroupsTest(absltest.TestCase):
  def test_groups_of_one_width_end_with_their_class(self):
    classes = np.array([[0, 0, 0, 1, 1, 2, 2, 2], [1] * 8], np.int32)
    for width, want in (
      (1, ["11111111", "11111111"]),
      (2, ["10110101", "10101010"]),
      (3, ["10010100", "10010010"]),
      (9, ["10010100", "10000000"]),
    ):
      start = np.asarray(orders.equal_groups(classes, width)).astype(int)
      self.assertEqual(["".join(map(str, row)) for row in start], want)


if __name__ == "__main__":
  absltest.main()
