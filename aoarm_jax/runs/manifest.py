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
from collections.abc import Callable
from typing import Any

from absl import logging
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
# Mark in the name of a save that is running or was killed.
_ORBAX = ".orbax-checkpoint-tmp"
_CHUNK_BYTES = 1 << 22
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
_LOOKS = 20  # Times that vanished steps make a reader look again.
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


class Steps:
  """The steps in one directory.

  Only `delete`, `clean` and `retain` change files. All other methods only read.

  Attributes:
    directory: folder of the steps. It need not exist.
  """

  def __init__(self, directory: epath.Path) -> None:
    self.directory = directory

  def at(self, step: int) -> epath.Path:
    """Return the folder of a step."""
    return self.directory / str(int(step))

  def folders(self) -> list[int]:
    """Return the steps that have a folder, complete or not, ascending."""
    if not self.directory.is_dir():
      return []
    # A link whose folder is gone is no step, and a file is no step.
    names = [path.name for path in self.directory.iterdir() if path.is_dir()]
    return sorted(int(n) for n in names if _NUMBER.fullmatch(n))

  def finished(self) -> list[int]:
    """Return the steps that have a manifest, ascending."""
    return [step for step in self.folders() if present(self.at(step))]

  def record(self, step: int) -> dict[str, Any]:
    """Return the record in a step's manifest.

    Raises:
      BrokenError: the manifest is missing, or is not what was written.
      CheckpointError: the manifest has another format version.
    """
    record = read(self.at(step))
    version = record["format_version"]
    if version != FORMAT_VERSION:
      raise CheckpointError(
        f"checkpoint step {step} in {self.directory} has format version "
        f"{version}, this code reads version {FORMAT_VERSION}: use the "
        "release that wrote it, or start in another directory"
      )
    try:
      reading.check(record, _RECORD)
    except ValueError as error:
      raise BrokenError(f"{NAME}: {error}") from None
    if record["step"] != step:
      raise BrokenError(f"{NAME}: is of step {record['step']}")
    return record

  def verified(self, step: int) -> Saved:
    """Return a step after comparing every file with the manifest.

    Raises:
      BrokenError: a file is missing, or is not what was written.
      CheckpointError: see `record`.
    """
    verify(self.at(step), self.record(step))
    return self.unverified(step)

  def unverified(self, step: int) -> Saved:
    """Return a step as its manifest describes it, without reading its files.

    Raises:
      BrokenError, CheckpointError: see `record`.
    """
    record = self.record(step)
    return Saved(
      step=record["step"],
      config_json=record["config"],
      data_state=record["data_state"],
      metric=record["metric"],
      parts=frozenset(name.partition("/")[0] for name in record["leaves"]),
      digest=digest(record["files"]),
    )

  def check_leaves(self, step: int, wanted: dict[str, str]) -> None:
    """Check that the leaves of a state match the saved leaves.

    A whole top-level part may be left out, but nothing inside a part.

    Args:
      step: the step to compare with.
      wanted: {"part/name": "float32[3,7]"} of the state asked for.

    Raises:
      CheckpointError: a leaf differs; names the first one.
      BrokenError: see `record`.
    """
    saved = self.record(step)["leaves"]
    parts = {name.partition("/")[0] for name in wanted}
    in_parts = [name for name in saved if name.partition("/")[0] in parts]
    for name in [*wanted, *in_parts]:
      have, want = saved.get(name, "absent"), wanted.get(name, "absent")
      if have != want:
        advice = "use the configuration saved there"
        if have.partition("[")[2] == want.partition("[")[2] != "":
          # The config decides shapes, and no types.
          advice = (
            "the types of a state are fixed, so another version of this "
            "program wrote it, or one with JAX_ENABLE_X64 or "
            "JAX_DEFAULT_PRNG_IMPL set: use that one, or start in another "
            "directory"
          )
        raise CheckpointError(
          f"leaf {name} is {have} in checkpoint {self.at(step)} but {want} in "
          f"the state asked for: {advice}"
        )

  def newest(self) -> Saved | None:
    """Return the newest complete step, see `checkpoint.Checkpoints.newest`."""
    return self._first_whole(lambda: self.folders()[::-1])

  def best(self) -> Saved | None:
    """Return the step of lowest metric, see `checkpoint.Checkpoints.best`."""
    return self._first_whole(self._by_metric)

  def delete(self, step: int) -> None:
    """Delete a step with all its files."""
    if is_link(self.at(step)):
      self.at(step).unlink()  # What it leads to belongs to somebody else.
      return
    # The manifest goes first, so that half a step never counts as a checkpoint.
    (self.at(step) / NAME).unlink(missing_ok=True)
    self.at(step).rmtree()

  def retain(self, saved_step: int, keep_last: int, keep_best: int) -> None:
    """Delete the steps that need not be kept now that `saved_step` is complete.

    Steps after `saved_step` are neither deleted nor counted. They are broken,
    and the run resumed from an earlier step.

    Args:
      saved_step: the step that was just saved.
      keep_last: number of newest steps to keep, at least 1.
      keep_best: number of steps with the lowest metric to keep in addition.
    """
    older = [step for step in self.finished() if step <= saved_step]
    best = self._by_metric()[:keep_best] if keep_best else []
    for step in older[:-keep_last]:
      if step not in best:
        self.delete(step)

  def remains(self) -> list[epath.Path]:
    """Return the folders of killed, failed or running saves."""
    if not self.directory.is_dir():
      return []
    unfinished = [
      self.at(step) for step in self.folders() if not present(self.at(step))
    ]
    marked = ((p, p.name.partition(_ORBAX)) for p in self.directory.iterdir())
    return unfinished + [
      path for path, (number, mark, _) in marked if mark and number.isdecimal()
    ]

  def clean(self) -> None:
    """Delete the remains of killed or failed saves.

    Raises:
      OSError: some could not be deleted; all were tried.
    """
    problems = []
    for path in self.remains():
      try:
        path.unlink() if is_link(path) else path.rmtree()
      except FileNotFoundError:
        pass
      except OSError as error:
        problems.append(error)
    if problems:
      raise problems[0]

  def _by_metric(self):
    """Return the steps whose metric is a number, lowest metric first."""
    metrics = []
    for step in self.finished():
      try:
        metric = self.record(step)["metric"]
      except BrokenError as error:
        self._warn(step, f"{error}; its metric is unknown")
        continue
      if metric is not None and not math.isnan(metric):
        metrics.append((metric, step))
    return [step for _, step in sorted(metrics)]

  def _first_whole(self, candidates: Callable[[], list[int]]) -> Saved | None:
    """Return the first of `candidates()` that verifies, or None.

    A warning names every broken step before it.

    Raises:
      CheckpointError: there are steps with a manifest, but none is complete.
    """
    problems: dict[int, BrokenError] = {}
    saved, looks = None, _LOOKS
    steps = candidates()
    while steps and saved is None:
      step = steps.pop(0)
      try:
        saved = self.verified(step)
      except BrokenError as error:
        if self.at(step).exists():
          problems[step] = error
          continue
        # A running training has just deleted the step, so look again.
        looks -= 1
        if not looks:
          raise CheckpointError(
            f"steps in {self.directory} vanish while they are read, {_LOOKS} "
            f"times, at last step {step}: {error}; end what deletes them"
          ) from None
        steps = [s for s in candidates() if s not in problems]
    if saved is None and any(present(self.at(step)) for step in problems):
      reasons = "; ".join(f"step {s}: {e}" for s, e in problems.items())
      raise CheckpointError(
        f"no checkpoint in {self.directory} is whole ({reasons}): restore that "
        "folder from a copy, or start in another directory"
      )
    used = f"using step {saved.step} instead" if saved else "there is no other"
    for step, problem in problems.items():
      self._warn(step, f"{problem}; {used}")
    return saved

  def _warn(self, step, what):
    logging.warning(
      "checkpoint step %d in %s is broken: %s", step, self.directory, what
    )


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
