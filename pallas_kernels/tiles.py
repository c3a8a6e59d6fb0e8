"""Which tiles of the score matrix hold something visible.

A row tile is some rows of one sequence, a key tile some consecutive slots. In
the pair of both every score is visible, or some, or none; this is known from
the smallest and the largest `visible` of the rows and rank of the slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Bits of Worklist.flags.
FIRST, LAST = 1, 2  # The pair starts, ends the work on its stationary tile.
OPENS, CLOSES = 4, 8  # It starts, ends the work on its sequence.
SOME, ALL = 16, 32  # What is visible; neither bit: nothing.


class Bounds(NamedTuple):
  """Smallest and largest value of each tile, int32 [B or 1, tiles]."""

  low: jax.Array
  high: jax.Array


def row_bounds(visible: jax.Array) -> Bounds:
  """Of `visible`, int32 [B or 1, row tiles, rows]."""
  return Bounds(visible.min(axis=-1), visible.max(axis=-1))


def key_bounds(key_rank: jax.Array | None, S: int, size: int) -> Bounds:
  """Of the ranks of the slots, int32 [B, S], S a multiple of the tile's size.

  None: the rank of a slot is its index.
  """
  if key_rank is None:
    low = jnp.arange(0, S, size, jnp.int32)[None]
    return Bounds(low, low + (size - 1))
  tiles = key_rank.reshape(key_rank.shape[0], S // size, size)
  return Bounds(tiles.min(axis=-1), tiles.max(axis=-1))


class Worklist(NamedTuple):
  """Pairs of tiles in the order in which a sequential grid visits them.

  Attributes:
    sequence: int32 [n], of the pair, in 0 to B - 1, or 0 for a list that all
      sequences share.
    row: int32 [n], the row tile.
    key: int32 [n], the key tile.
    flags: int32 [n], see above.
    count: how many of the n are to be visited.
  """

  sequence: jax.Array
  row: jax.Array
  key: jax.Array
  flags: jax.Array
  count: int | jax.Array


def worklist(
  rows: Bounds, keys: Bounds, *, key_major: bool, count: int | None = None
) -> Worklist:
  """The pairs in which something is visible, and one of every tile.

  Args:
    rows: of `visible`.
    keys: of the ranks.
    key_major: whether the key tile is stationary, and not the row tile: all
      pairs of a stationary tile follow each other, and it has at least one,
      since its output must be written even if it sees nothing.
    count: the number of pairs where it is known before tracing.
  """
  some = keys.low[:, None, :] < rows.high[:, :, None]
  every = keys.high[:, None, :] < rows.low[:, :, None]
  if key_major:
    some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
  alone = jnp.arange(some.shape[2]) == 0
  visited = some | (alone & ~some.any(axis=2, keepdims=True))
  size = visited.size if count is None else count
  total = visited.sum(dtype=jnp.int32) if count is None else count
  (flat,) = jnp.nonzero(visited.ravel(), size=size, fill_value=visited.size)
  flat = flat.astype(jnp.int32)
  stationary, moving = jnp.divmod(flat, some.shape[2])
  sequence, stationary = jnp.divmod(stationary, some.shape[1])
  opens, closes = _ends(sequence)
  first, last = _ends(flat // some.shape[2])
  some, every = (
    x.ravel().at[flat].get(mode="fill", fill_value=False) for x in (some, every)
  )
  flags = (
    first * FIRST
    + last * LAST
    + opens * OPENS
    + closes * CLOSES
    + jnp.where(every, ALL, some * SOME)
  )
  row, key = (moving, stationary) if key_major else (stationary, moving)
  return Worklist(sequence, row, key, flags.astype(jnp.int32), total)


def _ends(group):
  """Whether each is the first, the last of its run of equal values."""
  change = group[1:] != group[:-1]
  end = jnp.ones(1, bool)
  return jnp.append(end, change), jnp.append(change, end)


def causal_count(
  T: int, S: int, rows: int, slots: int, *, key_major: bool
) -> int:
  """The length of the work list where row i sees min(i + 1, S) slots.

  Args:
    T: positions.
    S: slots.
    rows: positions of a row tile.
    slots: slots of a key tile.
    key_major: as for `worklist`.
  """
  ends = [min(end, T, S) for end in range(rows, T + rows, rows)]
  pairs = sum(-(-end // slots) for end in ends)
  unseen = -(-S // slots) - -(-ends[-1] // slots)
  return pairs + key_major * unseen
