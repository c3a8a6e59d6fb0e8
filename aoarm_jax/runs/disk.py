"""Files of a run are written here: whole at any moment, or not at all."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.runs import text


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file that is whole at any moment: temporary file, then rename.

  Args:
    path: of the file, local or in a bucket. Missing folders are made.
    content: of the whole file.

  Raises:
    OSError: the file cannot be written; names `path`.
  """
  path = epath.Path(path)
  data = content.encode() if isinstance(content, str) else content
  path.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(path):
    path.write_bytes(data)  # Object stores show an object when it is complete.
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with naming(path):
    try:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # A process of the same number was killed.
      # A link of that name, which somebody else made, is not followed.
      with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except OSError:
      with contextlib.suppress(OSError):  # A read-only folder has no such file.
        temporary.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
  """Names the file in errors, which may name none or a temporary one."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error


def attempt(write: Callable[[], object]) -> bool:
  """Writes a file beside an answer that the user has got already.

  A failure is logged, and the program goes on.

  Args:
    write: function that writes the file.

  Returns:
    True if the file was written.
  """
  try:
    write()
  except OSError as error:
    why = error.strerror or text.first_line(error)
    where = f"{error.filename}: " if error.filename else ""
    logging.warning("not written: %s%s", where, why)
    return False
  return True


def is_local(path: epath.PathLike) -> bool:
  """Returns whether a path is no bucket, such as gs://..."""
  return "://" not in str(path)


def to_json(value: Any, indent: int | None = None) -> str:
  """Returns strict JSON of dicts, lists and numbers: NaN and inf are null.

  Args:
    value: nested dicts, lists and tuples of numbers, strings, bools and None.
    indent: number of spaces of a level; None gives one line.
  """
  return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
  """Returns the value with None in place of every NaN and inf."""
  if isinstance(value, dict):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
