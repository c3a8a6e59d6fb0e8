"""The mask of content rows where config.model.content_sees is no prefix.

A content row always sees the sentinels before it and its own slot. Sentinels
hold no text, and with them in sight a row that sees no other slot still has two
keys to choose from. Beside them it sees the nearest `most` of the earlier
slots, by one of these distances:

last     the number of slots between the two, in the order.
nearest  the distance of the two positions. Of two positions that are equally
         near, the lower one is nearer.
random   a hash of the pair of slots. So the choice depends on the indices of
         the two slots alone, and training and scoring make the same choice.

No row sees a later slot, so all these masks are causal.

The attention is dense: all scores of a layer are in memory at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax.config import mechanisms

_BITS = (1 << 31) - 1  # A distance is below 2^31.


class Places(NamedTuple):
  """Where slots stand.

  Attributes:
    slot: int32 [B or 1, S], their indices in the order.
    position: int32 [B, S], the positions of their content.
  """

  slot: jax.Array
  position: jax.Array


def seen(
  look: mechanisms.Look, sentinels: int, rows: Places, keys: Places
) -> jax.Array:
  """Return which slots content rows see: bool [B or 1, R, S].

  Args:
    look: the kind and the number of slots that are seen.
    sentinels: s, the number of sentinels.
    rows: the slots [R] of the content rows.
    keys: the slots [S] that are keys.
  """
  row, key = rows.slot[..., None], keys.slot[:, None]
  sentinel = (key < sentinels) & (key < row)
  return chosen(look, sentinels, rows, keys) | sentinel | (key == row)


def chosen(
  look: mechanisms.Look, sentinels: int, rows: Places, keys: Places
) -> jax.Array:
  """Return the nearest earlier slots of every row: bool [B or 1, R, S].

  Sentinels and a row's own slot are none of them.

  Args:
    look: the kind of distance and the number of slots.
    sentinels: s, the number of sentinels.
    rows: the slots [R] of the rows.
    keys: the slots [S] that are keys.
  """
  row, key = rows.slot[..., None], keys.slot[:, None]
  far = _distance(look.kind, rows, keys)
  counts = (key >= sentinels) & (key < row)
  if look.kind == "last":
    border = jnp.asarray(look.most)
  else:
    border = _border(far, counts, min(look.most, far.shape[2]))
  return counts & (far <= border)


def _border(far, counts, most):
  """Return the distance of the `most`-th nearest slot of each row.

  Distances of one row differ. A row with fewer slots sees all of them.
  """

  def next_nearest(_, least):
    return jnp.min(
      far, axis=2, keepdims=True, where=counts & (far > least), initial=_BITS
    )

  start = jnp.full((*far.shape[:2], 1), -1, jnp.int32)
  return jax.lax.fori_loop(0, most, next_nearest, start)


def _distance(kind, rows, keys):
  """Return the distance of every row to every key: int32 [B or 1, R, S]."""
  row, key = rows.slot[..., None], keys.slot[:, None]
  if kind == "last":
    return jnp.abs(row - key)
  if kind == "random":
    return _hash(row, key)
  gap = keys.position[:, None] - rows.position[..., None]
  return 2 * jnp.abs(gap) + (gap > 0)


def _hash(row, key):
  """Return a hash of each pair of slots; those of one row differ.

  The steps permute the numbers below 2^31 (the finalizer of MurmurHash3 with
  one bit less).
  """
  mixed = row.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
  mixed = (mixed + key.astype(jnp.uint32)) & _BITS
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    mixed ^= mixed >> shift
    mixed = (mixed * jnp.uint32(factor)) & _BITS
  return mixed.astype(jnp.int32)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  scale: float,
) -> jax.Array:
  """Return attention in which each row sees the slots of a mask.

  Args:
    q: [B, R, N, H].
    k: [B, S, M, H]; N is a multiple of M.
    v: [B, S, M, H].
    mask: bool [B or 1, R, S]; every row sees at least one slot.
    scale: factor of the scores.

  Returns:
    [B, R, N, H], in v's dtype. Scores and softmax are float32.
  """
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask[:, None], scale=scale, implementation="xla"
  )
