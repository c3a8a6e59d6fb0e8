"""--mode=study: runs what is missing of a sweep, and writes the report.

  python -m aoarm_jax.main --mode=study --config=configs/study_tradeoff.py

Every cell has a folder under cells/ in the run directory, and is done when it
has a result.json. A process that is killed loses the cell that it was at. Any
number of processes may work in one directory: a cell is locked while it runs.
Directories of several machines are put together by copying cells/.

A cell that fails leaves a failed.json, and the others go on. One whose loss is
no number is not tried again, since it would be none again, unless its folder is
deleted; one that found too little memory is tried by every start.
"""

import contextlib
import itertools
import time
import traceback

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import errors, paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import pipeline, tokenizers
from aoarm_jax.devices import meshes
from aoarm_jax.runs import identity, locking, telemetry
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import (
  dissection,
  exports,
  measure,
  rates,
  report,
  trunks,
)
from aoarm_jax.study import programs as programs_lib
from aoarm_jax.study import results as results_lib
from aoarm_jax.tools import matching

_TRUNKS = "trunks"
_LEAST_PART_SECONDS = 20.0  # Of a cell that can be interrupted.


class FailedCellsError(errors.UserError, RuntimeError):
  """Cells of a sweep failed; all others were run as far as was asked for."""


class _Clock:
  """How long cells take: by what was done before."""

  def __init__(self):
    # (flops, seconds of training, other seconds)
    self._done: list[tuple[float, float, float]] = []

  def add(self, result: dict) -> None:
    """Note the times of a cell that is done: what its result.json holds."""
    seconds = result["seconds"]
    training = seconds.get("train", 0.0)
    other = seconds["all"] - training
    flops = result["training_flops"]
    if "steps_taken" in result:  # A trunk's were taken before.
      flops *= result["steps_taken"] / result["config"]["train"]["steps"]
    self._done.append((flops, training, other))

  def estimate(self, flops: float, cells: int) -> float | None:
    """Seconds: training by FLOPs, all else by the number of cells."""
    total, training, other = (sum(x) for x in zip((0, 0, 0), *self._done))
    if not total:
      return None
    return flops * training / total + cells * other / len(self._done)


def study(config: config_lib.Config, workdir: epath.Path) -> None:
  """Runs the cells that are not done yet, as far as is asked for; reports.

  Raises:
    ConfigError: a sweep that cannot be, a text that is not that of the cells
      that are done, or a report of no cell.
    DataError: a text that is missing or wrong.
    FailedCellsError: at the end, where cells of this process failed.
    EvictedError: the directory was removed or replaced while cells ran.
    Stopped: a signal came in a cell that can be interrupted.
  """
  if jax.process_count() > 1:
    raise config_lib.ConfigError(
      "config.distributed.enabled=True: a study runs in one process; give each "
      "its share by --config.study.share_index and share_count"
    )
  cells = cells_lib.expand(config)
  folder = workdir / "report"
  if config.study.report:
    folder = paths.of(config.study.report, "config.study.report")
    paths.reached(folder, "config.study.report")
  if folder.exists() and not folder.is_dir():
    raise config_lib.ConfigError(
      f"config.study.report={config.study.report!r}: name a folder, not a file"
    )
  results = results_lib.Results(config, workdir)
  for cell in cells:  # Whatever cannot be is said before anything runs.
    cells_lib.resolve(cell, config, config.optimizer.peak_learning_rate)
  part = config.study.part
  if part in ("measure", "export"):
    mine = chosen(config, cells, results.outcome)
    if part == "measure":
      dissection.run(config, mine, results)
    else:
      exports.run(config, mine, results, workdir / "exports")
  elif part != "report":
    _run_cells(config, cells, results)
  if part not in ("cells", "export"):
    _report(config, cells, results, folder)
  if part in ("all", "cells"):
    _check_failures(config, cells, results)


def _check_failures(config, cells, results):
  """Raises FailedCellsError where cells of this process failed."""
  asked = set(cells)  # That a rate is too high is what a trial may find.
  failed = results.failures(
    [
      cell
      for cell in chosen(config, cells, results.outcome)
      if cell in asked or results.is_open(cell)
    ]
  )
  if failed:
    raise FailedCellsError(
      f"{len(failed)} of the study's cells failed: {'; '.join(failed)}"
    )


