"""The one entrance: checks shapes, chooses an implementation, calls it."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import reference, shards, tuning
from pallas_kernels.hopper import attention as hopper
from pallas_kernels.tpu import attention as tpu


class UnsupportedError(NotImplementedError):
  """The named implementation cannot do this call; says what it lacks."""


IMPLEMENTATIONS = ("reference", "xla", "cudnn", "mosaic_gpu", "mosaic_tpu")


def any_order_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None = None,
  *,
  key_rank: jax.Array | None = None,
  scale: float | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Grouped-query attention in which each row sees the lowest-ranked slots.

  Sequences are usually in generation order, so that the any-order mask is a
  prefix and a slot's rank is its index. Two streams over shared keys and values
  are two query heads of one group: query head n * (Nq / N) + g belongs to key
  head n.

  Args:
    q: [B, T, Nq, H] queries; bfloat16, float16 or float32 (float64 in
      `reference`).
    k: [B, S, N, H] keys, Nq a multiple of N, same dtype; or, as gathered from P
      devices that share a sequence, [P, B, S / P, N, H], dealt out as `shards`
      says, S / P even.
    v: values, of k's shape and dtype.
    visible: int32 [B, T], or [B, T, Nq / N] where the heads of a group (the
      streams) differ: the row sees the slots whose rank is below this. A row
      that sees none gives 0. An int is the same for all rows. None is causal:
      row i sees min(i + 1, S) slots.
    key_rank: int32 [B, S], the ranks of the slots, for sequences that are not
      in generation order; needs `visible`. None is 0 to S - 1: then row i sees
      the first visible[b, i] slots.
    scale: of the scores, a number of Python's; None is H ** -0.5.
    return_lse: whether to return the log-sum-exp of each row's scores too.
    implementation: a name of IMPLEMENTATIONS, which means this one or an
      error; None chooses the fastest that supports the call.

  Returns:
    [B, T, Nq, H], dtype of v; with `return_lse` also the log-sum-exp of the
    scaled scores, float32 [B, T, Nq], nats, -inf for a row that sees nothing.
    Both are differentiable: attention over a set of slots can be put together
    from attentions over its parts.

  Raises:
    ValueError: shapes or dtypes that do not fit together, arrays without
      numbers, an unknown name.
    UnsupportedError: the named implementation does not support the call;
      the message says what it lacks.
  """
  gathered = k, v
  if k.ndim == 5 and k.shape == v.shape and k.shape[2] % 2 == 0:
    # Not made where a kernel takes them as they lie.
    k, v = (shards.whole(x) for x in gathered)
  _check(q, k, v, visible, key_rank)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  # Our own kernels know prefixes by row.
  rows = visible
  if isinstance(visible, int):
    rows = jnp.full(q.shape[:2], visible, jnp.int32)
  lacks = {
    "cudnn": functools.partial(
      _cudnn_lacks, q, k, visible, key_rank, return_lse
    ),
    "mosaic_gpu": functools.partial(hopper.lacks, q, k, rows, key_rank),
    "mosaic_tpu": functools.partial(tpu.lacks, q, k, rows, key_rank),
  }
  if implementation is None:
    faster = tuning.fastest(jax.default_backend(), q.shape[1], k.shape[1])
    implementation = next((x for x in faster if not lacks[x]()), "xla")
  elif implementation in lacks and (missing := lacks[implementation]()):
    raise UnsupportedError(
      f"attention {implementation!r} does not support {missing}"
    )
  match implementation:
    case "reference":
      out, lse = reference.attention(q, k, v, visible, key_rank, scale)
    case "xla":
      out, lse = _xla(q, k, v, visible, key_rank, scale, return_lse)
    case "cudnn":
      return _cudnn(q, k, v, visible, scale)
    case "mosaic_gpu":
      out, lse = hopper.attention(q, *gathered, rows, key_rank, scale)
    case "mosaic_tpu":
      out, lse = tpu.attention(q, k, v, rows, key_rank, scale)
    case _:
      raise ValueError(
        f"unknown attention implementation {implementation!r}; there are: "
        + ", ".join(IMPLEMENTATIONS)
      )
  return (out, lse) if return_lse else out


