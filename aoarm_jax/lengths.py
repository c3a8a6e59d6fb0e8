"""Real lengths of documents that are padded to T positions.

With config.data.documents=pad a row of tokens holds one document, then the end
token, then padding. The tokens themselves tell the length: the first end token
ends the document, and nothing after it is ever read. So no other array travels
beside the tokens.

The positions that are predicted are the real ones. With one sentinel the end
token is one of them. With two sentinels the model is told where the end is: EOS
stands behind the last token of the document, in place of the end token, which
is then no symbol of the vocabulary.

An order runs over the real positions first. Padding has the last ranks, so that
the causal mask over slots hides it from every real position. A masked mechanism
sees the real slots only, through Slots.visible.

This module uses jax.numpy alone and does no I/O.
"""

import jax
import jax.numpy as jnp

from aoarm_jax import orders


def real(tokens: jax.Array, layout: orders.Layout) -> jax.Array | None:
  """Return the number of real positions of every row: int32 [B], 1 to T.

  The result is None if rows are not padded documents.

  Args:
    tokens: int [B, T], natural order. All after the first end token is
      arbitrary. A row without an end token has T real positions.
    layout: the layout of the network. With one sentinel the end token counts.
  """
  if layout.end_token is None:
    return None
  T = tokens.shape[1]
  is_end = jnp.equal(tokens, layout.end_token)
  first = jnp.where(is_end.any(axis=1), jnp.argmax(is_end, axis=1), T)
  counted = first + 1 if layout.predicts_end else first
  return jnp.minimum(counted, T).astype(jnp.int32)


def is_real(length: jax.Array, T: int) -> jax.Array:
  """Return whether each of T positions or leading ranks is real: bool [B, T].

  Args:
    length: int32 [B], the number of real positions.
    T: the number of all positions.
  """
  return jnp.arange(T)[None] < length[:, None]


def real_first(order: jax.Array, length: jax.Array | None) -> jax.Array:
  """Return orders with the real positions first; both parts keep their order.

  A uniform order stays uniform over the real positions.

  Args:
    order: int32 [B, T], permutations of 1..T.
    length: int32 [B], the number of real positions. None means all.

  Returns:
    int32 [B, T].
  """
  if length is None:
    return order
  return orders.by_class(
    order, jnp.where(is_real(length, order.shape[1]), 1, 2)
  )


def can_end(
  order: jax.Array, group_start: jax.Array | None = None
) -> jax.Array:
  """Return whether the text can end at the target of every rank: bool [B, T].

  The end stands behind all other tokens. So it cannot be at a position before
  a known token, nor anywhere once it is known.

  Args:
    order: int32 [B, T], permutations of 1..T. The real positions come first.
    group_start: bool [B, T], see orders.to_slots. A rank then knows the groups
      before its own.
  """
  B, T = order.shape
  furthest = jax.lax.cummax(jnp.pad(order, ((0, 0), (1, 0))), axis=1)
  if group_start is None:
    return order > furthest[:, :-1]
  rank = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  start = jax.lax.cummax(jnp.where(group_start, rank, 0), axis=1)
  return order > jnp.take_along_axis(furthest, start, axis=1)
