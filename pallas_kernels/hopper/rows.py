"""What the Hopper kernels over rows share: layouts, and a loop over tiles.

These kernels have no matrix products. They read rows from global memory into
registers, and write rows. A warp holds whole rows, so a sum over a row stays
inside the warp. The loads in flight hide the latency: each multiprocessor runs
many thread blocks of one warpgroup.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.hopper import mosaic

WARPS = 4
LANES = 32
# The least number of rows of every kernel: those of the largest tile.
LEAST_ROWS = 64
# Elements that one lane loads at once: 16 bytes of bfloat16.
_VECTOR = 8


def vector(width: int) -> int:
  """Return how many elements each lane holds when a warp has one row.

  It is 0 if the lanes of a warp cannot share a row of this width.
  """
  sizes = (size for size in (8, 4, 2) if width % (LANES * size) == 0)
  return next(sizes, 0)


def wide_rows(width: int) -> Any:
  """Return the layout in which a warp has whole rows of this width.

  Args:
    width: a multiple of 64.
  """
  size = vector(width)
  return plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, LANES * size), (size,))),
    warp_dims=(-3,),
    lane_dims=(-2,),
    vector_dim=-1,
  )


def narrow_lanes(width: int) -> int:
  """Return how many lanes share a row, or 0 if the width is not supported."""
  lanes, rest = divmod(width, _VECTOR)
  return lanes if not rest and lanes in (2, 4, 8, 16) else 0


def head_rows(width: int, heads: int) -> tuple[int, Any]:
  """Return the rows of a tile of half heads, and its layout.

  A few lanes have a half of a head, 8 elements each, and a warp has whole rows
  of `heads` heads.

  Args:
    width: half of a head: 16, 32, 64 or 128.
    heads: heads of a tile, a power of 2. They fit into a warp.
  """
  rows = LANES // (narrow_lanes(width) * heads)
  if rows == 1:
    layout = plgpu.Layout.TILED(
      plgpu.Tiling(((WARPS, heads, width), (_VECTOR,))),
      warp_dims=(-4,),
      lane_dims=(-3, -2),
      vector_dim=-1,
    )
  else:
    layout = plgpu.Layout.TILED(
      plgpu.Tiling(
        ((WARPS * rows, heads, width), (rows, heads, width), (_VECTOR,))
      ),
      warp_dims=(-7,),
      # A dimension of size 1 must not be named.
      lane_dims=(-4, -2) if heads == 1 else (-4, -3, -2),
      vector_dim=-1,
    )
  return WARPS * rows, layout


def over_tiles(
  rows: int, size: int, blocks: int, step: Callable[..., Any], carry: Any = None
) -> Any:
  """Run `step` on the tiles of this thread block; return the last carry.

  The tiles are dealt out to the blocks in turn. The last tile begins early
  enough to end with the last row. So it may repeat rows of the tile before it.

  Args:
    rows: all rows, at least `size`.
    size: rows of a tile.
    blocks: thread blocks, on the axis "block" of the grid.
    step: takes the first row of a tile, the first row that no tile before it
      has, and the carry. It returns the carry.
    carry: the first carry.
  """

  def run(tile, carry):
    fresh = tile * size
    return step(jnp.minimum(fresh, rows - size), fresh, carry)

  return in_turn(
    pl.cdiv(rows, size), lax.axis_index("block"), blocks, run, carry
  )


def in_turn(
  items: mosaic.Index,
  first: mosaic.Index,
  stride: int,
  step: Callable[..., Any],
  carry: Any = None,
) -> Any:
  """Run step(item, carry) on every stride-th item; return the last carry.

  Args:
    items: the number of items.
    first: the first item of this thread block.
    stride: how many items lie between two of them.
    step: returns the carry.
    carry: the first carry.
  """
  count = (items - first + stride - 1) // stride
  return lax.fori_loop(
    0, count, lambda i, carry: step(first + i * stride, carry), carry
  )


def only_fresh(
  values: jax.Array, start: mosaic.Index, fresh: mosaic.Index, layout: Any
) -> jax.Array:
  """Return values with zeros in rows that an earlier tile has already had.

  Args:
    values: [rows, ...] in registers.
    start: the first row of the tile.
    fresh: the first row that no tile before it has.
    layout: the layout of the values.
  """
  others = tuple(range(1, values.ndim))
  index = start + mosaic.vector_iota(values.shape[0], layout.reduce(others))
  return jnp.where(
    mosaic.along_rows(index >= fresh, values.shape, layout), values, 0.0
  )


def block_count(rows: int, size: int, occupancy: int, *arrays: Any) -> int:
  """Return the number of thread blocks of a kernel.

  Args:
    rows: all rows.
    size: rows of a tile.
    occupancy: thread blocks that a multiprocessor runs at the same time.
    *arrays: they tell the device.
  """
  return min(pl.cdiv(rows, size), occupancy * devices.of(*arrays).cores)


def column_sums(values: jax.Array, scratch: mosaic.Ref, layout: Any) -> Any:
  """Return the sums over all but the last axis, float32 [width].

  Args:
    values: float32 [..., width] in registers.
    scratch: shared memory like the values.
    layout: the layout of the values.
  """
  mosaic.store(scratch, values)
  *others, _ = values.shape
  by_row = [
    mosaic.load(
      scratch.at[row], layout.reduce(tuple(range(len(others)))), optimized=False
    )
    for row in itertools.product(*map(range, others))
  ]
  return sum(by_row[1:], by_row[0])
