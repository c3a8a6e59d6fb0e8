"""The report of a study: tables (csv), pictures (PNG, SVG) and a short text.

It can be written at any time; what was not run is shown empty.
"""

import os
import re
import shlex
import textwrap
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import findings, plots, tables

# Left out of the command that is shown: where things lie, and how much of the
# study one process does.
_LOCAL = re.compile(
  r"--?(workdir|config\.data\.path|config\.study\.(report|part|cells|"
  r"share_\w+|limit_seconds))="
)


def command(argv: list[str], text: str) -> str:
  """The command that makes everything, from that of this process.

  Args:
    argv: of this process.
    text: config.data.path, of which the name is shown; "" is built in.
  """
  kept = [part for part in argv[1:] if not _LOCAL.match(part)]
  kept = [re.sub(r"=.*/(?=configs/)", "=", part) for part in kept]
  parts = ["python -m aoarm_jax.main", shlex.join(kept)]
  if text:
    name = epath.Path(text).name or os.path.basename(os.getcwd())
    parts.append(f"--config.data.path={shlex.quote(name)}")
  return " ".join(parts)


def write(
  config: config_lib.Config,
  cells: list[cells_lib.Cell],
  results: Any,
  folder: epath.Path,
  argv: list[str],
) -> None:
  """Writes README.md, the tables and the pictures that there is data for.

  Args:
    config: of the study.
    cells: all of the sweep.
    results: sweep.Results.
    folder: made if absent.
    argv: of this process.
  """
  trained = tables.trained(cells, results)
  curves = tables.curves(trained, results, config)
  profiles = tables.profiles_of(trained, results)
  every = cells_lib.with_trials(cells, config)
  made = {
    "cells": tables.cells_table(every, results),
    "runs": tables.runs_table(results),
    "rates": tables.rates_table(cells, results, config),
    "bits": tables.bits_table(cells, results),
    "differences": tables.differences_table(cells, results, config),
    "areas": tables.areas_table(trained, curves),
    "curves": tables.curves_table(curves),
    "locality": tables.locality_table(profiles),
    "specialisation": tables.specialisation_table(profiles),
  }
  for name, rows in made.items():
    run_dir.write_atomically(folder / f"{name}.csv", tables.to_csv(rows))
  differences = made["differences"]
  pictures = {
    "coherence_diversity_from_4": lambda: plots.coherence_diversity(
      curves, folder, "from_4"
    ),
    "coherence_diversity_over_1": lambda: plots.coherence_diversity(
      curves, folder, "over_1"
    ),
    "differences": lambda: plots.differences(differences, folder),
    "blocks": lambda: plots.blocks(differences, folder),
    "locality": lambda: plots.locality_plane(profiles, folder),
  }
  drawn = [name for name, draw in pictures.items() if draw()]
  drawn += plots.profiles_pictures(profiles, folder)
  _remove_stale(folder, drawn)
  answers = findings.all_of(
    differences,
    made["areas"],
    made["specialisation"],
    config.study.reference,
    cells_lib.size_of(config.model),
  )
  shown = command(argv, config.data.path)
  text = _text(config, cells, results, made, drawn, answers, shown)
  run_dir.write_atomically(folder / "README.md", text)
  done = [row["done"] for row in made["cells"]]
  logging.info("%d of %d cells are in the report", sum(done), len(done))
  if untrained := len(every) - len(tables.trained(every, results)):
    logging.warning(
      "%d of them learned no more than how frequent letters are: they are in "
      "no picture and no comparison",
      untrained,
    )


def _remove_stale(folder, drawn):
  """Pictures of an earlier report that this one has not."""
  for name in _CAPTIONS:
    several = "_T*" * (name == "profiles")
    for suffix in ("png", "svg"):
      for path in folder.glob(f"{name}{several}.{suffix}"):
        if path.stem not in drawn:
          path.unlink(missing_ok=True)  # Another process may be first.


