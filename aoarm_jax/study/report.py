"""The report of a study: one page, five figures and csv tables.

It can be written at any time from the cells that are done. The page says what
is missing.
"""

from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import comparisons, figures, page, records, tables


def write(
  config: config_lib.Config,
  cells: list[cells_lib.Cell],
  results: Any,
  every: list[tuple[epath.Path, dict]],
  folder: epath.Path,
) -> None:
  """Write README.md, the tables and the figures that there is data for.

  Args:
    config: of the study.
    cells: all of the sweep.
    results: sweep.Results.
    every: (folder, content of result.json) of the cells that are shown.
    folder: made if absent.
  """
  reference = config.study.reference
  runs = records.read(every)
  trials = records.Trials(runs, config.study.tune_seeds)
  settings = records.settings(runs, trials)
  chosen = records.listed(settings)
  # The arms of configs/study_why.py have one budget each, and so no curve.
  curves = {
    setting: arms
    for setting, arms in settings.items()
    if not setting.study.startswith(comparisons.WHY)
  }
  masked = comparisons.differences(curves, page.SINGLE)
  made = {
    "runs": tables.of_runs(chosen),
    "rates": tables.of_runs(trials.runs),
    "differences": comparisons.differences(settings, reference),
    "masked": tables.find(masked, arm=page.MASKED),
    "contrasts": comparisons.contrasts(curves, reference),
    "delays": comparisons.delays(curves, reference, config.study.bootstrap),
    "predictions": comparisons.predictions(settings, reference, trials),
    **tables.of_measures(chosen),
  }
  for name, rows in made.items():
    path = folder / f"{name}.csv"
    if rows:
      run_dir.write_atomically(path, tables.to_csv(rows))
    else:
      path.unlink(missing_ok=True)
  size = cells_lib.size_of(config.model)
  shown = {
    name: [row for row in rows if _is_main(row, size)]
    for name, rows in made.items()
  }
  drawn = figures.draw(
    folder,
    [
      run for run in records.listed(curves) if _is_main(tables.named(run), size)
    ],
    shown,
    (page.MASKED, page.SINGLE, reference),
  )
  missing = [cell for cell in cells if results.result(cell) is None]
  failures = results.failures(cells)
  text = page.text(config, cells, missing, failures, chosen, shown, drawn)
  run_dir.write_atomically(folder / "README.md", text)
  logging.info("report of %d runs: %s", len(runs), folder)


def _is_main(row, size):
  """Whether a row is of the size of the config, in uniform orders."""
  return (row.get("size", size), row.get("orders", "uniform")) == (
    size,
    "uniform",
  )
