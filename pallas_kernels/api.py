"""The public function: checks shapes, chooses an implementation, calls it."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
  blockwise,
  devices,
  errors,
  reference,
  shards,
  tuning,
)

IMPLEMENTATIONS = (
  "reference",
  "xla",
  "blockwise",
  "cudnn",
  "mosaic_gpu",
  "mosaic_tpu",
)


def any_order_attention(
  q: jax.Array | list[jax.Array] | tuple[jax.Array, ...],
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None = None,
  *,
  key_rank: jax.Array | None = None,
  scale: float | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Any:
  """Compute attention in which each row sees the slots of lowest rank.

  A row is a query position, a slot is a key position. Sequences are usually in
  generation order. Then the rank of a slot is its index, and a row sees the
  first slots of the sequence.

  Attention is grouped: query head n * (Nq / N) + g reads key head n. Two
  streams over shared keys and values are two query heads of one group. So the
  heads of streams interleave, and streams that are concatenated along the heads
  give a wrong result without an error. Each stream may itself have several
  query heads for a key head. Pass streams as a list:

    >>> import jax, jax.numpy as jnp, pallas_kernels
    >>> B, T, N, H = 2, 5, 4, 8
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> content, query, k, v = (
    ...   jax.random.normal(key, (B, T, N, H)) for key in keys
    ... )
    >>> # A content row sees its own slot, and a query row does not.
    >>> before = jnp.broadcast_to(jnp.arange(T), (B, T))
    >>> visible = jnp.stack([before + 1, before], axis=-1)
    >>> streams = pallas_kernels.any_order_attention(
    ...   [content, query], k, v, visible
    ... )
    >>> [out.shape for out in streams]
    [(2, 5, 4, 8), (2, 5, 4, 8)]

  The same call on one array is:

    >>> q = jnp.stack([content, query], axis=3).reshape(B, T, 2 * N, H)
    >>> out = pallas_kernels.any_order_attention(q, k, v, visible)
    >>> bool((out.reshape(B, T, N, 2, H)[..., 1, :] == streams[1]).all())
    True

  Args:
    q: [B, T, Nq, H] queries; bfloat16, float16 or float32. The implementation
      `reference` also takes float64. A list or a tuple of G streams has one
      [B, T, M, H] for each stream; Nq is G * M, and M a multiple of N. The g-th
      stream sees visible[..., g].
    k: [B, S, N, H] keys of q's dtype; Nq is a multiple of N. Keys gathered from
      P devices that share a sequence are [P, B, S / P, N, H] in the layout of
      `shards`; S / P is even.
    v: values, of k's shape and dtype.
    visible: number of slots that each row sees. A row sees the slots whose rank
      is below this number; the output of a row that sees no slot is 0. It is
      int32 [B, T], or int32 [B, T, Nq / N] if the query heads of a group see
      different slots, or int32 [B, T, G] if the G streams of a list do. An
      int, or an array of one integer [], holds for all rows. None is causal:
      row i sees min(i + 1, S) slots.
    key_rank: int32 [B, S], the rank of each slot, for sequences that are not in
      generation order; needs `visible`. None is 0 to S - 1: row i sees the
      first visible[b, i] slots.
    scale: factor of the scores, a Python number; None is H ** -0.5.
    return_lse: also return the log-sum-exp of the scores of each row.
    implementation: a name from IMPLEMENTATIONS: this one runs, or the call
      raises. None chooses the fastest one that supports the call.

  Returns:
    The output, [B, T, Nq, H] in v's dtype. With `return_lse`, the pair of the
    output and the log-sum-exp of the scaled scores: float32 [B, T, Nq], in
    nats, -inf for a row that sees no slot. Both are differentiable, so that
    attention over disjoint sets of slots can be merged. For a list of streams,
    the output and the log-sum-exp are tuples with one array for each stream:
    [B, T, M, H] and [B, T, M].

  Raises:
    ValueError: shapes or dtypes do not fit together, an array is empty, or the
      name of the implementation is unknown.
    UnsupportedError: the named implementation does not support the call; the
      message says what is unsupported.
  """
  streams, group = None, 1
  if isinstance(q, list | tuple):
    streams = tuple(q)
    # XLA drops this copy if the kernel reads the streams one by one.
    q = _stacked(streams, k)
    group = streams[0].shape[2] // k.shape[-2]
    visible = _for_all_heads(visible, group)
  gathered = k, v
  if k.ndim == 5 and k.shape == v.shape and k.shape[2] % 2 == 0:
    # XLA drops these copies if the kernel reads the gathered arrays in place.
    k, v = (shards.whole(x) for x in gathered)
  visible = _for_all_rows(q, visible)
  _check(q, k, v, visible, key_rank)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  # The kernels of this package take a number of visible slots for each row.
  visible_array = visible
  if isinstance(visible_array, int):
    visible_array = jnp.full(q.shape[:2], visible_array, jnp.int32)
  implementation = _choose(
    implementation, q, k, visible, visible_array, key_rank, return_lse
  )
  out: Any
  lse: Any = None
  match implementation:
    case "xla" if not return_lse:
      out = _xla(q, k, v, visible, key_rank, scale)
    case "reference" | "xla":
      # The log-sum-exp of jax.nn has the keys' dtype and no gradient.
      out, lse = reference.attention(q, k, v, visible, key_rank, scale)
    case "blockwise":
      out, lse = blockwise.attention(q, k, v, visible, key_rank, scale)
    case "cudnn":
      out = _cudnn(q, k, v, visible, scale)
    case "mosaic_gpu":
      # The kernel reads streams with the heads of k.
      given = streams if streams and group == 1 else q
      out, lse = _kernel(implementation).attention(
        given, *gathered, visible_array, key_rank, scale
      )
    case "mosaic_tpu":
      out, lse = _kernel(implementation).attention(
        q, k, v, visible_array, key_rank, scale
      )
    case _:
      raise ValueError(
        f"unknown attention implementation {implementation!r}; there are: "
        + ", ".join(IMPLEMENTATIONS)
      )
  if streams:
    G = len(streams)
    out = out if isinstance(out, tuple) else _of_streams(out, G, group)
    lse = lse if lse is None else _of_streams(lse, G, group)
  return (out, lse) if return_lse else out


def _kernel(name: str) -> types.ModuleType:
  """Return the module of the kernel `mosaic_gpu` or `mosaic_tpu`.

  It is imported at the first use only: the languages that the kernels are
  written in take a large part of a second, and few programs need them.
  """
  if name == "mosaic_gpu":
    from pallas_kernels.hopper import attention as hopper

    return hopper
  from pallas_kernels.tpu import attention as tpu

  return tpu


def _kernel_unsupported(name: str, *args: Any) -> str:
  """Name what a kernel of ours does not support in a call, or return ""."""
  return _kernel(name).unsupported(*args)


def _stacked(streams: tuple[jax.Array, ...], k: jax.Array) -> jax.Array:
  """Return streams [B, T, M, H] as one array, [B, T, Nq, H].

  Raises:
    ValueError: a stream has another shape or dtype, or heads that do not fit k.
  """
  described = [f"{jnp.result_type(x)} {jnp.shape(x)}" for x in streams]
  if (
    len(set(described)) != 1
    or streams[0].ndim != 4
    or streams[0].shape[2] % k.shape[-2]
  ):
    raise ValueError(
      "attention: each stream must be [B, T, M, H] of one dtype, with a "
      f"multiple M of the N={k.shape[-2]} heads of k; got "
      f"{', '.join(described) or 'no streams'}"
    )
  (B, T, M, H), N = streams[0].shape, k.shape[-2]
  if M > N:
    streams = tuple(x.reshape(B, T, N, M // N, H) for x in streams)
    return jnp.concatenate(streams, axis=3).reshape(B, T, -1, H)
  return jnp.stack(streams, axis=3).reshape(B, T, -1, H)


def _of_streams(x: jax.Array, G: int, group: int) -> tuple[jax.Array, ...]:
  """Return the parts of [B, T, Nq, ...] that belong to each of G streams.

  Args:
    x: [B, T, Nq, ...], with the heads as `_stacked` lays them.
    G: streams.
    group: query heads that a stream has for a key head.
  """
  if group == 1:
    return tuple(x[:, :, g::G] for g in range(G))
  B, T, Nq, *features = x.shape
  x = x.reshape(B, T, -1, G, group, *features)
  return tuple(
    x[:, :, :, g].reshape(B, T, Nq // G, *features) for g in range(G)
  )


def _for_all_heads(visible: Any, group: int) -> Any:
  """Return `visible` [B, T, G] of streams for each head in a group."""
  if group == 1 or not _is_integer_array(visible) or jnp.ndim(visible) != 3:
    return visible
  return jnp.repeat(visible, group, axis=2)


def _for_all_rows(q: jax.Array, visible: Any) -> jax.Array | int | None:
  """Return one number for all rows as an int, or as [B, T] if it is traced."""
  if not _is_integer_array(visible) or jnp.ndim(visible) or q.ndim != 4:
    return visible
  if isinstance(visible, jax.Array):
    return jnp.broadcast_to(visible, q.shape[:2])
  return int(visible)  # A scalar of numpy.


def _choose(
  implementation: str | None,
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | int | None,
  visible_array: jax.Array | None,
  key_rank: jax.Array | None,
  return_lse: bool,
) -> str:
  """Return the implementation to call: the named one, or the fastest.

  Raises:
    UnsupportedError: the named implementation does not support the call.
  """
  unsupported = {
    "cudnn": functools.partial(
      _cudnn_unsupported, q, k, visible, key_rank, return_lse
    ),
    **{
      name: functools.partial(
        _kernel_unsupported, name, q, k, visible_array, key_rank
      )
      for name in ("mosaic_gpu", "mosaic_tpu")
    },
  }
  if implementation is None:
    platform = devices.of(q, k).platform
    fastest = tuning.fastest(platform, q.shape[1], k.shape[1])
    plain = "xla"
    if q.shape[1] * k.shape[1] >= tuning.MANY_SCORES:
      plain = "blockwise"
    return next((x for x in fastest if not unsupported[x]()), plain)
  if implementation in unsupported and (
    reason := unsupported[implementation]()
  ):
    others = [x for x in unsupported if x != implementation]
    able = [x for x in others if not unsupported[x]()] + ["blockwise", "xla"]
    raise errors.UnsupportedError(
      f"attention {implementation!r} does not support {reason}; this call is "
      f"supported by {', '.join(map(repr, able))}"
    )
  return implementation


def _check(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
) -> None:
  """Raise ValueError if the arguments do not fit together."""
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(
      "attention wants q [B, T, Nq, H], and k and v [B, S, N, H] or, gathered "
      "from P devices, [P, B, S / P, N, H] with S / P even; got "
      f"{q.shape}, {k.shape}, {v.shape}"
    )
  if not (q.size and k.size):
    raise ValueError(
      f"attention of nothing: q {q.shape}, k {k.shape} must not have a "
      "dimension of size 0"
    )
  fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
  if not fits or q.shape[2] % k.shape[2]:
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
    raise ValueError(
      f"attention: q, k, v are {q.dtype}; give them a floating-point dtype"
    )
  _check_visible(q, k, visible, key_rank)


def _check_visible(
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
) -> None:
  """Raise ValueError if `visible` or `key_rank` does not fit q and k."""
  rows = q.shape[:2]
  group = q.shape[2] // k.shape[2]
  if visible is not None and not isinstance(visible, int):
    if not _is_integer_array(visible):
      raise ValueError("attention: visible must be an array of integers")
    if visible.shape not in (rows, (*rows, group)):
      raise ValueError(
        f"attention: visible {visible.shape} must be [B, T] = {rows} or "
        f"[B, T, Nq / N] = {(*rows, group)}"
      )
  if key_rank is None:
    return
  if not _is_integer_array(key_rank):
    raise ValueError("attention: key_rank must be an array of integers")
  if visible is None or isinstance(visible, int):
    raise ValueError("attention: key_rank needs an array of visible")
  if key_rank.shape != k.shape[:2]:
    raise ValueError(
      f"attention: key_rank {key_rank.shape} must be [B, S] = {k.shape[:2]}"
    )


def _is_integer_array(x: Any) -> bool:
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer)


def _xla(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
  scale: float,
) -> jax.Array:
  """Return the output of JAX's attention, compiled by XLA."""
  T, S = q.shape[1], k.shape[1]
  attend = functools.partial(
    jax.nn.dot_product_attention, scale=scale, implementation="xla"
  )
  if isinstance(visible, int) and visible > 0:
    return attend(q, k[:, :visible], v[:, :visible])
  if visible is None and T <= S:
    return attend(q, k, v, is_causal=True)
  mask = reference.mask(T, S, visible, key_rank)
  if T < S and q.shape[2] == k.shape[2]:
    return _few(q, k, v, mask, scale)
  if mask.shape[1] > 1:
    mask = jnp.tile(mask, (1, k.shape[2], 1, 1))
  out = attend(q, k, v, mask=mask)
  # jax.nn returns the mean of v for a row that sees no slot; ours returns 0.
  sees_a_slot = jnp.moveaxis(mask.any(axis=-1), 1, 2)
  return jnp.where(sees_a_slot[..., None], out, 0)


