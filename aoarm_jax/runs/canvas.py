"""An empty picture in the style of this package, saved when it is drawn.

Matplotlib is imported where a picture is drawn and never through pyplot. So
nothing here opens a window or keeps a picture in memory.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.runs import disk

_INCHES = (9.4, 4.2)
_DPI = 150
# The colours of Okabe and Ito, which every kind of colour vision tells apart.
# Black and yellow are left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#6b6b6b"
# Matplotlib types the keys as a list of literals, so they are Any here.
_STYLE: dict[Any, Any] = {
  "font.size": 11,
  "axes.titlesize": 12,
  "axes.titlelocation": "left",
  "axes.titlepad": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": GREY,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#e6e6e6",
  "grid.linewidth": 0.8,
  "xtick.color": GREY,
  "ytick.color": GREY,
  "xtick.labelcolor": "black",
  "ytick.labelcolor": "black",
  "legend.frameon": False,
  "lines.solid_capstyle": "round",
}


def shade(share: float) -> tuple[float, ...]:
  """Return a colour of a scale from dark to light: red, green, blue, alpha.

  Args:
    share: where on the scale, from 0 to 1.
  """
  import matplotlib

  # The end of the scale is too light for lines.
  return matplotlib.colormaps["viridis"](0.95 * share)


def name_lines(axes: Any, names: Sequence[str], **style: Any) -> None:
  """Name the places 0, 1, ... of the vertical axis, from above.

  Args:
    axes: the axes of matplotlib.
    names: of the places.
    **style: of the text.
  """
  axes.set_yticks(range(len(names)), names, **style)
  axes.set_ylim(len(names) - 0.4, -0.6)


def labelled(grid: np.ndarray) -> dict[str, Any]:
  """Return what a legend of several axes shows: {label: handle}."""
  return {
    label: handle
    for axes in grid.flat
    for handle, label in zip(*axes.get_legend_handles_labels())
  }


@contextlib.contextmanager
def draw(
  paths: Sequence[epath.PathLike],
  rows: int = 1,
  columns: int = 1,
  *,
  inches: tuple[float, float] = _INCHES,
  dpi: int = _DPI,
  legend_columns: int = 0,
  **options: Any,
) -> Iterator[tuple[Any, np.ndarray]]:
  """Makes an empty picture, and saves it where the block ends without error.

  Args:
    paths: of the files. A name that ends in .svg becomes SVG, any other PNG.
    rows: number of axes below each other.
    columns: number of axes beside each other.
    inches: width and height.
    dpi: pixels per inch of the PNG file.
    legend_columns: columns of one legend of all axes, below them. 0 draws none.
    **options: of matplotlib.figure.Figure.subplots.

  Yields:
    The matplotlib.figure.Figure, and its axes [rows, columns].
  """
  import matplotlib
  from matplotlib import figure
  from matplotlib.backends import backend_agg

  paths = [epath.Path(path) for path in paths]
  # The same picture gives the same bytes: SVG has random names and a date.
  with matplotlib.rc_context(_STYLE | {"svg.hashsalt": paths[0].stem}):
    picture = figure.Figure(inches, dpi, layout="constrained")
    backend_agg.FigureCanvasAgg(picture)
    grid = picture.subplots(rows, columns, squeeze=False, **options)
    yield picture, grid
    if legend_columns and (lines := labelled(grid)):
      picture.legend(
        lines.values(),
        lines.keys(),
        ncols=legend_columns,
        loc="outside lower center",
      )
    for path in paths:
      data, is_svg = io.BytesIO(), path.suffix == ".svg"
      picture.savefig(
        data,
        format="svg" if is_svg else "png",
        dpi=dpi,
        metadata={"Date": None} if is_svg else {},
      )
      disk.write_atomically(path, data.getvalue())
