"""The TPU kernels: one forward, and one backward for dq, dk and dv.

Arrays are feature-major: [B, N, H, rows] and [B, N, H, slots]. The rows of a
row tile are all query heads (streams) of its positions, side by side. This has
three advantages:
- Scores are [slots, rows]. The softmax reduces over sublanes, one register
  after another, and what belongs to a row (visible, maximum, log-sum-exp) is
  one vector of lanes.
- No array is padded to 128 lanes where H is 64.
- One load of a key tile serves all streams.

The last axis of the grid walks the work list of `tiles`. So tiles in which
nothing is visible are neither loaded nor visited.
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
# Below every score, but finite: the difference of two infinities is NaN.
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
  return_out_error: bool,
) -> list[jax.Array]:
  """Compute flash attention (arXiv 2205.14135) over the pairs of `work`.

  Args:
    q: [B, N, H, row tiles * rows].
    k: [B, N, H, S].
    v: [B, N, H, S].
    visible: int32 [B or 1, 1, row tiles * rows].
    key_rank: int32 [B, 1, S]; None if the rank of a slot is its index.
    work: row-major work list.
    tiling: tile sizes.
    scale: factor of the scores, positive.
    return_out_error: whether to return out_error.

  Returns:
    out: like q.
    row_max: float32 [B, N, 1, row tiles * rows], the largest unscaled score of
      each row.
    row_sum: like row_max, the sum of exp(scaled score - scaled row_max); 0 for
      a row that sees no slot.
    out_error: like q, the exact output minus `out`; only if asked for.
  """
  blocks = tpu_blocks.Blocks(q, visible, key_rank, work, tiling)
  heads, H, rows = tiling.heads, q.shape[2], tiling.rows
  row_number = tpu_blocks.like(q, (*q.shape[:2], 1, q.shape[3]), jnp.float32)
  out = tpu_blocks.like(q, q.shape, q.dtype)
  return blocks.call(
    functools.partial(
      _forward_kernel, scale=scale, has_ranks=key_rank is not None
    ),
    [visible, *blocks.ranks, q, k, v],
    in_specs=[*blocks.masks, blocks.row(H), blocks.key(H), blocks.key(H)],
    out_specs=[
      blocks.row(H),
      blocks.row(1),
      blocks.row(1),
      *[blocks.row(H)] * return_out_error,
    ],
    out_shape=[out, row_number, row_number, *[out] * return_out_error],
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
  row_max: jax.Array,
  log2_row_sum: jax.Array,
  delta: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array | None,
  work: tiles.Worklist,
  tiling: tuning.TpuTiles,
  scale: float,
  sum_dtype: jax.typing.DTypeLike,
) -> list[jax.Array]:
  """Return [dq, dk, dv], like q, k and v, in one pass over the pairs of `work`.

  Scores are computed once for all three gradients. To make this possible, dq of
  all rows stays in VMEM, for the key heads of the grid step.

  Args:
    q: [B, N, H, row tiles * rows].
    k: [B, N, H, S].
    v: [B, N, H, S].
    d_out: like q, gradient of the output.
    row_max: float32 [B, N, 1, row tiles * rows], from `forward`.
    log2_row_sum: like row_max, base-2 logarithm of the row_sum of `forward`;
      +inf for a row that sees no slot.
    delta: like row_max, what is subtracted from d_weight of each row. If one
      key tile holds all slots, the kernel adds the row's sum of weight *
      d_weight itself.
    visible: as for `forward`.
    key_rank: as for `forward`.
    work: key-major work list.
    tiling: tile sizes.
    scale: factor of the scores, positive.
    sum_dtype: dtype of dk and dv.
  """
  blocks = tpu_blocks.Blocks(q, visible, key_rank, work, tiling)
  heads, H, rows, slots = tiling.heads, q.shape[2], tiling.rows, tiling.slots
  kernel = functools.partial(
    _backward_kernel,
    scale=scale,
    has_ranks=key_rank is not None,
    has_one_key_tile=tiling.key_tiles == 1,
  )
  row, key, row_number = blocks.row(H), blocks.key(H), blocks.row(1)
  return blocks.call(
    kernel,
    [visible, *blocks.ranks, q, k, v, d_out, row_max, log2_row_sum, delta],
    in_specs=[*blocks.masks, row, key, key, row, *[row_number] * 3],
    out_specs=[blocks.all_rows(H), key, key],
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
  """Return how many row tiles `backward` can do at once, at least 1.

  dq of these row tiles must fit into VMEM: in float32 while it is summed, and
  twice in the pipeline of the output.

  Args:
    q: [B, N, H, row tiles * rows].
    tiling: tile sizes.
  """
  numbers = tiling.heads * q.shape[2] * tiling.rows
  tile_bytes = numbers * (4 + 2 * q.dtype.itemsize)
  return max(tpu_blocks.VMEM_BYTES // 2 // tile_bytes, 1)


def _forward_kernel(
  sequence_ref,
  row_ref,
  key_ref,
  flags_ref,
  visible_ref,
  *refs,
  scale,
  has_ranks,
):
  del sequence_ref, row_ref  # The index maps of the blocks read them.
  rank_ref = refs[0] if has_ranks else None
  q_ref, k_ref, v_ref, *outs, max_ref, sum_ref, accumulator_ref = refs[
    int(has_ranks) :
  ]
  out_ref, max_out_ref, sum_out_ref, *out_error_refs = outs
  step = pl.program_id(2)
  flags = flags_ref[step]

  @tpu_blocks.at(tiles.FIRST, flags)
  def start():
    max_ref[...] = jnp.full_like(max_ref, _LOWEST)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    accumulator_ref[...] = jnp.zeros_like(accumulator_ref)

  def accumulate(n, mask):
    score = tpu_blocks.dot(k_ref[0, n], q_ref[0, n], 0, 0)
    if mask is not None:
      score = jnp.where(mask, score, -jnp.inf)
    row_max_before = max_ref[n]
    row_max = jnp.maximum(row_max_before, score.max(axis=0, keepdims=True))
    # Scores are subtracted before they are scaled: this is exact for those near
    # the maximum, which matter. Base 2 is what the hardware computes.
    weight = jnp.exp2((score - row_max) * (scale * _LOG2E))
    decay = jnp.exp2((row_max_before - row_max) * (scale * _LOG2E))
    max_ref[n] = row_max
    sum_ref[n] = decay * sum_ref[n] + weight.sum(axis=0, keepdims=True)
    values = tpu_blocks.dot(v_ref[0, n], weight.astype(v_ref.dtype), 1, 0)
    accumulator_ref[n] = decay * accumulator_ref[n] + values

  tpu_blocks.for_each_head(
    flags, accumulate, key_ref[step], visible_ref, rank_ref, k_ref
  )

  @tpu_blocks.at(tiles.LAST, flags)
  def finish():
    row_sum = sum_ref[...]
    divisor = jnp.where(row_sum > 0, row_sum, 1.0)
    exact = accumulator_ref[...] / divisor
    out = exact.astype(out_ref.dtype)
    out_ref[0] = out
    for ref in out_error_refs:
      ref[0] = (exact - out.astype(jnp.float32)).astype(ref.dtype)
    max_out_ref[0] = max_ref[...]
    sum_out_ref[0] = row_sum


def _backward_kernel(
  sequence_ref,
  row_ref,
  key_ref,
  flags_ref,
  visible_ref,
  *refs,
  scale,
  has_ranks,
  has_one_key_tile,
):
  del sequence_ref  # The index maps of the blocks read it.
  rank_ref = refs[0] if has_ranks else None
  q_ref, k_ref, v_ref, d_out_ref, max_ref, log2_sum_ref, delta_ref, *outs = (
    refs[int(has_ranks) :]
  )
  dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = outs
  step = pl.program_id(2)
  flags, row = flags_ref[step], row_ref[step]
  row_tiles, rows = dq_sum_ref.shape[0], q_ref.shape[3]

  @tpu_blocks.at(tiles.OPENS, flags)
  def start_sequence():
    dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

  @tpu_blocks.at(tiles.FIRST, flags)
  def start_key_tile():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  def accumulate(n, mask):
    q, k, d_out = q_ref[0, n], k_ref[0, n], d_out_ref[0, n]
    exponent = (tpu_blocks.dot(k, q, 0, 0) - max_ref[0, n]) * (scale * _LOG2E)
    if mask is not None:
      exponent = jnp.where(mask, exponent, -jnp.inf)
    weight = jnp.exp2(exponent - log2_sum_ref[0, n])
    dv_sum_ref[n] += tpu_blocks.dot(d_out, weight.astype(d_out.dtype), 1, 1)
    d_weight = tpu_blocks.dot(v_ref[0, n], d_out, 0, 0)
    delta = delta_ref[0, n]
    if has_one_key_tile:
      delta += (weight * d_weight).sum(axis=0, keepdims=True)
    d_score = (weight * (d_weight - delta)).astype(q.dtype)
    dk_sum_ref[n] += tpu_blocks.dot(q, d_score, 1, 1)
    dq_sum_ref[row, n] += tpu_blocks.dot(k, d_score, 1, 0)

  tpu_blocks.for_each_head(
    flags, accumulate, key_ref[step], visible_ref, rank_ref, k_ref
  )

  @tpu_blocks.at(tiles.LAST, flags)
  def finish_key_tile():
    dk_ref[0] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
    dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)

  @tpu_blocks.at(tiles.CLOSES, flags)
  def finish_sequence():
    for i in range(row_tiles):
      dq = dq_sum_ref[i] * scale
      dq_ref[0, :, :, i * rows : (i + 1) * rows] = dq.astype(dq_ref.dtype)
