"""Fused any-order attention on Hopper: the project's own kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper_forward, tuning

ROWS = hopper_forward.ROWS


class Prefix(NamedTuple):
  """How many leading slots rows see; G' is G, or 1 where heads agree.

  Attributes:
    visible: int32 [B, G', T rounded up to 64]; 0 in the rows that fill up.
    least: int32 [B, G', tiles], the smallest of each 64 rows.
    most: int32 [B, G', tiles], the largest.
  """

  visible: jax.Array
  least: jax.Array
  most: jax.Array


def prefix(visible: jax.Array, S: int) -> Prefix:
  """The Prefix of `visible` int32 [B, T] or [B, T, G]."""
  if visible.ndim == 2:
    visible = visible[..., None]
  visible = jnp.moveaxis(jnp.clip(visible, 0, S), 2, 1).astype(jnp.int32)
  visible = jnp.pad(visible, ((0, 0), (0, 0), (0, -visible.shape[2] % ROWS)))
  tiled = visible.reshape(*visible.shape[:2], -1, ROWS)
  return Prefix(visible, tiled.min(axis=-1), tiled.max(axis=-1))
