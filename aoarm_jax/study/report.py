"""The report of a study: one page, five figures and csv tables.

It can be written at any time from the cells that are done. The page says what
is missing, and every number on it is computed from cells.
"""

import textwrap
from collections import Counter
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import text
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import comparisons, figures, records, tables

SINGLE, MASKED = "decoupled_rope", "mdlm"
_HOLDS = {
  "yes": "hold",
  "no": "fail",
  "undecided": "undecided",
  "one seed": "with one seed",
  "rate": "waiting for runs at a better rate",
  "not run": "not run",
}
_PAGE = """# One stream or two: the report

`--mode=study --config.study.part=report` makes this page from cells, and nobody
edits it by hand. ± is half of a 95% interval, by Student's law over seeds and
stretches of text.

## Three sentences

1. **Does a second stream pay at equal FLOPs?** {budget}

2. **Why does it help?** {why}

3. **Does `{MASKED}` overtake one stream after equal characters?** {masked}

{counts} None is corrected for their number. Differences within {MARGIN} bits
count as equal. What no config declared before its runs is exploratory.

## Setup

{setup}

## Figures

{figures}

## Predictions and outcomes

`configs/study_why.py` declared them before the runs. They are judged at equal
steps, in bits per character.

{predictions}

## Limits

{limits}

## Appendix

Tables: {links}.
"""


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
  masked = comparisons.differences(curves, SINGLE)
  made = {
    "runs": tables.of_runs(chosen),
    "rates": tables.of_runs(trials.runs),
    "differences": comparisons.differences(settings, reference),
    "masked": tables.find(masked, arm=MASKED),
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
  runs = [
    run for run in records.listed(curves) if _is_main(tables.named(run), size)
  ]
  drawn = figures.draw(folder, runs, shown, (MASKED, SINGLE, reference))
  page = _page(config, cells, results, chosen, shown, drawn)
  run_dir.write_atomically(folder / "README.md", page)
  logging.info("report of %d runs: %s", len(chosen), folder)


def _is_main(row, size):
  """Whether a row is of the size of the config, in uniform orders."""
  is_uniform = row.get("orders", "uniform") == "uniform"
  return is_uniform and row.get("size", size) == size


def _page(config, cells, results, runs, made, drawn):
  """Return the text of README.md."""
  lengths = sorted({cell.T for cell in cells})
  predictions = tables.find(made["predictions"], equal="steps")
  flops = tables.find(made["differences"], arm=SINGLE, equal="flops")
  budget = [r for r in flops if not r["study"].startswith(comparisons.WHY)]
  masked = tables.find(made["masked"], equal="steps")
  missing = [cell for cell in cells if results.result(cell) is None]
  limits = _limits(config, missing, results.failures(cells), runs, made)
  page = _PAGE.format(
    MASKED=MASKED,
    MARGIN=comparisons.MARGIN,
    budget=_each(budget or flops, lengths, "one stream", "two streams"),
    why=_why(predictions),
    masked=_each(masked, lengths, MASKED, "one stream"),
    counts=_counts(made, predictions),
    setup=text.markdown_table(
      ("what", "value"), _setup(config, cells, missing, runs)
    ),
    figures=_figures(drawn, made),
    predictions=_predictions(predictions),
    limits="\n".join(f"- {line}" for line in limits),
    links=", ".join(f"[{name}]({name}.csv)" for name in made if made[name]),
  )
  return "\n\n".join(map(_filled, page.strip().split("\n\n"))) + "\n"


def _filled(part):
  """Return a paragraph or a list in lines of 92 characters."""
  if part.startswith(("|", "#", "!")):
    return part
  indent = {"-": "  ", "1": "   ", "2": "   ", "3": "   "}.get(part[0], "")
  wrapper = textwrap.TextWrapper(92, subsequent_indent=indent)
  wrapper.break_long_words = wrapper.break_on_hyphens = False
  items = part.split("\n") if part[0] == "-" else [part]
  return "\n".join(map(wrapper.fill, items))


def _figures(drawn, made):
  notes, parts = _notes(made), []
  for name, caption in figures.CAPTIONS.items():
    title, _, words = caption.partition(". ")
    if name in drawn:
      parts.append(f"![{title}]({name}.png)")
      parts.append(f"**{title}.** {' '.join([words, *notes.get(name, [])])}")
    else:
      parts.append(
        f"**{title}** is not drawn, since its cells do not exist yet."
      )
  return "\n\n".join(parts)


def _bits(row):
  """Return a difference with its error, in words."""
  more = "more" if row["difference_bits"] > 0 else "fewer"
  return f"{_signed(row)[1:]} bits per character {more}"


def _signed(row):
  """Return a difference with its sign and, of several seeds, its error."""
  error = f" ± {row['half_of_95_percent']:.3f}" * (row["seeds"] > 1)
  return f"{row['difference_bits']:+.3f}{error}"


def _seeds(row):
  return f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}"


def _each(rows, lengths, arm, other):
  """Return a sentence on the largest budget of each length."""
  lines = []
  verdicts = {
    "worse": f"{arm} is behind",
    "better": f"{arm} is ahead",
    "equal": f"they are equal within {comparisons.MARGIN} bits",
    "one seed": "one seed decides nothing",
  }
  absent = [f"{T:,}" for T in lengths if not tables.find(rows, T=T)]
  for T in sorted({row["T"] for row in rows}):
    row = max(tables.find(rows, T=T), key=lambda row: row["characters"])
    lines.append(
      f"At T = {T:,} {arm} needs {_bits(row)} than {other} "
      f"({tables.words(row['characters'])} characters, {_seeds(row)}): "
      f"{verdicts.get(row['answer'], row['answer'])}."
    )
  if absent:
    lines.append(
      f"At T = {' and '.join(absent)} the curve over budgets has no pair of "
      "runs yet."
    )
  return " ".join(lines)


