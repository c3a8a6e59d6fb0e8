"""RMSNorm of heads with rotary embedding on Hopper, forward and backward.

A row is one head of one slot, and its two halves are two arrays in registers.
Angles are computed here from positions: reading cosines and sines would cost
half as much as reading the heads.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic, rows

# Tiles of a step, and thread blocks that a multiprocessor runs at once.
_FORWARD = 1, 10
_BACKWARD = 1, 8
# 2 pi, as a number of few bits and the rest. Its product with a number of turns
# up to 2 ** 16 is exact.
_TURN = 6.28125
_TURN_REST = 2 * math.pi - _TURN


class Inputs(NamedTuple):
  """Arrays; in a kernel, references to arrays of the same shapes.

  Attributes:
    x: [M, H]: heads.
    scale: float32 [H], the scale of the norm.
    position: int32 [K, M]; pair j of a row is rotated by position[j % K]. K is
      0 if there is no rotation.
    frequency: float32 [H / 2], radians for each position.
  """

  x: jax.Array
  scale: jax.Array
  position: jax.Array
  frequency: jax.Array


def supports(H: int) -> bool:
  """Return whether the kernels support heads of size H."""
  return H % 2 == 0 and rows.narrow_lanes(H // 2) > 0


def forward(inputs: Inputs, epsilon: float) -> jax.Array:
  """Return R_p (x / rms(x) * scale), like x."""
  M, H = inputs.x.shape
  tiles, occupancy = _FORWARD
  size = tiles * rows.narrow_tile(H // 2)
  blocks = rows.block_count(M, size, occupancy, inputs.x)
  return mosaic.kernel(
    functools.partial(_forward, size=size, blocks=blocks, epsilon=epsilon),
    out_type=jax.ShapeDtypeStruct((M, H), inputs.x.dtype),
    grid=(blocks,),
    grid_names=("block",),
  )(*inputs)


def _forward(*refs, size, blocks, epsilon):
  *given, out = refs
  inputs = Inputs(*given)
  constants = _constants(inputs, size)

  def step(start, fresh, carry):
    del fresh
    at = pl.ds(start, size)
    halves = constants.load(inputs.x, at)
    root = constants.inverse_rms(halves, epsilon)
    first, second = (
      half * root * scale for half, scale in zip(halves, constants.scales)
    )
    if inputs.position.shape[0]:
      cos, sin = constants.rotation(inputs.position, at)
      first, second = first * cos - second * sin, second * cos + first * sin
    constants.store(out, at, (first, second))
    return carry

  rows.over_tiles(inputs.x.shape[0], size, blocks, step)


def backward(
  inputs: Inputs, d_out: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of x, like x, and of scale, float32 [H].

  Args:
    inputs: as in the forward pass.
    d_out: [M, H], the gradient of the result.
    epsilon: as in the forward pass.
  """
  M, H = inputs.x.shape
  tiles, occupancy = _BACKWARD
  size = tiles * rows.narrow_tile(H // 2)
  blocks = rows.block_count(M, size, occupancy, inputs.x)
  gradient, sums = mosaic.kernel(
    functools.partial(_backward, size=size, blocks=blocks, epsilon=epsilon),
    out_type=(
      jax.ShapeDtypeStruct((M, H), inputs.x.dtype),
      jax.ShapeDtypeStruct((blocks, H), jnp.float32),
    ),
    grid=(blocks,),
    grid_names=("block",),
    scratch_types=[plgpu.SMEM((size, H // 2), jnp.float32)],
  )(*inputs, d_out)
  return gradient, sums.sum(axis=0)


def _backward(*refs, size, blocks, epsilon):
  *given, d_out, out, sums, scratch = refs
  inputs = Inputs(*given)
  M, H = inputs.x.shape
  constants = _constants(inputs, size)

  def step(start, fresh, d_scales):
    at = pl.ds(start, size)
    halves = constants.load(inputs.x, at)
    first, second = constants.load(d_out, at)
    if inputs.position.shape[0]:
      # The inverse rotation.
      cos, sin = constants.rotation(inputs.position, at)
      first, second = first * cos + second * sin, second * cos - first * sin
    root = constants.inverse_rms(halves, epsilon)
    normed = [half * root for half in halves]
    products = [d * x for d, x in zip((first, second), normed)]
    seen = products
    if M % size:
      seen = [rows.only_fresh(x, start, fresh, constants.layout) for x in seen]
    d_scales = tuple(total + x for total, x in zip(d_scales, seen))
    mean = sum(x * scale for x, scale in zip(products, constants.scales))
    mean = constants.along_rows(mean.sum(axis=1) * (1 / H))
    results = [
      (d * scale - x * mean) * root
      for d, scale, x in zip((first, second), constants.scales, normed)
    ]
    constants.store(out, at, results)
    return d_scales

  zero = mosaic.full((size, H // 2), 0.0, constants.layout)
  d_scales = rows.over_tiles(M, size, blocks, step, (zero, zero))
  block = lax.axis_index("block")
  for half, d_scale in zip(_halves(H), d_scales):
    total = rows.column_sums(d_scale, scratch, constants.layout)
    mosaic.store(sums.at[block, half], total)


def _halves(H):
  return pl.ds(0, H // 2), pl.ds(H // 2, H // 2)


class _Constants(NamedTuple):
  """What all tiles of a thread block share.

  Attributes:
    layout: the layout of a half.
    shape: the shape of a half of a tile.
    scales: the scales of the two halves, repeated over the rows.
    frequency: radians for each position, repeated over the rows.
  """

  layout: object
  shape: tuple[int, int]
  scales: list[jax.Array]
  frequency: jax.Array

  def load(self, ref, at):
    """Return the two halves of some rows, float32."""
    return [
      mosaic.load(ref.at[at, half], self.layout, optimized=False).astype(
        jnp.float32
      )
      for half in _halves(ref.shape[1])
    ]

  def store(self, ref, at, values):
    """Store the two halves of some rows."""
    for half, value in zip(_halves(ref.shape[1]), values):
      mosaic.store(ref.at[at, half], value.astype(ref.dtype))

  def along_rows(self, vector):
    return mosaic.along_rows(vector, self.shape, self.layout)

  def inverse_rms(self, halves, epsilon):
    """Return 1 / rms of each row, repeated over the columns of a half."""
    first, second = halves
    total = (first * first + second * second).sum(axis=1)
    mean_square = total * (1 / (2 * self.shape[1]))
    return self.along_rows(lax.rsqrt(mean_square + epsilon))

  def rotation(self, position, at):
    """Return the cosines and sines of some rows."""
    turning = [
      self.along_rows(
        mosaic.load(
          position.at[k, at], self.layout.reduce(1), optimized=False
        ).astype(jnp.float32)
      )
      for k in range(position.shape[0])
    ]
    angle = turning[0]
    if len(turning) > 1:
      column = plgpu.broadcasted_iota(
        jnp.int32, self.shape, 1, layout=self.layout
      )
      for k, other in enumerate(turning[1:], 1):
        angle = jnp.where(lax.rem(column, len(turning)) == k, other, angle)
    angle *= self.frequency
    # The hardware computes sines of small angles only.
    turns = (angle * (1 / (2 * math.pi)) + 0.5).astype(jnp.int32)
    turns = turns.astype(jnp.float32)
    angle = (angle - turns * _TURN) - turns * _TURN_REST
    return jnp.cos(angle), jnp.sin(angle)


def _constants(inputs, size):
  H = inputs.x.shape[1]
  layout, shape = rows.narrow_rows(H // 2), (size, H // 2)

  def along_columns(ref):
    vector = mosaic.load(ref, layout.reduce(0), optimized=False)
    return mosaic.along_columns(vector, shape, layout)

  return _Constants(
    layout,
    shape,
    [along_columns(inputs.scale.at[half]) for half in _halves(H)],
    along_columns(inputs.frequency),
  )
