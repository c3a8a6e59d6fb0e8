"""How a row learns which position it predicts: the one place they differ.

A mechanism turns the content of the slots into rows for the backbone. To add
one, write a module here, put it into `MECHANISMS` and into the choices of
`config.Model.mechanism`, and give it a file in configs/.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax import config as config_lib
from aoarm_jax import orders
from aoarm_jax.model import layers


class Rows(NamedTuple):
  """What the backbone starts from.

  Attributes:
    x: [G, B, S, D], compute dtype; stream 0 is content, the last is read out.
    query_position: int32 [G, B, S], the rotation of each row's query, or None.
    key_position: int32 [B, S], the rotation of each slot's key, or None.
  """

  x: jax.Array
  query_position: jax.Array | None
  key_position: jax.Array | None


class TwoStream(nnx.Module):
  """Content rows and query rows (XLNet, arXiv 1906.08237, section 2.3).

  A query row starts as one learned vector and its query is rotated by the
  target's position. Keys and values come from content alone, so a cached slot
  is bound to nothing but its past.
  """

  streams = 2

  def __init__(self, model: config_lib.Model, *, rngs: nnx.Rngs):
    self.query_start = layers.normal(rngs, (model.D,))

  def __call__(self, content: jax.Array, slots: orders.Slots) -> Rows:
    query = self.query_start[...].astype(content.dtype)
    query = jnp.broadcast_to(query, content.shape)
    return Rows(
      x=jnp.stack([content, query]),
      query_position=jnp.stack([slots.position, slots.target_position]),
      key_position=slots.position,
    )


class DecoupledRoPE(nnx.Module):
  """One stream: the query leads, the key lags (arXiv 2602.16092).

  The query is rotated by the position to be predicted, the key by the position
  observed. A cached slot is bound to its target from the second layer on.
  """

  streams = 1

  def __init__(self, model: config_lib.Model, *, rngs: nnx.Rngs):
    del model, rngs  # No parameters of its own.

  def __call__(self, content: jax.Array, slots: orders.Slots) -> Rows:
    return Rows(
      x=content[None],
      query_position=slots.target_position[None],
      key_position=slots.position,
    )


class Causal(nnx.Module):
  """The autoregressive baseline: plain RoPE, left to right only."""

  streams = 1

  def __init__(self, model: config_lib.Model, *, rngs: nnx.Rngs):
    del model, rngs  # No parameters of its own.

  def __call__(self, content: jax.Array, slots: orders.Slots) -> Rows:
    return Rows(
      x=content[None],
      query_position=slots.position[None],
      key_position=slots.position,
    )


MECHANISMS = {
  "two_stream": TwoStream,
  "decoupled_rope": DecoupledRoPE,
  "causal": Causal,
}
