"""Heads of packed projections on Hopper: split, normed and rotated.

One matrix product makes the queries, keys and values of a row side by side. The
forward kernel splits them. It norms queries and keys, and rotates them by their
positions. The backward kernel packs the gradients, so that one matrix product
takes them on.

The two halves of a head are two arrays in registers. Angles are computed here
from positions. Reading cosines and sines would cost half as much as reading the
heads.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic, rows

# Thread blocks that a multiprocessor runs at once.
_FORWARD = 5
_BACKWARD = 4
# 2 pi, as a number of few bits and the rest. The product of the first with a
# number of turns up to 2 ** 16 is exact.
_TURN = 6.28125
_TURN_REST = 2 * math.pi - _TURN


class Part(NamedTuple):
  """The treatment of one of the parts; in a kernel, references.

  Attributes:
    scale: float32 [H], the scale of the norm.
    position: int32 [K, M], or None for no rotation. Pair j of a row is rotated
      by position[j % K].
    frequency: float32 [H / 2], radians for each position; None without them.
  """

  scale: jax.Array
  position: jax.Array | None
  frequency: jax.Array | None


def forward(
  packed: jax.Array, parts: Sequence[Part | None], epsilon: float
) -> list[jax.Array]:
  """Return the C parts, [M, N, H] each.

  Args:
    packed: [M, C, N, H].
    parts: C parts. None copies a part.
    epsilon: is added to the mean square.
  """
  M, _, N, H = packed.shape
  share, blocks = _share(packed, range(len(parts)), _FORWARD)

  def body(packed, parts, outs):
    def work(c, tiles):
      handler = parts[c] and _Handler.load(parts[c], share)

      def step(tile, carry):
        halves = share.load(packed, tile, c)
        if handler:
          halves = handler.forward(halves, tile, epsilon)
        share.store(outs[c], tile, None, halves)
        return carry

      tiles(step)

    share.deal(blocks, work)

  (outs,) = mosaic.kernel(
    body,
    out_type=([jax.ShapeDtypeStruct((M, N, H), packed.dtype) for _ in parts],),
    grid=(blocks,),
    grid_names=("block",),
    kernel_name="heads_forward",
  )(packed, list(parts))
  return outs


def backward(
  packed: jax.Array,
  parts: Sequence[Part | None],
  d_parts: Sequence[jax.Array],
  epsilon: float,
) -> tuple[jax.Array, list[jax.Array | None]]:
  """Return the gradients of the packed parts, and of the scales.

  Args:
    packed: [M, C, N, H], as in the forward pass; or only the parts that are
      normed, beside each other.
    parts: as in the forward pass.
    d_parts: C gradients, [M, N, H] each.
    epsilon: as in the forward pass.

  Returns:
    The gradient [M, C, N, H], and a list of C gradients float32 [H], or None
    for a part that is copied.
  """
  M, _, N, H = packed.shape
  normed = [c for c, part in enumerate(parts) if part]
  places = normed if packed.shape[1] == len(parts) else range(len(normed))
  place = dict(zip(normed, places))
  # The gradient of a part that is copied moves two arrays instead of three.
  group = [c for c, part in enumerate(parts) for _ in range(3 if part else 2)]
  share, blocks = _share(packed, group, _BACKWARD)

  def body(packed, parts, d_parts, out, sums, scratch):
    def work(c, tiles):
      zero = mosaic.full(share.shape, 0.0, share.layout)
      target = sums.at[lax.axis_index("block")]
      if not parts[c]:

        def copy(tile, carry):
          share.store(out, tile, c, share.load(d_parts[c], tile, None))
          return carry

        tiles(copy)
        share.store_sums(target, scratch, (zero, zero))
        return
      handler = _Handler.load(parts[c], share)

      def step(tile, total):
        gradients, more = handler.backward(
          share.load(packed, tile, place[c]),
          share.load(d_parts[c], tile, None),
          tile,
          epsilon,
        )
        share.store(out, tile, c, gradients)
        return tuple(x + y for x, y in zip(total, more))

      share.store_sums(target, scratch, tiles(step, (zero, zero)))

    share.deal(blocks, work)

  d_packed, sums = mosaic.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((M, len(parts), N, H), packed.dtype),
      jax.ShapeDtypeStruct((blocks, H), jnp.float32),
    ),
    grid=(blocks,),
    grid_names=("block",),
    scratch_types=[plgpu.SMEM(share.shape, jnp.float32)],
    kernel_name="heads_backward",
  )(packed, list(parts), list(d_parts))
  by_place = sums.reshape(-1, len(group), H).sum(axis=0)
  return d_packed, [
    part and by_place[group.index(c) : group.index(c) + 3].sum(axis=0)
    for c, part in enumerate(parts)
  ]


def unsupported(packed_shape: tuple[int, ...]) -> str:
  """Name what the kernels do not support in this call, or return ""."""
  H = packed_shape[-1]
  if H % 2 or not rows.narrow_lanes(H // 2):
    return f"H={H} (32, 64, 128 and 256 only)"
  return ""


def cos_and_sin(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the cosines and sines of angles from 0 to 2 ** 16 turns.

  Args:
    angle: float32, in registers.
  """
  # The hardware computes sines and cosines of small angles only.
  turns = (angle * (1 / (2 * math.pi)) + 0.5).astype(jnp.int32)
  turns = turns.astype(jnp.float32)
  angle = (angle - turns * _TURN) - turns * _TURN_REST
  return jnp.cos(angle), jnp.sin(angle)


