"""What each estimator of a likelihood is. Names are never dropped.

| name              | what is averaged over sequences                         |
|-------------------|---------------------------------------------------------|
| any_order         | -log p(x | sigma), sigma uniform                        |
| training_order    | the same, sigma (and groups) as in training             |
| left_to_right     | the same, sigma = 1..T                                  |
| given_order       | the same, sigma = config.orders.given                   |
| ensembled         | -log mean_k p(x | sigma_k) over K uniform orders        |
| context_ensembled | sum over ranks of -log mean_k p(x_sigma(r) | its past in |
|                   | order pi_k), sigma uniform, K permutations pi_k a rank   |
| elbo              | of a masked mechanism, all times from least_time on; the |
|                   | mean of any_order, estimated without the chain rule      |

All but elbo are exact likelihoods of the sequences under the named orders.
They are different quantities (but elbo and any_order, which estimate one):
never put two of them in one column.
"""

import functools

import jax
import jax.numpy as jnp

from aoarm_jax import objective, orders
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
  params,
  key: jax.Array,
  step: jax.Array,
  first_row: jax.Array,
  tokens: jax.Array,
  real: jax.Array,
):
  """One batch's share of an estimate; what row b draws depends on its index.

  Args:
    estimator: a name of config.ESTIMATORS.
    config: its orders, eval and train.least_time.
    network: whose likelihood it is.
    params: of the network.
    key: typed PRNG key.
    step: of the parameters; training_order under a curriculum depends on it.
    first_row: index of row 0 among all sequences.
    tokens: int [B, T].
    real: bool [B]; other rows are padding and are in no sum.

  Returns:
    nats float32 [B], of each sequence; sums over tokens, {} for an estimator
    without ranks, else by_rank float32 [T] and, as (nats, tokens) by bin,
    by_distance and by_recency; `real`; the next batch's first_row.
  """
  tokens = tokens.astype(jnp.int32)
  B, T = tokens.shape
  law = network.bind(params), network.layout
  order_nll = functools.partial(objective.order_nll, *law, tokens)

  def draw(key, family="uniform"):
    options = config.replace("orders.family", family).orders
    order = orders.draw(key, B, T, options, step=step, first_row=first_row)
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
      nats = objective.context_ensembled_nll(
        *law,
        row_keys,
        tokens,
        draw(key),
        contexts=config.eval.ensemble_orders,
      ).sum(axis=1)
    case "elbo":
      nats = _elbo(
        law,
        tokens,
        row_keys,
        of_draw,
        config.eval.times,
        config.train.least_time,
      )
    case _:
      groups = None
      if estimator == "training_order":
        groups = orders.draw_groups(
          jax.random.fold_in(key, purposes.GROUPS),
          B, T, config.orders, first_row=first_row,
        )  # fmt: skip
      order = draw(key, _FAMILIES.get(estimator, config.orders.family))
      by_rank = order_nll(order, group_start=groups)
      nats = by_rank.sum(axis=1)
      sums = _sums_by(by_rank, order, real)
  return nats, sums, real, first_row + B


def _elbo(law, tokens, row_keys, of_draw, times, least_time):
  """Mean over times, which are evenly spread for every sequence: [B]."""
  spread = jax.vmap(
    lambda row_key: objective.draw_times(row_key, times, least_time)
  )(row_keys)

  def of_time(k_and_time):
    k, time = k_and_time
    masked = objective.draw_masked(
      objective.fold_rows(row_keys, k), of_draw(k), time
    )
    nats = objective.masked_nll(*law, tokens, masked)
    return nats.sum(axis=1) / time

  return jax.lax.map(of_time, (jnp.arange(times), spread.T)).mean(axis=0)


def _sums_by(by_rank, order, real):
  """Sums of nats [B, T] over the sequences that are real."""
  counted = jnp.where(real[:, None], by_rank, 0.0)
  near = orders.nearest(order)
  return {
    "by_rank": counted.sum(axis=0),
    "by_distance": _binned(near.distance, counted, real),
    "by_recency": _binned(near.recency, counted, real),
  }


def _binned(number, nats, real):
  edges = jnp.array(bin_edges((number.shape[1] - 1).bit_length() + 2))
  one_hot = jax.nn.one_hot(jnp.searchsorted(edges, number), len(edges))
  one_hot = one_hot * real[:, None, None]
  return jnp.einsum("bt,btk->k", nats, one_hot), one_hot.sum(axis=(0, 1))


def bin_edges(count: int) -> list[int]:
  """The highest numbers of the bins of a distance: 0, 1, 2, 4, 8 and so on."""
  return [0, *(2**i for i in range(count - 1))]
