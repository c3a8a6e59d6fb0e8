"""Schedule, optax chain, decay mask, EMA."""

import jax
import jax.numpy as jnp
import optax

from aoarm_jax.config import schema as config_lib


def schedule(optimizer: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warmup, then the named schedule.

  Args:
    optimizer: the schedule's name and numbers.
    steps: of the whole run; cosine and stable_decay end there.
  """
  peak = optimizer.peak_learning_rate
  warmup = optimizer.warmup_steps
  match optimizer.schedule:
    case "cosine":
      after = optax.cosine_decay_schedule(
        peak, max(steps - warmup, 1), alpha=optimizer.final_share
      )
    case "constant":
      after = optax.constant_schedule(peak)
    case "stable_decay":
      after = optax.linear_schedule(
        peak,
        peak * optimizer.final_share,
        optimizer.decay_steps,
        transition_begin=max(steps - warmup - optimizer.decay_steps, 0),
      )
  # Step 0 already moves: the ramp starts at peak / warmup, not at 0.
  ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, after], [warmup])


def decay_mask(axes):
  """True for matrices, False for vectors: scales, biases, learned starts.

  Args:
    axes: logical axes of every parameter, as Bind.axes.
  """
  return jax.tree.map(
    lambda names: names[-1] != "vector",
    axes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def make(
  optimizer: config_lib.Optimizer, learning_rate: optax.Schedule, axes
) -> optax.GradientTransformation:
  """AdamW with clipping by the global norm (arXiv 1711.05101).

  Args:
    optimizer: its numbers.
    learning_rate: step -> learning rate, as `schedule` returns.
    axes: as of `decay_mask`.
  """
  return optax.chain(
    optax.clip_by_global_norm(optimizer.clip_norm),
    optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
    optax.add_decayed_weights(optimizer.weight_decay, decay_mask(axes)),
    optax.scale_by_learning_rate(learning_rate),
  )


def update_ema(ema, params, step: jax.Array, decay: float):
  """ema + (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)).

  The smaller early decay lets the average forget the initial parameters.
  """
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
