"""The long tables of a report: one row per run, trial, text or measure."""

from collections.abc import Iterable
from typing import Any

from aoarm_jax.study import coherence, dissection, measure, records

Row = dict[str, Any]


def find(rows: list[Row], **wanted: Any) -> list[Row]:
  """Return the rows that have these values."""
  return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def _named(run):
  """Return the columns that say which run a row is about."""
  which = {"seed": run.cell.seed, "rate": run.rate, "steps": run.steps}
  return {"study": run.study, "arm": run.arm} | run.setting._asdict() | which


def of_runs(runs: Iterable[records.Run]) -> list[Row]:
  """Return one row per run: cost, bits by estimator, generated texts."""
  rows = []
  for run in runs:
    result = run.result
    row = _named(run) | {
      "rule": run.cell.rate,
      "characters": run.characters,
      "training_flops": run.flops,
      "parameters": result["parameters"],
    }
    for found in result.get("estimates", [result["estimate"]]):
      words = [found["estimator"], *filter(None, [found.get("weights")])]
      row["_".join(words)] = found["bits_per_char"]
    row["standard_error"] = result["estimate"]["standard_error_bits"]
    row["training"] = result.get("last_training_bits", "")
    samples = measure.read_arrays(run.folder, "samples.npz", result)
    if samples:
      areas = coherence.areas(samples["counts"])
      row |= {f"area_{rule}": area for rule, area in areas.items()}
    for name in ("tokens_per_second", "device"):
      row[name] = result[name]
    rows.append(row | {"folder": run.folder.name})
  return rows


def of_measures(runs: Iterable[records.Run]) -> dict[str, list[Row]]:
  """Return the tables of knock-outs, probes, characters and locality.

  Heads are never averaged over runs: head h of one is not head h of another.
  """
  made: dict[str, list[Row]] = {name: [] for name in dissection.TABLES}
  for run in runs:
    for name, rows in dissection.rows(run.folder, run.result).items():
      made[name] += [_named(run) | row for row in rows]
  return made
