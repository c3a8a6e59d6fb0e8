"""Log-probabilities as a differentiable function of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax import lengths, objective
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import network as network_lib


class LogProb(NamedTuple):
  """Log-probabilities of a batch of texts, in nats.

  Attributes:
    total: float32 [B], log p(x | order), the sum of `by_token`.
    by_token: float32 [B, n], by position: the log-probability of each token
      given the tokens before it in the order.
  """

  total: jax.Array
  by_token: jax.Array


def log_prob(
  network: network_lib.Network,
  params: Any,
  tokens: jax.typing.ArrayLike,
  order: jax.typing.ArrayLike,
) -> LogProb:
  """Return log p(tokens | order) by the chain rule; see api.Model.log_prob.

  Args:
    network: the network.
    params: the network's parameters.
    tokens: int [B, n], n <= T.
    order: int [B, n] or [n], permutations of 1..n.

  Raises:
    ConfigError: shapes, types or values are wrong. Values are checked outside
      of jit only.
  """
  given = tokens, order
  tokens, order = jnp.asarray(tokens), jnp.asarray(order)
  _check_shapes(network, tokens, order)
  _check_values(network, *given)
  tokens = tokens.astype(jnp.int32)
  order = jnp.broadcast_to(order.astype(jnp.int32), tokens.shape)
  layout = network.layout
  # The ranks of the result are those of this order.
  order = lengths.real_first(order, lengths.real(tokens, layout))
  nats = objective.order_nll(network.bind(params), layout, tokens, order)
  by_token = jnp.take_along_axis(-nats, jnp.argsort(order, axis=1), axis=1)
  return LogProb(by_token.sum(axis=1), by_token)


def _check_shapes(network, tokens, order):
  """Raise ConfigError if shapes or types are wrong."""
  for name, array in (("tokens", tokens), ("order", order)):
    if not jnp.issubdtype(array.dtype, jnp.integer):
      raise config_lib.ConfigError(
        f"{name}: {array.dtype} array; give whole numbers"
      )
  T = network.model.T
  if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= T:
    raise config_lib.ConfigError(
      f"tokens: shape {tokens.shape}; must be [B, n], 1 <= n <= {T} "
      "(config.model.T)"
    )
  if order.shape not in (tokens.shape, tokens.shape[1:]):
    raise config_lib.ConfigError(
      f"order: shape {order.shape}; must be that of tokens, {tokens.shape}, or "
      f"{tokens.shape[1:]} for all rows"
    )


def _check_values(network, tokens, order):
  """Raise ConfigError if concrete values are wrong."""
  if not isinstance(tokens, jax.core.Tracer):
    values, V = np.asarray(tokens), network.tokenizer.V
    wrong = values[(values < 0) | (values >= V)]
    if len(wrong):
      raise config_lib.ConfigError(
        f"tokens: {wrong[0]} is no token id; ids are 0 to {V - 1}"
      )
  if not isinstance(order, jax.core.Tracer):
    values = np.asarray(order)
    natural = np.arange(1, values.shape[-1] + 1)
    if (np.sort(values, axis=-1) != natural).any():
      raise config_lib.ConfigError(
        f"order: a row is no permutation of 1..{len(natural)}; positions count "
        "from 1"
      )
    if network.model.kind.left_to_right and (values != natural).any():
      raise config_lib.ConfigError(
        f"order: mechanism {network.model.mechanism} reads from left to right "
        "only"
      )
