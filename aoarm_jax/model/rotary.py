"""Rotary position embedding (RoPE, arXiv 2104.09864) on half-split pairs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
  """A rotation for all heads: cosines and sines, float32 [..., 1, H / 2]."""

  cos: jax.Array
  sin: jax.Array


def rotation(position: jax.Array, H: int, base: float) -> Rotation:
  """Return the rotation R_p for every position p (arXiv 2104.09864).

  Args:
    position: int32 [..., K]. Pair j is rotated by position j % K.
    H: the width of a head, even.
    base: pair j is rotated by position * base ** (-2 j / H) radians.

  Returns:
    A Rotation of arrays [..., 1, H / 2].
  """
  frequency = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
  position = position[..., np.arange(H // 2) % position.shape[-1]]
  angle = position[..., None, :].astype(jnp.float32) * frequency
  return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: jax.Array, by: Rotation | None) -> jax.Array:
  """Return R_p x.

  Args:
    x: float32 [..., heads, H].
    by: the rotation R_p. None means no rotation.
  """
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
