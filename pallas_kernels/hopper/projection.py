"""A projection to heads on Hopper: the product, split, normed and rotated.

The work of heads.forward is in the epilogue of the product that makes the
packed heads. So heads that are copied are written once, and not read again. The
backward pass is that of heads.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import heads, mosaic, products

# The width of a head: a piece of the product has one head.
H = products.STEP
_HALF = H // 2
# The time of a strip that is copied, relative to one that is normed.
_COPIED = 0.5


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

  def epilogue(block, pieces, others, outs):
    *outs, before = outs
    for c, (part, out) in enumerate(zip(others, outs)):
      # A strip has columns of one part only.
      is_mine = lax.div(pieces[0].column, N * H) == c

      @pl.when(is_mine)
      def _(c=c, part=part, out=out):
        head = part and _Head.load(part, pieces[0].row)
        for piece in pieces:
          rounded = piece.product.astype(x.dtype)
          values = _halves(rounded)
          targets = _targets(out, piece.row, piece.column - c * N * H)
          if head:
            targets += _targets(before, piece.row, piece.column)
            values = head.forward(values, epsilon) + values
          block.write(piece, values, targets)

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
    costs=[
      1.0 if part else _COPIED
      for part in parts
      for _ in range(N * H // products.COLUMNS)
    ],
  )
  return (
    [part.reshape(M, N, H) for part in outs],
    before.reshape(M, normed, N, H),
  )


def _halves(values):
  return [values[:, i : i + _HALF] for i in (0, _HALF)]


def _targets(ref, row, column):
  """Return the places of the halves of a head."""
  rows = pl.ds(row, products.ROWS)
  return [ref.at[rows, pl.ds(column + i, _HALF)] for i in (0, _HALF)]


class _Head(NamedTuple):
  """Norms and rotates heads of some rows, in registers.

  Attributes:
    scales: references of the two halves of the scale.
    rotation: cosines and sines, repeated over a half; None for no rotation.
  """

  scales: list[mosaic.Ref]
  rotation: tuple[jax.Array, jax.Array] | None

  @classmethod
  def load(cls, part, row):
    """Load what the heads of some rows share."""
    scales = [part.scale.at[pl.ds(i, _HALF)] for i in (0, _HALF)]
    if part.position is None:
      return cls(scales, None)
    position = mosaic.load(
      part.position.at[0, pl.ds(row, products.ROWS)],
      mosaic.ROW_LAYOUT,
      optimized=False,
    )
    angle = _along_rows(position.astype(jnp.float32))
    return cls(
      scales, heads.cos_and_sin(angle * _along_columns(part.frequency))
    )

  def forward(self, halves, epsilon):
    """Return the halves of a head, normed and rotated.

    Args:
      halves: [ROWS, H / 2] each, in registers.
      epsilon: is added to the mean square.
    """
    dtype = halves[0].dtype
    halves = [half.astype(jnp.float32) for half in halves]
    total = sum((half * half).sum(axis=1) for half in halves)
    root = _along_rows(lax.rsqrt(total * (1 / H) + epsilon))
    first, second = (
      half * root * _along_columns(scale)
      for half, scale in zip(halves, self.scales)
    )
    if self.rotation is not None:
      cos, sin = self.rotation
      first, second = first * cos - second * sin, second * cos + first * sin
    return [first.astype(dtype), second.astype(dtype)]


def _along_rows(vector):
  return mosaic.along_rows(vector, (products.ROWS, _HALF))


def _along_columns(ref):
  vector = mosaic.load(ref, mosaic.COLUMN_LAYOUT, optimized=False)
  return mosaic.along_columns(vector, (products.ROWS, _HALF))
