"""Generation orders, and tokens laid out in generation order.

An order is an int32 row [T]: a permutation of the positions 1..T. Position 0 is
BOS. With two sentinels, position T + 1 is EOS. Sentinels are always known.

All later code runs in generation order. `to_slots` gathers the tokens once, and
then an ordinary causal mask over slots is the any-order mask.

This module uses jax.numpy alone and does no I/O. The dimension letters are
explained in aoarm_jax/config/schema.py.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax.config import schema as config_lib


class Layout(NamedTuple):
  """How a network expects tokens to be laid out; a static value.

  Attributes:
    sentinels: s, 1 (BOS) or 2 (BOS and EOS).
    vocabulary: V. BOS has id V, EOS has id V + 1, and MASK has id V + 2.
    end: the position of EOS, one after the network's last position.
    masked: whether the mechanism is a masked diffusion model, which sees all
      positions of its window at once.
    end_token: the id that ends the document of a row, if rows are documents
      that are padded, see lengths.py. None means that all positions are real.
  """

  sentinels: int
  vocabulary: int
  end: int
  masked: bool = False
  end_token: int | None = None

  @property
  def predicts_end(self) -> bool:
    """True if the end of a padded document is one of its predicted tokens."""
    return self.end_token is not None and self.sentinels == 1


class Queries(NamedTuple):
  """Positions to predict that are given apart from the slots.

  Attributes:
    target_position: int32 [B, Q], the positions to predict.
    visible: int32 [B, Q], the number of leading slots that each query sees.
  """

  target_position: jax.Array
  visible: jax.Array


class Slots(NamedTuple):
  """A batch in generation order; while decoding, some slots of a batch.

  With a masked mechanism, the batch is in natural order behind the sentinels,
  and every slot predicts its own position.

  Attributes:
    tokens: int32 [B, S], the content of each slot.
    position: int32 [B, S], c, the position of that content.
    target_position: int32 [B, S], t, the position that the slot predicts. With
      two sentinels slot 0 predicts nothing, and its target position is its own
      position, 0.
    visible: int32 [B, S, 2], the number of leading slots that the content row
      and the query row of each slot see. It is for two streams over groups.
      For a masked mechanism over padded documents it is [B, S, 1]. None means
      causal, and all slots for a masked mechanism.
    queries: for two streams, the query rows. None means one query row per slot.
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
  length: jax.Array | None = None,
) -> Slots:
  """Return tokens laid out in generation order, behind the sentinels.

  Slot 0 is BOS. With two sentinels slot 1 is EOS. A slot i >= s holds the token
  at position order[i - s]. The last generated token is never content. Rank r is
  predicted at slot r + s - 1.

  Args:
    tokens: int [B, T], natural order. Position p is tokens[:, p - 1].
    order: int32 [B, T], permutations of 1..T.
    layout: the layout of the network. Its `end` is larger than T + 1 if only
      the first T positions of its window are generated.
    group_start: bool [B, T], by rank: whether a group of tokens that are
      generated together starts there. Rank 0 always starts a group. None means
      that tokens are generated one by one.
    ranks: int32 [B, R], the ranks to predict. None means all ranks.
    length: int32 [B]. EOS stands at the position after it. None means that EOS
      stands at layout.end.

  Returns:
    Slots with S = T + s - 1.
  """
  chex.assert_equal_shape([tokens, order])
  B = len(tokens)
  known = jnp.take_along_axis(tokens, order - 1, axis=1)[:, :-1]
  sentinels, V = layout.sentinels, layout.vocabulary
  bos = jnp.array([[V, V + 1][:sentinels]], jnp.int32)
  ends = _ends(layout, length)
  start = functools.partial(jnp.broadcast_to, shape=(B, sentinels))
  visible = None if group_start is None else _visible(group_start, sentinels)
  queries = None
  if ranks is not None:
    query_visible = ranks + sentinels
    if visible is not None:
      query_visible = jnp.take_along_axis(
        visible[..., 1], query_visible - 1, axis=1
      )
    queries = Queries(jnp.take_along_axis(order, ranks, axis=1), query_visible)
  return Slots(
    tokens=jnp.concatenate([start(bos), known.astype(jnp.int32)], axis=1),
    position=jnp.concatenate([start(ends), order[:, :-1]], axis=1),
    target_position=jnp.pad(order, ((0, 0), (sentinels - 1, 0))),
    visible=visible,
    queries=queries,
  )


def _ends(layout, length):
  """Return the positions of the sentinels: int32 [1 or B, s]."""
  if length is None or layout.sentinels == 1:
    return jnp.array([[0, layout.end][: layout.sentinels]], jnp.int32)
  return jnp.stack([jnp.zeros_like(length), length + 1], axis=1)


