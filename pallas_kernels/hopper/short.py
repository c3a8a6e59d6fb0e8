"""Forward kernel for short sequences on Hopper.

One warpgroup computes a whole sequence of a key head. All of its queries, keys
and values are in shared memory at once, and there is no loop over key tiles.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import softmax as hopper_softmax
from pallas_kernels.hopper import streams as hopper_streams

ROWS = hopper_masks.ROWS


def forward(
  q: hopper_streams.Streams,
  k: jax.Array,
  v: jax.Array,
  visible: hopper_masks.Visible | None,
  factor: float,
) -> tuple[hopper_streams.Streams, jax.Array]:
  """Return (out, lse); see forward.forward.

  Args:
    q: [B, T, Nq, H], see `streams`; T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64.
    v: [B, S, N, H].
    visible: None for causal.
    factor: factor of the scores as exponents of 2.
  """
  B, T, Nq, H = hopper_streams.shape(q)
  dtype = k.dtype
  S, N = k.shape[1:3]
  units = pl.cdiv(T, ROWS) * (Nq // N)
  slots = pl.cdiv(S, ROWS) * ROWS
  return mosaic.kernel(
    functools.partial(_short, factor=factor),
    out_type=(
      hopper_streams.like(q),
      jax.ShapeDtypeStruct((B, Nq, pl.cdiv(T, ROWS) * ROWS), jnp.float32),
    ),
    grid=(B * N,),
    grid_names=("item",),
    kernel_name="attention_forward_short",
    scratch_types=[
      mosaic.tiles((units, ROWS, H), dtype),
      mosaic.tiles((slots, H), dtype),
      mosaic.tiles((slots, H), dtype),
      plgpu.SMEM((units, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=units),
      plgpu.Barrier(num_barriers=2),
    ],
  )(q, k, v, *(visible or ()))


def _short(q, k, v, *refs, factor):
  """The kernel of one sequence and key head."""
  *visible_refs, out, lse, q_smem, k_smem, v_smem, lse_smem = refs[:-2]
  q_full, kv_full = refs[-2:]
  visible = hopper_masks.Visible(*visible_refs) if visible_refs else None
  _, T, Nq, _ = hopper_streams.shape(q)
  N = k.shape[2]
  G = Nq // N
  slots = k_smem.shape[0]
  item = lax.axis_index("item")
  b, n = item // N, item % N
  # JAX refuses static slices that reach past the end, where TMA only clips. An
  # offset that is 0 at run time makes them dynamic.
  zero = item * 0
  units = [(i * ROWS, g) for i in range(pl.cdiv(T, ROWS)) for g in range(G)]
  mosaic.copy_in(k.at[b, pl.ds(zero, slots), n], k_smem, kv_full.at[0])
  for u, (start, g) in enumerate(units):
    rows = pl.ds(zero + start, ROWS)
    hopper_streams.load(
      hopper_streams.tile(q, b, rows, n, g, G), q_smem.at[u], q_full.at[u]
    )
    if u == 0:
      mosaic.copy_in(v.at[b, pl.ds(zero, slots), n], v_smem, kv_full.at[1])
  visible_of_units = [
    visible
    and mosaic.load(
      hopper_masks.visible_tile(visible, b, g, start),
      mosaic.ROW_LAYOUT,
      optimized=False,
    )
    for start, g in units
  ]
  plgpu.barrier_wait(kv_full.at[0])
  for u, (start, g) in enumerate(units):
    # Causal rows see no slot past their own tile.
    size = slots if visible else min(start + ROWS, slots)
    plgpu.barrier_wait(q_full.at[u])
    _attend(
      q_smem.at[u],
      k_smem.at[pl.ds(0, size)],
      v_smem.at[pl.ds(0, size)],
      visible_of_units[u],
      start,
      # The first unit needs the values while they are still being loaded.
      kv_full.at[1] if u == 0 else None,
      lse_smem.at[u],
      factor,
    )
    plgpu.commit_smem()
    rows = pl.ds(zero + start, ROWS)
    hopper_streams.store(
      q_smem.at[u], hopper_streams.tile(out, b, rows, n, g, G)
    )
    mosaic.copy_out(lse_smem.at[u], lse.at[b, n * G + g, rows])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend(
  q_tile: mosaic.Ref,
  k_tile: mosaic.Ref,
  v_tile: mosaic.Ref,
  visible: jax.Array | None,
  start: int,
  v_full: mosaic.Ref | None,
  lse_tile: mosaic.Ref,
  factor: float,
) -> None:
  """Compute a unit.

  Args:
    q_tile: reference of the queries; the output replaces them.
    k_tile: reference of all keys that the unit sees.
    v_tile: reference of the values.
    visible: int32 [64] in registers; None for causal.
    start: first row.
    v_full: barrier at which the values arrive, if they may still be loading.
    lse_tile: reference for the log-sum-exp.
    factor: factor of the scores as exponents of 2.
  """
  score = hopper_softmax.scores(q_tile, k_tile, k_tile.shape[0])
  shape = score.shape
  mask = hopper_masks.mask(visible, start, 0, shape)
  score = jnp.where(mask, score, -jnp.inf)
  row_max = score.max(axis=1) * factor
  finite_max = jnp.where(row_max == -jnp.inf, 0.0, row_max)
  weight = jnp.exp2(score * factor - mosaic.along_rows(finite_max, shape))
  row_sum = weight.sum(axis=1)
  weight = weight.astype(v_tile.dtype)
  if v_full is not None:
    plgpu.barrier_wait(v_full)
  (result,) = mosaic.accumulate(
    (mosaic.full(q_tile.shape, 0, mosaic.TILE_LAYOUT),),
    lambda accumulator: mosaic.wgmma(accumulator, weight, v_tile),
  )
  hopper_softmax.finish(result, row_max, row_sum, q_tile, lse_tile)
