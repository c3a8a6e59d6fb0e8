"""The work on rows between the matrix products of a transformer.

Each function computes in float32 and rounds once, to the dtype of its input.
Each has one kernel for the forward pass and one for the backward pass on
Hopper. Everywhere else it is plain JAX. The gradients are deterministic.
"""

import functools
import math
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import devices, errors, tuning

ROWWISE_IMPLEMENTATIONS = ("xla", "mosaic_gpu")
EPSILON = 1e-6  # The default of what is added to the mean square of a norm.


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  update: jax.Array | None = None,
  *,
  epsilon: float = EPSILON,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Return y = x + update and y / rms(y) * scale (RMSNorm, arXiv 1910.07467).

  In a pre-norm block y goes two ways: into the norm, and past it. Use the first
  result for the second way, also without an update. Then the backward kernel
  adds the gradients of the two ways itself.

  Args:
    x: [..., D]; bfloat16, float16, float32 or float64.
    scale: float32 [D].
    update: like x. None means y = x.
    epsilon: is added to the mean square of a row.
    implementation: a name from ROWWISE_IMPLEMENTATIONS: this one runs, or the
      call raises. None chooses the fastest one that supports the call.

  Returns:
    y, rounded like x, and its normed rows, like x.

  Raises:
    UnsupportedError: the named implementation does not support the call.
  """
  D = x.shape[-1]
  reason = unsupported(x)
  if not reason and not hopper().rows.vector(D):
    reason = f"D={D} (multiples of 64 only)"
  if _choose("rms_norm", implementation, x.size // D, reason) == "xla":
    y = x if update is None else x + update
    return y, normalised(y, scale, epsilon).astype(y.dtype)
  return _norm_kernel(x, update, scale, epsilon)


# The norm is recomputed in the backward pass. Over unrolled layers, the
# compiler finds by itself that saving x is enough. A loop over layers would
# save all float32 values of the norm.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def normalised(
  x: jax.Array, scale: jax.Array, epsilon: float = EPSILON
) -> jax.Array:
  """Return x / rms(x) * scale in plain JAX, float32 [..., D].

  Args:
    x: [..., D].
    scale: float32 [D].
    epsilon: is added to the mean square. Pass it by its place.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(power + epsilon) * scale


class Rotation(NamedTuple):
  """The rotary embedding R_p of some rows (arXiv 2104.09864).

  Pairs are half-split: pair j has the elements j and j + H / 2. It is rotated
  by position[j % K] * frequency[j] radians.

  Attributes:
    position: int32 [B, R, K], not negative: the positions of each row.
    frequency: float32 [H / 2].
    cos: float32 [B, R, 1, H / 2], the cosines of the angles.
    sin: like cos, the sines.
  """

  position: jax.Array
  frequency: jax.Array
  cos: jax.Array
  sin: jax.Array


