"""Backward kernels for Hopper; no atomics, so the same bits every time.

Units of 64 rows are numbered as in hopper_forward. `by_keys` keeps tiles of 64
slots in place, one a warpgroup, and passes the units that see them: dk and dv
of all streams in one pass. Where its thread block holds all slots, it makes dq
too, and every array is read once. Otherwise `by_rows` makes dq.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_forward, mosaic, tuning

ROWS = hopper_forward.ROWS


def backward(q, k, v, prefix, d_out, lse, delta, scale, config: tuning.Hopper):
  """(dq, dk, dv).

  Args:
    q: [B, T, Nq, H], T at least 64.
    k: [B, S, N, H], S at least 64.
    v: [B, S, N, H].
    prefix: None for causal, or the Prefix of hopper.prefix.
    d_out: [B, T, Nq, H], cotangent of the output.
    lse: float32 [B, Nq, T rounded up to 64], as the forward kernel's.
    delta: of that shape, sum(out * d_out) less the cotangent of lse in nats.
    scale: of the scores.
    config: tile sizes.
  """
  arrays = (q, k, v, d_out, lse, delta)
  if k.shape[1] <= config.fused:
    return by_keys(*arrays, prefix, scale, config, fused=True)
  dk, dv = by_keys(*arrays, prefix, scale, config, fused=False)
  return by_rows(*arrays, prefix, scale, config), dk, dv


def active(prefix, S: int, slots: int, G: int) -> tuple[jax.Array, jax.Array]:
  """Which units see something of each block of slots.

  Args:
    prefix: of hopper.prefix.
    S: slots.
    slots: of a block.
    G: query heads of a key head.

  Returns:
    int32 [B, blocks, units], the units that see the block, in order, then the
    others; int32 [B, blocks], how many do.
  """
  most = jnp.moveaxis(prefix.most, 1, 2)
  most = jnp.broadcast_to(most, (*most.shape[:2], G)).reshape(len(most), 1, -1)
  first = jnp.arange(pl.cdiv(S, slots))[:, None] * slots
  idle = most <= first
  order = jnp.argsort(idle, axis=-1, stable=True).astype(jnp.int32)
  return order, jnp.sum(~idle, axis=-1, dtype=jnp.int32)


def by_keys(
  q, k, v, d_out, lse, delta, prefix, scale, config: tuning.Hopper, fused: bool
):
  """(dk, dv), or with `fused` (dq, dk, dv); arguments as in `backward`."""
  B, _, Nq, H = q.shape
  S, N = k.shape[1:3]
  C, L = config.key_consumers, config.key_stages
  blocks = pl.cdiv(S, C * ROWS)
  if fused and blocks > 1:
    raise ValueError(f"S={S} slots do not fit {C} tiles of {ROWS}")
  items = B * N * blocks
  grid = min(items, config.blocks) if fused else items
  # Two buffers: the next key head is loaded while this one is worked on.
  depth = 2 if grid < items else 1
  row_ring = mosaic.tiles((L, ROWS, H), q.dtype)
  key_tiles = mosaic.tiles((depth, C, ROWS, H), q.dtype)
  number_ring = plgpu.SMEM((L, ROWS), jnp.float32)
  scratch = [
    row_ring,
    row_ring,
    number_ring,
    number_ring,
    key_tiles,
    key_tiles,
    plgpu.Barrier(num_barriers=L, num_arrivals=4),
    plgpu.Barrier(num_barriers=L, num_arrivals=C),
    plgpu.Barrier(num_barriers=depth, num_arrivals=2 * C),
    plgpu.Barrier(num_barriers=depth, num_arrivals=C),
  ]
  outs = [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2
  if fused:
    outs.insert(0, jax.ShapeDtypeStruct(q.shape, q.dtype))
    scratch += [
      mosaic.tiles((C, C, ROWS, ROWS), q.dtype),
      mosaic.tiles((C, ROWS, H), q.dtype),
      plgpu.Barrier(num_barriers=C, num_arrivals=C),
      plgpu.Barrier(num_barriers=C),
    ]
  masks = ()
  if prefix is not None:
    # dq of rows that see nothing must be written too.
    lists = () if fused else active(prefix, S, C * ROWS, Nq // N)
    masks = (*prefix, *lists)
  return mosaic.kernel(
    functools.partial(
      _by_keys, scale=scale, grid=grid, config=config, fused=fused
    ),
    out_type=tuple(outs),
    grid=(grid,),
    grid_names=("block",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
  )(q, k, v, d_out, lse, delta, *masks)


def _by_keys(q, k, v, d_out, lse, delta, *refs, scale, grid, config, fused):
  parts = 3 if fused else 2
  own = 14 if fused else 10
  masks, outs, scratch = (
    refs[: -own - parts],
    refs[-own - parts : -own],
    refs[-own:],
  )
  prefix, order = masks[:3] or None, masks[3:] or None
  q_ring, d_ring, lse_ring, delta_ring, k_smem, v_smem = scratch[:6]
  full, free, keys_full, keys_free = scratch[6:10]
  if fused:
    shared, dq_smem, shared_full, shared_free = scratch[10:]
  B, T, Nq, H = q.shape
  S, N = k.shape[1:3]
  G = Nq // N
  C, L, depth = config.key_consumers, config.key_stages, k_smem.shape[0]
  blocks = pl.cdiv(S, C * ROWS)
  units = pl.cdiv(T, ROWS) * G
  first_item = lax.axis_index("block")
  rounds = pl.cdiv(B * N * blocks - first_item, grid)
  warpgroup = lax.axis_index("warpgroup")

  def item(j):
    """Sequence, key head, block of slots, and the units that see it."""
    i = first_item + j * grid
    # The first slots are seen by the most rows.
    block = i % blocks
    n, b = i // blocks % N, i // blocks // N
    if order is None:
      skipped = jnp.minimum(block * C * G, units)
      return b, n, block, units - skipped, lambda i: skipped + i
    return b, n, block, order[1][b, block], lambda i: order[0][b, block, i]

  def work(j, passed):
    b, n, block, count, unit = item(j)
    place = lax.rem(j, depth)
    keys, values = k_smem.at[place, warpgroup], v_smem.at[place, warpgroup]
    first = (block * C + warpgroup) * ROWS
    plgpu.barrier_wait(keys_full.at[place])

    def step(i, sums):
      u = unit(i)
      start, g = u // G * ROWS, u % G
      slot = lax.rem(passed + i, L)
      rows, d_rows = q_ring.at[slot], d_ring.at[slot]
      plgpu.barrier_wait(full.at[slot])
      mask = functools.partial(_mask, prefix, b, g, start, first, S)

      def products(d_keys, d_values, score, d_weight):
        mosaic.product(score, keys, mosaic.transposed(rows))
        mosaic.product(d_weight, values, mosaic.transposed(d_rows))
        shape = (ROWS, ROWS)
        numbers = mosaic.load(lse_ring.at[slot], mosaic.COLUMNS)
        exponent = mosaic.value(score, pending=1) * (scale / hopper_forward.LN2)
        exponent -= mosaic.along_columns(numbers, shape)
        weight = jnp.exp2(mask(exponent))
        mosaic.product(d_values, weight.astype(q.dtype), d_rows)
        numbers = mosaic.load(delta_ring.at[slot], mosaic.COLUMNS)
        # The product just issued goes on meanwhile.
        d_score = mosaic.value(d_weight, pending=1)
        d_score = weight * (d_score - mosaic.along_columns(numbers, shape))
        d_score = d_score.astype(q.dtype)
        mosaic.product(d_keys, d_score, rows)
        if fused:
          share(i, d_score)

      sums = mosaic.accumulate(
        sums,
        lambda *sums: mosaic.scoped(
          functools.partial(products, *sums), (ROWS, ROWS), (ROWS, ROWS)
        ),
      )
      # Numbers were read otherwise than by wgmma.
      plgpu.commit_smem()
      plgpu.barrier_arrive(free.at[slot])
      if fused:
        make_dq(i, outs[0].at[b, pl.ds(start, ROWS), n * G + g])
      return sums

    def share(i, d_score):
      """Puts a tile where the warpgroup that makes the unit's dq finds it."""
      slot = lax.rem(i, C)
      pl.when(i >= C)(lambda: plgpu.barrier_wait(shared_free.at[slot]))
      shared.at[slot, warpgroup][...] = d_score
      plgpu.commit_smem()
      plgpu.barrier_arrive(shared_full.at[slot])

    def make_dq(i, out):
      @pl.when(lax.rem(i, C) == warpgroup)
      def _():
        plgpu.barrier_wait(shared_full.at[warpgroup])

        def multiply(sum_):
          for w in range(C):
            # The tile is [slots, rows].
            tile = mosaic.transposed(shared.at[warpgroup, w])
            mosaic.product(sum_, tile, k_smem.at[place, w])
          return mosaic.value(sum_)

        dq = mosaic.scoped(multiply, (ROWS, H)) * scale
        plgpu.barrier_arrive(shared_free.at[warpgroup])
        mine = dq_smem.at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mine[...] = dq.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out)

    zero = mosaic.full((ROWS, H), 0, mosaic.TILE)
    dk, dv = lax.fori_loop(0, count, step, (zero, zero))
    if fused:
      # Nobody reads the keys any more when all shared tiles are free again.
      _settle(shared_free, count, C)
    keys[...] = (dk * scale).astype(k.dtype)
    values[...] = dv.astype(v.dtype)
    plgpu.commit_smem()
    for tile, out in zip((keys, values), outs[-2:]):
      plgpu.copy_smem_to_gmem(tile, out.at[b, pl.ds(first, ROWS), n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(keys_free.at[place])
    return passed + count

  @pl.when(warpgroup < C)
  def _():
    plgpu.set_max_registers(240 if C == 2 else 160, action="increase")
    lax.fori_loop(0, rounds, work, jnp.int32(0))

  def fetch(j, passed):
    b, n, block, count, unit = item(j)
    place = lax.rem(j, depth)
    pl.when(j >= depth)(lambda: plgpu.barrier_wait(keys_free.at[place]))
    for w in range(C):
      slots = pl.ds((block * C + w) * ROWS, ROWS)
      for source, target in ((k, k_smem), (v, v_smem)):
        plgpu.copy_gmem_to_smem(
          source.at[b, slots, n], target.at[place, w], keys_full.at[place]
        )

    def fill(i, _):
      slot = lax.rem(passed + i, L)
      pl.when(passed + i >= L)(lambda: plgpu.barrier_wait(free.at[slot]))
      u = unit(i)
      rows, head = pl.ds(u // G * ROWS, ROWS), n * G + u % G
      for source, target in (
        (q.at[b, rows, head], q_ring),
        (d_out.at[b, rows, head], d_ring),
        (lse.at[b, head, rows], lse_ring),
        (delta.at[b, head, rows], delta_ring),
      ):
        plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

    lax.fori_loop(0, count, fill, None)
    return passed + count

  @pl.when(warpgroup == C)
  def _():
    plgpu.set_max_registers(24 if C == 2 else 32, action="decrease")
    passed = lax.fori_loop(0, rounds, fetch, jnp.int32(0))
    # Memory is in use until all is free.
    _settle(free, passed, L)
    _settle(keys_free, rounds, depth)


def _settle(free, used, size: int):
  """Waits for what `used` rounds over a ring of barriers have not seen yet."""

  def wait(i, _):
    pl.when(i >= size)(lambda: plgpu.barrier_wait(free.at[lax.rem(i, size)]))

  lax.fori_loop(used, used + size, wait, None)


def _mask(prefix, b, g, start, first, S, exponent):
  """-inf where a row (axis 1) does not see a slot (axis 0)."""
  shape = exponent.shape

  def masked(exponent):
    slot = mosaic.iota(shape, 0) + first
    if prefix is None:
      visible = slot <= mosaic.iota(shape, 1) + start
    else:
      head = jnp.minimum(g, prefix[0].shape[1] - 1)
      rows = prefix[0].at[b, head, pl.ds(start, ROWS)]
      counts = mosaic.load(rows, mosaic.COLUMNS, optimized=False)
      visible = slot < mosaic.along_columns(counts, shape)
    return jnp.where(visible, exponent, -jnp.inf)

  least, _ = hopper_forward.span(prefix, b, g, start, S)
  whole = first + ROWS <= least
  return lax.cond(whole, lambda exponent: exponent, masked, exponent)


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
  S, N = k.shape[1:3]
  G = Nq // N
  C, L, size = config.query_consumers, config.query_stages, config.query_keys
  block = hopper_forward.Block(T, S, N, G, C, prefix)
  b, n = block.b, block.n
  steps = pl.cdiv(block.most(), size)
  warpgroup = lax.axis_index("warpgroup")

  @pl.when(warpgroup < C)
  def _():
    plgpu.set_max_registers(240 if C == 2 else 160, action="increase")
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
          visible = hopper_forward.seen(prefix, b, g, start, i * size, shape)
          exponent = jnp.where(visible, exponent, -jnp.inf)
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
    plgpu.set_max_registers(24 if C == 2 else 32, action="decrease")

    def fill(i, _):
      slot = lax.rem(i, L)
      pl.when(i >= L)(lambda: plgpu.barrier_wait(free.at[slot]))
      slots = pl.ds(i * size, size)
      for source, ring in ((k, k_ring), (v, v_ring)):
        plgpu.copy_gmem_to_smem(
          source.at[b, slots, n], ring.at[slot], full.at[slot]
        )

    lax.fori_loop(0, steps, fill, None)
    _settle(free, steps, L)
