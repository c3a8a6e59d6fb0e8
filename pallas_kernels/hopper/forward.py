"""Forward kernels for Hopper: attention over prefixes of shared keys.

hopper_masks says what a unit is.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic

ROWS = hopper_masks.ROWS
LN2 = math.log(2)


def forward(
  q,
  k,
  v,
  prefix,
  scale: float,
  config: tuning.Hopper,
  with_rest: bool = False,
  splits: int = 1,
):
  """(out, lse) of attention.

  Args:
    q: [B, T, Nq, H], T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64; or see
      hopper_masks.key_tile.
    v: like k.
    prefix: None for causal, or the Prefix of hopper_masks.prefix.
    scale: of the scores.
    config: tile sizes.
    with_rest: whether to return what `out` lost by rounding, too.
    splits: parts of the slots to attend to apart, for few rows and many slots.

  Returns:
    out [B * splits, T, Nq, H]; lse float32 [B * splits, Nq, T rounded up to 64]
    in base 2, +inf for a row that sees nothing; the rest, like out.
  """
  B, T, Nq, H = q.shape
  S, N = hopper_masks.keys(q, k)
  G = Nq // N
  tiles = pl.cdiv(T, ROWS)
  outs = (
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    jax.ShapeDtypeStruct((B, Nq, tiles * ROWS), jnp.float32),
  )
  factor = scale / LN2
  alone = splits == 1 and not with_rest
  if max(T, S) <= config.short and tiles * G <= 4 and alone:
    slots = pl.cdiv(S, ROWS) * ROWS
    return mosaic.kernel(
      functools.partial(_short, factor=factor),
      out_type=outs,
      grid=(B * N,),
      grid_names=("item",),
      scratch_types=[
        mosaic.tiles((tiles * G, ROWS, H), q.dtype),
        mosaic.tiles((slots, H), q.dtype),
        mosaic.tiles((slots, H), q.dtype),
        plgpu.SMEM((tiles * G, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=tiles * G),
        plgpu.Barrier(num_barriers=2),
      ],
    )(q, k, v, *(prefix or ()))
  outs = [
    jax.ShapeDtypeStruct((B * splits, *x.shape[1:]), x.dtype) for x in outs
  ]
  if with_rest:
    outs += outs[:1]
  C, L = config.consumers, config.stages
  share = mosaic.share(
    hopper_masks.Block.items(B, T, N, G, C, splits), config.blocks
  )
  own = [mosaic.tiles((1, C, ROWS, H), q.dtype)]
  if prefix is not None:
    own.append(plgpu.SMEM((1, C, ROWS), jnp.int32))
  keys = mosaic.tiles((L, config.keys, H), q.dtype)
  return mosaic.kernel(
    functools.partial(
      _long, factor=factor, config=config, share=share, splits=splits
    ),
    out_type=tuple(outs),
    grid=(share.blocks,),
    grid_names=("block",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      mosaic.ring(*own, readers=C, parts=C),
      mosaic.ring(keys, readers=C),
      mosaic.ring(keys, readers=C),
      mosaic.tiles((C, ROWS, H), q.dtype),
      plgpu.SMEM((C, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=C),
    ],
  )(q, k, v, *(prefix or ()))


def _scores(q, k, size, wait=None):
  """q @ k.T of references, in registers."""

  def multiply(score):
    mosaic.product(score, q, mosaic.transposed(k))
    if wait is not None:
      wait()
    return mosaic.value(score)

  return mosaic.scoped(multiply, (ROWS, size))


def _finish(accumulator, largest, total, out, lse):
  """Writes a unit's output and log-sum-exp to shared memory; the output."""
  some = total > 0
  inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
  accumulator *= mosaic.along_rows(inverse, accumulator.shape)
  out[...] = accumulator.astype(out.dtype)
  logarithm = jnp.log(jnp.where(some, total, 1.0)) / LN2
  lse[...] = jnp.where(some, largest + logarithm, jnp.inf)
  return accumulator


