"""The pictures of knock-outs, probes and locality by layer, see dissection."""

from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.runs import canvas
from aoarm_jax.study import plots, tables

_RUN = ("mechanism", "changes", "T", "seed", "steps", "rate")
_AXES = {
  "recency": "slots before the own slot",
  "position": "positions after the own content",
  "target": "positions after the target",
}
_STREAMS = {"content": "--", "query": "-", "only": "-", "all": ":"}


def draw(made: dict[str, list[tables.Row]], folder: epath.Path) -> None:
  """Draw the pictures that there is data for.

  Args:
    made: the rows of the tables by their names, see dissection.
    folder: of the pictures.
  """
  whole = tables.find(made["knockouts"], layer="all")
  if whole:
    _whole(whole, folder)
  alone = [row for row in made["knockouts"] if row["layer"] != "all"]
  if alone:
    _by_layer(alone, folder)
  if made["probes"]:
    _probes(made["probes"], folder)
  if made["characters"]:
    _characters(made["characters"], folder)
  if made["locality"]:
    _locality(made["locality"], folder)


def _lines(rows):
  """Return {(run, stream): rows}, in the order of the table."""
  lines: dict[tuple, list[tables.Row]] = {}
  for row in rows:
    key = tuple(row[name] for name in _RUN), row.get("stream", "")
    lines.setdefault(key, []).append(row)
  return lines


def _words(run, stream):
  mechanism, changes, T, *_ = run
  rows = f", {stream} rows" * (stream not in ("only", ""))
  return f"{mechanism}{rows}, T = {T:,}" + f", {changes}" * bool(changes)


def _style(run, stream):
  """Return the colour of a mechanism and the line of a stream."""
  return {"color": plots.colour(run[0]), "ls": _STREAMS.get(stream, "-")}


def _whole(rows, folder):
  """The rise in bits of knock-outs in all layers, a point for every seed."""
  names = list(dict.fromkeys(row["knockout"] for row in rows))
  lines = _lines(rows)
  inches = (8.5, 1.8 + 0.42 * len(names))
  with plots.figure(folder, "knockouts", 1, inches=inches) as (all_, grid):
    axes = grid[0, 0]
    for n, ((run, stream), own) in enumerate(lines.items()):
      shift = 0.5 * ((n + 0.5) / len(lines) - 0.5)
      style = _style(run, stream)
      axes.errorbar(
        [row["late_bits"] for row in own],
        [names.index(row["knockout"]) + shift for row in own],
        xerr=_errors(own, "late_bits"),
        fmt={"content": "s", "query": "o", "all": "D"}.get(stream, "^"),
        ms=5,
        color=style["color"],
        mfc="white" if stream == "content" else style["color"],
        label=_words(run, stream),
      )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color=canvas.GREY, lw=0.8)
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    lowest = min(row["late_bits"] for row in rows)
    axes.set_xlim(left=min(2 * lowest, -0.002))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(
      "rise in bits per character in the second half of the order, all layers\n"
      "(logarithmic beyond 0.01)"
    )
    plots.legend(all_, grid)


def _by_layer(rows, folder):
  """The rise in bits of knock-outs in one layer, a panel a knock-out."""
  names = list(dict.fromkeys(row["knockout"] for row in rows))
  with plots.figure(
    folder, "knockouts_by_layer", *plots.shape(len(names)), sharex=True
  ) as (all_, grid):
    for axes, name in zip(grid.flat, names):
      axes.axhline(0, color=canvas.GREY, lw=0.8)
      for (run, stream), own in _lines(
        tables.find(rows, knockout=name)
      ).items():
        axes.errorbar(
          [int(row["layer"]) for row in own],
          [row["late_bits"] for row in own],
          yerr=_errors(own, "late_bits"),
          marker=".",
          label=_words(run, stream),
          **_style(run, stream),
        )
      axes.set_title(name)
      _layers(axes, "layer that is knocked out")
    for axes in grid[:, 0]:
      axes.set_ylabel("rise in bits per character, second half")
    plots.legend(all_, grid)


def _errors(rows, name):
  """Return standard errors; nan where there are none."""
  values = [row[f"{name}_error"] for row in rows]
  return [np.nan if value == "" else value for value in values]


