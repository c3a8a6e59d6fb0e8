"""Matrix products with GELU, or its slope, in their epilogue on Hopper.

The products have few columns on the left: K is the width of the model, and a
quarter of the columns of the result. So the time of a product is about that of
writing its result, and GELU costs little beside it.

A strip is the tiles of the result that share their columns. A thread block
works down a strip, whose weights stay in shared memory. Blocks of all strips
work side by side, so whole rows are written at the same time. In a block, two
warpgroups take turns: one multiplies its tile while the other one computes GELU
of the tile before. A third warpgroup loads.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.hopper import gelu, mosaic, pipeline, rows

# A tile of the result. Its products have STEP columns of the left operand each,
# and it is written in pieces of STEP rows and columns.
ROWS = COLUMNS = 128
STEP = 64
# The largest K whose weights of a strip fit into shared memory.
MOST_K = 512
_CONSUMERS = 2
# A tile has so many pieces.
_PIECES = (ROWS // STEP) * (COLUMNS // STEP)
# Bytes of shared memory for tiles. The rest is for barriers.
_SHARED = 226 * 1024


def forward(
  x: jax.Array, up: jax.Array, keep_before: bool
) -> tuple[jax.Array, ...]:
  """Return GELU(x @ up), [M, N], and x @ up before it if that is kept.

  Args:
    x: [M, K], M at least 128, K a multiple of 64 up to 512.
    up: [K, N], like x; N a multiple of 128.
    keep_before: whether to return x @ up.
  """
  return _run("up_gelu", x, up, None, 2 if keep_before else 1)


def backward(d_out: jax.Array, down: jax.Array, before: jax.Array) -> jax.Array:
  """Return (d_out @ down^T) * GELU'(before), [M, N].

  Args:
    d_out: [M, K], as `x` of `forward`.
    down: [N, K].
    before: [M, N].
  """
  return _run("down_gelu_backward", d_out, down, before, 1)[0]


class _Stages(NamedTuple):
  """Stages in shared memory of each consumer.

  Attributes:
    left: of pieces of x.
    before: of pieces of `before`.
    staging: of pieces of each result.
  """

  left: int
  before: int
  staging: int


def _stages(K, has_before, outputs):
  """Return the _Stages: all pieces of a tile of `before` where they fit."""
  piece = 2 * STEP * STEP
  own = (_SHARED - 2 * K * COLUMNS) // _CONSUMERS
  few = K > 256
  before = (1 if few else _PIECES) if has_before else 0
  staging = 1 if few else 2
  left = (own - (outputs * staging + before) * piece) // (2 * ROWS * STEP)
  return _Stages(min(left, 4), before, staging)


def _run(name, x, weight, before, outputs):
  M, K = x.shape
  N = weight.size // K
  strips = N // COLUMNS
  tiles = pl.cdiv(M, ROWS)
  ways = min(max(devices.of(x).cores // strips, 1), tiles)
  has_before = before is not None
  stages = _stages(K, has_before, outputs)

  def own_ring(stages, height):
    tile = mosaic.tiles((_CONSUMERS * stages, height, STEP), x.dtype)
    return pipeline.ring(tile, readers=1)

  weights = (COLUMNS, STEP) if has_before else (STEP, COLUMNS)
  return mosaic.kernel(
    functools.partial(
      _kernel, outputs=outputs, has_before=has_before, ways=ways
    ),
    out_type=(jax.ShapeDtypeStruct((M, N), x.dtype),) * outputs,
    grid=(ways, strips),
    grid_names=("way", "strip"),
    num_threads=_CONSUMERS + 1,
    thread_name="warpgroup",
    kernel_name=name,
    scratch_types=[
      own_ring(stages.left, ROWS),
      pipeline.ring(
        mosaic.tiles((1, K // STEP, *weights), x.dtype),
        readers=_CONSUMERS,
        copies=K // STEP,
      ),
      *([own_ring(stages.before, STEP)] if has_before else []),
      mosaic.tiles((_CONSUMERS, stages.staging, outputs, STEP, STEP), x.dtype),
    ],
  )(x, weight, *([before] if has_before else []))


def _kernel(*refs, outputs, has_before, ways):
  x, weight, *others = refs
  before = others.pop(0) if has_before else None
  outs, scratch = others[:outputs], others[outputs:]
  left, strip, *before_ring, staging = scratch
  _ThreadBlock(
    x=x,
    weight=weight,
    before=before,
    outs=tuple(outs),
    left=left,
    strip=strip,
    before_ring=before_ring[0] if has_before else None,
    staging=staging,
    ways=ways,
    warpgroup=lax.axis_index("warpgroup"),
  ).run()


@dataclasses.dataclass(frozen=True, eq=False)
class _ThreadBlock:
  """The code of a thread block, and all that it refers to.

  Attributes:
    x, weight, before, outs: references in global memory. `before` is None in
      the forward pass.
    left: ring of pieces of x, STEP columns each; see `own_use`.
    strip: ring with the weights of the strip, in pieces; it is used once.
    before_ring: ring of pieces of `before`; see `own_use`.
    staging: pieces of the results on their way to global memory.
    ways: thread blocks that share a strip.
    warpgroup: index of the warpgroup that runs the code.
  """

  x: mosaic.Ref
  weight: mosaic.Ref
  before: mosaic.Ref | None
  outs: tuple[mosaic.Ref, ...]
  left: pipeline.Ring
  strip: pipeline.Ring
  before_ring: pipeline.Ring | None
  staging: mosaic.Ref
  ways: int
  warpgroup: jax.Array

  @property
  def steps(self) -> int:
    return self.x.shape[1] // STEP

  @property
  def pieces(self) -> list[tuple[int, int]]:
    """The first row and column of every piece of a tile."""
    return list(
      itertools.product(range(0, ROWS, STEP), range(0, COLUMNS, STEP))
    )

  def run(self) -> None:
    """Compute, or load."""
    tiles = pl.cdiv(self.x.shape[0], ROWS)
    count = (tiles - lax.axis_index("way") + self.ways - 1) // self.ways
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
      self.wait_until_released(self.left, count, self.steps)
      if self.before_ring is not None:
        self.wait_until_released(self.before_ring, count, len(self.pieces))

  def first_row(self, item: mosaic.Index) -> mosaic.Index:
    """Return the first row of a tile of this block.

    The last tile ends with the last row. So it may repeat rows.
    """
    tile = item * self.ways + lax.axis_index("way")
    return jnp.minimum(tile * ROWS, self.x.shape[0] - ROWS)

  def weights(self) -> list[mosaic.Ref]:
    """Return the pieces of the weights of the strip."""
    columns = pl.ds(lax.axis_index("strip") * COLUMNS, COLUMNS)
    pieces = (pl.ds(k * STEP, STEP) for k in range(self.steps))
    if self.before is not None:
      return [self.weight.at[columns, piece] for piece in pieces]
    return [self.weight.at[piece, columns] for piece in pieces]

  def own_use(
    self, ring: pipeline.Ring, item: mosaic.Index, i: int, uses: int
  ) -> mosaic.Index:
    """Return the number of a use in a ring of which each consumer has a part.

    A consumer waits for every use of its own stages, and for no other.

    Args:
      ring: the stages of the first consumer, then those of the second.
      item: the tile.
      i: the use among those of the tile.
      uses: uses of a tile.
    """
    stages = ring.stages // _CONSUMERS
    index = lax.div(item, _CONSUMERS) * uses + i
    turn, stage = lax.div(index, stages), lax.rem(index, stages)
    consumer = lax.rem(item, _CONSUMERS)
    return turn * ring.stages + consumer * stages + stage

  def wait_until_released(
    self, ring: pipeline.Ring, count: mosaic.Index, uses: int
  ) -> None:
    """Wait for the last uses of a ring of which each consumer has a part."""
    stages = ring.stages // _CONSUMERS
    for consumer in range(_CONSUMERS):
      mine = (count - consumer + _CONSUMERS - 1) // _CONSUMERS * uses
      for stage in range(stages):
        free = ring.free.at[consumer * stages + stage]
        pl.when(mine > stage)(functools.partial(plgpu.barrier_wait, free))

  def work(self, item: mosaic.Index, _: None) -> None:
    """Compute a tile of a consumer."""
    weights = self.strip.tiles[0].at[0]

    def use(k):
      return self.own_use(self.left, item, k, self.steps)

    def multiply(accumulator):
      for k in range(self.steps):
        (piece,) = self.left.wait(use(k))
        weight = weights.at[k]
        if self.before is not None:
          weight = mosaic.transposed(weight)
        mosaic.wgmma(accumulator, piece, weight)
        if k:
          mosaic.wait_for_products(1)
          self.left.release(use(k - 1))
      return mosaic.read_accumulator(accumulator)

    product = mosaic.with_accumulators(multiply, (ROWS, COLUMNS))
    self.left.release(use(self.steps - 1))
    first, column = self.first_row(item), lax.axis_index("strip") * COLUMNS
    for p, (down, along) in enumerate(self.pieces):
      results = self.epilogue(
        product[down : down + STEP, along : along + STEP], item, p
      )
      # Earlier copies must have left these tiles. The latest ones may run on.
      stages = self.staging.shape[1]
      running = (stages - 1) * len(results)
      plgpu.wait_smem_to_gmem(running, wait_read_only=True)
      staging = [
        self.staging.at[self.warpgroup, p % stages, o]
        for o in range(len(results))
      ]
      for tile, result in zip(staging, results):
        tile[...] = result
      plgpu.commit_smem()
      at = pl.ds(first + down, STEP), pl.ds(column + along, STEP)
      for tile, out in zip(staging, self.outs):
        plgpu.copy_smem_to_gmem(tile, out.at[at])

  def epilogue(
    self, product: jax.Array, item: mosaic.Index, p: int
  ) -> list[jax.Array]:
    """Return what is written for a piece of the product.

    Args:
      product: float32 [STEP, STEP] in registers.
      item: the tile.
      p: the number of the piece.
    """
    dtype = self.outs[0].dtype
    if self.before_ring is None:
      rounded = product.astype(dtype)
      value = gelu.value(rounded.astype(jnp.float32)).astype(dtype)
      return [value, rounded][: len(self.outs)]
    use = self.own_use(self.before_ring, item, p, len(self.pieces))
    (piece,) = self.before_ring.wait(use)
    before = mosaic.load(piece, mosaic.TILE_LAYOUT)
    # These were ordinary loads; the next write to the tile is by TMA.
    plgpu.commit_smem()
    self.before_ring.release(use)
    return [gelu.gradient(before.astype(jnp.float32), product).astype(dtype)]

  def fetch(self, item: mosaic.Index, _: None) -> None:
    """Load what a tile needs."""
    first = self.first_row(item)
    for k in range(self.steps):
      piece = self.x.at[pl.ds(first, ROWS), pl.ds(k * STEP, STEP)]
      self.left.load(self.own_use(self.left, item, k, self.steps), [piece])
    if self.before_ring is None or self.before is None:
      return
    column = lax.axis_index("strip") * COLUMNS
    for p, (down, along) in enumerate(self.pieces):
      use = self.own_use(self.before_ring, item, p, len(self.pieces))
      at = pl.ds(first + down, STEP), pl.ds(column + along, STEP)
      self.before_ring.load(use, [self.before.at[at]])