def _short(q, k, v, *refs, factor):
  """One warpgroup, one key head: all of it in shared memory, no loop."""
  *prefix, out, lse, q_smem, k_smem, v_smem, lse_smem, q_full, kv_full = refs
  prefix = tuple(prefix) or None
  T, Nq, H = q.shape[1:]
  N = k.shape[2]
  G = Nq // N
  slots = k_smem.shape[0]
  item = lax.axis_index("item")
  b, n = item // N, item % N
  # JAX refuses static slices that hang over the end, where TMA clips.
  zero = item * 0
  plgpu.copy_gmem_to_smem(k.at[b, pl.ds(zero, slots), n], k_smem, kv_full.at[0])
  units = [(p * ROWS, g, p * G + g) for p in range(pl.cdiv(T, ROWS))
           for g in range(G)]  # fmt: skip
  for start, g, u in units:
    plgpu.copy_gmem_to_smem(
      q.at[b, pl.ds(zero + start, ROWS), n * G + g],
      q_smem.at[u],
      q_full.at[u],
    )
    if u == 0:
      plgpu.copy_gmem_to_smem(
        v.at[b, pl.ds(zero, slots), n], v_smem, kv_full.at[1]
      )
  visible = [None] * len(units)
  if prefix:
    visible = [
      mosaic.load(
        hopper_masks.counts(prefix, b, g, start), mosaic.ROWS, optimized=False
      )
      for start, g, _ in units
    ]
  plgpu.barrier_wait(kv_full.at[0])
  for start, g, u in units:
    # Causal rows see no slot past their own tile.
    size = slots if prefix else min(start + ROWS, slots)
    plgpu.barrier_wait(q_full.at[u])
    score = _scores(q_smem.at[u], k_smem.at[pl.ds(0, size)], size)
    shape = score.shape
    mask = hopper_masks.seen(visible[u], start, 0, shape)
    score = jnp.where(mask, score, -jnp.inf)
    largest = score.max(axis=1) * factor
    finite = jnp.where(largest == -jnp.inf, 0.0, largest)
    weight = jnp.exp2(score * factor - mosaic.along_rows(finite, shape))
    total = weight.sum(axis=1)
    weight = weight.astype(v.dtype)
    if u == 0:
      plgpu.barrier_wait(kv_full.at[1])
    (result,) = mosaic.accumulate(
      (mosaic.full((ROWS, H), 0, mosaic.TILE),),
      lambda result, weight=weight, size=size: mosaic.product(
        result, weight, v_smem.at[pl.ds(0, size)]
      ),
    )
    _finish(result, largest, total, q_smem.at[u], lse_smem.at[u])
    plgpu.commit_smem()
    head = n * G + g
    rows = pl.ds(zero + start, ROWS)
    plgpu.copy_smem_to_gmem(q_smem.at[u], out.at[b, rows, head])
    plgpu.copy_smem_to_gmem(lse_smem.at[u], lse.at[b, head, rows])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _long(q, k, v, *refs, factor, config, share, splits):
  """Warpgroups of 64 rows each share rings of key tiles that one fills."""
  *refs, own, keys, values, out_smem, lse_smem, turn = refs
  prefix = tuple(refs[:3]) if len(refs) > 3 else None
  out, lse, *rest = refs[3 if prefix else 0 :]
  B, T, Nq, H = q.shape
  S, N = hopper_masks.keys(q, k)
  G = Nq // N
  C, size = config.consumers, config.keys
  tiles = pl.cdiv(pl.cdiv(S, size), splits)
  turns = config.pingpong and C == 2
  warpgroup = lax.axis_index("warpgroup")

  def take(r):
    """The block of a round; its first key tile, and how many it passes."""
    block = hopper_masks.Block(share.item(r), T, N, G, C, prefix, splits)
    first = block.split * tiles
    # The last turn of an item is met by the first one of the next: it has one.
    least = 1 if turns else 0
    steps = jnp.clip(pl.cdiv(block.most(), size) - first, least, tiles)
    return block, first, steps

  def take_turn():
    if turns:
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

  def work(r, passed):
    block, first, steps = take(r)
    start, g, inside, least, most = block.unit(warpgroup)
    mine, *visible = (x.at[warpgroup] for x in own.wait(r))
    visible = mosaic.load(visible[0], mosaic.ROWS) if prefix else None
    mine = mosaic.load(mine, mosaic.TILE)
    # That was read by ordinary loads, the next is written by TMA.
    plgpu.commit_smem()
    own.release(r)

    def step(i, carry, masked):
      accumulator, largest, total = carry
      (k_tile,) = keys.wait(passed + i)
      score = _scores(mine, k_tile, size, take_turn)
      keys.release(passed + i)
      shape = score.shape
      if masked:
        mask = hopper_masks.seen(visible, start, (first + i) * size, shape)
        score = jnp.where(mask, score, -jnp.inf)
      before, largest = (
        largest,
        jnp.maximum(largest, score.max(axis=1) * factor),
      )
      finite = largest
      if masked:
        # A row that has seen nothing yet has no largest score.
        finite = jnp.where(largest == -jnp.inf, 0.0, largest)
      decay = jnp.exp2(before - finite)
      weight = jnp.exp2(score * factor - mosaic.along_rows(finite, shape))
      accumulator *= mosaic.along_rows(decay, accumulator.shape)
      total = total * decay + weight.sum(axis=1)
      weight = weight.astype(v.dtype)
      # The sums are done before the wait, not left for after it.
      accumulator, total, largest, weight = lax.optimization_barrier(
        (accumulator, total, largest, weight)
      )
      if turns:
        plgpu.barrier_arrive(turn)
      (v_tile,) = values.wait(passed + i)
      if turns:
        plgpu.barrier_wait(turn)
      (accumulator,) = mosaic.accumulate(
        (accumulator,),
        lambda result: mosaic.product(result, weight, v_tile),
      )
      values.release(passed + i)
      return accumulator, largest, total

    def drain(i, _):
      for ring in (keys, values):
        ring.wait(passed + i)
        ring.release(passed + i)
      take_turn()
      take_turn()

    carry = (
      mosaic.full((ROWS, H), 0, mosaic.TILE),
      mosaic.full((ROWS,), -jnp.inf, mosaic.ROWS),
      mosaic.full((ROWS,), 0, mosaic.ROWS),
    )
    whole = jnp.clip(jnp.where(inside, least // size, 0) - first, 0, steps)
    end = jnp.clip(pl.cdiv(most, size) - first, 0, steps)
    for low, high, masked in ((0, whole, False), (whole, end, True)):
      carry = lax.fori_loop(
        low, high, functools.partial(step, masked=masked), carry
      )
    lax.fori_loop(end, steps, drain, None)
    index = block.b * splits + block.split, block.n * G + g, pl.ds(start, ROWS)
    pl.when(inside)(lambda: store(carry, *index))
    return passed + steps

  def store(carry, b, head, rows):
    staging, lse_mine = out_smem.at[warpgroup], lse_smem.at[warpgroup]
    # What was stored before has left.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    result = _finish(*carry, staging, lse_mine)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out.at[b, rows, head])
    plgpu.copy_smem_to_gmem(lse_mine, lse.at[b, head, rows])
    if rest:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      rounded = result.astype(q.dtype).astype(jnp.float32)
      staging[...] = (result - rounded).astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(staging, rest[0].at[b, rows, head])

  def fetch(r, passed):
    block, first, steps = take(r)
    block.load(own, r, (q,))

    def fill(i, _):
      tile = B, block.b, (first + i) * size, size, block.n
      for ring, source in ((keys, k), (values, v)):
        ring.put(passed + i, [hopper_masks.key_tile(source, *tile)])

    lax.fori_loop(0, steps, fill, None)
    return passed + steps

  mosaic.run(C, share.rounds(), work, fetch, [keys, values], own, take_turn)
