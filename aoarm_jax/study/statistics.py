"""Means with their errors, and what may be said of them.

Errors are of two kinds: of seeds, a few runs that differ by chance, and of
windows, pieces of one text, neighbours of which are alike.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Windows lie in the order of the text. Neighbours are alike, so the error is
# that of the means of so many stretches; books are longer still.
STRETCHES = 24


class Estimate(NamedTuple):
  """A mean.

  Attributes:
    value: the mean.
    error: its standard error; nan where nothing tells it.
    degrees: of freedom of the error.
    seeds: runs that it is the mean of.
  """

  value: float
  error: float
  degrees: float
  seeds: int

  @property
  def half(self) -> float:
    """Half of the 95% interval, by Student's law."""
    if not self.degrees > 0:
      return math.nan
    # SciPy takes long to import, and only reports need it.
    from scipy import special

    return self.error * special.stdtrit(self.degrees, 0.975)


def over_seeds(values: npt.ArrayLike) -> Estimate:
  """Of one number a seed."""
  x = np.asarray(values, float)
  n = len(x)
  error = x.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
  return Estimate(float(x.mean()), float(error), n - 1, n)


def over_windows(values: npt.ArrayLike) -> Estimate:
  """Of one number a window, in the order of the text; one run."""
  x = np.asarray(values, float)
  parts = min(STRETCHES, len(x))
  means = over_seeds([part.mean() for part in np.array_split(x, parts)])
  return Estimate(float(x.mean()), means.error, parts - 1, 1)


def over_both(windows: list) -> Estimate:
  """Of one number a window, the same windows for every seed.

  Its degrees of freedom are those of the seeds: two or three may lie together
  by luck, so that a small error of theirs is worth no more of them.

  Args:
    windows: of each seed, [n].
  """
  seeds = over_seeds([np.mean(x) for x in windows])
  # What windows leave open no seed closes: they are the same for all.
  text = over_windows(np.mean(windows, axis=0))
  if seeds.seeds == 1:
    return text._replace(value=seeds.value)
  return seeds._replace(error=math.hypot(seeds.error, text.error))


def effect(estimate: Estimate, least: float = 0.0) -> int | None:
  """1 above, -1 below, 0 surely nothing that matters, None unclear.

  Args:
    estimate: of an effect.
    least: an effect that matters is larger than this.
  """
  value, half = estimate.value, estimate.half
  if not math.isfinite(half):
    return None
  if abs(value) + half <= least:
    return 0
  if abs(value) > half and abs(value) >= least:
    return 1 if value > 0 else -1
  return None
