"""Manifests, which record that a checkpoint step is complete.

This module handles files and no arrays. The array store does not notice a
flipped bit in its data, and does not always notice a truncated file. So each
step has a `manifest.json`, which is written last and atomically:

  {"record": {..., "files": {name: {"bytes": int, "blake2b": hex}}},
   "blake2b": hex digest of the record}

A step without a manifest is not a checkpoint. Paths are `etils.epath` paths, so
a bucket works like a folder.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from typing import Any

from etils import epath

from aoarm_jax.config import errors, reading
from aoarm_jax.runs import disk

# Version of the record and of the state's layout on disk. In every version the
# manifest must stay readable far enough to give its format_version.
FORMAT_VERSION = 1
NAME = "manifest.json"
# The types of a record, see reading.check. data_state has the values that this
# program's runs save.
_RECORD = {
  "format_version": int,
  "step": reading.Count(),
  "metric": (float, None),
  "config": str,
  "data_state": {
    "iterator?": {"next_batch": reading.Count()},
    "interval?": [
      {"loss": float, "learning_rate": float, "gradient_norm": float}
    ],
    "losses?": [float],
    "text?": reading.Each(str),
    "tokenizer?": str,
    "switches?": reading.Each((str, bool, int)),
  },
  "leaves": reading.Each(str),
  "files": reading.Each({"bytes": reading.Count(), "blake2b": str}),
}
_CHUNK_BYTES = 1 << 22
_DEPTH = 8  # Of folders in a step. Orbax makes two or three.
_LEAF = re.compile(r"[\w<>]+\[((?:\d{1,18}(?:,|(?=\])))*)\]$")
# Orbax describes arrays in files of some kB, and keeps a little spare room. The
# state of a tokenizer has some MB.
_MOST_BESIDE_ARRAYS = 1 << 25
_DIGEST_BYTES = 32


class CheckpointError(errors.UserError, RuntimeError):
  """An error of checkpoints: one line with the problem, its place, the fix."""


class BrokenError(Exception):
  """A file of a step differs from the file that was written.

  The message is "file: what is wrong".
  """


@dataclasses.dataclass(frozen=True)
class Saved:
  """A complete step, apart from its arrays.

  Attributes:
    step: optimizer steps taken.
    config_json: the configuration that was given to `Checkpoints.save`.
    data_state: the state of the data iterator that was given to `save`.
    metric: the number that `best` minimises; None if none was given.
    parts: names of the top-level parts of the state, such as "params".
    digest: sha256 of the sizes and checksums of the step's files, in hex.
  """

  step: int
  config_json: str
  data_state: dict[str, Any]
  metric: float | None
  parts: frozenset[str] = frozenset()
  digest: str = ""


def present(directory: epath.Path) -> bool:
  """Return whether a step's folder has a manifest; see also `verify`."""
  return (directory / NAME).exists()


def checksums(directory: epath.Path) -> dict[str, dict[str, Any]]:
  """Return the sizes and checksums of all files below a folder.

  Returns:
    {relative name: {"bytes": int, "blake2b": hex digest}}, without the
    manifest.
  """
  return {
    name: dict(zip(("bytes", "blake2b"), _digest(directory / name, directory)))
    for name in sorted(_names(directory))
  }


def digest(files: dict[str, Any]) -> str:
  """Return the sha256, in hex, that names the files of a step.

  Args:
    files: the sizes and checksums, as `checksums` returns them.
  """
  return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write(directory: epath.Path, record: dict[str, Any]) -> None:
  """Write or replace the manifest atomically.

  Args:
    directory: folder of the step.
    record: JSON values only; `record["files"]` is the result of `checksums`.
  """
  disk.write_atomically(directory / NAME, _encode(record))


def read(directory: epath.Path) -> dict[str, Any]:
  """Return the record in a folder's manifest, after checking its checksum.

  Raises:
    BrokenError: there is no manifest, or it is not what was written.
  """
  try:
    raw = reading.read(directory / NAME, reading.JSON_BYTES, inside=directory)
  except FileNotFoundError:
    raise BrokenError(f"{NAME}: missing (an interrupted save)") from None
  except OSError as error:
    raise BrokenError(f"{NAME}: {error.strerror or error}") from error
  except reading.ReadError as error:
    raise BrokenError(f"{NAME}: {error.reason}") from error
  try:
    record = reading.parse(raw, {"record": {"format_version": int}})["record"]
  except ValueError as error:
    raise BrokenError(
      f"{NAME}: {len(raw)} bytes that do not parse: {error}"
    ) from None
  # The bytes are compared, and not the values, so that every flipped bit is
  # noticed.
  if _encode(record) != raw:
    raise BrokenError(f"{NAME}: checksum differs")
  return record


