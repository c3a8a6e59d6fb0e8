"""Backward kernel for Hopper that computes dk and dv, for any number of slots.

Each warpgroup that computes (a consumer) holds a tile of 64 slots. The thread
block passes over the units that see its slots, and adds up dk and dv of all
query heads of the group. `masks` says what a unit is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.hopper import inputs as hopper_inputs
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic, pipeline
from pallas_kernels.hopper import softmax as hopper_softmax

ROWS = hopper_masks.ROWS


def by_keys(
  inputs: hopper_inputs.Inputs,
  delta: jax.Array,
  visible: hopper_masks.Visible | None,
  scale: float,
  config: tuning.Hopper,
) -> tuple[jax.Array, jax.Array]:
  """Return (dk, dv).

  Args:
    inputs: arrays of the call.
    delta: like lse, from backward_rows.by_rows.
    visible: as for backward.backward.
    scale: factor of the scores.
    config: tile sizes.
  """
  k, dtype = inputs.k, inputs.k.dtype
  sizes = inputs.sizes
  C, stages = config.key_consumers, config.key_stages
  row_tiles = mosaic.tiles((stages, ROWS, sizes.H), dtype)
  row_numbers = plgpu.SMEM((stages, ROWS), jnp.float32)
  key_tiles = mosaic.tiles((config.key_places, C, ROWS, sizes.H), dtype)
  ring_of_rows = [row_tiles, row_tiles, row_numbers, row_numbers]
  masks: tuple[jax.Array, ...] = ()
  if visible is not None:
    ring_of_rows.append(plgpu.SMEM((stages, ROWS), jnp.int32))
    order = hopper_masks.active(visible, sizes.S, C * ROWS, sizes.G)
    masks = (*visible, *order)
  share = pipeline.share(
    sizes.B * sizes.N * pl.cdiv(sizes.S, C * ROWS), config.blocks
  )
  return mosaic.kernel(
    functools.partial(_by_keys, scale=scale, share=share),
    out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
    grid=(share.blocks,),
    grid_names=("block",),
    kernel_name="attention_backward_keys",
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      pipeline.ring(*ring_of_rows, readers=C),
      pipeline.ring(key_tiles, key_tiles, readers=C, copies=C),
      mosaic.tiles((2, C, ROWS, sizes.H), dtype),
    ],
  )(*inputs, delta, *masks)


def _by_keys(q, k, v, d_out, lse, delta, *refs, scale, share):
  """The kernel of dk and dv."""
  *masks, dk, dv, rows, keys, staging = refs
  thread_block = _KeyBlock(
    inputs=hopper_inputs.Inputs(q, k, v, d_out, lse),
    delta=delta,
    visible=hopper_masks.Visible(*masks[:3]) if masks else None,
    order=tuple(masks[3:]),
    dk=dk,
    dv=dv,
    rows=rows,
    keys=keys,
    staging=staging,
    scale=scale,
    share=share,
    warpgroup=lax.axis_index("warpgroup"),
  )
  pipeline.run(
    thread_block.consumers,
    share.rounds(),
    thread_block.work,
    thread_block.fetch,
    [rows],
    [(keys, 1)],
  )


class _KeyRound(NamedTuple):
  """What a thread block does in one round of the kernel of dk and dv.

  Attributes:
    b: sequence.
    n: key head.
    first: first slot of the block.
    units: how many units see the block.
    unit: (i) -> first row of the i-th of these units, its query head in the
      group.
  """

  b: jax.Array
  n: jax.Array
  first: jax.Array
  units: jax.Array
  unit: Callable[[mosaic.Index], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class _KeyBlock:
  """The code of a thread block of the kernel of dk and dv.

  Attributes:
    inputs, delta, visible, dk, dv: references in global memory.
    order: references of masks.active, or () for causal.
    rows: ring of what belongs to the rows of a unit.
    keys: ring of the keys and values of the block, used once a round.
    staging: tiles of dk and dv on their way to global memory.
    scale: factor of the scores.
    share: the items of the thread block.
    warpgroup: index of the warpgroup that runs the code.
  """

  inputs: hopper_inputs.Inputs
  delta: mosaic.Ref
  visible: hopper_masks.Visible | None
  order: tuple[mosaic.Ref, ...]
  dk: mosaic.Ref
  dv: mosaic.Ref
  rows: pipeline.Ring
  keys: pipeline.Ring
  staging: mosaic.Ref
  scale: float
  share: pipeline.Share
  warpgroup: jax.Array

  @property
  def consumers(self) -> int:
    return self.keys.tiles[0].shape[1]

  def plan(self, r: mosaic.Index) -> _KeyRound:
    """Return the _KeyRound of a round."""
    sizes = self.inputs.sizes
    C, G = self.consumers, sizes.G
    item = self.share.item(r)
    blocks = pl.cdiv(sizes.S, C * ROWS)
    units = pl.cdiv(sizes.T, ROWS) * G
    # The first slots come first: most rows see them, so they take longest.
    block = item % blocks
    n, b = item // blocks % sizes.N, item // blocks // sizes.N
    skipped = jnp.minimum(block * C * G, units)
    visible_units = self.order[1][b, block] if self.order else units - skipped

    def unit(i):
      u = self.order[0][b, block, i] if self.order else skipped + i
      return u // G * ROWS, u % G

    return _KeyRound(b, n, block * C * ROWS, visible_units, unit)

  def work(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Compute dk and dv of the consumer's 64 slots of round r."""
    b, n, first, units, unit = self.plan(r)
    first += self.warpgroup * ROWS
    k_tile, v_tile = (x.at[self.warpgroup] for x in self.keys.wait(r))
    zero = mosaic.full((ROWS, self.inputs.sizes.H), 0, mosaic.TILE_LAYOUT)

    def step(i, sums):
      start, g = unit(i)
      tiles = self.rows.wait(uses + i)
      add = functools.partial(
        self.add_unit, tiles, k_tile, v_tile, (b, g, start), first
      )
      sums = mosaic.accumulate(
        sums,
        lambda dk_sum, dv_sum: mosaic.with_accumulators(
          functools.partial(add, dk_sum, dv_sum), (ROWS, ROWS), (ROWS, ROWS)
        ),
      )
      # Numbers of rows were read by ordinary loads; TMA writes them next.
      plgpu.commit_smem()
      self.rows.release(uses + i)
      return sums

    dk_sum, dv_sum = lax.fori_loop(0, units, step, (zero, zero))
    self.keys.release(r)
    self.store(dk_sum, dv_sum, b, first, n)
    return uses + units

  def add_unit(
    self,
    tiles: list[mosaic.Ref],
    k_tile: mosaic.Ref,
    v_tile: mosaic.Ref,
    where: tuple[mosaic.Index, mosaic.Index, mosaic.Index],
    first: mosaic.Index,
    dk_sum: mosaic.Ref,
    dv_sum: mosaic.Ref,
    score: mosaic.Ref,
    d_weight: mosaic.Ref,
  ) -> None:
    """Add what one unit contributes to the sums of dk and dv.

    Args:
      tiles: references of the unit's rows: q, d_out, lse, delta and, unless the
        mask is causal, `visible`.
      k_tile: reference of the consumer's keys.
      v_tile: reference of the consumer's values.
      where: sequence, query head in its group, and first row of the unit.
      first: first slot of the consumer.
      dk_sum: accumulator of dk.
      dv_sum: accumulator of dv.
      score: accumulator, zero.
      d_weight: accumulator, zero.
    """
    q_tile, d_out_tile, lse_tile, delta_tile, *visible_tile = tiles
    dtype = self.inputs.k.dtype
    # Scores are [slots, rows] here: keys are the left operand.
    mosaic.wgmma(score, k_tile, mosaic.transposed(q_tile))
    mosaic.wgmma(d_weight, v_tile, mosaic.transposed(d_out_tile))
    lse = mosaic.load(lse_tile, mosaic.COLUMN_LAYOUT)
    exponent = hopper_softmax.exponents(
      mosaic.read_accumulator(score, pending=1), lse, self.scale, row_axis=1
    )
    visible = None
    if self.visible:
      visible = mosaic.load(visible_tile[0], mosaic.COLUMN_LAYOUT)
    least, _ = hopper_masks.visible_range(self.visible, *where)
    exponent = hopper_masks.mask_scores(
      visible, where[2], first, least, exponent, row_axis=1
    )
    weight = jnp.exp2(exponent)
    mosaic.wgmma(dv_sum, weight.astype(dtype), d_out_tile)
    delta = mosaic.load(delta_tile, mosaic.COLUMN_LAYOUT)
    # The product that was just started goes on during this.
    d_score = mosaic.read_accumulator(d_weight, pending=1)
    d_score = weight * (d_score - mosaic.along_columns(delta, weight.shape))
    mosaic.wgmma(dk_sum, d_score.astype(dtype), q_tile)

  def store(
    self,
    dk_sum: jax.Array,
    dv_sum: jax.Array,
    b: mosaic.Index,
    first: mosaic.Index,
    n: mosaic.Index,
  ) -> None:
    """Write dk and dv of the consumer's slots to global memory."""
    # The copies of the round before must have left these tiles.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    dk_tile = self.staging.at[0, self.warpgroup]
    dv_tile = self.staging.at[1, self.warpgroup]
    dk_tile[...] = (dk_sum * self.scale).astype(self.inputs.k.dtype)
    dv_tile[...] = dv_sum.astype(self.inputs.v.dtype)
    plgpu.commit_smem()
    B = self.inputs.sizes.B
    for tile, gradient in ((dk_tile, self.dk), (dv_tile, self.dv)):
      target = hopper_masks.key_tile(gradient, B, b, first, ROWS, n)
      mosaic.copy_out(tile, target)

  def fetch(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Load the keys and values of round r, and the rows that see them."""
    q, k, v, d_out, lse = self.inputs
    sizes = self.inputs.sizes
    b, n, first, units, unit = self.plan(r)
    tiles = [
      (sizes.B, b, first + warpgroup * ROWS, ROWS, n)
      for warpgroup in range(self.consumers)
    ]
    self.keys.load(
      r, [[hopper_masks.key_tile(x, *tile) for tile in tiles] for x in (k, v)]
    )

    def load_rows(i, _):
      start, g = unit(i)
      sources = hopper_masks.row_tiles(
        (q, d_out), (lse, self.delta), self.visible, (b, n, g, start), sizes.G
      )
      self.rows.load(uses + i, sources)

    lax.fori_loop(0, units, load_rows, None)
    return uses + units
