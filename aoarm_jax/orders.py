"""Generation orders, and tokens laid out in generation order.

An order is an int32 row [T]: a permutation of the positions 1..T. Position 0
is BOS and, with two sentinels, position T + 1 is EOS; both are always known.
Everything downstream runs in generation order: `to_slots` gathers the tokens
once, so that an ordinary causal mask over slots is the any-order mask.

Pure jax.numpy. Dimension letters: aoarm_jax/config/schema.py.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax.config import schema as config_lib


class Layout(NamedTuple):
  """How a network wants tokens laid out; static.

  Attributes:
    sentinels: s, 1 (BOS) or 2 (BOS and EOS).
    vocabulary: V; BOS has id V, EOS id V + 1, MASK id V + 2.
    end: position of EOS, one after the network's last position.
    masked: whether the mechanism is a masked one, which sees all positions of
      its window at once.
  """

  sentinels: int
  vocabulary: int
  end: int
  masked: bool = False


class Queries(NamedTuple):
  """Targets to be predicted, apart from those of the slots.

  Attributes:
    target_position: int32 [B, Q].
    visible: int32 [B, Q], how many leading slots each sees.
  """

  target_position: jax.Array
  visible: jax.Array


class Slots(NamedTuple):
  """A batch in generation order (or, in decoding, some of its slots).

  Of a masked mechanism: a batch in natural order behind the sentinels, where
  every slot predicts its own position.

  Attributes:
    tokens: int32 [B, S], the content of each slot.
    position: int32 [B, S], c, the position of that content.
    target_position: int32 [B, S], t, the position that the slot predicts. With
      two sentinels slot 0 predicts nothing: its target position is its own, 0.
    visible: int32 [B, S, 2], how many leading slots the content row and the
      query row of each slot see, for two streams over groups; None is causal.
    queries: for two streams, the query rows in place of one for every slot.
  """

  tokens: jax.Array
  position: jax.Array
  target_position: jax.Array
  visible: jax.Array | None = None
  queries: Queries | None = None


def to_slots(
  tokens: jax.Array,
  order: jax.Array,
  layout: Layout,
  group_start: jax.Array | None = None,
  ranks: jax.Array | None = None,
) -> Slots:
  """Lays tokens out in generation order, behind the sentinels.

  Slot 0 is BOS; with two sentinels slot 1 is EOS; slot i >= s holds the token
  at position order[i - s]. The last generated token is never content. Rank r
  is predicted at slot r + s - 1.

  Args:
    tokens: int [B, T], natural order; position p is tokens[:, p - 1].
    order: int32 [B, T], permutations of 1..T.
    layout: of the network. Its `end` is larger than T + 1 where only the first
      T positions of its window are generated.
    group_start: bool [B, T], by rank: whether a group of tokens that are
      generated together starts there; rank 0 always does. None: one by one.
    ranks: int32 [B, R], the ranks to predict; None: all.

  Returns:
    Slots with S = T + s - 1.
  """
  chex.assert_equal_shape([tokens, order])
  B = len(tokens)
  known = jnp.take_along_axis(tokens, order - 1, axis=1)[:, :-1]
  sentinels, V = layout.sentinels, layout.vocabulary
  bos = jnp.array([[V, V + 1][:sentinels]], jnp.int32)
  ends = jnp.array([[0, layout.end][:sentinels]], jnp.int32)
  start = functools.partial(jnp.broadcast_to, shape=(B, sentinels))
  visible = None if group_start is None else _visible(group_start, sentinels)
  queries = None
  if ranks is not None:
    seen = ranks + sentinels
    if visible is not None:
      seen = jnp.take_along_axis(visible[..., 1], seen - 1, axis=1)
    queries = Queries(jnp.take_along_axis(order, ranks, axis=1), seen)
  return Slots(
    tokens=jnp.concatenate([start(bos), known.astype(jnp.int32)], axis=1),
    position=jnp.concatenate([start(ends), order[:, :-1]], axis=1),
    target_position=jnp.pad(order, ((0, 0), (sentinels - 1, 0))),
    visible=visible,
    queries=queries,
  )


def _visible(group_start, s):
  """Content sees to the end of its group, queries to its start: [B, S, 2]."""
  B, T = group_start.shape
  rank = jnp.arange(T)[None]
  start = jax.lax.cummax(
    jnp.where(group_start, rank, 0).at[:, 0].set(0), axis=1
  )
  next_start = jnp.pad(
    group_start[:, 1:], ((0, 0), (0, 1)), constant_values=True
  )
  end = jax.lax.cummin(jnp.where(next_start, rank + 1, T), axis=1, reverse=True)
  # Slot i holds rank i - s and predicts rank i - s + 1; sentinels see theirs.
  alone = jnp.broadcast_to(jnp.arange(1, s + 1)[None], (B, s))
  content = jnp.minimum(end[:, :-1] + s, T + s - 1)
  content = jnp.concatenate([alone, content], axis=1)
  query = jnp.concatenate([alone[:, : s - 1], start + s], axis=1)
  return jnp.stack([content, query], axis=-1)


def to_masked_slots(
  tokens: jax.Array, masked: jax.Array, layout: Layout
) -> Slots:
  """Lays tokens out in natural order behind the sentinels, some as MASK.

  Args:
    tokens: int [B, T].
    masked: bool [B, T], by position.
    layout: of the network, whose window these are: T = layout.end - 1.

  Returns:
    Slots with S = T + s; position p is predicted at slot p + s - 1.
  """
  chex.assert_equal_shape([tokens, masked])
  B, T = tokens.shape
  sentinels, V = layout.sentinels, layout.vocabulary
  shown = jnp.where(masked, V + 2, tokens.astype(jnp.int32))
  first = jnp.array([V, V + 1][:sentinels], jnp.int32)
  ends = jnp.array([0, T + 1][:sentinels], jnp.int32)
  position = jnp.concatenate([ends, jnp.arange(1, T + 1, dtype=jnp.int32)])
  position = jnp.broadcast_to(position[None], (B, T + sentinels))
  first = jnp.broadcast_to(first[None], (B, sentinels))
  return Slots(
    tokens=jnp.concatenate([first, shown], axis=1),
    position=position,
    target_position=position,
  )


def draw(
  key: jax.Array,
  batch: int,
  T: int,
  options: config_lib.Orders,
  *,
  step: jax.Array | int = 0,
  first_row: jax.Array | int = 0,
  rows: jax.Array | None = None,
) -> jax.Array:
  """Draws one order a sequence.

  A row depends on the key and its index alone, so neither the batch size nor
  the number of devices changes it.

  Args:
    key: typed PRNG key.
    batch: B.
    T: positions.
    options: the family and its numbers. uniform: every permutation alike.
      left_to_right, right_to_left: that one. mixture: left to right with
      probability left_to_right_share, else uniform (AO-GPT, arXiv 2506.19935).
      curriculum: left to right, but uniform with a probability that rises from
      0 to 1 over curriculum_steps. block: windows of block_width from left to
      right, in random order inside. shuffled_blocks: windows in random order,
      left to right inside; the last window may be shorter. given: `given`.
    step: training step, for the curriculum.
    first_row: index of row 0 in a larger batch.
    rows: int32 [B], the rows' indices; None is first_row and those after it.

  Returns:
    int32 [B, T], permutations of 1..T.

  Raises:
    ValueError: an unknown family.
  """
  natural = jnp.arange(1, T + 1, dtype=jnp.int32)
  window = (natural - 1) // options.block_width
  uniform_share = {
    "mixture": 1.0 - options.left_to_right_share,
    "curriculum": jnp.clip(step / options.curriculum_steps, 0.0, 1.0),
  }

  def draw_one(row):
    order_key, coin_key = jax.random.split(jax.random.fold_in(key, row))
    uniform = jax.random.permutation(order_key, natural)
    match options.family:
      case "uniform":
        return uniform
      case "left_to_right":
        return natural
      case "right_to_left":
        return natural[::-1]
      case "given":
        return jnp.array(options.given, jnp.int32)
      case "mixture" | "curriculum":
        coin = jax.random.uniform(coin_key)
        return jnp.where(coin < uniform_share[options.family], uniform, natural)
      case "block":
        # A stable sort of a uniform order by window: uniform inside each.
        return uniform[jnp.argsort(window[uniform - 1], stable=True)]
      case "shuffled_blocks":
        windows = -(-T // options.block_width)
        place = jax.random.permutation(order_key, windows)
        return natural[jnp.argsort(place[window], stable=True)]
    raise ValueError(f"unknown order family {options.family!r}")

  rows = first_row + jnp.arange(batch) if rows is None else rows
  return jax.vmap(draw_one)(rows)


def draw_groups(
  key: jax.Array,
  batch: int,
  T: int,
  options: config_lib.Orders,
  *,
  first_row: jax.Array | int = 0,
) -> jax.Array | None:
  """Draws which ranks are generated together (A3, any-subset groups).

  Row b depends on (key, first_row + b) alone.

  Args:
    key: typed PRNG key.
    batch: B.
    T: ranks.
    options: groups is none: one by one; fixed: group_width ranks each, the last
      group may be smaller; random: every rank after the first starts a group
      with probability 1 / group_width; given: of sizes group_sizes.
    first_row: index of row 0 in a larger batch.

  Returns:
    bool [B, T], whether a group starts at each rank; None for none.

  Raises:
    ValueError: unknown groups.
  """
  rank = jnp.arange(T)
  match options.groups:
    case "none":
      return None
    case "fixed":
      start = rank % options.group_width == 0
    case "given":
      ends = np.cumsum(options.group_sizes)
      start = (rank == 0) | jnp.isin(rank, ends)
    case "random":

      def draw_one(row):
        coin = jax.random.uniform(jax.random.fold_in(key, row), (T,))
        return (coin * options.group_width < 1) | (rank == 0)

      return jax.vmap(draw_one)(first_row + jnp.arange(batch))
    case _:
      raise ValueError(f"unknown groups {options.groups!r}")
  return jnp.broadcast_to(start[None], (batch, T))


def query_count(T: int, query_fraction: float) -> int:
  """How many of T ranks are predicted where a fraction of them is."""
  return max(1, round(query_fraction * T))


class Nearest(NamedTuple):
  """The nearest known token of every target; see `nearest`."""

  distance: jax.Array
  recency: jax.Array


def nearest(order: jax.Array) -> Nearest:
  """The known token that stands nearest to each target.

  Args:
    order: int32 [B, T], permutations of 1..T.

  Returns:
    int32 [B, T] each, by rank: its distance from the target, positions; and
    how many steps ago it was generated (1: just before). Of two at the same
    distance the more recent one. 0 at rank 0, where nothing is known;
    sentinels do not count.
  """
  B, T = order.shape
  at = jnp.arange(1, T + 1)[None]

  def step(rank_at, scanned):
    """rank_at: [B, T], the rank of what stands there, -1 where unknown."""
    rank, target = scanned
    away = jnp.abs(at - target[:, None])
    known = rank_at >= 0
    distance = jnp.where(known, away, T).min(axis=1)
    closest = known & (away == distance[:, None])
    recency = rank - jnp.where(closest, rank_at, -1).max(axis=1)
    rank_at = rank_at.at[jnp.arange(B), target - 1].set(rank)
    return rank_at, (distance, recency)

  nothing = jnp.full((B, T), -1)
  _, (distance, recency) = jax.lax.scan(step, nothing, (at[0] - 1, order.T))
  first = at == 1
  return Nearest(
    jnp.where(first, 0, distance.T), jnp.where(first, 0, recency.T)
  )


def known_first(
  order: jax.Array, known: jax.Array, length: jax.Array | None = None
) -> jax.Array:
  """Moves known positions to the front, by position; others keep their order.

  Args:
    order: int32 [B, T], permutations of 1..T.
    known: bool [B, T], by position: known[:, p - 1].
    length: int32 [B]; positions beyond it are moved to the end. None is T.

  Returns:
    int32 [B, T].
  """
  T = order.shape[1]
  kinds = jnp.where(known, 0, 1)
  if length is not None:
    kinds = jnp.where(jnp.arange(T)[None] < length[:, None], kinds, 2)
  return by_class(order, kinds)


def by_class(order: jax.Array, kinds: jax.Array) -> jax.Array:
  """Sorts positions by class; those of class 0 by position among themselves.

  Args:
    order: int32 [B, T], permutations of 1..T; kept within the other classes.
    kinds: int32 [B, T], the class of every position: kinds[:, p - 1].

  Returns:
    int32 [B, T].
  """
  T = order.shape[1]
  kind = jnp.take_along_axis(kinds, order - 1, axis=1)
  place = jnp.where(kind == 0, order, (T + 1) * kind + jnp.arange(T)[None])
  return jnp.take_along_axis(order, jnp.argsort(place, axis=1), axis=1)


def alignment(order: jax.Array) -> jax.Array:
  """Rank correlation of recency with nearness to the target.

  For every target with at least two known tokens before it: Spearman's
  correlation (ties take their mean rank) between how recently a token was
  generated and how near it stands to the target. Sentinels are left out. 1 for
  left_to_right and right_to_left, about 0 for uniform orders at large T.

  Args:
    order: int32 [B, T], permutations of 1..T, T >= 3.

  Returns:
    float32 [B], the mean over targets.
  """
  T = order.shape[1]
  rank_of = jnp.argsort(order, axis=1)  # [B, T], rank of position p at p - 1.
  distance = jnp.arange(1, T)

  def of_target(ranks, order_row, r):
    # At most two positions share a distance, so counting replaces sorting.
    left, right = order_row[r] - distance - 1, order_row[r] + distance - 1
    recency = jnp.stack(
      [
        jnp.where((p >= 0) & (p < T), ranks[jnp.clip(p, 0, T - 1)], T)
        for p in (left, right)
      ]
    )  # [2, T - 1]; T marks positions outside the window.
    seen = recency < r
    count = seen.sum(axis=0)
    nearer = jnp.cumsum(count) - count
    distance_rank = nearer + (count - 1) / 2
    center = (r - 1) / 2
    x = jnp.where(seen, recency - center, 0.0)
    y = jnp.where(seen, center - distance_rank, 0.0)
    scale = jnp.sqrt((x**2).sum() * (y**2).sum())
    # Two tokens at one distance (T small): no correlation is defined; count 0.
    return jnp.where(scale > 0, (x * y).sum() / jnp.maximum(scale, 1e-9), 0.0)

  def of_order(rows):
    ranks, order_row = rows
    targets = jnp.arange(2, T)
    return jax.vmap(functools.partial(of_target, ranks, order_row))(
      targets
    ).mean()

  return jax.lax.map(of_order, (rank_of, order))
