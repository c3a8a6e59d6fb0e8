"""Any-order attention written out: what every implementation must equal."""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | None,
  key_rank: jax.Array | None,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of softmax attention under the any-order mask; see api.

  Scores, softmax and lse are float32 (float64 for float64 inputs).
  """
  B, T, Nq, H = q.shape
  S, N = k.shape[1:3]
  accurate = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(B, T, N, Nq // N, H)
  score = scale * jnp.einsum(
    "btngh,bsnh->bngts", q, k, preferred_element_type=accurate
  )
  seen = mask(T, S, visible, key_rank)[:, None]
  # An empty row has no largest score: subtract 0 there, and divide by 1.
  largest = jnp.max(score, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
  largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
  weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - largest, 0.0)), 0.0)
  total = weight.sum(axis=-1, keepdims=True)
  some = jnp.where(total > 0, total, 1.0)
  out = jnp.einsum(
    "bngts,bsnh->btngh",
    (weight / some).astype(v.dtype),
    v,
    preferred_element_type=accurate,
  )
  lse = jnp.where(total > 0, largest + jnp.log(some), -jnp.inf)
  lse = jnp.moveaxis(lse[..., 0], 3, 1)
  return out.reshape(B, T, Nq, H).astype(v.dtype), lse.reshape(B, T, Nq)


def mask(
  T: int, S: int, visible: jax.Array | None, key_rank: jax.Array | None
) -> jax.Array:
  """Which slots each row sees: bool [B or 1, G or 1, T, S]."""
  if visible is None:
    visible = jnp.minimum(jnp.arange(1, T + 1), S)[None]
  if visible.ndim == 2:
    visible = visible[..., None]
  if key_rank is None:
    key_rank = jnp.arange(S)[None]
  return key_rank[:, None, None] < jnp.moveaxis(visible, 2, 1)[..., None]
