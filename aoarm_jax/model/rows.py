"""The input rows of the backbone, built from the pieces of a mechanism.

aoarm_jax/config/mechanisms.py says which mechanism has which piece.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import layers


class Rows(NamedTuple):
  """The rows of one stream, and what is known about each row.

  The first S rows of stream 0 are the content of the slots. The last stream is
  read out, which means that its rows make predictions. If the last stream has
  more than S rows, only the rows after the first S are read out.

  Attributes:
    x: [B, R, D], compute dtype.
    query_position: int32 [B, R, K], the positions by which queries are rotated.
      They take turns among the rotary pairs. None means no rotation.
    target: int32 [B, R], the position that conditions each row, or None.
    visible: int32 [B, R], the number of leading slots that each row sees. An
      int holds for all rows, and None means causal.
  """

  x: jax.Array
  query_position: jax.Array | None
  target: jax.Array | None
  visible: jax.Array | int | None


def read_out(streams: tuple[Any, ...], S: int) -> tuple[Any, ...]:
  """Return the rows that are read out, as a tuple of one stream.

  Args:
    streams: one entry per stream: an array [B, R, ...], a pytree of such
      arrays, or a value that is the same for all rows.
    S: the number of slots.

  Returns:
    A tuple of one entry, with arrays [B, R', ...].
  """

  def after_slots(x):
    has_rows = isinstance(x, jax.Array) and x.ndim > 1
    return x[:, S:] if has_rows and x.shape[1] > S else x

  return jax.tree.map(after_slots, tuple(streams[-1:]))


class Start(nnx.Module):
  """The pieces of a mechanism; they turn content into rows of streams."""

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
    """Return the rows of every stream.

    Args:
      content: [B, S, D], the embedded tokens, in compute dtype.
      slots: the slots of this content.
    """
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
    visible: jax.Array | int | None = None
    if kind.masked:
      visible = content.shape[1]
      if slots.visible is not None:  # Padding is not seen.
        visible = slots.visible[..., 0]
    turns = [places[name] for name in kind.query]
    rows = Rows(
      x=content,
      query_position=jnp.stack(turns, axis=-1) if turns else None,
      target=slots.target_position if kind.condition else None,
      visible=visible,
    )
    return self._two_streams(rows, slots) if kind.streams == 2 else (rows,)

  def _two_streams(self, rows, slots):
    """Return the content rows and the query rows.

    Args:
      rows: has the x of the content rows and the positions of the queries.
      slots: the slots of this content.
    """
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
    # The queries do not belong to slots. So their rows are appended to the
    # content rows, and there is one stream.
    target, query_visible = slots.queries
    content_visible = content.visible
    if content_visible is None:
      content_visible = jnp.broadcast_to(jnp.arange(1, S + 1), (B, S))
    start = jnp.broadcast_to(start, (B, target.shape[1], D))
    return (
      content._replace(
        x=jnp.concatenate([content.x, start], axis=1),
        query_position=jnp.concatenate(
          [content.query_position, target[..., None]], axis=1
        ),
        visible=jnp.concatenate([content_visible, query_visible], axis=1),
      ),
    )
