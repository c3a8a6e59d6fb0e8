"""Matrix products with GELU, or its slope, in their epilogue on Hopper.

The products have few columns on the left: K is the width of the model, and a
quarter of the columns of the result. So the time of a product is that of
writing its result, and GELU costs nothing beside it.

A thread block computes tiles of the result one after the other, down a strip of
columns. The weights of the strip stay in shared memory. Two warpgroups take
turns: one multiplies its tile while the other one computes GELU of the tile
before. A third warpgroup loads.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices
from pallas_kernels.hopper import gelu, mosaic, pipeline

# A tile of the result, and the columns that a step multiplies or stores.
ROWS = COLUMNS = 128
STEP = 64
# The largest K whose strip of weights fits into shared memory.
MOST_K = 256
_CONSUMERS = 2
# Stages of a consumer, for pieces of the left operand in the forward and in the
# backward pass, and for pieces of the values before GELU.
_FORWARD_STAGES = 3
_BACKWARD_STAGES = 2
_BEFORE_STAGES = 2


def forward(
  x: jax.Array, up: jax.Array, keep_before: bool
) -> tuple[jax.Array, ...]:
  """Return GELU(x @ up), [M, N], and x @ up before it if that is kept.

  Args:
    x: [M, K], M at least 128, K a multiple of 64 up to 256.
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


