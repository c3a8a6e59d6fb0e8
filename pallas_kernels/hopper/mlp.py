"""GELU, or its slope, in the epilogue of a matrix product on Hopper."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels.hopper import gelu, products


def forward(
  x: jax.Array, up: jax.Array, keep_before: bool
) -> tuple[jax.Array, ...]:
  """Return GELU(x @ up), [M, N], and x @ up before it if that is kept.

  Args:
    x: [M, K]; the shapes are those of products.run.
    up: [K, N], like x.
    keep_before: whether to return x @ up.
  """

  def epilogue(block, pieces, others, outs):
    del others
    for piece in pieces:
      rounded = piece.product.astype(x.dtype)
      value = gelu.value(rounded.astype(jnp.float32)).astype(x.dtype)
      values = [value, rounded][: len(outs)]
      block.write(piece, values, [out.at[_at(piece)] for out in outs])

  count = 2 if keep_before else 1
  out = jax.ShapeDtypeStruct((x.shape[0], up.shape[1]), x.dtype)
  return tuple(
    products.run("up_gelu", x, up, [out] * count, epilogue, results=count)
  )


def backward(d_out: jax.Array, down: jax.Array, before: jax.Array) -> jax.Array:
  """Return (d_out @ down^T) * GELU'(before), [M, N].

  Args:
    d_out: [M, K], as `x` of `forward`.
    down: [N, K].
    before: [M, N].
  """

  def epilogue(block, pieces, others, outs):
    del others
    for piece in pieces:
      value = gelu.gradient(block.before(piece), piece.product)
      target = outs[0].at[_at(piece)]
      block.write_over(piece, value.astype(before.dtype), target)

  (out,) = products.run(
    "down_gelu_backward",
    d_out,
    down,
    [jax.ShapeDtypeStruct(before.shape, before.dtype)],
    epilogue,
    before=before,
    is_transposed=True,
  )
  return out


def _at(piece):
  return pl.ds(piece.row, products.ROWS), pl.ds(piece.column, products.STEP)
