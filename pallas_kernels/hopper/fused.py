"""All gradients in one kernel, for short sequences of keys on Hopper.

A thread block holds all slots of a key head, 64 a warpgroup, and passes the
units of its streams once (hopper_masks numbers them): every array is read
and written once. It also makes the sums sum_j p_ij dp_ij itself, in float32,
where sum_h out_ih d_out_ih would need `out` and suffer from its rounding.
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


def backward(q, k, v, prefix, d_out, lse, d_lse, scale, config: tuning.Hopper):
  """(dq, dk, dv).

  Args:
    q: [B, T, Nq, H], T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64.
    v: [B, S, N, H].
    prefix: None for causal, or the Prefix of hopper_masks.prefix.
    d_out: [B, T, Nq, H], cotangent of the output.
    lse: float32 [B, Nq, T rounded up to 64], as the forward kernel's.
    d_lse: of that shape, its cotangent in nats; 0 where lse is infinite.
    scale: of the scores.
    config: tile sizes; S is at most config.fused.
  """
  B, H = q.shape[0], q.shape[3]
  S, N = k.shape[1:3]
  C, L = pl.cdiv(S, ROWS), config.fused_stages
  share = mosaic.share(B * N, config.blocks)
  depth = min(config.fused_depth, pl.cdiv(share.items, share.blocks))
  rows = mosaic.tiles((L, ROWS, H), q.dtype)
  numbers = plgpu.SMEM((L, ROWS), jnp.float32)
  keys = mosaic.tiles((depth, C, ROWS, H), q.dtype)
  rings = [rows, rows, numbers, numbers]
  if prefix is not None:
    rings.append(plgpu.SMEM((L, ROWS), jnp.int32))
  outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
  return mosaic.kernel(
    functools.partial(_kernel, scale=scale, share=share),
    out_type=tuple(outs),
    grid=(share.blocks,),
    grid_names=("block",),
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      mosaic.ring(*rings, readers=C),
      mosaic.ring(keys, keys, readers=C, parts=C),
      # Weights; their cotangents, for the warpgroup that makes dq; dq; sums.
      mosaic.tiles((C, ROWS, ROWS), q.dtype),
      mosaic.tiles((C, C, ROWS, ROWS), q.dtype),
      mosaic.tiles((C, ROWS, H), q.dtype),
      plgpu.SMEM((2, C, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=C, num_arrivals=C),
      plgpu.Barrier(num_barriers=C),
      plgpu.Barrier(num_arrivals=C),
    ],
  )(q, k, v, d_out, lse, d_lse, *(prefix or ()))


def _kernel(q, k, v, d_out, lse, d_lse, *refs, scale, share):
  *prefix, dq, dk, dv, rows_ring, keys = refs[:-7]
  weights, shared, dq_smem, parts, shared_full, shared_free, added = refs[-7:]
  prefix = tuple(prefix) or None
  T, Nq, H = q.shape[1:]
  N = k.shape[2]
  G = Nq // N
  C = keys.tiles[0].shape[1]
  count = pl.cdiv(T, ROWS) * G
  warpgroup = lax.axis_index("warpgroup")

  def item(j):
    return divmod(share.item(j), N)

  def work(j, passed):
    b, n = item(j)
    k_tiles, v_tiles = keys.wait(j)

    def step(i, sums):
      start, g = i // G * ROWS, i % G
      rows, d_rows, numbers, d_numbers, *visible = rows_ring.wait(passed + i)
      mine = (rows, d_rows, k_tiles.at[warpgroup], v_tiles.at[warpgroup])
      counts = mosaic.load(visible[0], mosaic.ROWS) if prefix else None
      least, most = hopper_masks.span(prefix, b, g, start)
      useful = warpgroup * ROWS < most
      mask = functools.partial(
        hopper_masks.masked, counts, start, warpgroup * ROWS, least
      )
      nothing = (mosaic.full((ROWS, ROWS), 0, mosaic.TILE),) * 2
      weight, d_weight = lax.cond(
        useful,
        lambda: _weights(*mine, numbers, mask, scale),
        lambda: nothing,
      )
      part = parts.at[lax.rem(i, 2)]
      part.at[warpgroup][...] = (weight * d_weight).sum(axis=1)
      plgpu.barrier_arrive(added)
      weights.at[warpgroup][...] = weight.astype(q.dtype)
      mean = -mosaic.load(d_numbers, mosaic.ROWS)
      plgpu.barrier_wait(added)
      for w in range(C):
        mean += mosaic.load(part.at[w], mosaic.ROWS)
      d_score = weight * (d_weight - mosaic.along_rows(mean, weight.shape))
      turn = lax.rem(i, C)
      pl.when(i >= C)(lambda: plgpu.barrier_wait(shared_free.at[turn]))
      tile = shared.at[turn, warpgroup]
      tile[...] = d_score.astype(q.dtype)
      plgpu.commit_smem()
      plgpu.barrier_arrive(shared_full.at[turn])

      def products(d_keys, d_values):
        weight = mosaic.transposed(weights.at[warpgroup])
        mosaic.product(d_values, weight, d_rows)
        mosaic.product(d_keys, mosaic.transposed(tile), rows)

      sums = lax.cond(
        useful,
        lambda sums: tuple(mosaic.accumulate(sums, products)),
        lambda sums: sums,
        sums,
      )
      rows_ring.release(passed + i)
      pl.when(turn == warpgroup)(
        lambda: make_dq(dq.at[b, pl.ds(start, ROWS), n * G + g])
      )
      return sums

    def make_dq(out):
      plgpu.barrier_wait(shared_full.at[warpgroup])

      def multiply(sum_):
        for w in range(C):
          mosaic.product(sum_, shared.at[warpgroup, w], k_tiles.at[w])
        return mosaic.value(sum_)

      result = mosaic.scoped(multiply, (ROWS, H)) * scale
      plgpu.barrier_arrive(shared_free.at[warpgroup])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      staging = dq_smem.at[warpgroup]
      staging[...] = result.astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(staging, out)

    zero = mosaic.full((ROWS, H), 0, mosaic.TILE)
    d_keys, d_values = lax.fori_loop(0, count, step, (zero, zero))
    # Nobody reads the keys any more when all shared tiles are free again.
    mosaic.settle(shared_free, count, C)
    slots = pl.ds(warpgroup * ROWS, ROWS)
    for tiles, sum_, out in (
      (k_tiles, d_keys * scale, dk),
      (v_tiles, d_values, dv),
    ):
      tile = tiles.at[warpgroup]
      tile[...] = sum_.astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(tile, out.at[b, slots, n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    keys.release(j)
    return passed + count

  def fetch(j, passed):
    b, n = item(j)
    slots = [pl.ds(w * ROWS + j * 0, ROWS) for w in range(C)]
    keys.put(j, [[x.at[b, at, n] for at in slots] for x in (k, v)])

    def fill(i, _):
      start, g = i // G * ROWS, i % G
      sources = hopper_masks.rows_of(
        (q, d_out), (lse, d_lse), prefix, b, n * G + g, g, start
      )
      rows_ring.put(passed + i, sources)

    lax.fori_loop(0, count, fill, None)
    return passed + count

  mosaic.run(C, share.rounds(), work, fetch, [rows_ring], keys)


def _weights(rows, d_rows, keys, values, numbers, mask, scale):
  """Weights of a tile, and the products of d_out with the values."""

  def products(score, d_weight):
    mosaic.product(score, rows, mosaic.transposed(keys))
    mosaic.product(d_weight, d_rows, mosaic.transposed(values))
    log_sum = mosaic.load(numbers, mosaic.ROWS)
    exponent = mosaic.value(score, pending=1) * (scale / hopper_forward.LN2)
    exponent -= mosaic.along_rows(log_sum, exponent.shape)
    return jnp.exp2(mask(exponent)), mosaic.value(d_weight)

  return mosaic.scoped(products, (ROWS, ROWS), (ROWS, ROWS))
