"""Any-order attention in plain JAX: the definition of every implementation."""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Return (out, lse) of softmax attention under the any-order mask.

  Args:
    q: [B, T, Nq, H]; this argument and the others as in
      `api.any_order_attention`.
    k: [B, S, N, H].
    v: [B, S, N, H].
    visible: int32 [B, T] or [B, T, Nq / N], an int, or None for causal.
    key_rank: int32 [B, S], or None for slots in generation order.
    scale: factor of the scores.

  Returns:
    out [B, T, Nq, H] in v's dtype; lse [B, T, Nq] in nats. Scores, softmax and
    lse are float32 (float64 for float64 inputs).
  """
  B, T, Nq, H = q.shape
  S, N = k.shape[1:3]
  accumulator_dtype = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(B, T, N, Nq // N, H)
  score = scale * jnp.einsum(
    "btngh,bsnh->bngts", q, k, preferred_element_type=accumulator_dtype
  )
  seen = mask(T, S, visible, key_rank)[:, None]
  # A row that sees no slot has no maximum: subtract 0 there, and divide by 1.
  row_max = jnp.max(score, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
  row_max = jnp.where(jnp.isfinite(row_max), row_max, 0.0)
  weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - row_max, 0.0)), 0.0)
  row_sum = weight.sum(axis=-1, keepdims=True)
  divisor = jnp.where(row_sum > 0, row_sum, 1.0)
  out = jnp.einsum(
    "bngts,bsnh->btngh",
    (weight / divisor).astype(v.dtype),
    v,
    preferred_element_type=accumulator_dtype,
  )
  lse = jnp.where(row_sum > 0, row_max + jnp.log(divisor), -jnp.inf)
  lse = jnp.moveaxis(lse[..., 0], 3, 1)
  return out.reshape(B, T, Nq, H).astype(v.dtype), lse.reshape(B, T, Nq)


def mask(
  T: int,
  S: int,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
) -> jax.Array:
  """Return which slots each row sees: bool [B or 1, G or 1, T, S].

  Args:
    T: rows.
    S: slots.
    visible: int32 [B, T] or [B, T, G], an int, or None for causal.
    key_rank: int32 [B, S], or None for slots in generation order.
  """
  visible, key_rank = as_arrays(T, S, visible, key_rank)
  return key_rank[:, None, None] < jnp.moveaxis(visible, 2, 1)[..., None]


def as_arrays(
  T: int,
  S: int,
  visible: jax.Array | int | None,
  key_rank: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Return the two arguments of a mask as arrays that broadcast.

  Args:
    T: rows.
    S: slots.
    visible: int32 [B, T] or [B, T, G], an int, or None for causal.
    key_rank: int32 [B, S], or None for slots in generation order.

  Returns:
    (visible [B or 1, T, G or 1], key_rank [B or 1, S]).
  """
  if visible is None:
    visible = jnp.minimum(jnp.arange(1, T + 1), S)[None]
  elif isinstance(visible, int):
    visible = jnp.full((1, T), visible)
  if visible.ndim == 2:
    visible = visible[..., None]
  if key_rank is None:
    key_rank = jnp.arange(S)[None]
  return visible, key_rank
