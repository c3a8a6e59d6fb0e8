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

from pallas_kernels import hopper_masks, mosaic, tuning

ROWS = hopper_masks.ROWS
LN2 = math.log(2)


def forward(
  q, k, v, prefix, scale: float, config: tuning.Hopper, with_rest: bool = False
):
  """(out, lse) of attention.

  Args:
    q: [B, T, Nq, H], T at least 64.
    k: [B, S, N, H], S at least 64.
    v: [B, S, N, H].
    prefix: None for causal, or the Prefix of hopper_masks.prefix.
    scale: of the scores.
    config: tile sizes.
    with_rest: whether to return what `out` lost by rounding, too.

  Returns:
    out [B, T, Nq, H]; lse float32 [B, Nq, T rounded up to 64] in base 2, +inf
    for a row that sees nothing; the rest, like out.
  """
  B, T, Nq, H = q.shape
  S, N = k.shape[1:3]
  G = Nq // N
  tiles = pl.cdiv(T, ROWS)
  outs = (
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    jax.ShapeDtypeStruct((B, Nq, tiles * ROWS), jnp.float32),
  )
  factor = scale / LN2
  if max(T, S) <= config.short and tiles * G <= 4 and not with_rest:
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
  if with_rest:
    outs += outs[:1]
  C, L = config.consumers, config.stages
  return mosaic.kernel(
    functools.partial(_long, factor=factor, config=config),
    out_type=outs,
    grid=(B * N * pl.cdiv(tiles * G, C),),
    grid_names=("item",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      mosaic.tiles((C, ROWS, H), q.dtype),
      mosaic.tiles((L, config.keys, H), q.dtype),
      mosaic.tiles((L, config.keys, H), q.dtype),
      plgpu.SMEM((C, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=C),
      plgpu.Barrier(num_barriers=L),
      plgpu.Barrier(num_barriers=L),
      plgpu.Barrier(num_barriers=L, num_arrivals=C),
      plgpu.Barrier(num_barriers=L, num_arrivals=C),
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


def _long(q, k, v, *refs, factor, config):
  """Warpgroups of 64 rows each share a ring of key tiles that one fills."""
  q_smem, k_smem, v_smem, lse_smem = refs[-10:-6]
  q_full, k_full, v_full, k_free, v_free, turn = refs[-6:]
  prefix = refs[:3] if len(refs) > 13 else None
  out, lse, *rest = refs[3 if prefix else 0 : -10]
  T, Nq, H = q.shape[1:]
  N = k.shape[2]
  G = Nq // N
  C, L, size = config.consumers, config.stages, config.keys
  block = hopper_masks.Block(T, N, G, C, prefix)
  b, n = block.b, block.n
  steps = pl.cdiv(block.most(), size)
  warpgroup = lax.axis_index("warpgroup")

  def take_turn():
    if config.pingpong and C == 2:
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

  @pl.when(warpgroup < C)
  def _():
    mosaic.take_registers(C)
    start, g, inside, least, most = block.unit(warpgroup)
    head = n * G + g
    mine, lse_mine = q_smem.at[warpgroup], lse_smem.at[warpgroup]
    plgpu.copy_gmem_to_smem(
      q.at[b, pl.ds(start, ROWS), head], mine, q_full.at[warpgroup]
    )
    visible = block.visible(start, g)
    plgpu.barrier_wait(q_full.at[warpgroup])

    def step(i, carry, masked):
      accumulator, largest, total = carry
      slot = lax.rem(i, L)
      plgpu.barrier_wait(k_full.at[slot])
      score = _scores(mine, k_smem.at[slot], size, take_turn)
      plgpu.barrier_arrive(k_free.at[slot])
      shape = score.shape
      if masked:
        mask = hopper_masks.seen(visible, start, i * size, shape)
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
      if config.pingpong and C == 2:
        plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(v_full.at[slot])
      if config.pingpong and C == 2:
        plgpu.barrier_wait(turn)
      (accumulator,) = mosaic.accumulate(
        (accumulator,),
        lambda result: mosaic.product(result, weight, v_smem.at[slot]),
      )
      plgpu.barrier_arrive(v_free.at[slot])
      return accumulator, largest, total

    def drain(i, _):
      slot = lax.rem(i, L)
      plgpu.barrier_wait(k_full.at[slot])
      plgpu.barrier_arrive(k_free.at[slot])
      plgpu.barrier_wait(v_full.at[slot])
      plgpu.barrier_arrive(v_free.at[slot])
      take_turn()
      take_turn()

    carry = (
      mosaic.full((ROWS, H), 0, mosaic.TILE),
      mosaic.full((ROWS,), -jnp.inf, mosaic.ROWS),
      mosaic.full((ROWS,), 0, mosaic.ROWS),
    )
    whole = jnp.where(inside, least // size, 0)
    end = pl.cdiv(most, size)
    pl.when(warpgroup == 1)(take_turn)
    carry = lax.fori_loop(
      0, whole, functools.partial(step, masked=False), carry
    )
    carry = lax.fori_loop(
      whole, end, functools.partial(step, masked=True), carry
    )
    lax.fori_loop(end, steps, drain, None)
    pl.when(warpgroup == 0)(take_turn)

    @pl.when(inside)
    def _():
      rows = pl.ds(start, ROWS)
      result = _finish(*carry, mine, lse_mine)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mine, out.at[b, rows, head])
      plgpu.copy_smem_to_gmem(lse_mine, lse.at[b, head, rows])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      if rest:
        rounded = result.astype(q.dtype).astype(jnp.float32)
        mine[...] = (result - rounded).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, rest[0].at[b, rows, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == C)
  def _():
    mosaic.leave_registers(C)

    def fill(i, _):
      slot = lax.rem(i, L)
      for ring, source, full, free in (
        (k_smem, k, k_full, k_free),
        (v_smem, v, v_full, v_free),
      ):
        pl.when(i >= L)(functools.partial(plgpu.barrier_wait, free.at[slot]))

        @pl.when(i < steps)
        def _(ring=ring, source=source, full=full):
          plgpu.copy_gmem_to_smem(
            source.at[b, pl.ds(i * size, size), n], ring.at[slot], full.at[slot]
          )

    # Past the last tile it waits until every slot is free.
    lax.fori_loop(0, steps + L, fill, None)
