"""Any-order attention on TPUs: layouts, tiles and gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import context, devices, tuning
from pallas_kernels.tpu import kernels as tpu_kernels
from pallas_kernels.tpu import tiles

# The four scalar arrays of a work list share 1 MiB of SMEM.
_MOST_PAIRS = 2**15
# H is padded to a multiple of this, whole registers of bfloat16.
_FEATURES = 16


def unsupported(
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | None,
  key_rank: jax.Array | None,
) -> str:
  """Name what the kernels do not support in this call, or return "".

  Args:
    q: this argument and the others as in `api.any_order_attention`.
    k: keys.
    visible: an array, or None for causal.
    key_rank: ranks of the slots.
  """
  del key_rank
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q.dtype} (bfloat16 and float32 only)"
  if q.shape[-1] > 256:
    return f"H={q.shape[-1]} (up to 256)"
  if visible is not None:
    tiling = _tiling(q, k)
    pairs = q.shape[0] * tiling.row_tiles * tiling.key_tiles
    if pairs > _MOST_PAIRS:
      return f"`visible` with {pairs} pairs of tiles ({_MOST_PAIRS} at most)"
  mesh = jax.sharding.get_abstract_mesh()
  if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
    return f"mesh {dict(mesh.shape)} outside jax.shard_map"
  platform = devices.of(q, k).platform
  if platform != "tpu" and context.interpret.value is None:
    return f"platform {platform!r} (tpu, or see pallas_kernels.interpret)"
  return ""


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | None,
  key_rank: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Return (out, lse) of softmax attention; see `api.any_order_attention`.

  Scores, softmax, lse and sums are float32. Weights are rounded to the dtype of
  the inputs before they are multiplied with values or gradients.

  Args:
    q: [B, T, Nq, H], bfloat16 or float32, H up to 256.
    k: [B, S, N, H].
    v: [B, S, N, H].
    visible: int32 [B, T] or [B, T, Nq / N], or None for causal.
    key_rank: int32 [B, S], or None for slots in generation order.
    scale: factor of the scores.

  Returns:
    out [B, T, Nq, H] in v's dtype; lse float32 [B, T, Nq], nats.
  """
  T, Nq = q.shape[1:3]
  S, N = k.shape[1:3]
  if scale <= 0:
    # The kernels find the largest score before they scale it.
    q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
  tiling = _tiling(q, k)
  call = _Call(T, S, scale, visible is None, tiling)
  if visible is None:
    visible = jnp.minimum(jnp.arange(1, T + 1, dtype=jnp.int32), S)[None]
  visible = visible.reshape(*visible.shape[:2], -1, 1).astype(jnp.int32)
  if key_rank is None:
    visible = jnp.minimum(visible, S)
  else:
    # No row sees the slots that are padding.
    highest = jnp.iinfo(jnp.int32).max
    key_rank = key_rank.astype(jnp.int32)
    key_rank = _pad(key_rank, 1, tiling.S, constant_values=highest)
    key_rank = key_rank[:, None]
  visible = jnp.broadcast_to(visible, (visible.shape[0], T, Nq // N, 1))
  # A row of padding sees what its neighbour sees, so that no tile is computed
  # for the padding alone.
  visible = _to_rows(visible, 1, tiling, mode="edge")[:, 0]
  return _attention(q, k, v, visible, key_rank, call)


def _tiling(q: jax.Array, k: jax.Array) -> tuning.TpuTiles:
  T, Nq = q.shape[1:3]
  S, N = k.shape[1:3]
  return tuning.tpu_tiles(T, S, N, Nq // N)


class _Call(NamedTuple):
  """What is known of a call when it is traced.

  Attributes:
    T: positions.
    S: slots.
    scale: factor of the scores, positive.
    is_causal: whether the mask is causal.
    tiling: tile sizes.
  """

  T: int
  S: int
  scale: float
  is_causal: bool
  tiling: tuning.TpuTiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array | None,
  call: _Call,
) -> tuple[jax.Array, jax.Array]:
  """Return (out, lse).

  Args:
    q: [B, T, Nq, H].
    k: [B, S, N, H].
    v: [B, S, N, H].
    visible: int32 [B or 1, 1, row tiles * rows].
    key_rank: int32 [B, 1, padded S], or None.
    call: the static arguments.
  """
  return _forward(q, k, v, visible, key_rank, call, keep_out_error=False)[0]


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array | None,
  call: _Call,
  keep_out_error: bool = True,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  """Return (out, lse) and the residuals for `_backward`."""
  Nq, H = q.shape[2:]
  tiling = call.tiling
  q = _to_rows(_pad_features(q), k.shape[2], tiling)
  k, v = _to_slots(k, tiling), _to_slots(v, tiling)
  row_tiles = range(tiling.row_tiles)
  work = _worklist(visible, key_rank, call, row_tiles, key_major=False)
  # Gradients need the sum of weight * d_weight over the slots. It equals the
  # sum of d_out * out over H. But where weights are near 0 or 1, gradients are
  # as wrong as out is. So if the backward kernel does not see all slots at
  # once, out's rounding error is kept too.
  keep_out_error = (
    keep_out_error and tiling.key_tiles > 1 and v.dtype == jnp.bfloat16
  )
  out, row_max, row_sum, *out_error = tpu_kernels.forward(
    q, k, v, visible, key_rank, work, tiling, call.scale, keep_out_error
  )
  out, *out_error = (
    _from_rows(x, call.T, Nq, tiling)[..., :H] for x in (out, *out_error)
  )
  lse = jnp.where(
    row_sum > 0, call.scale * row_max + jnp.log(row_sum), -jnp.inf
  )
  lse = _from_rows(lse, call.T, Nq, tiling)[..., 0]
  residuals = (q, k, v, visible, key_rank, out, out_error, row_max, row_sum)
  return (out, lse), residuals


def _backward(
  call: _Call,
  residuals: tuple[Any, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
  q, k, v, visible, key_rank, out, out_error, row_max, row_sum = residuals
  d_out, d_lse = cotangents
  Nq, H = out.shape[2:]
  tiling = call.tiling
  delta = -d_lse
  if tiling.key_tiles > 1:
    exact = out.astype(jnp.float32)
    for error in out_error:
      exact = exact + error.astype(jnp.float32)
    delta += (d_out.astype(jnp.float32) * exact).sum(axis=-1)
  rows = (
    q,
    _to_rows(_pad_features(d_out), k.shape[1], tiling),
    row_max,
    jnp.where(row_sum > 0, jnp.log2(row_sum), jnp.inf),
    _to_rows(delta[..., None], k.shape[1], tiling),
    visible,
  )
  at_once = tpu_kernels.backward_row_tiles(q, tiling)
  gradients = [
    _backward_of_row_tiles(
      range(first, min(first + at_once, tiling.row_tiles)),
      rows,
      k,
      v,
      key_rank,
      call,
    )
    for first in range(0, tiling.row_tiles, at_once)
  ]
  dqs, dks, dvs = zip(*gradients)
  dq = _from_rows(jnp.concatenate(dqs, axis=-1), call.T, Nq, tiling)[..., :H]
  dk, dv = (
    jnp.moveaxis(sum(x[1:], start=x[0]), 3, 1)[:, : call.S, :, :H]
    for x in (dks, dvs)
  )
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _backward_of_row_tiles(
  row_tiles: range,
  rows: tuple[jax.Array, ...],
  k: jax.Array,
  v: jax.Array,
  key_rank: jax.Array | None,
  call: _Call,
) -> list[jax.Array]:
  """Return [dq, dk, dv] for a range of row tiles.

  Args:
    row_tiles: range of row tiles.
    rows: arrays [..., rows of all row tiles].
    k: [B, N, H, S].
    v: [B, N, H, S].
    key_rank: int32 [B, 1, S], or None.
    call: the static arguments.
  """
  tiling = call.tiling
  columns = slice(row_tiles.start * tiling.rows, row_tiles.stop * tiling.rows)
  q, d_out, row_max, log2_row_sum, delta, visible = (
    x[..., columns] for x in rows
  )
  work = _worklist(visible, key_rank, call, row_tiles, key_major=True)
  range_tiling = tiling._replace(T=len(row_tiles) * tiling.positions)
  return tpu_kernels.backward(
    q,
    k,
    v,
    d_out,
    row_max,
    log2_row_sum,
    delta,
    visible,
    key_rank,
    work,
    range_tiling,
    call.scale,
    k.dtype if range_tiling == tiling else jnp.float32,
  )


def _worklist(
  visible: jax.Array,
  key_rank: jax.Array | None,
  call: _Call,
  row_tiles: range,
  *,
  key_major: bool,
) -> tiles.Worklist:
  """Return the pairs of tiles to visit, for a range of row tiles."""
  tiling = call.tiling
  if call.is_causal:
    first, last = (
      tile * tiling.positions for tile in (row_tiles.start, row_tiles.stop)
    )
    return tiles.causal_worklist(
      range(call.T)[first:last],
      call.S,
      tiling.positions,
      tiling.slots,
      key_major=key_major,
    )
  rows = tiles.row_bounds(visible.reshape(visible.shape[0], -1, tiling.rows))
  keys = tiles.key_bounds(key_rank, tiling.S, tiling.slots)
  return tiles.worklist(rows, keys, key_major=key_major)


def _pad(x: jax.Array, axis: int, size: int, **options: Any) -> jax.Array:
  """Pad an axis at its end to a size; options as for jnp.pad."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, **options)


def _pad_features(x: jax.Array) -> jax.Array:
  """Pad H of [B, T, N, H]."""
  return _pad(x, 3, -(-x.shape[3] // _FEATURES) * _FEATURES)


def _to_rows(
  x: jax.Array, N: int, tiling: tuning.TpuTiles, mode: str = "constant"
) -> jax.Array:
  """Lay out rows for the kernels.

  [B, T, Nq, H] -> [B, N, H, row tiles * rows].
  """
  B, _, Nq, H = x.shape
  x = _pad(x, 1, tiling.T, mode=mode)
  x = x.reshape(B, tiling.row_tiles, tiling.positions, N, Nq // N, H)
  x = x.transpose(0, 3, 5, 1, 4, 2).reshape(B, N, H, tiling.row_tiles, -1)
  return _pad(x, 4, tiling.rows, mode=mode).reshape(B, N, H, -1)


def _from_rows(
  x: jax.Array, T: int, Nq: int, tiling: tuning.TpuTiles
) -> jax.Array:
  """Invert `_to_rows`: [B, N, H, row tiles * rows] -> [B, T, Nq, H]."""
  B, N, H, _ = x.shape
  x = x.reshape(B, N, H, tiling.row_tiles, tiling.rows)
  x = x[..., : tiling.positions * Nq // N]
  x = x.reshape(B, N, H, tiling.row_tiles, Nq // N, tiling.positions)
  return x.transpose(0, 3, 5, 1, 4, 2).reshape(B, tiling.T, Nq, H)[:, :T]


def _to_slots(x: jax.Array, tiling: tuning.TpuTiles) -> jax.Array:
  """Lay out slots for the kernels, padded: [B, S, N, H] -> [B, N, H, S]."""
  return _pad(_pad_features(x), 1, tiling.S).transpose(0, 2, 3, 1)