class _Tile(NamedTuple):
  """A tile: some rows of some heads.

  Attributes:
    start: the first row.
    fresh: the first row that no tile before it has.
    head: the first head.
  """

  start: mosaic.Index
  fresh: mosaic.Index
  head: mosaic.Index


class _Share(NamedTuple):
  """How the work is cut into tiles.

  Attributes:
    M: rows.
    N: heads.
    H: the width of a head.
    shape: (rows, heads, H / 2), the shape of half a tile.
    layout: its layout.
    group: the part of each thread block in a group of blocks. A block has one
      part only, because the numbers that it needs for a part fill many
      registers.
  """

  M: int
  N: int
  H: int
  shape: tuple[int, int, int]
  layout: Any
  group: tuple[int, ...]

  @property
  def tiles(self) -> int:
    return pl.cdiv(self.M, self.shape[0]) * (self.N // self.shape[1])

  def deal(self, blocks, work):
    """Run work(c, tiles) for the part c of this thread block.

    `tiles` runs a step on each tile of the block, and returns the last carry.
    """
    block, size = lax.axis_index("block"), len(self.group)
    place = lax.rem(block, size)
    for c in sorted(set(self.group)):
      first, count = self.group.index(c), self.group.count(c)
      mine = (place >= first) & (place < first + count)
      index = block // size * count + place - first
      stride = blocks // size * count
      tiles = functools.partial(self._over_tiles, index, stride)
      pl.when(mine)(functools.partial(work, c, tiles))

  def _over_tiles(self, first, stride, step, carry=None):
    groups = self.N // self.shape[1]

    def run(index, carry):
      fresh = index // groups * self.shape[0]
      # The last tile begins early enough to end with the last row. So it may
      # repeat rows of the tile before it.
      start = jnp.minimum(fresh, self.M - self.shape[0])
      head = lax.rem(index, groups) * self.shape[1]
      return step(_Tile(start, fresh, head), carry)

    return rows.in_turn(self.tiles, first, stride, run, carry)

  def _at(self, ref, tile, part, half):
    where = pl.ds(tile.start, self.shape[0]), pl.ds(tile.head, self.shape[1])
    half = pl.ds(half * (self.H // 2), self.H // 2)
    if part is None:
      return ref.at[where[0], where[1], half]
    return ref.at[where[0], part, where[1], half]

  def load(self, ref, tile, part):
    """Return the halves of a tile of [M, N, H] or [M, C, N, H], float32."""
    return [
      mosaic.load(
        self._at(ref, tile, part, half), self.layout, optimized=False
      ).astype(jnp.float32)
      for half in range(2)
    ]

  def store(self, ref, tile, part, halves):
    for half, value in enumerate(halves):
      mosaic.store(self._at(ref, tile, part, half), value.astype(ref.dtype))

  def store_sums(self, target, scratch, halves):
    """Store the sums of two halves over rows and heads: [H]."""
    for half, values in enumerate(halves):
      total = rows.column_sums(values, scratch, self.layout)
      at = pl.ds(half * (self.H // 2), self.H // 2)
      mosaic.store(target.at[at], total)

  def repeat(self, vector, dimension):
    """Repeat a vector of rows (0) or of columns (2) over a tile."""
    repeated = lax.broadcast_in_dim(vector, self.shape, [dimension])
    return plgpu.layout_cast(repeated, self.layout)

  def over_columns(self, values):
    """Return the sums over the columns of a tile, repeated over them."""
    sums = values.sum(axis=2)
    repeated = lax.broadcast_in_dim(sums, self.shape, [0, 1])
    return plgpu.layout_cast(repeated, self.layout)


def _share(packed, group, occupancy):
  """Return the _Share of a call, and the number of thread blocks."""
  M, _, N, H = packed.shape
  heads = math.gcd(N, rows.LANES // rows.narrow_lanes(H // 2))
  size, layout = rows.head_rows(H // 2, heads)
  share = _Share(M, N, H, (size, heads, H // 2), layout, tuple(group))
  blocks = rows.block_count(share.tiles * len(set(group)), 1, occupancy, packed)
  return share, pl.cdiv(blocks, len(group)) * len(group)


class _Handler(NamedTuple):
  """Norms and rotates one part, in registers.

  Attributes:
    share: how the work is cut.
    scales: the scales of the two halves, repeated over a tile.
    position: reference int32 [K, M], or None.
    frequency: radians for each position, repeated over a tile.
  """

  share: _Share
  scales: list[jax.Array]
  position: mosaic.Ref
  frequency: jax.Array | None

  @classmethod
  def load(cls, part, share):
    """Load what all tiles of a thread block share."""
    half = share.H // 2
    layout = share.layout.reduce((0, 1))

    def repeated(ref):
      return share.repeat(mosaic.load(ref, layout, optimized=False), 2)

    scales = [repeated(part.scale.at[pl.ds(i * half, half)]) for i in range(2)]
    rotates = part.position is not None
    frequency = repeated(part.frequency) if rotates else None
    return cls(share, scales, part.position, frequency)

  def forward(self, halves, tile, epsilon):
    root = self._inverse_rms(halves, epsilon)
    first, second = (x * root * scale for x, scale in zip(halves, self.scales))
    if self.position is None:
      return first, second
    cos, sin = self._rotation(tile)
    return first * cos - second * sin, second * cos + first * sin

  def backward(self, halves, gradients, tile, epsilon):
    """Return the gradients of the halves, and what they add to d_scale."""
    first, second = gradients
    if self.position is not None:  # The inverse rotation.
      cos, sin = self._rotation(tile)
      first, second = first * cos + second * sin, second * cos - first * sin
    root = self._inverse_rms(halves, epsilon)
    normed = [x * root for x in halves]
    products = [d * x for d, x in zip((first, second), normed)]
    mean = sum(x * scale for x, scale in zip(products, self.scales))
    mean = self.share.over_columns(mean) * (1 / self.share.H)
    results = [
      (d * scale - x * mean) * root
      for d, scale, x in zip((first, second), self.scales, normed)
    ]
    if self.share.M % self.share.shape[0]:
      products = [
        rows.only_fresh(x, tile.start, tile.fresh, self.share.layout)
        for x in products
      ]
    return results, products

  def _inverse_rms(self, halves, epsilon):
    """Return 1 / rms of each head, repeated over the columns of a half."""
    first, second = halves
    total = self.share.over_columns(first * first + second * second)
    return lax.rsqrt(total * (1 / self.share.H) + epsilon)

  def _rotation(self, tile):
    """Return the cosines and sines of a tile."""
    share = self.share
    turning = [
      share.repeat(
        mosaic.load(
          self.position.at[k, pl.ds(tile.start, share.shape[0])],
          share.layout.reduce((1, 2)),
          optimized=False,
        ).astype(jnp.float32),
        0,
      )
      for k in range(self.position.shape[0])
    ]
    angle = turning[0]
    if len(turning) > 1:
      column = plgpu.broadcasted_iota(
        jnp.int32, share.shape, 2, layout=share.layout
      )
      for k, other in enumerate(turning[1:], 1):
        angle = jnp.where(lax.rem(column, len(turning)) == k, other, angle)
    return cos_and_sin(angle * self.frequency)