def rotation(
  position: jax.Array,
  H: int,
  base: float,
  factors: jax.Array | None = None,
) -> Rotation:
  """Return the Rotation of rows; all layers can share it.

  Args:
    position: int32 [B, R, K], see Rotation.
    H: the width of a head, even.
    base: the frequency of pair j is base ** (-2 j / H).
    factors: float32 [H / 2], factors of the frequencies. None means 1 for all.
  """
  frequency = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
  if factors is not None:
    frequency *= factors
  repeats = -(-H // (2 * position.shape[-1]))
  by_pair = jnp.tile(position, repeats)[..., : H // 2]
  angle = by_pair[..., None, :].astype(jnp.float32) * frequency
  return Rotation(position, frequency, jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, by: Rotation | None) -> jax.Array:
  """Return R_p x.

  Args:
    x: float32 [B, R, N, H]: N heads of each row.
    by: the rotation R_p. None means no rotation.
  """
  if by is None:
    return x
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [
      first * by.cos - second * by.sin,
      second * by.cos + first * by.sin,
    ],
    axis=-1,
  )


class Part(NamedTuple):
  """What `split_heads` does to one of the parts.

  Attributes:
    scale: float32 [H], the scale of the norm. None means no norm, which no
      kernel supports.
    by: the rotation of the rows. None means no rotation.
  """

  scale: jax.Array | None
  by: Rotation | None


def split_heads(
  packed: jax.Array,
  parts: Sequence[Part | None],
  *,
  epsilon: float = EPSILON,
  implementation: str | None = None,
) -> tuple[jax.Array, ...]:
  """Split packed projections into parts: normed, rotated heads.

  Part c is R_p (x / rms(x) * scale) of x = packed[:, :, c], over the last axis.
  Values are neither normed nor rotated. The backward pass packs the gradients.

  Args:
    packed: [B, R, C, N, H], such as queries, keys and values; H is even.
    parts: C of them. None takes a part as it is.
    epsilon: as in `rms_norm`.
    implementation: as in `rms_norm`.

  Returns:
    C arrays [B, R, N, H], like packed.

  Raises:
    UnsupportedError: the named implementation does not support the call.
  """
  B, R, C, N, H = packed.shape
  reason = unsupported(packed) or hopper().heads.unsupported(packed.shape)
  if any(part is not None and part.scale is None for part in parts):
    reason = reason or "heads without a norm"
  if _choose("split_heads", implementation, B * R, reason) == "xla":
    return tuple(
      x if part is None else _plain_head(x, part, epsilon)
      for x, part in zip(jnp.moveaxis(packed, 2, 0), parts)
    )
  outs = _heads_kernel(
    packed.reshape(B * R, C, N, H),
    [part and by_row(part) for part in parts],
    epsilon,
  )
  return tuple(x.reshape(B, R, N, H) for x in outs)


def _plain_head(x, part, epsilon):
  """Return the heads x [B, R, N, H] of a part, normed and rotated."""
  if part.scale is None:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  else:
    wide = normalised(x, part.scale, epsilon)
  return rotate(wide, part.by).astype(x.dtype)


def by_row(part: Part) -> Any:
  """Return what the kernels take of a part; its positions are [K, B * R]."""
  if part.by is None:
    return hopper().heads.Part(part.scale, None, None)
  position = jnp.moveaxis(part.by.position, 2, 0)
  position = position.reshape(len(position), -1)
  return hopper().heads.Part(part.scale, position, part.by.frequency)


def gelu(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
  """Return GELU(x) in its tanh form (arXiv 1606.08415), like x.

  Args:
    x: an array of floating-point numbers.
    implementation: as in `rms_norm`.

  Raises:
    UnsupportedError: the named implementation does not support the call.
  """
  reason, rows = unsupported(x), 0
  if not reason:
    rows, rest = divmod(x.size, hopper().gelu.WIDTH)
    if rest:
      width = hopper().gelu.WIDTH
      reason = f"{x.size} elements (multiples of {width} only)"
  if _choose("gelu", implementation, rows, reason) == "xla":
    return _plain_gelu(x)
  return _gelu_kernel(x)


def hopper() -> types.ModuleType:
  """Return the package of the kernels; it is imported at the first use only.

  See api._kernel.
  """
  from pallas_kernels import hopper as package
  from pallas_kernels.hopper import (  # noqa: F401
    gelu,
    heads,
    mlp,
    norm,
    products,
    projection,
    rows,
  )

  return package


def unsupported(x: jax.Array) -> str:
  """Name what no kernel over rows supports in this call, or return ""."""
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"{x.dtype} (bfloat16 and float16 only)"
  device = devices.of(x)
  if device.capability != "9.0":
    return f"device {device.kind!r} (NVIDIA Hopper only)"
  return ""


def wants_kernel(implementation: str | None, rows: int) -> bool:
  """Return whether a kernel is to run, if it supports the call.

  Plain JAX is faster over few rows.

  Args:
    implementation: the caller's choice, as in `rms_norm`.
    rows: the number of rows.
  """
  if implementation is None:
    return rows >= tuning.LEAST_ROWS
  return implementation == "mosaic_gpu"


def _choose(function, implementation, rows, reason):
  """Return the implementation to call.

  Args:
    function: the name of the function, for messages.
    implementation: the caller's choice.
    rows: the number of rows.
    reason: what the kernels do not support, or "".
  """
  if implementation not in (None, *ROWWISE_IMPLEMENTATIONS):
    raise ValueError(
      f"unknown {function} implementation {implementation!r}; there are: "
      + ", ".join(ROWWISE_IMPLEMENTATIONS)
    )
  if not wants_kernel(implementation, rows):
    return "xla"
  if implementation is None:
    return "xla" if reason else "mosaic_gpu"
  if not reason and rows < hopper().rows.LEAST_ROWS:
    reason = f"{rows} rows ({hopper().rows.LEAST_ROWS} or more)"
  if reason:
    raise errors.UnsupportedError(
      f"{function} 'mosaic_gpu' does not support {reason}"
    )
  return "mosaic_gpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_kernel(x, update, scale, epsilon):
  rows = x.reshape(-1, x.shape[-1])
  more = None if update is None else update.reshape(rows.shape)
  y, normed = hopper().norm.forward(rows, more, scale, epsilon)
  return y.reshape(x.shape), normed.reshape(x.shape)


def _norm_forward(x, update, scale, epsilon):
  y, normed = _norm_kernel(x, update, scale, epsilon)
  mark = None if update is None else ()
  return (y, normed), (y, scale, mark)


def _norm_backward(epsilon, residuals, gradients):
  y, scale, mark = residuals
  rows, d_y, d_normed = (a.reshape(-1, y.shape[-1]) for a in (y, *gradients))
  d_y, d_scale = hopper().norm.backward(rows, scale, d_y, d_normed, epsilon)
  d_y = d_y.reshape(y.shape)
  return d_y, None if mark is None else d_y, d_scale


_norm_kernel.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _heads_kernel(packed, parts, epsilon):
  return hopper().heads.forward(packed, parts, epsilon)


def _heads_forward(packed, parts, epsilon):
  return _heads_kernel(packed, parts, epsilon), (packed, parts)


def _heads_backward(epsilon, residuals, d_parts):
  packed, parts = residuals
  d_packed, d_scales = hopper().heads.backward(packed, parts, d_parts, epsilon)
  return d_packed, gradients_of_parts(d_scales)


def gradients_of_parts(d_scales: Sequence[jax.Array | None]) -> list[Any]:
  """Return the gradients of the parts that `by_row` returns."""
  return [
    None if d_scale is None else hopper().heads.Part(d_scale, None, None)
    for d_scale in d_scales
  ]


_heads_kernel.defvjp(_heads_forward, _heads_backward)


@jax.checkpoint
def _plain_gelu(x):
  """Return GELU(x), computed in float32.

  The formula uses 1 + tanh(u) = 2 sigmoid(2 u), because an exponential is
  cheaper than a tanh. The value is recomputed in the backward pass, because
  saving and reading the slope would cost more.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
  return (wide * jax.nn.sigmoid(2 * u)).astype(x.dtype)


@jax.custom_vjp
def _gelu_kernel(x):
  rows = x.reshape(-1, hopper().gelu.WIDTH)
  return hopper().gelu.forward(rows).reshape(x.shape)


def _gelu_forward(x):
  return _gelu_kernel(x), x


def _gelu_backward(x, d_out):
  rows, d_out = (a.reshape(-1, hopper().gelu.WIDTH) for a in (x, d_out))
  return (hopper().gelu.backward(rows, d_out).reshape(x.shape),)


_gelu_kernel.defvjp(_gelu_forward, _gelu_backward)
