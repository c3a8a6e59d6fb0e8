"""The report of a study: tables (csv), pictures (PNG, SVG) and a short text.

It can be written at any time; what was not run is shown empty.
"""

import re
import shlex
import textwrap

from absl import logging
from etils import epath

from aoarm_jax import config as config_lib
from aoarm_jax import run_dir
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, findings, plots, tables

# Left out of the command that is shown: where things lie, and how much of the
# study one process does.
_LOCAL = re.compile(
  r"--?(workdir|config\.data\.path|config\.study\.(report|part|cells|"
  r"share_\w+|limit_seconds))="
)


def command(argv: list[str]) -> str:
  """The command that makes everything, from that of this process."""
  kept = [part for part in argv[1:] if not _LOCAL.match(part)]
  kept = [re.sub(r"=.*/(?=configs/)", "=", part) for part in kept]
  program = "python -m aoarm_jax.main"
  return " ".join([program, shlex.join(kept), "--config.data.path=<folder>"])


def write(
  config: config_lib.Config,
  cells: list[cells_lib.Cell],
  results,
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
  curves = tables.curves(cells, results, config)
  profiles = tables.profiles_of(cells, results)
  made = {
    "cells": tables.cells_table(cells, results),
    "bits": tables.bits_table(cells, results),
    "differences": tables.differences_table(cells, results, config),
    "areas": tables.areas_table(cells, curves),
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
  answers = findings.all_of(
    differences, made["areas"], made["specialisation"],
    config.study.reference, cells_lib.size_of(config.model),
  )  # fmt: skip
  text = _text(config, cells, results, made, drawn, answers, command(argv))
  run_dir.write_atomically(folder / "README.md", text)
  done = sum(row["done"] for row in made["cells"])
  logging.info("%d of %d cells are in the report", done, len(cells))


def _text(config, cells, results, made, drawn, answers, shown):
  first = next((r for r in map(results.result, cells) if r), None)
  parts = [
    "# The structural-semantic tradeoff\n\nMade by the command below from the "
    "cells that were run; not to be edited by hand.\n\n"
    f"```\n{shown}\n```\n",
    _hypotheses(),
    _method(config, first),
    _state(made["cells"], results.failures(cells)),
    _answers(answers),
    "## Bits per character\n\nNever compare `causal` (left to right, its only "
    "order) with the others. `elbo` estimates the mean of `any_order`.\n\n"
    + _markdown(made["bits"], _BITS),
    "## Paired differences\n\nArm - reference on the same windows, orders and "
    "seeds; positive: the arm needs more bits. [differences.csv]"
    "(differences.csv)\n\n" + _markdown(made["differences"], _DIFFERENCES),
    "## Dominated area of coherence-diversity\n\n95% bootstrap bands over "
    "seeds and samples. [areas.csv](areas.csv); all measures at all "
    "temperatures, those without spelling too: [curves.csv](curves.csv)\n\n"
    + _markdown(made["areas"], _AREAS),
    "## Locality of attention\n\n1: all on the nearest key, 0: as uniform. "
    "Mean over heads and all layers but the last. Every head: [locality.csv]"
    "(locality.csv)\n\n" + _markdown(made["specialisation"], _LOCALITY),
    _figures(drawn, shown),
    _open(made["cells"], answers),
  ]
  return "\n".join(part.rstrip() + "\n" for part in parts)


def _hypotheses():
  return _paragraphs(
    """## Hypotheses

    arXiv 2602.16092 holds that in any-order generation one hidden state must
    attend to what stands near its target (semantic) and to what was generated
    last (structural), that the two compete in one stream, and that two streams
    can specialise. If so: a single stream (`decoupled_rope`) falls behind
    `mdlm` as length grows, and behind `two_stream`, the arm that the paper
    lacks, at equal compute; the deficit grows with length and with order
    divergence; query rows look semantically, content rows structurally, and
    the single stream sits between."""
  )


def _method(config, first):
  study, split, seen = config.study, config.eval.split, ""
  if first:
    hashes = ", ".join(f"{k} {v[:12]}" for k, v in first["text"].items())
    seen = f" (sha256 {hashes})"
  rates = ", ".join(f"{rate:g}" for rate in study.rates)
  return _paragraphs(
    f"""## Method

    **Text**: training and `{split}` split of what `--config.data.path` names
    {seen}; {study.tokens_per_step:,} characters a step at any length.

    **Budgets**, against `{study.reference}`: as many steps; as many FLOPs of
    training, by steps; as many parameters, by the width of the MLP.

    **Learning rate**: as the sweep says; `tuned` is the best of {rates} by bits
    per character on `{split}` after {study.tune_steps} steps at seed 0, for
    every mechanism, size, length and order family.

    **Generation**: exact sequential sampling in orders of the cell's family,
    {study.characters:,} characters (at least 2 texts) at each of
    {study.temperatures} temperatures from {study.temperature_low:g} to
    {study.temperature_high:g}. **Coherence**: of the generated words of four
    letters or more (second rule: of more than one), the share that stands in
    the vocabulary of the `{study.vocabulary_split}` split. **Diversity**:
    unique words / words of a text. Both are held against windows of real text
    of another split. **Familiarity** and **repetition**: share of
    {study.ngram}-grams of characters that occur in the
    `{study.vocabulary_split}` split, and that occurred before in the same text.

    **Attention**: exact sums over {study.profile_sequences} windows of
    `{split}` (fewer where it has fewer), divided by what uniform attention
    would give; sentinels and a row's own slot (the token generated last) are
    left out, and their mass is in [locality.csv](locality.csv). Of `mdlm` there
    is none: its slots have no order of generation. The definitions are in
    `aoarm_jax/study`.

    **Answers** are about mechanisms at {cells_lib.size_of(config.model)} (width
    x layers x heads), whatever the seed. An effect counts where
    it is larger than t standard errors, t the 97.5% quantile of Student's
    distribution of (seeds - 1) degrees of freedom: 12.7 for two seeds, 4.3 for
    three, 2.8 for five. Bands of areas are widened alike before they count as
    apart. One seed cannot tell, however many windows it was measured on.
    Nothing is corrected for the number of questions."""
  )


def _paragraphs(text):
  """Indented paragraphs, filled anew."""
  parts = textwrap.dedent("    " + text).split("\n\n")
  return "\n\n".join(textwrap.fill(" ".join(p.split()), 80) for p in parts)


def _state(rows, failed):
  done = [row for row in rows if row["done"]]
  seconds = sum(row["seconds"] for row in done)
  devices = sorted({row["device"] for row in done})
  text = (
    f"## What was run\n\n{len(done)} of {len(rows)} cells, {seconds:,.0f} s in "
    f"all{', on ' + ', '.join(devices) if devices else ''}: "
    "[cells.csv](cells.csv)."
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
    "`yes` and `no`: an effect beyond what chance explains at so few seeds, "
    "see Method; level is said where bands overlap, which few samples make "
    "likely."
  )
  lines.append("\nAgainst the paper:\n")
  lines += against or ["- nothing so far"]
  return "\n".join(lines)


_ARM = {"mechanism": "", "T": "", "orders": "", "budget": "", "size": ""}
_BITS = _ARM | {
  "estimator": "", "seeds": "", "rate": "", "bits_per_char": ".4f",
  "error_over_seeds": ".4f", "error_over_windows": ".4f",
}  # fmt: skip
_DIFFERENCES = _ARM | {
  "seeds": "", "difference_bits": "+.4f", "error": ".4f", "error_of": "",
}  # fmt: skip
_AREAS = _ARM | {
  f"area_{rule}{suffix}": ".3f"
  for rule in coherence.RULES for suffix in ("", "_low", "_high")
}  # fmt: skip
_LOCALITY = _ARM | {
  "index": "", "stream": "", "seeds": "", "locality": ".3f", "error": ".3f",
}  # fmt: skip


def _markdown(rows, columns):
  if not rows:
    return "Nothing measured yet."
  lines = [
    "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
    "|" + "---|" * len(columns),
  ]
  for row in rows:
    shown = (
      format(row[name], how) if row[name] != "" else ""
      for name, how in columns.items()
    )
    lines.append("| " + " | ".join(shown) + " |")
  return "\n".join(lines)


_CAPTIONS = {
  "coherence_diversity_from_4": "Coherence over diversity, words of four "
  "letters or more; a dot for each temperature, bars are 95% bands",
  "coherence_diversity_over_1": "The same, words of more than one letter",
  "differences": "Paired differences from the reference over length; bars are "
  "two standard errors",
  "blocks": "Paired differences over the width of blocks",
  "locality": "Locality of every head (small) and their mean (large)",
  "profiles": "Attention by distance, mean over heads, first layer below",
}


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


def _open(rows, answers):
  missing = sum(not row["done"] for row in rows)
  unclear = [
    f"{a.question} {a.answer}"
    for a in answers
    if a.answer not in (findings.YES, findings.NO)
  ]
  text = f"## What remains open\n\n{missing} of {len(rows)} cells are not done."
  if unclear:
    text += "\n\n" + "\n".join(f"- {question}" for question in unclear)
  return text + (
    "\n\nOne text, one backbone and characters only; the validation split "
    "chose the learning rates where they are tuned, and is what is reported."
  )
