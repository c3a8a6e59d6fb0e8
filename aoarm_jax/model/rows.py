"""What the backbone starts from: the pieces that mechanisms are made of.

aoarm_jax/config/mechanisms.py says which mechanism has which piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import layers


class Rows(NamedTuple):
  """The rows of a stream, and what is known about each.

  The first S rows of stream 0 are the content of the slots. What is read out
  is the last stream or, where it has more than S rows, the rest of them.

  Attributes:
    x: [B, R, D], compute dtype.
    query_position: int32 [B, R, K], the positions by which queries turn, one
      after the other among the rotary pairs; None: they do not turn.
    target: int32 [B, R], the position that conditions each row, or None.
    visible: int32 [B, R], how many leading slots each row sees; an int is the
      same for all, None is causal.
  """

  x: jax.Array
  query_position: jax.Array | None
  target: jax.Array | None
  visible: jax.Array | int | None


def read_out(streams: tuple, S: int) -> tuple:
  """Of streams of [B, R, ...], what is read out: one of [B, R', ...].

  Args:
    streams: arrays, pytrees of arrays, or what is the same for all rows.
    S: slots.
  """

  def rest(x):
    return x[:, S:] if isinstance(x, jax.Array) and x.shape[1] > S else x

  return jax.tree.map(rest, tuple(streams[-1:]))


class Start(nnx.Module):
  """Content of the slots -> Rows of every stream, from a mechanism's pieces."""

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

  def __call__(
    self, content: jax.Array, slots: orders.Slots
  ) -> tuple[Rows, ...]:
    """content [B, S, D] in compute dtype -> the Rows of every stream."""
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
      x=content,
      query_position=jnp.stack(turns, axis=-1) if turns else None,
      target=slots.target_position if kind.condition else None,
      visible=content.shape[1] if kind.masked else None,
    )
    return self._two_streams(rows, slots) if kind.streams == 2 else (rows,)

  def _two_streams(self, rows, slots):
    """Content and query rows; `rows` has content's x and queries' positions."""
    B, S, D = rows.x.shape
    visible = slots.visible
    content = rows._replace(
      query_position=slots.position[..., None],
      visible=None if visible is None else visible[..., 0],
    )
    start = self.query_start[...].astype(rows.x.dtype)
    if slots.queries is None:
      query = rows._replace(
        x=jnp.broadcast_to(start, (B, S, D)),
        visible=None if visible is None else visible[..., 1],
      )
      return content, query
    # Not one for every slot: then they stand behind the content rows.
    target, seen = slots.queries
    own = content.visible
    if own is None:
      own = jnp.broadcast_to(jnp.arange(1, S + 1), (B, S))
    start = jnp.broadcast_to(start, (B, target.shape[1], D))
    return (
      content._replace(
        x=jnp.concatenate([content.x, start], axis=1),
        query_position=jnp.concatenate(
          [content.query_position, target[..., None]], axis=1
        ),
        visible=jnp.concatenate([own, seen], axis=1),
      ),
    )
