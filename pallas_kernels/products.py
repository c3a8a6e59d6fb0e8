"""Matrix products of a transformer, with the work on rows beside them.

On Hopper, kernels for narrow models do this work in the epilogue of a product.
Elsewhere, plain products stand beside the functions of rowwise.py.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import rowwise


def gelu_mlp(
  x: jax.Array,
  up: jax.Array,
  down: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Return GELU(x @ up) @ down, with GELU in its tanh form.

  The kernels have GELU in the epilogue of the first product, and its slope in
  the epilogue of the product that makes its gradient.

  Args:
    x: [..., D]; bfloat16, float16, float32 or float64.
    up: [D, F], like x.
    down: [F, D], like x.
    implementation: a name from ROWWISE_IMPLEMENTATIONS: GELU runs so, or the
      call raises. None chooses the fastest one that supports the call.

  Returns:
    An array like x.

  Raises:
    UnsupportedError: the named implementation supports no GELU of this kind.
  """
  rows = x.reshape(-1, x.shape[-1])
  if _serves(rows, up, implementation):
    return _mlp(rows, up, down).reshape(x.shape)
  return rowwise.gelu(x @ up, implementation=implementation) @ down


def project_heads(
  x: jax.Array,
  weight: jax.Array,
  parts: Sequence[rowwise.Part | None],
  *,
  epsilon: float = rowwise.EPSILON,
  implementation: str | None = None,
) -> tuple[jax.Array, ...]:
  """Return `rowwise.split_heads` of x @ weight.

  Args:
    x: [B, R, D]; bfloat16, float16, float32 or float64.
    weight: [D, C, N, H], like x; H is even.
    parts: C of them, as in `split_heads`.
    epsilon: as in `rms_norm`.
    implementation: a name from ROWWISE_IMPLEMENTATIONS: heads are split so, or
      the call raises. None chooses the fastest one that supports the call.

  Returns:
    C arrays [B, R, N, H], like x.

  Raises:
    UnsupportedError: the named implementation does not split heads of this
      kind.
  """
  B, R, D = x.shape
  *_, N, H = weight.shape
  rows, flat = x.reshape(-1, D), weight.reshape(D, -1)
  if _serves(rows, flat, implementation) and _projects(weight, parts):
    given = [part and rowwise.by_row(part) for part in parts]
    return tuple(
      part.reshape(B, R, N, H) for part in _heads(rows, weight, given, epsilon)
    )
  packed = jnp.einsum("brd,dcnh->brcnh", x, weight)
  return rowwise.split_heads(
    packed, parts, epsilon=epsilon, implementation=implementation
  )


def _serves(rows, weight, implementation):
  """Return whether the kernels are wanted, and support the product."""
  wanted = rowwise.wants_kernel(implementation, len(rows))
  if not wanted or rowwise.unsupported(rows):
    return False
  kernels, (D, F) = rowwise.hopper().products, weight.shape
  return (
    len(rows) >= kernels.ROWS
    and len(rows) % kernels.ROW_GROUP == 0
    and D % kernels.STEP == 0
    and D <= kernels.MOST_K
    and F % kernels.COLUMNS == 0
  )


def _projects(weight, parts):
  """Return whether the kernel normes and rotates heads of this kind."""
  *_, N, H = weight.shape
  normed = [part for part in parts if part is not None]
  return (
    H == rowwise.hopper().projection.H
    and N % 2 == 0
    and len(normed) > 0
    and None not in parts[: len(normed)]
    and all(part.scale is not None for part in normed)
    and all(
      part.by is None or part.by.position.shape[-1] == 1 for part in normed
    )
  )


@jax.custom_vjp
def _mlp(x, up, down):
  (hidden,) = rowwise.hopper().mlp.forward(x, up, keep_before=False)
  return hidden @ down


def _mlp_forward(x, up, down):
  hidden, before = rowwise.hopper().mlp.forward(x, up, keep_before=True)
  return hidden @ down, (x, up, down, hidden, before)


def _mlp_backward(residuals, d_out):
  x, up, down, hidden, before = residuals
  d_before = rowwise.hopper().mlp.backward(d_out, down, before)
  return d_before @ up.T, x.T @ d_before, hidden.T @ d_out


_mlp.defvjp(_mlp_forward, _mlp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _heads(x, weight, parts, epsilon):
  return _heads_forward(x, weight, parts, epsilon)[0]


def _heads_forward(x, weight, parts, epsilon):
  outs, before = rowwise.hopper().projection.forward(x, weight, parts, epsilon)
  return outs, (x, weight, parts, before)


def _heads_backward(epsilon, residuals, d_parts):
  x, weight, parts, before = residuals
  d_packed, d_scales = rowwise.hopper().heads.backward(
    before, parts, d_parts, epsilon
  )
  d_packed = d_packed.reshape(len(x), -1)
  d_x = d_packed @ weight.reshape(len(weight), -1).T
  d_weight = (x.T @ d_packed).reshape(weight.shape)
  return d_x, d_weight, rowwise.gradients_of_parts(d_scales)


_heads.defvjp(_heads_forward, _heads_backward)
