"""The TPU kernels: forward, and one backward for dq, dk and dv.

Arrays are feature-major: [B, N, H, rows] and [B, N, H, slots], rows being all
query heads (streams) of a row tile's positions side by side. So scores are
[slots, rows]: the softmax reduces over sublanes, one register after another,
and what belongs to a row (prefix, maximum, log-sum-exp) is one vector of lanes;
no array is padded to 128 lanes where H is 64; and one load of a key tile serves
all streams. The grid's last axis walks the work list of tiles.py, so tiles in
which nothing is visible are neither loaded nor visited.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.tpu import blocks as tpu_blocks
from pallas_kernels.tpu import tiles

_LOG2E = math.log2(math.e)
# Below every score, and finite: a difference of infinities is not a number.
_LOWEST = -1e30


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array | None,
  work: tiles.Worklist,
  tiling: tuning.TpuTiles,
  scale: float,
  low: bool,
) -> list[jax.Array]:
  """Flash attention (arXiv 2205.14135) over the pairs of `work`.

  Args:
    q: [B, N, H, row tiles * rows].
    k: [B, N, H, S], v too.
    visible: int32 [B or 1, 1, row tiles * rows].
    key_rank: int32 [B, 1, S], or None.
    work: row-major.
    tiling: the sizes.
    scale: of the scores.
    low: whether to return what rounding took from out.

  Returns:
    out, as q; float32 [B, N, 1, row tiles * rows] the largest unscaled score
    of each row, and its sum of exp(scaled score - largest), 0 for a row that
    sees nothing; if `low`, the exact out minus out, as q.
  """
  spec = tpu_blocks.Blocks(q, k, visible, key_rank, work, tiling)
  heads, H, rows = tiling.heads, q.shape[2], tiling.rows
  kernel = functools.partial(
    _forward_kernel, scale=scale, ranked=key_rank is not None
  )
  inputs = [visible, *spec.ranks, q, k, v]
  return spec.call(
    kernel,
    inputs,
    in_specs=[*spec.masks, spec.row(H), spec.key(H), spec.key(H)],
    out_specs=[spec.row(H), spec.row(1), spec.row(1), *[spec.row(H)] * low],
    out_shape=[
      tpu_blocks.like(q, q.shape, q.dtype),
      *[tpu_blocks.like(q, (*q.shape[:2], 1, q.shape[3]), jnp.float32)] * 2,
      *[tpu_blocks.like(q, q.shape, q.dtype)] * low,
    ],
    scratch_shapes=[
      pltpu.VMEM((heads, 1, rows), jnp.float32),
      pltpu.VMEM((heads, 1, rows), jnp.float32),
      pltpu.VMEM((heads, H, rows), jnp.float32),
    ],
    name="any_order_attention_forward",
  )


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  most: jax.Array,
  log2_total: jax.Array,
  delta: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array | None,
  work: tiles.Worklist,
  tiling: tuning.TpuTiles,
  scale: float,
  sum_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(dq, dk, dv), as q, k and v, in one pass over the pairs of `work`.

  Scores are computed once for all three gradients, since the dq of all rows
  of the heads at work stays in VMEM.

  Args:
    q: as for `forward`; k, v, visible, key_rank, tiling and scale too.
    d_out: as q.
    most: float32 [B, N, 1, row tiles * rows], of `forward`.
    log2_total: as most, of `forward`'s sum, +inf for a row that sees nothing.
    delta: as most: what is subtracted from the slope of each weight, besides
      the row's sum of p dp where one key tile holds all slots.
    work: key-major.
    sum_dtype: of dk and dv.
  """
  spec = tpu_blocks.Blocks(q, k, visible, key_rank, work, tiling)
  heads, H, rows, slots = tiling.heads, q.shape[2], tiling.rows, tiling.slots
  kernel = functools.partial(
    _backward_kernel,
    scale=scale,
    ranked=key_rank is not None,
    whole=tiling.key_tiles == 1,
  )
  row, key, line = spec.row(H), spec.key(H), spec.row(1)
  inputs = [visible, *spec.ranks, q, k, v, d_out, most, log2_total, delta]
  return spec.call(
    kernel,
    inputs,
    in_specs=[*spec.masks, row, key, key, row, line, line, line],
    out_specs=[spec.all_rows(H), key, key],
    out_shape=[
      tpu_blocks.like(q, q.shape, q.dtype),
      tpu_blocks.like(k, k.shape, sum_dtype),
      tpu_blocks.like(v, v.shape, sum_dtype),
    ],
    scratch_shapes=[
      pltpu.VMEM((tiling.row_tiles, heads, H, rows), jnp.float32),
      pltpu.VMEM((heads, H, slots), jnp.float32),
      pltpu.VMEM((heads, H, slots), jnp.float32),
    ],
    name="any_order_attention_backward",
  )


