"""Slots and logits -> nats: the only place that defines a likelihood.

log p(x | sigma) = sum over ranks r of log p(x_sigma(r) | x_sigma(<r), sigma)
(arXiv 2602.16092, the chain rule in a given order). What differs between
estimators is where the orders come from; estimators.py names them.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import mechanisms, purposes
from aoarm_jax.config import schema as config_lib

# int32 slots [B, S] -> float32 logits [B, R, V]; Network.apply with parameters.
Apply = Callable[[orders.Slots], jax.Array]


def order_nll(
  apply: Apply,
  layout: orders.Layout,
  tokens: jax.Array,
  order: jax.Array,
  *,
  group_start: jax.Array | None = None,
  ranks: jax.Array | None = None,
) -> jax.Array:
  """-log p(x_sigma(r) | x_sigma(<r), sigma), by rank.

  Args:
    apply: slots -> logits.
    layout: of the network. If its mechanism is masked, every rank takes a pass
      of its own, in which this rank and all later ones are masked. Its `end` is
      larger than T + 1 where only the first T positions of its window are
      scored.
    tokens: int [B, T], natural order.
    order: int32 [B, T], permutations of 1..T.
    group_start: bool [B, T], see orders.to_slots: then each rank is conditioned
      on the groups before its own, and a row's sum is the log-probability of
      generating whole groups at once.
    ranks: int32 [B, R], the only ranks to compute, of two streams or a masked
      mechanism; None is all.

  Returns:
    float32 [B, T] nats; column r is rank r ([B, R] where `ranks` are given). A
    row's sum is -log p(x | sigma).
  """
  chex.assert_equal_shape([tokens, order])
  if layout.masked:
    return _masked_chain_nll(apply, layout, tokens, order, ranks)
  logits = apply(
    orders.to_slots(tokens, order, layout, group_start=group_start, ranks=ranks)
  )
  targets = jnp.take_along_axis(tokens.astype(jnp.int32), order - 1, axis=1)
  if ranks is None:
    logits = logits[:, layout.sentinels - 1 :]
  else:
    targets = jnp.take_along_axis(targets, ranks, axis=1)
  return _nll(logits, targets)


def _nll(logits, tokens):
  """-log softmax(logits [..., V]) at `tokens` [...]."""
  log_p = jax.nn.log_softmax(logits)
  # A one-hot product, since the gradient of a gather is a scatter.
  chosen = jax.nn.one_hot(tokens, logits.shape[-1], dtype=log_p.dtype)
  return -jnp.sum(log_p * chosen, axis=-1)


def _masked_chain_nll(apply, layout, tokens, order, ranks):
  rank_of = jnp.argsort(order, axis=1)
  if ranks is None:
    ranks = jnp.broadcast_to(jnp.arange(order.shape[1])[None], order.shape)
  # The rest of the network's window is there, and masked.
  window = ((0, 0), (0, layout.end - 1 - order.shape[1]))
  tokens = jnp.pad(tokens, window)
  rank_of = jnp.pad(rank_of, window, constant_values=layout.end)

  def of_rank(rank):
    by_position = masked_nll(apply, layout, tokens, rank_of >= rank[:, None])
    at = jnp.take_along_axis(order, rank[:, None], axis=1) - 1
    return jnp.take_along_axis(by_position, at, axis=1)[:, 0]

  return jax.lax.map(of_rank, ranks.T).T


def masked_nll(
  apply: Apply, layout: orders.Layout, tokens: jax.Array, masked: jax.Array
) -> jax.Array:
  """-log p(x_p | the tokens that are not masked), by position.

  Args:
    apply: slots -> logits, of a masked mechanism.
    layout: of the network.
    tokens: int [B, T].
    masked: bool [B, T].

  Returns:
    float32 [B, T] nats; 0 where a token is not masked.
  """
  logits = apply(orders.to_masked_slots(tokens, masked, layout))
  nats = _nll(logits[:, layout.sentinels :], tokens.astype(jnp.int32))
  return jnp.where(masked, nats, 0.0)


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


def context_ensembled_nll(
  apply: Apply,
  layout: orders.Layout,
  keys: jax.Array,
  tokens: jax.Array,
  order: jax.Array,
  *,
  contexts: int,
) -> jax.Array:
  """-log mean_k p(x_sigma(r) | x_sigma(<r) in order pi_k), by rank.

  Every conditional is averaged over permutations of what it is conditioned on
  (AO-GPT, arXiv 2506.19935), which are drawn anew for every rank. A normalised
  density in the order sigma, at T * contexts passes.

  Args:
    apply: slots -> logits, of a mechanism that is not masked.
    layout: of the network.
    keys: typed PRNG keys [B].
    tokens: int [B, T].
    order: int32 [B, T], sigma.
    contexts: K permutations.

  Returns:
    float32 [B, T] nats by rank.
  """
  T = order.shape[1]
  at = jnp.arange(T)[None]

  def of_draw(rank_and_draw):
    rank, draw = rank_and_draw
    noise = uniform(fold_rows(keys, rank * contexts + draw), T)
    place = jnp.where(at < rank, noise, 1.0 + at)
    shuffled = jnp.take_along_axis(order, jnp.argsort(place, axis=1), axis=1)
    nats = order_nll(apply, layout, tokens, shuffled)
    return jax.lax.dynamic_index_in_dim(nats, rank, axis=1, keepdims=False)

  grid = jnp.meshgrid(jnp.arange(T), jnp.arange(contexts), indexing="ij")
  nats = jax.lax.map(of_draw, tuple(x.reshape(-1) for x in grid))
  return jax.vmap(ensembled_nll)(nats.reshape(T, contexts, -1)).T


class Draws(NamedTuple):
  """What a training step draws for each sequence; None where not used.

  Attributes:
    order: int32 [B, T].
    group_start: bool [B, T], see orders.to_slots.
    ranks: int32 [B, R], the ranks predicted.
    time: float32 [B], a masked mechanism's share of masked tokens, expected.
    masked: bool [B, T], by position.
  """

  order: jax.Array
  group_start: jax.Array | None = None
  ranks: jax.Array | None = None
  time: jax.Array | None = None
  masked: jax.Array | None = None


def draw(
  key: jax.Array,
  batch: int,
  T: int,
  options: config_lib.Orders,
  train: config_lib.Train,
  kind: mechanisms.Mechanism,
  step: jax.Array,
) -> Draws:
  """Draws a training step's orders and whatever else its loss needs."""

  def fold(purpose):
    return jax.random.fold_in(key, purpose)

  order = orders.draw(key, batch, T, options, step=step)
  if kind.masked:
    time = draw_times(fold(purposes.TIMES), batch, train.least_time)
    masked = draw_masked(row_keys(fold(purposes.MASKS), batch), order, time)
    return Draws(order, time=time, masked=masked)
  ranks = None
  if train.query_fraction < 1:
    R = orders.query_count(T, train.query_fraction)
    noise = uniform(row_keys(fold(purposes.RANKS), batch), T)
    ranks = jnp.sort(jnp.argsort(noise, axis=1)[:, :R], axis=1)
  groups = orders.draw_groups(fold(purposes.GROUPS), batch, T, options)
  return Draws(order, group_start=groups, ranks=ranks)


