"""Rotary frequencies, scaled for texts longer than those of training."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax.config import schema as config_lib


def factors(model: config_lib.Model) -> jax.Array | None:
  """Return the factors of the rotary frequencies: float32 [H / 2], or None.

  None means that config.model.rope_scaling scales nothing. A factor lies
  between 1 / rope_factor, for slow pairs, and 1, for fast pairs. In between,
  llama3 goes by the number of turns, and yarn by the index of the pair.

  Args:
    model: the model's section of the config.
  """
  if model.rope_scaling == "none":
    return None
  pairs = np.arange(model.H // 2)
  slow, fast = model.rope_slow_turns, model.fast_turns
  if model.rope_scaling == "llama3":
    turns = _turns(model) * model.rope_base ** (-pairs / len(pairs))
    unscaled = np.clip((turns - slow) / (fast - slow), 0, 1)
  else:
    first = max(math.floor(_pair(model, fast)), 0)
    last = min(math.ceil(_pair(model, slow)), model.H - 1)
    # As in the code of YaRN, against a division by zero.
    width = last - first or 1e-3
    unscaled = 1 - np.clip((pairs - first) / width, 0, 1)
  scaled = unscaled + (1 - unscaled) / model.rope_factor
  return jnp.asarray(scaled, jnp.float32)


def _turns(model):
  """Return the turns of the fastest pair over the original positions."""
  return model.rope_original_T / (2 * math.pi)


def _pair(model, turns):
  """Return the index of the pair that turns so often, as a real number."""
  ratio = math.log(_turns(model) / turns) / math.log(model.rope_base)
  return model.H / 2 * ratio


def score_scale(model: config_lib.Model) -> float:
  """Return the factor of the scores of attention.

  It is H ** -0.5. With rope_scaling=yarn it is larger by the square of
  0.1 ln(rope_factor) + 1 (arXiv 2309.00071).

  Args:
    model: the model's section of the config.
  """
  scale = model.H**-0.5
  if model.rope_scaling == "yarn":
    scale *= (0.1 * math.log(model.rope_factor) + 1) ** 2
  return scale
