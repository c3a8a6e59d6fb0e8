"""The runs that a report is about, read from the files of their cells.

A cell that is done says what it is. So runs of several sweeps and of several
run directories are read together, and the report needs no sweep to find them.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import measure, rates

Row = dict[str, Any]  # Of a table: {column: value}.


def find(rows: list[Row], **wanted: Any) -> list[Row]:
  """Return the rows that have these values."""
  return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


class Setting(NamedTuple):
  """The setting that two runs share if they are compared.

  A curriculum has the orders that it is evaluated in.
  """

  study: str
  T: int
  size: str
  orders: str


class Run(NamedTuple):
  """One run that is done.

  Attributes:
    cell: what was asked for.
    arm: the mechanism and what the run changes, such as "two_stream N=8".
    result: the content of its result.json.
    folder: the folder of its files.
    bits: bits per character of every window, float64 [windows], of the last
      parameters and the first estimator.
  """

  cell: cells_lib.Cell
  arm: str
  result: dict
  folder: epath.Path
  bits: np.ndarray

  @property
  def study(self) -> str:
    """The name of the config and its variant."""
    config = self.result["config"]
    variant = config["variant"]
    return config["name"] + f":{variant}" * (variant != "default")

  @property
  def setting(self) -> Setting:
    cell = self.cell.judged
    return Setting(self.study, cell.T, cell.size, cell.orders)

  @property
  def steps(self) -> int:
    return self.result["config"]["train"]["steps"]

  @property
  def characters(self) -> int:
    batch_size = self.result["config"]["train"]["batch_size"]
    return self.steps * batch_size * self.cell.T

  @property
  def rate(self) -> float:
    return self.result["config"]["optimizer"]["peak_learning_rate"]

  @property
  def flops(self) -> float:
    return self.result["training_flops"]


# Arm -> steps -> seed -> run; steps ascend.
Arms = dict[str, dict[int, dict[int, Run]]]


def read(every: Iterable[tuple[epath.Path, dict]]) -> list[Run]:
  """Return all runs of these cells, trials of learning rates included.

  Args:
    every: (folder, content of result.json) of each cell that is done.

  Raises:
    ConfigError: the cells are of different texts.
    DataError: the files of a cell are damaged.
  """
  runs: list[Run] = []
  for folder, result in every:
    try:
      cell = cells_lib.Cell(**result["cell"])
      nats = measure.read_arrays(folder, "windows.npz", result)["nats"]
      bits = nats.astype(np.float64) / (cell.T * math.log(2))
      run = Run(cell, cell.name, result, folder, bits)
      # A result of a stranger may lack what the tables need.
      rates.parse(cell.rate), run.study, run.characters, run.rate, run.flops
    except (KeyError, TypeError, ValueError) as error:
      raise corpora.DataError(
        f"{folder / measure.RESULT}: damaged ({error}); delete {folder}, and "
        "the study runs this cell again"
      ) from None
    runs.append(run)
    if result["text"] != runs[0].result["text"]:
      raise config_lib.ConfigError(
        f"{runs[0].folder} and {folder} are of different texts: a report is of "
        "one; move the cells of the other text to a --workdir of their own"
      )
  return runs


class Trials:
  """The trials of learning rates: the runs of the tuning seeds."""

  def __init__(self, runs: list[Run], seeds: Iterable[int]):
    """Take the trials from all runs.

    Args:
      runs: all runs.
      seeds: the tuning seeds.
    """
    self.seeds = set(seeds)
    self.runs = [run for run in runs if run.cell.seed in self.seeds]
    self._bits: dict[tuple, dict[float, list[float]]] = {}
    for run in self.runs:
      of_rate = self._bits.setdefault(_tuned_with(run), {})
      of_rate.setdefault(run.rate, []).append(float(run.bits.mean()))

  def bits(self, run: Run) -> dict[float, float]:
    """Return {rate: mean bits} of the trials of a run's arm, at any budget."""
    found = self._bits.get(_tuned_with(run), {})
    return {rate: float(np.mean(bits)) for rate, bits in found.items()}

  def better(self, run: Run) -> float | None:
    """Return the rate that a run of a given rate should have had, or None."""
    found = self.bits(run)
    if run.rate not in found or rates.parse(run.cell.rate):
      return None
    best = min(found, key=found.__getitem__)
    return best if found[best] < found[run.rate] - rates.LEAST_GAIN else None


def _tuned_with(run):
  """What a run shares with the trials of its rate."""
  cell, name = run.cell.judged, run.result["config"]["name"]
  return name, run.arm, cell.T, cell.size, cell.orders


def settings(runs: list[Run], trials: Trials) -> dict[Setting, Arms]:
  """Return the runs from which answers are taken, one rate per arm and steps.

  A checked rate replaces the searched one once it has as many seeds. A rate
  that is given beside a searched one makes an arm of its own. Of several given
  rates the one with the best trial counts; without trials the one with the
  most seeds, and then the one with the fewest bits.
  """
  groups: dict[tuple, dict[float, list[Run]]] = {}
  for run in runs:
    if run.cell.seed not in trials.seeds:
      by_rate = groups.setdefault((run.setting, run.arm, run.steps), {})
      by_rate.setdefault(run.rate, []).append(run)
  found: dict[Setting, Arms] = {}
  for setting, arm, steps in sorted(groups):
    for name, chosen in _arms_of(groups[setting, arm, steps], arm, trials):
      by_steps = found.setdefault(setting, {}).setdefault(name, {})
      by_steps[steps] = {
        run.cell.seed: run._replace(arm=name) for run in chosen
      }
  return found


def listed(settings: dict[Setting, Arms]) -> list[Run]:
  """Return the runs of these settings."""
  return [
    run
    for arms in settings.values()
    for by_steps in arms.values()
    for by_seed in by_steps.values()
    for run in by_seed.values()
  ]


def _arms_of(by_rate, arm, trials):
  """Yield (arm, runs) from the runs {rate: runs} of one arm and budget."""
  rules = {
    rate: {(rates.parse(run.cell.rate) or ("given",))[0] for run in runs}
    for rate, runs in by_rate.items()
  }
  searched = [rate for rate in by_rate if rules[rate] != {"given"}]
  tried = trials.bits(next(iter(by_rate.values()))[0])

  def order(rate):
    runs = by_rate[rate]
    if searched:
      return -len(runs), "checked" not in rules[rate]
    bits = np.mean([run.bits.mean() for run in runs])
    return tried.get(rate, math.inf), -len(runs), bits

  yield arm, by_rate[min(searched or by_rate, key=order)]
  for rate in sorted(by_rate.keys() - searched) if searched else ():
    yield f"{arm} rate={rate:g}", by_rate[rate]
