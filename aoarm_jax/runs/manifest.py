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
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import errors
from aoarm_jax.runs import directory as run_dir

# Version of the record and of the state's layout on disk. In every version the
# manifest must stay readable far enough to give its format_version.
FORMAT_VERSION = 1
NAME = "manifest.json"
# Mark in the name of a save that is running or was killed.
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
_CHUNK_BYTES = 1 << 22
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
  """

  step: int
  config_json: str
  data_state: dict[str, Any]
  metric: float | None


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
    names = [path.name for path in self.directory.iterdir()]
    return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

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

  def clean(self) -> None:
    """Delete the remains of killed or failed saves."""
    for step in self.folders():
      if not present(self.at(step)):
        self.delete(step)
    for path in self.directory.iterdir():
      number, mark, _ = path.name.partition(_ORBAX_TEMPORARY)
      if mark and number.isdecimal():
        path.rmtree()

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
    saved = None
    steps = candidates()
    while steps and saved is None:
      step = steps.pop(0)
      try:
        saved = self.verified(step)
      except BrokenError as error:
        if self.at(step).exists():
          problems[step] = error
        else:
          # A running training has just deleted the step, so look again.
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
    name: dict(zip(("bytes", "blake2b"), _digest(directory / name)))
    for name in sorted(_names(directory))
  }


def write(directory: epath.Path, record: dict[str, Any]) -> None:
  """Write or replace the manifest atomically.

  Args:
    directory: folder of the step.
    record: JSON values only; `record["files"]` is the result of `checksums`.
  """
  run_dir.write_atomically(directory / NAME, _encode(record))


def read(directory: epath.Path) -> dict[str, Any]:
  """Return the record in a folder's manifest, after checking its checksum.

  Raises:
    BrokenError: there is no manifest, or it is not what was written.
  """
  try:
    raw = (directory / NAME).read_bytes()
  except FileNotFoundError:
    raise BrokenError(f"{NAME}: missing (an interrupted save)") from None
  except OSError as error:
    raise BrokenError(f"{NAME}: {error.strerror or error}") from error
  try:
    record = json.loads(raw)["record"]
  except (ValueError, KeyError, TypeError):
    raise BrokenError(f"{NAME}: {len(raw)} bytes that do not parse") from None
  # The bytes are compared, and not the values, so that every flipped bit is
  # noticed.
  if _encode(record) != raw:
    raise BrokenError(f"{NAME}: checksum differs")
  return record


def verify(directory: epath.Path, record: dict[str, Any]) -> None:
  """Read every file that the record lists and compare it with the record.

  Args:
    directory: folder of the step.
    record: the record of the step's manifest.

  Raises:
    BrokenError: a file is missing or differs; names the first one.
  """
  for name, wanted in record["files"].items():
    try:
      # The size comes first, since it costs nothing and its message tells more
      # than the message of a checksum.
      length = (directory / name).stat().length
      if length != wanted["bytes"]:
        raise BrokenError(f"{name}: {length} bytes, not {wanted['bytes']}")
      if _digest(directory / name)[1] != wanted["blake2b"]:
        raise BrokenError(f"{name}: checksum differs")
    except FileNotFoundError:
      raise BrokenError(f"{name}: missing") from None
    except OSError as error:
      raise BrokenError(f"{name}: {error.strerror or error}") from error


def _encode(record):
  """Return the bytes of a manifest. A record has exactly one such encoding."""
  digest = _hasher()
  digest.update(json.dumps(record).encode())
  whole = {"record": record, "blake2b": digest.hexdigest()}
  return (json.dumps(whole, indent=1) + "\n").encode()


def _hasher():
  return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _digest(path):
  """Return (size in bytes, checksum) of one file."""
  digest, length = _hasher(), 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      digest.update(chunk)
      length += len(chunk)
  return length, digest.hexdigest()


def _names(directory, prefix=""):
  """Yield the relative names of all files below, without the manifest."""
  for path in directory.iterdir():
    if path.is_dir():
      yield from _names(path, f"{prefix}{path.name}/")
    elif prefix or path.name != NAME:
      yield prefix + path.name