def _text(config, cells, results, made, drawn, answers, shown):
  first = next((r for r in map(results.result, cells) if r), None)
  one_way = _named(lambda kind: kind.left_to_right)
  masked = _named(lambda kind: kind.masked)
  parts = [
    "# The structural-semantic tradeoff\n\nMade by the command below from the "
    "cells that were run; not to be edited by hand.\n\n"
    f"```\n{shown}\n```\n",
    _hypotheses(),
    _method(config, cells, first),
    _budget(config, first),
    _state(made["cells"], results.failures(cells)),
    _answers(answers),
    f"## Bits per character\n\nNever compare {one_way} (left to right, the "
    "only order there) with the others. `elbo` estimates the mean of "
    "`any_order`. *untrained*: runs that ended within 0.1 bits of the letters' "
    "own entropy; they are in no other table.\n\n"
    + _markdown(made["bits"], _BITS),
    _rates(config, made["rates"]),
    "## Paired differences\n\nArm - reference on the same windows, orders and "
    f"seeds ({masked}: the same windows and seeds), each at its own rate; "
    "positive: the arm needs more bits. [differences.csv](differences.csv)\n\n"
    + _markdown(made["differences"], _DIFFERENCES),
    "## Dominated area of coherence-diversity\n\nOf each seed by itself, then "
    "mean and standard error (of one seed: over its samples). Familiarity and "
    "repetition at temperature 1, which need no spelling. "
    "[areas.csv](areas.csv); all measures at all temperatures: "
    "[curves.csv](curves.csv)\n\n" + _markdown(made["areas"], _AREAS),
    "## Locality of attention\n\n1: all on the nearest key, 0: as uniform. "
    "Mean over heads and all layers but the last, which hides how layers "
    "differ: see the profiles, and every head of every seed in "
    "[locality.csv](locality.csv). "
    "A content row's distance is from its own position, all others' from their "
    "target. *structural with own*: the own slot, which holds the token "
    "generated last, is the most recent key. *mass*: what goes to the row's "
    "own slot and to the sentinels, which is in no other index.\n\n"
    + _markdown(made["specialisation"], _LOCALITY),
    _figures(drawn, shown),
    _open(made["cells"], made["bits"], answers),
  ]
  return "\n".join(part.rstrip() + "\n" for part in parts if part)


def _named(holds):
  """Returns the names of the mechanisms whose pieces are so, as code."""
  return ", ".join(
    f"`{name}`" for name, kind in mechanisms.MECHANISMS.items() if holds(kind)
  )


def _hypotheses():
  single, masked = findings.SINGLE, findings.MASKED
  return _paragraphs(
    f"""## Hypotheses

    arXiv 2602.16092 holds that in any-order generation one hidden state must
    attend to what stands near its target (semantic) and to what was generated
    last (structural), that the two compete in one stream, and that two streams
    can specialise. If so: a single stream (`{single}`) falls behind
    `{masked}` as length grows, and behind `{findings.TWO_STREAMS}`, the arm
    that the paper lacks, at equal compute; the deficit grows with length and
    with order divergence; query rows look semantically, content rows
    structurally, and the single stream sits between."""
  )


def _method(config, cells, first):
  study, split, seen = config.study, config.eval.split, ""
  if first:
    hashes = ", ".join(f"{k} {v[:12]}" for k, v in first["text"].items())
    seen = f", sha256 {hashes}"
  size = cells_lib.size_of(config.model)
  return _paragraphs(
    f"""## Method

    **Text**: training and `{split}` split of what `--config.data.path` names
    (by default a built-in text){seen}; {study.tokens_per_step:,} characters a
    step at any length.

    **Budgets**, against `{study.reference}`: as many steps; as many FLOPs of
    training, by steps; as many parameters, by the width of the MLP.

    **Learning rate**: {_rate_rule(config, cells)}

    **Generation**: exact sequential sampling in orders of the cell's family,
    {study.characters:,} characters (at least 8 texts) at each of
    {study.temperatures} temperatures from {study.temperature_low:g} to
    {study.temperature_high:g}. **Coherence**: of the generated words of four
    letters or more (second rule: of more than one), the share that stands in
    the vocabulary of the `{study.vocabulary_split}` split. **Diversity**:
    unique words / words of a text. Both are held against windows of real text
    of another split. **Familiarity** and **repetition**: share of
    {study.ngram}-grams of characters that occur in the
    `{study.vocabulary_split}` split, and that occurred before in the same text.

    **Attention**: exact sums over {study.profile_sequences} windows of
    `{split}` (fewer where it has fewer), divided by what a row's mass on the
    other slots would give if it were spread evenly; sentinels and a row's own
    slot (the token generated last) are left out, and their mass is in
    [locality.csv](locality.csv). There is none
    of {_named(lambda kind: kind.masked)}: slots there have no order of
    generation. The definitions are in
    `aoarm_jax/study`.

    **Answers** are about mechanisms at {size} (width x layers x heads),
    whatever the seed. An effect counts where its 95% interval leaves 0 out, by
    Student's law with the degrees of freedom of the seeds: at 3 seeds 4.3
    standard errors, at 2 seeds 12.7. The error of windows, which is part of it,
    is that of the means of 24 stretches of the text, since neighbours are
    alike; books are longer still. Areas and localities have to differ by
    {findings.LEAST_AREA:g} to count; where the interval is within that, the
    answer is `{findings.LEVEL}`. Bits have no such margin. ± is one standard
    error. One seed cannot tell, however many windows it was
    measured on. Nothing is corrected for the number of questions."""
  )


