"""The pictures of the report, each as PNG and SVG."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.config import mechanisms
from aoarm_jax.runs import canvas
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, profiles, tables

# By the order of the table; ablations share a colour of their own.
_COLOURS = dict(
  zip(
    (
      name
      for name, kind in mechanisms.MECHANISMS.items()
      if not kind.changes_one_thing_of
    ),
    canvas.COLOURS,
  )
)
_OTHER = "#444444"


# Markers for the heads of each stream, and further markers for arms that share
# a colour.
_MARKS = {"content": "s", "query": "o", "only": "^"}
_SPARE = ("v", "D", "P", "X", "<", ">", "p", "h", "*")


def _markers(items: Iterable[tuple[Any, str, str]]) -> dict[Any, str]:
  """Returns a marker for each name, so that no two names look alike.

  Args:
    items: (name, colour, the marker that is wanted). The first name with a
      colour and a marker has it. A later one has a spare marker.
  """
  chosen: dict[Any, str] = {}
  taken: set[tuple[str, str]] = set()
  for name, shade, wanted in items:
    if name in chosen:
      continue
    free = (m for m in (wanted, *_SPARE) if (shade, m) not in taken)
    chosen[name] = next(free, wanted)
    taken.add((shade, chosen[name]))
  return chosen


def colour(mechanism: str) -> str:
  return _COLOURS.get(mechanism, _OTHER)


@contextlib.contextmanager
def figure(
  folder: epath.Path, name: str, columns: int, rows: int = 1, **options: Any
) -> Iterator[tuple[Any, np.ndarray]]:
  """Yields (picture, grid of axes [rows, columns]); saved as PNG and SVG.

  Axes in which nothing was drawn are hidden.
  """
  paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
  inches = options.pop("inches", (max(7, 4.7 * columns), 4.4 * rows))
  with canvas.draw(paths, rows, columns, inches=inches, dpi=130, **options) as (
    picture,
    grid,
  ):
    yield picture, grid
    for axes in grid.flat:
      axes.set_visible(axes.has_data())


def shape(count: int) -> tuple[int, int]:
  """Return (columns, rows) of so many panels."""
  columns = 2 if count == 4 else min(3, count)
  return columns, -(-count // columns)


def legend(picture: Any, grid: np.ndarray) -> None:
  """Draw one legend below all axes."""
  columns = 1 + grid.shape[1]
  found: dict[str, Any] = {}
  for axes in grid.flat:
    handles, labels = axes.get_legend_handles_labels()
    found |= dict(zip(labels, handles))
  if found:
    picture.legend(
      found.values(),
      found.keys(),
      loc="outside lower center",
      ncols=min(columns, len(found)),
    )


def _main(found, budgets=("steps",)):
  """The arms for pictures over lengths: uniform orders, the first size.

  The reference has the same cells for all budgets, and is shown once.
  """
  found = {arm: x for arm, x in found.items() if arm.budget in budgets}
  size = next((arm.size for arm in found), "")
  chosen, cells = {}, set()
  for arm, x in found.items():
    mark = (arm.mechanism, arm.T, id(x))
    if (
      arm.size == size
      and not arm.orders.startswith("block")
      and mark not in cells
    ):
      cells.add(mark)
      chosen[arm] = x
  return chosen


def _trained(mechanism, orders):
  return mechanism + ", curriculum" * (orders == "curriculum")


def _name(arm):
  words = _trained(arm.mechanism, arm.orders)
  if arm.budget != "steps":
    words += f", equal {arm.budget}"
  return words


def coherence_diversity(
  found: dict[cells_lib.Cell, tables.Curve], folder: epath.Path, rule: str
) -> bool:
  """Curves of coherence over diversity, a panel for each length.

  Args:
    found: arm -> tables.Curve.
    folder: of the picture.
    rule: a key of coherence.RULES.

  Returns:
    Whether there was anything to draw.
  """
  chosen = _main(found, ("steps", "flops"))
  lengths = sorted({arm.T for arm in chosen})
  if not lengths:
    return False
  x_at = coherence.MEASURES.index("diversity")
  y_at = coherence.MEASURES.index(f"coherence_{rule}")
  name = f"coherence_diversity_{rule}"
  with figure(folder, name, *shape(len(lengths))) as (picture, grid):
    for axes, T in zip(grid.flat, lengths):
      for arm, curve in chosen.items():
        if arm.T != T:
          continue
        x, y = curve.mean[:, x_at], curve.mean[:, y_at]
        style = {"steps": "-", "flops": "--", "parameters": ":"}[arm.budget]
        if arm.orders == "curriculum":
          style = "-."
        axes.plot(
          x,
          y,
          style,
          marker=".",
          ms=5,
          lw=1.5,
          color=colour(arm.mechanism),
          label=_name(arm),
        )
        axes.errorbar(
          x,
          y,
          xerr=_arms_of(x, curve.low[:, x_at], curve.high[:, x_at]),
          yerr=_arms_of(y, curve.low[:, y_at], curve.high[:, y_at]),
          fmt="none",
          lw=0.7,
          alpha=0.45,
          color=colour(arm.mechanism),
        )
        real = curve.real
      axes.plot(
        real[x_at], real[y_at], "*", ms=14, color="black", label="real text"
      )
      axes.set_title(f"T = {T}")
      axes.set_xlabel("diversity: unique words / words")
    letters = coherence.RULES[rule]
    for axes in grid[:, 0]:
      axes.set_ylabel(f"coherence: words of {letters}+ letters known")
    legend(picture, grid)
  return True


def _arms_of(value, low, high):
  """Error bars, [2, n]; never negative, and nan where there is no value."""
  return np.maximum([value - low, high - value], 0)


def profiles_pictures(
  found: dict[cells_lib.Cell, dict[int, dict]], folder: epath.Path
) -> list[str]:
  """Attention over distance, a picture a length; the names of the pictures."""
  chosen = _main(found)
  lengths = sorted({arm.T for arm in chosen})
  for T in lengths:
    _profiles(
      {arm: files for arm, files in chosen.items() if arm.T == T}, folder, T
    )
  return [f"profiles_T{T}" for T in lengths]


def _profiles(found, folder, T, limit=4):
  """A row for each stream; seeds and heads averaged."""
  rows = [(arm, s) for arm in found for s in tables.streams_of(arm)]
  inches = (10, 0.6 + 1.9 * len(rows))
  with figure(folder, f"profiles_T{T}", 2, len(rows), inches=inches) as (
    picture,
    grid,
  ):
    for line, (arm, stream) in zip(grid, rows):
      ratio = np.mean(
        [profiles.relative(f, stream) for f in found[arm].values()], axis=0
      )
      for i, axes in enumerate(line):
        good = np.isfinite(ratio[:, i]).any(axis=0)
        values = np.log2(np.maximum(ratio[:, i][:, good], 2.0**-limit))
        image = axes.imshow(
          values,
          aspect="auto",
          origin="lower",
          cmap="RdBu_r",
          vmin=-limit,
          vmax=limit,
          interpolation="nearest",
        )
        shown = profiles.bin_edges(T + 1)[: len(good)][good]
        ticks = np.arange(0, len(shown), 3)
        axes.set_xticks(ticks, [f"{shown[t]}" for t in ticks])
        axes.grid(False)
        ends = sorted({0, len(values) - 1})
        axes.set_yticks(ends, [str(end + 1) for end in ends])
        axes.set_xlabel(f"{profiles.KINDS[i]} distance, up to", fontsize=9)
      rows_of = "" if stream == "only" else f", {stream} rows"
      line[0].set_title(f"{_name(arm)}{rows_of}, T = {T}", fontsize=10)
      line[0].set_ylabel("layer")
    picture.colorbar(
      image,
      ax=grid,
      label="log2 of attention / attention spread evenly",
      shrink=min(1.0, 3 / len(rows)),
    )


def locality_plane(
  found: dict[cells_lib.Cell, dict[int, dict]], folder: epath.Path
) -> bool:
  """A point for every head of every seed: semantic over structural locality."""
  chosen = {
    arm: files
    for arm, files in _main(found).items()
    if not mechanisms.MECHANISMS[arm.mechanism].left_to_right
  }
  panels = sorted({arm.T for arm in chosen})
  if not panels:
    return False
  marks = _markers(
    (_label(arm, stream), colour(arm.mechanism), _MARKS[stream])
    for arm in chosen
    for stream in tables.streams_of(arm)
  )
  with figure(
    folder, "locality", *shape(len(panels)), sharex=True, sharey=True
  ) as (picture, grid):
    for axes, T in zip(grid.flat, panels):
      axes.axhline(0, color="#999999", lw=0.8)
      axes.axvline(0, color="#999999", lw=0.8)
      for arm, files in chosen.items():
        if arm.T != T:
          continue
        for stream in tables.streams_of(arm):
          index = np.concatenate(
            [tables.index_of(f, stream)[..., :2] for f in files.values()]
          )
          words = _label(arm, stream)
          filled = stream != "content"
          axes.plot(
            index[..., 1].ravel(),
            index[..., 0].ravel(),
            marks[words],
            ms=5,
            color=colour(arm.mechanism),
            alpha=0.7,
            label=words,
            mfc=colour(arm.mechanism) if filled else "none",
          )
          axes.plot(
            *np.nanmean(index, axis=(0, 1))[::-1],
            marks[words],
            ms=13,
            color=colour(arm.mechanism),
            mec="black",
            mfc=colour(arm.mechanism) if filled else "white",
          )
      axes.locator_params(axis="x", nbins=5)
      axes.set_title(f"T = {T}")
      axes.set_xlabel("structural locality")
    for axes in grid[:, 0]:
      axes.set_ylabel("semantic locality")
    legend(picture, grid)
  return True


def _label(arm, stream):
  return _name(arm) + (f", {stream}" if stream != "only" else "")


def _first_reference(rows):
  return tables.find(rows, reference=rows[0]["reference"]) if rows else []


def _errors(axes, x, rows, marker, **style):
  """Differences with 95% intervals; hollow where there is one seed."""
  y = [r["difference_bits"] for r in rows]
  error = [tables.estimate(r).half for r in rows]
  axes.errorbar(x, y, yerr=error, marker=marker, capsize=3, **style)
  one = [i for i, r in enumerate(rows) if r["seeds"] == 1]
  axes.plot(
    [x[i] for i in one],
    [y[i] for i in one],
    marker,
    ls="",
    color=style["color"],
    mfc="white",
    zorder=5,
  )


def differences(rows: list[tables.Row], folder: epath.Path) -> bool:
  """Paired differences from the reference over length, a panel a budget."""
  measured = [
    r
    for r in _first_reference(rows)
    if r["difference_bits"] != "" and r["orders"] in ("uniform", "curriculum")
  ]
  budgets = list(dict.fromkeys(r["budget"] for r in measured))
  if not measured:
    return False
  with figure(folder, "differences", len(budgets), sharey=True) as (
    picture,
    grid,
  ):
    main = measured[0]["size"]
    keys = [(r["mechanism"], r["orders"], r["size"]) for r in measured]
    marks = _markers(
      (
        key,
        colour(key[0]),
        "D" if key[1] != "uniform" else "o" if key[2] == main else "s",
      )
      for key in keys
    )
    for axes, budget in zip(grid[0], budgets):
      axes.axhline(0, color="#777777", lw=1)
      chosen = tables.find(measured, budget=budget)
      for key in dict.fromkeys(
        (r["mechanism"], r["orders"], r["size"]) for r in chosen
      ):
        mechanism, family, size = key
        line = sorted(
          tables.find(chosen, mechanism=mechanism, orders=family, size=size),
          key=lambda r: r["T"],
        )
        _errors(
          axes,
          [r["T"] for r in line],
          line,
          color=colour(mechanism),
          ls="-" if size == main else ":",
          marker=marks[key],
          label=_trained(mechanism, family) + f", {size}" * (size != main),
        )
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:g}")
      axes.set_title(f"equal {budget}")
      axes.set_xlabel("length T")
    # Logarithmic beyond 0.1: an arm that has learned little flattens no other.
    grid[0][0].set_yscale("symlog", linthresh=0.1, linscale=2)
    low, high = grid[0][0].get_ylim()
    ticks = (-1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2)
    grid[0][0].set_yticks([tick for tick in ticks if low <= tick <= high])
    grid[0][0].yaxis.set_major_formatter("{x:g}")
    grid[0][0].minorticks_off()
    grid[0][0].set_ylabel(
      f"bits per character above {measured[0]['reference']}\n"
      "(logarithmic beyond 0.1)"
    )
    legend(picture, grid)
  return True


def blocks(rows: list[tables.Row], folder: epath.Path) -> bool:
  """Paired differences over the width of blocks, at one length."""
  measured = [r for r in _first_reference(rows) if r["difference_bits"] != ""]
  lengths = [r["T"] for r in measured if r["orders"].startswith("block")]
  if not lengths:
    return False

  T = max(lengths)
  with figure(folder, "blocks", 1, inches=(6.4, 4.4)) as (picture, grid):
    axes = grid[0][0]
    axes.axhline(0, color="#777777", lw=1)
    chosen = tables.find(measured, T=T)
    for key in dict.fromkeys(
      (r["mechanism"], r["budget"], r["size"])
      for r in chosen
      if r["orders"].startswith("block")
    ):
      mechanism, budget, size = key
      found = tables.find(chosen, mechanism=mechanism, budget=budget, size=size)
      widths, line = zip(*tables.by_width(found))
      _errors(
        axes,
        widths,
        line,
        color=colour(mechanism),
        marker="o",
        ls="-" if budget == "steps" else "--",
        label=f"{mechanism}, equal {budget}",
      )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"T = {T}")
    axes.set_xlabel("width of the blocks in which orders are random")
    axes.set_ylabel("bits per character above the reference")
    legend(picture, grid)
  return True


def bits_over_flops(
  rows: list[tables.Row], folder: epath.Path, name: str
) -> None:
  """Bits over training FLOPs: a panel a length, a dot a seed, a line the mean.

  Args:
    rows: of curve.runs_table.
    folder: of the pictures.
    name: of the files.
  """
  rows = [row for row in rows if not row["recipe"]]
  lengths = sorted({row["T"] for row in rows})
  with figure(folder, name, *shape(len(lengths)), sharey=True) as (
    all_,
    grid,
  ):
    for axes, T in zip(grid.flat, lengths):
      for mechanism in dict.fromkeys(row["mechanism"] for row in rows):
        own = [r for r in rows if (r["T"], r["mechanism"]) == (T, mechanism)]
        means: dict[float, list[float]] = {}
        for row in own:
          means.setdefault(row["training_flops"], []).append(row["any_order"])
        flops = sorted(means)
        axes.plot(
          flops,
          [np.mean(means[x]) for x in flops],
          color=colour(mechanism),
          label=mechanism,
        )
        axes.plot(
          [row["training_flops"] for row in own],
          [row["any_order"] for row in own],
          ".",
          color=colour(mechanism),
        )
      axes.set_xscale("log")
      axes.set_title(f"T = {T:,}")
      axes.set_xlabel("training FLOPs")
    grid[0, 0].set_ylabel("bits per character, any order")
    legend(all_, grid)


def delay_over_budget(
  rows: list[tables.Row], folder: epath.Path, name: str
) -> None:
  """The delay of each arm over the budget, and the cost ratio of a step.

  An arrow upwards is a bound: the arm's curve ends before it reaches that loss.

  Args:
    rows: of curve.delays.
    folder: of the pictures.
    name: of the files.
  """
  rows = [row for row in rows if not row["recipe"]]
  arms = list(dict.fromkeys((row["mechanism"], row["T"]) for row in rows))
  with figure(folder, name, 1) as (all_, grid):
    axes = grid[0, 0]
    for (mechanism, T), shade in zip(arms, canvas.COLOURS):
      own = [r for r in rows if (r["mechanism"], r["T"]) == (mechanism, T)]
      x = np.array([row["characters"] for row in own])
      y = np.array([row["delay"] for row in own])
      axes.plot(x, y, "o-", color=shade, label=f"{mechanism}, T = {T:,}")
      for row in own:
        ends = (row["low"], row["high"])
        if all(map(np.isfinite, ends)) and not row["bound"]:
          axes.plot(
            [row["characters"]] * 2, ends, color=shade, linewidth=3, alpha=0.4
          )
        elif row["bound"] == ">":
          axes.annotate(
            "",
            (row["characters"], 1.15 * row["delay"]),
            (row["characters"], row["delay"]),
            arrowprops=dict(arrowstyle="->", color=shade),
          )
      axes.plot(
        x,
        [row["cost_ratio"] for row in own],
        "--",
        color=shade,
        label=f"cost of a step, T = {T:,}",
      )
    axes.set_xscale("log")
    axes.set_xlabel("characters that the reference reads")
    axes.set_ylabel("delay: steps over the reference's steps")
    legend(all_, grid)
