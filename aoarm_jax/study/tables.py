"""The long tables of a report: one row per run, trial, text or measure."""

import csv
import io
from collections.abc import Iterable
from typing import Any

from aoarm_jax.config import mechanisms
from aoarm_jax.study import coherence, dissection, measure, profiles, records

Row = dict[str, Any]


def to_csv(rows: list[Row]) -> str:
  """Return the rows as csv. Numbers have at most six digits."""
  text = io.StringIO()
  fields = list(dict.fromkeys(name for row in rows for name in row))
  writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
  writer.writeheader()
  for row in rows:
    writer.writerow(
      {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
    )
  return text.getvalue()


def find(rows: list[Row], **wanted: Any) -> list[Row]:
  """Return the rows that have these values."""
  return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def named(run: records.Run) -> Row:
  """Return the columns that say which run a row is about."""
  return {
    "study": run.study,
    "arm": run.arm,
    "T": run.cell.T,
    "size": run.cell.size,
    "orders": run.cell.orders,
    "seed": run.cell.seed,
    "rate": run.rate,
    "steps": run.steps,
  }


def of_runs(runs: Iterable[records.Run]) -> list[Row]:
  """Return one row per run: cost, bits by estimator, generated texts."""
  rows = []
  for run in runs:
    row = named(run) | {
      "rule": run.cell.rate,
      "characters": run.characters,
      "training_flops": run.flops,
      "parameters": run.result["parameters"],
    }
    for found in run.result.get("estimates", [run.result["estimate"]]):
      words = [found["estimator"], *filter(None, [found.get("weights")])]
      row["_".join(words)] = found["bits_per_char"]
    row["standard_error"] = run.result["estimate"]["standard_error_bits"]
    row["training"] = run.result.get("last_training_bits", "")
    row |= _areas(run)
    for name in ("tokens_per_second", "device"):
      row[name] = run.result[name]
    rows.append(row | {"folder": run.folder.name})
  return rows


def _areas(run):
  """Return the dominated areas of coherence and diversity of its texts."""
  files = measure.read_arrays(run.folder, "samples.npz", run.result)
  if not files:
    return {}
  values = dict(zip(coherence.MEASURES, coherence.measures(files["counts"]).T))
  return {
    f"area_{rule}": coherence.dominated_area(
      values["diversity"], values[f"coherence_{rule}"]
    )
    for rule in coherence.RULES
  }


def of_measures(runs: Iterable[records.Run]) -> dict[str, list[Row]]:
  """Return the tables of knock-outs, probes, characters and locality.

  Heads are never averaged over runs: head h of one is not head h of another.
  """
  made: dict[str, list[Row]] = {name: [] for name in dissection.TABLES}
  for run in runs:
    found = dissection.rows(run.folder, run.result)
    if not found.get("locality"):
      arrays = measure.read_arrays(run.folder, "profile.npz", run.result)
      if arrays and profiles.is_current(arrays):
        kind = mechanisms.MECHANISMS[run.cell.mechanism]
        found["locality"] = profiles.rows(arrays, profiles.streams(kind))
    for name, rows in found.items():
      made[name] += [named(run) | row for row in rows]
  return made


def words(count: float) -> str:
  """Return a number of characters in words, such as "1.05 billion"."""
  if count >= 1e9:
    return f"{count / 1e9:.2f} billion"
  return f"{count / 1e6:.0f} million" if count >= 1e6 else f"{count:,.0f}"