def _report(config, cells, results, folder):
  """Writes the report of this directory and of those in config.study.also."""
  every = results.every()
  for text in filter(None, map(str.strip, config.study.also.split(","))):
    other = paths.of(text, "config.study.also")
    paths.reached(other, "config.study.also")
    every += results_lib.Results(config, other).every()
  asked = cells_lib.with_trials(cells, config, results.outcome)
  # Every cell is asked, so that damage in any of them is named.
  known = [results.result(cell) or results.failure(cell) for cell in asked]
  if config.study.part == "report" and not every and not any(known):
    raise config_lib.ConfigError(
      "config.study.part='report': no cell of this study in "
      f"{results.workdir / results_lib.FOLDER}: run some without this flag, or "
      "name the --workdir and the --config that they were run with"
    )
  report.write(config, cells, results, every, folder)


def chosen(
  config: config_lib.Config,
  cells: list[cells_lib.Cell],
  outcome: rates.Outcome = lambda cell: None,
) -> list[cells_lib.Cell]:
  """Return the cells of this process, and the trials that they need.

  The list is empty where there are more shares than cells.

  Args:
    config: the config of the study.
    cells: all cells of the sweep.
    outcome: the results of trials, see rates.Outcome.

  Raises:
    ConfigError: config.study.cells selects no cell.
  """
  study = config.study
  wanted = [set(part.split()) for part in study.cells.split(",")]
  wanted = [words for words in wanted if words]
  mine = cells
  if wanted:
    mine = [
      cell
      for cell in cells_lib.with_trials(cells, config, outcome)
      if any(words <= set(cell.label.split()) for words in wanted)
    ]
  if not mine:
    raise config_lib.ConfigError(
      f"config.study.cells={study.cells!r}: no cell's label has all words of "
      f"any of these; the first one is {cells[0].label!r}"
    )
  mine = mine[study.share_index :: study.share_count]
  return cells_lib.with_trials(mine, config, outcome)


def _open_cells(mine, results):
  """Those of these cells that are to be run; of equal ones the first."""
  # By folder; a cell whose folder is not known yet stands for itself.
  wanted: dict[epath.Path | cells_lib.Cell, cells_lib.Cell] = {}
  for cell in mine:
    if results.is_open(cell):
      wanted.setdefault(results.folder(cell) or cell, cell)
  return list(wanted.values())


def _run_cells(config, cells, results):
  start, clock = time.monotonic(), _Clock()
  mine = chosen(config, cells, results.outcome)
  if not mine:
    logging.info("study: nothing to do in this share: more shares than cells")
    return
  for cell in mine:
    if result := results.result(cell):
      clock.add(result)
  todo = _open_cells(mine, results)
  logging.info(
    "study: %d cells here (equal ones are run once), runs left: %d; next: %s",
    len(mine),
    len(todo),
    todo[0].label if todo else "nothing",
  )
  fitting = [cell for cell in todo if _fits(clock, cell, start, results)]
  tokenizer = tokenizers.get(config.data.tokenizer)
  splits = "train", config.eval.split
  if not fitting:
    corpus = identity.read_text(config.data, tokenizer, *splits)
    _check_text(results, measure.text_of(corpus, config))
    if todo:
      _say_what_is_left(clock, todo, results)
    return
  rate = config.optimizer.peak_learning_rate  # Whatever: of no matter here.
  for cell in todo:
    resolved = cells_lib.resolve(cell, config, rate)
    mesh = meshes.of_run(resolved, "train", "eval")  # The same for all.
  programs = programs_lib.Programs(mesh)
  with jax.set_mesh(mesh), programs:
    _prepare(programs, results, fitting[:2])  # While the text is read.
    corpus = identity.read_text(config.data, tokenizer, *splits)
    lab = measure.Lab(config, corpus, mesh, programs)
    _check_text(results, lab.text)
    for split in lab.text:
      pipeline.check_length(corpus.split(split), max(c.T for c in todo))
    late, tried = False, set()
    with results.place.watched():
      while todo:
        # A cell whose rate is still open may be run in the next round.
        tried |= {cell for cell in todo if results.folder(cell)}
        late |= _run_all(lab, results, todo, clock, start)
        # A search that is a trial further names the next ones.
        mine = chosen(config, cells, results.outcome)
        todo = [
          cell
          for cell in _open_cells(mine, results)
          if cell not in tried and results.folder(cell)
        ]
      results.place.check()
    left = _open_cells(mine, results)
    if late and left:  # Another process may have done them.
      _say_what_is_left(clock, left, results)


