"""The figures of a report, each as a PNG file, with their captions."""

import itertools
import operator
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.runs import canvas
from aoarm_jax.study import comparisons, records

CAPTIONS = {
  "f1_bits": "F1. Bits per character over training FLOPs. A dot is a seed, and "
  "a line joins the means.",
  "f2_delay": "F2. Steps that one stream needs for the loss of two streams. A "
  "second stream pays above the dashed line, the FLOP ratio of a step. Bars "
  "are 95% intervals over seeds, and an arrow marks a bound.",
  "f3_locality": "F3. Locality of attention by layer: 1 is all on the nearest "
  "slot, 0 is even. The mass on sentinels is taken out. A dot is a head, and a "
  "line is the mean over the heads of one network.",
  "f4_knockouts": "F4 a. Rise in bits where attention is barred from slots in "
  "all layers, in the second half of the order: the own slot, the last ones of "
  "the order, the nearest ones in position, random ones, or (equal_mass) "
  "random ones with as much attention. The scale is logarithmic beyond 0.01. A "
  "dot is a network, and bars are standard errors over windows.",
  "f4_predictions": "F4 b. Differences at equal steps (filled) and at equal "
  "FLOPs (hollow, not judged) with 95% intervals. The grey field is what the "
  "explanation predicts. Green holds, red fails, and grey is open.",
  "f5_masked": "F5. Bits per character of the masked arm and of the two others "
  "over the characters that a run reads.",
}
_BLUE, _RED, _GREEN, *_ = canvas.COLOURS
_STREAMS = {
  "content": ("content rows", _BLUE),
  "query": ("query rows", _RED),
  "only": ("one stream", _GREEN),
  "all": ("both streams", canvas.GREY),
}
_PANELS = {
  "semantic": "semantic locality",
  "structural": "structural locality",
  "structural_with_own": "structural, with the own slot",
  "mass_own": "mass on the own slot",
}


def draw(
  folder: epath.Path,
  made: dict[str, list[records.Row]],
  arms: tuple[str, str, str],
) -> None:
  """Draw the figures that there is data for, and remove the others.

  Args:
    folder: of the files.
    made: the rows of every table by its name.
    arms: the masked mechanism, one stream and the reference.
  """
  masked, single, _ = arms
  runs, locality, knockouts = (
    [row for row in made[name] if row["arm"] in arms]
    for name in ("runs", "locality", "knockouts")
  )
  # The arms of configs/study_why.py have one budget each, and so no curve.
  runs = [row for row in runs if not row["study"].startswith(comparisons.WHY)]
  unmasked = [row for row in runs if row["arm"] != masked]
  beside = [r for r in runs if records.find(runs, arm=masked, T=r["T"])]
  outcomes = [row for row in made["predictions"] if "answer" in row]
  data: dict[str, tuple[Any, ...]] = {
    "f1_bits": (_curves, unmasked, arms, "training_flops", "training FLOPs"),
    "f2_delay": (_delays, records.find(made["delays"], arm=single)),
    "f3_locality": (_locality, locality),
    "f4_knockouts": (_knockouts, records.find(knockouts, layer="all")),
    "f4_predictions": (_outcomes, outcomes),
    "f5_masked": (_curves, beside, arms, "characters", "characters seen"),
  }
  for name, (make, rows, *options) in data.items():
    path = folder / f"{name}.png"
    if rows:
      make(path, rows, *options)
    else:
      path.unlink(missing_ok=True)


def _figure(path, rows=1, columns=1, inches=None, **options):
  """Return canvas.draw of a figure, with one legend below all of its axes."""
  inches = inches or (max(7, 4.7 * columns), 4.4 * rows)
  shared = dict(dpi=110, legend_columns=1 + columns)
  return canvas.draw([path], rows, columns, inches=inches, **shared, **options)


def _series(axes, rows, x, y, label, colour):
  """Draw column y over x: a dot for each row, and a line through the means."""
  places = sorted({row[x] for row in rows})
  at_places = [records.find(rows, **{x: place}) for place in places]
  means = [np.mean([row[y] for row in at_place]) for at_place in at_places]
  axes.plot(places, means, color=colour, label=label)
  dots = [row[x] for row in rows], [row[y] for row in rows]
  axes.plot(*dots, "o", ms=4, alpha=0.6, color=colour)


def _curves(path, rows, arms, cost, label):
  """Draw bits over a cost, in a panel for each length."""
  lengths = sorted({row["T"] for row in rows})
  with _figure(path, 1, len(lengths), sharey=True) as (_, grid):
    for axes, T in zip(grid[0], lengths):
      for arm, colour in zip(arms, (_GREEN, _RED, _BLUE)):
        if of_arm := records.find(rows, T=T, arm=arm):
          bits = "elbo" if arm == arms[0] else "any_order"
          _series(axes, of_arm, cost, bits, arm, colour)
      axes.set(xscale="log", xlabel=label, title=f"T = {T:,}")
    grid[0, 0].set_ylabel("bits per character")


