"""Any-order attention written out: what every implementation must equal."""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | None,
  scale: float,
) -> jax.Array:
  """Softmax attention over the first `visible` slots; see api for arguments.

  Scores and softmax are float32 (float64 for float64 inputs).
  """
  B, T, Nq, H = q.shape
  S, N = k.shape[1:3]
  accurate = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(B, T, N, Nq // N, H)
  score = scale * jnp.einsum(
    "btngh,bsnh->bngts", q, k, preferred_element_type=accurate
  )
  if visible is None:
    visible = jnp.minimum(jnp.arange(1, T + 1), S)[None]
  seen = (jnp.arange(S) < visible[..., None])[:, None, None]
  # An empty row has no largest score: subtract 0 there, and divide by 1.
  largest = jnp.max(score, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
  largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
  weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - largest, 0.0)), 0.0)
  total = weight.sum(axis=-1, keepdims=True)
  weight = weight / jnp.where(total > 0, total, 1.0)
  out = jnp.einsum(
    "bngts,bsnh->btngh",
    weight.astype(v.dtype),
    v,
    preferred_element_type=accurate,
  )
  return out.reshape(B, T, Nq, H).astype(v.dtype)
