"""Any-order attention on TPUs: layouts, tiles and gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import context, tuning
from pallas_kernels.tpu import kernels as tpu_kernels
from pallas_kernels.tpu import tiles

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
  mesh = jax.sharding.get_abstract_mesh()
  if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
    return f"mesh {dict(mesh.shape)} outside jax.shard_map"
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
  T, Nq = q.shape[1:3]
  S, N = k.shape[1:3]
  if scale <= 0:
    # The kernels look for the largest score before they scale it.
    q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
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
  return _forward(q, k, v, visible, key_rank, call, low=False)[0]


def _forward(q, k, v, visible, key_rank, call, low=True):
  Nq, H = q.shape[2:]
  t = call.tiling
  q = _to_rows(_pad_features(q), k.shape[2], t)
  k, v = _to_slots(k, t), _to_slots(v, t)
  every = range(t.row_tiles)
  work = _worklist(visible, key_rank, call, every, key_major=False)
  # Gradients need the sum of p dp over the slots, which is d_out . out, and
  # where p is near 0 or 1 they are as wrong as out is. So where the backward
  # pass does not see all slots at once, out's rounding error is kept with it.
  low = low and t.key_tiles > 1 and v.dtype == jnp.bfloat16
  out, most, total, *low = tpu_kernels.forward(
    q, k, v, visible, key_rank, work, t, call.scale, low
  )
  out, *low = (_from_rows(x, call.T, Nq, t)[..., :H] for x in (out, *low))
  lse = jnp.where(total > 0, call.scale * most + jnp.log(total), -jnp.inf)
  lse = _from_rows(lse, call.T, Nq, t)[..., 0]
  return (out, lse), (q, k, v, visible, key_rank, out, low, most, total)


def _backward(call, residuals, cotangents):
  q, k, v, visible, key_rank, out, low, most, total = residuals
  d_out, d_lse = cotangents
  Nq, H = out.shape[2:]
  t = call.tiling
  # What the slope of every weight of a row has too much.
  delta = -d_lse
  if t.key_tiles > 1:
    exact = sum((x.astype(jnp.float32) for x in low), out.astype(jnp.float32))
    delta += (d_out.astype(jnp.float32) * exact).sum(axis=-1)
  rows = (
    q,
    _to_rows(_pad_features(d_out), k.shape[1], t),
    most,
    jnp.where(total > 0, jnp.log2(total), jnp.inf),
    _to_rows(delta[..., None], k.shape[1], t),
    visible,
  )
  at_once = tpu_kernels.backward_row_tiles(q, t)
  parts = [
    _backward_part(
      range(first, min(first + at_once, t.row_tiles)),
      rows,
      k,
      v,
      key_rank,
      call,
    )
    for first in range(0, t.row_tiles, at_once)
  ]
  dqs, dks, dvs = zip(*parts)
  dq = _from_rows(jnp.concatenate(dqs, axis=-1), call.T, Nq, t)[..., :H]
  dk, dv = (
    jnp.moveaxis(sum(x[1:], start=x[0]), 3, 1)[:, : call.S, :, :H]
    for x in (dks, dvs)
  )
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _backward_part(row_tiles, rows, k, v, key_rank, call):
  """(dq, dk, dv) of a range of row tiles."""
  t = call.tiling
  part = slice(row_tiles.start * t.rows, row_tiles.stop * t.rows)
  q, d_out, most, log2_total, delta, visible = (x[..., part] for x in rows)
  work = _worklist(visible, key_rank, call, row_tiles, key_major=True)
  part = t._replace(T=len(row_tiles) * t.positions)
  return tpu_kernels.backward(
    q,
    k,
    v,
    d_out,
    most,
    log2_total,
    delta,
    visible,
    key_rank,
    work,
    part,
    call.scale,
    k.dtype if part == t else jnp.float32,
  )


def _worklist(visible, key_rank, call, row_tiles, *, key_major):
  t = call.tiling
  if call.causal:
    first, last = (i * t.positions for i in (row_tiles.start, row_tiles.stop))
    return tiles.causal_worklist(
      range(call.T)[first:last], call.S, t.positions, t.slots,
      key_major=key_major,
    )  # fmt: skip
  rows = tiles.row_bounds(visible.reshape(visible.shape[0], -1, t.rows))
  keys = tiles.key_bounds(key_rank, t.S, t.slots)
  return tiles.worklist(rows, keys, key_major=key_major)


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
