"""Results of the parts of a benchmark: units of work and rows of a table."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aoarm_jax.evaluation import averages


class Unit(NamedTuple):
  """A piece of work whose result is kept.

  Attributes:
    name: the part and the piece, such as "likelihood/any_order".
    settings: all that the result depends on, besides the run; values of JSON.
    measure: a function that returns the result: values of JSON.
  """

  name: str
  settings: dict[str, Any]
  measure: Callable[[], dict[str, Any]]


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    part: such as "likelihood".
    subject: what is measured, such as an estimator.
    measure: the name of the quantity.
    value: the number; None if it is not defined.
    error: its standard error; None if it is not known.
    unit: the unit of both.
    n: over how many texts, windows or tokens.
    note: whether the number is exact, a bound, or an estimate, and of what.
  """

  part: str
  subject: str
  measure: str
  value: float | None
  error: float | None
  unit: str
  n: int
  note: str = ""

  def words(self) -> tuple[str, str, str, str]:
    """Return part, subject, measure and unit for people."""
    part, subject = (x.replace("_", " ") for x in (self.part, self.subject))
    return part, subject, self.measure, self.unit.replace("bits_per_", "bits/")


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float | None]:
  """Return the mean of numbers and its standard error; None for one number."""
  array = np.asarray(values, np.float64)
  if len(array) < 2:
    return float(array.mean()), None
  return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))


def ratio_and_error(
  sums: npt.ArrayLike, sizes: npt.ArrayLike
) -> tuple[float, float | None]:
  """Return sum(sums) / sum(sizes) and its standard error, to first order."""
  sums_, sizes_ = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
  error = averages.error_of_ratio(sums_, sizes_) if len(sums_) > 1 else None
  return float(sums_.sum() / sizes_.sum()), error
