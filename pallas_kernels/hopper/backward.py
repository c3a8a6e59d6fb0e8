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

from pallas_kernels import tuning
from pallas_kernels.hopper import forward as hopper_forward
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic

ROWS = hopper_masks.ROWS


def backward(q, k, v, prefix, d_out, lse, delta, scale, config: tuning.Hopper):
  """(dq, dk, dv).

  Args:
    q: [B, T, Nq, H], T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64; or see
      hopper_masks.key_tile.
    v: like k.
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
  S, N = hopper_masks.keys(q, k)
  C, L = config.key_consumers, config.key_stages
  rows = mosaic.tiles((L, ROWS, H), q.dtype)
  numbers = plgpu.SMEM((L, ROWS), jnp.float32)
  keys = mosaic.tiles((config.key_places, C, ROWS, H), q.dtype)
  masks, rings = (), [rows, rows, numbers, numbers]
  if prefix is not None:
    rings.append(plgpu.SMEM((L, ROWS), jnp.int32))
    masks = (*prefix, *hopper_masks.active(prefix, S, C * ROWS, Nq // N))
  share = mosaic.share(B * N * pl.cdiv(S, C * ROWS), config.blocks)
  return mosaic.kernel(
    functools.partial(_by_keys, scale=scale, share=share),
    out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
    grid=(share.blocks,),
    grid_names=("block",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      mosaic.ring(*rings, readers=C),
      mosaic.ring(keys, keys, readers=C, parts=C),
      mosaic.tiles((2, C, ROWS, H), q.dtype),
    ],
  )(q, k, v, d_out, lse, delta, *masks)


def _by_keys(q, k, v, d_out, lse, delta, *refs, scale, share):
  *masks, dk, dv, rows, keys, staging = refs
  prefix, order = tuple(masks[:3]) or None, masks[3:]
  B, T, Nq, H = q.shape
  S, N = hopper_masks.keys(q, k)
  G, C = Nq // N, keys.tiles[0].shape[1]
  blocks, units = pl.cdiv(S, C * ROWS), pl.cdiv(T, ROWS) * G
  warpgroup = lax.axis_index("warpgroup")

  def take(r):
    """Sequence, key head, first slot of a round; units; the i-th of these."""
    item = share.item(r)
    # The first slots, which most rows see, first.
    block = item % blocks
    n, b = item // blocks % N, item // blocks // N
    skipped = jnp.minimum(block * C * G, units)
    count = order[1][b, block] if order else units - skipped

    def unit(i):
      """First row and head in its group, of the i-th that sees the block."""
      u = order[0][b, block, i] if order else skipped + i
      return u // G * ROWS, u % G

    return b, n, block * C * ROWS, count, unit

  def work(r, passed):
    b, n, first, count, unit = take(r)
    first += warpgroup * ROWS
    own_k, own_v = (x.at[warpgroup] for x in keys.wait(r))

    def step(i, sums):
      start, g = unit(i)
      mine, d_mine, log_sums, means, *visible = rows.wait(passed + i)

      def products(d_keys, d_values, score, d_weight):
        mosaic.product(score, own_k, mosaic.transposed(mine))
        mosaic.product(d_weight, own_v, mosaic.transposed(d_mine))
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
        mosaic.product(d_values, weight.astype(q.dtype), d_mine)
        mean = mosaic.load(means, mosaic.COLUMNS)
        # The product just issued goes on meanwhile.
        d_score = mosaic.value(d_weight, pending=1)
        d_score = weight * (d_score - mosaic.along_columns(mean, shape))
        mosaic.product(d_keys, d_score.astype(q.dtype), mine)

      sums = mosaic.accumulate(
        sums,
        lambda *sums: mosaic.scoped(
          functools.partial(products, *sums), (ROWS, ROWS), (ROWS, ROWS)
        ),
      )
      # The numbers were read by ordinary loads, the next are written by TMA.
      plgpu.commit_smem()
      rows.release(passed + i)
      return sums

    zero = mosaic.full((ROWS, H), 0, mosaic.TILE)
    d_keys, d_values = lax.fori_loop(0, count, step, (zero, zero))
    keys.release(r)
    # What was stored before has left.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    mine_k, mine_v = staging.at[0, warpgroup], staging.at[1, warpgroup]
    mine_k[...] = (d_keys * scale).astype(k.dtype)
    mine_v[...] = d_values.astype(v.dtype)
    plgpu.commit_smem()
    for tile, out in ((mine_k, dk), (mine_v, dv)):
      target = hopper_masks.key_tile(out, B, b, first, ROWS, n)
      plgpu.copy_smem_to_gmem(tile, target)
    return passed + count

  def fetch(r, passed):
    b, n, first, count, unit = take(r)
    tiles = [(B, b, first + w * ROWS, ROWS, n) for w in range(C)]
    keys.put(
      r, [[hopper_masks.key_tile(x, *at) for at in tiles] for x in (k, v)]
    )

    def fill(i, _):
      start, g = unit(i)
      sources = hopper_masks.rows_of(
        (q, d_out), (lse, delta), prefix, b, n * G + g, g, start
      )
      rows.put(passed + i, sources)

    lax.fori_loop(0, count, fill, None)
    return passed + count

  mosaic.run(C, share.rounds(), work, fetch, [rows], keys)


def by_rows(q, k, v, d_out, lse, delta, prefix, scale, config: tuning.Hopper):
  """dq; arguments as in `backward`."""
  B, T, Nq, H = q.shape
  N = k.shape[2]
  C, L = config.query_consumers, config.query_stages
  keys = mosaic.tiles((L, config.query_keys, H), q.dtype)
  shape = (config.query_places, C, ROWS)
  rows = mosaic.tiles((*shape, H), q.dtype)
  numbers = plgpu.SMEM(shape, jnp.float32)
  own = [rows, rows, numbers, numbers]
  if prefix is not None:
    own.append(plgpu.SMEM(shape, jnp.int32))
  share = mosaic.share(
    hopper_masks.Block.items(B, T, N, Nq // N, C), config.blocks
  )
  return mosaic.kernel(
    functools.partial(_by_rows, scale=scale, config=config, share=share),
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    grid=(share.blocks,),
    grid_names=("block",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      mosaic.ring(*own, readers=C, parts=C),
      mosaic.ring(keys, keys, readers=C),
      mosaic.tiles((C, ROWS, H), q.dtype),
    ],
  )(q, k, v, d_out, lse, delta, *(prefix or ()))


def _by_rows(q, k, v, d_out, lse, delta, *refs, scale, config, share):
  *prefix, dq, own, keys, staging = refs
  prefix = tuple(prefix) or None
  B, T, Nq, H = q.shape
  N = k.shape[2]
  G = Nq // N
  C, size = config.query_consumers, config.query_keys
  warpgroup = lax.axis_index("warpgroup")

  def take(r):
    """The block of a round, and how many key tiles it passes."""
    block = hopper_masks.Block(share.item(r), T, N, G, C, prefix)
    return block, pl.cdiv(block.most(), size)

  def work(r, passed):
    block, steps = take(r)
    start, g, inside, least, most = block.unit(warpgroup)
    rows, d_rows, *numbers = (x.at[warpgroup] for x in own.wait(r))
    shape = (ROWS, size)
    log_sum, mean, *visible = (mosaic.load(x, mosaic.ROWS) for x in numbers)
    visible = visible[0] if prefix else None

    def step(i, sums, masked):
      k_tile, v_tile = keys.wait(passed + i)

      def products(sum_, score, d_weight):
        mosaic.product(score, rows, mosaic.transposed(k_tile))
        mosaic.product(d_weight, d_rows, mosaic.transposed(v_tile))
        exponent = mosaic.value(score, pending=1) * (scale / hopper_forward.LN2)
        exponent -= mosaic.along_rows(log_sum, shape)
        if masked:
          mask = hopper_masks.seen(visible, start, i * size, shape)
          exponent = jnp.where(mask, exponent, -jnp.inf)
        weight = jnp.exp2(exponent)
        d_score = mosaic.value(d_weight) - mosaic.along_rows(mean, shape)
        d_score = (weight * d_score).astype(q.dtype)
        mosaic.product(sum_, d_score, k_tile)

      sums = mosaic.accumulate(
        sums,
        lambda sum_: mosaic.scoped(
          functools.partial(products, sum_), shape, shape
        ),
      )
      keys.release(passed + i)
      return sums

    def drain(i, _):
      keys.wait(passed + i)
      keys.release(passed + i)

    sums = (mosaic.full((ROWS, H), 0, mosaic.TILE),)
    whole, end = jnp.where(inside, least // size, 0), pl.cdiv(most, size)
    for low, high, masked in ((0, whole, False), (whole, end, True)):
      sums = lax.fori_loop(
        low, high, functools.partial(step, masked=masked), sums
      )
    lax.fori_loop(end, steps, drain, None)
    # The numbers were read by ordinary loads, the next are written by TMA.
    plgpu.commit_smem()
    own.release(r)

    @pl.when(inside)
    def _():
      tile = staging.at[warpgroup]
      # What was stored before has left.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      tile[...] = (sums[0] * scale).astype(q.dtype)
      plgpu.commit_smem()
      head = block.n * G + g
      plgpu.copy_smem_to_gmem(tile, dq.at[block.b, pl.ds(start, ROWS), head])

    return passed + steps

  def fetch(r, passed):
    block, steps = take(r)
    block.load(own, r, (q, d_out), (lse, delta))

    def fill(i, _):
      tile = B, block.b, i * size, size, block.n
      keys.put(passed + i, [hopper_masks.key_tile(x, *tile) for x in (k, v)])

    lax.fori_loop(0, steps, fill, None)
    return passed + steps

  mosaic.run(C, share.rounds(), work, fetch, [keys], own)
