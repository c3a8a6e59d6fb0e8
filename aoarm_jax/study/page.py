"""The page of a report. Every number on it is computed from cells."""

import textwrap
from collections import Counter

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import comparisons, records, tables

SINGLE, MASKED = "decoupled_rope", "mdlm"
_FIGURES = {
  "f1_bits": "F1. Bits per character over training FLOPs. A dot is a seed, and "
  "a line joins the means.",
  "f2_delay": "F2. Steps that one stream needs for the loss of two streams. A "
  "second stream pays above the dashed line, the FLOP ratio of a step. Bars "
  "are 95% intervals over seeds, and an arrow marks a bound.",
  "f3_locality": "F3. Locality of attention by layer: 1 is all on the nearest "
  "slot, 0 is even. The mass on sentinels is taken out. A dot is a head, and a "
  "line is the mean over the heads of one network.",
  "f4_knockouts": "F4 a. Rise in bits where attention is barred from slots in "
  "all layers, in the second half of the order. A dot is a network, and bars "
  "are standard errors over windows.",
  "f4_predictions": "F4 b. Differences with 95% intervals. The grey field is "
  "what the explanation predicts. Green holds, red fails, and grey is open.",
  "f5_masked": f"F5. Bits per character of {MASKED} and of both arms over the "
  "characters that a run reads.",
}


def text(
  config: config_lib.Config,
  cells: list[cells_lib.Cell],
  missing: list[cells_lib.Cell],
  failures: list[str],
  runs: list[records.Run],
  made: dict[str, list[tables.Row]],
  drawn: list[str],
) -> str:
  """Return the text of README.md.

  Args:
    config: of the study.
    cells: all of the sweep.
    missing: those that are not done.
    failures: a line for each cell that failed.
    runs: the runs that answers are taken from.
    made: the rows of every table by its name.
    drawn: the names of the figures that there are.
  """
  lengths = sorted({cell.T for cell in cells})
  predictions = tables.find(made["predictions"], equal="steps")
  flops = tables.find(made["differences"], arm=SINGLE, equal="flops")
  budget = [r for r in flops if not r["study"].startswith(comparisons.WHY)]
  notes = _notes(made)
  links = (f"[{name}]({name}.csv)" for name, rows in made.items() if rows)
  parts = [
    "# One stream or two: the report",
    "`--mode=study --config.study.part=report` makes this page from cells. "
    "Nobody edits it by hand. ± is half of a 95% interval, by Student's law "
    "over seeds and stretches of text.",
    "## Three sentences",
    "1. **Does a second stream pay at equal FLOPs?** "
    + _each(budget or flops, lengths, "one stream", "two streams"),
    f"2. **Why does it help?** {_why(predictions)}",
    f"3. **Does `{MASKED}` overtake one stream after equal characters?** "
    + _each(
      tables.find(made["masked"], equal="steps"), lengths, MASKED, "one stream"
    ),
    _counts(made, predictions),
    "## Setup",
    _table(("what", "value"), _setup(config, cells, missing, runs)),
    "## Figures",
    *(_figure(name, name in drawn, notes.get(name, [])) for name in _FIGURES),
    "## Predictions and outcomes",
    *_predictions(predictions),
    "## Limits",
    "\n".join(
      _filled(f"- {line}")
      for line in _limits(config, missing, failures, runs, made)
    ),
    "## Appendix",
    f"Tables: {', '.join(links)}.",
  ]
  return "\n\n".join(map(_filled, parts)) + "\n"


def _filled(part):
  """Return a paragraph or an item in lines of 92 characters."""
  if part.startswith(("|", "#", "!")) or "\n" in part:
    return part
  indent = {"-": "  ", "1": "   ", "2": "   ", "3": "   "}.get(part[0], "")
  wrapper = textwrap.TextWrapper(92, subsequent_indent=indent)
  wrapper.break_long_words = wrapper.break_on_hyphens = False
  return wrapper.fill(part)


