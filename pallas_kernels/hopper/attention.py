"""Any-order attention on Hopper: layouts, choice of kernels, gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices, shards, tuning
from pallas_kernels.hopper import backward as hopper_backward
from pallas_kernels.hopper import forward as hopper_forward
from pallas_kernels.hopper import fused as hopper_fused
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import softmax as hopper_softmax
from pallas_kernels.hopper import streams as hopper_streams

ROWS = hopper_masks.ROWS
LN2 = hopper_softmax.LN2


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
  del visible
  if key_rank is not None:
    return "`key_rank` (slots in generation order only)"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"{q.dtype} (bfloat16 and float16 only)"
  if q.shape[-1] > 128:
    return f"H={q.shape[-1]} (up to 128)"
  device = devices.of(q, k)
  if device.capability != "9.0":
    return f"device {device.kind!r} (NVIDIA Hopper only)"
  return ""


def attention(
  q: jax.Array | tuple[jax.Array, ...],
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | None,
  key_rank: jax.Array | None,
  scale: float,
  config: tuning.Hopper | None = None,
) -> tuple[Any, jax.Array]:
  """Return (out, lse) of softmax attention; see `api.any_order_attention`.

  Sums are float32. Weights and their gradients are rounded to q's dtype before
  they are multiplied. The gradient is deterministic.

  Args:
    q: [B, T, Nq, H], H up to 128; bfloat16 or float16. Or a tuple of streams
      [B, T, N, H]; then Nq is N times their number.
    k: [B, S, N, H], or [P, B, S / P, N, H] in the layout of `shards`. The
      kernels read the latter in place, unless a tile would have slots of two
      chunks.
    v: like k.
    visible: int32 [B, T] or [B, T, Nq / N], or None for causal.
    key_rank: must be None.
    scale: factor of the scores.
    config: tile sizes; None takes those that `tuning` has for the shape and
      the device.

  Returns:
    out, like q; lse float32 [B, T, Nq], nats.

  Raises:
    ValueError: key_rank is given.
  """
  if key_rank is not None:
    raise ValueError("hopper.attention: key_rank must be None")
  streams = q if isinstance(q, tuple) else (q,)
  B, T, Nq, H = hopper_streams.shape(streams)
  S = k.size // (B * k.shape[-2] * H)
  if scale <= 0:
    # The kernels find the largest score before they scale it.
    sign, scale = (-1, -scale) if scale else (0, 1.0)
    streams = tuple(sign * x for x in streams)
  if visible is None and T > S:
    visible = jnp.minimum(jnp.arange(1, T + 1), S)[None]
    visible = jnp.broadcast_to(visible, (B, T))
  G = Nq // k.shape[-2]
  is_packed = False
  if visible is not None and G > 1 and T * G <= ROWS:
    # A group of few rows fits into one tile, so its keys are multiplied once.
    is_packed = True
    if visible.ndim == 2:
      visible = jnp.repeat(visible, G, axis=1)
    visible = visible.reshape(len(visible), T * G)
    streams = (_pack(streams, G),)
  if config is None:
    cores = devices.of(*streams, k).cores
    config = tuning.hopper(streams[0].shape[1], S, _padded_head(H), cores)
  if k.ndim == 5:
    if _can_read_in_place(S, H, len(k), config):
      k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    else:
      k, v = shards.whole(k), shards.whole(v)
  rows = streams[0].shape[1]
  streams, k, v = (
    tuple(_pad(x) for x in streams),
    _pad(k, ROWS),
    _pad(v, ROWS),
  )
  summary = None if visible is None else hopper_masks.summarize(visible, S)
  outs, lse = _attention(streams, k, v, summary, scale, config)
  # Rows past these are padding.
  outs = tuple(x[:, :rows, :, :H] for x in outs)
  lse = jnp.swapaxes(lse[:, :, :rows], 1, 2)
  lse = jnp.where(jnp.isfinite(lse), lse * LN2, -jnp.inf)
  if is_packed:
    outs, lse = (_unpack(outs[0], G),), _unpack(lse, G)
    if isinstance(q, tuple):
      outs = tuple(outs[0][:, :, g::G] for g in range(G))
  return outs if isinstance(q, tuple) else outs[0], lse


def _can_read_in_place(S: int, H: int, P: int, config: tuning.Hopper) -> bool:
  """Return whether the kernels can read keys as P devices have dealt them."""
  chunk = S // (2 * P)
  tile_sizes = ROWS, config.keys, config.query_keys
  if _padded_head(H) > H or max(config.short, config.fused) >= S:
    return False
  return not any(chunk % size for size in tile_sizes)


def _pack(streams: hopper_streams.Streams, G: int) -> jax.Array:
  """Make rows of the query heads of a group: [B, T * G, N, H].

  Args:
    streams: [B, T, N * G, H], see `streams`.
    G: query heads of a key head.
  """
  B, T, heads, H = hopper_streams.shape(streams)
  if len(streams) > 1:
    x = jnp.stack(streams, axis=2)
  else:
    x = jnp.swapaxes(streams[0].reshape(B, T, heads // G, G, H), 2, 3)
  return x.reshape(B, T * G, heads // G, H)


def _unpack(x: jax.Array, G: int) -> jax.Array:
  """Invert `_pack`, into one array."""
  B, rows, N, *features = x.shape
  x = jnp.swapaxes(x.reshape(B, rows // G, G, N, *features), 2, 3)
  return x.reshape(B, rows // G, N * G, *features)


def _padded_head(H: int) -> int:
  """Return the head size that the kernels use for H: a multiple of 16."""
  return max(-(-H // 16) * 16, 32)


def _pad(x: jax.Array, least_rows: int = 1) -> jax.Array:
  """Pad [B, T, N, H] with zeros to sizes that the kernels support.

  These are H as `_padded_head` says, at least `least_rows` rows, and a multiple
  of 8 rows unless a tile has all columns; see mosaic.by_rows.
  """
  padded_H = _padded_head(x.shape[3])
  multiple = 1 if mosaic.has_whole_rows(padded_H) else 8
  rows = max(least_rows - x.shape[1], -x.shape[1] % multiple)
  H = padded_H - x.shape[3]
  if not rows and not H:
    return x
  return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, H)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
  q: hopper_streams.Streams,
  k: jax.Array,
  v: jax.Array,
  visible: hopper_masks.Visible | None,
  scale: float,
  config: tuning.Hopper,
) -> tuple[hopper_streams.Streams, jax.Array]:
  """Return (out, lse) as the forward kernel lays them out."""
  B, T, Nq, _ = hopper_streams.shape(q)
  S, N = hopper_masks.key_sizes(q, k)
  splits = 1
  if T <= ROWS and Nq == N:
    splits = tuning.hopper_splits(B * N, S, config)
  results = hopper_forward.forward(
    q, k, v, visible, scale, config, splits=splits
  )
  if splits == 1:
    return results
  (out,), lse = results
  out, lse = _merge(out, lse, splits)
  return (out,), lse


def _merge(
  out: jax.Array, lse: jax.Array, splits: int
) -> tuple[jax.Array, jax.Array]:
  """Merge attention to the splits of the slots into attention to all slots.

  Args:
    out: [B * splits, T, N, H].
    lse: float32 [B * splits, N, T rounded up to 64], base 2, +inf if a row sees
      no slot of the split.
    splits: splits of a sequence.

  Returns:
    out [B, T, N, H]; lse float32 [B, N, T rounded up to 64], base 2, +inf if a
    row sees no slot.
  """
  out, lse = (x.reshape(-1, splits, *x.shape[1:]) for x in (out, lse))
  lse = jnp.where(jnp.isfinite(lse), lse, -jnp.inf)
  lse_max = lse.max(axis=1)
  finite_max = jnp.where(jnp.isfinite(lse_max), lse_max, 0.0)
  weight = jnp.exp2(lse - finite_max[:, None])
  weight_sum = weight.sum(axis=1)
  sees_a_slot = weight_sum > 0
  weight /= jnp.where(sees_a_slot, weight_sum, 1.0)[:, None]
  weight = jnp.swapaxes(weight, 2, 3)[:, :, : out.shape[2], :, None]
  merged = (out.astype(jnp.float32) * weight).sum(axis=1)
  logarithm = jnp.log2(jnp.where(sees_a_slot, weight_sum, 1))
  lse = jnp.where(sees_a_slot, finite_max + logarithm, jnp.inf)
  return merged.astype(out.dtype), lse


def _attention_forward(
  q: hopper_streams.Streams,
  k: jax.Array,
  v: jax.Array,
  visible: hopper_masks.Visible | None,
  scale: float,
  config: tuning.Hopper,
) -> tuple[tuple[Any, jax.Array], tuple[Any, ...]]:
  out_error = None
  if hopper_masks.key_sizes(q, k)[0] <= config.fused:
    out, lse = _attention(q, k, v, visible, scale, config)
  else:
    out, lse, out_error = hopper_forward.forward(
      q, k, v, visible, scale, config, return_out_error=True
    )
  return (out, lse), (q, k, v, visible, out, out_error, lse)


def _attention_backward(
  scale: float,
  config: tuning.Hopper,
  residuals: tuple[Any, ...],
  cotangents: tuple[Any, jax.Array],
) -> tuple[Any, ...]:
  q, k, v, visible, out, out_error, lse = residuals
  d_out, d_lse = cotangents
  # `lse` is in base 2 here. This makes its gradient the one of lse in nats.
  d_lse = jnp.where(jnp.isfinite(lse), d_lse / LN2, 0)
  if out_error is None:
    gradients = hopper_fused.backward(
      q, k, v, visible, d_out, lse, d_lse, scale, config
    )
    return *gradients, None
  gradients = hopper_backward.backward(
    q, k, v, visible, out, out_error, d_out, lse, d_lse, scale, config
  )
  return *gradients, None


_attention.defvjp(_attention_forward, _attention_backward)
