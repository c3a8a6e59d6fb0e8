"""Long texts in a temporary file that all processes of a run map.

A text in memory would be copied into every loader process. A mapped file is in
memory once, and the system may drop its pages when memory is short.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
from absl import logging

# Bytes. A shorter text stays in memory.
_LONG = 1 << 26


class _Map(mmap.mmap):
  """A map that knows its file, which has no name and ends with its last user.

  Attributes:
    descriptor: the open file.
  """

  descriptor: int


def _map(file: IO[bytes], dtype: np.dtype) -> np.ndarray:
  """Return the numbers in an open file, which may then be closed: [n]."""
  mapped = _Map(file.fileno(), 0, access=mmap.ACCESS_READ)
  mapped.descriptor = os.dup(file.fileno())
  weakref.finalize(mapped, os.close, mapped.descriptor)
  return np.frombuffer(mapped, dtype)


def collect(chunks: Iterable[np.ndarray]) -> np.ndarray:
  """Return chunks of a text as one array, which is a map if it is long.

  Args:
    chunks: unsigned integers [n] each, all of one dtype.

  Returns:
    The tokens [n] of this dtype, read-only.
  """
  held: list[np.ndarray] = []
  file, size, is_full = None, 0, False
  for chunk in chunks:
    held.append(chunk)
    size += chunk.nbytes
    if size < _LONG or is_full:
      continue
    try:
      file = file or tempfile.TemporaryFile()  # noqa: SIM115
      while held:
        file.write(np.ascontiguousarray(held[0]).data)
        file.flush()
        held.pop(0)
    except OSError as error:
      logging.warning(
        "%s: %s: the text stays in memory instead, and every loader process "
        "gets a copy; TMPDIR names another folder",
        tempfile.tempdir or "there is no folder for temporary files",
        error.strerror,
      )
      is_full = True
      if file:
        written = size - sum(piece.nbytes for piece in held)
        file.seek(0)
        held.insert(0, np.frombuffer(file.read(written), chunk.dtype))
        file.close()
        file = None
  if file is None:
    tokens = held[0] if len(held) == 1 else _concatenated(held)
    tokens.flags.writeable = False
    return tokens
  with file:
    return _map(file, chunk.dtype)


def _concatenated(held):
  return np.concatenate(held) if held else np.empty(0, np.uint8)


def packed(tokens: np.ndarray) -> Any:
  """Return what another process of this machine makes the array from.

  Args:
    tokens: an array of `collect` or a part of one.

  Returns:
    (path, offset in bytes, length, dtype) of a mapped file, or the array
    itself; both can be pickled. The path is good while this process has the
    array.
  """
  base: Any = tokens
  while base is not None and not isinstance(base, _Map):
    base = base.obj if isinstance(base, memoryview) else _base(base)
  if base is None or not len(tokens):
    return tokens
  path = f"/proc/{os.getpid()}/fd/{base.descriptor}"
  if not os.path.exists(path):  # Other systems than Linux have no such names.
    return tokens
  offset = _address(tokens) - _address(np.frombuffer(base, np.uint8))
  return path, offset, len(tokens), tokens.dtype.str


def unpacked(value: Any) -> np.ndarray:
  """Return the array of what `packed` returned, here or in another process."""
  if isinstance(value, np.ndarray):
    return value
  path, offset, length, name = value
  dtype = np.dtype(name)
  with open(path, "rb") as file:
    start = offset // dtype.itemsize
    return _map(file, dtype)[start : start + length]


def _base(array):
  return getattr(array, "base", None)


def _address(array):
  return array.__array_interface__["data"][0]