def _notes(made):
  """Return sentences that captions end with, by the name of the figure."""
  changes = [
    f"From {row['from_steps']:,} to {row['to_steps']:,} steps of two streams "
    f"the difference at equal FLOPs and T = {row['T']:,} changes by "
    f"{_signed(row)} bits ({_seeds(row)})."
    for row in tables.find(made["contrasts"], arm=SINGLE)
  ]
  # The largest budget of each length is the last one.
  largest = {r["T"]: r for r in tables.find(made["delays"], arm=SINGLE)}
  bounds = {">": "above ", "<": "below ", "": ""}
  delays = [
    f"At the largest budget and T = {T:,} the delay is {bounds[row['bound']]}"
    f"{row['delay']:.2f}, and the FLOP ratio is {row['cost_ratio']:.2f}."
    for T, row in largest.items()
  ]
  return {"f1_bits": changes, "f2_delay": delays}


def _why(rows):
  if not any("answer" in row for row in rows):
    return f"None of the {len(rows)} predictions has runs yet."
  shortest = min(row["T"] for row in rows if "answer" in row)
  rows = tables.find(rows, T=shortest)
  lines = []
  for name, words in comparisons.EXPLANATIONS.items():
    holds = [row["holds"] for row in tables.find(rows, explanation=name)]
    counts = ", ".join(
      f"{holds.count(x)} {said}" for x, said in _HOLDS.items() if x in holds
    )
    lines.append(f"Predictions if {words}: {counts}.")
  for row in tables.find(rows, contrast="register - two_stream")[:1]:
    if "answer" in row:
      lines.append(
        f"Two rows without a split need {_bits(row)} than two streams (equal "
        f"steps, T = {row['T']:,}, {_seeds(row)}): {row['answer']}."
      )
  return " ".join(lines)


def _counts(made, predictions):
  counts = {
    "differences": len(made["differences"]) + len(made["masked"]),
    "delays": len(made["delays"]),
    "changes over budgets": len(made["contrasts"]),
    "predictions": sum("answer" in row for row in predictions),
  }
  listed = ", ".join(f"{name}: {n}" for name, n in counts.items())
  return f"Comparisons: {sum(counts.values())} ({listed})."


def _setup(config, cells, missing, runs):
  """Yield the rows of the table of the setup."""
  done = len(cells) - len(missing)
  yield "cells", f"{done} of {len(cells)} of `{config.name}` are done"
  if not runs:
    return
  first = runs[0].result
  sizes = first.get("text_characters", {}).items()
  splits = ", ".join(f"{split} {tables.words(n)}" for split, n in sizes)
  yield "characters of the text", splits
  yield "width x layers x heads", cells_lib.size_of(config.model)
  o = first["config"]["optimizer"]
  yield (
    "training",
    f"{config.study.tokens_per_step:,} characters a step, AdamW ({o['b1']:g}, "
    f"{o['b2']:g}), decay {o['weight_decay']:g}, {o['schedule']}",
  )
  rates = dict.fromkeys(
    f"`{run.arm}` {run.rate:g} at T = {run.cell.T:,}"
    for run in runs
    if run.arm in (config.study.reference, SINGLE)
  )
  yield "peak learning rates", ", ".join(rates)
  seeds = ", ".join(map(str, sorted({run.cell.seed for run in runs})))
  yield "seeds", f"{seeds}; rates were tuned on {config.study.tune_seeds}"
  windows = {(run.result["estimate"]["windows"], run.cell.T) for run in runs}
  listed = ", ".join(f"{n:,} windows of {T:,}" for n, T in sorted(windows))
  yield "bits", f"last parameters, any order, {config.eval.split}: {listed}"


def _predictions(rows):
  columns = ("explanation", "contrast", "T", "predicts")
  lines = [
    (
      *(row[name] for name in columns),
      *(
        (_signed(row), row["seeds"], row["answer"])
        if "answer" in row
        else "---"
      ),
      row["holds"],
    )
    for row in rows
  ]
  return text.markdown_table(
    (*columns, "difference", "seeds", "outcome", "holds"), lines
  )


def _limits(config, missing, failures, runs, made):
  """Yield what the numbers of this page cannot say."""
  counts = Counter(f"`{cell.mechanism}` at T = {cell.T:,}" for cell in missing)
  listed = ", ".join(f"{n} of {arm}" for arm, n in counts.items())
  yield f"Cells that are not done: {listed or 'none'}."
  yield from (f"Failed: {line}" for line in failures)
  bits: dict[tuple, list[float]] = {}
  for run in runs:
    key = run.arm, run.cell.T, run.steps, run.study
    bits.setdefault(key, []).append(float(run.bits.mean()))
  spreads = {key: max(of) - min(of) for key, of in bits.items()}
  if runs:
    arm, T, steps, _ = key = max(spreads, key=spreads.__getitem__)
    single = sum(len(of) == 1 for of in bits.values())
    yield (
      f"Seeds differ by up to {spreads[key]:.3f} bits (`{arm}`, T = {T:,}, "
      f"{steps:,} steps). One seed: {single} of {len(bits)} arms and budgets."
    )
  inside = {(r["arm"], r["T"], r["seed"], r["steps"]) for r in made["locality"]}
  yield f"Networks whose attention was measured: {len(inside)}."
  yield (
    "There is one text, and its tokens are characters. The "
    f"{config.eval.split} split chose the learning rates and is reported."
  )
