"""Any-order attention in plain JAX, block by block, for every device.

Only the scores of one block of rows and one block of slots exist at a time, so
the memory is linear in T and in S. The forward pass is the online softmax of
Milakov and Gimelshein (arXiv 1805.02867). The backward pass computes the scores
again from the log-sum-exp, as FlashAttention-2 does (arXiv 2307.08691).

Blocks of slots behind the last one that some row sees are not visited: causal
attention costs little more than half of full attention.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import reference, tuning


class _Blocks(NamedTuple):
  """The arguments of a call, cut into blocks and padded to whole ones.

  R is the number of rows of a block, C its number of slots, G = Nq / N. Every
  array has its blocks along the first axis.

  Attributes:
    q: [T / R, B, N, G, R, H].
    visible: int32 [T / R, B or 1, G or 1, R]; 0 for rows that are padding.
    k: [S / C, B, N, C, H].
    v: [S / C, B, N, C, H].
    rank: int32 [S / C, B or 1, C]; slots that are padding have the largest one.
    visits: int32 [T / R], how many blocks of slots a block of rows visits.
  """

  q: jax.Array
  visible: jax.Array
  k: jax.Array
  v: jax.Array
  rank: jax.Array
  visits: jax.Array


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Return (out, lse) as `reference.attention` does, in linear memory.

  Args:
    q: [B, T, Nq, H]; this argument and the others as in
      `api.any_order_attention`.
    k: [B, S, N, H].
    v: [B, S, N, H].
    visible: int32 [B, T] or [B, T, Nq / N], an int, or None for causal.
    key_rank: int32 [B, S], or None for slots in generation order.
    scale: factor of the scores.

  Returns:
    out [B, T, Nq, H] in v's dtype; lse [B, T, Nq] in nats. Scores, sums and lse
    are float32 (float64 for float64 inputs).
  """
  rows, rank = reference.as_arrays(q.shape[1], k.shape[1], visible, key_rank)
  return _attention(
    q, k, v, rows.astype(jnp.int32), rank.astype(jnp.int32), scale
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  return _forward(q, k, v, visible, key_rank, scale)[0]


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array,
  scale: float,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  blocks = _cut(q, k, v, visible, key_rank)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  full = functools.partial(_full, _varying(q, k, v, visible, key_rank))

  def of_rows(_, block):
    q, visible, visits = block
    rows = q.shape[:-1]

    def of_slots(j, carry):
      row_max, row_sum, total = carry
      k, v = blocks.k[j], blocks.v[j]
      score, seen = _scores(q, k, visible, blocks.rank[j], scale)
      new_max = jnp.maximum(
        row_max, jnp.max(score, -1, where=seen, initial=-jnp.inf)
      )
      # A row that has seen no slot has no maximum.
      finite = jnp.where(jnp.isfinite(new_max), new_max, 0)
      weight = jnp.where(seen, jnp.exp(score - finite[..., None]), 0)
      old = jnp.exp(row_max - finite)
      total = total * old[..., None] + jnp.einsum(
        "bngrc,bnch->bngrh",
        weight.astype(v.dtype),
        v,
        preferred_element_type=wide,
      )
      return new_max, row_sum * old + weight.sum(-1), total

    row_max, row_sum, total = jax.lax.fori_loop(
      0,
      visits,
      of_slots,
      (
        full(rows, -jnp.inf, wide),
        full(rows, 0, wide),
        full(q.shape, 0, wide),
      ),
    )
    divisor = jnp.where(row_sum > 0, row_sum, 1)
    out = (total / divisor[..., None]).astype(v.dtype)
    lse = jnp.where(row_sum > 0, row_max + jnp.log(divisor), -jnp.inf)
    return None, (out, lse)

  _, (out, lse) = jax.lax.scan(
    of_rows, None, (blocks.q, blocks.visible, blocks.visits)
  )
  out, lse = _joined(out, q.shape), _joined(lse, q.shape[:3])
  return (out, lse), (q, k, v, visible, key_rank, out, lse)


def _backward(
  scale: float,
  residuals: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
  q, k, v, visible, key_rank, out, lse = residuals
  d_out, d_lse = cotangents
  blocks = _cut(q, k, v, visible, key_rank)
  R, group = blocks.q.shape[4], blocks.q.shape[3]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  full = functools.partial(_full, _varying(*residuals, *cotangents))
  product = functools.partial(jnp.einsum, preferred_element_type=wide)
  # A score's derivative is its weight times (d_weight - rest).
  rest = (d_out.astype(wide) * out.astype(wide)).sum(-1) - d_lse
  # A row that sees no slot has no weights, whatever its log-sum-exp is.
  lse = jnp.where(jnp.isfinite(lse), lse, 0)

  def of_rows(carry, block):
    q, visible, visits, d_out, lse, rest = block

    def of_slots(j, carry):
      dq, dk, dv = carry
      k, v = blocks.k[j], blocks.v[j]
      score, seen = _scores(q, k, visible, blocks.rank[j], scale)
      weight = jnp.where(seen, jnp.exp(score - lse[..., None]), 0)
      d_weight = product("bngrh,bnch->bngrc", d_out, v)
      d_score = scale * weight * (d_weight - rest[..., None])
      weight, d_score = weight.astype(v.dtype), d_score.astype(q.dtype)
      dq += product("bngrc,bnch->bngrh", d_score, k)
      dk = dk.at[j].add(product("bngrc,bngrh->bnch", d_score, q))
      dv = dv.at[j].add(product("bngrc,bngrh->bnch", weight, d_out))
      return dq, dk, dv

    dq, *carry = jax.lax.fori_loop(
      0, visits, of_slots, (full(q.shape, 0, wide), *carry)
    )
    return tuple(carry), dq.astype(q.dtype)

  rows = (_row_blocks(x, R, group) for x in (d_out, lse, rest))
  (dk, dv), dq = jax.lax.scan(
    of_rows,
    tuple(full(x.shape, 0, wide) for x in (blocks.k, blocks.v)),
    (blocks.q, blocks.visible, blocks.visits, *rows),
  )
  dk, dv = (
    jnp.moveaxis(dx, (0, 3), (1, 2)).reshape(k.shape[0], -1, *k.shape[2:])
    for dx in (dk, dv)
  )
  S = k.shape[1]
  gradients = _joined(dq, q.shape), dk[:, :S], dv[:, :S]
  return (
    *(_like(d, x) for d, x in zip(gradients, (q, k, v), strict=True)),
    None,
    None,
  )


_attention.defvjp(_forward, _backward)


def _scores(
  q: jax.Array, k: jax.Array, visible: jax.Array, rank: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Return the scores [B, N, G, R, C] of two blocks, and which are seen."""
  score = scale * jnp.einsum(
    "bngrh,bnch->bngrc",
    q,
    k,
    preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
  )
  return score, (rank[:, None, None] < visible[..., None])[:, None]


def _varying(*arrays: jax.Array) -> frozenset[str]:
  """Return the axes of jax.shard_map over which an array of these varies."""
  kinds = (jax.typeof(x).manual_axis_type.varying for x in arrays)
  return frozenset().union(*kinds)


def _full(
  axes: frozenset[str],
  shape: tuple[int, ...],
  value: float,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Return jnp.full(shape, value, dtype) that varies over axes."""
  return jax.lax.pcast(jnp.full(shape, value, dtype), (*axes,), to="varying")


def _like(gradient: jax.Array, x: jax.Array) -> jax.Array:
  """Return the gradient of x in its dtype, summed over devices that share x."""
  shared = _varying(gradient) - _varying(x)
  return jax.lax.psum(gradient, (*shared,)).astype(x.dtype)


def _cut(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  key_rank: jax.Array,
) -> _Blocks:
  """Cut the arguments into blocks."""
  (B, T, Nq, H), (S, N) = q.shape, k.shape[1:3]
  R, C = tuning.blockwise(T, S)
  rank = _padded(key_rank, C, jnp.iinfo(jnp.int32).max)
  rank = jnp.moveaxis(rank.reshape(rank.shape[0], -1, C), 1, 0)
  rows = jnp.moveaxis(_padded(visible, R, 0), 2, 1)
  rows = jnp.moveaxis(rows.reshape(*rows.shape[:2], -1, R), 2, 0)
  key_blocks, value_blocks = (
    jnp.moveaxis(_padded(x, C, 0).reshape(B, -1, C, N, H), (1, 3), (0, 2))
    for x in (k, v)
  )
  seen = rank.min((1, 2)) < rows.max((1, 2, 3))[:, None]
  visits = jnp.where(seen, jnp.arange(1, 1 + rank.shape[0]), 0).max(1)
  return _Blocks(
    _row_blocks(q, R, Nq // N), rows, key_blocks, value_blocks, rank, visits
  )


def _row_blocks(x: jax.Array, R: int, group: int) -> jax.Array:
  """Return [B, T, Nq, ...] as [T / R, B, N, G, R, ...], padded with 0."""
  B, _, Nq, *features = x.shape
  x = _padded(x, R, 0).reshape(B, -1, R, Nq // group, group, *features)
  return jnp.moveaxis(x, (1, 2), (0, 4))


def _joined(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Return [T / R, B, N, G, R, ...] as `shape`, [B, T, Nq, ...]."""
  x = jnp.moveaxis(x, (0, 4), (1, 2))
  return x.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _padded(x: jax.Array, multiple: int, value: int) -> jax.Array:
  """Return x, its second axis filled up to a multiple with a value."""
  missing = -x.shape[1] % multiple
  widths = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
  return jnp.pad(x, widths, constant_values=value)
