"""The learning rate schedule, AdamW with its decay mask, and the EMA."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from aoarm_jax.config import schema as config_lib


def schedule(optimizer: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Return the learning rate as a function of the step.

  The rate rises linearly during warmup. Then it follows the named schedule.

  Args:
    optimizer: section of the config with the schedule's name and numbers.
    steps: optimizer steps of the whole run. The schedules cosine and
      stable_decay end there.

  Returns:
    A function from the step (int32 [], from 0) to the rate (float32 []).
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
  # The ramp starts at peak / warmup and not at 0, so that step 0 already moves
  # the parameters.
  ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, after], [warmup])


def decay_mask(axes: Any) -> Any:
  """Return which parameters weight decay applies to.

  Matrices decay. Vectors do not: scales, biases and learned start rows.

  Args:
    axes: pytree of the logical axes (tuples of names) of every parameter, as
      in Network.axes.

  Returns:
    The same pytree of bool.
  """
  return jax.tree.map(
    lambda names: names[-1] != "vector",
    axes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def make(
  optimizer: config_lib.Optimizer, learning_rate: optax.Schedule, axes: Any
) -> optax.GradientTransformation:
  """Return AdamW (arXiv 1711.05101) behind clipping by the global norm.

  Args:
    optimizer: section of the config with the optimizer's numbers.
    learning_rate: function from the step to the rate, as `schedule` returns.
    axes: pytree of logical axes, see `decay_mask`.
  """
  return optax.chain(
    optax.clip_by_global_norm(optimizer.clip_norm),
    optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
    optax.add_decayed_weights(optimizer.weight_decay, decay_mask(axes)),
    optax.scale_by_learning_rate(learning_rate),
  )


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """Return the exponential moving average after one more step.

  The update is ema + (1 - d) (params - ema) with
  d = min(decay, (1 + step) / (10 + step)). The decay is smaller early in
  training, so that the average forgets the initial parameters.

  Args:
    ema: pytree of float32 arrays, the average so far.
    params: the same pytree, the parameters after the step.
    step: int32 [], optimizer steps taken before this one.
    decay: the decay d of late steps, in [0, 1).
  """
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
