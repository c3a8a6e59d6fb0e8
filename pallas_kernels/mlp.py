"""The MLP of a transformer: two matrix products with a GELU between them."""

import types

import jax

from pallas_kernels import rowwise, tuning


def gelu_mlp(
  x: jax.Array,
  up: jax.Array,
  down: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Return GELU(x @ up) @ down, with GELU in its tanh form.

  The kernels of narrow models have GELU in the epilogue of the first product,
  and its slope in the epilogue of the product that makes its gradient. Where
  they do not serve, `rowwise.gelu` stands between plain products.

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
  wanted = implementation == "mosaic_gpu" or (
    implementation is None and len(rows) >= tuning.LEAST_ROWS
  )
  if wanted and _serves(rows, up):
    return _kernel(rows, up, down).reshape(x.shape)
  return rowwise.gelu(x @ up, implementation=implementation) @ down


def _hopper() -> types.ModuleType:
  from pallas_kernels.hopper import mlp as hopper_mlp

  return hopper_mlp


def _serves(rows, up):
  """Return whether the kernels support products of these rows."""
  if rowwise.unsupported(rows):
    return False
  kernels, (D, F) = _hopper(), up.shape
  return (
    len(rows) >= kernels.ROWS
    and D % kernels.STEP == 0
    and D <= kernels.MOST_K
    and F % kernels.COLUMNS == 0
  )


@jax.custom_vjp
def _kernel(x, up, down):
  (hidden,) = _hopper().forward(x, up, keep_before=False)
  return hidden @ down


def _forward(x, up, down):
  hidden, before = _hopper().forward(x, up, keep_before=True)
  return hidden @ down, (x, up, down, hidden, before)


def _backward(residuals, d_out):
  x, up, down, hidden, before = residuals
  d_before = _hopper().backward(d_out, down, before)
  return d_before @ up.T, x.T @ d_before, hidden.T @ d_out


_kernel.defvjp(_forward, _backward)
