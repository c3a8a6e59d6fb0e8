"""Grid, blocks, masks and products that the TPU kernels share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import context, tuning
from pallas_kernels.tpu import tiles

# A reference to memory; Pallas's own classes for them are private.
Ref: TypeAlias = Any

# What a kernel may use of VMEM; v5e, v5p and v6e have at least 64 MiB.
VMEM_BYTES = 48 * 2**20


class Blocks:
  """The grid of a call, and the blocks that each pair of a work list needs.

  Attributes:
    masks: BlockSpecs of `visible` and, if the slots have ranks, of `key_rank`.
    ranks: [key_rank] if the slots have ranks, else [].
  """

  def __init__(
    self,
    q: jax.Array,
    visible: jax.Array,
    key_rank: jax.Array | None,
    work: tiles.Worklist,
    tiling: tuning.TpuTiles,
  ):
    """Make the grid; arguments as for kernels.forward."""
    B, N = q.shape[:2]
    # A work list that all sequences share is walked once for each of them.
    is_shared = visible.shape[0] < B or B == 1
    self.grid = (B if is_shared else 1, N // tiling.heads, work.visits)
    self.work = work
    self.tiling = tiling
    self.rows = q.shape[3]
    self.masks = [
      pl.BlockSpec(
        (1, 1, tiling.rows), lambda b, n, s, seq, row, *_: (seq[s], 0, row[s])
      )
    ]
    self.ranks: list[jax.Array] = []
    if key_rank is not None:
      self.masks.append(
        pl.BlockSpec(
          (1, 1, tiling.slots),
          lambda b, n, s, seq, row, key, _: (b + seq[s], 0, key[s]),
        )
      )
      self.ranks.append(key_rank)

  def row(self, height: int) -> pl.BlockSpec:
    """Return the block of an array [B, N, height, rows] in a row tile."""
    return pl.BlockSpec(
      (1, self.tiling.heads, height, self.tiling.rows),
      lambda b, n, s, seq, row, *_: (b + seq[s], n, 0, row[s]),
    )

  def all_rows(self, height: int) -> pl.BlockSpec:
    """Return the block of an array [B, N, height, rows] in all row tiles."""
    return pl.BlockSpec(
      (1, self.tiling.heads, height, self.rows),
      lambda b, n, s, seq, *_: (b + seq[s], n, 0, 0),
    )

  def key(self, height: int) -> pl.BlockSpec:
    """Return the block of an array [B, N, height, slots] in a key tile."""
    return pl.BlockSpec(
      (1, self.tiling.heads, height, self.tiling.slots),
      lambda b, n, s, seq, row, key, _: (b + seq[s], n, 0, key[s]),
    )

  def call(
    self,
    kernel: Callable[..., None],
    inputs: Sequence[jax.Array],
    *,
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch_shapes: Sequence[Ref],
    name: str,
  ) -> list[jax.Array]:
    """Run a kernel for every pair of the work list; see pl.pallas_call."""
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=self.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch_shapes,
      ),
      out_shape=out_shape,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=VMEM_BYTES,
      ),
      interpret=context.interpret.value or False,
      name=name,
    )(*self.work[:4], *inputs)


def like(
  x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
  """Return the type of an output that varies over mesh axes as x does.

  The mesh axes are those of jax.shard_map.
  """
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Contract an axis of matrix a with an axis of matrix b, in float32."""
  is_float32 = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if is_float32 else None,
  )


def _mask(
  visible_ref: Ref, rank_ref: Ref | None, key: jax.Array, slots: int
) -> jax.Array:
  """Return which scores of a pair are visible: bool [slots, rows].

  Args:
    visible_ref: int32 [1, 1, rows].
    rank_ref: int32 [1, 1, slots]; None if the rank of a slot is its index.
    key: key tile.
    slots: slots of a key tile.
  """
  visible = visible_ref[0]
  shape = (slots, visible.shape[1])
  if rank_ref is None:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return index < visible - key * slots
  # The ranks lie along lanes and are needed along sublanes.
  rank = jnp.broadcast_to(rank_ref[0], (tuning.LANES, slots)).T
  return jnp.tile(rank, (1, shape[1] // tuning.LANES)) < visible


def at(bit: int, flags: jax.Array) -> Callable[[Callable[[], None]], None]:
  """Run the decorated function if the pair's flags have the bit."""
  return pl.when(flags & bit != 0)


def for_each_head(
  flags: jax.Array,
  accumulate: Callable[[int, jax.Array | None], None],
  key: jax.Array,
  visible_ref: Ref,
  rank_ref: Ref | None,
  k_ref: Ref,
) -> None:
  """Call accumulate(head, mask) for the key heads of a grid step.

  The mask is None if all scores of the pair are visible. If none is visible,
  there is no call.

  Args:
    flags: bits of the pair.
    accumulate: what to do with each key head.
    key: key tile of the pair.
    visible_ref: int32 [1, 1, rows].
    rank_ref: int32 [1, 1, slots]; None if the rank of a slot is its index.
    k_ref: [1, heads, H, slots].
  """
  heads, _, slots = k_ref.shape[1:]

  @at(tiles.ALL, flags)
  def unmasked():
    for n in range(heads):
      accumulate(n, None)

  @at(tiles.SOME, flags)
  def masked():
    mask = _mask(visible_ref, rank_ref, key, slots)
    for n in range(heads):
      accumulate(n, mask)
