"""How many more steps one arm needs to reach the loss of another arm.

The delay of an arm at a budget is steps(arm) / steps(reference) at equal loss.
The reference was run at that budget; the arm's steps are read off its own curve
of bits over steps, by interpolation in the logarithm of the steps. Where the
curve does not reach the loss, its last run bounds the delay.

An arm pays at equal FLOPs if the delay of the other one is greater than the
ratio of the FLOPs of a step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aoarm_jax.study import statistics


class Delay(NamedTuple):
  """The delay of an arm at one budget of the reference.

  Attributes:
    value: ratio of steps, or its bound.
    bound: "" for a value, ">" or "<" where the curve ends before that loss.
    low: lower end of the 95% interval; nan without one.
    high: upper end; inf where more than 2.5% of the resamples are not reached.
  """

  value: float
  bound: str
  low: float = float("nan")
  high: float = float("nan")


def steps_to(
  bits: float, steps: npt.ArrayLike, curve: npt.ArrayLike
) -> tuple[float, str]:
  """Return the steps at which a curve reaches a loss, and "", ">" or "<".

  Args:
    bits: the loss.
    steps: steps of the curve's runs, ascending.
    curve: losses of these runs. A loss that is higher than the loss of fewer
      steps is replaced by that lower loss.

  Returns:
    (steps, ""); or the first steps and "<", where the first loss is lower
    already; or the last steps and ">", where the last loss is still higher.
  """
  steps = np.asarray(steps, float)
  curve = np.minimum.accumulate(np.asarray(curve, float))
  if bits > curve[0]:
    return float(steps[0]), "<"
  if bits < curve[-1]:
    return float(steps[-1]), ">"
  # np.interp needs ascending values. Of equal losses, the first counts.
  first = np.concatenate([[True], np.diff(curve) < 0])
  log_steps = np.interp(-bits, -curve[first], np.log(steps[first]))
  return float(np.exp(log_steps)), ""


def delays(
  reference_steps: Sequence[int],
  reference: npt.ArrayLike,
  steps: Sequence[int],
  curve: npt.ArrayLike,
  *,
  resamples: int = 0,
  seed: int = 0,
) -> list[Delay]:
  """Return the delay at every budget of the reference.

  Args:
    reference_steps: steps of the reference's runs, [budgets], ascending.
    reference: bits of the reference's runs, [budgets][seeds, windows].
    steps: steps of the other arm's runs, [runs], ascending.
    curve: bits of the other arm's runs, [runs][seeds, windows]. Seeds and
      windows have the same order as in `reference`; windows are in the order
      of the text.
    resamples: number of resamples, of seeds and of stretches of the text, for
      the intervals. 0 computes no intervals.
    seed: seed of the resamples.
  """
  reference, curve = np.asarray(reference), np.asarray(curve)

  def read(own: np.ndarray, other: np.ndarray) -> list[tuple[float, str]]:
    found = (steps_to(bits, steps, other) for bits in own)
    return [(x / n, bound) for (x, bound), n in zip(found, reference_steps)]

  values = read(reference.mean((1, 2)), curve.mean((1, 2)))
  if not resamples:
    return [Delay(*value) for value in values]
  draw = np.random.default_rng(seed)
  own, other = _stretches(reference), _stretches(curve)
  seeds, parts = own.shape[1:]
  ratios = np.zeros((resamples, len(values)))
  for n in range(resamples):
    rows = draw.integers(0, seeds, seeds)
    columns = draw.integers(0, parts, parts)
    pick = np.ix_(range(len(own)), rows, columns)
    others = np.ix_(range(len(other)), rows, columns)
    found = read(own[pick].mean((1, 2)), other[others].mean((1, 2)))
    ratios[n] = [
      {"": ratio, ">": np.inf, "<": 0.0}[bound] for ratio, bound in found
    ]
  low, high = np.quantile(ratios, (0.025, 0.975), axis=0, method="nearest")
  return [
    Delay(*value, float(a), float(b)) for value, a, b in zip(values, low, high)
  ]


def _stretches(bits):
  """Return the means of stretches of the text, [runs, seeds, stretches]."""
  parts = min(statistics.STRETCHES, bits.shape[-1])
  return np.stack(
    [part.mean(-1) for part in np.array_split(bits, parts, axis=-1)], -1
  )
