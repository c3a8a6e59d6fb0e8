"""How many more steps one arm needs to reach the loss of another arm.

The delay of an arm at a budget is steps(arm) / steps(reference) at equal loss.
The reference was run at that budget; the arm's steps are read off its own curve
of bits over steps, by interpolation in the logarithm of the steps. Where the
curve does not reach the loss, its last run bounds the delay.

An arm pays at equal FLOPs if the delay of the other one is greater than the
ratio of the FLOPs of a step.
"""

from typing import NamedTuple

import numpy as np

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


def steps_to(bits: float, steps, curve) -> tuple[float, str]:
  """Steps at which a curve reaches a loss, and "", ">" or "<".

  Args:
    bits: the loss.
    steps: of the curve's runs, ascending.
    curve: their losses. Where more steps have a higher loss, they count as
      those of the lower one before.
  """
  steps = np.asarray(steps, float)
  curve = np.minimum.accumulate(np.asarray(curve, float))
  if bits > curve[0]:
    return float(steps[0]), "<"
  if bits < curve[-1]:
    return float(steps[-1]), ">"
  # Descending losses as ascending ones; of equal ones the first counts.
  first = np.concatenate([[True], np.diff(curve) < 0])
  log_steps = np.interp(-bits, -curve[first], np.log(steps[first]))
  return float(np.exp(log_steps)), ""


def bits_at(step: float, steps, curve) -> float:
  """The loss of a curve at a number of steps; nan outside its runs."""
  if not steps[0] <= step <= steps[-1]:
    return float("nan")
  return float(np.interp(np.log(step), np.log(steps), curve))


def delays(
  reference_steps, reference, steps, curve, *, resamples=0, seed=0
) -> list[Delay]:
  """The delay at every budget of the reference.

  Args:
    reference_steps: [budgets] of the reference, ascending.
    reference: bits of its runs, [budgets][seeds, windows].
    steps: [runs] of the other arm, ascending.
    curve: bits of its runs, [runs][seeds, windows]; the same windows in the
      order of the text, and seeds in the same order.
    resamples: of seeds, and of stretches of the text, for the intervals; 0:
      there are no intervals.
    seed: of the resamples.
  """
  reference, curve = np.asarray(reference), np.asarray(curve)

  def read(own, other):
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
  """Means of stretches of the text: [runs, seeds, stretches]."""
  parts = min(statistics.STRETCHES, bits.shape[-1])
  return np.stack(
    [part.mean(-1) for part in np.array_split(bits, parts, axis=-1)], -1
  )
