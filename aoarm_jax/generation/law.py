"""The law of one draw, and what generation returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
  """The law of a draw; traced, so a sweep compiles once.

  Attributes:
    temperature: float32 [], or [B, 1, 1] for one a row; logits are divided by
      it; 0 takes the likeliest.
    top_k: int32 [], keeps the k likeliest tokens; 0 keeps all.
    top_p: float32 [], then keeps the fewest likeliest tokens whose total
      probability reaches top_p. Where both are None nothing is cut, and no
      draw sorts.
  """

  temperature: jax.Array
  top_k: jax.Array | None = None
  top_p: jax.Array | None = None


def make_law(
  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Sampling:
  """The law of plain numbers."""
  if top_k == 0 and top_p >= 1:
    return Sampling(np.float32(temperature))
  return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p))


class Generation(NamedTuple):
  """Texts and the orders in which they came.

  Attributes:
    tokens: int32 [B, T], natural order.
    order: int32 [B, T], known positions first.
    log_p: float32 [B], nats: log-probability of all that was drawn, each token
      under the law that decided it.
    calls: int32 [B], passes of the network until the row was whole: as many as
      it takes alone. Those after, for other rows of the batch, do not count.
    accepted: int32 [B], tokens that were drafts and passed (speculative); every
      other one was drawn anew in the place of a draft that did not.
  """

  tokens: jax.Array
  order: jax.Array
  log_p: jax.Array
  calls: jax.Array
  accepted: jax.Array


def log_p_of(log_p: jax.Array, tokens: jax.Array) -> jax.Array:
  """Of laws [..., V], the log-probability of a token each: [...]."""
  return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def log_law(logits: jax.Array, law: Sampling) -> jax.Array:
  """The sampling law of a conditional.

  Args:
    logits: float32 [..., V].
    law: temperature, then top-k, then top-p. A tie at the border goes to
      the lower token id.

  Returns:
    float32 [..., V] log-probabilities, normalised; -inf where cut.
  """
  V = logits.shape[-1]
  greedy = law.temperature == 0
  # The largest first, so that a small temperature cannot overflow.
  logits = logits - logits.max(axis=-1, keepdims=True)
  logits = logits / jnp.where(greedy, 1.0, law.temperature)
  likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), V, dtype=bool)
  logits = jnp.where(greedy & ~likeliest, -jnp.inf, logits)
  if law.top_k is None and law.top_p is None:
    return jax.nn.log_softmax(logits)
  by_size = jnp.argsort(-logits, axis=-1, stable=True)
  place = jnp.argsort(by_size, axis=-1)
  k = jnp.where(law.top_k == 0, V, law.top_k)
  logits = jnp.where(place < k, logits, -jnp.inf)
  probability = jax.nn.softmax(logits)
  sorted_p = jnp.take_along_axis(probability, by_size, axis=-1)
  before = jnp.cumsum(sorted_p, axis=-1) - sorted_p
  before = jnp.take_along_axis(before, place, axis=-1)
  # Rounded sums reach 1 before the rarest tokens: without a cut, keep them.
  keep = (before < law.top_p) | (place == 0) | (law.top_p >= 1)
  return jax.nn.log_softmax(jnp.where(keep, logits, -jnp.inf))