def _rate_rule(config, cells):
  # By mechanism and, where others are tuned, length.
  given: dict[str, dict[str, None]] = {}
  tuned = any(cell.rate == cells_lib.TUNED for cell in cells)
  for cell in cells:
    if cell.rate != cells_lib.TUNED:
      name = f"`{cell.mechanism}`" + f" at T = {cell.T}" * tuned
      given.setdefault(name, {})[cell.rate] = None
  listed = "; ".join(
    f"{name} {' or '.join(rates)}" for name, rates in given.items()
  )
  if not tuned:
    return f"as the sweep gives it: {listed}."
  listed = listed and f" Given by the sweep: {listed}."
  study = config.study
  rates = ", ".join(f"{rate:g}" for rate in study.rates)
  *most, last = map(str, study.tune_lengths or ["of all cells"])
  lengths = f"{', '.join(most)} and {last}" if most else last
  return (
    f"`tuned` is the best of {rates} by bits per character on "
    f"`{config.eval.split}` of whole runs at equal steps, "
    f"{cells_lib.size_of(config.model)}, seed 0 and uniform orders, for every "
    "mechanism (of an ablation: what it changes) at the nearest of the lengths "
    f"{lengths}; of rates within {cells_lib.TIED} bits of the best the one "
    f"next to {config.optimizer.peak_learning_rate:g}, and that one where no "
    "run left the entropy of the letters. The run that was chosen is seed 0 of "
    f"the arm of that length and size.{listed}"
  )


def _budget(config, first):
  if not first:
    return ""
  c = first["config"]
  tokens, share = config.study.tokens_per_step * config.train.steps, ""
  text = f"{tokens / 1e6:.0f}M" if tokens >= 1e6 else f"{tokens:,}"
  if "text_characters" in first:
    share = f", {tokens / first['text_characters']['train']:.2f} of the text"
  optimizer = c["optimizer"]
  return _paragraphs(
    f"""**Budget**: {config.train.steps:,} steps of the reference,
    {text} characters{share}; AdamW ({optimizer["b1"]:g},
    {optimizer["b2"]:g}), decay {optimizer["weight_decay"]:g},
    {config.optimizer.warmup_steps} steps of warmup,
    {optimizer["schedule"]}. That is little: at more of it answers may change,
    first for the mechanisms that begin slowly. With adaLN
    ({_named(lambda kind: kind.condition)}) a run begins with `condition_scale`
    {config.model.condition_scale or 0.02:g} (published: 0.02, with which it
    learns nothing for longer). Masked mechanisms
    ({_named(lambda kind: kind.masked)}) draw their times from
    {config.train.least_time:g} on, in training and in the bound."""
  )


def _paragraphs(text):
  """Indented paragraphs, filled anew."""
  parts = textwrap.dedent("    " + text).split("\n\n")
  return "\n\n".join(textwrap.fill(" ".join(p.split()), 80) for p in parts)


def _state(rows, failed):
  done = [row for row in rows if row["done"]]
  # Cells that are equal, as of the reference for all budgets, were run once.
  runs = {row["folder"]: row["seconds"] for row in done}
  seconds = sum(runs.values())
  devices = sorted({row["device"] for row in done})
  where = f", on {', '.join(devices)}" if devices else ""
  text = (
    f"## What was run\n\n{len(done)} of {len(rows)} cells, runs: {len(runs)}, "
    f"{seconds:,.0f} s in all{where}: [cells.csv](cells.csv). All runs that "
    "there are, also those of other sweeps: [runs.csv](runs.csv)."
  )
  if failed:
    text += f"\n\n{len(failed)} failed:\n\n"
    text += "\n".join(f"- {line}" for line in failed)
  return text


def _answers(answers):
  lines = ["## Answers\n", "| question | answer | numbers |", "|---|---|---|"]
  lines += [f"| {a.question} | **{a.answer}** | {a.numbers} |" for a in answers]
  against = [f"- {a.question}" for a in answers if a.contradicts]
  lines.append(
    "\nThe paper, or its hypothesis, expects yes in every row. "
    "`yes` and `no`: beyond what chance explains at so few seeds, at this "
    "budget; see Method."
  )
  lines.append("\nAgainst the paper or the hypotheses:\n")
  lines += against or ["- nothing so far"]
  return "\n".join(lines)