def _run_all(lab, results, todo, clock, start):
  """Runs cells one after the other; returns whether time did not do for all."""
  late = False
  for n, cell in enumerate(todo):
    if not results.is_open(cell):
      continue  # A trial before was the same run.
    if not _fits(clock, cell, start, results):
      late = True
      continue  # A shorter one may follow.
    left = _seconds_left(clock, todo[n:], results)
    logging.info(
      "cell %d/%d  %s  ETA of all %s",
      n + 1,
      len(todo),
      cell.label,
      "unknown" if left is None else telemetry.format_duration(left),
    )
    after = (c for c in todo[n + 1 :] if _fits(clock, c, start, results))
    _prepare(lab.programs, results, [cell, *itertools.islice(after, 1)])
    late |= not _run_cell(lab, results, cell, clock, start)
  return late


def _fits(clock, cell, start, results):
  """Return if a cell would end in time, as far as is known.

  One that can be interrupted is begun if there is time for a part of it.
  """
  study = results.config.study
  limit = study.limit_seconds
  if not limit:
    return True
  if study.decay_share:
    return time.monotonic() - start + _LEAST_PART_SECONDS <= limit
  seconds = _seconds_left(clock, [cell], results) or 0
  return time.monotonic() - start + seconds <= limit


def _say_what_is_left(clock, cells, results):
  limit = results.config.study.limit_seconds
  least = min(_seconds_left(clock, [cell], results) or 0 for cell in cells)
  again = "start the same command again"
  if least > limit:
    again = f"the shortest takes about {least:.0f} s: raise the limit"
  logging.info("limit of %d s: %d cells are left; %s", limit, len(cells), again)


def _seconds_left(clock, cells, results):
  """What cells will take; of those whose rate is open, at any rate."""
  config, rate = results.config, results.config.optimizer.peak_learning_rate
  flops = sum(
    matching.training_flops(cells_lib.resolve(cell, config, rate))
    for cell in cells
  )
  return clock.estimate(flops, len(cells))


def _prepare(programs, results, cells):
  """Starts to compile what these cells need."""
  for cell in cells:
    resolved = results.resolved(cell)
    if resolved is not None:
      programs.of(resolved)


def _run_cell(lab, results, cell, clock, start):
  """Runs a cell unless others do; returns False where time was up in it."""
  folder, config = results.folder(cell), results.resolved(cell)
  if folder is None:
    logging.warning("its trials are not done: left for another start")
    return True
  trunk = None
  if config.study.decay_share:
    trunk = results.workdir / _TRUNKS / cells_lib.trunk_name(cell, config)
  results.place.check()  # A lock would make the directory anew.
  with contextlib.ExitStack() as stack:
    try:
      for path in filter(None, (folder, trunk)):
        stack.enter_context(locking.lock(path))
    except config_lib.ConfigError:
      logging.warning("another process runs this cell: passed over")
      return True
    # Another process may have begun with another text meanwhile.
    _check_text(results, lab.text)
    # Another process may have done it meanwhile; equal cells share a folder.
    if results.is_open(cell):
      try:
        if trunk is None:
          clock.add(lab.run(cell, config, folder, where=results.place.of))
          return True
        limit = config.study.limit_seconds
        keeper = trunks.Keeper(
          config,
          trunk,
          folder / trunks.BRANCH,
          text=lab.text,
          deadline=start + limit if limit else None,
          where=results.place.of,
        )
        with contextlib.closing(keeper):
          done = lab.run(cell, config, folder, keeper, results.place.of)
          clock.add(done)
        (folder / trunks.BRANCH).rmtree(missing_ok=True)
      except trunks.GoneError as error:
        logging.warning("  %s", error)
        results.place.check()
      except (telemetry.NonFiniteError, jax.errors.JaxRuntimeError) as error:
        _note_failure(error, cell, folder)
      except trunks.OutOfTimeError as error:
        logging.info("  %s", error)
        return False
  return True


def _note_failure(error, cell, folder):
  """Notes why a cell failed; raises what may be no fault of the cell's."""
  out_of_memory = isinstance(error, jax.errors.JaxRuntimeError)
  if out_of_memory and not telemetry.is_out_of_memory(error):
    raise error
  # Without the advice, which is for a training run that has checkpoints.
  reason = "out of memory" if out_of_memory else str(error).partition(";")[0]
  measure.note_failure(folder, reason, again=out_of_memory)
  logging.warning("cell failed: %s: %s", cell.label, reason)
  # A program that did not compile keeps its error, and that the parameters.
  traceback.clear_frames(error.__traceback__)


def _check_text(results, text):
  """All cells of a directory are of one text."""
  folder = results.workdir / results_lib.FOLDER
  for path in sorted(folder.glob(f"*/{measure.RESULT}"))[:1]:
    other = measure.read_result(path)["text"]
    if other != text:
      raise config_lib.ConfigError(
        f"config.data.path={results.config.data.path!r}: another text than "
        f"that of {path.parent}; choose another --workdir for it"
      )
