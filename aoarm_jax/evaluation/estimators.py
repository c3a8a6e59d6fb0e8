"""The estimators of a likelihood: their names and what each one averages.

| name              | the average over sequences x of                          |
|-------------------|----------------------------------------------------------|
| any_order         | -log p(x | sigma), sigma uniform                         |
| training_order    | the same, with sigma (and groups) drawn as in training   |
| left_to_right     | the same, with sigma = 1..T                              |
| given_order       | the same, with sigma = config.orders.given               |
| ensembled         | -log mean_k p(x | sigma_k) over K uniform orders sigma_k |
| context_ensembled | sum over ranks of -log mean_k p(x_sigma(r) | its past in |
|                   | order pi_k): sigma uniform, K permutations pi_k per rank |
|                   | (AO-GPT, arXiv 2506.19935)                               |
| elbo              | the negative ELBO of a masked mechanism over all times   |
|                   | from train.least_time on (MDLM, arXiv 2406.07524); it    |
|                   | estimates the mean of any_order without the chain rule   |

All estimators but elbo are exact likelihoods of the sequences under the named
orders. They are different quantities, so a number never appears without the
name of its estimator, and one column never holds two of them. The only
exception is elbo and any_order, which estimate the same quantity.

Every estimator is also defined for a block of a sequence given the tokens
before the block. Then x is the block, the orders are those of its positions,
and the given tokens come first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from aoarm_jax import lengths, objective, orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import network as network_lib

_FAMILIES = {
  "any_order": "uniform",
  "left_to_right": "left_to_right",
  "given_order": "given",
}


def estimate(
  estimator: str,
  config: config_lib.Config,
  network: network_lib.Network,
  params: Any,
  key: jax.Array,
  step: jax.Array,
  first_row: jax.Array,
  tokens: jax.Array,
  real: jax.Array,
  ranks: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any], jax.Array, jax.Array]:
  """Return one batch's share of an estimate.

  The random draws for a sequence depend on the key and on the sequence's index
  among all sequences, and not on the batch.

  Args:
    estimator: a name of schema.ESTIMATORS.
    config: the config; its sections orders and eval and train.least_time are
      read.
    network: the network whose likelihood is estimated.
    params: the network's parameters.
    key: typed PRNG key.
    step: int32 [], training steps of the parameters. The orders of
      training_order under a curriculum depend on it.
    first_row: int32 [], index of row 0 among all sequences.
    tokens: int [B, T].
    real: bool [B]. Rows that are not real are padding and enter no sum.
    ranks: int32 [B, R], consecutive ranks, of which those below T are scored.
      They make up a block: the positions of the same numbers. The tokens before
      the block are given, and those after it are unknown. None scores all
      ranks.

  Returns:
    A tuple of four:
      nats: float32 [B], for each sequence or block.
      sums: sums over the real sequences, {} for an estimator without ranks and
        for blocks.
        by_rank is float32 [T] nats. by_distance and by_recency are pairs
        (nats, tokens) of float32 [bins], with the bins of `bin_edges`. The
        padding of documents has no part in them.
      real: as it was given.
      first_row: int32 [], the first row of the next batch.
  """
  tokens = tokens.astype(jnp.int32)
  B, T = tokens.shape
  apply, layout = network.bind(params), network.layout
  order_nll = functools.partial(nll_of_ranks, network, params, tokens, ranks)
  length = lengths.real(tokens, layout)
  known = end = None
  if ranks is not None:
    known, end = ranks[:, 0], ranks[:, 0] + (ranks < T).sum(axis=1)

  def draw(key, family="uniform"):
    options = config.replace("orders.family", family).orders
    order = orders.draw(key, B, T, options, step=step, first_row=first_row)
    order = lengths.real_first(order, length)
    if ranks is not None:
      order = orders.by_class(order, _classes(known, end, T))
    return sharding.constrain(order, "batch")

  def of_draw(k):
    return draw(jax.random.fold_in(key, k))

  row_key = jax.random.fold_in(key, purposes.ROWS)
  row_keys = objective.row_keys(row_key, B, first_row)
  sums = {}
  match estimator:
    case "ensembled":
      nats = objective.ensembled_nll(
        jax.lax.map(
          lambda k: order_nll(of_draw(k)).sum(axis=1),
          jnp.arange(config.eval.ensemble_orders),
        )
      )
    case "context_ensembled":
      picked = None if ranks is None else jnp.minimum(ranks, T - 1)
      by_rank = objective.context_ensembled_nll(
        apply,
        layout,
        row_keys,
        tokens,
        draw(key),
        contexts=config.eval.ensemble_orders,
        ranks=picked,
      )
      if ranks is not None:
        by_rank = jnp.where(ranks < T, by_rank, 0.0)
      nats = by_rank.sum(axis=1)
    case "elbo":
      nats = _elbo(
        functools.partial(objective.masked_nll, apply, layout, tokens),
        row_keys,
        of_draw,
        config.eval.times,
        config.train.least_time,
        length if end is None else end,
        known,
      )
    case _:
      groups = None
      if estimator == "training_order":
        groups = orders.draw_groups(
          jax.random.fold_in(key, purposes.GROUPS),
          B,
          T,
          config.orders,
          first_row=first_row,
        )
        if groups is not None and known is not None:
          # No group has both given and scored tokens.
          groups |= jnp.arange(T)[None] == known[:, None]
      order = draw(key, _FAMILIES.get(estimator, config.orders.family))
      by_rank = order_nll(order, groups)
      nats = by_rank.sum(axis=1)
      is_counted = real[:, None]
      if length is not None:
        is_counted &= lengths.is_real(length, T)
      if ranks is None:
        sums = _sums_by(by_rank, order, is_counted)
  return nats, sums, real, first_row + B


def nll_of_ranks(
  network: network_lib.Network,
  params: Any,
  tokens: jax.Array,
  ranks: jax.Array | None,
  order: jax.Array,
  group_start: jax.Array | None = None,
) -> jax.Array:
  """Return objective.order_nll of some ranks.

  Only these ranks are computed where the network allows it.

  Args:
    network: the network.
    params: the network's parameters.
    tokens: int32 [B, T].
    ranks: int32 [B, R]. Ranks from T on have 0 nats. None means all ranks.
    order: int32 [B, T].
    group_start: bool [B, T], see orders.to_slots.

  Returns:
    float32 [B, R] nats; [B, T] for all ranks.
  """
  nll = functools.partial(
    objective.order_nll,
    network.bind(params),
    network.layout,
    tokens,
    order,
    group_start=group_start,
  )
  if ranks is None:
    return nll()
  picked = jnp.minimum(ranks, tokens.shape[1] - 1)
  if network.can_pick_ranks:
    by_rank = nll(ranks=picked)
  else:
    by_rank = jnp.take_along_axis(nll(), picked, axis=1)
  return jnp.where(ranks < tokens.shape[1], by_rank, 0.0)


def _classes(known, end, T):
  """Return the class of every position: int32 [B, T].

  Args:
    known: int32 [B], the number of given positions: class 0.
    end: int32 [B], the number of positions up to the end of the block, which is
      class 1. Later positions are class 2.
    T: the number of positions.
  """
  return 2 - lengths.is_real(known, T) * 1 - lengths.is_real(end, T) * 1


def _elbo(masked_nll, row_keys, of_draw, times, least_time, length, known=None):
  """Return the negative ELBO (arXiv 2406.07524, eq. 8): float32 [B] nats.

  The times of every sequence are evenly spread over [least_time, 1), which
  lowers the variance of their mean.

  Args:
    masked_nll: function from masked, bool [B, T], to nats, float32 [B, T].
    row_keys: typed PRNG keys [B].
    of_draw: function from k to the k-th orders, int32 [B, T].
    times: number of times K for each sequence.
    least_time: the smallest time, in (0, 1).
    length: int32 [B], the real positions of padded documents, or None.
    known: int32 [B], the number of given tokens before a block, which then ends
      at `length`. All later tokens are masked, and they count nothing.
  """
  row_times = jax.vmap(
    lambda row_key: objective.draw_times(row_key, times, least_time)
  )(row_keys)

  def of_time(k_and_time):
    k, time = k_and_time
    masked = objective.draw_masked(
      objective.fold_rows(row_keys, k), of_draw(k), time, length, known
    )
    if known is None:
      return masked_nll(masked).sum(axis=1) / time
    is_after = ~lengths.is_real(length, masked.shape[1])
    nats = masked_nll(masked | is_after)
    return jnp.where(is_after, 0.0, nats).sum(axis=1) / time

  return jax.lax.map(of_time, (jnp.arange(times), row_times.T)).mean(axis=0)


def _sums_by(by_rank, order, is_counted):
  """Return the sums of nats [B, T] where they are counted, see `estimate`.

  Args:
    by_rank: float32 [B, T] nats.
    order: int32 [B, T].
    is_counted: bool [B, 1] or [B, T].
  """
  counted = jnp.where(is_counted, by_rank, 0.0)
  near = orders.nearest(order)
  return {
    "by_rank": counted.sum(axis=0),
    "by_distance": _binned(near.distance, counted, is_counted),
    "by_recency": _binned(near.recency, counted, is_counted),
  }


def _binned(number, nats, is_counted):
  """Return (sums of nats, counts of tokens) by a number [B, T]: each [bins]."""
  edges = jnp.array(bin_edges((number.shape[1] - 1).bit_length() + 2))
  one_hot = jax.nn.one_hot(jnp.searchsorted(edges, number), len(edges))
  one_hot = one_hot * is_counted[..., None]
  return jnp.einsum("bt,btk->k", nats, one_hot), one_hot.sum(axis=(0, 1))


def bin_edges(count: int) -> list[int]:
  """Return the highest number in each bin of a distance: 0, 1, 2, 4, 8, ...

  Args:
    count: number of bins.
  """
  return [0, *(2**i for i in range(count - 1))]
