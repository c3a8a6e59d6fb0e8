"""One backward kernel that computes all gradients, for few slots, on Hopper.

A thread block holds all slots of a key head, 64 in each warpgroup, and passes
over the units of its query heads once (`masks` numbers them). So every array is
read and written once. The kernel also computes the sum over the slots of weight
* d_weight in float32. The usual formula, the sum over H of out * d_out, would
have to read `out` and would suffer from its rounding.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.hopper import fused_block, mosaic, pipeline
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import streams as hopper_streams

ROWS = hopper_masks.ROWS


def backward(
  q: hopper_streams.Streams,
  k: jax.Array,
  v: jax.Array,
  visible: hopper_masks.Visible | None,
  d_out: hopper_streams.Streams,
  lse: jax.Array,
  d_lse: jax.Array,
  scale: float,
  config: tuning.Hopper,
) -> tuple[hopper_streams.Streams, jax.Array, jax.Array]:
  """Return (dq, dk, dv), like q, k and v.

  Args:
    q: [B, T, Nq, H], see `streams`; T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64 and at most config.fused.
    v: [B, S, N, H].
    visible: None for causal.
    d_out: like q, gradient of the output.
    lse: float32 [B, Nq, T rounded up to 64], from the forward kernel.
    d_lse: like lse, its gradient in nats; 0 where lse is infinite.
    scale: factor of the scores.
    config: tile sizes.
  """
  B, _, _, H = hopper_streams.shape(q)
  dtype = k.dtype
  S, N = k.shape[1:3]
  C, stages = pl.cdiv(S, ROWS), config.fused_stages
  share = pipeline.share(B * N, config.blocks)
  depth = min(config.fused_depth, pl.cdiv(share.items, share.blocks))
  row_tiles = mosaic.tiles((stages, ROWS, H), dtype)
  row_numbers = plgpu.SMEM((stages, ROWS), jnp.float32)
  key_tiles = mosaic.tiles((depth, C, ROWS, H), dtype)
  ring_of_rows = [row_tiles, row_tiles, row_numbers, row_numbers]
  if visible is not None:
    ring_of_rows.append(plgpu.SMEM((stages, ROWS), jnp.int32))
  width = mosaic.tile_width(H)
  like_k = jax.ShapeDtypeStruct(k.shape, dtype)
  return mosaic.kernel(
    functools.partial(_kernel, scale=scale, share=share),
    out_type=(hopper_streams.like(q), like_k, like_k),
    grid=(share.blocks,),
    grid_names=("block",),
    kernel_name="attention_backward",
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      pipeline.ring(*ring_of_rows, readers=C),
      pipeline.ring(key_tiles, key_tiles, readers=C, copies=C),
      *fused_block.Scratch(
        weights=mosaic.tiles((C, ROWS, ROWS), dtype, width),
        d_scores=mosaic.tiles((C, C, ROWS, ROWS), dtype, width),
        dq=mosaic.tiles((C, ROWS, H), dtype),
        partial_sums=plgpu.SMEM((2, C, ROWS), jnp.float32),
        d_scores_full=plgpu.Barrier(num_barriers=C, num_arrivals=C),
        d_scores_free=plgpu.Barrier(num_barriers=C),
        summed=plgpu.Barrier(num_arrivals=C),
      ),
    ],
  )(q, k, v, d_out, lse, d_lse, *(visible or ()))


def _kernel(q, k, v, d_out, lse, d_lse, *refs, scale, share):
  """The kernel of all gradients."""
  size = len(fused_block.Scratch._fields)
  *visible, dq, dk, dv, rows, keys = refs[:-size]
  thread_block = fused_block.ThreadBlock(
    by_head=(q, d_out),
    by_row=(lse, d_lse),
    keys_and_values=(k, v),
    visible=hopper_masks.Visible(*visible) if visible else None,
    dq=dq,
    dk=dk,
    dv=dv,
    rows=rows,
    keys=keys,
    scratch=fused_block.Scratch(*refs[-size:]),
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
