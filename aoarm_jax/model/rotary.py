"""Rotary position embedding (RoPE, arXiv 2104.09864) on half-split pairs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
  """cos and sin, float32 [..., 1, H / 2]: one rotation for all heads."""

  cos: jax.Array
  sin: jax.Array


def rotation(position: jax.Array, H: int, base: float) -> Rotation:
  """R_p for every position.

  Args:
    position: int32 [..., K]; pair j turns by position j % K.
    H: head dim, even.
    base: pair j turns by position * base ** (-2 j / H) radians.

  Returns:
    Rotation of arrays [..., 1, H / 2].
  """
  frequency = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
  position = position[..., np.arange(H // 2) % position.shape[-1]]
  angle = position[..., None, :].astype(jnp.float32) * frequency
  return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, by: Rotation | None) -> jax.Array:
  """R_p x. x: float32 [..., heads, H]; None is no rotation."""
  if by is None:
    return x
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [
      first * by.cos - second * by.sin,
      second * by.cos + first * by.sin,
    ],
    axis=-1,
  )