def check(record: dict[str, Any]) -> None:
  """Check the types in a record of this format version.

  Raises:
    BrokenError: a value is missing or has another type.
  """
  try:
    reading.check(record, _RECORD)
  except ValueError as error:
    raise BrokenError(f"{NAME}: {error}") from None


def verify(directory: epath.Path, record: dict[str, Any]) -> None:
  """Compare every file of a step with its record.

  The files may come from a stranger. Only regular files inside the folder are
  opened. All sizes are compared before the first file is read.

  Args:
    directory: folder of the step.
    record: the record of the step's manifest.

  Raises:
    BrokenError: a file is missing, differs or is not in the record; names the
      first one.
  """
  files, name = record["files"], "the folder"
  _check_total(record)
  try:
    for name in _names(directory):
      hidden = name.rpartition("/")[2].startswith(".")
      if name not in files and not hidden:
        raise BrokenError(f"{name}: not in the manifest")
    for name, wanted in files.items():
      if not _is_relative(name):
        raise BrokenError(
          f"{reading.shown(name)}: not a name inside the folder"
        )
      # The size costs nothing, and its message tells more than the message of a
      # checksum.
      length = (directory / name).stat().length
      if length != wanted["bytes"]:
        raise BrokenError(f"{name}: {length} bytes, not {wanted['bytes']}")
    for name, wanted in files.items():
      if _digest(directory / name, directory)[1] != wanted["blake2b"]:
        raise BrokenError(f"{name}: checksum differs")
  except FileNotFoundError:
    raise BrokenError(f"{name}: missing") from None
  except OSError as error:
    raise BrokenError(f"{name}: {error.strerror or error}") from error
  except reading.ReadError as error:
    raise BrokenError(f"{name}: {error.reason}") from error


def _check_total(record):
  """Raise BrokenError where the files are far larger than the arrays."""
  arrays = 0
  for name, leaf in record["leaves"].items():
    match = _LEAF.match(leaf)
    if match is None:
      raise BrokenError(f"{NAME}: leaf {name} is {reading.shown(leaf)}")
    sizes = [int(size) for size in match[1].split(",") if size]
    # No number has more than 16 bytes, and a key of random numbers has as many.
    arrays += 16 * math.prod(sizes)
  total = sum(file["bytes"] for file in record["files"].values())
  if total > 2 * arrays + _MOST_BESIDE_ARRAYS:
    raise BrokenError(
      f"{NAME}: files of {total:,} bytes for arrays of {arrays:,} at most"
    )


def _is_relative(name):
  """Return whether a name of the record is one of a file in the folder."""
  parts = name.split("/")
  return not {"", ".", ".."} & {*parts} and not set(name) & {"\\", "\0", ":"}


def is_link(path: epath.Path) -> bool:
  """Return whether a local path is a symbolic link."""
  return "://" not in str(path) and os.path.islink(path)


def _encode(record):
  """Return the bytes of a manifest. A record has exactly one such encoding."""
  digest = _hasher()
  digest.update(json.dumps(record).encode())
  whole = {"record": record, "blake2b": digest.hexdigest()}
  return (json.dumps(whole, indent=1) + "\n").encode()


def _hasher():
  return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _digest(path, inside):
  """Return (size in bytes, checksum) of one regular file inside a folder."""
  digest, length = _hasher(), 0
  with reading.open_file(path, inside) as file:
    while chunk := file.read(_CHUNK_BYTES):
      digest.update(chunk)
      length += len(chunk)
  return length, digest.hexdigest()


def _names(directory, prefix=""):
  """Yield the relative names of all files below, without the manifest."""
  if prefix.count("/") > _DEPTH:
    raise BrokenError(f"{prefix}: folders below folders without end")
  for path in directory.iterdir():
    if path.is_dir() and not is_link(path):
      yield from _names(path, f"{prefix}{path.name}/")
    elif prefix or path.name != NAME:
      yield prefix + path.name