def _few(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  scale: float,
) -> jax.Array:
  """Return attention of few rows over many slots, without query groups.

  XLA computes products of one row as elementwise products and sums. The types
  of the results are named, so that nothing is rounded in between. A row that
  sees no slot gets weights of 0, so that no kernel has to change the output.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  score = scale * jnp.einsum(
    "btnh,bsnh->bnts", q, k, preferred_element_type=wide
  )
  least = -0.7 * jnp.finfo(wide).max
  weight = jax.nn.softmax(jnp.where(mask, score, least))
  weight = jnp.where(mask, weight, 0).astype(v.dtype)
  # XLA's CPU compiler lacks some products of bfloat16 with a float32 result.
  # It computes all of them in float32.
  result = None if devices.of(q, k).platform == "cpu" else wide
  out = jnp.einsum("bnts,bsnh->btnh", weight, v, preferred_element_type=result)
  return out.astype(v.dtype)


def _cudnn(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  scale: float,
) -> jax.Array:
  """Return the output of cuDNN's fused attention."""
  attend = functools.partial(
    jax.nn.dot_product_attention, scale=scale, implementation="cudnn"
  )
  if visible is None:
    return attend(q, k, v, is_causal=True)
  if isinstance(visible, int):
    return attend(q, k[:, :visible], v[:, :visible])
  return _cudnn_row(q, k, v, visible, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn_row(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  scale: float,
) -> jax.Array:
  """Return cuDNN's attention for T = 1; its gradient is the one of `_xla`.

  cuDNN has no gradient for a different number of slots in each sequence.
  """
  # cuDNN's result is undefined for a sequence that has no slot.
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


def _cudnn_row_forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  scale: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _cudnn_row(q, k, v, visible, scale), (q, k, v, visible)


def _cudnn_row_backward(
  scale: float, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
  *qkv, visible = residuals
  _, pull = jax.vjp(lambda q, k, v: _xla(q, k, v, visible, None, scale), *qkv)
  return *pull(d_out), None


_cudnn_row.defvjp(_cudnn_row_forward, _cudnn_row_backward)


def _cudnn_unsupported(
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
  return_lse: bool,
) -> str:
  """Name what cuDNN's attention does not support in this call, or return ""."""
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
  device = devices.of(q, k)
  # "8.0" to "12.1" on NVIDIA GPUs; other makers use names such as "gfx942".
  if device.capability[:1] not in ("1", "8", "9"):
    return f"device {device.kind!r} (NVIDIA, Ampere or newer, only)"
  return ""
