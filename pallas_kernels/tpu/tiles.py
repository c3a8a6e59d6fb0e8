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
_FLAGS = 64


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

  All pairs of a stationary tile follow each other. It has at least one, in
  which nothing may be visible: its output must be written all the same.

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


def worklist(rows: Bounds, keys: Bounds, *, key_major: bool) -> Worklist:
  """The pairs in which something is visible.

  Args:
    rows: of `visible`.
    keys: of the ranks.
    key_major: whether the key tile is stationary, and not the row tile.
  """
  some = keys.low[:, None, :] < rows.high[:, :, None]
  every = keys.high[:, None, :] < rows.low[:, :, None]
  if key_major:
    some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
  _, outer, inner = some.shape
  stationary, moving = (
    jax.lax.broadcasted_iota(jnp.int32, some.shape, axis) for axis in (1, 2)
  )
  visited = some | ((moving == 0) & ~some.any(axis=2, keepdims=True))
  first = moving == visited.argmax(axis=2, keepdims=True)
  last = moving == inner - 1 - visited[..., ::-1].argmax(axis=2, keepdims=True)
  flags = (
    first * FIRST
    + last * LAST
    + (first & (stationary == 0)) * OPENS
    + (last & (stationary == outer - 1)) * CLOSES
    + jnp.where(every, ALL, some * SOME)
  )
  # One sort of packed numbers, and a few operations around it: this is done
  # for every call, and on a TPU each operation costs microseconds.
  index = jnp.arange(visited.size).reshape(visited.shape)
  packed = jnp.where(visited, index * _FLAGS + flags, jnp.iinfo(jnp.int32).max)
  packed = jnp.sort(packed.ravel().astype(jnp.int32))
  index, flags = packed // _FLAGS, packed % _FLAGS
  moving, index = index % inner, index // inner
  stationary, sequence = index % outer, index // outer
  row, key = (moving, stationary) if key_major else (stationary, moving)
  return Worklist(sequence, row, key, flags, visited.sum(dtype=jnp.int32))


def causal_worklist(
  positions: range, S: int, rows: int, slots: int, *, key_major: bool
) -> Worklist:
  """The same where position i sees min(i + 1, S) slots, without an operation.

  Args:
    positions: of the rows, from a tile's first on.
    S: slots.
    rows: positions of a row tile.
    slots: slots of a key tile.
    key_major: as for `worklist`.
  """
  pairs = []
  for row, start in enumerate(range(0, len(positions), rows)):
    tile = positions[start : start + rows]
    low, high = min(tile[0] + 1, S), min(tile[-1] + 1, S)
    for key, end in enumerate(range(slots, high + slots, slots)):
      pairs.append((row, key, ALL if end <= low else SOME))
  if key_major:
    seen = {key for _, key, _ in pairs}
    unseen = set(range(-(-S // slots))) - seen
    pairs += [(0, key, 0) for key in unseen]
    pairs.sort(key=lambda pair: (pair[1], pair[0]))
  stationary = [None, *(pair[key_major] for pair in pairs), None]
  flags = [pair[2] for pair in pairs]
  for i, (before, own, after) in enumerate(
    zip(stationary, stationary[1:], stationary[2:])
  ):
    flags[i] += FIRST * (before != own) + LAST * (after != own)
  flags[0] += OPENS
  flags[-1] += CLOSES
  columns = [0] * len(pairs), *list(zip(*pairs))[:2], flags
  return Worklist(*(jnp.array(c, jnp.int32) for c in columns), len(pairs))
