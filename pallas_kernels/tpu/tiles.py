"""Which tiles of the score matrix have something visible.

A row tile is some rows of one sequence, a key tile is some consecutive slots of
it. A pair of both is a tile of the score matrix, in which all scores are
visible, or some, or none. The smallest and the largest `visible` of the rows
and rank of the slots decide which.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Bits of Worklist.flags.
FIRST, LAST = 1, 2  # The pair starts, ends the work on its stationary tile.
OPENS, CLOSES = 4, 8  # The pair starts, ends the work on its sequence.
SOME, ALL = 16, 32  # Some or all scores are visible; without both bits, none.
_FLAGS = 64


class Bounds(NamedTuple):
  """Smallest and largest value of each tile, int32 [B or 1, tiles]."""

  low: jax.Array
  high: jax.Array


def row_bounds(visible: jax.Array) -> Bounds:
  """Return the Bounds of `visible`, int32 [B or 1, row tiles, rows]."""
  return Bounds(visible.min(axis=-1), visible.max(axis=-1))


def key_bounds(key_rank: jax.Array | None, S: int, size: int) -> Bounds:
  """Return the Bounds of the ranks of the slots.

  Args:
    key_rank: int32 [B, S]; None if the rank of a slot is its index.
    S: slots, a multiple of `size`.
    size: slots of a key tile.
  """
  if key_rank is None:
    low = jnp.arange(0, S, size, jnp.int32)[None]
    return Bounds(low, low + (size - 1))
  tiles = key_rank.reshape(key_rank.shape[0], S // size, size)
  return Bounds(tiles.min(axis=-1), tiles.max(axis=-1))


class Worklist(NamedTuple):
  """Pairs of tiles, in the order in which a sequential grid visits them.

  One tile of a pair stays in place (is stationary) while the other one moves.
  All pairs of a stationary tile follow each other. Every stationary tile has at
  least one pair, because its output must be written even if nothing is visible.

  Attributes:
    sequence: int32 [n], the pair's sequence; 0 if all sequences share the list.
    row: int32 [n], the pair's row tile.
    key: int32 [n], the pair's key tile.
    flags: int32 [n], the bits above.
    visits: number of pairs to visit; the others of the n are padding.
  """

  sequence: jax.Array
  row: jax.Array
  key: jax.Array
  flags: jax.Array
  visits: int | jax.Array


def worklist(rows: Bounds, keys: Bounds, *, key_major: bool) -> Worklist:
  """Return the pairs in which something is visible.

  Args:
    rows: bounds of `visible`.
    keys: bounds of the ranks.
    key_major: whether the key tile is stationary; otherwise it is the row tile.
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
  # One sort of packed numbers needs few operations. That matters because this
  # runs in every call, and each operation costs microseconds on a TPU.
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
  """Return the work list of the causal mask, as a constant.

  Position i sees min(i + 1, S) slots.

  Args:
    positions: positions of the rows; the first one begins a row tile.
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
    visible_keys = {key for _, key, _ in pairs}
    hidden_keys = set(range(-(-S // slots))) - visible_keys
    pairs += [(0, key, 0) for key in hidden_keys]
    pairs.sort(key=lambda pair: (pair[1], pair[0]))
  stationary = [None, *(pair[key_major] for pair in pairs), None]
  flags = [pair[2] for pair in pairs]
  for i, (before, current, after) in enumerate(
    zip(stationary, stationary[1:], stationary[2:])
  ):
    flags[i] += FIRST * (before != current) + LAST * (after != current)
  flags[0] += OPENS
  flags[-1] += CLOSES
  columns = (
    [0] * len(pairs),
    [pair[0] for pair in pairs],
    [pair[1] for pair in pairs],
    flags,
  )
  sequence, row_column, key_column, flag_column = (
    jnp.array(column, jnp.int32) for column in columns
  )
  return Worklist(sequence, row_column, key_column, flag_column, len(pairs))
