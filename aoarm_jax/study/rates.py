"""Learning rates that a study finds by itself: which trials, and which rate.

The rate of a cell may be written as

| rate              | the peak learning rate of the cell                      |
|-------------------|---------------------------------------------------------|
| search:0.004      | the best rate, searched by factors of 2 from 0.004 on   |
| search:0.004*0.5  | half of the rate that search:0.004 finds                |
| checked:0.004*0.5 | the searched rate, or half of it where a check says so  |

The search. Trials run at config.study.tune_steps steps of the reference
mechanism, at equal FLOPs, at the cell's own mechanism, size, length and orders.
On the first of config.study.tune_seeds the start, its half and its double are
tried, and the grid grows on the side of the best rate until the best rate lies
inside. The two best rates then run on the second seed as well, and the lower
mean over the two seeds wins.

The check. At the cell's own budget, at length config.study.check_T and on the
first tuning seed, the searched rate and the other one are both run. The other
rate is taken if it is better by more than LEAST_GAIN.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from aoarm_jax.config import schema as config_lib

LEAST_GAIN = 0.005  # Bits a character.
_RATE = re.compile(r"(search|checked):([^*]+)(?:\*(.+))?$")
_MOST = 12  # Rates on a grid; factors of 2.

# Function from a cell to its bits per character. The result is inf if the cell
# failed for good, and None if the cell is still to be run. Cells have the type
# Any in this module, because the module of cells.Cell imports this one.
Outcome = Callable[..., float | None]


def parse(rate: str) -> tuple[str, float, float | None] | None:
  """Return ("search" or "checked", start, factor); None for any other rate.

  Raises:
    ValueError: the start or the factor is no positive number, or "checked" has
      no factor.
  """
  match = _RATE.match(rate)
  if not match:
    return None
  start = float(match[2])
  factor = float(match[3]) if match[3] else None
  if not start > 0 or (factor is not None and not factor > 0):
    raise ValueError(rate)
  if match[1] == "checked" and factor is None:
    raise ValueError(rate)
  return match[1], start, factor


def plan(
  cell: Any, config: config_lib.Config, outcome: Outcome
) -> tuple[list[Any], float | None]:
  """Return the rate of a cell, and the trials that are known to decide it.

  Args:
    cell: a cells.Cell whose rate `parse` reads.
    config: the config of the study.
    outcome: function from a cell to its bits per character, see Outcome.

  Returns:
    (trials, rate). The trials are cells in the order in which they are to run.
    The rate is the peak learning rate, or None while trials are still to be
    run.

  Raises:
    ConfigError: no rate of the whole grid gives a finite loss.
  """
  parsed = parse(cell.rate)
  assert parsed is not None, cell.rate
  kind, start, factor = parsed
  trials, rate = _search(cell, start, config, outcome)
  if rate is None or factor is None:
    return trials, rate
  if kind == "search":
    return trials, rate * factor
  bits = []
  for text in (f"search:{start:g}", f"search:{start:g}*{factor:g}"):
    run = dataclasses.replace(
      cell,
      T=config.study.check_T,
      seed=config.study.tune_seeds[0],
      rate=text,
    )
    needed, run_rate = plan(run, config, outcome)
    trials += [*needed, run]
    bits.append(None if run_rate is None else outcome(run))
  plain, other = bits
  if plain is None or other is None:
    return trials, None
  return trials, rate * factor if other < plain - LEAST_GAIN else rate


def _search(cell, start, config, outcome):
  first, second = config.study.tune_seeds

  def trial(power, seed):
    return dataclasses.replace(
      cell,
      budget="flops",
      steps=config.study.tune_steps,
      seed=seed,
      rate=f"{start * 2.0**power:g}",
    )

  powers = [0, 1, -1]
  while True:
    trials = [trial(power, first) for power in powers]
    bits = {power: outcome(trial(power, first)) for power in powers}
    if None in bits.values():
      return trials, None
    # Where nothing trains, lower rates are tried.
    best = min(sorted(powers), key=bits.__getitem__)
    if min(powers) < best < max(powers):
      break
    if len(powers) == _MOST:
      raise config_lib.ConfigError(
        f"config.study.sweep: rate={cell.rate} of {cell.mechanism} at "
        f"T={cell.T}: the best of {_MOST} rates is still the last one tried, "
        f"{start * 2.0**best:g}; start the search elsewhere"
      )
    powers.append(best + 1 if best == max(powers) else best - 1)
  two = sorted(sorted(powers), key=bits.__getitem__)[:2]
  trials += [trial(power, second) for power in two]
  again = {power: outcome(trial(power, second)) for power in two}
  if None in again.values():
    return trials, None
  chosen = min(two, key=lambda power: bits[power] + again[power])
  if math.isinf(bits[chosen] + again[chosen]):
    chosen = two[0]
  return trials, float(f"{start * 2.0**chosen:g}")
