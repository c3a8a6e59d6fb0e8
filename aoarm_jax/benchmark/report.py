"""The report of a benchmark: its table, numbers and pictures."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from aoarm_jax.runs import disk
from aoarm_jax.runs import text as text_lib

_COLUMNS = ("part", "subject", "measure", "value", "error", "unit", "n", "note")
_SIDES = "<<<>><><"


def write(
  folder: epath.Path, parts: Mapping[str, Any], record: dict[str, Any]
) -> str:
  """Write the report.

  The same record gives the same files.

  Args:
    folder: the folder of the report.
    parts: part -> the module that makes its rows and its picture.
    record: the content of benchmark.json without the table.

  Returns:
    The table for people.
  """
  facts, left_out = record["run"], record["left_out"]
  by_part: dict[str, dict[str, Any]] = {}
  for name, unit in record["units"].items():
    part, _, piece = name.partition("/")
    by_part.setdefault(part, {})[piece] = unit["result"]
  rows = [row for p, found in by_part.items() for row in parts[p].rows(found)]
  record = record | {"table": [row._asdict() for row in rows]}
  table = text_lib.csv_table(row._asdict() for row in rows)
  content = disk.to_json(record, indent=2) + "\n"
  disk.write_atomically(folder / "benchmark.json", content)
  disk.write_atomically(folder / "benchmark.csv", table)
  title = f"{facts['experiment']}, step {facts['step']:,}"
  pictures = []
  for part, found in by_part.items():
    picture = folder / f"{part}.png"

    def draw(part=part, found=found, picture=picture):
      parts[part].draw(found, picture, f"{part.replace('_', ' ')}: {title}")

    if disk.attempt(draw):
      pictures.append(part)
  page = _page(title, facts, rows, left_out, pictures)
  disk.write_atomically(folder / "README.md", page)
  return text_lib.aligned([_COLUMNS, *map(_cells, rows)], _SIDES)


def _cells(row):
  """Return the cells of a row, for people."""
  value, error = (
    "" if number is None else f"{number:.4f}"
    for number in (row.value, row.error)
  )
  part, subject, measure, unit = row.words()
  return (part, subject, measure, value, error, unit, f"{row.n:,}", row.note)


def _page(title, facts, rows, left_out, pictures):
  """Return README.md."""
  lines = [
    f"# Benchmark of {title}",
    "",
    "`error` is the standard error of `value`, and `n` says over how many "
    "tokens, windows or texts. `benchmark.json` has all settings.",
    "",
    *(f"- {k.replace('_', ' ')}: `{value}`" for k, value in facts.items()),
    "",
    text_lib.markdown_table(_COLUMNS, map(_cells, rows), _SIDES),
  ]
  if left_out:
    lines += ["", "Left out:", ""]
    lines += [f"- {part}: {why}" for part, why in left_out.items()]
  for part in pictures:
    lines += ["", f"![{part.replace('_', ' ')}]({part}.png)"]
  return "\n".join(lines) + "\n"
