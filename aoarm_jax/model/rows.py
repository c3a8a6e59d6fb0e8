"""The input rows of the backbone, built from the pieces of a mechanism.

aoarm_jax/config/mechanisms.py says which mechanism has which piece.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import looks, parameters


class Rows(NamedTuple):
  """The rows of one stream, and what is known about each row.

  The first S rows of stream 0 are the content of the slots. The last stream is
  read out, which means that its rows make predictions. If it is the only stream
  and has more than S rows, only the rows after the first S are read out.

  Attributes:
    x: [B, R, D], compute dtype.
    query_position: int32 [B, R, K], the positions by which queries are rotated.
      They take turns among the rotary pairs. None means no rotation.
    target: int32 [B, R], the position that conditions each row, or None.
    visible: int32 [B, R], the number of leading slots that each row sees. An
      int holds for all rows, and None means causal.
    seen: bool [B or 1, R, S], the slots that each row sees, where they are no
      prefix. None means that `visible` says it.
  """

  x: jax.Array
  query_position: jax.Array | None
  target: jax.Array | None
  visible: jax.Array | int | None
  seen: jax.Array | None = None


def read_out(streams: tuple[Any, ...], S: int) -> tuple[Any, ...]:
  """Return the rows that are read out, as a tuple of one stream.

  Args:
    streams: one entry per stream: an array [B, R, ...], a pytree of such
      arrays, or a value that is the same for all rows.
    S: the number of slots.

  Returns:
    A tuple of one entry, with arrays [B, R', ...].
  """
  if len(streams) > 1:
    return tuple(streams[-1:])

  def after_slots(x):
    has_rows = isinstance(x, jax.Array) and x.ndim > 1
    return x[:, S:] if has_rows and x.shape[1] > S else x

  return jax.tree.map(after_slots, tuple(streams[-1:]))


class Contents(NamedTuple):
  """The contents of the slots that rows may see.

  Attributes:
    tokens: int32 [B, S], the content of each slot.
    position: int32 [B, S], the position of that content.
    slot: int32 [1, S], the index of each slot in the order.
  """

  tokens: jax.Array
  position: jax.Array
  slot: jax.Array

  def before(self, target: jax.Array, visible: jax.Array) -> jax.Array:
    """Return the token before a position, or -1 for rows that do not see it.

    Args:
      target: int32 [B, R], the positions.
      visible: int32 [B, R], the number of leading slots that each row sees.

    Returns:
      int32 [B, R].
    """
    is_before = self.position[:, None] == target[..., None] - 1
    is_seen = self.slot[:, None] < visible[..., None]
    tokens = jnp.where(is_before & is_seen, self.tokens[:, None], -1)
    return tokens.max(axis=-1)


class Start(nnx.Module):
  """The pieces of a mechanism; they turn content into rows of streams."""

  def __init__(self, model: config_lib.Model, *, rngs: nnx.Rngs):
    self.model, self.kind, D = model, model.kind, model.D
    positions = model.T + 2  # BOS and EOS have positions of their own.
    if self.kind.streams == 2:
      self.query_start = parameters.normal(rngs, (D,), ("vector",))
    if self.kind.copies > 1:
      self.copy_start = parameters.normal(
        rngs, (self.kind.copies - 1, D), (None, "vector")
      )
    if self.kind.added:
      width = D // len(self.kind.added)
      self.added = parameters.normal(
        rngs,
        (len(self.kind.added), positions, width),
        (None, "positions", "embed"),
      )
    if self.kind.condition:
      self.target = parameters.normal(
        rngs,
        (positions, self.kind.condition),
        ("positions", "condition"),
        model.condition_scale,
      )

  def __call__(
    self,
    embed: Callable[[jax.Array], jax.Array],
    slots: orders.Slots,
    index: jax.Array,
    contents: Contents | None = None,
  ) -> tuple[Rows, ...]:
    """Return the rows of every stream.

    Args:
      embed: returns the embedded tokens [B, R, D] of int32 [B, R], in compute
        dtype.
      slots: the slots of the content rows.
      index: int32 [1, S], the index of each slot in the order.
      contents: the slots that query rows may see. None means `slots`.
    """
    kind, content = self.kind, embed(slots.tokens)
    places = {
      "content": slots.position,
      "target": slots.target_position - self.model.shifted,
    }
    if kind.added:
      content += self._placed(content.dtype, [places[x] for x in kind.added])
    visible: jax.Array | int | None = None
    if kind.copies > 1:
      content += self._marks(content)
      assert slots.visible is not None  # `copied` sets it.
      visible = slots.visible[..., 0]
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
    if kind.streams == 1:
      return (rows,)
    contents = contents or Contents(slots.tokens, slots.position, index)
    return self._two_streams(rows, slots, index, embed, contents)

  def _placed(self, dtype, places):
    """Return the learned embeddings of positions, [B, R, D].

    Args:
      dtype: the compute dtype.
      places: int32 [B, R] for each of kind.added.
    """
    tables = parameters.used(self.added, dtype)
    rows = [parameters.look_up(*pair) for pair in zip(tables, places)]
    return jnp.concatenate(rows, axis=-1)

  def _marks(self, content):
    """Return the vectors that tell the rows of a slot apart: like `content`."""
    B, R, D = content.shape
    marks = jnp.pad(self.copy_start[...], ((1, 0), (0, 0)))
    marks = jnp.tile(marks.astype(content.dtype), (R // len(marks), 1))
    return jnp.broadcast_to(marks, (B, R, D))

  def _first(self, target, visible, embed, contents, dtype):
    """Return the query rows before the first layer, [B, R, D].

    Args:
      target: int32 [B, R], the positions that the rows predict. A row that
        predicts nothing may stand at position -1, which nothing reads.
      visible: int32 [B, R], the number of leading slots that each row sees.
      embed: see `__call__`.
      contents: the slots that the rows may see.
      dtype: the compute dtype.
    """
    start = self.query_start[...].astype(dtype)
    first = jnp.broadcast_to(start, (*target.shape, len(start)))
    if self.model.shifted:
      token = contents.before(target, visible)
      known = embed(jnp.maximum(token, 0))
      first = jnp.where(token[..., None] < 0, first, known)
    if self.kind.added:
      first += self._placed(dtype, [target - self.model.shifted])
    return first

  def _two_streams(self, rows, slots, index, embed, contents):
    """Return the content rows and the query rows.

    Args:
      rows: has the x of the content rows and the positions of the queries.
      slots: the slots of this content.
      index: int32 [1, S], the index of each slot in the order.
      embed: see `__call__`.
      contents: the slots that the query rows may see.
    """
    B, S, _ = rows.x.shape
    visible = slots.visible

    def turns(position):
      return position[..., None] if self.kind.query else None

    content = rows._replace(
      query_position=turns(slots.position),
      visible=None if visible is None else visible[..., 0],
    )
    if look := self.model.look:
      places = looks.Places(index, slots.position)
      seen = looks.seen(look, self.model.sentinels, places, places)
      content = content._replace(seen=seen)
    dtype = rows.x.dtype
    if slots.queries is None:
      target, query_visible = slots.target_position, index + 1
      if visible is not None:
        query_visible = visible[..., 1]
      query_visible = jnp.broadcast_to(query_visible, (B, S))
      first = self._first(target, query_visible, embed, contents, dtype)
      query = rows._replace(
        x=first,
        visible=None if visible is None else query_visible,
      )
      return content, query
    target, query_visible = slots.queries
    if content.visible is None:
      causal = jnp.broadcast_to(jnp.arange(1, S + 1), (B, S))
      content = content._replace(visible=causal)
    first = self._first(target, query_visible, embed, contents, dtype)
    query = rows._replace(
      x=first,
      query_position=turns(target - self.model.shifted),
      visible=query_visible,
    )
    if self.kind.untied:
      return content, query
    # The queries do not belong to slots. So their rows are appended to the
    # content rows, and there is one stream.
    if content.seen is not None:
      prefix = jnp.arange(S) < query_visible[..., None]
      seen = jnp.broadcast_to(content.seen, (B, S, S))
      content = content._replace(seen=jnp.concatenate([seen, prefix], axis=1))
    return (
      content._replace(
        x=jnp.concatenate([content.x, query.x], axis=1),
        query_position=turns(
          jnp.concatenate([slots.position, target - self.model.shifted], axis=1)
        ),
        visible=jnp.concatenate([content.visible, query.visible], axis=1),
      ),
    )


def copied(slots: orders.Slots, copies: int, index: jax.Array) -> orders.Slots:
  """Return slots with several rows each, for a mechanism with copies.

  Args:
    slots: int32 [B, S] each, of a single stream.
    copies: the number of rows per slot.
    index: int32 [1, S], the index of each slot in the order.

  Returns:
    Slots with int32 [B, S * copies]. The rows of a slot are neighbours. They
    see all rows of their own slot and of the slots before it.
  """
  tokens, position, target = (jnp.repeat(x, copies, axis=1) for x in slots[:3])
  visible = jnp.repeat(copies * (index + 1), copies, axis=1)
  visible = jnp.broadcast_to(visible, tokens.shape)[..., None]
  return orders.Slots(tokens, position, target, visible)


def merged(x: jax.Array, copies: int) -> jax.Array:
  """Return the mean of the rows of each slot: [B, S, D], in x's dtype.

  Args:
    x: [B, S * copies, D].
    copies: the number of rows per slot.
  """
  if copies == 1:
    return x
  by_slot = x.reshape(len(x), -1, copies, x.shape[2])
  return by_slot.mean(axis=2, dtype=jnp.float32).astype(x.dtype)
