"""Read files that anybody may have written.

A run directory or a text may come from a stranger. So files are opened here:
only regular files, never a pipe or a device, which may wait or go on for ever.
Sizes are compared before contents are read, and JSON has known types.
"""

import dataclasses
import json
import os
import pathlib
import stat
from typing import IO, Any

from etils import epath

from aoarm_jax.config import errors

# JSON of this program is far smaller and flatter.
JSON_BYTES = 1 << 24
_JSON_VALUES = 1_000_000
_JSON_DEPTH = 32
_LONGEST_SHOWN = 80
_KINDS = (
  (stat.S_ISFIFO, "a pipe"),
  (stat.S_ISCHR, "a device"),
  (stat.S_ISBLK, "a device"),
  (stat.S_ISSOCK, "a socket"),
)


class ReadError(errors.UserError, ValueError):
  """A file that is not read, because of what it is or what it holds.

  Attributes:
    reason: the message without the path.
  """

  def __init__(self, path: os.PathLike | str, reason: str) -> None:
    """Write the message: the path and the reason."""
    super().__init__(f"{os.fspath(path)}: {reason}")
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Each:
  """The type of a JSON object whose values have one type; see `check`."""

  kind: Any


@dataclasses.dataclass(frozen=True)
class Count:
  """The type of a whole number from 0 to 2^63 - 1; see `check`."""


def open_file(
  path: epath.Path,
  inside: epath.Path | None = None,
  *,
  allows_pipes: bool = False,
) -> IO[bytes]:
  """Open a regular file for reading.

  Args:
    path: the file, local or in a bucket.
    inside: a folder. The file must lie below the folder, also after all links
      are followed. None allows any place.
    allows_pipes: whether the file may be a pipe, as in --input=<(command) of a
      shell.

  Raises:
    ReadError: the file is a pipe, a device or a socket, or a link out of the
      folder.
    OSError: the file cannot be opened.
  """
  if "://" in str(path):
    return path.open("rb")
  if inside is not None:
    real = pathlib.Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(inside)):
      raise ReadError(path, f"is a link out of {inside}; copy the file there")
  # To open some devices has an effect, so the type is compared before. Without
  # O_NONBLOCK, the opening of a pipe that takes its place would wait.
  status = os.stat(path)
  if allows_pipes and stat.S_ISFIFO(status.st_mode):
    return open(path, "rb")
  _check_regular(path, status)
  flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
  descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
  try:
    _check_regular(path, os.fstat(descriptor))
  except BaseException:
    os.close(descriptor)
    raise
  return os.fdopen(descriptor, "rb")


def _check_regular(path, status):
  """Raise for what is neither a regular file nor a folder, and for a folder."""
  if stat.S_ISREG(status.st_mode):
    return
  if stat.S_ISDIR(status.st_mode):
    raise ReadError(path, "is a folder, and a file is wanted")
  names = (name for is_kind, name in _KINDS if is_kind(status.st_mode))
  raise ReadError(
    path,
    f"is {next(names, 'no file')}, and only regular files are read; write its "
    "content into a file",
  )


def read(
  path: epath.Path, most: int, inside: epath.Path | None = None
) -> bytes:
  """Return the content of a small file.

  Args:
    path: the file.
    most: largest size in bytes.
    inside: see `open_file`.

  Raises:
    ReadError: the file is larger, or see `open_file`.
    OSError: the file cannot be read.
  """
  with open_file(path, inside) as file:
    # A file may grow, and some files of the system have no size.
    size = path.stat().length
    data = file.read(most + 1) if size <= most else b""
  if max(size, len(data)) > most:
    raise ReadError(
      path, f"has more than {most:,} bytes, the most that is read here"
    )
  return data


