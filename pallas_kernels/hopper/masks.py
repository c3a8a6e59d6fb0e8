"""Which slots the rows of a tile see, for the Hopper kernels.

A unit is 64 rows of one query head. Within a key head, units are numbered with
the query heads fastest: unit u holds the rows from 64 * (u // G) of query head
g = u % G of the group. So the streams of one position are neighbours, and they
share the key tiles that are loaded.

Dims: B sequences, T rows, S slots, N key heads, G query heads of a key head,
Nq = N * G query heads, H head size, C units of a thread block, P devices. In
the kernels b, n and g are the indices of sequence, key head and query head in
its group.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import shards
from pallas_kernels.hopper import mosaic, pipeline
from pallas_kernels.hopper import streams as hopper_streams

ROWS = 64  # Rows of a unit.


class Visible(NamedTuple):
  """How many leading slots each row sees, with bounds for each unit.

  G' is G, or 1 if the query heads of a group see the same slots. In a kernel
  the fields are references to arrays of these shapes.

  Attributes:
    of_row: int32 [B, G', T rounded up to 64]; 0 in the rows that are padding.
    least: int32 [B, G', units], the smallest value in each unit.
    most: int32 [B, G', units], the largest value in each unit.
  """

  of_row: jax.Array
  least: jax.Array
  most: jax.Array


def summarize(visible: jax.Array, S: int) -> Visible:
  """Return the Visible of `visible`, int32 [B, T] or [B, T, G]."""
  if visible.ndim == 2:
    visible = visible[..., None]
  visible = jnp.moveaxis(jnp.clip(visible, 0, S), 2, 1).astype(jnp.int32)
  visible = jnp.pad(visible, ((0, 0), (0, 0), (0, -visible.shape[2] % ROWS)))
  by_unit = visible.reshape(*visible.shape[:2], -1, ROWS)
  return Visible(visible, by_unit.min(axis=-1), by_unit.max(axis=-1))


def active(
  visible: Visible, S: int, slots: int, G: int
) -> tuple[jax.Array, jax.Array]:
  """Return which units see a slot of each block of slots.

  Args:
    visible: what the rows see.
    S: slots.
    slots: slots of a block.
    G: query heads of a key head.

  Returns:
    order int32 [B, blocks, units]: first the units that see the block, in
    order, then the others; count int32 [B, blocks]: how many units see it.
  """
  most = jnp.moveaxis(visible.most, 1, 2)
  most = jnp.broadcast_to(most, (*most.shape[:2], G)).reshape(len(most), 1, -1)
  first = jnp.arange(pl.cdiv(S, slots))[:, None] * slots
  idle = most <= first
  order = jnp.argsort(idle, axis=-1, stable=True).astype(jnp.int32)
  return order, jnp.sum(~idle, axis=-1, dtype=jnp.int32)


def key_sizes(q: hopper_streams.Streams, k: mosaic.Ref) -> tuple[int, int]:
  """Return (S, N) of keys [B, S, N, H] or [P * B, S / P, N, H]."""
  return k.shape[0] // q[0].shape[0] * k.shape[1], k.shape[2]


def key_tile(
  array: mosaic.Ref,
  B: int,
  b: mosaic.Index,
  start: mosaic.Index,
  size: int,
  n: mosaic.Index,
) -> mosaic.Ref:
  """Return the reference of `size` slots from `start`, of keys or values.

  Args:
    array: [B, S, N, H], or [P * B, S / P, N, H] in the layout of `shards`; then
      no tile may have slots of two chunks.
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


def visible_range(
  visible: Visible | None, b: mosaic.Index, g: mosaic.Index, start: mosaic.Index
) -> tuple[mosaic.Index, mosaic.Index]:
  """Return (least, most): the smallest and largest `visible` of a unit.

  Args:
    visible: None for causal, or references.
    b: sequence.
    g: query head in its group.
    start: first row of the unit.
  """
  if visible is None:
    return start + 1, start + ROWS
  _, least, most = visible
  index = (b, jnp.minimum(g, least.shape[1] - 1), start // ROWS)
  return least[index], most[index]


def visible_tile(
  visible: Visible, b: mosaic.Index, g: mosaic.Index, start: mosaic.Index
) -> mosaic.Ref:
  """Return the reference of `visible` for the 64 rows from `start`."""
  of_row: mosaic.Ref = visible.of_row
  return of_row.at[b, jnp.minimum(g, of_row.shape[1] - 1), pl.ds(start, ROWS)]


def mask(
  visible: jax.Array | None,
  start: mosaic.Index,
  first: mosaic.Index,
  shape: tuple[int, ...],
  row_axis: int = 0,
) -> jax.Array:
  """Return whether the rows from `start` see the slots from `first`.

  Args:
    visible: int32 [64], how many slots each row sees; None for causal.
    start: first row.
    first: first slot.
    shape: shape of the result.
    row_axis: axis of the rows in the result, 0 or 1.
  """
  slot = mosaic.iota(shape, 1 - row_axis) + first
  if visible is None:
    layout = mosaic.COLUMN_LAYOUT if row_axis else mosaic.ROW_LAYOUT
    visible = mosaic.vector_iota(ROWS, layout) + (start + 1)
  broadcast = mosaic.along_columns if row_axis else mosaic.along_rows
  return slot < broadcast(visible, shape)


def mask_scores(
  visible: jax.Array | None,
  start: mosaic.Index,
  first: mosaic.Index,
  least: mosaic.Index,
  score: jax.Array,
  row_axis: int = 0,
) -> jax.Array:
  """Return `score` with -inf where a row does not see a slot.

  This costs nothing where every row sees every slot.

  Args:
    visible: as for `mask`.
    start: as for `mask`.
    first: as for `mask`.
    least: number of slots that every row sees.
    score: a score for each row and slot.
    row_axis: as for `mask`.
  """

  def hide(score):
    return jnp.where(
      mask(visible, start, first, score.shape, row_axis), score, -jnp.inf
    )

  all_visible = first + score.shape[1 - row_axis] <= least
  return lax.cond(all_visible, lambda score: score, hide, score)


class Unit(NamedTuple):
  """64 rows of one query head, as scalars of a kernel.

  Attributes:
    start: first row.
    g: query head in its group.
    exists: whether there is such a unit; the last block may be incomplete.
    least: smallest number of slots that one of its rows sees.
    most: largest number of slots that one of its rows sees; 0 if the unit does
      not exist.
  """

  start: jax.Array
  g: mosaic.Index
  exists: bool | jax.Array
  least: mosaic.Index
  most: jax.Array


class Block:
  """An item of work of a thread block: C units of one key head and sequence.

  Attributes:
    b: sequence.
    n: key head.
    split: which split of the slots these units attend to.
  """

  def __init__(
    self,
    item: mosaic.Index,
    T: int,
    N: int,
    G: int,
    C: int,
    visible: Visible | None,
    splits: int = 1,
  ):
    """Find the units of an item.

    Args:
      item: number of the item, below `Block.items`.
      T: rows.
      N: key heads.
      G: query heads of a key head.
      C: units of a block.
      visible: None for causal, or references.
      splits: splits of the slots; each is an item of its own.
    """
    blocks = pl.cdiv(pl.cdiv(T, ROWS) * G, C)
    self.split, item = item % splits, item // splits
    # The longest items come first, so that short ones fill the end.
    self._first = (blocks - 1 - item % blocks) * C
    self.n, self.b = item // blocks % N, item // blocks // N
    self._T, self._G, self._C, self._visible = T, G, C, visible

  @staticmethod
  def items(B: int, T: int, N: int, G: int, C: int, splits: int = 1) -> int:
    """Return the number of items of a kernel."""
    return B * N * pl.cdiv(pl.cdiv(T, ROWS) * G, C) * splits

  def unit(self, warpgroup: mosaic.Index) -> Unit:
    """Return the unit that a warpgroup computes."""
    u = self._first + warpgroup
    start, g = u // self._G * ROWS, u % self._G
    exists = start < self._T
    start = jnp.where(exists, start, 0)
    least, most = visible_range(self._visible, self.b, g, start)
    return Unit(start, g, exists, least, jnp.where(exists, most, 0))

  def most(self) -> jax.Array:
    """Return the largest number of slots that a row of the block sees."""
    most = self.unit(0).most
    for warpgroup in range(1, self._C):
      most = jnp.maximum(most, self.unit(warpgroup).most)
    return most

  def load(
    self,
    ring: pipeline.Ring,
    use: mosaic.Index,
    by_head: Sequence[hopper_streams.Streams],
    by_row: Sequence[mosaic.Ref] = (),
  ) -> None:
    """Load the rows of every unit into a ring.

    Args:
      ring: tiles [stages, C, 64, ...] for `by_head`, `by_row` and, unless the
        mask is causal, `visible`.
      use: number of the ring's use.
      by_head: references [B, T, Nq, H], see `streams`.
      by_row: references [B, Nq, T], one number for each row.
    """
    tiles_of_units = []
    for warpgroup in range(self._C):
      start, g, *_ = self.unit(warpgroup)
      tiles_of_units.append(
        row_tiles(
          by_head,
          by_row,
          self._visible,
          (self.b, self.n, g, start),
          self._G,
        )
      )
    ring.load(use, [list(tiles) for tiles in zip(*tiles_of_units)])


def row_tiles(
  by_head: Sequence[hopper_streams.Streams],
  by_row: Sequence[mosaic.Ref],
  visible: Visible | None,
  where: tuple[mosaic.Index, mosaic.Index, mosaic.Index, mosaic.Index],
  G: int,
) -> list[Any]:
  """Return the references of everything that belongs to the rows of a unit.

  Args:
    by_head: references [B, T, Nq, H], see `streams`.
    by_row: references [B, Nq, T].
    visible: None for causal; references add `visible` to the end of the list.
    where: sequence, key head, query head in its group, and first row.
    G: query heads of a key head.
  """
  b, n, g, start = where
  rows = pl.ds(start, ROWS)
  tiles: list[Any] = [hopper_streams.tile(x, b, rows, n, g, G) for x in by_head]
  tiles += [x.at[b, n * G + g, rows] for x in by_row]
  if visible:
    tiles.append(visible_tile(visible, b, g, start))
  return tiles
