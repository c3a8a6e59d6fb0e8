"""The pictures of the report, each as PNG and SVG.

Matplotlib is imported where a picture is drawn, and never through pyplot.
"""

import contextlib
import io

import numpy as np
from etils import epath

from aoarm_jax import figures, run_dir
from aoarm_jax.study import coherence, profiles, tables

_COLOURS = dict(
  zip(
    ("two_stream", "decoupled_rope", "mdlm", "ao_gpt", "sigma_gpt", "causal"),
    figures.COLOURS,
  )
)
_OTHER = "#444444"


def colour(mechanism: str) -> str:
  return _COLOURS.get(mechanism, _OTHER)


@contextlib.contextmanager
def _picture(folder: epath.Path, name: str, columns: int, rows=1, **options):
  """A grid of axes [rows, columns], saved where the block ends well."""
  import matplotlib
  from matplotlib import figure
  from matplotlib.backends import backend_agg

  style = figures.STYLE | {"svg.hashsalt": name}  # The same bytes again.
  with matplotlib.rc_context(style):
    size = options.pop("inches", (max(7, 4.7 * columns), 4.4 * rows))
    picture = figure.Figure(size, layout="constrained")
    backend_agg.FigureCanvasAgg(picture)
    yield picture, picture.subplots(rows, columns, squeeze=False, **options)
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
      data = io.BytesIO()
      picture.savefig(data, format=suffix, dpi=130, metadata=metadata)
      run_dir.write_atomically(folder / f"{name}.{suffix}", data.getvalue())


def _legend(picture, grid):
  """One legend below all axes."""
  columns = 1 + grid.shape[1]
  found = {}
  for axes in grid.flat:
    handles, labels = axes.get_legend_handles_labels()
    found |= dict(zip(labels, handles))
  if found:
    picture.legend(
      found.values(), found.keys(), loc="outside lower center",
      ncols=min(columns, len(found)),
    )  # fmt: skip


def _name(arm):
  words = arm.mechanism
  if arm.budget != "steps":
    words += f", equal {arm.budget}"
  return words


def coherence_diversity(found, folder: epath.Path, rule: str) -> bool:
  """Curves of coherence over diversity, a panel for each length.

  Args:
    found: arm -> tables.Curve.
    folder: of the picture.
    rule: a key of coherence.RULES.

  Returns:
    Whether there was anything to draw.
  """
  chosen = {
    arm: curve
    for arm, curve in found.items()
    if not arm.orders.startswith("block")
  }
  lengths = sorted({arm.T for arm in chosen})
  if not lengths:
    return False
  x_at = coherence.MEASURES.index("diversity")
  y_at = coherence.MEASURES.index(f"coherence_{rule}")
  with _picture(folder, f"coherence_diversity_{rule}", len(lengths)) as (
    picture,
    grid,
  ):
    for axes, T in zip(grid[0], lengths):
      for arm, curve in chosen.items():
        if arm.T != T:
          continue
        x, y = curve.mean[:, x_at], curve.mean[:, y_at]
        style = {"steps": "-", "flops": "--", "parameters": ":"}[arm.budget]
        axes.plot(
          x, y, style, marker=".", ms=5, lw=1.5, color=colour(arm.mechanism),
          label=_name(arm),
        )  # fmt: skip
        axes.errorbar(
          x, y,
          xerr=_arms_of(x, curve.low[:, x_at], curve.high[:, x_at]),
          yerr=_arms_of(y, curve.low[:, y_at], curve.high[:, y_at]),
          fmt="none", lw=0.7, alpha=0.45, color=colour(arm.mechanism),
        )  # fmt: skip
        real = curve.real
      axes.plot(
        real[x_at], real[y_at], "*", ms=14, color="black", label="real text"
      )
      axes.set_title(f"T = {T}")
      axes.set_xlabel("diversity: unique words / words")
    letters = coherence.RULES[rule]
    grid[0][0].set_ylabel(f"coherence: words of {letters}+ letters known")
    _legend(picture, grid)
  return True


def _arms_of(value, low, high):
  """Error bars, [2, n]; never negative, and nan where there is no value."""
  return np.maximum([value - low, high - value], 0)


def profiles_picture(found, folder: epath.Path) -> bool:
  """Attention over distance, a row for each arm's stream; seeds averaged."""
  rows = [
    (arm, stream)
    for arm in found
    if arm.budget == "steps"
    for stream in tables.streams_of(arm)
  ]
  if not rows:
    return False
  limit = 4
  with _picture(
    folder, "profiles", 2, len(rows), inches=(10, 0.6 + 1.9 * len(rows))
  ) as (picture, grid):
    for line, (arm, stream) in zip(grid, rows):
      ratio = np.mean(
        [profiles.relative(file, stream) for file in found[arm]], axis=0
      )
      edges = profiles.bin_edges(arm.T + 1)
      for i, axes in enumerate(line):
        good = np.isfinite(ratio[:, i]).any(axis=0)
        values = np.log2(np.maximum(ratio[:, i][:, good], 2.0**-limit))
        image = axes.imshow(
          values, aspect="auto", origin="lower", cmap="RdBu_r",
          vmin=-limit, vmax=limit, interpolation="nearest",
        )  # fmt: skip
        shown = edges[: ratio.shape[2]][good]
        ticks = np.arange(0, len(shown), 3)
        axes.set_xticks(ticks, [f"{shown[t]}" for t in ticks])
        axes.grid(False)
        axes.set_yticks([0, len(values) - 1])
        axes.set_xlabel(f"{profiles.KINDS[i]} distance, up to", fontsize=9)
      line[0].set_title(
        f"{arm.mechanism}{'' if stream == 'only' else f', {stream} rows'}, "
        f"T = {arm.T}, {arm.orders}",
        fontsize=10,
      )
      line[0].set_ylabel("layer")
    picture.colorbar(
      image, ax=grid, label="log2 of attention / uniform attention",
      shrink=min(1.0, 3 / len(rows)),
    )  # fmt: skip
  return True


