"""Gradients on Hopper, for any number of slots.

dk and dv come from one kernel, dq from another. So no atomic additions are
needed, and the gradients are deterministic.
"""

import jax

from pallas_kernels import tuning
from pallas_kernels.hopper import backward_keys as hopper_keys
from pallas_kernels.hopper import backward_rows as hopper_rows
from pallas_kernels.hopper import inputs as hopper_inputs
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import streams as hopper_streams


def backward(
  q: hopper_streams.Streams,
  k: jax.Array,
  v: jax.Array,
  visible: hopper_masks.Visible | None,
  d_out: hopper_streams.Streams,
  lse: jax.Array,
  delta: jax.Array,
  scale: float,
  config: tuning.Hopper,
) -> tuple[hopper_streams.Streams, jax.Array, jax.Array]:
  """Return (dq, dk, dv), like q, k and v.

  Args:
    q: [B, T, Nq, H], see `streams`; T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64; or dealt out to devices as
      masks.key_tile says.
    v: like k.
    visible: None for causal.
    d_out: like q, gradient of the output.
    lse: float32 [B, Nq, T rounded up to 64], from the forward kernel.
    delta: of lse's shape, sum(out * d_out) over H minus the gradient of lse in
      nats. It is D of arXiv 2307.08691, algorithm 2, if lse has no gradient.
    scale: factor of the scores.
    config: tile sizes.
  """
  inputs = hopper_inputs.Inputs(q, k, v, d_out, lse, delta)
  dq = hopper_rows.by_rows(inputs, visible, scale, config)
  dk, dv = hopper_keys.by_keys(inputs, visible, scale, config)
  return dq, dk, dv
