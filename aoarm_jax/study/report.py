"""The report of a study: one page, its figures and csv tables.

It can be written at any time from the cells that are done. The page says what
is missing, and every number on it is computed from cells.
"""

from collections import Counter
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import disk, text
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import (
  coherence,
  comparisons,
  dissection,
  figures,
  measure,
  records,
)

SINGLE, MASKED = "decoupled_rope", "mdlm"
_BOUNDS = {">": "above ", "<": "below ", "": ""}
_HOLDS = {
  "yes": "hold",
  "no": "fail",
  "undecided": "undecided",
  "one seed": "with one seed",
  "rate": "waiting for runs at a better rate",
  "not run": "not run",
}


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
    results: results.Results.
    every: (folder, content of result.json) of the cells that are shown.
    folder: made if absent.
  """
  reference = config.study.reference
  trials_and_runs = records.read(every)
  trials = records.Trials(trials_and_runs, config.study.tune_seeds)
  settings = records.settings(trials_and_runs, trials)
  runs = records.listed(settings)
  masked = comparisons.differences(settings, SINGLE)
  made = {
    "runs": _of_runs(runs),
    "rates": _of_runs(trials.runs),
    "differences": comparisons.differences(settings, reference),
    "masked": records.find(masked, arm=MASKED),
    "contrasts": comparisons.contrasts(settings, reference),
    "delays": comparisons.delays(settings, reference, config.study.bootstrap),
    "predictions": comparisons.predictions(settings, reference, trials),
    **_of_measures(runs),
  }
  for name, rows in made.items():
    path = folder / f"{name}.csv"
    if rows:
      disk.write_atomically(path, text.csv_table(rows, digits=6))
    else:
      path.unlink(missing_ok=True)
  # The page is about models of the size of the config, in uniform orders.
  main = dict(size=cells_lib.size_of(config.model), orders="uniform")
  for name in made.keys() - {"predictions"}:
    made[name] = records.find(made[name], **main)
  figures.draw(folder, made, (MASKED, SINGLE, reference))
  page = _page(config, cells, results, runs, made, folder)
  disk.write_atomically(folder / "README.md", text.filled(page))
  logging.info("report of %d runs: %s", len(runs), folder)


def _named(run):
  """Return the columns that say which run a row is about."""
  which = {"seed": run.cell.seed, "rate": run.rate, "steps": run.steps}
  return {"study": run.study, "arm": run.arm} | run.setting._asdict() | which


def _of_runs(runs):
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
    if samples := measure.read_arrays(run.folder, "samples.npz", result):
      row |= coherence.areas(samples["counts"])
    row |= {name: result[name] for name in ("tokens_per_second", "device")}
    rows.append(row | {"folder": run.folder.name})
  return rows


def _of_measures(runs):
  """Return the tables of knock-outs, probes, characters and locality.

  Heads are never averaged over runs: head h of one is not head h of another.
  """
  made: dict[str, list[records.Row]] = {name: [] for name in dissection.TABLES}
  for run in runs:
    for name, rows in dissection.rows(run.folder, run.result).items():
      made[name] += [_named(run) | row for row in rows]
  return made


def _page(config, cells, results, runs, made, folder):
  """Return the text of README.md."""
  lengths = sorted({cell.T for cell in cells})
  flops = records.find(made["differences"], arm=SINGLE, equal="flops")
  budget = _each(flops, lengths, "one stream", "two streams")
  masked = records.find(made["masked"], equal="steps")
  masked = _each(masked, lengths, MASKED, "one stream")
  predictions = records.find(made["predictions"], equal="steps")
  names = ("differences", "masked", "contrasts", "delays")
  counts = {name: len(made[name]) for name in names}
  counts["predictions"] = sum("answer" in row for row in predictions)
  listed = ", ".join(f"{name} {n}" for name, n in counts.items())
  missing = [cell for cell in cells if results.result(cell) is None]
  limits = _limits(missing, results.failures(cells), runs, made)
  limits = "\n".join(f"- {line}" for line in limits)
  return f"""# One stream or two: the report

`--mode=study --config.study.part=report` makes this page from cells. ± is half
of a 95% interval, by Student's law over seeds and stretches of text.

## Three sentences

1. **Does a second stream pay at equal FLOPs?** {budget}

2. **Why does it help?** {_why(predictions)}

3. **Does `{MASKED}` overtake one stream after equal characters?** {masked}

Comparisons: {sum(counts.values())} (by table: {listed}). No interval is
corrected for their number. Differences within {comparisons.MARGIN} bits count
as equal. A comparison that no config declared before its runs is exploratory.

Tables: {", ".join(f"[{name}]({name}.csv)" for name in made if made[name])}.

## Setup

{text.markdown_table(("what", "value"), _setup(config, cells, missing, runs))}

## Figures

{_figures(folder, made)}

## Predictions and outcomes

`configs/study_why.py` declared them before the runs. They are judged at equal
steps, in bits per character.

{_predictions(predictions)}

## Limits