def backward_row_tiles(q: jax.Array, tiling: tuning.TpuTiles) -> int:
  """How many row tiles' dq can be in VMEM at once; at least 1.

  q [B, N, H, row tiles * rows]. It is there in float32 while it is summed, and
  twice in the output's pipeline.
  """
  scalars = tiling.heads * q.shape[2] * tiling.rows
  tile = scalars * (4 + 2 * q.dtype.itemsize)
  return max(tpu_blocks.VMEM_BYTES // 2 // tile, 1)


def _forward_kernel(
  sequence_ref, row_ref, key_ref, flags_ref, visible_ref, *refs, scale, ranked
):
  del sequence_ref, row_ref  # Read by the blocks' index maps.
  rank_ref, refs = (refs[0], refs[1:]) if ranked else (None, refs)
  *refs, most_ref, total_ref, sum_ref = refs
  q_ref, k_ref, v_ref, out_ref, most_out_ref, total_out_ref, *low_ref = refs
  step = pl.program_id(2)
  flags = flags_ref[step]

  @tpu_blocks.at(tiles.FIRST, flags)
  def start():
    most_ref[...] = jnp.full_like(most_ref, _LOWEST)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def accumulate(n, seen):
    score = tpu_blocks.dot(k_ref[0, n], q_ref[0, n], 0, 0)
    if seen is not None:
      score = jnp.where(seen, score, -jnp.inf)
    before = most_ref[n]
    most = jnp.maximum(before, score.max(axis=0, keepdims=True))
    # The difference comes first: it is exact where it matters. In base 2, which
    # is what the hardware computes.
    weight = jnp.exp2((score - most) * (scale * _LOG2E))
    shrink = jnp.exp2((before - most) * (scale * _LOG2E))
    most_ref[n] = most
    total_ref[n] = shrink * total_ref[n] + weight.sum(axis=0, keepdims=True)
    values = tpu_blocks.dot(v_ref[0, n], weight.astype(v_ref.dtype), 1, 0)
    sum_ref[n] = shrink * sum_ref[n] + values

  tpu_blocks.for_each_head(
    flags, accumulate, key_ref[step], visible_ref, rank_ref, k_ref
  )

  @tpu_blocks.at(tiles.LAST, flags)
  def finish():
    total = total_ref[...]
    some = jnp.where(total > 0, total, 1.0)
    exact = sum_ref[...] / some
    out = exact.astype(out_ref.dtype)
    out_ref[0] = out
    for ref in low_ref:
      ref[0] = (exact - out.astype(jnp.float32)).astype(ref.dtype)
    most_out_ref[0] = most_ref[...]
    total_out_ref[0] = total


def _backward_kernel(
  sequence_ref,
  row_ref,
  key_ref,
  flags_ref,
  visible_ref,
  *refs,
  scale,
  ranked,
  whole,
):
  del sequence_ref
  rank_ref, refs = (refs[0], refs[1:]) if ranked else (None, refs)
  q_ref, k_ref, v_ref, d_out_ref, most_ref, log_ref, delta_ref, *refs = refs
  dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = refs
  step = pl.program_id(2)
  flags, row = flags_ref[step], row_ref[step]
  row_tiles, rows = dq_sum_ref.shape[0], q_ref.shape[3]

  @tpu_blocks.at(tiles.OPENS, flags)
  def start():
    dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

  @tpu_blocks.at(tiles.FIRST, flags)
  def start_slots():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  def accumulate(n, seen):
    q, k, d_out = q_ref[0, n], k_ref[0, n], d_out_ref[0, n]
    score = (tpu_blocks.dot(k, q, 0, 0) - most_ref[0, n]) * (scale * _LOG2E)
    if seen is not None:
      score = jnp.where(seen, score, -jnp.inf)
    weight = jnp.exp2(score - log_ref[0, n])
    dv_sum_ref[n] += tpu_blocks.dot(d_out, weight.astype(d_out.dtype), 1, 1)
    slope = tpu_blocks.dot(v_ref[0, n], d_out, 0, 0)
    delta = delta_ref[0, n]
    if whole:
      delta += (weight * slope).sum(axis=0, keepdims=True)
    slope = (weight * (slope - delta)).astype(q.dtype)
    dk_sum_ref[n] += tpu_blocks.dot(q, slope, 1, 1)
    dq_sum_ref[row, n] += tpu_blocks.dot(k, slope, 1, 0)

  tpu_blocks.for_each_head(
    flags, accumulate, key_ref[step], visible_ref, rank_ref, k_ref
  )

  @tpu_blocks.at(tiles.LAST, flags)
  def finish_slots():
    dk_ref[0] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
    dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)

  @tpu_blocks.at(tiles.CLOSES, flags)
  def finish():
    for i in range(row_tiles):
      dq = dq_sum_ref[i] * scale
      dq_ref[0, :, :, i * rows : (i + 1) * rows] = dq.astype(dq_ref.dtype)
