"""Command lines of the tools beside main.py, whose errors are one line."""

import argparse
import math
import os
from collections.abc import Callable

from etils import epath


def parser(module: str, description: str) -> argparse.ArgumentParser:
  """A parser that shows an error without the usage before it.

  Args:
    module: of aoarm_jax.tools, as in scaling.
    description: the module's docstring.
  """
  return argparse.ArgumentParser(
    prog=f"python -m aoarm_jax.tools.{module}",
    usage=argparse.SUPPRESS,
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def number(kind: type, low: float) -> Callable[[str], int | float]:
  """The type of an argument that is an int or float of at least `low`."""

  def read(text):
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not low <= value < math.inf:
      words = "a whole number" if kind is int else "a number"
      raise argparse.ArgumentTypeError(
        f"{text!r}: must be {words} of at least {low}"
      )
    return value

  return read


def output(text: str) -> str:
  """The type of an argument that names a file to be written."""
  path = epath.Path(text)
  if not path.name or path.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r}: name a file, not a folder")
  # Nearest first; of a bucket there are none.
  for folder in filter(os.path.exists, path.parents):
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
      raise argparse.ArgumentTypeError(
        f"{text!r}: {folder} is no folder that can be written to"
      )
    break
  return text
