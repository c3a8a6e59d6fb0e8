"""What both TPU kernels are made of: grid, blocks, masks, products."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import context, tuning
from pallas_kernels.tpu import tiles

# Of the 64 MiB that the smallest of v5e, v5p and v6e has.
VMEM_BYTES = 48 * 2**20


class Blocks:
  """The grid, and the blocks that a pair of the work list needs."""

  def __init__(self, q, k, visible, key_rank, work, tiling):
    B, N = q.shape[:2]
    # A list that all sequences share is walked once for each.
    shared = visible.shape[0] < B or B == 1
    self.grid = (B if shared else 1, N // tiling.heads, work.count)
    self.work = work
    self.tiling = tiling
    self.all = q.shape[3]
    tile = pl.BlockSpec(
      (1, 1, tiling.rows), lambda b, n, s, seq, row, *_: (seq[s], 0, row[s])
    )
    self.masks, self.ranks = [tile], []
    if key_rank is not None:
      self.masks.append(
        pl.BlockSpec(
          (1, 1, tiling.slots),
          lambda b, n, s, seq, row, key, _: (b + seq[s], 0, key[s]),
        )
      )
      self.ranks.append(key_rank)

  def row(self, height):
    return pl.BlockSpec(
      (1, self.tiling.heads, height, self.tiling.rows),
      lambda b, n, s, seq, row, *_: (b + seq[s], n, 0, row[s]),
    )

  def all_rows(self, height):
    return pl.BlockSpec(
      (1, self.tiling.heads, height, self.all),
      lambda b, n, s, seq, *_: (b + seq[s], n, 0, 0),
    )

  def key(self, height):
    return pl.BlockSpec(
      (1, self.tiling.heads, height, self.tiling.slots),
      lambda b, n, s, seq, row, key, _: (b + seq[s], n, 0, key[s]),
    )

  def call(
    self,
    kernel,
    inputs,
    *,
    in_specs,
    out_specs,
    out_shape,
    scratch_shapes,
    name,
  ):
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


def like(x, shape, dtype):
  """Under shard_map what is returned varies over the mesh as x does."""
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def dot(a, b, axis_a, axis_b):
  """Contracts an axis of matrix a with one of b, in float32."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if exact else None,
  )


def _seen(visible_ref, rank_ref, key, slots):
  """Which scores of the pair count: bool [slots, rows]."""
  visible = visible_ref[0]
  shape = (slots, visible.shape[1])
  if rank_ref is None:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return index < visible - key * slots
  # The ranks come as lanes and are wanted as sublanes.
  rank = jnp.broadcast_to(rank_ref[0], (tuning.LANES, slots)).T
  return jnp.tile(rank, (1, shape[1] // tuning.LANES)) < visible


def at(bit, flags):
  """Runs the decorated block where the pair's flags have the bit."""
  return pl.when(flags & bit != 0)


def for_each_head(flags, accumulate, key, visible_ref, rank_ref, k_ref):
  """Calls accumulate(head, seen), seen being None where nothing is hidden.

  Nothing is called where nothing is visible.
  """
  heads, _, slots = k_ref.shape[1:]

  @at(tiles.ALL, flags)
  def unmasked():
    for n in range(heads):
      accumulate(n, None)

  @at(tiles.SOME, flags)
  def masked():
    seen = _seen(visible_ref, rank_ref, key, slots)
    for n in range(heads):
      accumulate(n, seen)