def _run(name, x, weight, before, outputs):
  M, K = x.shape
  N = weight.size // K
  items = pl.cdiv(M, ROWS) * (N // COLUMNS)
  blocks = min(items, devices.of(x).cores)
  transposed = before is not None
  piece = (COLUMNS, STEP) if transposed else (STEP, COLUMNS)
  before_ring = pipeline.ring(
    mosaic.tiles((_CONSUMERS * _BEFORE_STAGES, ROWS, STEP), x.dtype), readers=1
  )
  stages = _CONSUMERS * (_BACKWARD_STAGES if transposed else _FORWARD_STAGES)
  return mosaic.kernel(
    functools.partial(
      _kernel, outputs=outputs, has_before=transposed, blocks=blocks
    ),
    out_type=(jax.ShapeDtypeStruct((M, N), x.dtype),) * outputs,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=_CONSUMERS + 1,
    thread_name="warpgroup",
    kernel_name=name,
    scratch_types=[
      pipeline.ring(mosaic.tiles((stages, ROWS, STEP), x.dtype), readers=1),
      pipeline.ring(
        mosaic.tiles((1, K // STEP, *piece), x.dtype),
        readers=_CONSUMERS,
        copies=K // STEP,
      ),
      *([before_ring] if transposed else []),
      mosaic.tiles((_CONSUMERS, outputs, ROWS, STEP), x.dtype),
    ],
  )(x, weight, *([before] if transposed else []))


def _kernel(*refs, outputs, has_before, blocks):
  x, weight, *refs = refs
  before = refs.pop(0) if has_before else None
  outs, refs = refs[:outputs], refs[outputs:]
  left, strip, *before_ring, staging = refs
  thread_block = _ThreadBlock(
    x=x,
    weight=weight,
    before=before,
    outs=tuple(outs),
    left=left,
    strip=strip,
    before_ring=before_ring[0] if has_before else None,
    staging=staging,
    blocks=blocks,
    warpgroup=lax.axis_index("warpgroup"),
  )
  thread_block.run()


@dataclasses.dataclass(frozen=True, eq=False)
class _ThreadBlock:
  """The code of a thread block, and all that it refers to.

  Tiles are numbered down the first strip, then down the next one. A thread
  block has a range of numbers.

  Attributes:
    x, weight, before, outs: references in global memory. `before` is None in
      the forward pass.
    left: ring of pieces of x, STEP columns each; see `own_use`.
    strip: ring of the weights of a strip, in pieces. A use is a strip.
    before_ring: ring of pieces of `before`; see `own_use`.
    staging: pieces of the results on their way to global memory.
    blocks: thread blocks.
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
  blocks: int
  warpgroup: jax.Array

  @property
  def tiles_down(self) -> int:
    return pl.cdiv(self.x.shape[0], ROWS)

  @property
  def steps(self) -> int:
    return self.x.shape[1] // STEP

  @property
  def chunks(self) -> int:
    return COLUMNS // STEP

  def run(self) -> None:
    """Compute, or load."""
    items = self.tiles_down * (self.outs[0].shape[1] // COLUMNS)
    block = lax.axis_index("block")
    first = block * items // self.blocks
    count = (block + 1) * items // self.blocks - first
    strips = (first + count - 1) // self.tiles_down - first // self.tiles_down
    more, fewer = pipeline.REGISTERS[_CONSUMERS]

    @pl.when(self.warpgroup < _CONSUMERS)
    def _():
      plgpu.set_max_registers(more, action="increase")
      mine = (count - self.warpgroup + _CONSUMERS - 1) // _CONSUMERS
      self.strip.wait(0)
      used = lax.fori_loop(
        0, mine, functools.partial(self.work, first=first), jnp.int32(0)
      )
      self.next_strip(used, strips)
      self.strip.release(strips)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(self.warpgroup == _CONSUMERS)
    def _():
      plgpu.set_max_registers(fewer, action="decrease")
      lax.fori_loop(0, count, functools.partial(self.fetch, first=first), None)
      self.strip.wait_until_released(strips + 1)
      self.wait_until_released(self.left, count, self.steps)
      if self.before_ring is not None:
        self.wait_until_released(self.before_ring, count, self.chunks)

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
    turn, stage = jnp.divmod(item // _CONSUMERS * uses + i, stages)
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

  def place(
    self, item: mosaic.Index, first: mosaic.Index
  ) -> tuple[mosaic.Index, mosaic.Index, mosaic.Index]:
    """Return the first row and column of a tile, and its strip in this block.

    The last tile of a strip ends with the last row, so it may repeat rows.

    Args:
      item: the tile, from 0 on in this thread block.
      first: the number of the block's first tile.
    """
    strip, down = jnp.divmod(first + item, self.tiles_down)
    row = jnp.minimum(down * ROWS, self.x.shape[0] - ROWS)
    return row, strip * COLUMNS, strip - first // self.tiles_down

  def next_strip(self, used: mosaic.Index, strip: mosaic.Index) -> mosaic.Index:
    """Release the weights of the strips before `strip`; return `strip`."""

    def move(i, _):
      self.strip.release(i)
      self.strip.wait(i + 1)

    lax.fori_loop(used, strip, move, None)
    return strip

  def work(
    self, i: mosaic.Index, used: mosaic.Index, *, first: mosaic.Index
  ) -> mosaic.Index:
    """Compute the i-th tile of a consumer; return the strip that it used."""
    item = i * _CONSUMERS + self.warpgroup
    row, column, strip = self.place(item, first)
    self.next_strip(used, strip)
    (weights,) = (tile.at[0] for tile in self.strip.tiles)
    is_transposed = self.before is not None

    def use(k):
      return self.own_use(self.left, item, k, self.steps)

    def multiply(accumulator):
      for k in range(self.steps):
        (piece,) = self.left.wait(use(k))
        weight = weights.at[k]
        if is_transposed:
          weight = mosaic.transposed(weight)
        mosaic.wgmma(accumulator, piece, weight)
        if k:
          mosaic.wait_for_products(1)
          self.left.release(use(k - 1))
      return mosaic.read_accumulator(accumulator)

    product = mosaic.with_accumulators(multiply, (ROWS, COLUMNS))
    self.left.release(use(self.steps - 1))
    for chunk in range(self.chunks):
      columns = slice(chunk * STEP, (chunk + 1) * STEP)
      results = self.epilogue(product[:, columns], item, chunk)
      # The copies of the chunk before must have left these tiles.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for o, result in enumerate(results):
        self.staging.at[self.warpgroup, o][...] = result
      plgpu.commit_smem()
      at = pl.ds(row, ROWS), pl.ds(column + chunk * STEP, STEP)
      for o, out in enumerate(self.outs):
        plgpu.copy_smem_to_gmem(self.staging.at[self.warpgroup, o], out.at[at])
    return strip

  def epilogue(
    self, product: jax.Array, item: mosaic.Index, chunk: int
  ) -> list[jax.Array]:
    """Return what is written for a piece of the product.

    Args:
      product: float32 [ROWS, STEP] in registers.
      item: the tile.
      chunk: the piece.
    """
    dtype = self.outs[0].dtype
    if self.before_ring is None:
      rounded = product.astype(dtype)
      value = gelu.value(rounded.astype(jnp.float32)).astype(dtype)
      return [value, rounded][: len(self.outs)]
    use = self.own_use(self.before_ring, item, chunk, self.chunks)
    (piece,) = self.before_ring.wait(use)
    before = mosaic.load(piece, mosaic.TILE_LAYOUT)
    # These were ordinary loads; the next write to the tile is by TMA.
    plgpu.commit_smem()
    self.before_ring.release(use)
    return [gelu.gradient(before.astype(jnp.float32), product).astype(dtype)]

  def fetch(self, item: mosaic.Index, _: None, *, first: mosaic.Index) -> None:
    """Load what a tile needs."""
    row, column, strip = self.place(item, first)
    before_strip = self.place(item - 1, first)[2]
    pl.when((item == 0) | (strip != before_strip))(
      lambda: self.strip.load(strip, [self.weights(column)])
    )
    rows = pl.ds(row, ROWS)
    for k in range(self.steps):
      piece = self.x.at[rows, pl.ds(k * STEP, STEP)]
      self.left.load(self.own_use(self.left, item, k, self.steps), [piece])
    if self.before_ring is not None:
      for chunk in range(self.chunks):
        piece = self.before.at[rows, pl.ds(column + chunk * STEP, STEP)]
        use = self.own_use(self.before_ring, item, chunk, self.chunks)
        self.before_ring.load(use, [piece])

  def weights(self, column: mosaic.Index) -> list[mosaic.Ref]:
    """Return the pieces of the weights of a strip."""
    columns = pl.ds(column, COLUMNS)
    pieces = (pl.ds(k * STEP, STEP) for k in range(self.steps))
    if self.before is not None:
      return [self.weight.at[columns, piece] for piece in pieces]
    return [self.weight.at[piece, columns] for piece in pieces]
