"""Which slots the rows of a tile see, for the Hopper kernels.

A unit is 64 rows of one query head. The units of a key head are numbered with
the streams fastest: unit u holds rows from 64 * (u // G), query head g = u % G
of the group. So the streams of a position share the key tiles that are loaded.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import shards
from pallas_kernels.hopper import mosaic

ROWS = 64


class Prefix(NamedTuple):
  """How many leading slots rows see; G' is G, or 1 where heads agree.

  Attributes:
    visible: int32 [B, G', T rounded up to 64]; 0 in the rows that fill up.
    least: int32 [B, G', tiles], the smallest of each 64 rows.
    most: int32 [B, G', tiles], the largest.
  """

  visible: jax.Array
  least: jax.Array
  most: jax.Array


def prefix(visible: jax.Array, S: int) -> Prefix:
  """The Prefix of `visible` int32 [B, T] or [B, T, G]."""
  if visible.ndim == 2:
    visible = visible[..., None]
  visible = jnp.moveaxis(jnp.clip(visible, 0, S), 2, 1).astype(jnp.int32)
  visible = jnp.pad(visible, ((0, 0), (0, 0), (0, -visible.shape[2] % ROWS)))
  tiled = visible.reshape(*visible.shape[:2], -1, ROWS)
  return Prefix(visible, tiled.min(axis=-1), tiled.max(axis=-1))


def active(prefix: Prefix, S: int, slots: int, G: int):
  """Which units see something of each block of slots.

  Args:
    prefix: of `prefix`.
    S: slots.
    slots: of a block.
    G: query heads of a key head.

  Returns:
    int32 [B, blocks, units], the units that see the block, in order, then the
    others; int32 [B, blocks], how many do.
  """
  most = jnp.moveaxis(prefix.most, 1, 2)
  most = jnp.broadcast_to(most, (*most.shape[:2], G)).reshape(len(most), 1, -1)
  first = jnp.arange(pl.cdiv(S, slots))[:, None] * slots
  idle = most <= first
  order = jnp.argsort(idle, axis=-1, stable=True).astype(jnp.int32)
  return order, jnp.sum(~idle, axis=-1, dtype=jnp.int32)


def keys(q, k) -> tuple[int, int]:
  """(S, N) of keys [B, S, N, H], or of [P * B, S / P, N, H]; see `key_tile`."""
  return k.shape[0] // q.shape[0] * k.shape[1], k.shape[2]


def key_tile(array, B, b, start, size, n):
  """The reference of `size` slots from `start`, of keys or values.

  Args:
    array: [B, S, N, H], or [P * B, S / P, N, H] where slots are dealt out as
      `shards` says and no tile has slots of two chunks.
    B: sequences.
    b: sequence.
    start: first slot.
    size: slots.
    n: key head.
  """
  P = array.shape[0] // B
  if P > 1:
    device, start = shards.place(start, P * array.shape[1], P)
    b += device * B
  return array.at[b, pl.ds(start, size), n]


def span(prefix, b, g, start):
  """(least, most) slots seen by the 64 rows from `start`; scalars.

  Args:
    prefix: None for causal, or the references of a Prefix.
    b: sequence.
    g: query head in its group.
    start: first row.
  """
  if prefix is None:
    return start + 1, start + ROWS
  _, least, most = prefix
  index = (b, jnp.minimum(g, least.shape[1] - 1), start // ROWS)
  return least[index], most[index]


def counts(prefix, b, g, start):
  """The reference of the numbers of slots that 64 rows from `start` see."""
  visible = prefix[0]
  return visible.at[b, jnp.minimum(g, visible.shape[1] - 1), pl.ds(start, ROWS)]


def seen(visible, start, first, shape, rows: int = 0) -> jax.Array:
  """Whether rows from `start` see slots from `first`.

  Args:
    visible: how many slots each row sees; None for causal.
    start: first row.
    first: first slot.
    shape: of the result.
    rows: its axis of rows, 0 or 1.
  """
  slot = mosaic.iota(shape, 1 - rows) + first
  if visible is None:
    layout = mosaic.COLUMNS if rows else mosaic.ROWS
    visible = mosaic.vector_iota(ROWS, layout) + (start + 1)
  along = mosaic.along_columns if rows else mosaic.along_rows
  return slot < along(visible, shape)


def masked(visible, start, first, least, score, rows: int = 0) -> jax.Array:
  """`score`, -inf where a row does not see a slot; free where all see all.

  Args:
    visible: as of `seen`, and start, first, rows.
    start: first row.
    first: first slot.
    least: slots that every row sees.
    score: one number a row and slot.
    rows: its axis of rows, 0 or 1.
  """

  def hide(score):
    return jnp.where(
      seen(visible, start, first, score.shape, rows), score, -jnp.inf
    )

  whole = first + score.shape[1 - rows] <= least
  return lax.cond(whole, lambda score: score, hide, score)


class Block:
  """The units that a thread block passes together: one item of its share.

  Args:
    item: its number.
    T: rows.
    N: key heads.
    G: query heads of a key head.
    C: units of a block.
    prefix: None or the references of a Prefix.
    splits: parts of the slots, each an item of its own.
  """

  def __init__(self, item, T, N, G, C, prefix, splits=1):
    blocks = pl.cdiv(pl.cdiv(T, ROWS) * G, C)
    self.split, item = item % splits, item // splits
    # The longest first, so that the short ones fill the end.
    self._first = (blocks - 1 - item % blocks) * C
    self.n, self.b = item // blocks % N, item // blocks // N
    self._T, self._G, self._C, self._prefix = T, G, C, prefix

  @staticmethod
  def items(B, T, N, G, C, splits=1) -> int:
    """How many there are."""
    return B * N * pl.cdiv(pl.cdiv(T, ROWS) * G, C) * splits

  def unit(self, w):
    """First row, head in group, if there is such a unit, its span."""
    u = self._first + w
    start, g = u // self._G * ROWS, u % self._G
    inside = start < self._T
    start = jnp.where(inside, start, 0)
    least, most = span(self._prefix, self.b, g, start)
    return start, g, inside, least, jnp.where(inside, most, 0)

  def most(self):
    """Slots that some row of the block sees."""
    most = self.unit(0)[-1]
    for w in range(1, self._C):
      most = jnp.maximum(most, self.unit(w)[-1])
    return most

  def load(self, ring, r, arrays, numbers=()) -> None:
    """Puts the rows of every unit into a ring, as its use r.

    Args:
      ring: of tiles [places, units, ROWS, ...]; the last one is for what rows
        see, unless the mask is causal.
      r: the use.
      arrays: references [B, T, heads, H].
      numbers: references [B, heads, T], one number a row.
    """
    parts = []
    for w in range(self._C):
      start, g, *_ = self.unit(w)
      parts.append(
        rows_of(
          arrays, numbers, self._prefix, self.b, self.n * self._G + g, g, start
        )
      )
    ring.put(r, [list(x) for x in zip(*parts)])


def rows_of(arrays, numbers, prefix, b, head, g, start):
  """The references of what belongs to the 64 rows of a unit.

  Args:
    arrays: references [B, T, heads, H].
    numbers: references [B, heads, T].
    prefix: None, or a Prefix: then what the rows see is the last.
    b: sequence.
    head: query head.
    g: the same, in its group.
    start: first row.
  """
  rows = pl.ds(start, ROWS)
  found = [x.at[b, rows, head] for x in arrays]
  found += [x.at[b, head, rows] for x in numbers]
  if prefix:
    found.append(counts(prefix, b, g, start))
  return found
