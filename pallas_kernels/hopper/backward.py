"""Gradients on Hopper, for any number of slots.

One kernel computes dq and delta; another one reads delta and computes dk and
dv. So no atomic additions are needed, and the gradients are deterministic.
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
  out: hopper_streams.Streams,
  out_error: hopper_streams.Streams,
  d_out: hopper_streams.Streams,
  lse: jax.Array,
  d_lse: jax.Array,
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
    out: like q, from the forward kernel.
    out_error: like q, from the forward kernel.
    d_out: like q, gradient of the output.
    lse: float32 [B, Nq, T rounded up to 64], from the forward kernel.
    d_lse: of lse's shape, gradient of lse in nats.
    scale: factor of the scores.
    config: tile sizes.
  """
  inputs = hopper_inputs.Inputs(q, k, v, d_out, lse)
  dq, delta = hopper_rows.by_rows(
    inputs, out, out_error, d_lse, visible, scale, config
  )
  dk, dv = hopper_keys.by_keys(inputs, delta, visible, scale, config)
  return dq, dk, dv