def _delays(path, rows):
  lengths = sorted({row["T"] for row in rows})
  with _figure(path) as (_, grid):
    axes = grid[0, 0]
    for n, (T, colour) in enumerate(zip(lengths, canvas.COLOURS)):
      own = records.find(rows, T=T)
      # Intervals of several lengths would hide each other.
      x = [row["characters"] * 1.04**n for row in own]
      delays = [np.nan if row["bound"] else row["delay"] for row in own]
      ratios = [row["cost_ratio"] for row in own]
      ratio, delay = f"FLOP ratio of a step, T = {T:,}", f"delay, T = {T:,}"
      axes.plot(x, delays, "o-", color=colour, label=delay)
      axes.plot(x, ratios, "--", color=colour, label=ratio)
      for at, row in zip(x, own):
        if row["bound"]:
          share, mark = {">": (1.3, "^"), "<": (0.77, "v")}[row["bound"]]
          y = row["delay"], share * row["delay"]
          axes.plot([at, at], y, color=colour, marker=mark, markevery=[1])
        elif row["seeds"] > 1:
          axes.plot([at, at], [row["low"], min(row["high"], 1e3)], color=colour)
    axes.set(xscale="log", xlabel="characters that two streams read")
    axes.set(ylabel="steps of one stream / steps of two")
    axes.set_yscale("log", base=2)
    limits = axes.get_ylim()
    axes.set_yticks((0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 16))
    axes.set_ylim(limits)
    axes.yaxis.set_major_formatter("{x:g}")


def _locality(path, rows):
  """Draw the indices over layers: a row for each length, a line per network."""
  lengths = sorted({row["T"] for row in rows})
  network = operator.itemgetter("stream", "arm", "study", "steps", "seed")
  inches = (15, 4.6 * len(lengths))
  with _figure(path, len(lengths), len(_PANELS), inches=inches) as (_, grid):
    for (line, column), axes in np.ndenumerate(grid):
      index, title = list(_PANELS.items())[column]
      own = [r for r in records.find(rows, T=lengths[line]) if r[index] != ""]
      for (stream, *_), heads in itertools.groupby(own, network):
        _series(axes, list(heads), "layer", index, *_STREAMS[stream])
      axes.axhline(0, color=canvas.GREY, lw=0.8)
      axes.set_title(f"{title}, T = {lengths[line]:,}", fontsize=11)
      axes.set_xlabel("layer")
      axes.locator_params(axis="x", integer=True)


def _knockouts(path, rows):
  """Draw the rise in bits of every knock-out, in a panel for each length."""
  names = list(dict.fromkeys(row["knockout"] for row in rows))
  streams = [name for name in _STREAMS if records.find(rows, stream=name)]
  lengths = sorted({row["T"] for row in rows})
  left = min(2 * min(row["late_bits"] for row in rows), -0.002)
  inches = (2.5 + 6 * len(lengths), 2 + 0.42 * len(names))
  with _figure(path, 1, len(lengths), inches=inches) as (_, grid):
    for axes, T in zip(grid[0], lengths):
      _rises(axes, records.find(rows, T=T), names, streams)
      axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
      axes.set_xlim(left=left)
      axes.xaxis.set_major_formatter("{x:g}")
      axes.set(xlabel="rise in bits per character", title=f"T = {T:,}")
      axes.axvline(0, color=canvas.GREY, lw=0.8)
      canvas.name_lines(axes, names, fontsize=9)


def _rises(axes, rows, names, streams):
  """Draw the rises of one length: a line for each name, a colour a stream."""
  for n, stream in enumerate(streams):
    own, (name, colour) = records.find(rows, stream=stream), _STREAMS[stream]
    shift = 0.5 * ((n + 0.5) / len(streams) - 0.5)
    y = [names.index(row["knockout"]) + shift for row in own]
    errors = [row["late_bits_error"] or np.nan for row in own]
    style = dict(fmt="o", ms=5, color=colour, label=name)
    axes.errorbar([row["late_bits"] for row in own], y, xerr=errors, **style)


def _outcomes(path, rows):
  margin = comparisons.MARGIN
  halves = np.nan_to_num([row["half_of_95_percent"] for row in rows])
  ends = [abs(row["difference_bits"]) for row in rows] + np.minimum(halves, 0.1)
  far = 1.1 * max(3 * margin, *ends)
  fields = {"worse": (margin, far), "better": (-far, -margin)}
  fields["equal"] = (-margin, margin)
  names = [f"{r['explanation']}: {r['contrast']}, T = {r['T']:,}" for r in rows]
  lines = list(dict.fromkeys(names))
  with _figure(path, inches=(11, 2 + 0.4 * len(lines))) as (_, grid):
    axes = grid[0, 0]
    for row, half, name in zip(rows, halves, names):
      y = float(lines.index(name))
      for low, high in (fields[side] for side in row["predicts"].split(" or ")):
        axes.barh(y, high - low, left=low, height=0.8, color="#e4e4e4")
      colour = {"yes": _GREEN, "no": _RED}.get(row["holds"], canvas.GREY)
      style = dict(fmt="o", color=colour, ms=6, mfc=colour)
      if row["equal"] == "flops":
        y, style = y + 0.25, style | dict(ms=4, mfc="white")
      axes.errorbar(row["difference_bits"], y, xerr=half, **style)
    axes.set_xlim(-far, far)
    axes.set_xlabel("difference in bits per character")
    axes.axvline(0, color=canvas.GREY, lw=0.8)
    canvas.name_lines(axes, lines, fontsize=9)