def _table(head, rows):
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _figure(name, is_drawn, notes):
  title, _, words = _FIGURES[name].partition(". ")
  if is_drawn:
    caption = " ".join([f"**{title}.** {words}", *notes])
    return f"![{title}]({name}.png)\n\n{_filled(caption)}"
  return f"**{title}** is not drawn, since its cells do not exist yet."


def _bits(row):
  """Return a difference with its error and its number of seeds, in words."""
  error = f" ± {row['half_of_95_percent']:.3f}" * (row["seeds"] > 1)
  return (
    f"{abs(row['difference_bits']):.3f}{error} bits per character "
    f"{'more' if row['difference_bits'] > 0 else 'fewer'}"
  )


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
  for T in lengths:
    own = tables.find(rows, T=T)
    row = max(own, key=lambda row: row["characters"], default=None)
    lines.append(
      f"At T = {T:,} {arm} needs {_bits(row)} than {other} "
      f"({tables.words(row['characters'])} characters, {_seeds(row)}): "
      f"{verdicts.get(row['answer'], row['answer'])}."
      if row
      else f"At T = {T:,} there is no pair of runs yet."
    )
  return " ".join(lines)


def _notes(made):
  """Return sentences that captions end with, by the name of the figure."""
  changes = [
    f"From {row['from_steps']:,} to {row['to_steps']:,} steps of two streams "
    f"the difference at equal FLOPs and T = {row['T']:,} changes by "
    f"{row['difference_bits']:+.3f} ± {row['half_of_95_percent']:.3f} bits "
    f"({_seeds(row)})."
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
  rows = [row for row in rows if row["T"] == rows[0]["T"]]
  if not any("answer" in row for row in rows):
    return f"None of the {len(rows)} predictions has runs yet."
  lines = []
  for name, words in comparisons.EXPLANATIONS.items():
    holds = [row["holds"] for row in tables.find(rows, explanation=name)]
    counts = ", ".join(f"{x}: {n}" for x, n in Counter(holds).items())
    lines.append(f"If {words}, {len(holds)} outcomes follow ({counts}).")
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
  return (
    f"Comparisons: {sum(counts.values())} ({listed}). None is corrected for "
    f"their number. Differences within {comparisons.MARGIN} bits count as "
    "equal. What no config declared before its runs is exploratory."
  )


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
  tuning = " and ".join(map(str, config.study.tune_seeds))
  yield "seeds", f"{seeds}; learning rates were tuned on {tuning}"
  windows = {(run.result["estimate"]["windows"], run.cell.T) for run in runs}
  listed = ", ".join(f"{n:,} windows of {T:,}" for n, T in sorted(windows))
  yield "bits", f"last parameters, any order, {config.eval.split}: {listed}"


def _predictions(rows):
  """Yield the table of predictions, or a line that says that none was run."""
  yield (
    f"The {len(rows)} predictions were declared in `configs/study_why.py`. "
    "They are judged at equal steps, in bits per character."
  )
  columns = ("explanation", "contrast", "T", "predicts")
  if any("answer" in row for row in rows):
    yield _table(
      (*columns, "difference", "outcome", "holds"),
      (
        (
          *(row[name] for name in columns),
          f"{row['difference_bits']:+.3f} ± {row['half_of_95_percent']:.3f}"
          if "answer" in row
          else "",
          row.get("answer", ""),
          row["holds"],
        )
        for row in rows
      ),
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
      f"{steps:,} steps). Arms and budgets with one seed: {single} of "
      f"{len(bits)}."
    )
  columns = ("arm", "T", "steps", "seed")
  inside = {tuple(row[x] for x in columns) for row in made["locality"]}
  yield f"Networks whose attention was measured: {len(inside)}."
  yield (
    "There is one text, and its tokens are characters. The "
    f"{config.eval.split} split chose the learning rates and is reported."
  )
