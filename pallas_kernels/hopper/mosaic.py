"""The parts of Pallas Mosaic GPU that the Hopper kernels use, on every JAX.

The kernels are written in lane semantics with explicit layouts. On a GPU an
accumulator is carried through `pl.run_state`, and the left operand of a product
may stay in registers. The interpreter supports neither; there, a product is an
ordinary matrix product. Barriers, copies and loops are the same in both.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# A reference to memory, or the scratch type that asks for one. Pallas's own
# classes for them are private and differ between the versions of JAX.
Ref: TypeAlias = Any
# A number known when the kernel is traced, or an int32 scalar.
Index: TypeAlias = int | jax.Array

# Layouts of a tile of scores in registers, and of a vector that has one number
# for each of its rows or for each of its columns.
TILE_LAYOUT = plgpu.Layout.WGMMA
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)
# JAX 0.10 needs an index for loads and cannot transpose references.
_IS_JAX_0_10 = not hasattr(plgpu, "InterpretGPUParams")
_interpreted = False


def tile_width(columns: int) -> int:
  """Return the largest width of a tile that divides `columns`."""
  return math.gcd(columns, 64)


def has_whole_rows(columns: int) -> bool:
  """Return whether the tiles of an array have all of its columns."""
  return tile_width(columns) == columns


def tiles(
  shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike,
  width: int | None = None,
) -> Ref:
  """Return shared memory in the layout that TMA writes and wgmma reads.

  Args:
    shape: of it; the last dimension is a multiple of 16.
    dtype: of 16 bits.
    width: columns of a tile, 16, 32 or 64. Both operands of a product in shared
      memory must have one width. None is the largest that fits the shape.
  """
  width = width or tile_width(shape[-1])
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, width)),
      plgpu.SwizzleTransform(2 * width),
    ),
  )


def by_rows(ref: Ref) -> Ref:
  """Return a view of tiles that TMA copies row by row.

  TMA copies tiles of 8 rows only from arrays whose rows are a multiple of 8.
  Tiles as wide as the reference lie in memory like its rows, so they need no
  such multiple.

  Args:
    ref: shared memory of `tiles`. Other references are returned as they are.
  """
  transforms = getattr(ref, "transforms", ())
  tiled = [i for i, x in enumerate(transforms) if hasattr(x, "tiling")]
  if _interpreted or not tiled:
    return ref
  (i,) = tiled
  raw = type(ref)(ref.ref, transforms[:i])
  *batch, row_tiles, column_tiles, rows, width = raw.shape
  if column_tiles > 1:
    return ref
  view = raw.reshape(*batch, row_tiles * rows, width)
  return type(ref)(view.ref, (*view.transforms, *transforms[i + 1 :]))


def copy_in(source: Ref, target: Ref, full: Ref) -> None:
  """Start a copy to shared memory that arrives at the barrier `full`."""
  plgpu.copy_gmem_to_smem(source, by_rows(target), full)


def copy_out(source: Ref, target: Ref) -> None:
  """Start a copy from shared memory to global memory."""
  plgpu.copy_smem_to_gmem(by_rows(source), target)


def transposed(ref: Ref) -> Any:
  """Return the transpose of a reference, as the right operand of a product."""
  if _interpreted:
    return ref[...].T
  if _IS_JAX_0_10:
    return plgpu.transpose_ref(ref, (1, 0))
  return ref.transpose((1, 0))


def load(ref: Ref, layout: Any, optimized: bool = True) -> jax.Array:
  """Load a reference into registers."""
  index = ((),) if _IS_JAX_0_10 else ()
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref: Ref, value: jax.Array) -> None:
  """Store registers in global memory, or in untransformed shared memory."""
  if hasattr(plgpu, "store"):  # JAX 0.12 and newer.
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
  """Return a float32 array in registers that has one value everywhere."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(
  vector: jax.Array, shape: tuple[int, ...], layout: Any = None
) -> jax.Array:
  """Repeat a vector that has one number for each row over the columns.

  Args:
    vector: [rows].
    shape: (rows, columns).
    layout: the layout of the result. None: a tile of scores.
  """
  return _repeat(vector, shape, 0, layout)


def along_columns(
  vector: jax.Array, shape: tuple[int, ...], layout: Any = None
) -> jax.Array:
  """Repeat a vector that has one number for each column over the rows."""
  return _repeat(vector, shape, 1, layout)


def _repeat(vector, shape, dimension, layout):
  repeated = lax.broadcast_in_dim(vector, shape, [dimension])
  return plgpu.layout_cast(repeated, layout) if layout else repeated


def iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
  """Return the index of each element of a tile along a dimension, int32."""
  return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=TILE_LAYOUT)


def vector_iota(size: int, layout: Any) -> jax.Array:
  """Return the vector 0 to size - 1, int32."""
  return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


@contextlib.contextmanager
def interpreted(**options: Any) -> Iterator[None]:
  """Run the kernels traced inside in the GPU interpreter, on a CPU.

  Needs JAX 0.11 or newer.

  Args:
    **options: options of plgpu.InterpretGPUParams.
  """
  global _interpreted
  before, _interpreted = _interpreted, True
  # The installed JAX may be 0.10, which has no interpreter.
  library: Any = plgpu
  try:
    with library.force_gpu_interpret_mode(
      library.InterpretGPUParams(**options)
    ):
      yield
  finally:
    _interpreted = before


class _InterpretedAccumulator:
  """Stands for an accumulator in the interpreter."""

  def __init__(self, value: jax.Array):
    self.value = value


def accumulate(
  values: Sequence[jax.Array], body: Callable[..., None]
) -> Sequence[jax.Array]:
  """Return `values` plus the products that `body` adds to them.

  Args:
    values: start values, in registers.
    body: takes an accumulator for each value.
  """
  if not _interpreted:
    return pl.run_state(lambda refs: body(*refs))(
      tuple(plgpu.ACC.init(x) for x in values)
    )
  accumulators = tuple(_InterpretedAccumulator(x) for x in values)
  body(*accumulators)
  return tuple(x.value for x in accumulators)


def with_accumulators(
  body: Callable[..., Any], *shapes: tuple[int, int]
) -> Any:
  """Return the result of `body`, called with accumulators that are zero."""
  if not _interpreted:
    return pl.run_scoped(body, *(plgpu.ACC(x, jnp.float32) for x in shapes))
  return body(
    *(_InterpretedAccumulator(jnp.zeros(x, jnp.float32)) for x in shapes)
  )


def wgmma(accumulator: Any, a: Any, b: Any) -> None:
  """Start accumulator += a @ b, which ends asynchronously.

  Args:
    accumulator: an accumulator, float32.
    a: a reference in shared memory, or an array in registers.
    b: a reference in shared memory.
  """
  if not _interpreted:
    plgpu.wgmma(accumulator, a, b)
    return
  a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
  # wgmma and TMA access memory in the same way. These ordinary reads do not, so
  # they need a fence before TMA writes again.
  plgpu.commit_smem()
  accumulator.value += jnp.dot(a, b, preferred_element_type=jnp.float32)


def wait_for_products(pending: int) -> None:
  """Wait until at most `pending` products are unfinished."""
  if not _interpreted:
    plgpu.wgmma_wait(pending)


def read_accumulator(accumulator: Any, pending: int = 0) -> jax.Array:
  """Wait until at most `pending` products are unfinished; return the sum."""
  if not _interpreted:
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=pending)
  return accumulator.value


def kernel(
  body: Callable[..., None], out_type: Any, **options: Any
) -> Callable[..., Any]:
  """Return plgpu.kernel in lane semantics with fast exponentials.

  Its integers have 32 bits even if JAX's have 64. Under `jax.shard_map` the
  results vary over the same mesh axes as the first argument.

  Args:
    body: the kernel. It takes references: the arguments and the results, in the
      pytrees in which they are given, and the scratch memory.
    out_type: the shapes of the results, a pytree.
    **options: options of plgpu.kernel.
  """
  parameters = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
  )
  out_leaves, out_tree = jax.tree.flatten(out_type)
  is_tuple = isinstance(out_type, tuple | list)

  def call(*arguments):
    leaves, tree = jax.tree.flatten(arguments)

    def run(*refs):
      given, outs, scratch = (
        refs[: len(leaves)],
        refs[len(leaves) : len(leaves) + len(out_leaves)],
        refs[len(leaves) + len(out_leaves) :],
      )
      outs = jax.tree.unflatten(out_tree, outs)
      outs = outs if is_tuple else (outs,)
      body(*jax.tree.unflatten(tree, given), *outs, *scratch)

    compiled = plgpu.kernel(
      run, out_type=out_leaves, compiler_params=parameters, **options
    )
    with jax.enable_x64(False):
      results = compiled(*leaves)
    results = [_vary_like(x, leaves[0]) for x in results]
    return jax.tree.unflatten(out_tree, results)

  return call


def _vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
  """Return x, varying over the mesh axes over which `other` varies."""
  axes = jax.typeof(other).manual_axis_type.varying
  axes -= jax.typeof(x).manual_axis_type.varying
  return lax.pcast(x, tuple(axes), to="varying") if axes else x
