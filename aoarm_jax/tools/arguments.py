"""The command lines of the tools: one parser, and the types of arguments.

A command line that cannot be is refused in one line.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Collection

import jax
from etils import epath

from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import meshes


def parser(module: str, description: str) -> argparse.ArgumentParser:
  """Returns a parser that shows an error without the usage before it.

  Args:
    module: name of a module of aoarm_jax, as in tools.scaling.
    description: the module's docstring.
  """
  return argparse.ArgumentParser(
    prog=f"python -m aoarm_jax.{module}",
    usage=argparse.SUPPRESS,
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def number(kind: type, low: float) -> Callable[[str], int | float]:
  """Returns the type of an argument that is a number of at least `low`.

  Args:
    kind: int or float.
    low: the smallest value.
  """

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


def several(
  kind: Callable[[str], object], choices: Collection = ()
) -> Callable[[str], list]:
  """Returns the type of an argument that lists values, separated by commas.

  Args:
    kind: the type of a value.
    choices: the values that are allowed; () allows all.
  """

  def read(text):
    values = [kind(word) for word in text.split(",")]
    for value in values:
      if choices and value not in choices:
        raise argparse.ArgumentTypeError(
          f"{value!r} is not one of {', '.join(map(str, choices))}"
        )
    return values

  return read


def pattern(text: str) -> re.Pattern:
  """The type of an argument that is a regular expression."""
  try:
    return re.compile(text)
  except re.error as error:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not a regular expression: {error}"
    ) from None


def place(text: str) -> epath.Path:
  """The type of an argument that names a file or a folder."""
  try:
    return paths.of(text, "")
  except config_lib.ConfigError as error:
    message = str(error).removeprefix("=")
    raise argparse.ArgumentTypeError(message) from None


def devices() -> list[jax.Device]:
  """Returns the devices, or ends the program in one line."""
  try:
    return meshes.all_devices()
  except config_lib.ConfigError as error:
    sys.exit(f"aoarm_jax: error: {error}")


def output(text: str) -> str:
  """The type of an argument that names a file to be written."""
  path = place(text)
  if not path.name or path.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r}: name a file, not a folder")
  # A whole file is renamed to its place, which would replace a device.
  if path.exists() and not os.path.isfile(path):
    raise argparse.ArgumentTypeError(
      f"{text!r}: is a device or a pipe; name a file"
    )
  # The nearest folder that exists. A bucket has no such folder.
  for folder in filter(os.path.exists, path.parents):
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
      raise argparse.ArgumentTypeError(
        f"{text!r}: {folder} is no folder that can be written to"
      )
    break
  return str(path)
