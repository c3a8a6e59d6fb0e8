"""What the Hopper kernels need of Pallas Mosaic GPU, on every supported JAX.

Kernels are written in lane semantics, with layouts spelled out. On a GPU an
accumulator is carried through `pl.run_state` and a left operand may stay in
registers. The interpreter has neither: there, such a product is an ordinary
one. Barriers, copies and loops are the same.
"""

import contextlib

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


def settle(free, used, size: int):
  """Waits for what `used` rounds over a ring of barriers have not seen yet."""

  def wait(i, _):
    pl.when(i >= size)(lambda: plgpu.barrier_wait(free.at[lax.rem(i, size)]))

  lax.fori_loop(used, used + size, wait, None)


def fill(count, sources, rings, full, free):
  """For the warpgroup that only loads: passes tiles through rings of them.

  Args:
    count: of rounds.
    sources: round -> references in global memory, one a ring.
    rings: references in shared memory, [slots, ...].
    full: barriers, one a slot, at which its copies arrive.
    free: barriers, one a slot, at which those arrive that have read it.
  """
  size = rings[0].shape[0]

  def load_round(i, _):
    slot = lax.rem(i, size)
    pl.when(i >= size)(lambda: plgpu.barrier_wait(free.at[slot]))
    for source, ring in zip(sources(i), rings):
      plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

  lax.fori_loop(0, count, load_round, None)
  settle(free, count, size)


def take_registers(warpgroups: int):
  """For one of the warpgroups that compute; one more only loads."""
  if warpgroups > 1:
    plgpu.set_max_registers({2: 240, 3: 160}[warpgroups], action="increase")


def leave_registers(warpgroups: int):
  """For the warpgroup that only loads."""
  if warpgroups > 1:
    plgpu.set_max_registers({2: 24, 3: 32}[warpgroups], action="decrease")


def kernel(body, **options):
  """plgpu.kernel in lane semantics, with fast exponentials."""
  parameters = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
  )
  return plgpu.kernel(body, compiler_params=parameters, **options)
