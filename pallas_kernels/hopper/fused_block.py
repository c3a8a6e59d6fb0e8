"""A thread block of the fused backward kernel; `fused` says what it does."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic, pipeline
from pallas_kernels.hopper import softmax as hopper_softmax
from pallas_kernels.hopper import streams as hopper_streams

ROWS = hopper_masks.ROWS


class Scratch(NamedTuple):
  """Shared memory and barriers, beside the rings.

  Each of C warpgroups (the consumers) holds 64 slots. In step i all of them
  compute the d_scores of one unit, and consumer i % C computes dq from them.

  Attributes:
    weights: [C, 64, 64], the weights of each consumer.
    d_scores: [C, C, 64, 64]; consumer w writes element [c, w], and consumer c
      computes dq from all elements [c].
    dq: [C, 64, H], dq on its way to global memory.
    partial_sums: float32 [2, C, 64], the sum of weight * d_weight over the
      slots of each consumer, for two steps in turn.
    d_scores_full: barriers [C] at which d_scores have been written.
    d_scores_free: barriers [C] at which d_scores have been read.
    summed: barrier at which partial_sums have been written.
  """

  weights: mosaic.Ref
  d_scores: mosaic.Ref
  dq: mosaic.Ref
  partial_sums: mosaic.Ref
  d_scores_full: mosaic.Ref
  d_scores_free: mosaic.Ref
  summed: mosaic.Ref


@dataclasses.dataclass(frozen=True, eq=False)
class ThreadBlock:
  """The code of a thread block, and all that it refers to.

  Attributes:
    by_head: references of q and d_out in global memory.
    by_row: references of lse and d_lse.
    keys_and_values: references of k and v.
    visible: references, or None for causal.
    dq, dk, dv: references of the gradients.
    rows: ring of what belongs to the rows of a unit.
    keys: ring of the keys and values of a key head, used once a round.
    scratch: other shared memory.
    scale: factor of the scores.
    share: the items of the thread block: pairs of sequence and key head.
    warpgroup: index of the warpgroup that runs the code.
  """

  by_head: tuple[hopper_streams.Streams, hopper_streams.Streams]
  by_row: tuple[mosaic.Ref, mosaic.Ref]
  keys_and_values: tuple[mosaic.Ref, mosaic.Ref]
  visible: hopper_masks.Visible | None
  dq: hopper_streams.Streams
  dk: mosaic.Ref
  dv: mosaic.Ref
  rows: pipeline.Ring
  keys: pipeline.Ring
  scratch: Scratch
  scale: float
  share: pipeline.Share
  warpgroup: jax.Array

  @property
  def consumers(self) -> int:
    return self.keys.tiles[0].shape[1]

  @property
  def G(self) -> int:
    """Query heads of a key head."""
    return hopper_streams.shape(self.dq)[2] // self.dk.shape[2]

  @property
  def units(self) -> int:
    """Units of a key head."""
    return pl.cdiv(self.dq[0].shape[1], ROWS) * self.G

  def item(self, r: mosaic.Index) -> tuple[jax.Array, jax.Array]:
    """Return sequence and key head of a round."""
    return divmod(self.share.item(r), self.dk.shape[2])

  def unit(self, i: mosaic.Index) -> tuple[mosaic.Index, mosaic.Index]:
    """Return first row and query head in its group of the i-th unit."""
    return i // self.G * ROWS, i % self.G

  def work(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Compute all gradients of one key head."""
    b, n = self.item(r)
    k_tiles, v_tiles = self.keys.wait(r)
    H, dtype = self.dk.shape[3], self.dk.dtype
    zero = mosaic.full((ROWS, H), 0, mosaic.TILE_LAYOUT)
    step = functools.partial(
      self.step, b=b, n=n, uses=uses, k_tiles=k_tiles, v_tiles=v_tiles
    )
    dk_sum, dv_sum = lax.fori_loop(0, self.units, step, (zero, zero))
    # When all d_scores are free again, no consumer reads the keys any more.
    pipeline.wait_until_released(
      self.scratch.d_scores_free, self.units, self.consumers
    )
    slots = pl.ds(self.warpgroup * ROWS, ROWS)
    for tiles, gradient, target in (
      (k_tiles, dk_sum * self.scale, self.dk),
      (v_tiles, dv_sum, self.dv),
    ):
      tile = tiles.at[self.warpgroup]
      tile[...] = gradient.astype(dtype)
      plgpu.commit_smem()
      mosaic.copy_out(tile, target.at[b, slots, n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    self.keys.release(r)
    return uses + self.units

  def step(
    self,
    i: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    *,
    b: jax.Array,
    n: jax.Array,
    uses: jax.Array,
    k_tiles: mosaic.Ref,
    v_tiles: mosaic.Ref,
  ) -> tuple[jax.Array, jax.Array]:
    """Add what the i-th unit contributes to the sums of dk and dv.

    One of the consumers also computes and stores dq of the unit.
    """
    start, g = self.unit(i)
    rows = self.rows.wait(uses + i)
    q_tile, d_out_tile = rows[:2]
    warpgroup, scratch = self.warpgroup, self.scratch
    d_score, sees_slots = self.differentiate(
      i,
      rows,
      k_tiles.at[warpgroup],
      v_tiles.at[warpgroup],
      (b, g, start),
    )
    turn = lax.rem(i, self.consumers)
    pl.when(i >= self.consumers)(
      lambda: plgpu.barrier_wait(scratch.d_scores_free.at[turn])
    )
    d_score_tile = scratch.d_scores.at[turn, warpgroup]
    d_score_tile[...] = d_score.astype(self.dk.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.d_scores_full.at[turn])

    def add(dk_sum, dv_sum):
      weight_tile = mosaic.transposed(scratch.weights.at[warpgroup])
      mosaic.wgmma(dv_sum, weight_tile, d_out_tile)
      mosaic.wgmma(dk_sum, mosaic.transposed(d_score_tile), q_tile)

    sums = lax.cond(
      sees_slots,
      lambda sums: tuple(mosaic.accumulate(sums, add)),
      lambda sums: sums,
      sums,
    )
    self.rows.release(uses + i)
    pl.when(turn == warpgroup)(
      lambda: self.store_dq(
        k_tiles,
        hopper_streams.tile(self.dq, b, pl.ds(start, ROWS), n, g, self.G),
      )
    )
    return sums

  def differentiate(
    self,
    i: jax.Array,
    rows: list[mosaic.Ref],
    k_tile: mosaic.Ref,
    v_tile: mosaic.Ref,
    where: tuple[mosaic.Index, mosaic.Index, mosaic.Index],
  ) -> tuple[jax.Array, jax.Array]:
    """Compute weights and d_scores of a unit for the consumer's slots.

    The weights are written to shared memory.

    Args:
      i: step.
      rows: references of the unit's rows: q, d_out, lse, d_lse and, unless the
        mask is causal, `visible`.
      k_tile: reference of the consumer's keys.
      v_tile: reference of the consumer's values.
      where: sequence, query head in its group, and first row of the unit.

    Returns:
      d_score float32 [64 rows, 64 slots]; whether the unit sees any slot.
    """
    q_tile, d_out_tile, lse_tile, d_lse_tile = rows[:4]
    warpgroup, scratch = self.warpgroup, self.scratch
    visible = None
    if self.visible:
      visible = mosaic.load(rows[4], mosaic.ROW_LAYOUT)
    least, most = hopper_masks.visible_range(self.visible, *where)
    sees_slots = warpgroup * ROWS < most
    mask = functools.partial(
      hopper_masks.mask_scores, visible, where[2], warpgroup * ROWS, least
    )
    zero = mosaic.full((ROWS, ROWS), 0, mosaic.TILE_LAYOUT)
    zeros = (zero, zero)
    weight, d_weight = lax.cond(
      sees_slots,
      lambda: _weights(
        q_tile, d_out_tile, k_tile, v_tile, lse_tile, mask, self.scale
      ),
      lambda: zeros,
    )
    partial_sums = scratch.partial_sums.at[lax.rem(i, 2)]
    partial_sums.at[warpgroup][...] = (weight * d_weight).sum(axis=1)
    plgpu.barrier_arrive(scratch.summed)
    scratch.weights.at[warpgroup][...] = weight.astype(self.dk.dtype)
    delta = -mosaic.load(d_lse_tile, mosaic.ROW_LAYOUT)
    plgpu.barrier_wait(scratch.summed)
    for other in range(self.consumers):
      delta += mosaic.load(partial_sums.at[other], mosaic.ROW_LAYOUT)
    d_score = weight * (d_weight - mosaic.along_rows(delta, weight.shape))
    return d_score, sees_slots

  def store_dq(self, k_tiles: mosaic.Ref, target: hopper_streams.Tile) -> None:
    """Compute dq of a unit from the d_scores of all consumers, and write it."""
    warpgroup, scratch = self.warpgroup, self.scratch
    plgpu.barrier_wait(scratch.d_scores_full.at[warpgroup])

    def multiply(dq_sum):
      for other in range(self.consumers):
        d_score_tile = scratch.d_scores.at[warpgroup, other]
        mosaic.wgmma(dq_sum, d_score_tile, k_tiles.at[other])
      return mosaic.read_accumulator(dq_sum)

    shape = (ROWS, self.dk.shape[3])
    dq = mosaic.with_accumulators(multiply, shape) * self.scale
    plgpu.barrier_arrive(scratch.d_scores_free.at[warpgroup])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile = scratch.dq.at[warpgroup]
    tile[...] = dq.astype(self.dk.dtype)
    plgpu.commit_smem()
    hopper_streams.store(tile, target)

  def fetch(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Load keys, values and all rows of one key head."""
    b, n = self.item(r)
    # JAX refuses static slices that reach past the end, where TMA only clips.
    # Adding r * 0 makes them dynamic.
    slots = [pl.ds(w * ROWS + r * 0, ROWS) for w in range(self.consumers)]
    self.keys.load(
      r, [[x.at[b, at, n] for at in slots] for x in self.keys_and_values]
    )

    def load_rows(i, _):
      start, g = self.unit(i)
      sources = hopper_masks.row_tiles(
        self.by_head, self.by_row, self.visible, (b, n, g, start), self.G
      )
      self.rows.load(uses + i, sources)

    lax.fori_loop(0, self.units, load_rows, None)
    return uses + self.units


def _weights(
  q_tile: mosaic.Ref,
  d_out_tile: mosaic.Ref,
  k_tile: mosaic.Ref,
  v_tile: mosaic.Ref,
  lse_tile: mosaic.Ref,
  mask: Callable[[jax.Array], jax.Array],
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Return the weights of a unit for 64 slots, and their gradients d_weight."""

  def compute(score, d_weight):
    mosaic.wgmma(score, q_tile, mosaic.transposed(k_tile))
    mosaic.wgmma(d_weight, d_out_tile, mosaic.transposed(v_tile))
    lse = mosaic.load(lse_tile, mosaic.ROW_LAYOUT)
    exponent = hopper_softmax.exponents(
      mosaic.read_accumulator(score, pending=1), lse, scale
    )
    return jnp.exp2(mask(exponent)), mosaic.read_accumulator(d_weight)

  return mosaic.with_accumulators(compute, (ROWS, ROWS), (ROWS, ROWS))