def _visible(group_start, s):
  """Return the visible slots of content and query rows: int32 [B, S, 2].

  Content rows see all slots up to the end of their group. Query rows see all
  slots before the start of their group.
  """
  B, T = group_start.shape
  rank = jnp.arange(T)[None]
  start = jax.lax.cummax(
    jnp.where(group_start, rank, 0).at[:, 0].set(0), axis=1
  )
  next_start = jnp.pad(
    group_start[:, 1:], ((0, 0), (0, 1)), constant_values=True
  )
  end = jax.lax.cummin(jnp.where(next_start, rank + 1, T), axis=1, reverse=True)
  # Slot i holds rank i - s and predicts rank i - s + 1. A sentinel sees the
  # slots up to its own.
  alone = jnp.broadcast_to(jnp.arange(1, s + 1)[None], (B, s))
  content = jnp.minimum(end[:, :-1] + s, T + s - 1)
  content = jnp.concatenate([alone, content], axis=1)
  query = jnp.concatenate([alone[:, : s - 1], start + s], axis=1)
  return jnp.stack([content, query], axis=-1)


def continues(slots: Slots, sentinels: int) -> jax.Array:
  """Return whether each row knows exactly the text before its target.

  Such a row has the context of a model that reads from left to right: the
  target is position t, and the known positions are 1 to t - 1, in any order.

  Args:
    slots: the slots of a mechanism that is not masked.
    sentinels: s.

  Returns:
    bool [B, R], one for each row that predicts.
  """
  target, visible = slots.target_position, slots.visible
  if slots.queries is not None:
    target, seen = slots.queries
  elif visible is not None:
    seen = visible[..., 1]
  else:
    seen = jnp.broadcast_to(1 + jnp.arange(target.shape[1])[None], target.shape)
  # The greatest of the first n known positions, at index n.
  known = jnp.pad(slots.position[:, sentinels:], ((0, 0), (1, 0)))
  greatest = jax.lax.cummax(known, axis=1)
  count = seen - sentinels
  greatest = jnp.take_along_axis(greatest, jnp.maximum(count, 0), axis=1)
  return (count >= 0) & (greatest == count) & (target == count + 1)


