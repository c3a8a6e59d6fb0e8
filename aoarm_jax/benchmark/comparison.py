"""Several benchmarks side by side: one table and two pictures.

  python -m aoarm_jax.benchmark.comparison runs/one runs/two --out=compared

Every folder is a run directory, or its folder benchmark/, and has a
benchmark.json. All must have measured the same text. The folder --out gets
README.md, comparison.csv, frontier.png and likelihood.png.

Models whose tokenizers differ are compared per byte and per text only: rows in
other units are left out of the table. So are notes; the report of each model
has them.
"""

import sys
from collections.abc import Iterable, Sequence

from etils import epath

from aoarm_jax.benchmark import frontier
from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import canvas, disk, text
from aoarm_jax.tools import arguments

_REPORT = "benchmark.json"
_KEYS = ("part", "subject", "measure", "unit")


class _Benchmark:
  """A benchmark.json.

  Attributes:
    name: of the model, for the table.
    run: what identifies the run.
    rows: (part, subject, measure, unit) -> the row of the table.
    text: sha256 of the text whose likelihood was measured; "" without one.
  """

  def __init__(self, folder: epath.Path) -> None:
    """Read a benchmark.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = folder / _REPORT
    if not path.exists():
      path = folder / "benchmark" / _REPORT
    if not path.exists():
      raise config_lib.ConfigError(
        f"{folder}: has no {_REPORT}; make it with --mode=benchmark "
        f"--workdir={folder}"
      )
    kinds = {"run": dict, "units": dict, "table": [dict]}
    try:
      record = reading.parse(reading.read(path, reading.JSON_BYTES), kinds)
      self.run = record["run"]
      self.name = folder.name if folder.name != "benchmark" else path.parts[-3]
      self.rows = {
        tuple(row[k] for k in _KEYS): results_lib.Row(**row)
        for row in record["table"]
      }
      facts = [
        unit["settings"]["text"]
        for name, unit in record["units"].items()
        if name.startswith("likelihood/")
      ]
      self.text = facts[0].get("sha256_of_the_whole_text") or facts[0]["sha256"]
    except IndexError:
      self.text = ""
    except (KeyError, OSError, TypeError, ValueError) as error:
      raise config_lib.ConfigError(
        f"{path}: is not a report of --mode=benchmark ({error!r}); make it anew"
      ) from error


def compare(folders: Sequence[epath.Path], out: epath.Path) -> str:
  """Write the comparison, and return its README.md.

  Args:
    folders: run directories, or their folders benchmark/.
    out: folder of the comparison; it is made.

  Raises:
    ConfigError: a folder has no benchmark, two have the same name, or their
      texts differ.
  """
  found = [_Benchmark(folder) for folder in folders]
  first = found[0]
  for other in found[1:]:
    if other.text != first.text:
      raise config_lib.ConfigError(
        f"{other.name}: has measured another text than {first.name}: give both "
        "the same --config.benchmark.text and --config.data.normalise"
      )
  if len({one.name for one in found}) < len(found):
    raise config_lib.ConfigError(
      "two folders have the same name: rename one, names are the columns"
    )
  out.mkdir(parents=True, exist_ok=True)
  keys = [*_comparable(found)]
  disk.write_atomically(out / "comparison.csv", _csv(found, keys))
  pictures = {"likelihood": _draw_likelihood, "frontier": _draw_frontier}
  drawn = [
    name
    for name, draw in pictures.items()
    if draw(found, keys, out / f"{name}.png")
  ]
  page = _page(found, keys, drawn)
  disk.write_atomically(out / "README.md", page)
  return page


def _comparable(found: Sequence[_Benchmark]) -> Iterable[tuple[str, ...]]:
  """Yield the keys of the table's rows, in the order of the reports."""
  same = len({one.run["tokenizer_sha256"] for one in found}) == 1
  ordered = dict.fromkeys(key for one in found for key in one.rows)
  order = {part: i for i, part in enumerate(config_lib.BENCHMARK_PARTS)}
  for key in sorted(ordered, key=lambda key: order[key[0]]):
    if same or "token" not in key[3]:
      yield key