def draw_times(key: jax.Array, batch: int, least: float) -> jax.Array:
  """Times in [least, 1), each uniform, together evenly spread: float32 [B]."""
  share = jax.random.uniform(key) + jnp.arange(batch) / batch
  return least + (1 - least) * (share % 1)


def draw_masked(
  keys: jax.Array, order: jax.Array, time: jax.Array
) -> jax.Array:
  """Masks the last tokens of every order, Binomial(T, time) of them.

  Of a uniform order this masks every token with probability `time`, each on
  its own: the linear schedule of MDLM.

  Args:
    keys: typed PRNG keys [B].
    order: int32 [B, T].
    time: float32 [B].

  Returns:
    bool [B, T], by position.
  """
  coins = uniform(keys, order.shape[1]) < time[:, None]
  count = coins.sum(axis=1, keepdims=True)
  return jnp.argsort(order, axis=1) >= order.shape[1] - count


def row_keys(
  key: jax.Array, batch: int, first_row: jax.Array | int = 0
) -> jax.Array:
  """A key for every row, of (key, first_row + b) alone: typed keys [B]."""
  return keys_of(key, first_row + jnp.arange(batch))


def keys_of(key: jax.Array, rows: jax.Array) -> jax.Array:
  """A key for every row of indices int32 [B]: typed keys [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_rows(keys: jax.Array, data: jax.Array | int) -> jax.Array:
  """fold_in of the same number into every key of [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def uniform(keys: jax.Array, count: int) -> jax.Array:
  """Numbers in [0, 1) of keys [B]: float32 [B, count]."""
  return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def training_nll(
  apply: Apply, layout: orders.Layout, tokens: jax.Array, draws: Draws
) -> jax.Array:
  """What training minimises: nats of every sequence.

  Without groups an unbiased estimate of -log p(x | sigma), whatever the ranks.
  Of a masked mechanism under uniform orders, of the negative ELBO of MDLM
  (arXiv 2406.07524, eq. 8; all times from least_time on), which is the mean of
  -log p(x | sigma) over uniform orders; under other orders no likelihood.

  Args:
    apply: slots -> logits.
    layout: of the network.
    tokens: int [B, T].
    draws: of this batch.

  Returns:
    float32 [B].
  """
  if draws.masked is not None:
    nats = masked_nll(apply, layout, tokens, draws.masked)
    return nats.sum(axis=1) / draws.time
  nats = order_nll(
    apply,
    layout,
    tokens,
    draws.order,
    group_start=draws.group_start,
    ranks=draws.ranks,
  )
  return nats.sum(axis=1) * (tokens.shape[1] / nats.shape[1])
