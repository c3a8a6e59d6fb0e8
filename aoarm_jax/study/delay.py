"""How many more steps one arm needs to reach the loss of another arm.

The delay of an arm at a budget is steps(arm) / steps(reference) at equal loss.
The reference was run at that budget; the arm's steps are read off its own curve
of bits over steps, by interpolation in the logarithm of the steps. Where the
curve does not reach the loss, its last run bounds the delay.

An arm pays at equal FLOPs if the delay of the other one is greater than the
ratio of the FLOPs of a step.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aoarm_jax.study import statistics


class Delay(NamedTuple):
  """The delay of an arm at one budget of the reference.

  Attributes:
    value: ratio of steps at the mean losses, or its bound.
    bound: "" for a value, ">" or "<" where the curve ends before that loss.
    low: lower end of the 95% interval, by Student's law on the logarithm of
      the delay, over seeds and stretches of the text. nan with a bound.
    high: upper end; inf where the curve of any seed ends before that loss.
    resampled: 2.5% and 97.5% quantiles over resamples of seeds and stretches.
      With few seeds this range is narrower than a 95% interval: with three
      seeds it holds the delay in about two of three cases.
  """

  value: float
  bound: str
  low: float = math.nan
  high: float = math.nan
  resampled: tuple[float, float] = (math.nan, math.nan)


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
    resamples: number of resamples behind Delay.resampled; 0: none.
    seed: seed of the resamples.
  """
  own, other = _stretches(np.asarray(reference)), _stretches(np.asarray(curve))
  # The delays of every seed, and of all seeds without one stretch of text.
  of_seed = [
    _read(own[:, n].mean(-1), other[:, n].mean(-1), reference_steps, steps)
    for n in range(own.shape[1])
  ]
  parts = range(own.shape[2])
  without = [
    _read(
      np.delete(own, part, 2).mean((1, 2)),
      np.delete(other, part, 2).mean((1, 2)),
      reference_steps,
      steps,
    )
    for part in parts
  ]
  ranges = _resampled(own, other, reference_steps, steps, resamples, seed)
  answers = []
  means = own.mean((1, 2)), other.mean((1, 2))
  for i, (value, bound) in enumerate(_read(*means, reference_steps, steps)):
    low = high = math.nan
    if not bound:
      estimate = _log_delay(
        value, [row[i] for row in of_seed], [row[i] for row in without]
      )
      low = math.exp(estimate.value - estimate.half)
      high = math.exp(estimate.value + estimate.half)
      if any(mark == ">" for _, mark in (row[i] for row in of_seed)):
        high = math.inf
    answers.append(Delay(value, bound, low, high, ranges[i]))
  return answers


def _read(own, other, reference_steps, steps):
  """Return (delay or its bound, mark) at every budget, from mean losses."""
  at_loss = (steps_to(bits, steps, other) for bits in own)
  return [(x / n, mark) for (x, mark), n in zip(at_loss, reference_steps)]


def _log_delay(value, of_seed, without):
  """Return the statistics.Estimate of the logarithm of a delay.

  Args:
    value: the delay at the mean losses.
    of_seed: (delay, mark) of every seed.
    without: (delay, mark) of all seeds, without each stretch of the text.
  """
  seeds = statistics.over_seeds([math.log(x) for x, _ in of_seed])
  left_out = np.log([x for x, _ in without])
  n = len(left_out)
  # The jackknife's error over stretches, neighbours of which are alike.
  text = math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
  if seeds.seeds == 1:
    return statistics.Estimate(math.log(value), text, n - 1, 1)
  error = math.hypot(seeds.error, text)
  return seeds._replace(value=math.log(value), error=error)


def _resampled(own, other, reference_steps, steps, resamples, seed):
  """Return the (low, high) quantiles of every budget's delay."""
  if not resamples:
    return [(math.nan, math.nan)] * len(own)
  draw = np.random.default_rng(seed)
  seeds, parts = own.shape[1:]
  ratios = np.zeros((resamples, len(own)))
  for n in range(resamples):
    rows = draw.integers(0, seeds, seeds)
    columns = draw.integers(0, parts, parts)
    own_mean, other_mean = (
      x[:, rows][:, :, columns].mean((1, 2)) for x in (own, other)
    )
    ratios[n] = [
      {"": ratio, ">": math.inf, "<": 0.0}[mark]
      for ratio, mark in _read(own_mean, other_mean, reference_steps, steps)
    ]
  ends = np.quantile(ratios, (0.025, 0.975), axis=0, method="nearest")
  return [(float(low), float(high)) for low, high in ends.T]


def _stretches(bits):
  """Return the means of stretches of the text, [runs, seeds, stretches]."""
  parts = min(statistics.STRETCHES, bits.shape[-1])
  return np.stack(
    [part.mean(-1) for part in np.array_split(bits, parts, axis=-1)], -1
  )