{limits}
- There is one text, and its tokens are characters. The learning rates were
chosen on the {config.eval.split} split, and the bits are of the same split.
"""


def _signed(row):
  """Return a difference with its sign and, of several seeds, its error."""
  error = f" ± {row['half_of_95_percent']:.3f}" * (row["seeds"] > 1)
  return f"{row['difference_bits']:+.3f}{error}"


def _largest(rows):
  """Return the row of the largest budget of each length."""
  rows = sorted(rows, key=lambda row: (row["T"], row["characters"]))
  return list({row["T"]: row for row in rows}.values())


def _each(rows, lengths, arm, other):
  """Return a sentence on the largest budget of each length."""
  lines = []
  for row in _largest(rows):
    more = "more" if row["difference_bits"] > 0 else "fewer"
    seeds = text.counted(row["seeds"], "seed")
    lines.append(
      f"At T = {row['T']:,} {arm} needs {_signed(row)[1:]} bits per character "
      f"{more} than {other} ({text.amount(row['characters'])} characters, "
      f"{seeds}): {row['answer']}{' decides nothing' * (row['seeds'] == 1)}."
    )
  absent = [f"{T:,}" for T in lengths if not records.find(rows, T=T)]
  if absent:
    lines.append(f"No pair of runs is done yet at T = {' and '.join(absent)}.")
  return " ".join(lines)


def _why(predictions):
  """Return how many predictions of each explanation hold, at one length."""
  T = min(predictions, key=lambda row: ("answer" not in row, row["T"]))["T"]
  lines = []
  for name, words in comparisons.EXPLANATIONS.items():
    rows = records.find(predictions, explanation=name, T=T)
    holds = Counter(row["holds"] for row in rows)
    counts = [f"{holds[x]} {said}" for x, said in _HOLDS.items() if x in holds]
    should = f"{text.counted(len(rows), 'prediction')} should hold"
    lines.append(f"If {words}, {should} ({', '.join(counts)}).")
  return " ".join(lines)


def _setup(config, cells, missing, runs):
  """Yield the rows of the table of the setup."""
  done = len(cells) - len(missing)
  yield "cells", f"{done} of {len(cells)} of `{config.name}` are done"
  if not runs:
    return
  result = runs[0].result
  sizes = result.get("text_characters", {}).items()
  splits = ", ".join(f"{split} {text.amount(n)}" for split, n in sizes)
  yield "characters of the text", splits
  yield "width x layers x heads", cells_lib.size_of(config.model)
  o = result["config"]["optimizer"]
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
  yield "seeds", f"{seeds}; rates were tuned on seeds {config.study.tune_seeds}"
  windows = {(run.result["estimate"]["windows"], run.cell.T) for run in runs}
  listed = ", ".join(f"{n:,} windows of {T:,}" for n, T in sorted(windows))
  yield "bits", f"last parameters, any order, {config.eval.split}: {listed}"


def _figures(folder, made):
  """Return the figures with their captions, and what they show in numbers."""
  notes = {
    "f1_bits": [
      f"From {row['from_steps']:,} to {row['to_steps']:,} steps of two streams "
      f"the difference at equal FLOPs and T = {row['T']:,} changes by "
      f"{_signed(row)} bits ({text.counted(row['seeds'], 'seed')})."
      for row in records.find(made["contrasts"], arm=SINGLE)
    ],
    "f2_delay": [
      f"At the largest budget and T = {row['T']:,} the delay is "
      f"{_BOUNDS[row['bound']]}{row['delay']:.2f}, and the FLOP ratio is "
      f"{row['cost_ratio']:.2f}."
      for row in _largest(records.find(made["delays"], arm=SINGLE))
    ],
  }
  parts = []
  for name, caption in figures.CAPTIONS.items():
    title, words = caption.split(". ", 1)
    if (folder / f"{name}.png").exists():
      words = " ".join([words, *notes.get(name, ())])
      parts += [f"![{title}]({name}.png)", f"**{title}.** {words}"]
    else:
      words = "is not drawn, since its cells do not exist yet."
      parts.append(f"**{title}** {words}")
  return "\n\n".join(parts)


def _predictions(rows):
  """Return the table of the predictions, with outcomes where there are any."""
  columns = "explanation contrast T predicts difference seeds outcome holds"
  lines = []
  for row in rows:
    shown = {"difference": "-", "seeds": "-", "outcome": "-"} | row
    if "answer" in row:
      shown |= {"difference": _signed(row), "outcome": row["answer"]}
    lines.append([shown[name] for name in columns.split()])
  return text.markdown_table(columns.split(), lines)


def _limits(missing, failures, runs, made):
  """Yield what the numbers of this page cannot say."""
  counts = Counter(f"`{cell.mechanism}` at T = {cell.T:,}" for cell in missing)
  listed = ", ".join(f"{n} of {arm}" for arm, n in counts.items())
  yield f"Cells that are not done: {listed or 'none'}."
  yield from (f"Failed: {line}" for line in failures)
  bits: dict[tuple, list[float]] = {}
  for run in runs:
    key = run.arm, run.cell.T, run.steps, run.study
    bits.setdefault(key, []).append(float(run.bits.mean()))
  if bits:
    spreads = {key: max(values) - min(values) for key, values in bits.items()}
    arm, T, steps, _ = key = max(spreads, key=spreads.__getitem__)
    single = sum(len(values) == 1 for values in bits.values())
    yield (
      f"Seeds differ by up to {spreads[key]:.3f} bits (`{arm}`, T = {T:,}, "
      f"{steps:,} steps). One seed: {single} of {len(bits)} arms and budgets."
    )
  inside = {(r["arm"], r["T"], r["seed"], r["steps"]) for r in made["locality"]}
  yield f"Networks whose attention was measured: {len(inside)}."
