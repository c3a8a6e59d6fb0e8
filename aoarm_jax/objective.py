"""Slots and logits -> nats: the only place that defines a likelihood.

log p(x | sigma) = sum over ranks r of log p(x_sigma(r) | x_sigma(<r), sigma)
(arXiv 2602.16092, the chain rule in a given order). What differs between
estimators is where the orders come from; evaluate.py names them.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import orders

# int32 slots [B, S] -> float32 logits [B, S, V]
Network = Callable[[orders.Slots], jax.Array]


def order_nll(
  network: Network,
  tokens: jax.Array,
  order: jax.Array,
  *,
  sentinels: int,
  vocabulary: int,
) -> jax.Array:
  """-log p(x_sigma(r) | x_sigma(<r), sigma), by rank.

  Args:
    network: slots -> logits.
    tokens: int [B, T], natural order.
    order: int32 [B, T], permutations of 1..T.
    sentinels: s, 1 or 2.
    vocabulary: V.

  Returns:
    float32 [B, T] nats; column r is rank r. A row's sum is -log p(x | sigma).
  """
  chex.assert_equal_shape([tokens, order])
  logits = network(orders.to_slots(tokens, order, sentinels, vocabulary))
  targets = jnp.take_along_axis(tokens, order - 1, axis=1).astype(jnp.int32)
  log_p = jax.nn.log_softmax(logits[:, sentinels - 1 :])
  # A one-hot product, since the gradient of a gather is a scatter.
  chosen = jax.nn.one_hot(targets, vocabulary, dtype=log_p.dtype)
  return -jnp.sum(log_p * chosen, axis=-1)


def ensembled_nll(sequence_nats: jax.Array) -> jax.Array:
  """-log mean_k p(x | sigma_k).

  Args:
    sequence_nats: float32 [K, B], -log p(x | sigma_k).

  Returns:
    float32 [B] nats. Its mean over orders is at most the mean of
    `sequence_nats` (Jensen), so never compare it with any_order.
  """
  K = sequence_nats.shape[0]
  return jnp.log(K) - jax.nn.logsumexp(-sequence_nats, axis=0)
