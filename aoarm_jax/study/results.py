"""The results of a sweep in a run directory, and what cells are run with."""

import math

from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import measure, place, rates

FOLDER = "cells"
_UNTRAINED = 0.1  # Bits below the letters' entropy that a run has to be.


class Results:
  """The cells of a sweep in a run directory."""

  def __init__(self, config: config_lib.Config, workdir: epath.Path):
    self.config, self.workdir = config, workdir
    self.place = place.Place(workdir)
    # What is done and what is decided stays so: it is read once.
    self._done: dict[epath.Path, dict] = {}
    self._rates: dict[cells_lib.Cell, float] = {}

  def rate(self, cell: cells_lib.Cell) -> float | None:
    """The peak learning rate of a cell; None where its trials are not done.

    Of the trials that are as good as the best one, within cells.TIED bits, that
    of the rate next to the configuration's; where none of them learned
    anything, the configuration's. One whose loss was no number is worse than
    any.
    """
    if rates.parse(cell.rate):
      if cell not in self._rates:
        _, rate = rates.plan(cell, self.config, self.outcome)
        if rate is None:
          return None
        self._rates[cell] = rate
      return self._rates[cell]
    trials = cells_lib.trials(cell, self.config)
    if not trials:
      return float(cell.rate)
    if trials[0] not in self._rates:
      if any(map(self.is_open, trials)):
        return None
      self._rates[trials[0]] = self._best(trials)
    return self._rates[trials[0]]

  def _best(self, trials):
    done = [trial for trial in trials if self.result(trial)]
    plain = self.config.optimizer.peak_learning_rate
    if all(map(self.is_untrained, done)):
      return plain
    bits = {
      float(trial.rate): value
      for trial in done
      if (value := self.bits(trial)) is not None
    }
    least = min(bits.values())
    good = [rate for rate in bits if bits[rate] <= least + cells_lib.TIED]
    return min(good, key=lambda rate: abs(math.log(rate / plain)))

  def is_untrained(self, cell: cells_lib.Cell) -> bool:
    """Whether a run has learned no more than how frequent the letters are."""
    result = self.result(cell)
    if result is None or "unigram_bits" not in result:
      return False
    bits = result["estimate"]["bits_per_char"]
    return bits > result["unigram_bits"] - _UNTRAINED

  def resolved(self, cell: cells_lib.Cell) -> config_lib.Config | None:
    """What the cell is run with; None where that is not decided yet."""
    rate = self.rate(cell)
    if rate is None:
      return None
    return cells_lib.resolve(cell, self.config, rate)

  def folder(self, cell: cells_lib.Cell) -> epath.Path | None:
    resolved = self.resolved(cell)
    if resolved is None:
      return None
    return self.workdir / FOLDER / cells_lib.folder_name(cell, resolved)

  def result(self, cell: cells_lib.Cell) -> dict | None:
    """What result.json of the cell holds; None where it is not done."""
    folder = self.folder(cell)
    return None if folder is None else self._read(folder)

  def arrays(self, cell: cells_lib.Cell, name: str) -> dict:
    """Return an npz file of a cell that is done, see measure.read_arrays."""
    folder, result = self.folder(cell), self.result(cell)
    assert folder is not None, cell.label
    assert result is not None, cell.label
    return measure.read_arrays(folder, name, result)

  def _read(self, folder):
    if folder not in self._done:
      if not (folder / measure.RESULT).exists():
        return None
      self._done[folder] = measure.read_result(folder / measure.RESULT)
    return self._done[folder]

  def every(self) -> list[tuple[epath.Path, dict]]:
    """(folder, what result.json holds) of all that is done, by name.

    What is damaged is left out: no cell of this sweep, or one that is refused
    when it is asked for.
    """
    found = []
    for path in sorted((self.workdir / FOLDER).glob(f"*/{measure.RESULT}")):
      try:
        found.append((path.parent, self._read(path.parent)))
      except corpora.DataError as error:
        logging.warning("%s", error)
    return found

  def bits(self, cell: cells_lib.Cell) -> float | None:
    """Return the bits per character of a cell; None if it is not done."""
    result = self.result(cell)
    return None if result is None else result["estimate"]["bits_per_char"]

  def failure(self, cell: cells_lib.Cell) -> dict | None:
    """What failed.json of a cell holds; None where it is done or was not run.

    Returns:
      {"reason": str, "again": bool}, see measure.note_failure.
    """
    folder = self.folder(cell)
    if folder is None or self.result(cell) is not None:
      return None
    path = folder / measure.FAILED
    return measure.read_result(path) if path.exists() else None

  def failures(self, cells: list[cells_lib.Cell]) -> list[str]:
    """A line for each of these cells that failed: which, why, what to do."""
    lines = {}  # By folder: equal cells fail once.
    for cell in cells:
      failure = self.failure(cell)
      if failure:
        folder = self.folder(cell)
        assert folder is not None
        lines[folder] = f"{cell.label}: {failure['reason']} " + (
          "(the same command tries it again)"
          if failure["again"]
          else f"(not tried again unless {FOLDER}/{folder.name} is deleted)"
        )
    return list(lines.values())

  def outcome(self, cell: cells_lib.Cell) -> float | None:
    """Bits a character; inf where the cell failed for good; None where open."""
    if self.is_open(cell):
      return None
    return math.inf if self.result(cell) is None else self.bits(cell)

  def is_open(self, cell: cells_lib.Cell) -> bool:
    """Whether it is to be run: not done, nor failed for good."""
    failure = self.failure(cell)
    return self.result(cell) is None and (not failure or failure["again"])