def locality_plane(found, folder: epath.Path) -> bool:
  """A point for every head: semantic over structural locality."""
  chosen = {arm: f for arm, f in found.items() if arm.budget == "steps"}
  panels = sorted({(arm.T, arm.orders) for arm in chosen})
  if not panels:
    return False
  marks = {"content": "s", "query": "o", "only": "^"}
  with _picture(folder, "locality", len(panels), sharex=True, sharey=True) as (
    picture,
    grid,
  ):
    for axes, (T, family) in zip(grid[0], panels):
      axes.axhline(0, color="#999999", lw=0.8)
      axes.axvline(0, color="#999999", lw=0.8)
      for arm, files in chosen.items():
        if (arm.T, arm.orders) != (T, family):
          continue
        for stream in tables.streams_of(arm):
          index = np.mean([profiles.locality(f, stream) for f in files], axis=0)
          words = arm.mechanism + (f", {stream}" if stream != "only" else "")
          filled = stream != "content"
          axes.plot(
            index[..., 1].ravel(), index[..., 0].ravel(), marks[stream], ms=5,
            color=colour(arm.mechanism), alpha=0.7, label=words,
            mfc=colour(arm.mechanism) if filled else "none",
          )  # fmt: skip
          axes.plot(
            *np.nanmean(index, axis=(0, 1))[::-1], marks[stream], ms=13,
            color=colour(arm.mechanism), mec="black",
            mfc=colour(arm.mechanism) if filled else "white",
          )  # fmt: skip
      axes.set_title(f"T = {T}, {family}")
      axes.set_xlabel("structural locality")
    grid[0][0].set_ylabel("semantic locality")
    _legend(picture, grid)
  return True


def differences(rows, folder: epath.Path) -> bool:
  """Paired differences from the reference over length, a panel a budget."""
  measured = [
    r for r in rows if r["difference_bits"] != "" and r["orders"] == "uniform"
  ]
  budgets = list(dict.fromkeys(r["budget"] for r in measured))
  if not measured:
    return False
  with _picture(folder, "differences", len(budgets), sharey=True) as (
    picture,
    grid,
  ):
    for axes, budget in zip(grid[0], budgets):
      axes.axhline(0, color="#777777", lw=1)
      chosen = tables.find(measured, budget=budget)
      for name, size in dict.fromkeys(
        (r["mechanism"], r["size"]) for r in chosen
      ):
        line = sorted(
          tables.find(chosen, mechanism=name, size=size), key=lambda r: r["T"]
        )
        axes.errorbar(
          [r["T"] for r in line], [r["difference_bits"] for r in line],
          yerr=[2 * r["error"] for r in line], marker="o", capsize=3,
          color=colour(name), label=name,
        )  # fmt: skip
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter("{x:g}")
      axes.set_title(f"equal {budget}")
      axes.set_xlabel("length T")
    grid[0][0].set_ylabel(
      f"bits per character above {measured[0]['reference']}"
    )
    _legend(picture, grid)
  return True


def blocks(rows, folder: epath.Path) -> bool:
  """Paired differences over the width of blocks, at one length."""
  measured = [r for r in rows if r["difference_bits"] != ""]
  lengths = [r["T"] for r in measured if r["orders"].startswith("block")]
  if not lengths:
    return False

  def width(row):
    return int(row["orders"].removeprefix("block") or 0) or row["T"]

  T = max(lengths)
  with _picture(folder, "blocks", 1, inches=(6.4, 4.4)) as (picture, grid):
    axes = grid[0][0]
    axes.axhline(0, color="#777777", lw=1)
    chosen = [r for r in tables.find(measured, T=T)
              if r["orders"].startswith(("block", "uniform"))]  # fmt: skip
    for key in dict.fromkeys((r["mechanism"], r["budget"]) for r in chosen):
      line = [r for r in chosen if (r["mechanism"], r["budget"]) == key]
      line = [r | {"orders": r["orders"].replace("uniform", "")} for r in line]
      line.sort(key=width)
      axes.errorbar(
        [width(r) for r in line], [r["difference_bits"] for r in line],
        yerr=[2 * r["error"] for r in line], marker="o", capsize=3,
        color=colour(key[0]), ls="-" if key[1] == "steps" else "--",
        label=f"{key[0]}, equal {key[1]}",
      )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"T = {T}")
    axes.set_xlabel("width of the blocks (T: uniform orders)")
    axes.set_ylabel("bits per character above the reference")
    _legend(picture, grid)
  return True