def _csv(found, keys):
  """Return all values and errors as CSV."""
  return text.csv_table(
    {"model": one.name, **dict(zip(_KEYS, key))}
    | {"value": row.value, "error": row.error, "n": row.n}
    for one in found
    for key in keys
    if (row := one.rows.get(key))
  )


def _cell(row: results_lib.Row | None) -> str:
  """Return a value with its standard error."""
  if row is None or row.value is None:
    return ""
  error = "" if row.error is None else f" ± {row.error:.3f}"
  return f"{row.value:.3f}{error}"


def _page(found, keys, drawn):
  """Return README.md."""
  names = [one.name for one in found]
  facts = ("mechanism", "step", "parameters", "tokenizer", "tokenizer_symbols")
  lines = [
    "# Benchmarks side by side",
    "",
    "± is a standard error. The report of each model says which numbers are "
    "exact, and which are bounds or estimates.",
    "",
    text.markdown_table(
      ["", *names],
      (
        [fact.replace("_", " "), *(_fact(one.run[fact]) for one in found)]
        for fact in facts
      ),
    ),
    "",
    text.markdown_table(
      ["part", "subject", "measure", "unit", *names],
      (_row(key, found) for key in keys),
      "<<<<" + ">" * len(names),
    ),
  ]
  for name in drawn:
    lines += ["", f"![{name}]({name}.png)"]
  return "\n".join(lines) + "\n"


def _row(key, found):
  """Return the cells of a row: what is measured, and a value a model."""
  rows = [one.rows.get(key) for one in found]
  named = next(row for row in rows if row)
  return [*named.words(), *map(_cell, rows)]


def _fact(value):
  return f"{value:,}" if isinstance(value, int) else str(value)


def _draw_likelihood(found, keys, path):
  """Draw bits per byte of every estimator; return whether there are any."""
  keys = [k for k in keys if k[0] == "likelihood" and k[3] == "bits_per_byte"]
  if not keys:
    return False
  with canvas.draw([path], inches=(8, 1.6 + 0.55 * len(keys))) as (_, grid):
    axes = grid[0, 0]
    for i, one in enumerate(found):
      places = [j for j, key in enumerate(keys) if key in one.rows]
      rows = [one.rows[keys[j]] for j in places]
      axes.errorbar(
        [row.value for row in rows],
        [j - 0.12 * (i - (len(found) - 1) / 2) for j in places],
        xerr=[row.error or 0 for row in rows],
        fmt="o",
        capsize=3,
        color=canvas.COLOURS[i % len(canvas.COLOURS)],
        label=one.name,
      )
    canvas.name_lines(axes, [key[1].replace("_", " ") for key in keys])
    axes.set_xlabel("bits per byte, with standard errors")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return True


def _draw_frontier(found, keys, path):
  """Draw quality over measured entropy; return whether there are any."""
  pairs = [
    [_of_measure(one, keys, name) for name in ("measured entropy", "quality")]
    for one in found
  ]
  references = [quality["real text"] for _, quality in pairs if quality]
  if not references:
    return False
  with canvas.draw([path], inches=(8, 4.6)) as (_, grid):
    axes = grid[0, 0]
    for i, (one, (entropy, quality)) in enumerate(zip(found, pairs)):
      if quality:
        colour = canvas.COLOURS[i % len(canvas.COLOURS)]
        frontier.draw_samples(axes, entropy, quality, colour, one.name)
    axes.axhline(
      references[0].value, color=canvas.GREY, ls="--", label="real text"
    )
    axes.set_xlabel("measured entropy in bits per byte: more is more diverse")
    axes.set_ylabel("bits per byte under the scorer")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return True


def _of_measure(one, keys, measure):
  """Return {subject: row} of a measure in bits per byte."""
  return {
    key[1]: one.rows[key]
    for key in keys
    if key in one.rows and key[2:] == (measure, "bits_per_byte")
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Compare benchmarks, as the command line says; return the exit status."""
  parser = arguments.parser("benchmark.comparison", __doc__)
  parser.add_argument("folders", nargs="+", type=arguments.place)
  parser.add_argument("--out", type=arguments.place, required=True)
  flags = parser.parse_args(argv)
  try:
    print(compare(flags.folders, flags.out), end="")
  except (config_lib.ConfigError, OSError) as error:
    sys.exit(f"aoarm_jax: error: {error}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
