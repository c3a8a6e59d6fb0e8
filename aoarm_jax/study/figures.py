"""The figures of a report, each as a PNG file, with their captions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.runs import canvas
from aoarm_jax.study import comparisons, records, tables

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
  "all layers, in the second half of the order. A dot is a network, and bars "
  "are standard errors over windows.",
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
  runs: list[records.Run],
  made: dict[str, list[tables.Row]],
  arms: tuple[str, str, str],
) -> list[str]:
  """Draw the figures that there is data for, and remove the others.

  Args:
    folder: of the files.
    runs: the runs of curves over budgets.
    made: the rows of every table by its name.
    arms: the masked mechanism, one stream and the reference.

  Returns:
    The names of the figures that were drawn.
  """
  runs = [run for run in runs if run.arm in arms]
  unmasked = [run for run in runs if run.arm != arms[0]]
  lengths = {run.cell.T for run in runs if run.arm == arms[0]}
  beside = [run for run in runs if run.cell.T in lengths]
  made = {
    name: [row for row in rows if row.get("arm", arms[1]) in arms]
    for name, rows in made.items()
  }
  data: dict[str, tuple[Any, ...]] = {
    "f1_bits": (_curves, unmasked, arms, "flops", "training FLOPs"),
    "f2_delay": (_delays, tables.find(made["delays"], arm=arms[1])),
    "f3_locality": (_locality, made["locality"]),
    "f4_knockouts": (_knockouts, tables.find(made["knockouts"], layer="all")),
    "f4_predictions": (
      _outcomes,
      [row for row in made["predictions"] if "answer" in row],
    ),
    "f5_masked": (_curves, beside, arms, "characters", "characters seen"),
  }
  for name, (make, of_figure, *options) in data.items():
    path = folder / f"{name}.png"
    if of_figure:
      make(path, of_figure, *options)
    else:
      path.unlink(missing_ok=True)
  return [name for name, (_, of_figure, *_) in data.items() if of_figure]


@contextlib.contextmanager
def _figure(
  path: epath.Path, columns: int, rows: int = 1, **options: Any
) -> Iterator[np.ndarray]:
  """Yields the axes [rows, columns], and draws one legend below all of them."""
  inches = options.pop("inches", (max(7, 4.7 * columns), 4.4 * rows))
  made = canvas.draw([path], rows, columns, inches=inches, dpi=110, **options)
  with made as (picture, grid):
    yield grid
    lines: dict[str, Any] = {}
    for axes in grid.flat:
      handles, labels = axes.get_legend_handles_labels()
      lines |= dict(zip(labels, handles))
    where = dict(loc="outside lower center", ncols=min(1 + columns, len(lines)))
    if lines:
      picture.legend(lines.values(), lines.keys(), **where)


def _curves(path, runs, arms, name, label):
  """Bits over a cost: a panel a length, a dot a seed, a line their means."""
  lengths = sorted({run.cell.T for run in runs})
  with _figure(path, len(lengths), sharey=True) as grid:
    for axes, T in zip(grid[0], lengths):
      points: dict[str, dict[float, list[float]]] = {}
      for run in sorted(runs, key=lambda run: run.steps):
        if run.cell.T == T:
          of_arm = points.setdefault(run.arm, {})
          of_arm.setdefault(getattr(run, name), []).append(run.bits.mean())
      for arm, colour in zip(arms, (_GREEN, _RED, _BLUE)):
        of_arm = points.get(arm, {})
        means = [np.mean(values) for values in of_arm.values()]
        if of_arm:
          axes.plot(list(of_arm), means, color=colour, label=arm)
          _dots(axes, of_arm, colour)
      axes.set_xscale("log")
      axes.set_title(f"T = {T:,}")
      axes.set_xlabel(label)
    grid[0, 0].set_ylabel("bits per character")


def _dots(axes, points, colour):
  """Draw all values of {x: values}."""
  x = [x for x, values in points.items() for _ in values]
  y = [value for values in points.values() for value in values]
  axes.plot(x, y, "o", ms=4, alpha=0.6, color=colour)


def _delays(path, rows):
  lengths = sorted({row["T"] for row in rows})
  with _figure(path, 1) as grid:
    axes = grid[0, 0]
    for n, (T, colour) in enumerate(zip(lengths, canvas.COLOURS)):
      own = tables.find(rows, T=T)
      # Intervals of several lengths would hide each other.
      x = [row["characters"] * 1.04**n for row in own]
      delays = [np.nan if row["bound"] else row["delay"] for row in own]
      ratios = [row["cost_ratio"] for row in own]
      name = f"FLOP ratio of a step, T = {T:,}"
      axes.plot(x, delays, "o-", color=colour, label=f"delay, T = {T:,}")
      axes.plot(x, ratios, "--", color=colour, label=name)
      for at, row in zip(x, own):
        if row["bound"]:
          share, mark = {">": (1.3, "^"), "<": (0.77, "v")}[row["bound"]]
          y = row["delay"], share * row["delay"]
          axes.plot([at, at], y, color=colour, marker=mark, markevery=[1])
        elif row["seeds"] > 1:
          axes.plot([at, at], [row["low"], min(row["high"], 1e3)], color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    ticks = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 16)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("characters that two streams read")
    axes.set_ylabel("steps of one stream / steps of two")


def _locality(path, rows):
  lengths = sorted({row["T"] for row in rows})
  inches = (15, 4.6 * len(lengths))
  with _figure(path, len(_PANELS), len(lengths), inches=inches) as grid:
    for line, T in zip(grid, lengths):
      for axes, (column, title) in zip(line, _PANELS.items()):
        networks: dict[tuple, dict[int, list[float]]] = {}
        for row in tables.find(rows, T=T):
          key = tuple(
            row[k] for k in ("stream", "arm", "study", "steps", "seed")
          )
          if row[column] != "":
            layers = networks.setdefault(key, {})
            layers.setdefault(row["layer"], []).append(row[column])
        for (stream, *_), layers in networks.items():
          name, colour = _STREAMS[stream]
          means = [np.mean(values) for values in layers.values()]
          axes.plot(list(layers), means, color=colour, label=name)
          _dots(axes, layers, colour)
        axes.axhline(0, color=canvas.GREY, lw=0.8)
        axes.set_title(f"{title}, T = {T:,}", fontsize=11)
        axes.set_xlabel("layer")
        axes.locator_params(axis="x", integer=True)


def _knockouts(path, rows):
  names = list(dict.fromkeys(row["knockout"] for row in rows))
  streams = [name for name in _STREAMS if tables.find(rows, stream=name)]
  with _figure(path, 1, inches=(8.5, 2 + 0.42 * len(names))) as grid:
    axes = grid[0, 0]
    for n, stream in enumerate(streams):
      own, (name, colour) = tables.find(rows, stream=stream), _STREAMS[stream]
      shift = 0.5 * ((n + 0.5) / len(streams) - 0.5)
      y = [names.index(row["knockout"]) + shift for row in own]
      errors = [row["late_bits_error"] or np.nan for row in own]
      style = dict(fmt="o", ms=5, color=colour, label=name)
      axes.errorbar([row["late_bits"] for row in own], y, xerr=errors, **style)
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    axes.set_xlim(left=min(2 * min(row["late_bits"] for row in rows), -0.002))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rise in bits per character (logarithmic beyond 0.01)")
    _lines(axes, names)


def _outcomes(path, rows):
  margin = comparisons.MARGIN
  halves = np.nan_to_num([row["half_of_95_percent"] for row in rows])
  ends = [abs(row["difference_bits"]) for row in rows] + np.minimum(halves, 0.1)
  far = 1.1 * max(3 * margin, *ends)
  fields = {"worse": (margin, far), "better": (-far, -margin)}
  fields["equal"] = (-margin, margin)
  names = [f"{r['explanation']}: {r['contrast']}, T = {r['T']:,}" for r in rows]
  lines = list(dict.fromkeys(names))
  with _figure(path, 1, inches=(11, 2 + 0.4 * len(lines))) as grid:
    axes = grid[0, 0]
    for row, half, name in zip(rows, halves, names):
      y, is_judged = lines.index(name), row["equal"] == "steps"
      for low, high in (fields[side] for side in row["predicts"].split(" or ")):
        axes.barh(y, high - low, left=low, height=0.8, color="#e4e4e4")
      colour = {"yes": _GREEN, "no": _RED}.get(row["holds"], canvas.GREY)
      axes.errorbar(
        row["difference_bits"],
        y if is_judged else y + 0.25,
        xerr=half,
        fmt="o",
        ms=6 if is_judged else 4,
        color=colour,
        mfc=colour if is_judged else "white",
      )
    axes.set_xlim(-far, far)
    axes.set_xlabel("difference in bits per character")
    _lines(axes, lines)


def _lines(axes, names):
  """Name the lines of a figure from above, and draw a line at 0."""
  axes.set_yticks(range(len(names)), names, fontsize=9)
  axes.set_ylim(-0.6, len(names) - 0.4)
  axes.invert_yaxis()
  axes.axvline(0, color=canvas.GREY, lw=0.8)
