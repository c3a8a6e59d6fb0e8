"""The values that all layers of one pass share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import rowwise

# Picks the rows that are read out, from a tuple with one entry per stream. The
# result is a tuple of one entry; see rows.read_out.
Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]


class Setting(NamedTuple):
  """The values that all layers of one pass share.

  Attributes:
    query_rotation: one per stream: the rotation of [B, R] rows, or None.
    key_rotation: the rotation of [B, S] slots, or None.
    condition: [P, C], one vector per position, or None.
    target: one per stream: int32 [B, R], the position whose condition each row
      takes, or None.
    visible: one per stream: int32 [B, R], an int or None; see rows.Rows.
    seen: one per stream: bool [B or 1, R, S] or None; see rows.Rows.
    rotations: the cosines and the signed sines that turn the queries and the
      keys of all rows, float32 [B, R, g + 1, 1, H] each for g query heads of a
      key head, or None; see `of_few`.
  """

  query_rotation: tuple[rowwise.Rotation | None, ...]
  key_rotation: rowwise.Rotation | None
  condition: jax.Array | None
  target: tuple[jax.Array | None, ...]
  visible: tuple[jax.Array | int | None, ...]
  seen: tuple[jax.Array | None, ...]
  rotations: tuple[jax.Array, jax.Array] | None = None

  def of_few(self, S: int, group: int) -> "Setting":
    """Return the setting of few rows, for layers with merged weights.

    Args:
      S: the number of content rows. The one stream may have more rows.
      group: the number g of query heads of a key head.
    """
    query, key = self.query_rotation[0], self.key_rotation
    if len(self.query_rotation) > 1 or query is None or key is None:
      return self

    def both(of_query, of_key):
      # Rows that are not slots have no keys, so any rotation will do.
      of_key = jnp.concatenate([of_key, of_query[:, S:]], axis=1)
      return jnp.stack([*[of_query] * group, of_key], axis=2)

    cos, sin = both(query.cos, key.cos), both(query.sin, key.sin)
    cos, sin = jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
    H = 2 * cos.shape[-1]
    shape = (*cos.shape[:-2], H)
    return self._replace(rotations=(cos.reshape(shape), sin.reshape(shape)))

  def read_out(self, pick: Pick) -> "Setting":
    """Return the setting of the rows that `pick` picks."""
    return self._replace(
      query_rotation=pick(self.query_rotation),
      target=pick(self.target),
      visible=pick(self.visible),
      seen=pick(self.seen),
    )
