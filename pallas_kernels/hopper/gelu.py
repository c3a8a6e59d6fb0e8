"""GELU in its tanh form on Hopper, forward and backward."""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import mosaic, rows

# The arrays are read as rows of this width.
WIDTH = 256
# Rows of a tile, and thread blocks that a multiprocessor runs at once.
_FORWARD = 16, 8
_BACKWARD = 8, 8
# u = x (_LINEAR + _CUBIC x^2), with GELU(x) = x / (1 + exp(-2 u)).
_LINEAR = math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def forward(x: jax.Array) -> jax.Array:
  """Return GELU(x), like x: [M, 256]."""
  return _run("gelu_forward", _forward, _FORWARD, x)


def backward(x: jax.Array, d_out: jax.Array) -> jax.Array:
  """Return GELU'(x) * d_out, like x.

  Args:
    x: [M, 256].
    d_out: [M, 256].
  """
  return _run("gelu_backward", _backward, _BACKWARD, x, d_out)


def _run(name, body, sizes, x, *others):
  size, occupancy = sizes
  blocks = rows.block_count(x.shape[0], size, occupancy, x)
  return mosaic.kernel(
    functools.partial(body, size=size, blocks=blocks),
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    grid=(blocks,),
    grid_names=("block",),
    kernel_name=name,
  )(x, *others)


def _sigmoid_of_2u(x):
  exponent = x * (_LINEAR + _CUBIC * (x * x)) * (-2 / math.log(2))
  # The hardware has an inverse root, but no fast division for these kernels.
  root = lax.rsqrt(1.0 + jnp.exp2(exponent))
  return root * root


def _over(x, out, others, size, blocks, compute):
  layout = rows.wide_rows(WIDTH)

  def step(start, fresh, carry):
    del fresh
    at = pl.ds(start, size)
    values = [
      mosaic.load(ref.at[at], layout, optimized=False).astype(jnp.float32)
      for ref in (x, *others)
    ]
    mosaic.store(out.at[at], compute(*values).astype(out.dtype))
    return carry

  rows.over_tiles(x.shape[0], size, blocks, step)


def value(x: jax.Array) -> jax.Array:
  """Return GELU(x) of float32 numbers in registers."""
  return x * _sigmoid_of_2u(x)


def gradient(x: jax.Array, d_out: jax.Array) -> jax.Array:
  """Return GELU'(x) * d_out of float32 numbers in registers."""
  share = _sigmoid_of_2u(x)
  slope = 2 * x * (_LINEAR + 3 * _CUBIC * (x * x))
  return d_out * share * (1.0 + slope * (1.0 - share))


def _forward(x, out, *, size, blocks):
  _over(x, out, (), size, blocks, value)


def _backward(x, d_out, out, *, size, blocks):
  _over(x, out, (d_out,), size, blocks, gradient)