def parse(data: bytes | str, kind: Any = Any, times: int = 1) -> Any:
  """Return the value of JSON text after checks of its size and types.

  Args:
    data: the text.
    kind: see `check`. Any means that types are not checked.
    times: the limits of the size are so many times as large.

  Raises:
    ValueError: the text is no JSON, is too large or too deep, or has another
      type. The message is one line without the name of the file.
  """
  if len(data) > times * JSON_BYTES:
    raise ValueError(f"more than {times * JSON_BYTES:,} bytes of JSON")
  marks = (b",", b"[", b"{") if isinstance(data, bytes) else (",", "[", "{")
  # A value takes far more memory than its text, so values are counted first.
  most = times * _JSON_VALUES
  if sum(map(data.count, marks)) > most:  # type: ignore[arg-type]
    raise ValueError(f"more than {most:,} values of JSON")
  try:
    value = json.loads(data)
  except RecursionError:
    raise ValueError("JSON that is nested too deeply") from None
  except ValueError as error:
    raise ValueError(f"no JSON: {error}") from None
  _check_depth(value)
  if kind is not Any:
    check(value, kind)
  return value


def _check_depth(value):
  """Raise ValueError where JSON is nested too deeply for recursive code."""
  level = [value]
  for _ in range(_JSON_DEPTH):
    level = [
      child
      for node in level
      if isinstance(node, dict | list)
      for child in (node.values() if isinstance(node, dict) else node)
    ]
    if not level:
      return
  raise ValueError("JSON that is nested too deeply")


def check(value: Any, kind: Any, name: str = "") -> None:
  """Check the types of a value of JSON.

  Args:
    value: the value.
    kind: the type: int, str, bool, dict, list or None; float also takes whole
      numbers; Count(); a tuple of alternatives; Each(kind) of the values of an
      object; [kind] of the items of a list; or {name: kind} of an object that
      may have other names, too. A name that ends with "?" may be absent.
    name: the name of the value, for the message.

  Raises:
    ValueError: the value has another type. The message names the value.
  """
  match kind:
    case Each():
      check(value, dict, name)
      for key, item in value.items():
        check(item, kind.kind, _joined(name, key))
    case dict():
      check(value, dict, name)
      for key, item_kind in kind.items():
        key, is_optional = key.removesuffix("?"), key.endswith("?")
        if key in value:
          check(value[key], item_kind, _joined(name, key))
        elif not is_optional:
          raise ValueError(f"{_joined(name, key)} is missing")
    case list():
      check(value, list, name)
      for i, item in enumerate(value):
        check(item, kind[0], f"{name}[{i}]")
    case _ if not _is(value, kind):
      raise ValueError(
        f"{name or 'it'} is {shown(value)}, and {_words(kind)} is wanted"
      )


def _joined(name, key):
  """Return the path of a value for messages."""
  return f"{name}.{shown_name(key)}" if name else shown_name(key)


def _is(value, kind):
  """Return whether a value has a plain type; see `check`."""
  if isinstance(kind, tuple):
    return any(_is(value, alternative) for alternative in kind)
  is_whole = type(value) is int and abs(value) < 2**63
  if isinstance(kind, Count):
    return is_whole and value >= 0
  if kind is float:
    return is_whole or type(value) is float
  return is_whole if kind is int else type(value) is (kind or type(None))


def _words(kind):
  """Return the name of a plain type for people."""
  if isinstance(kind, Count):
    return "a whole number from 0"
  if isinstance(kind, tuple):
    return " or ".join(map(_words, kind))
  return {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    None: "null",
  }[kind]


def shown(value: Any) -> str:
  """Return the value as Python writes it, shortened for a message."""
  text, most = repr(value), 2 * _LONGEST_SHOWN
  return text if len(text) <= most else f"{text[:most]}..."


def shown_name(name: str) -> str:
  """Return a name for a message: as it is if it is one, else as `shown`."""
  plain = name.replace("_", "").replace("-", "").isalnum()
  return name if plain and len(name) <= _LONGEST_SHOWN else shown(name)
