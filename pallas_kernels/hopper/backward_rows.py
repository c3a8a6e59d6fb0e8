"""Backward kernel for Hopper that computes dq, for any number of slots.

It also computes delta, the sum of out * d_out over H minus the gradient of lse
in nats. This is D of arXiv 2307.08691, algorithm 2, if lse has no gradient.

Each warpgroup that computes (a consumer) holds a unit, and the thread block
passes over the key tiles that its units see. `masks` says what a unit is.
"""

import dataclasses
import functools
from collections.abc import Sequence
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
from pallas_kernels.hopper import streams as hopper_streams

ROWS = hopper_masks.ROWS


def by_rows(
  inputs: hopper_inputs.Inputs,
  out: hopper_streams.Streams,
  out_error: hopper_streams.Streams,
  d_lse: jax.Array,
  visible: hopper_masks.Visible | None,
  scale: float,
  config: tuning.Hopper,
) -> tuple[hopper_streams.Streams, jax.Array]:
  """Return dq and delta, like q and lse; arguments as for backward.backward."""
  q, lse, dtype = inputs.q, inputs.lse, inputs.k.dtype
  B, T, _, N, G, H = inputs.sizes
  C, stages = config.query_consumers, config.query_stages
  key_tiles = mosaic.tiles((stages, config.query_keys, H), dtype)
  shape = (config.query_places, C, ROWS)
  row_tiles = mosaic.tiles((*shape, H), dtype)
  row_numbers = plgpu.SMEM(shape, jnp.float32)
  ring_of_rows = [row_tiles, row_tiles, row_numbers, row_numbers]
  if visible is not None:
    ring_of_rows.append(plgpu.SMEM(shape, jnp.int32))
  out_tiles = mosaic.tiles((config.query_places, C, ROWS, H), dtype)
  share = pipeline.share(hopper_masks.Block.items(B, T, N, G, C), config.blocks)
  return mosaic.kernel(
    functools.partial(_by_rows, scale=scale, config=config, share=share),
    out_type=(
      hopper_streams.like(q),
      jax.ShapeDtypeStruct(lse.shape, lse.dtype),
    ),
    grid=(share.blocks,),
    grid_names=("block",),
    kernel_name="attention_backward_rows",
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      pipeline.ring(*ring_of_rows, readers=C, copies=C),
      pipeline.ring(out_tiles, readers=C, copies=C),
      pipeline.ring(key_tiles, key_tiles, readers=C),
      mosaic.tiles((C, ROWS, H), dtype),
      plgpu.SMEM((C, ROWS), jnp.float32),
    ],
  )(*inputs, out, out_error, d_lse, *(visible or ()))


def _by_rows(
  q, k, v, d_out, lse, out, out_error, d_lse, *refs, scale, config, share
):
  """The kernel of dq and delta."""
  *visible, dq, delta, rows, outs, keys, staging, delta_staging = refs
  thread_block = _RowBlock(
    inputs=hopper_inputs.Inputs(q, k, v, d_out, lse),
    out=out,
    out_error=out_error,
    d_lse=d_lse,
    visible=hopper_masks.Visible(*visible) if visible else None,
    dq=dq,
    delta=delta,
    rows=rows,
    outs=outs,
    keys=keys,
    staging=staging,
    delta_staging=delta_staging,
    scale=scale,
    config=config,
    share=share,
    warpgroup=lax.axis_index("warpgroup"),
  )
  pipeline.run(
    config.query_consumers,
    share.rounds(),
    thread_block.work,
    thread_block.fetch,
    [keys],
    [(rows, 1), (outs, 2)],
  )


