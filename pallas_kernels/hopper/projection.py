"""A projection to heads on Hopper: the product, split, normed and rotated.

The work of heads.forward is in the epilogue of the product that makes the
packed heads. So heads that are copied are written once, and not read again. The
backward pass is that of heads.py.
"""

from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import heads, mosaic, products

# The width of a head: a piece of the product has one head.
H = products.STEP
_HALF = H // 2


def forward(
  x: jax.Array,
  weight: jax.Array,
  parts: Sequence[heads.Part | None],
  epsilon: float,
) -> tuple[list[jax.Array], jax.Array]:
  """Return the C parts, [M, N, H] each, and what was normed.

  Args:
    x: [M, K]; the shapes are those of products.run.
    weight: [K, C, N, H], like x; H is 64 and N is even.
    parts: C parts; the first ones are normed, and at least one is. Their
      positions are [1, M], or None.
    epsilon: is added to the mean square.

  Returns:
    The parts, and the products of those that are normed, [M, parts, N, H].
  """
  M, N = len(x), weight.shape[2]
  normed = sum(part is not None for part in parts)

  def epilogue(block, product, piece, others, outs):
    *outs, before = outs
    rounded = product.astype(x.dtype)
    for c, (part, out) in enumerate(zip(others, outs)):
      is_mine = lax.div(piece.column, N * H) == c
      column = piece.column - c * N * H

      @pl.when(is_mine)
      def _(part=part, out=out, column=column):
        targets = _targets(out, piece.row, column)
        if part is None:
          block.write(piece, _halves(rounded), targets)
          return
        values = _Head(part, piece.row).forward(rounded, epsilon)
        block.write(
          piece,
          [value.astype(x.dtype) for value in values] + _halves(rounded),
          targets + _targets(before, piece.row, piece.column),
        )

  def out(columns):
    return jax.ShapeDtypeStruct((M, columns), x.dtype)

  *outs, before = products.run(
    "project_heads",
    x,
    weight.reshape(len(weight), -1),
    [*(out(N * H) for _ in parts), out(normed * N * H)],
    epilogue,
    list(parts),
    results=4,
    width=_HALF,
  )
  return (
    [part.reshape(M, N, H) for part in outs],
    before.reshape(M, normed, N, H),
  )


def _halves(values):
  return [values[:, i : i + _HALF] for i in (0, _HALF)]


def _targets(ref, row, column):
  """Return the places of the halves of a head."""
  rows = pl.ds(row, products.STEP)
  return [ref.at[rows, pl.ds(column + i, _HALF)] for i in (0, _HALF)]


class _Head:
  """Norms and rotates a head of some rows, in registers."""

  def __init__(self, part, row):
    self._part, self._row = part, row

  def forward(self, rounded, epsilon):
    """Return the halves, float32.

    Args:
      rounded: [STEP, H], rounded products.
      epsilon: is added to the mean square.
    """
    halves = [half.astype(jnp.float32) for half in _halves(rounded)]
    total = sum((half * half).sum(axis=1) for half in halves)
    root = lax.rsqrt(total * (1 / H) + epsilon)
    first, second = (
      half * self._along_rows(root) * self._along_columns(self._scale(i))
      for i, half in enumerate(halves)
    )
    if self._part.position is None:
      return first, second
    cos, sin = heads.cos_and_sin(self._angle())
    return first * cos - second * sin, second * cos + first * sin

  def _scale(self, half):
    return self._part.scale.at[pl.ds(half * _HALF, _HALF)]

  def _angle(self):
    rows = pl.ds(self._row, products.STEP)
    position = mosaic.load(
      self._part.position.at[0, rows], mosaic.ROW_LAYOUT, optimized=False
    )
    turning = self._along_rows(position.astype(jnp.float32))
    return turning * self._along_columns(self._part.frequency)

  def _along_rows(self, vector):
    return mosaic.along_rows(vector, (products.STEP, _HALF))

  def _along_columns(self, ref):
    vector = mosaic.load(ref, mosaic.COLUMN_LAYOUT, optimized=False)
    return mosaic.along_columns(vector, (products.STEP, _HALF))
