"""What the TPU kernels visit, move and hold, beside splash attention.

Counted from grids and BlockSpecs, as the pipeline follows them: a block is
copied where its index changes from one grid step to the next. Nothing is timed.

  JAX_PLATFORMS=cpu python -m pallas_kernels.tpu.table
"""

import itertools
import math
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)

from pallas_kernels import tuning
from pallas_kernels.tpu import attention as tpu
from pallas_kernels.tpu import tiles

_STREAMS = 2


class Count(NamedTuple):
  """Of one kernel or several: sums, and the largest VMEM.

  Attributes:
    steps: of the grid.
    scores: that are computed, masked ones included.
    moved: bytes between HBM and VMEM.
    vmem: bytes of two buffers a block, and of scratch; not the scores at work.
  """

  steps: int
  scores: int
  moved: int
  vmem: int


def _bytes(shape, dtype):
  """As laid out in memory: the last two axes are padded to whole tiles."""
  size = jnp.dtype(dtype).itemsize
  *outer, rows, lanes = (1, *(n or 1 for n in shape))
  rows = -(-rows // (32 // size)) * (32 // size) if rows > 1 else 1
  return math.prod(outer) * rows * -(-lanes // 128) * 128 * size


def _visit(grid_spec, operands, outputs, flag) -> Count:
  """Walks a grid.

  Args:
    grid_spec: of the pallas_call.
    operands: its arrays, the prefetched scalars first.
    outputs: its arrays' shapes.
    flag: (scalars) -> whether the step at a grid index computes its tile, and
      of how many scores.
  """
  scalars = [
    jax.device_get(x) for x in operands[: grid_spec.num_scalar_prefetch]
  ]
  arrays = [*operands[grid_spec.num_scalar_prefetch :], *outputs]
  specs = [*grid_spec.in_specs, *grid_spec.out_specs]
  blocks = [(s, x.dtype) for s, x in zip(specs, arrays) if s is not None]
  grid = [range(int(n)) for n in grid_spec.grid]
  steps = scores = moved = 0
  last = [None] * len(blocks)
  for index in itertools.product(*grid):
    steps += 1
    scores += flag(index, scalars)
    for i, (spec, dtype) in enumerate(blocks):
      at = tuple(int(x) for x in spec.index_map(*index, *scalars))
      if at != last[i]:
        moved += _bytes(spec.block_shape, dtype)
        last[i] = at
  vmem = sum(2 * _bytes(spec.block_shape, dtype) for spec, dtype in blocks)
  scratch = filter(None, grid_spec.scratch_shapes)
  vmem += sum(_bytes(x.shape, x.dtype) for x in scratch)
  return Count(steps, scores, moved, vmem)


def _record(function, arguments):
  """[(name, grid_spec, operands, outputs)] of the kernels in a function."""
  calls = []

  def pallas_call(kernel, *, out_shape, grid_spec, name, **others):
    del kernel, others

    def run(*operands):
      shapes = jax.tree.leaves(out_shape)
      calls.append((name, grid_spec, operands, shapes))
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

    return run

  with jax.disable_jit(), mock.patch.object(pl, "pallas_call", pallas_call):
    out, pull = jax.vjp(function, *arguments)
    pull(jax.tree.map(jnp.ones_like, out))
  return calls


def ours(T: int, H: int) -> list[Count]:
  """[forward, backward] of one sequence and key head, two streams, causal."""
  q = jnp.zeros((1, T, _STREAMS, H), jnp.bfloat16)
  k = jnp.zeros((1, T, 1, H), jnp.bfloat16)
  calls = _record(
    lambda q, k, v: tpu.attention(q, k, v, None, None, 1.0), (q, k, k)
  )
  t = tuning.tpu_tiles(T, T, 1, _STREAMS)

  def flag(index, scalars):
    computed = scalars[3][index[2]] & (tiles.SOME | tiles.ALL)
    return bool(computed) * t.rows * t.slots

  return [_visit(*call[1:], flag) for call in calls]


def splash_attention(T: int, H: int, *, fused: bool) -> list[Count]:
  """[forward, backward] of the same by jax's splash attention."""
  size = min(T, 512)
  q = jnp.zeros((_STREAMS, T, H), jnp.bfloat16)
  k = jnp.zeros((1, T, H), jnp.bfloat16)
  kernel = splash.make_splash_mha(
    splash_mask.MultiHeadMask([splash_mask.CausalMask((T, T))] * _STREAMS),
    block_sizes=splash.BlockSizes(
      block_q=size,
      block_kv=size,
      block_kv_compute=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=size,
      block_q_dq=None if fused else size,
      block_kv_dq=None if fused else size,
      use_fused_bwd_kernel=fused,
    ),
    head_shards=1,
    q_seq_shards=1,
  )

  def rows_first(index, scalars):
    mask = scalars[1]  # [heads or 1, row tiles, key tiles]
    head, i, j = index
    return bool(mask[head % mask.shape[0], i, j] > 0) * size**2

  def keys_first(index, scalars):
    j, head, i = index
    return rows_first((head, i, j), scalars)

  counts = [
    _visit(*call, keys_first if "dkv" in name else rows_first)
    for name, *call in _record(kernel, (q, k, k))
  ]
  backward = counts[1:]
  sums = [sum(column) for column in zip(*backward)]
  sums[3] = max(count.vmem for count in backward)
  return [counts[0], Count(*sums)]


def main():
  titles = (
    "T", "H", "kernel", "pass", "grid steps", "scores computed / needed",
    "MiB moved", "VMEM, MiB",
  )  # fmt: skip
  print("|", " | ".join(titles), "|")
  print("|---" * len(titles) + "|")
  for T, H in itertools.product((128, 1024, 8192), (64, 128)):
    needed = _STREAMS * T * (T + 1) / 2
    for name, counts in (
      ("mosaic_tpu", ours(T, H)),
      ("splash", splash_attention(T, H, fused=False)),
      ("splash, fused backward", splash_attention(T, H, fused=True)),
    ):
      for which, count in zip(("forward", "backward"), counts):
        if (name, which) == ("splash, fused backward", "forward"):
          continue
        print(
          f"| {T} | {H} | {name} | {which} | {count.steps} | "
          f"{count.scores / needed:.2f} | {count.moved / 2**20:.2f} | "
          f"{count.vmem / 2**20:.1f} |"
        )


if __name__ == "__main__":
  main()