_ARM = {"mechanism": "", "T": "", "orders": "", "budget": "", "size": ""}
_BITS = _ARM | {
  "estimator": "",
  "seeds": "",
  "steps_run": "",
  "rate": "",
  "rate_at_edge": "",
  "bits_per_char": ".4f",
  "error_over_seeds": ".4f",
  "error_over_windows": ".4f",
  "untrained": "",
}
_DIFFERENCES = _ARM | {
  "reference": "",
  "seeds": "",
  "difference_bits": "+.4f",
  "error": ".4f",
  "error_of": "",
}
_AREAS = _ARM | {
  "seeds": "",
  "area_from_4": ".3f",
  "area_from_4_error": ".3f",
  "area_over_1": ".3f",
  "area_over_1_error": ".3f",
  "familiarity": ".3f",
  "repetition": ".3f",
}
_LOCALITY = _ARM | {
  "index": "",
  "stream": "",
  "seeds": "",
  "locality": ".3f",
  "error": ".3f",
  "mass_own": ".3f",
  "mass_sentinels": ".3f",
}


def _markdown(rows, columns):
  """A table; rows that differ by their budget alone, as equal runs, are one."""
  if not rows:
    return "Nothing measured yet."
  lines = [
    "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
    "|" + "---|" * len(columns),
  ]
  merged: dict[tuple, list] = {}
  for row in rows:
    shown = [
      format(row[name], how) if row[name] != "" else ""
      for name, how in columns.items()
      if name != "budget"
    ]
    merged.setdefault(tuple(shown), []).append(row["budget"])
  at = list(columns).index("budget")
  for values, budgets in merged.items():
    line = [*values[:at], ", ".join(dict.fromkeys(budgets)), *values[at:]]
    lines.append("| " + " | ".join(line) + " |")
  return "\n".join(lines)


_CAPTIONS = {
  "coherence_diversity_from_4": "Coherence over diversity, words of four "
  "letters or more; a dot for each temperature, bars are 95% bands",
  "coherence_diversity_over_1": "The same, words of more than one letter",
  "differences": "Paired differences from the reference over length; bars are "
  "95% intervals, hollow: one seed, and those of windows alone; logarithmic "
  "beyond 0.1",
  "blocks": "Paired differences over the width of blocks, in the same manner",
  "locality": "Locality of every head of every seed (small) and their mean "
  "(large), of all layers but the last",
  "profiles": "Attention by distance, mean over heads, first layer below",
}


def _rates(config, rows):
  if not rows:
    return ""
  columns = _ARM | {f"{rate:g}": ".4f" for rate in config.study.rates}
  return (
    "## Learning rates\n\nBits per character at each, seed 0. "
    "[rates.csv](rates.csv)\n\n" + _markdown(rows, columns | {"chosen": ""})
  )


def _figures(drawn, shown):
  parts = ["## Figures\n"]
  for name in drawn:
    parts.append(
      f"![{name}]({name}.png)\n\n{_CAPTIONS[name.split('_T')[0]]}. "
      f"[SVG]({name}.svg). Made by `{shown}`.\n"
    )
  have = {name.split("_T")[0] for name in drawn}
  missing = [name for name in _CAPTIONS if name not in have]
  if missing:
    parts.append(f"Without data so far: {', '.join(missing)}.")
  return "\n".join(parts)


def _open(cells, bits, answers):
  missing = sum(not row["done"] for row in cells)
  apart = findings.seeds_apart(bits)
  unclear = [
    f"{a.question} {a.answer}"
    for a in answers
    if a.answer in (findings.UNCLEAR, findings.ONE_SEED, findings.OPEN)
  ]
  text = f"## What remains open\n\nCells not done: {missing} of {len(cells)}."
  if unclear:
    text += "\n\n" + "\n".join(f"- {question}" for question in unclear)
  if apart:
    text += (
      "\n\nHere seeds part widely (the standard error of their bits); a rate "
      "that was chosen by one of them may not suit the others:\n\n"
    ) + "\n".join(f"- {arm}" for arm in apart)
  return text + (
    "\n\nOne text, one backbone and characters only; the validation split "
    "chose the learning rates where they are tuned, and is what is reported."
  )
