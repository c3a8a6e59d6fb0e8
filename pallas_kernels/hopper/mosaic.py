"""What the Hopper kernels need of Pallas Mosaic GPU, on every supported JAX.

Kernels are written in lane semantics, with layouts spelled out. On a GPU an
accumulator is carried through `pl.run_state` and a left operand may stay in
registers. The interpreter has neither: there, such a product is an ordinary
one. Barriers, copies and loops are the same.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
TILE = plgpu.Layout.WGMMA
# JAX 0.10 wants an index and has no transposition of references.
_OLD = not hasattr(plgpu, "InterpretGPUParams")
_interpreted = False


def tiles(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
  """Shared memory in the form that TMA writes and wgmma reads."""
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
  )


def transposed(ref):
  """The right operand of a product that is the transpose of a reference."""
  if _interpreted:
    return ref[...].T
  if _OLD:
    return plgpu.transpose_ref(ref, (1, 0))
  return ref.transpose((1, 0))


def load(ref, layout, optimized: bool = True) -> jax.Array:
  index = ((),) if _OLD else ()
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def full(shape, value, layout, dtype=jnp.float32) -> jax.Array:
  return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def along_rows(vector: jax.Array, shape) -> jax.Array:
  """One number a row, repeated over the columns."""
  return lax.broadcast_in_dim(vector, shape, [0])


def along_columns(vector: jax.Array, shape) -> jax.Array:
  """One number a column, repeated over the rows."""
  return lax.broadcast_in_dim(vector, shape, [1])


def iota(shape, dimension: int) -> jax.Array:
  return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=TILE)


@contextlib.contextmanager
def interpreted(**options):
  """Kernels traced inside run in the GPU interpreter, on a CPU; JAX >= 0.11.

  Args:
    **options: of plgpu.InterpretGPUParams.
  """
  global _interpreted
  before, _interpreted = _interpreted, True
  try:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
      yield
  finally:
    _interpreted = before


class _Sum:
  """Stands for an accumulator in the interpreter."""

  def __init__(self, value):
    self.value = value


def accumulate(values, body):
  """values + what body, a function of as many accumulators, adds to them."""
  if not _interpreted:
    return pl.run_state(lambda refs: body(*refs))(
      tuple(plgpu.ACC.init(x) for x in values)
    )
  sums = tuple(_Sum(x) for x in values)
  body(*sums)
  return tuple(x.value for x in sums)


def scoped(body, *shapes):
  """body(accumulators), which start at zero."""
  if not _interpreted:
    return pl.run_scoped(body, *(plgpu.ACC(x, jnp.float32) for x in shapes))
  return body(*(_Sum(jnp.zeros(x, jnp.float32)) for x in shapes))


def product(accumulator, a, b):
  """accumulator += a @ b, asynchronous; b a reference, a that or an array."""
  if not _interpreted:
    plgpu.wgmma(accumulator, a, b)
    return
  a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
  # wgmma reads as TMA writes do; these reads need a fence between.
  plgpu.commit_smem()
  accumulator.value += jnp.dot(a, b, preferred_element_type=jnp.float32)


def value(accumulator, pending: int = 0) -> jax.Array:
  """The sum, once at most `pending` of the products issued are unfinished."""
  if not _interpreted:
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=pending)
  return accumulator.value


def vector_iota(size: int, layout) -> jax.Array:
  return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


class Ring(NamedTuple):
  """Places in shared memory that one warpgroup fills and others read.

  Uses are counted from 0 over the whole life of a thread block: use i has the
  place i % size, which is filled again once all readers have released it. So
  loads run ahead of the work, from one item to the next too.

  Attributes:
    tiles: references [size, ...] or, of one tile a reader, [size, parts, ...].
    full: barriers at which the copies arrive.
    free: barriers at which the readers arrive.
  """

  tiles: tuple
  full: Any
  free: Any

  @property
  def size(self) -> int:
    return self.tiles[0].shape[0]

  def put(self, use, sources) -> None:
    """Loads what use `use` holds.

    Args:
      use: its number.
      sources: for each of the tiles a reference in global memory, or a list of
        one for each part.
    """
    place = lax.rem(use, self.size)
    pl.when(use >= self.size)(lambda: plgpu.barrier_wait(self.free.at[place]))
    for source, tile in zip(sources, self.tiles):
      target = tile.at[place]
      pairs = [(source, target)]
      if isinstance(source, list):
        pairs = [(x, target.at[part]) for part, x in enumerate(source)]
      for pair in pairs:
        plgpu.copy_gmem_to_smem(*pair, self.full.at[place])

  def wait(self, use) -> list:
    """The references of a use, once it is filled."""
    place = lax.rem(use, self.size)
    plgpu.barrier_wait(self.full.at[place])
    return [tile.at[place] for tile in self.tiles]

  def release(self, use) -> None:
    """One reader is done with a use."""
    plgpu.barrier_arrive(self.free.at[lax.rem(use, self.size)])

  def settle(self, uses) -> None:
    """Waits until all `uses` are released: memory is in use until then."""
    settle(self.free, uses, self.size)


def ring(*tiles, readers: int, parts: int = 1) -> Ring:
  """The scratch types of a Ring; `parts` copies fill a place of each tile."""
  size = tiles[0].shape[0]
  return Ring(
    tiles,
    plgpu.Barrier(num_barriers=size, num_arrivals=len(tiles) * parts),
    plgpu.Barrier(num_barriers=size, num_arrivals=readers),
  )


def settle(free, used, size: int):
  """Waits for what `used` rounds over a ring of barriers have not seen yet."""

  def wait(i, _):
    pl.when(i >= size)(lambda: plgpu.barrier_wait(free.at[lax.rem(i, size)]))

  lax.fori_loop(used, used + size, wait, None)


class Share(NamedTuple):
  """The items of a thread block, where all blocks stay and share the work.

  Blocks take items in turn, and every other time in the opposite order, so that
  whoever had the longer items of one round has the shorter ones of the next.

  Attributes:
    items: of all.
    blocks: how many share them; on the axis "block" of the grid.
  """

  items: int
  blocks: int

  def rounds(self):
    """How many items this block has."""
    full, rest = divmod(self.items, self.blocks)
    there, back = self._places()
    return full + jnp.where((back if full % 2 else there) < rest, 1, 0)

  def item(self, r):
    there, back = self._places()
    return r * self.blocks + jnp.where(lax.rem(r, 2) == 0, there, back)

  def _places(self):
    block = lax.axis_index("block")
    return block, self.blocks - 1 - block


def share(items: int, blocks: int) -> Share:
  return Share(items, min(items, blocks))


# Registers a thread by warpgroups that compute. Together they may not be more
# than the block starts with, in eights: 168, 128 and 96 a thread.
_REGISTERS = {2: (240, 24), 3: (160, 32), 4: (112, 32)}


def run(readers: int, rounds, work, fetch, streamed, owned, turn=None) -> None:
  """The rounds of a thread block: `readers` warpgroups work, one more fetches.

  Args:
    readers: warpgroups that compute; registers go to them.
    rounds: items of the block.
    work: (round, uses of the streamed rings before) -> uses after.
    fetch: the same, of the warpgroup that only loads.
    streamed: Rings used as often as that.
    owned: the Ring used once a round.
    turn: of two warpgroups that take turns, takes one; or None. The second one
      lets the first begin.
  """
  warpgroup = lax.axis_index("warpgroup")
  most, least = _REGISTERS.get(readers, (None, None))

  @pl.when(warpgroup < readers)
  def _():
    if most:
      plgpu.set_max_registers(most, action="increase")
    if turn:
      pl.when(warpgroup == 1)(turn)
    lax.fori_loop(0, rounds, work, jnp.int32(0))
    if turn:
      pl.when(warpgroup == 0)(turn)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == readers)
  def _():
    if least:
      plgpu.set_max_registers(least, action="decrease")
    passed = lax.fori_loop(0, rounds, fetch, jnp.int32(0))
    for ring in streamed:
      ring.settle(passed)
    owned.settle(rounds)


def kernel(body, **options):
  """plgpu.kernel in lane semantics, with fast exponentials.

  Its integers are 32 bits, also where JAX's are 64. Under `jax.shard_map`
  results vary over the same axes as the first argument.
  """
  parameters = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
  )
  made = plgpu.kernel(body, compiler_params=parameters, **options)

  def call(first, *arguments):
    with jax.enable_x64(False):
      found = made(first, *arguments)
    return jax.tree.map(lambda x: _vary_like(x, first), found)

  return call


def _vary_like(x, other):
  axes = jax.typeof(other).manual_axis_type.varying
  axes -= jax.typeof(x).manual_axis_type.varying
  return lax.pcast(x, tuple(axes), to="varying") if axes else x
