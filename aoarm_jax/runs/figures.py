"""The pictures of a run directory, as PNG files."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.runs import canvas

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
# A linear axis hides the start of a run whose last step is this many times
# the first one.
_LOG_STEPS_FROM = 500


def loss_curve(
  records: Sequence[Mapping[str, Any]],
  path: epath.PathLike,
  *,
  title: str,
  unit: str = "char",
) -> None:
  """Draws bits per token over steps, of training and of validation.

  A dashed line shows the unigram entropy.

  Args:
    records: as directory.read_metrics returns them; may be empty.
    path: of the PNG file.
    title: of the picture.
    unit: name of a token: "char", "byte" or "token".
  """
  train = [r for r in records if r.get("kind") == "train"]
  valid = [r for r in records if r.get("kind") == "valid"]
  names = dict.fromkeys(r.get("estimator", "") for r in valid)
  with _axes(path, title) as axes:
    steps, bits = _bits_series(train, unit)
    is_empty = not len(steps)
    if len(steps):
      _draw_noisy(axes, steps, bits, canvas.COLOURS[0], "training")
    for i, name in enumerate(names):
      chosen = [r for r in valid if r.get("estimator", "") == name]
      points, bits = _bits_series(chosen, unit)
      if len(points):
        label = f"validation, {_words(name)}" if name else "validation"
        axes.plot(
          points,
          bits,
          color=canvas.COLOURS[1 + i % 5],
          lw=1.2,
          ms=6,
          marker=_MARKERS[i % len(_MARKERS)],
          label=f"{label}: {bits[-1]:.3f}",
        )
        steps, is_empty = np.append(steps, points), False
    if is_empty:
      _say_empty(axes)
    else:
      _, unigram = _series(valid, "unigram_bits")
      legend_top = _draw_reference(axes, unigram[-1]) if len(unigram) else 1.0
      _step_axis(axes, steps)
      axes.legend(loc="upper right", bbox_to_anchor=(1.0, legend_top))
    axes.set_xlabel("step")
    axes.set_ylabel(_bits_per(unit))


def slot_curve(
  curves: Mapping[str, Sequence[float]],
  path: epath.PathLike,
  *,
  title: str,
  unit: str = "char",
) -> None:
  """Draws bits per token over the rank in the generation order.

  Args:
    curves: label -> bits per token of ranks 1..T. T may differ.
    path: of the PNG file.
    title: of the picture.
    unit: name of a token: "char", "byte" or "token".
  """
  with _axes(path, title) as axes:
    is_empty = True
    for i, (label, curve) in enumerate(curves.items()):
      bits = np.array([np.nan if b is None else b for b in curve], float)
      if not np.isfinite(bits).any():
        continue
      is_empty = False
      share = (np.arange(len(bits)) + 1) / len(bits)
      label = f"{_words(label)}: mean {np.nanmean(bits):.3f}"
      good = np.isfinite(bits)
      _draw_noisy(axes, share[good], bits[good], canvas.COLOURS[i % 6], label)
    if is_empty:
      _say_empty(axes)
    else:
      axes.set_ylim(bottom=0)
      axes.legend(loc="upper right")
    axes.set_xlim(0, 1.01)
    axes.set_xlabel("share of the text generated so far: rank r / length T")
    axes.set_ylabel(_bits_per(unit))


def nearness(
  reports: Mapping[str, Mapping[str, Any]],
  path: epath.PathLike,
  *,
  title: str,
  unit: str = "char",
) -> None:
  """Draws bits per token over the distance to the nearest known token.

  Args:
    reports: label -> {"by_distance": bins, "by_recency": bins}. The bins are a
      list of {low, high, bits_per_<unit>, tokens}: distance in positions, and
      recency in steps since the nearest known token was generated.
    path: of the PNG file.
    title: of the picture.
    unit: name of a token: "char", "byte" or "token".
  """
  # Hollow and larger markers: the first line stays visible where the second
  # lies on it, as for orders from left to right.
  hollow = dict(marker="s", ms=10, markerfacecolor="none")
  lines: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("by_distance", "-", "positions to the nearest known token", {}),
    ("by_recency", "--", "steps since that token was generated", hollow),
  )
  with _axes(path, title) as axes:
    is_empty = True
    for i, (label, report) in enumerate(reports.items()):
      for name, style, words, marker in lines:
        bins = [bin for bin in report[name] if bin["low"] > 0]
        if not bins:
          continue
        is_empty = False
        axes.plot(
          [math.sqrt(bin["low"] * bin["high"]) for bin in bins],
          [bin[f"bits_per_{unit}"] for bin in bins],
          # A single point has no line in the legend either.
          ls=style if len(bins) > 1 else "",
          color=canvas.COLOURS[i % 6],
          lw=1.6,
          label=f"{_words(label)}, by {words}",
          **dict(marker="o", ms=6) | marker,
        )
    if is_empty:
      _say_empty(axes)
    else:
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:g}")
      axes.set_ylim(bottom=0)
      axes.legend(loc="lower right")
    axes.set_xlabel("positions, or steps")
    axes.set_ylabel(_bits_per(unit))


def decode_speed(
  rows: Sequence[Mapping[str, Any]], path: epath.PathLike, *, title: str
) -> None:
  """Draws tokens per second over T: a panel for each batch, a line per method.

  Where any line has several lengths, the lines with one length are left out.

  Args:
    rows: of generation_speed's CSV file. The columns size, T, B, best, method,
      tokens_per_second and device are read.
    path: of the PNG file.
    title: of the picture. The device is added to it, or to each panel where
      there are several devices.
  """
  devices = sorted({str(row["device"]) for row in rows})
  if len(devices) == 1:
    title = f"{title}, {devices[0]}"
  lines: dict[tuple[str, tuple[str, str]], list[tuple[int, float]]] = {}
  for row in rows:
    is_best = str(row.get("best")) == "True"
    batch = "best batch" if is_best else f"batch {row['B']}"
    device = row["device"] if len(devices) > 1 else ""
    name = (str(row["method"]), (f"{row['size']}, {batch}", str(device)))
    point = int(row["T"]), float(row["tokens_per_second"])
    lines.setdefault(name, []).append(point)
  lengths = sorted({T for points in lines.values() for T, _ in points})
  drawn = {
    name: points
    for name, points in lines.items()
    if len({T for T, _ in points}) > 1
  }
  lines = drawn or lines
  groups = list(dict.fromkeys(group for _, group in lines))
  methods = list(dict.fromkeys(method for method, _ in lines))
  with canvas.draw([path], 1, max(1, len(groups)), sharey=True) as (
    picture,
    grid,
  ):
    picture.suptitle(title, parse_math=False)
    all_axes = grid[0]
    for axes, group in zip(all_axes, groups):
      axes.set_title(group[0])
      axes.margins(y=0.1)
      axes.text(0.03, 0.01, group[1], fontsize=8, transform=axes.transAxes)
      for i, method in enumerate(methods):
        points = sorted(lines.get((method, group), ()))
        if points:
          axes.plot(
            *zip(*points),
            color=canvas.COLOURS[i % 6],
            marker=_MARKERS[i % len(_MARKERS)],
            ls="-" if i < 6 else "--",
            lw=1.6,
            ms=6,
            label=_words(method),
          )
        for point in points if len(lengths) == 1 else ():
          # With one length there is no slope to see: the numbers are shown.
          axes.annotate(
            f"{point[1]:,.0f}",
            point,
            (9, 0),
            va="center",
            textcoords="offset points",
          )
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:g}")
      axes.set_xticks(lengths)
      axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
      axes.set_yscale("log")
      axes.set_xlabel("length T")
    if lines:
      all_axes[0].set_ylabel("tokens per second")
      entries = canvas.labelled(grid)
      all_axes[-1].legend(
        entries.values(), entries, loc="upper left", bbox_to_anchor=(1.0, 1.0)
      )
    else:
      _say_empty(all_axes[0])


def generation_strip(
  panels: Mapping[str, tuple[Sequence[str], Sequence[int]]],
  path: epath.PathLike,
  *,
  title: str,
  frames: int = 7,
) -> None:
  """Draws how texts are generated: a panel for each text, time downwards.

  Args:
    panels: label -> (the symbol at each position, the generation order of the
      positions 1..n). All texts have the same length n.
    path: of the PNG file.
    title: of the picture.
    frames: rows of a panel, evenly spread over the steps up to the last.
  """
  from matplotlib import colors

  n = max(len(order) for _, order in panels.values())
  shades = colors.ListedColormap(["white", "#ececec", "#ffd9b8"])
  inches = (0.125 * n + 0.9, len(panels) * (0.21 * frames + 0.5) + 0.3)
  with canvas.draw([path], len(panels), inches=inches) as (picture, grid):
    picture.suptitle(title, parse_math=False)
    for axes, (label, (text, order)) in zip(grid[:, 0], panels.items()):
      rank = np.argsort(np.asarray(order))
      ends = np.linspace(0, n, frames + 1).round()[:, None]
      kinds = (rank < ends[1:]) * 1 + ((rank < ends[1:]) & (rank >= ends[:-1]))
      axes.imshow(kinds, cmap=shades, vmin=0, vmax=2, aspect="auto")
      for (frame, at), kind in np.ndenumerate(kinds):
        axes.text(
          at,
          frame,
          text[at] if kind else "·",
          ha="center",
          va="center",
          family="monospace",
          fontsize=8.5,
          parse_math=False,
          color=("#b5b5b5", "#333333", "#a34700")[kind],
        )
      axes.set_title(label)
      axes.set_yticks(range(frames), [f"{int(end)}" for end in ends[1:, 0]])
      axes.set_xticks([])
      axes.grid(False)
      axes.tick_params(length=0)
      for side in axes.spines.values():
        side.set_visible(False)
      axes.set_ylabel("tokens known")


@contextlib.contextmanager
def _axes(path, title):
  """Yields the only axes of a picture that is saved to `path`."""
  with canvas.draw([path]) as (_, grid):
    grid[0, 0].set_title(title, parse_math=False)
    yield grid[0, 0]


def _words(name):
  """Returns a label; Matplotlib hides one that begins with an underscore."""
  return str(name).replace("_", " ").strip()


def _bits_per(unit):
  """Returns the label of an axis of bits per token."""
  return f"bits per {'character' if unit == 'char' else unit}"


def _bits_series(records, unit):
  """Returns (steps, bits per token) of records of metrics.jsonl.

  Earlier versions wrote bits per byte as bits_per_char.
  """
  renamed = [
    {**r, "bits": r.get(f"bits_per_{unit}", r.get("bits_per_char"))}
    for r in records
  ]
  return _series(renamed, "bits")


def _series(records, name):
  """Returns (steps, values) of the records whose value is finite.

  Args:
    records: of metrics.jsonl.
    name: of the value. A record may lack it.
  """
  pairs = [(r["step"], r[name]) for r in records if r.get(name) is not None]
  steps, values = np.array(pairs, float).reshape(-1, 2).T
  good = np.isfinite(values)
  return steps[good], values[good]


def _draw_noisy(axes, x, y, colour, label):
  """Draws a thin line and its thick running mean, or dots for a few values."""
  width = len(x) // 40
  if width < 2:
    marker = "o" if len(x) <= 40 else ""
    axes.plot(x, y, color=colour, lw=1.8, marker=marker, ms=3.5, label=label)
    return
  axes.plot(x, y, color=colour, lw=0.8, alpha=0.35)
  axes.plot(x, _running_mean(y, width), color=colour, lw=2.0, label=label)


def _running_mean(y, width):
  """Returns the centred mean over 2 width + 1 values, fewer at the ends."""
  sums = np.concatenate([[0.0], np.cumsum(y)])
  index = np.arange(len(y))
  # A window that is not symmetric would pull a steep start down.
  reach = np.minimum(width, np.minimum(index, len(y) - 1 - index))
  return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _draw_reference(axes, bits):
  """Draws the unigram entropy; returns the legend's highest place, 0..1."""
  axes.axhline(bits, color=canvas.GREY, lw=1.2, ls=(0, (5, 3)), zorder=1)
  axes.annotate(
    f"unigram entropy: {bits:.3f}",
    (0.995, bits),
    (0, 3),
    ha="right",
    xycoords=("axes fraction", "data"),
    textcoords="offset points",
    color=canvas.GREY,
    fontsize=10,
  )
  low, high = axes.get_ylim()
  share = (bits - low) / (high - low)
  return share - 0.01 if share > 0.5 else 1.0


def _step_axis(axes, steps):
  """Formats the axis of steps, which is logarithmic where a run is long."""
  from matplotlib import ticker

  first, last = steps[steps > 0].min(initial=np.inf), steps.max()
  if last >= _LOG_STEPS_FROM * first:
    axes.set_xscale("log")
  elif last > 0:
    axes.set_xlim(0, last * 1.02)
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _say_empty(axes):
  axes.set_xticks([])
  axes.set_yticks([])
  axes.text(
    0.5,
    0.5,
    "nothing measured yet",
    transform=axes.transAxes,
    ha="center",
    va="center",
    color=canvas.GREY,
  )
