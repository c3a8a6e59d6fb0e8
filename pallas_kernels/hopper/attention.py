"""Fused any-order attention on Hopper: the project's own kernels."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import shards, tuning
from pallas_kernels.hopper import backward as hopper_backward
from pallas_kernels.hopper import forward as hopper_forward
from pallas_kernels.hopper import fused as hopper_fused
from pallas_kernels.hopper import masks as hopper_masks

ROWS = hopper_masks.ROWS


def lacks(
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | None,
  key_rank: jax.Array | None,
) -> str:
  """What of this call the kernels cannot do, or "". Arguments as of the api."""
  del k, visible
  if key_rank is not None:
    return "`key_rank` (slots in generation order only)"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"{q.dtype} (bfloat16 and float16 only)"
  if q.shape[-1] > 128:
    return f"H={q.shape[-1]} (up to 128)"
  device = jax.local_devices()[0]
  if getattr(device, "compute_capability", "") != "9.0":
    return f"device {device.device_kind!r} (NVIDIA Hopper only)"
  return ""


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | None,
  key_rank: None,
  scale: float,
  config: tuning.Hopper | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of softmax attention over prefixes of the slots; see api.

  Sums are float32; weights and their cotangents are rounded to q's dtype
  before they are multiplied. The gradient does not depend on timing.

  Args:
    q: [B, T, Nq, H], H up to 128; bfloat16 or float16.
    k: [B, S, N, H], or [P, B, S / P, N, H] dealt out as `shards` says; read as
      they lie, unless a tile were to hold slots of two chunks.
    v: like k.
    visible: int32 [B, T] or [B, T, Nq / N], or None for causal.
    key_rank: must be None.
    scale: of the scores.
    config: tile sizes; None is those of `tuning` for the shape.

  Raises:
    ValueError: key_rank is given.
  """
  if key_rank is not None:
    raise ValueError("hopper.attention: key_rank must be None; see `lacks`")
  B, T, Nq, H = q.shape
  S = k.size // (B * k.shape[-2] * H)
  if scale <= 0:
    # The kernels take the largest score before they scale.
    q, scale = (-q, -scale) if scale else (q * 0, 1.0)
  if visible is None and T > S:
    visible = jnp.minimum(jnp.arange(1, T + 1), S)[None]
    visible = jnp.broadcast_to(visible, q.shape[:2])
  G = Nq // k.shape[-2]
  packed = visible is not None and G > 1 and T * G <= ROWS
  if packed:
    # Of few rows, the whole group is one tile: keys are multiplied once.
    if visible.ndim == 2:
      visible = jnp.repeat(visible, G, axis=1)
    visible = visible.reshape(len(visible), T * G)
    q = _pack(q, G)
  if config is None:
    config = tuning.hopper(q.shape[1], S, _padded(H))
  if k.ndim == 5:
    if _in_place(S, H, len(k), config):
      k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    else:
      k, v = shards.whole(k), shards.whole(v)
  rows = q.shape[1]
  q, k, v = _pad(q, 8), _pad(k, ROWS), _pad(v, ROWS)
  counts = None if visible is None else hopper_masks.prefix(visible, S)
  out, lse = _attention(q, k, v, counts, scale, config)
  # Rows that fill up the last tile are past T here.
  out, lse = out[:, :rows, :, :H], jnp.swapaxes(lse[:, :, :rows], 1, 2)
  lse = jnp.where(jnp.isfinite(lse), lse * hopper_forward.LN2, -jnp.inf)
  return (_unpack(out, G), _unpack(lse, G)) if packed else (out, lse)


def _in_place(S: int, H: int, P: int, config: tuning.Hopper) -> bool:
  """Whether the kernels read S slots where P devices have dealt them out."""
  chunk = S // (2 * P)
  tiles = ROWS, config.keys, config.query_keys
  if _padded(H) > H or max(config.short, config.fused) >= S:
    return False
  return not any(chunk % size for size in tiles)


def _pack(x, G: int):
  """[B, T, N * G, ...] -> [B, T * G, N, ...]."""
  B, T, heads, *rest = x.shape
  x = jnp.swapaxes(x.reshape(B, T, heads // G, G, *rest), 2, 3)
  return x.reshape(B, T * G, heads // G, *rest)


def _unpack(x, G: int):
  """[B, T * G, N, ...] -> [B, T, N * G, ...]."""
  B, rows, N, *rest = x.shape
  x = jnp.swapaxes(x.reshape(B, rows // G, G, N, *rest), 2, 3)
  return x.reshape(B, rows // G, N * G, *rest)


def _padded(H: int) -> int:
  return 64 if H <= 64 else 128


def _pad(x, least: int):
  """With `least` rows and a multiple of 8, as TMA asks; H of 64 or 128."""
  rows = max(least - x.shape[1], -x.shape[1] % 8)
  H = _padded(x.shape[3]) - x.shape[3]
  if not rows and not H:
    return x
  return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, H)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, counts, scale, config):
  (B, T, Nq, _), (S, N) = q.shape, hopper_masks.keys(q, k)
  splits = 1
  if T <= ROWS and Nq == N:
    splits = tuning.hopper_splits(B * N, S, config)
  found = hopper_forward.forward(q, k, v, counts, scale, config, splits=splits)
  return found if splits == 1 else _merge(*found, splits)


def _merge(out, lse, splits: int):
  """Attention to all slots, from that to parts of them.

  Args:
    out: [B * splits, T, N, H].
    lse: float32 [B * splits, N, T rounded up to 64], base 2, +inf where a row
      sees nothing.
    splits: parts.
  """
  out, lse = (x.reshape(-1, splits, *x.shape[1:]) for x in (out, lse))
  lse = jnp.where(jnp.isfinite(lse), lse, -jnp.inf)
  largest = lse.max(axis=1)
  finite = jnp.where(jnp.isfinite(largest), largest, 0.0)
  share = jnp.exp2(lse - finite[:, None])
  total = share.sum(axis=1)
  some = total > 0
  share /= jnp.where(some, total, 1.0)[:, None]
  share = jnp.swapaxes(share, 2, 3)[:, :, : out.shape[2], :, None]
  merged = (out.astype(jnp.float32) * share).sum(axis=1)
  lse = jnp.where(some, finite + jnp.log2(jnp.where(some, total, 1)), jnp.inf)
  return merged.astype(out.dtype), lse


def _attention_forward(q, k, v, counts, scale, config):
  rest = None
  if hopper_masks.keys(q, k)[0] <= config.fused:
    out, lse = _attention(q, k, v, counts, scale, config)
  else:
    out, lse, rest = hopper_forward.forward(
      q, k, v, counts, scale, config, with_rest=True
    )
  return (out, lse), (q, k, v, counts, out, rest, lse)


def _attention_backward(scale, config, residuals, cotangents):
  q, k, v, counts, out, rest, lse = residuals
  d_out, d_lse = cotangents
  # The cotangent is that of the logarithm in base 2.
  d_lse = jnp.where(jnp.isfinite(lse), d_lse / hopper_forward.LN2, 0)
  arguments = (q, k, v, counts, d_out, lse)
  if rest is None:
    gradients = hopper_fused.backward(*arguments, d_lse, scale, config)
    return *gradients, None
  accurate = out.astype(jnp.float32) + rest
  delta = jnp.moveaxis((accurate * d_out).sum(axis=-1), 1, 2)
  delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2])))
  gradients = hopper_backward.backward(*arguments, delta - d_lse, scale, config)
  return *gradients, None


_attention.defvjp(_attention_forward, _attention_backward)
