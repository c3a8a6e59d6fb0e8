"""The one entrance: checks shapes, chooses an implementation, calls it."""

import jax
import jax.numpy as jnp

from pallas_kernels import reference


class UnsupportedError(NotImplementedError):
  """The named implementation cannot do this call; says what it lacks."""


IMPLEMENTATIONS = ("reference", "xla", "cudnn")


def any_order_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | None = None,
  *,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Grouped-query attention in which row i sees a prefix of the slots.

  Sequences are in generation order, so the any-order mask is a prefix. Two
  streams over shared keys and values are two query heads of one group: query
  head n * (Nq / N) + g belongs to key head n.

  Args:
    q: [B, T, Nq, H] queries; bfloat16, float16 or float32 (float64 in
      `reference`).
    k: [B, S, N, H] keys, Nq a multiple of N, same dtype.
    v: [B, S, N, H] values, same dtype.
    visible: int32 [B, T], how many leading slots each row sees; a row that
      sees none gives 0. None is causal: row i sees min(i + 1, S).
    scale: of the scores; None is H ** -0.5.
    implementation: a name of IMPLEMENTATIONS, which means this one or an
      error; None chooses the fastest that supports the call.

  Returns:
    [B, T, Nq, H], dtype of v.

  Raises:
    ValueError: shapes or dtypes that do not fit together, an unknown name.
    UnsupportedError: the named implementation does not support the call;
      the message says what it lacks.
  """
  _check(q, k, v, visible)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if implementation is None:
    platform = jax.default_backend()
    implementation = "xla"
    if platform == "gpu" and not _cudnn_lacks(q, k, visible):
      implementation = "cudnn"
  match implementation:
    case "reference":
      return reference.attention(q, k, v, visible, scale)
    case "xla":
      return _xla(q, k, v, visible, scale)
    case "cudnn":
      if lacks := _cudnn_lacks(q, k, visible):
        raise UnsupportedError(f"attention 'cudnn' does not support {lacks}")
      return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
      )
  raise ValueError(
    f"unknown attention implementation {implementation!r}; there are: "
    + ", ".join(IMPLEMENTATIONS)
  )


def _check(q, k, v, visible):
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(
      f"attention wants q [B, T, Nq, H], k and v [B, S, N, H]; got {q.shape}, "
      f"{k.shape}, {v.shape}"
    )
  same = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
  if not same or q.shape[2] % k.shape[2]:
    raise ValueError(
      f"attention: q {q.shape} does not fit k {k.shape}: B and H must be equal "
      "and Nq a multiple of N"
    )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give them one "
      "dtype"
    )
  if visible is not None and visible.shape != q.shape[:2]:
    raise ValueError(
      f"attention: visible {visible.shape} must be [B, T] = {q.shape[:2]}"
    )


def _xla(q, k, v, visible, scale):
  if visible is None:
    if q.shape[1] <= k.shape[1]:
      return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="xla"
      )
    visible = jnp.minimum(jnp.arange(1, q.shape[1] + 1), k.shape[1])[None]
  mask = jnp.arange(k.shape[1]) < visible[..., None]
  out = jax.nn.dot_product_attention(
    q, k, v, scale=scale, mask=mask[:, None], implementation="xla"
  )
  # A row without keys is the mean of v there; here it is 0.
  return jnp.where(visible[..., None, None] > 0, out, 0)


def _cudnn_lacks(q, k, visible) -> str:
  """What of this call cuDNN's fused attention cannot do, or ""."""
  if visible is not None:
    return "`visible` (causal only)"
  if q.shape[1] != k.shape[1]:
    return f"T={q.shape[1]} rows over S={k.shape[1]} slots (T = S only)"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"{q.dtype} (bfloat16 and float16 only)"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"H={q.shape[-1]} (multiples of 8 up to 128)"
  device = jax.local_devices()[0]
  # "9.0" and the like on NVIDIA's; another maker's says something else.
  capability = str(getattr(device, "compute_capability", ""))
  if capability[:1] not in tuple("89") and not capability.startswith("1"):
    return f"device {device.device_kind!r} (NVIDIA, Ampere or newer, only)"
  return ""
