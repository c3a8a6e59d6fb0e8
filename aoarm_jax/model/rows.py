"""What the backbone starts from: the pieces that mechanisms are made of.

aoarm_jax/mechanisms.py says which mechanism has which piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax import config as config_lib
from aoarm_jax import orders
from aoarm_jax.model import layers


class Rows(NamedTuple):
  """The rows of all streams, and what is known about each.

  The first S rows of stream 0 are the content of the slots. What is read out
  is the last stream or, where a lone stream has more than S rows, the rest.

  Attributes:
    x: [G, B, R, D], compute dtype.
    query_position: int32 [G, B, R, K], the positions by which queries turn,
      one after the other among the rotary pairs; None: they do not turn.
    key_position: int32 [B, S], by which keys turn, or None.
    target: int32 [G, B, R], the position that conditions each row, or None.
    visible: int32 [G, B, R], how many leading slots each row sees; an int is
      the same for all, None is causal.
  """

  x: jax.Array
  query_position: jax.Array | None
  key_position: jax.Array | None
  target: jax.Array | None
  visible: jax.Array | int | None


def read_out(x: jax.Array, S: int) -> jax.Array:
  """Of [G, B, R, ...], the rows that are read out: [1, B, R', ...]."""
  if x.shape[0] > 1:
    return x[-1:]
  return x[:, :, S:] if x.shape[2] > S else x


class Start(nnx.Module):
  """Content of the slots -> Rows, from the pieces of the model's mechanism."""

  def __init__(self, model: config_lib.Model, *, rngs: nnx.Rngs):
    self.kind, D = model.kind, model.D
    positions = model.T + 2  # BOS and EOS have positions of their own.
    if self.kind.streams == 2:
      self.query_start = layers.normal(rngs, (D,), ("vector",))
    if self.kind.added:
      width = D // len(self.kind.added)
      self.added = layers.normal(
        rngs,
        (len(self.kind.added), positions, width),
        (None, "positions", "embed"),
      )
    if self.kind.condition:
      self.target = layers.normal(
        rngs,
        (positions, self.kind.condition),
        ("positions", "condition"),
        model.condition_scale,
      )

  def __call__(self, content: jax.Array, slots: orders.Slots) -> Rows:
    """content [B, S, D] in compute dtype -> Rows."""
    kind = self.kind
    places = {"content": slots.position, "target": slots.target_position}
    if kind.added:
      tables = layers.used(self.added, content.dtype)
      content += jnp.concatenate(
        [
          layers.look_up(table, places[name])
          for table, name in zip(tables, kind.added)
        ],
        axis=-1,
      )
    turns = [places[name] for name in kind.query]
    rows = Rows(
      x=content[None],
      query_position=jnp.stack(turns, axis=-1)[None] if turns else None,
      key_position=slots.position if turns else None,
      target=slots.target_position[None] if kind.condition else None,
      visible=content.shape[1] if kind.masked else None,
    )
    return self._two_streams(rows, slots) if kind.streams == 2 else rows

  def _two_streams(self, one, slots):
    """Adds the query rows; `one` has their positions, content turns by c."""
    content, turn = one.x[0], slots.position[..., None]
    query = self.query_start[...].astype(content.dtype)
    visible = slots.visible
    if slots.queries is None:
      return one._replace(
        x=jnp.stack([content, jnp.broadcast_to(query, content.shape)]),
        query_position=jnp.stack([turn, one.query_position[0]]),
        visible=None if visible is None else jnp.moveaxis(visible, 2, 0),
      )
    # Not one for every slot: then they stand behind the content rows.
    B, S, D = content.shape
    target, seen = slots.queries
    own = jnp.arange(1, S + 1)[None] if visible is None else visible[..., 0]
    query = jnp.broadcast_to(query, (B, target.shape[1], D))
    return one._replace(
      x=jnp.concatenate([content, query], axis=1)[None],
      query_position=jnp.concatenate([turn, target[..., None]], axis=1)[None],
      visible=jnp.concatenate([jnp.broadcast_to(own, (B, S)), seen], axis=1)[
        None
      ],
    )