def to_masked_slots(
  tokens: jax.Array,
  masked: jax.Array,
  layout: Layout,
  length: jax.Array | None = None,
) -> Slots:
  """Return tokens in natural order behind the sentinels, some as MASK.

  Args:
    tokens: int [B, T].
    masked: bool [B, T], by position: whether the token is replaced by MASK.
    layout: the layout of the network. The tokens fill its window: T =
      layout.end - 1.
    length: int32 [B]. Only the positions up to it are seen, and EOS stands at
      the position after it. None means T.

  Returns:
    Slots with S = T + s. Position p is predicted at slot p + s - 1.
  """
  chex.assert_equal_shape([tokens, masked])
  B, T = tokens.shape
  sentinels, V = layout.sentinels, layout.vocabulary
  shown = jnp.where(masked, V + 2, tokens.astype(jnp.int32))
  first = jnp.array([V, V + 1][:sentinels], jnp.int32)
  ends = jnp.broadcast_to(_ends(layout, length), (B, sentinels))
  natural = jnp.arange(1, T + 1, dtype=jnp.int32)
  natural = jnp.broadcast_to(natural[None], (B, T))
  position = jnp.concatenate([ends, natural], axis=1)
  first = jnp.broadcast_to(first[None], (B, sentinels))
  visible = None
  if length is not None:
    visible = (length + sentinels)[:, None, None]
    visible = jnp.broadcast_to(visible, (B, T + sentinels, 1))
  return Slots(
    tokens=jnp.concatenate([first, shown], axis=1),
    position=position,
    target_position=position,
    visible=visible,
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
  """Draw one order per sequence.

  A row of the result depends on the key and the row's index alone. So neither
  the batch size nor the number of devices changes it.

  The families, as named by `options.family`:

  - uniform: every permutation is equally likely.
  - left_to_right, right_to_left: this order alone.
  - mixture: left to right with probability left_to_right_share, else uniform
    (AO-GPT, arXiv 2506.19935).
  - curriculum: uniform with a probability that rises from 0 to 1, else left to
    right. It is min(1, max(0, step - curriculum_start) / curriculum_steps).
  - growing_blocks: as block, with the width of `curriculum_width`. It grows
    from 1 (left to right) to T (uniform).
  - block: windows of block_width positions from left to right, with a random
    order inside each window.
  - shuffled_blocks: windows in random order, left to right inside each window.
    The last window may be shorter.
  - given: the order `options.given`.

  In the families curriculum and growing_blocks, an order is left to right with
  probability curriculum_left_to_right_share at every step. Only the others
  follow the law above.

  Args:
    key: typed PRNG key.
    batch: B.
    T: the number of positions.
    options: the family and its parameters.
    step: the training step, for curriculum and growing_blocks. It may be
      traced, so one program serves all steps.
    first_row: the index of row 0 in a larger batch.
    rows: int32 [B], the indices of the rows. None means `first_row` and the
      indices after it.

  Returns:
    int32 [B, T], permutations of 1..T.

  Raises:
    ValueError: the family is unknown.
  """
  natural = jnp.arange(1, T + 1, dtype=jnp.int32)
  width: jax.Array | int = options.block_width
  if options.family == "growing_blocks":
    width = curriculum_width(step, T, options)
  window = (natural - 1) // width
  changing = 1.0 - options.curriculum_left_to_right_share
  # The probability that an order is not simply left to right.
  share: dict[str, jax.Array | float] = {
    "mixture": 1.0 - options.left_to_right_share,
    "curriculum": changing
    * jnp.clip(
      _since_start(step, options) / options.curriculum_steps, 0.0, 1.0
    ),
    "growing_blocks": changing,
  }

  def draw_one(row):
    order_key, coin_key = jax.random.split(jax.random.fold_in(key, row))
    uniform = jax.random.permutation(order_key, natural)

    def in_windows():
      # A stable sort by window keeps the order uniform inside each window.
      return uniform[jnp.argsort(window[uniform - 1], stable=True)]

    def often(other):
      coin = jax.random.uniform(coin_key)
      return jnp.where(coin < share[options.family], other, natural)

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
        return often(uniform)
      case "growing_blocks":
        return often(in_windows())
      case "block":
        return in_windows()
      case "shuffled_blocks":
        windows = -(-T // options.block_width)
        place = jax.random.permutation(order_key, windows)
        return natural[jnp.argsort(place[window], stable=True)]
    raise ValueError(f"unknown order family {options.family!r}")

  rows = first_row + jnp.arange(batch) if rows is None else rows
  return jax.vmap(draw_one)(rows)


def _since_start(step, options):
  """Return the steps since the curriculum began to change the orders."""
  return jnp.maximum(step - options.curriculum_start, 0)


def curriculum_width(
  step: jax.Array | int, T: int, options: config_lib.Orders
) -> jax.Array:
  """Return the width of the windows of growing_blocks at a step.

  The width is T^u, rounded to a whole number, where u = (step -
  curriculum_start) / curriculum_steps is kept in [0, 1]. So each doubling takes
  equally many steps.

  Args:
    step: int32 [], the training step.
    T: the number of positions.
    options: gives curriculum_start and curriculum_steps.

  Returns:
    int32 [], from 1 to T.
  """
  # The step at which each width begins is a whole number that is computed here
  # once. So all devices have the same width, however they round powers.
  halves = np.arange(2, T + 1) - 0.5
  begins = np.ceil(
    options.curriculum_steps * np.log(halves) / np.log(max(T, 2))
  )
  since = _since_start(step, options)
  return 1 + jnp.searchsorted(
    jnp.array(begins, jnp.int32), since, side="right"
  ).astype(jnp.int32)


def draw_groups(
  key: jax.Array,
  batch: int,
  T: int,
  options: config_lib.Orders,
  *,
  first_row: jax.Array | int = 0,
) -> jax.Array | None:
  """Draw the groups of ranks that are generated together.

  Such groups are the any-subset groups of A3. Row b of the result depends on
  (key, first_row + b) alone.

  The kinds, as named by `options.groups`:

  - none: tokens are generated one by one.
  - fixed: each group has group_width ranks. The last group may be smaller.
  - random: every rank after the first starts a group with probability 1 /
    group_width.
  - given: the groups have the sizes group_sizes.

  Args:
    key: typed PRNG key.
    batch: B.
    T: the number of ranks.
    options: the kind of groups and its parameters.
    first_row: the index of row 0 in a larger batch.

  Returns:
    bool [B, T], whether a group starts at each rank. None for the kind none.

  Raises:
    ValueError: the kind of groups is unknown.
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


def equal_groups(classes: jax.Array, width: jax.Array | int) -> jax.Array:
  """Return groups of `width` ranks that do not cross the border of a class.

  The groups of a class are counted from its first rank. Its last group may be
  smaller.

  Args:
    classes: int32 [B, T], by rank: the class of every rank, such as known and
      unknown. The ranks of a class stand side by side.
    width: the number of ranks in a group.

  Returns:
    bool [B, T], whether a group starts at each rank, see `to_slots`.
  """
  rank = jnp.arange(classes.shape[1])[None]
  border = jnp.pad(
    classes[:, 1:] != classes[:, :-1], ((0, 0), (1, 0)), constant_values=True
  )
  first = jax.lax.cummax(jnp.where(border, rank, 0), axis=1)
  return (rank - first) % width == 0


def query_count(T: int, query_fraction: float) -> int:
  """Return how many of T ranks are predicted, given their fraction."""
  return max(1, round(query_fraction * T))


class Nearest(NamedTuple):
  """The distance and the recency of every target's nearest known token.

  Attributes:
    distance: int32 [B, T], by rank, see `nearest`.
    recency: int32 [B, T], by rank, see `nearest`.
  """

  distance: jax.Array
  recency: jax.Array


def nearest(order: jax.Array) -> Nearest:
  """Return the known token that stands nearest to each target.

  Sentinels do not count. If two known tokens stand at the same distance, the
  more recent token is taken.

  Args:
    order: int32 [B, T], permutations of 1..T.

  Returns:
    The distance of that token from the target, in positions, and its recency:
    how many steps ago it was generated (1 means just before). Both are int32
    [B, T], by rank, and 0 at rank 0, where nothing is known.
  """
  B, T = order.shape
  position = jnp.arange(1, T + 1)[None]

  def step(rank_at, scanned):
    # rank_at [B, T] is the rank of the token at each position, or -1 where the
    # token is not known yet.
    rank, target = scanned
    away = jnp.abs(position - target[:, None])
    known = rank_at >= 0
    distance = jnp.where(known, away, T).min(axis=1)
    closest = known & (away == distance[:, None])
    recency = rank - jnp.where(closest, rank_at, -1).max(axis=1)
    rank_at = rank_at.at[jnp.arange(B), target - 1].set(rank)
    return rank_at, (distance, recency)

  nothing = jnp.full((B, T), -1)
  _, (distance, recency) = jax.lax.scan(
    step, nothing, (position[0] - 1, order.T)
  )
  first = position == 1
  return Nearest(
    jnp.where(first, 0, distance.T), jnp.where(first, 0, recency.T)
  )


def known_first(
  order: jax.Array, known: jax.Array, length: jax.Array | None = None
) -> jax.Array:
  """Return orders with known positions first, sorted by position.

  The other positions keep their order.

  Args:
    order: int32 [B, T], permutations of 1..T.
    known: bool [B, T], by position: known[:, p - 1].
    length: int32 [B]. Positions beyond it are moved to the end. None means T.

  Returns:
    int32 [B, T].
  """
  T = order.shape[1]
  kinds = jnp.where(known, 0, 1)
  if length is not None:
    kinds = jnp.where(jnp.arange(T)[None] < length[:, None], kinds, 2)
  return by_class(order, kinds)


def by_class(order: jax.Array, kinds: jax.Array) -> jax.Array:
  """Return orders sorted by the class of each position.

  Positions of class 0 are sorted by position. Within every other class,
  positions keep their order.

  Args:
    order: int32 [B, T], permutations of 1..T.
    kinds: int32 [B, T], the class of every position: kinds[:, p - 1].

  Returns:
    int32 [B, T].
  """
  T = order.shape[1]
  kind = jnp.take_along_axis(kinds, order - 1, axis=1)
  place = jnp.where(kind == 0, order, (T + 1) * kind + jnp.arange(T)[None])
  return jnp.take_along_axis(order, jnp.argsort(place, axis=1), axis=1)


def alignment(order: jax.Array) -> jax.Array:
  """Return the rank correlation of recency with nearness to the target.

  For every target with at least two known tokens, this is Spearman's
  correlation between how recently a token was generated and how near it stands
  to the target. Ties take their mean rank, and sentinels are left out. The
  result is 1 for left_to_right and right_to_left, and about 0 for uniform
  orders at large T.

  Args:
    order: int32 [B, T], permutations of 1..T, T >= 3.

  Returns:
    float32 [B], the mean over targets.
  """
  T = order.shape[1]
  rank_of = jnp.argsort(order, axis=1)  # [B, T]; the rank of p is at p - 1.
  distance = jnp.arange(1, T)

  def of_target(ranks, order_row, r):
    # At most two positions share a distance, so counting replaces sorting.
    # `left` and `right` are the indices of these two positions.
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
    # With small T, all known tokens may stand at one distance. No correlation
    # is defined then, and 0 is counted.
    return jnp.where(scale > 0, (x * y).sum() / jnp.maximum(scale, 1e-9), 0.0)

  def of_order(rows):
    ranks, order_row = rows
    targets = jnp.arange(2, T)
    return jax.vmap(functools.partial(of_target, ranks, order_row))(
      targets
    ).mean()

  return jax.lax.map(of_order, (rank_of, order))
