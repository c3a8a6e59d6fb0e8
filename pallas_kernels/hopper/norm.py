"""Residual addition and RMSNorm on Hopper, forward and backward."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic, rows

# Rows of a tile, and thread blocks that a multiprocessor runs at once.
_FORWARD = 16, 8
_BACKWARD = 4, 8


def forward(
  x: jax.Array, update: jax.Array | None, scale: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
  """Return y = x + update and y / rms(y) * scale, like x.

  Args:
    x: [M, D].
    update: [M, D], or None for y = x.
    scale: float32 [D].
    epsilon: is added to the mean square.
  """
  M, D = x.shape
  size, occupancy = _FORWARD
  blocks = rows.block_count(M, size, occupancy, x)
  like_x = jax.ShapeDtypeStruct((M, D), x.dtype)
  kernel = mosaic.kernel(
    functools.partial(_forward, size=size, blocks=blocks, epsilon=epsilon),
    out_type=(like_x,) * (1 if update is None else 2),
    grid=(blocks,),
    grid_names=("block",),
    kernel_name="norm_forward",
  )
  if update is None:
    return x, kernel(x, scale)[0]
  return kernel(x, scale, update)


def _forward(x, scale, *refs, size, blocks, epsilon):
  *update_and_sum, out = refs
  M, D = x.shape
  layout = rows.wide_rows(D)
  factor = mosaic.load(scale, layout.reduce(0), optimized=False)
  shape = size, D

  def step(start, fresh, carry):
    del fresh
    at = pl.ds(start, size)
    value = mosaic.load(x.at[at], layout, optimized=False).astype(jnp.float32)
    if update_and_sum:
      update, total = update_and_sum
      more = mosaic.load(update.at[at], layout, optimized=False)
      rounded = (value + more.astype(jnp.float32)).astype(out.dtype)
      mosaic.store(total.at[at], rounded)
      value = rounded.astype(jnp.float32)
    root = _inverse_rms(value, epsilon)
    normed = value * mosaic.along_rows(root, shape, layout)
    normed *= mosaic.along_columns(factor, shape, layout)
    mosaic.store(out.at[at], normed.astype(out.dtype))
    return carry

  rows.over_tiles(M, size, blocks, step)


def _inverse_rms(value, epsilon):
  """Return 1 / rms of each row, float32 [rows]."""
  mean_square = (value * value).sum(axis=1) * (1 / value.shape[1])
  return lax.rsqrt(mean_square + epsilon)


def backward(
  y: jax.Array,
  scale: jax.Array,
  d_y: jax.Array,
  d_normed: jax.Array,
  epsilon: float,
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of y, like y, and of scale, float32 [D].

  The gradient of y is also the one of x and the one of the update.

  Args:
    y: [M, D], from the forward pass.
    scale: float32 [D].
    d_y: [M, D], the gradient that y has from elsewhere. It is added.
    d_normed: [M, D], the gradient of the result.
    epsilon: as in the forward pass.
  """
  M, D = y.shape
  size, occupancy = _BACKWARD
  blocks = rows.block_count(M, size, occupancy, y)
  gradient, partial_sums = mosaic.kernel(
    functools.partial(_backward, size=size, blocks=blocks, epsilon=epsilon),
    out_type=(
      jax.ShapeDtypeStruct((M, D), y.dtype),
      jax.ShapeDtypeStruct((blocks, D), jnp.float32),
    ),
    grid=(blocks,),
    grid_names=("block",),
    kernel_name="norm_backward",
    scratch_types=[plgpu.SMEM((size, D), jnp.float32)],
  )(y, scale, d_y, d_normed)
  return gradient, partial_sums.sum(axis=0)


def _backward(
  y, scale, d_y, d_normed, out, sums, scratch, *, size, blocks, epsilon
):
  M, D = y.shape
  layout = rows.wide_rows(D)
  factor = mosaic.load(scale, layout.reduce(0), optimized=False)
  shape = size, D

  def step(start, fresh, d_scale):
    at = pl.ds(start, size)
    value, from_elsewhere, gradient = (
      mosaic.load(ref.at[at], layout, optimized=False).astype(jnp.float32)
      for ref in (y, d_y, d_normed)
    )
    root = _inverse_rms(value, epsilon)
    normed = value * mosaic.along_rows(root, shape, layout)
    product = gradient * normed
    if M % size:
      d_scale += rows.only_fresh(product, start, fresh, layout)
    else:
      d_scale += product
    # d_normed * scale, less its part along the normed row.
    mean = (product * mosaic.along_columns(factor, shape, layout)).sum(
      axis=1
    ) * (1 / D)
    straight = gradient * mosaic.along_columns(factor, shape, layout)
    straight -= normed * mosaic.along_rows(mean, shape, layout)
    result = from_elsewhere + straight * mosaic.along_rows(root, shape, layout)
    mosaic.store(out.at[at], result.astype(out.dtype))
    return d_scale

  zero = mosaic.full(shape, 0.0, layout)
  d_scale = rows.over_tiles(M, size, blocks, step, zero)
  mosaic.store(
    sums.at[lax.axis_index("block")],
    rows.column_sums(d_scale, scratch, layout),
  )