def _check(q, k, v, visible, key_rank):
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(
      "attention wants q [B, T, Nq, H], k and v [B, S, N, H] or of P devices "
      f"[P, B, S / P, N, H], S / P even; got {q.shape}, {k.shape}, {v.shape}"
    )
  if not (q.size and k.size):
    raise ValueError(f"attention of nothing: q {q.shape}, k {k.shape}")
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
  if not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"attention: q, k, v are {q.dtype}, not of floats")
  rows = q.shape[:2]
  group = q.shape[2] // k.shape[2]
  is_array = visible is not None and not isinstance(visible, int)
  if is_array and not _are_integers(visible):
    raise ValueError("attention: visible must be an array of integers")
  if is_array and visible.shape not in (rows, (*rows, group)):
    raise ValueError(
      f"attention: visible {visible.shape} must be [B, T] = {rows} or "
      f"[B, T, Nq / N] = {(*rows, group)}"
    )
  if key_rank is None:
    return
  if not _are_integers(key_rank):
    raise ValueError("attention: key_rank must be an array of integers")
  if not is_array:
    raise ValueError("attention: key_rank needs an array of visible")
  if key_rank.shape != k.shape[:2]:
    raise ValueError(
      f"attention: key_rank {key_rank.shape} must be [B, S] = {k.shape[:2]}"
    )


def _are_integers(x) -> bool:
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)


def _xla(q, k, v, visible, key_rank, scale, return_lse):
  if return_lse:
    # That of jax.nn is in the keys' dtype and has no gradient.
    return reference.attention(q, k, v, visible, key_rank, scale)
  T, S = q.shape[1], k.shape[1]
  if isinstance(visible, int) and visible > 0:
    k, v = k[:, :visible], v[:, :visible]
    out = jax.nn.dot_product_attention(
      q, k, v, scale=scale, implementation="xla"
    )
    return out, None
  if visible is None and T <= S:
    out = jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=True, implementation="xla"
    )
    return out, None
  seen = reference.mask(T, S, visible, key_rank)
  if seen.shape[1] > 1:
    seen = jnp.tile(seen, (1, k.shape[2], 1, 1))
  out = jax.nn.dot_product_attention(
    q, k, v, scale=scale, mask=seen, implementation="xla"
  )
  # A row without keys is the mean of v there; here it is 0.
  some = jnp.moveaxis(seen.any(axis=-1), 1, 2)
  return jnp.where(some[..., None], out, 0), None


def _cudnn(q, k, v, visible, scale):
  attend = functools.partial(
    jax.nn.dot_product_attention, scale=scale, implementation="cudnn"
  )
  if visible is None:
    return attend(q, k, v, is_causal=True)
  if isinstance(visible, int):
    return attend(q, k[:, :visible], v[:, :visible])
  return _cudnn_row(q, k, v, visible, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn_row(q, k, v, visible, scale):
  """One row a sequence. cuDNN has no gradient of it; that is `_xla`'s."""
  # It has a length a sequence; for one without keys it promises nothing.
  lengths = jnp.clip(visible[:, 0], 1, k.shape[1])
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    query_seq_lengths=jnp.ones_like(lengths),
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return jnp.where((visible > 0)[:, :, None, None], out, 0)


def _cudnn_row_forward(q, k, v, visible, scale):
  return _cudnn_row(q, k, v, visible, scale), (q, k, v, visible)


def _cudnn_row_backward(scale, saved, cotangent):
  *inputs, visible = saved
  _, pull = jax.vjp(
    lambda q, k, v: _xla(q, k, v, visible, None, scale, False)[0], *inputs
  )
  return *pull(cotangent), None


_cudnn_row.defvjp(_cudnn_row_forward, _cudnn_row_backward)


def _cudnn_lacks(q, k, visible, key_rank, return_lse) -> str:
  """What of this call cuDNN's fused attention cannot do, or ""."""
  if isinstance(visible, int):
    fits = visible > 0
  else:
    fits = visible is None or visible.shape == (q.shape[0], 1)
  if not fits:
    return "`visible` (None, a positive int, or [B, 1] only)"
  if key_rank is not None:
    return "`key_rank` (slots in generation order only)"
  if return_lse:
    return "`return_lse`"
  if visible is None and q.shape[1] != k.shape[1]:
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
