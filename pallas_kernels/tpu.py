"""Any-order attention on TPUs: layouts, tiles and gradients."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import context, tiles, tpu_kernels, tuning

# Of the four scalar arrays of a work list; they share 1 MiB of SMEM.
_MOST_PAIRS = 2**15
# H is padded to whole registers of bfloat16.
_FEATURES = 16


def lacks(
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | None,
  key_rank: jax.Array | None,
) -> str:
  """What of this call the kernel cannot do, or ""."""
  del key_rank
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q.dtype} (bfloat16 and float32 only)"
  if q.shape[-1] > 256:
    return f"H={q.shape[-1]} (up to 256)"
  if visible is not None:
    t = tuning.tpu_tiles(q.shape[1], *k.shape[1:3], q.shape[2] // k.shape[2])
    pairs = q.shape[0] * t.row_tiles * t.key_tiles
    if pairs > _MOST_PAIRS:
      return f"`visible` with {pairs} pairs of tiles ({_MOST_PAIRS} at most)"
  platform = jax.default_backend()
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
  """(out, lse) of softmax attention under the any-order mask; see api.

  Scores, softmax, lse and sums are float32; weights are rounded to the inputs'
  dtype before they are multiplied with values or gradients.
  """
  B, T, Nq, _ = q.shape
  S, N = k.shape[1:3]
  t = tuning.tpu_tiles(T, S, N, Nq // N)
  call = _Call(T, S, scale, visible is None, t)
  if visible is None:
    visible = jnp.minimum(jnp.arange(1, T + 1, dtype=jnp.int32), S)[None]
  visible = visible.reshape(*visible.shape[:2], -1, 1).astype(jnp.int32)
  if key_rank is None:
    visible = jnp.minimum(visible, S)
  else:
    last = jnp.iinfo(jnp.int32).max  # Seen by no row.
    key_rank = _pad(key_rank.astype(jnp.int32), 1, t.S, constant_values=last)
    key_rank = key_rank[:, None]
  visible = jnp.broadcast_to(visible, (visible.shape[0], T, Nq // N, 1))
  # A padded row sees what its neighbour sees: no tile is computed for it alone.
  visible = _to_rows(visible, 1, t, mode="edge")[:, 0]
  return _attention(q, k, v, visible, key_rank, call)


class _Call(NamedTuple):
  """What is known of a call when it is traced."""

  T: int
  S: int
  scale: float
  causal: bool
  tiling: tuning.TpuTiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, visible, key_rank, call):
  """As `attention`; visible [B or 1, 1, rows], key_rank [B, 1, S], padded."""
  return _forward(q, k, v, visible, key_rank, call)[0]


def _forward(q, k, v, visible, key_rank, call):
  Nq, H = q.shape[2:]
  t = call.tiling
  q = _to_rows(_pad_features(q), k.shape[2], t)
  k, v = _to_slots(k, t), _to_slots(v, t)
  work = _worklist(visible, key_rank, call, key_major=False)
  out, lse = tpu_kernels.forward(
    q, k, v, visible, key_rank, work, t, call.scale
  )
  out = _from_rows(out, call.T, Nq, t)[..., :H]
  nats = math.log(2) * _from_rows(lse, call.T, Nq, t)[..., 0]
  return (out, nats), (q, k, v, visible, key_rank, out, lse)


def _backward(call, residuals, cotangents):
  q, k, v, visible, key_rank, out, lse = residuals
  d_out, d_lse = cotangents
  Nq, H = out.shape[2:]
  t = call.tiling
  # The softmax's slope is p (dp - sum of p dp), and p dlse is added.
  delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
  rows = (
    q,
    _to_rows(_pad_features(d_out), k.shape[1], t),
    jnp.where(jnp.isneginf(lse), jnp.inf, lse),
    _to_rows(delta[..., None], k.shape[1], t),
    visible,
  )
  parts = []
  most = tpu_kernels.backward_row_tiles(q, t)
  for first in range(0, t.row_tiles, most):
    part = slice(first * t.rows, (first + most) * t.rows)
    parts.append(
      _backward_part(*(x[..., part] for x in rows), k, v, key_rank, call)
    )
  dqs, dks, dvs = zip(*parts)
  dq = _from_rows(jnp.concatenate(dqs, axis=-1), call.T, Nq, t)[..., :H]
  dk, dv = (
    jnp.moveaxis(sum(x[1:], start=x[0]), 3, 1)[:, : call.S, :, :H]
    for x in (dks, dvs)
  )
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _backward_part(q, d_out, lse, delta, visible, k, v, key_rank, call):
  """(dq, dk, dv) of some row tiles."""
  t = call.tiling
  part = t._replace(T=q.shape[3] // t.rows * t.positions)
  whole = part == t
  work = _worklist(visible, key_rank, call, key_major=True, whole=whole)
  return tpu_kernels.backward(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    visible,
    key_rank,
    work,
    part,
    call.scale,
    k.dtype if whole else jnp.float32,
  )


def _worklist(visible, key_rank, call, *, key_major, whole=True):
  t = call.tiling
  count = None
  if call.causal and whole:
    count = tiles.causal_count(
      call.T, call.S, t.positions, t.slots, key_major=key_major
    )
  return tiles.worklist(
    tiles.row_bounds(visible.reshape(visible.shape[0], -1, t.rows)),
    tiles.key_bounds(key_rank, t.S, t.slots),
    key_major=key_major,
    count=count,
  )


def _pad(x, axis, size, **how):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, **how)


def _pad_features(x):
  return _pad(x, 3, -(-x.shape[3] // _FEATURES) * _FEATURES)


def _to_rows(x, N, t, mode="constant"):
  """[B, T, Nq, H] -> [B, N, H, row tiles * rows]."""
  B, _, Nq, H = x.shape
  x = _pad(x, 1, t.T, mode=mode)
  x = x.reshape(B, t.row_tiles, t.positions, N, Nq // N, H)
  x = x.transpose(0, 3, 5, 1, 4, 2).reshape(B, N, H, t.row_tiles, -1)
  return _pad(x, 4, t.rows, mode=mode).reshape(B, N, H, -1)


def _from_rows(x, T, Nq, t):
  """[B, N, H, row tiles * rows] -> [B, T, Nq, H]."""
  B, N, H, _ = x.shape
  x = x.reshape(B, N, H, t.row_tiles, t.rows)[..., : t.positions * Nq // N]
  x = x.reshape(B, N, H, t.row_tiles, Nq // N, t.positions)
  return x.transpose(0, 3, 5, 1, 4, 2).reshape(B, t.T, Nq, H)[:, :T]


def _to_slots(x, t):
  """[B, S, N, H] -> [B, N, H, S], padded."""
  return _pad(_pad_features(x), 1, t.S).transpose(0, 2, 3, 1)