class _Rows(NamedTuple):
  """What belongs to the rows of a unit.

  Attributes:
    q_tile: reference [64, H].
    d_out_tile: reference [64, H].
    lse: float32 [64] in registers, base 2.
    delta: float32 [64] in registers.
    visible: int32 [64] in registers; None for causal.
    start: first row.
  """

  q_tile: mosaic.Ref
  d_out_tile: mosaic.Ref
  lse: jax.Array
  delta: jax.Array
  visible: jax.Array | None
  start: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _RowBlock:
  """The code of a thread block of the kernel of dq.

  Attributes:
    inputs, out, out_error, d_lse, visible, dq, delta: references in global
      memory.
    rows: ring of what belongs to the rows of the units, used once a round.
    outs: ring of out of the units and then out_error, used twice a round.
    keys: ring of key and value tiles.
    staging: tiles of dq on their way to global memory.
    delta_staging: delta of the units on its way to global memory.
    scale: factor of the scores.
    config: tile sizes.
    share: the items of the thread block.
    warpgroup: index of the warpgroup that runs the code.
  """

  inputs: hopper_inputs.Inputs
  out: hopper_streams.Streams
  out_error: hopper_streams.Streams
  d_lse: mosaic.Ref
  visible: hopper_masks.Visible | None
  dq: hopper_streams.Streams
  delta: mosaic.Ref
  rows: pipeline.Ring
  outs: pipeline.Ring
  keys: pipeline.Ring
  staging: mosaic.Ref
  delta_staging: mosaic.Ref
  scale: float
  config: tuning.Hopper
  share: pipeline.Share
  warpgroup: jax.Array

  def plan(self, r: mosaic.Index) -> tuple[hopper_masks.Block, jax.Array]:
    """Return the Block of a round, and how many key tiles it passes over."""
    _, T, _, N, G, _ = self.inputs.sizes
    C = self.config.query_consumers
    block = hopper_masks.Block(self.share.item(r), T, N, G, C, self.visible)
    return block, pl.cdiv(block.most(), self.config.query_keys)

  def work(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Compute dq and delta of the consumer's unit of round r."""
    block, steps = self.plan(r)
    unit = block.unit(self.warpgroup)
    size = self.config.query_keys
    q_tile, d_out_tile, *numbers = (
      x.at[self.warpgroup] for x in self.rows.wait(r)
    )
    lse, d_lse, *visible = (mosaic.load(x, mosaic.ROW_LAYOUT) for x in numbers)
    rows = _Rows(
      q_tile,
      d_out_tile,
      lse,
      self.sum_out(r, d_out_tile) - d_lse,
      visible[0] if visible else None,
      unit.start,
    )
    H = self.inputs.sizes.H
    sums = (mosaic.full((ROWS, H), 0, mosaic.TILE_LAYOUT),)
    # The first key tiles are visible to all rows and need no mask.
    unmasked = jnp.where(unit.exists, unit.least // size, 0)
    end = pl.cdiv(unit.most, size)
    for low, high, is_masked in ((0, unmasked, False), (unmasked, end, True)):
      step = functools.partial(
        self.step, rows=rows, uses=uses, is_masked=is_masked
      )
      sums = lax.fori_loop(low, high, step, sums)
    lax.fori_loop(end, steps, functools.partial(self.skip, uses=uses), None)
    # Numbers of rows were read by ordinary loads; TMA writes them next.
    plgpu.commit_smem()
    self.rows.release(r)
    pl.when(unit.exists)(lambda: self.store(sums[0], rows.delta, block, unit))
    return uses + steps

  def sum_out(self, r: mosaic.Index, d_out_tile: mosaic.Ref) -> jax.Array:
    """Return the sum of out * d_out over H for the consumer's unit."""

    def load(tile):
      return mosaic.load(tile, mosaic.TILE_LAYOUT).astype(jnp.float32)

    out = mosaic.full(d_out_tile.shape, 0, mosaic.TILE_LAYOUT)
    for use in (2 * r, 2 * r + 1):
      (tile,) = self.outs.wait(use)
      out += load(tile.at[self.warpgroup])
      # An ordinary load reads this tile; TMA writes it next.
      plgpu.commit_smem()
      self.outs.release(use)
    return (out * load(d_out_tile)).sum(axis=1)

  def step(
    self,
    i: mosaic.Index,
    sums: Sequence[jax.Array],
    *,
    rows: _Rows,
    uses: jax.Array,
    is_masked: bool,
  ) -> Sequence[jax.Array]:
    """Add what the i-th key tile contributes to dq."""
    q_tile, d_out_tile, lse, delta, visible, start = rows
    k_tile, v_tile = self.keys.wait(uses + i)
    shape = (ROWS, self.config.query_keys)

    def add(dq_sum, score, d_weight):
      mosaic.wgmma(score, q_tile, mosaic.transposed(k_tile))
      mosaic.wgmma(d_weight, d_out_tile, mosaic.transposed(v_tile))
      exponent = hopper_softmax.exponents(
        mosaic.read_accumulator(score, pending=1), lse, self.scale
      )
      if is_masked:
        mask = hopper_masks.mask(visible, start, i * shape[1], shape)
        exponent = jnp.where(mask, exponent, -jnp.inf)
      weight = jnp.exp2(exponent)
      d_score = mosaic.read_accumulator(d_weight)
      d_score = d_score - mosaic.along_rows(delta, shape)
      d_score = (weight * d_score).astype(self.inputs.k.dtype)
      mosaic.wgmma(dq_sum, d_score, k_tile)

    sums = mosaic.accumulate(
      sums,
      lambda dq_sum: mosaic.with_accumulators(
        functools.partial(add, dq_sum), shape, shape
      ),
    )
    self.keys.release(uses + i)
    return sums

  def skip(self, i: mosaic.Index, _: None, *, uses: jax.Array) -> None:
    """Pass over a key tile that only the other consumers see."""
    self.keys.wait(uses + i)
    self.keys.release(uses + i)

  def store(
    self,
    dq_sum: jax.Array,
    delta: jax.Array,
    block: hopper_masks.Block,
    unit: hopper_masks.Unit,
  ) -> None:
    """Write dq and delta of a unit to global memory."""
    tile = self.staging.at[self.warpgroup]
    delta_tile = self.delta_staging.at[self.warpgroup]
    # The copies of the round before must have left these tiles.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile[...] = (dq_sum * self.scale).astype(self.inputs.k.dtype)
    delta_tile[...] = delta
    plgpu.commit_smem()
    rows, G = pl.ds(unit.start, ROWS), self.inputs.sizes.G
    mosaic.copy_out(
      delta_tile, self.delta.at[block.b, block.n * G + unit.g, rows]
    )
    hopper_streams.store(
      tile,
      hopper_streams.tile(self.dq, block.b, rows, block.n, unit.g, G),
    )

  def fetch(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Load the rows of round r, and the keys and values that they see."""
    q, k, v, d_out, lse = self.inputs
    block, steps = self.plan(r)
    block.load(self.rows, r, (q, d_out), (lse, self.d_lse))
    block.load(self.outs, 2 * r, (self.out,))
    block.load(self.outs, 2 * r + 1, (self.out_error,))
    size = self.config.query_keys

    def load_keys(i, _):
      tile = q[0].shape[0], block.b, i * size, size, block.n
      self.keys.load(
        uses + i, [hopper_masks.key_tile(x, *tile) for x in (k, v)]
      )

    lax.fori_loop(0, steps, load_keys, None)
    return uses + steps
