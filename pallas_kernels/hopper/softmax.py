"""Steps of the softmax that the Hopper kernels share.

Exponentials and logarithms have base 2, which the hardware computes.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic

LN2 = math.log(2)


def scores(
  q: mosaic.Ref | jax.Array,
  k: mosaic.Ref,
  size: int,
  wait: Callable[[], None] | None = None,
) -> jax.Array:
  """Return q @ k.T in registers, float32 [64, size].

  Args:
    q: 64 rows, a reference or an array in registers.
    k: the reference of `size` slots.
    size: slots.
    wait: what to wait for while the product runs; None is nothing.
  """

  def multiply(score):
    mosaic.wgmma(score, q, mosaic.transposed(k))
    if wait is not None:
      wait()
    return mosaic.read_accumulator(score)

  return mosaic.with_accumulators(multiply, (hopper_masks.ROWS, size))


def finish(
  accumulator: jax.Array,
  row_max: jax.Array,
  row_sum: jax.Array,
  out: mosaic.Ref,
  lse: mosaic.Ref,
) -> jax.Array:
  """Write output and log-sum-exp of 64 rows to shared memory.

  Args:
    accumulator: sum of the weighted values, float32 [64, H].
    row_max: largest scaled score of each row, base 2.
    row_sum: sum of the weights of each row, relative to row_max.
    out: reference [64, H].
    lse: reference [64], base 2; +inf is written for a row that sees no slot.

  Returns:
    The output before rounding, float32 [64, H].
  """
  sees_a_slot = row_sum > 0
  divisor = jnp.where(sees_a_slot, row_sum, 1.0)
  inverse = jnp.where(sees_a_slot, 1 / divisor, 0.0)
  accumulator *= mosaic.along_rows(inverse, accumulator.shape)
  out[...] = accumulator.astype(out.dtype)
  logarithm = jnp.log(jnp.where(sees_a_slot, row_sum, 1.0)) / LN2
  lse[...] = jnp.where(sees_a_slot, row_max + logarithm, jnp.inf)
  return accumulator


def exponents(
  score: jax.Array, log_sum: jax.Array, scale: float, row_axis: int = 0
) -> jax.Array:
  """Return the base-2 logarithm of the attention weights.

  Args:
    score: unscaled scores of 64 rows and some slots, float32.
    log_sum: log-sum-exp of each row, float32 [64], base 2.
    scale: factor of the scores.
    row_axis: axis of the rows in `score`, 0 or 1.
  """
  broadcast = mosaic.along_columns if row_axis else mosaic.along_rows
  exponent = score * (scale / LN2)
  return exponent - broadcast(log_sum, exponent.shape)
