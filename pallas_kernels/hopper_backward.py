"""Backward kernels for Hopper; no atomics, so the same bits every time.

Units of 64 rows are numbered as in hopper_masks. `by_keys` keeps tiles of 64
slots in place, one a warpgroup, and passes the units that see them: dk and dv
of all streams in one pass. `by_rows` keeps units in place: dq.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_forward, hopper_masks, mosaic, tuning

ROWS = hopper_masks.ROWS


def backward(q, k, v, prefix, d_out, lse, delta, scale, config: tuning.Hopper):
  """(dq, dk, dv).

  Args:
    q: [B, T, Nq, H], T at least 64.
    k: [B, S, N, H], S at least 64.
    v: [B, S, N, H].
    prefix: None for causal, or the Prefix of hopper_masks.prefix.
    d_out: [B, T, Nq, H], cotangent of the output.
    lse: float32 [B, Nq, T rounded up to 64], as the forward kernel's.
    delta: of that shape, sum(out * d_out) less the cotangent of lse in nats.
    scale: of the scores.
    config: tile sizes.
  """
  arguments = (q, k, v, d_out, lse, delta, prefix, scale, config)
  return by_rows(*arguments), *by_keys(*arguments)


def by_keys(q, k, v, d_out, lse, delta, prefix, scale, config: tuning.Hopper):
  """(dk, dv); arguments as in `backward`."""
  B, _, Nq, H = q.shape
  S, N = k.shape[1:3]
  C, L = config.key_consumers, config.key_stages
  row_ring = mosaic.tiles((L, ROWS, H), q.dtype)
  number_ring = plgpu.SMEM((L, ROWS), jnp.float32)
  key_tiles = mosaic.tiles((C, ROWS, H), q.dtype)
  masks, rings = (), (row_ring, row_ring, number_ring, number_ring)
  if prefix is not None:
    rings += (plgpu.SMEM((L, ROWS), jnp.int32),)
    masks = (*prefix, *hopper_masks.active(prefix, S, C * ROWS, Nq // N))
  return mosaic.kernel(
    functools.partial(_by_keys, scale=scale),
    out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
    grid=(B * N * pl.cdiv(S, C * ROWS),),
    grid_names=("item",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      rings,
      (key_tiles, key_tiles),
      plgpu.Barrier(num_barriers=L, num_arrivals=len(rings)),
      plgpu.Barrier(num_barriers=L, num_arrivals=C),
      plgpu.Barrier(num_barriers=C, num_arrivals=2),
    ],
  )(q, k, v, d_out, lse, delta, *masks)


def _by_keys(q, k, v, d_out, lse, delta, *refs, scale):
  *masks, dk, dv, rings, keys, full, free, keys_full = refs
  prefix, order = tuple(masks[:3]) or None, masks[3:]
  T, Nq, H = q.shape[1:]
  S, N = k.shape[1:3]
  G = Nq // N
  L, C = rings[0].shape[0], keys[0].shape[0]
  blocks, units = pl.cdiv(S, C * ROWS), pl.cdiv(T, ROWS) * G
  item = lax.axis_index("item")
  # The first slots, which most rows see, first.
  block = item % blocks
  n, b = item // blocks % N, item // blocks // N
  skipped = jnp.minimum(block * C * G, units)
  count = order[1][b, block] if order else units - skipped
  warpgroup = lax.axis_index("warpgroup")

  def unit(i):
    """First row and head in the group of the i-th unit that sees the block."""
    u = order[0][b, block, i] if order else skipped + i
    return u // G * ROWS, u % G

  @pl.when(warpgroup < C)
  def _():
    mosaic.take_registers(C)
    own_k, own_v = (x.at[warpgroup] for x in keys)
    first = (block * C + warpgroup) * ROWS
    slots = pl.ds(first, ROWS)
    for source, tile in ((k, own_k), (v, own_v)):
      plgpu.copy_gmem_to_smem(
        source.at[b, slots, n], tile, keys_full.at[warpgroup]
      )
    plgpu.barrier_wait(keys_full.at[warpgroup])

    def step(i, sums):
      start, g = unit(i)
      slot = lax.rem(i, L)
      rows, d_rows, log_sums, means, *visible = (x.at[slot] for x in rings)
      plgpu.barrier_wait(full.at[slot])

      def products(d_keys, d_values, score, d_weight):
        mosaic.product(score, own_k, mosaic.transposed(rows))
        mosaic.product(d_weight, own_v, mosaic.transposed(d_rows))
        shape = (ROWS, ROWS)
        log_sum = mosaic.load(log_sums, mosaic.COLUMNS)
        exponent = mosaic.value(score, pending=1) * (scale / hopper_forward.LN2)
        exponent -= mosaic.along_columns(log_sum, shape)
        counts = None
        if prefix:
          counts = mosaic.load(visible[0], mosaic.COLUMNS)
        least, _ = hopper_masks.span(prefix, b, g, start)
        weight = jnp.exp2(
          hopper_masks.masked(counts, start, first, least, exponent, rows=1)
        )
        mosaic.product(d_values, weight.astype(q.dtype), d_rows)
        mean = mosaic.load(means, mosaic.COLUMNS)
        # The product just issued goes on meanwhile.
        d_score = mosaic.value(d_weight, pending=1)
        d_score = weight * (d_score - mosaic.along_columns(mean, shape))
        mosaic.product(d_keys, d_score.astype(q.dtype), rows)

      sums = mosaic.accumulate(
        sums,
        lambda *sums: mosaic.scoped(
          functools.partial(products, *sums), (ROWS, ROWS), (ROWS, ROWS)
        ),
      )
      # The numbers were read by ordinary loads, the next are written by TMA.
      plgpu.commit_smem()
      plgpu.barrier_arrive(free.at[slot])
      return sums

    zero = mosaic.full((ROWS, H), 0, mosaic.TILE)
    d_keys, d_values = lax.fori_loop(0, count, step, (zero, zero))
    own_k[...] = (d_keys * scale).astype(k.dtype)
    own_v[...] = d_values.astype(v.dtype)
    plgpu.commit_smem()
    for tile, out in ((own_k, dk), (own_v, dv)):
      plgpu.copy_smem_to_gmem(tile, out.at[b, slots, n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == C)
  def _():
    mosaic.leave_registers(C)

    def sources(i):
      start, g = unit(i)
      rows, head = pl.ds(start, ROWS), n * G + g
      found = [x.at[b, rows, head] for x in (q, d_out)]
      found += [x.at[b, head, rows] for x in (lse, delta)]
      if prefix:
        found.append(hopper_masks.counts(prefix, b, g, start))
      return found

    mosaic.fill(count, sources, rings, full, free)


def by_rows(q, k, v, d_out, lse, delta, prefix, scale, config: tuning.Hopper):
  """dq; arguments as in `backward`."""
  B, T, Nq, H = q.shape
  N = k.shape[2]
  C, L = config.query_consumers, config.query_stages
  ring = mosaic.tiles((L, config.query_keys, H), q.dtype)
  own = mosaic.tiles((C, ROWS, H), q.dtype)
  return mosaic.kernel(
    functools.partial(_by_rows, scale=scale, config=config),
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=(B * N * pl.cdiv(pl.cdiv(T, ROWS) * (Nq // N), C),),
    grid_names=("item",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      own,
      own,
      ring,
      ring,
      plgpu.Barrier(num_barriers=C, num_arrivals=2),
      plgpu.Barrier(num_barriers=L, num_arrivals=2),
      plgpu.Barrier(num_barriers=L, num_arrivals=C),
    ],
  )(q, k, v, d_out, lse, delta, *(prefix or ()))


def _by_rows(q, k, v, d_out, lse, delta, *refs, scale, config):
  *prefix, dq, q_smem, d_smem, k_ring, v_ring, rows_full, full, free = refs
  prefix = tuple(prefix) or None
  T, Nq, H = q.shape[1:]
  N = k.shape[2]
  G = Nq // N
  C, L, size = config.query_consumers, config.query_stages, config.query_keys
  block = hopper_masks.Block(T, N, G, C, prefix)
  b, n = block.b, block.n
  steps = pl.cdiv(block.most(), size)
  warpgroup = lax.axis_index("warpgroup")

  @pl.when(warpgroup < C)
  def _():
    mosaic.take_registers(C)
    start, g, inside, least, most = block.unit(warpgroup)
    head = n * G + g
    rows, d_rows = q_smem.at[warpgroup], d_smem.at[warpgroup]
    span = pl.ds(start, ROWS)
    for source, target in ((q, rows), (d_out, d_rows)):
      plgpu.copy_gmem_to_smem(
        source.at[b, span, head], target, rows_full.at[warpgroup]
      )
    shape = (ROWS, size)
    log_sum, mean = (
      mosaic.load(x.at[b, head, span], mosaic.ROWS, optimized=False)
      for x in (lse, delta)
    )
    visible = block.visible(start, g)
    plgpu.barrier_wait(rows_full.at[warpgroup])

    def step(i, sums, masked):
      slot = lax.rem(i, L)
      plgpu.barrier_wait(full.at[slot])

      def products(sum_, score, d_weight):
        mosaic.product(score, rows, mosaic.transposed(k_ring.at[slot]))
        mosaic.product(d_weight, d_rows, mosaic.transposed(v_ring.at[slot]))
        exponent = mosaic.value(score, pending=1) * (scale / hopper_forward.LN2)
        exponent -= mosaic.along_rows(log_sum, shape)
        if masked:
          mask = hopper_masks.seen(visible, start, i * size, shape)
          exponent = jnp.where(mask, exponent, -jnp.inf)
        weight = jnp.exp2(exponent)
        d_score = mosaic.value(d_weight) - mosaic.along_rows(mean, shape)
        d_score = (weight * d_score).astype(q.dtype)
        mosaic.product(sum_, d_score, k_ring.at[slot])

      sums = mosaic.accumulate(
        sums,
        lambda sum_: mosaic.scoped(
          functools.partial(products, sum_), shape, shape
        ),
      )
      plgpu.barrier_arrive(free.at[slot])
      return sums

    def drain(i, _):
      slot = lax.rem(i, L)
      plgpu.barrier_wait(full.at[slot])
      plgpu.barrier_arrive(free.at[slot])

    sums = (mosaic.full((ROWS, H), 0, mosaic.TILE),)
    whole, end = jnp.where(inside, least // size, 0), pl.cdiv(most, size)
    for low, high, masked in ((0, whole, False), (whole, end, True)):
      sums = lax.fori_loop(
        low, high, functools.partial(step, masked=masked), sums
      )
    lax.fori_loop(end, steps, drain, None)

    @pl.when(inside)
    def _():
      rows[...] = (sums[0] * scale).astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(rows, dq.at[b, span, head])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == C)
  def _():
    mosaic.leave_registers(C)

    def sources(i):
      return [x.at[b, pl.ds(i * size, size), n] for x in (k, v)]

    mosaic.fill(steps, sources, (k_ring, v_ring), full, free)