def _probes(rows, folder):
  """Accuracy above the own token's: a row an arm, a panel a kind of probe.

  The accuracies of an arm are means over its seeds.
  """
  kinds = list(dict.fromkeys(row["by"] for row in rows))
  # The own token itself is read in full; the scale is of the others.
  rows = [row for row in rows if (row["by"], row["offset"]) != ("recency", 0)]
  arms: dict[tuple, list[tables.Row]] = {}
  for row in rows:
    arm = (row["mechanism"], row["changes"], row["T"], row["steps"])
    arms.setdefault(arm, []).append(row)
  with plots.figure(folder, "probes", len(kinds), len(arms), sharey=True) as (
    _,
    grid,
  ):
    for line, (arm, own) in zip(grid, arms.items()):
      for axes, by in zip(line, kinds):
        _of_arm(axes, tables.find(own, by=by), by)
      line[0].set_title(f"{_words(arm, '')}, {arm[-1]:,} steps")
      line[0].set_ylabel("accuracy above the own token's")
      line[0].legend(fontsize=8, ncols=2)


def _of_arm(axes, rows, by):
  """Draw the probes of one kind and arm, a line a layer."""
  if not rows:
    return
  offsets = sorted({row["offset"] for row in rows})
  last = max(row["layer"] for row in rows)
  for layer in range(1, last + 1):
    means = [
      np.mean(
        [
          row["above_own_token"]
          for row in tables.find(rows, layer=layer, offset=offset)
        ]
      )
      for offset in offsets
    ]
    shade = canvas.shade(layer / last)
    axes.plot(means, marker=".", color=shade, label=f"layer {layer}")
  axes.axhline(0, color=canvas.GREY, lw=0.8)
  axes.set_xticks(range(len(offsets)), offsets, fontsize=7)
  axes.set_xlabel(_AXES[by])


def _characters(rows, folder):
  """How many characters are read, by layer: a panel a group of probes."""
  groups = list(dict.fromkeys((row["by"], row["offsets"]) for row in rows))
  with plots.figure(folder, "characters", len(groups), sharey=True) as (
    all_,
    grid,
  ):
    for axes, (by, offsets) in zip(grid[0], groups):
      chosen = tables.find(rows, by=by, offsets=offsets)
      for (run, stream), own in _lines(chosen).items():
        axes.errorbar(
          [row["layer"] for row in own],
          [row["characters"] for row in own],
          yerr=_errors(own, "characters"),
          marker=".",
          label=_words(run, stream),
          **_style(run, stream),
        )
      axes.set_title(f"{_AXES[by]}: {offsets}", fontsize=10)
      _layers(axes, "state after layer")
    grid[0, 0].set_ylabel("characters that are read")
    plots.legend(all_, grid)


def _layers(axes, words):
  axes.set_xlabel(words)
  axes.locator_params(axis="x", integer=True)


def _locality(rows, folder):
  """Indices and masses by layer: a dot a head, a line the mean over heads."""
  panels = {
    "semantic": "semantic locality",
    "structural": "structural locality",
    "structural_with_own": "structural locality with the own slot",
    "mass_own": "mass on the own slot",
    "mass_sentinels": "mass on sentinels",
  }
  with plots.figure(folder, "locality_by_layer", *plots.shape(len(panels))) as (
    all_,
    grid,
  ):
    for axes, (name, title) in zip(grid.flat, panels.items()):
      for (run, stream), own in _lines(rows).items():
        heads: dict[int, list[float]] = {}
        for row in own:
          if row[name] != "":
            heads.setdefault(row["layer"], []).append(row[name])
        style: dict[str, Any] = _style(run, stream)
        axes.plot(
          list(heads),
          [np.mean(values) for values in heads.values()],
          label=_words(run, stream),
          **style,
        )
        axes.plot(
          [layer for layer, values in heads.items() for _ in values],
          [value for values in heads.values() for value in values],
          "s" if stream == "content" else "o",
          ms=3,
          alpha=0.5,
          color=style["color"],
          mfc="none" if stream == "content" else style["color"],
        )
      axes.axhline(0, color=canvas.GREY, lw=0.8)
      axes.set_title(title)
      _layers(axes, "layer")
    plots.legend(all_, grid)
