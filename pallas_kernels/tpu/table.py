"""Table of what the TPU kernels visit, move and hold, beside splash attention.

The numbers are counted from grids and BlockSpecs, in the way of the Pallas
pipeline: a block is copied if its index changes from one grid step to the next.
Nothing is timed.

  JAX_PLATFORMS=cpu python -m pallas_kernels.tpu.table
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
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
_TITLES = (
  "T",
  "H",
  "kernel",
  "pass",
  "grid steps",
  "scores computed / needed",
  "MiB moved",
  "VMEM, MiB",
)

# (grid index, prefetched scalars) -> number of scores that the step computes.
_Scores = Callable[[Sequence[int], Sequence[Any]], int]


class Count(NamedTuple):
  """What a kernel costs. For several kernels: the sums, and the largest VMEM.

  Attributes:
    steps: steps of the grid.
    scores: scores that are computed, including masked ones.
    moved: bytes moved between HBM and VMEM.
    vmem: bytes of two buffers for each block, and of scratch; the tile of
      scores at work is not counted.
  """

  steps: int
  scores: int
  moved: int
  vmem: int


class _Kernel(NamedTuple):
  """A call of pl.pallas_call.

  Attributes:
    name: name of the kernel.
    grid_spec: grid and BlockSpecs.
    operands: arrays, the prefetched scalars first.
    outputs: types of the outputs.
  """

  name: str
  grid_spec: Any
  operands: Sequence[jax.Array]
  outputs: Sequence[jax.ShapeDtypeStruct]


def _bytes(shape: Sequence[int | None], dtype: jax.typing.DTypeLike) -> int:
  """Return the size in memory, where the last two axes are padded to tiles."""
  itemsize = jnp.dtype(dtype).itemsize
  *outer, rows, lanes = (1, *(n or 1 for n in shape))
  rows = -(-rows // (32 // itemsize)) * (32 // itemsize) if rows > 1 else 1
  return math.prod(outer) * rows * -(-lanes // 128) * 128 * itemsize


def _count(kernel: _Kernel, scores_of_step: _Scores) -> Count:
  """Walk the grid of a kernel, and count."""
  grid_spec = kernel.grid_spec
  prefetched = grid_spec.num_scalar_prefetch
  scalars = [jax.device_get(x) for x in kernel.operands[:prefetched]]
  arrays: list[Any] = [*kernel.operands[prefetched:], *kernel.outputs]
  specs = [*grid_spec.in_specs, *grid_spec.out_specs]
  blocks = [
    (spec, x.dtype) for spec, x in zip(specs, arrays) if spec is not None
  ]
  grid = [range(int(n)) for n in grid_spec.grid]
  steps = scores = moved = 0
  block_indices: list[tuple[int, ...] | None] = [None] * len(blocks)
  for index in itertools.product(*grid):
    steps += 1
    scores += scores_of_step(index, scalars)
    for i, (spec, dtype) in enumerate(blocks):
      block_index = tuple(int(x) for x in spec.index_map(*index, *scalars))
      if block_index != block_indices[i]:
        moved += _bytes(spec.block_shape, dtype)
        block_indices[i] = block_index
  vmem = sum(2 * _bytes(spec.block_shape, dtype) for spec, dtype in blocks)
  scratch = filter(None, grid_spec.scratch_shapes)
  vmem += sum(_bytes(x.shape, x.dtype) for x in scratch)
  return Count(steps, scores, moved, vmem)


def _record(
  function: Callable[..., Any], arguments: Sequence[jax.Array]
) -> list[_Kernel]:
  """Return the kernels that a function and its gradient call, in order."""
  kernels = []

  def pallas_call(kernel, *, out_shape, grid_spec, name, **options):
    del kernel, options

    def run(*operands):
      outputs = jax.tree.leaves(out_shape)
      kernels.append(_Kernel(name, grid_spec, operands, outputs))
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

    return run

  with jax.disable_jit(), mock.patch.object(pl, "pallas_call", pallas_call):
    out, pull = jax.vjp(function, *arguments)
    pull(jax.tree.map(jnp.ones_like, out))
  return kernels


def ours(T: int, H: int) -> list[Count]:
  """Return [forward, backward] of this package's kernels.

  The case is one sequence and one key head, two streams, causal.

  Args:
    T: rows and slots.
    H: head size.
  """
  q = jnp.zeros((1, T, _STREAMS, H), jnp.bfloat16)
  k = jnp.zeros((1, T, 1, H), jnp.bfloat16)
  kernels = _record(
    lambda q, k, v: tpu.attention(q, k, v, None, None, 1.0), (q, k, k)
  )
  tiling = tuning.tpu_tiles(T, T, 1, _STREAMS)

  def scores_of_step(index, scalars):
    has_visible = scalars[3][index[2]] & (tiles.SOME | tiles.ALL)
    return bool(has_visible) * tiling.rows * tiling.slots

  return [_count(kernel, scores_of_step) for kernel in kernels]


def splash_attention(T: int, H: int, *, fused: bool) -> list[Count]:
  """Return [forward, backward] of JAX's splash attention in the same case.

  Args:
    T: rows and slots.
    H: head size.
    fused: whether one kernel computes all gradients.
  """
  size = min(T, 512)
  q = jnp.zeros((_STREAMS, T, H), jnp.bfloat16)
  k = jnp.zeros((1, T, H), jnp.bfloat16)
  attention = splash.make_splash_mha(
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

  forward, *backward = (
    _count(kernel, keys_first if "dkv" in kernel.name else rows_first)
    for kernel in _record(attention, (q, k, k))
  )
  return [
    forward,
    Count(
      steps=sum(count.steps for count in backward),
      scores=sum(count.scores for count in backward),
      moved=sum(count.moved for count in backward),
      vmem=max(count.vmem for count in backward),
    ),
  ]


def main() -> None:
  """Print the table."""
  print("|", " | ".join(_TITLES), "|")
  print("|---" * len(_TITLES) + "|")
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
