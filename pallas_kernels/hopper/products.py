"""Matrix products on Hopper with work on their results in the epilogue.

The products have few columns on the left: K is the width of the model, and at
most a third of the columns of the result. So the time of a product is about
that of writing its result, and the epilogue costs little beside it.

A strip is the tiles of the result that share their columns. A thread block
works down a strip, whose weights stay in shared memory. Blocks of all strips
work side by side, so whole rows are written at the same time. In a block, three
warpgroups take tiles in turn: one multiplies while others are in the epilogues
of their tiles. One more warpgroup loads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.hopper import mosaic, pipeline, rows

# A tile of the result. Its products have STEP columns of the left operand each,
# and it is written in pieces of STEP columns.
ROWS = STEP = 64
COLUMNS = 128
# The number of rows must be a multiple of this.
ROW_GROUP = 8
# The largest K for which a strip of weights and a whole tile of x for each
# warpgroup fit into shared memory.
MOST_K = 256
_CONSUMERS = 3
# The first column of every piece of a tile.
_PIECES = range(0, COLUMNS, STEP)
# Bytes of shared memory for tiles. The rest is for barriers.
_SHARED = 226 * 1024


def run(
  name: str,
  x: jax.Array,
  weight: jax.Array,
  out_type: Sequence[jax.ShapeDtypeStruct],
  epilogue: Callable[..., None],
  others: Any = (),
  *,
  before: jax.Array | None = None,
  is_transposed: bool = False,
  results: int = 1,
  width: int = STEP,
  costs: Sequence[float] | None = None,
) -> list[jax.Array]:
  """Run an epilogue on every tile of x @ weight.

  Args:
    name: of the kernel.
    x: [M, K]; M at least ROWS and a multiple of ROW_GROUP, K a multiple of
      STEP up to MOST_K.
    weight: [K, N], like x; N a multiple of COLUMNS.
    out_type: the shapes of what the epilogue writes.
    epilogue: takes the Block, the Pieces of a tile, the references of `others`
      and those of the results. It writes by `Block.write`, or, where there is
      `before`, by `Block.write_over`.
    others: a pytree of further arrays.
    before: [M, N]. The epilogue can load its pieces by `Block.before`.
    is_transposed: whether `weight` is given as [N, K].
    results: pieces that the epilogue writes at once.
    width: columns of such a piece: STEP or STEP / 2.
    costs: the times of the strips, relative to each other. A strip that takes
      longer has more thread blocks. None: all take as long.

  Returns:
    What the epilogue has written.
  """
  M, K = x.shape
  N = weight.size // K
  ways = _ways(
    devices.of(x).cores, pl.cdiv(M, ROWS), costs or [1.0] * (N // COLUMNS)
  )
  # A consumer has every third tile, and the rings have room for a whole tile of
  # each. If the load of a tile had to wait for the tile before, the loads for
  # the other consumers would wait with it.
  left = mosaic.tiles((_CONSUMERS * K // STEP, ROWS, STEP), x.dtype)
  row_bytes = 2 * (COLUMNS * K // ROWS + _CONSUMERS * K)
  if before is None:
    free = (_SHARED // ROWS - row_bytes) // (2 * _CONSUMERS * results * width)
    shape = _CONSUMERS, min(free, 2), results, ROWS, width
    tail = [mosaic.tiles(shape, x.dtype)]
  else:
    tiles = mosaic.tiles((_CONSUMERS * len(_PIECES), ROWS, STEP), x.dtype)
    tail = [pipeline.ring(tiles, readers=1)]

  def body(x, weight, before, others, *refs):
    *outs, left, strip, last = refs
    Block(
      x=x,
      weight=weight,
      all_before=before,
      is_transposed=is_transposed,
      left=left,
      strip=strip,
      before_ring=None if before is None else last,
      staging=last if before is None else None,
      place=_place(ways),
      warpgroup=lax.axis_index("warpgroup"),
      epilogue=functools.partial(epilogue, others=others, outs=outs),
    ).run()

  weights = (COLUMNS, STEP) if is_transposed else (STEP, COLUMNS)
  scratch = [
    pipeline.ring(left, readers=1),
    pipeline.ring(
      mosaic.tiles((1, K // STEP, *weights), x.dtype),
      readers=_CONSUMERS,
      copies=K // STEP,
    ),
    *tail,
  ]
  return mosaic.kernel(
    body,
    out_type=list(out_type),
    grid=(sum(ways),),
    grid_names=("block",),
    num_threads=_CONSUMERS + 1,
    thread_name="warpgroup",
    kernel_name=name,
    scratch_types=scratch,
  )(x, weight, before, others)


def _ways(cores, tiles, costs):
  """Return the number of thread blocks of each strip."""
  return [min(max(int(cores * cost / sum(costs)), 1), tiles) for cost in costs]


class _Place(NamedTuple):
  """The work of a thread block.

  Attributes:
    strip: its strip.
    way: its number among the blocks of the strip.
    ways: how many blocks the strip has.
  """

  strip: mosaic.Index
  way: mosaic.Index
  ways: mosaic.Index


def _place(ways):
  """Return the _Place of this thread block."""
  block = lax.axis_index("block")
  place, start = _Place(0, block, ways[0]), 0
  for strip, count in enumerate(ways):
    mine = _Place(strip, block - start, count)
    place = _Place(
      *(jnp.where(block < start, x, y) for x, y in zip(place, mine))
    )
    start += count
  return place


class Piece(NamedTuple):
  """A piece of a tile of the result.

  Attributes:
    product: float32 [ROWS, STEP] in registers.
    number: its number in the tile.
    item: the number of the tile among those of the thread block.
    row: its first row.
    column: its first column.
  """

  product: jax.Array
  number: int
  item: mosaic.Index
  row: mosaic.Index
  column: mosaic.Index


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """The code of a thread block, and all that it refers to.

  Attributes:
    x, weight, all_before: references in global memory, as in `run`.
    is_transposed: as in `run`.
    left: ring of pieces of x, STEP columns each.
    strip: ring with the weights of the strip, in pieces; it is used once.
    before_ring: ring of pieces of `before`, or None.
    staging: pieces of the results on their way to global memory; None where
      they take the place of `before`.
    place: which tiles it works on.
    warpgroup: index of the warpgroup that runs the code.
    epilogue: takes the Block and the Pieces of a tile.
  """

  x: mosaic.Ref
  weight: mosaic.Ref
  all_before: mosaic.Ref | None
  is_transposed: bool
  left: pipeline.Ring
  strip: pipeline.Ring
  before_ring: pipeline.Ring | None
  staging: mosaic.Ref | None
  place: _Place
  warpgroup: jax.Array
  epilogue: Callable[["Block", list[Piece]], None]

  @property
  def steps(self) -> int:
    return self.x.shape[1] // STEP

  def run(self) -> None:
    """Compute, or load."""
    tiles = pl.cdiv(self.x.shape[0], ROWS)
    place = self.place
    count = lax.div(tiles - place.way + place.ways - 1, place.ways)
    more, fewer = pipeline.REGISTERS[_CONSUMERS]

    @pl.when(self.warpgroup < _CONSUMERS)
    def _():
      plgpu.set_max_registers(more, action="increase")
      self.strip.wait(0)
      rows.in_turn(count, self.warpgroup, _CONSUMERS, self.work)
      self.strip.release(0)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(self.warpgroup == _CONSUMERS)
    def _():
      plgpu.set_max_registers(fewer, action="decrease")
      self.strip.load(0, [self.weights()])
      lax.fori_loop(0, count, self.fetch, None)
      self.strip.wait_until_released(1)
      self.left.wait_until_released(count * self.steps)
      if self.before_ring is not None:
        self.before_ring.wait_until_released(count * len(_PIECES))

  def first_row(self, item: mosaic.Index) -> mosaic.Index:
    """Return the first row of a tile of this block.

    The last tile ends with the last row. So it may repeat rows.
    """
    tile = item * self.place.ways + self.place.way
    return jnp.minimum(tile * ROWS, self.x.shape[0] - ROWS)

  def weights(self) -> list[mosaic.Ref]:
    """Return the pieces of the weights of the strip."""
    columns = pl.ds(self.place.strip * COLUMNS, COLUMNS)
    pieces = (pl.ds(k * STEP, STEP) for k in range(self.steps))
    if self.is_transposed:
      return [self.weight.at[columns, piece] for piece in pieces]
    return [self.weight.at[piece, columns] for piece in pieces]

  def work(self, item: mosaic.Index, _: None) -> None:
    """Compute a tile of a consumer."""
    weights = self.strip.tiles[0].at[0]

    first_use = item * self.steps

    def multiply(accumulator):
      for k in range(self.steps):
        (piece,) = self.left.wait(first_use + k)
        weight = weights.at[k]
        if self.is_transposed:
          weight = mosaic.transposed(weight)
        mosaic.wgmma(accumulator, piece, weight)
        if k:
          mosaic.wait_for_products(1)
          self.left.release(first_use + k - 1)
      return mosaic.read_accumulator(accumulator)

    product = mosaic.with_accumulators(multiply, (ROWS, COLUMNS))
    self.left.release(first_use + self.steps - 1)
    first, column = self.first_row(item), self.place.strip * COLUMNS
    self.epilogue(
      self,
      [
        Piece(product[:, i : i + STEP], p, item, first, column + i)
        for p, i in enumerate(_PIECES)
      ],
    )

  def before(self, piece: Piece) -> jax.Array:
    """Return a piece of `before`, float32 in registers."""
    ring = self.before_ring
    assert ring is not None
    (tile,) = ring.wait(piece.item * len(_PIECES) + piece.number)
    return mosaic.load(tile, mosaic.TILE_LAYOUT).astype(jnp.float32)

  def write_over(
    self, piece: Piece, value: jax.Array, target: mosaic.Ref
  ) -> None:
    """Write the result of a piece, by way of its tile of `before`.

    Args:
      piece: the piece; `before` has loaded it.
      value: in registers, [ROWS, STEP].
      target: where it belongs in global memory.
    """
    ring = self.before_ring
    assert ring is not None
    first_use = piece.item * len(_PIECES)
    stage = lax.rem(first_use + piece.number, ring.stages)
    tile = ring.tiles[0].at[stage]
    tile[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
    if piece.number == len(_PIECES) - 1:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for number in range(len(_PIECES)):
        ring.release(first_use + number)

  def write(
    self,
    piece: Piece,
    values: Sequence[jax.Array],
    targets: Sequence[mosaic.Ref],
  ) -> None:
    """Write the results of a piece; all pieces of a strip write as many.

    Args:
      piece: the piece.
      values: in registers, [ROWS, width].
      targets: where they belong in global memory.
    """
    assert self.staging is not None
    # Earlier copies must have left these tiles. The latest ones may run on.
    stages = self.staging.shape[1]
    running = (stages - 1) * len(values)
    plgpu.wait_smem_to_gmem(running, wait_read_only=True)
    staging = [
      self.staging.at[self.warpgroup, piece.number % stages, i]
      for i in range(len(values))
    ]
    for tile, value in zip(staging, values):
      tile[...] = value
    plgpu.commit_smem()
    for tile, target in zip(staging, targets):
      plgpu.copy_smem_to_gmem(tile, target)

  def fetch(self, item: mosaic.Index, _: None) -> None:
    """Load what a tile needs."""
    first = self.first_row(item)
    for k in range(self.steps):
      piece = self.x.at[pl.ds(first, ROWS), pl.ds(k * STEP, STEP)]
      self.left.load(item * self.steps + k, [piece])
    if self.before_ring is None or self.all_before is None:
      return
    column = self.place.strip * COLUMNS
    for p, along in enumerate(_PIECES):
      use = item * len(_PIECES) + p
      at = pl.ds(first, ROWS), pl.ds(column + along, STEP)
      self.before_ring.load(use, [self.all_before.at[at]])
