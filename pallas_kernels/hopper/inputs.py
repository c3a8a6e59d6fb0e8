"""The arrays that the two backward kernels for any number of slots read."""

from typing import NamedTuple

import jax

from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import streams as hopper_streams


class Sizes(NamedTuple):
  """Dims of a call; `masks` explains the letters."""

  B: int
  T: int
  S: int
  N: int
  G: int
  H: int


class Inputs(NamedTuple):
  """Arrays; in a kernel, references to arrays of the same shapes.

  Attributes:
    q: [B, T, Nq, H], see `streams`.
    k: [B, S, N, H], or [P * B, S / P, N, H] as masks.key_tile says.
    v: like k.
    d_out: like q, gradient of the output.
    lse: float32 [B, Nq, T rounded up to 64], base 2.
  """

  q: hopper_streams.Streams
  k: jax.Array
  v: jax.Array
  d_out: hopper_streams.Streams
  lse: jax.Array

  @property
  def sizes(self) -> Sizes:
    B, T, Nq, H = hopper_streams.shape(self.q)
    S, N = hopper_masks.key_sizes(self.q, self.k)
    return Sizes(B, T, S, N, Nq // N, H)
