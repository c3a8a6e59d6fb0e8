"""Manifests: which checkpoint steps are whole. Files only, no arrays.

The array store does not notice a flipped bit in its data, and sometimes not a
file that was cut short. So each step has a `manifest.json`, which is written
last and atomically:

  {"record": {..., "files": {name: {"bytes": int, "blake2b": hex}}},
   "blake2b": hex digest of the record}

A step without it is not a checkpoint. Paths are `etils.epath` paths, so a
bucket works like a folder.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import errors
from aoarm_jax.runs import directory as run_dir

# Version of the record and of the state's layout on disk. Every later version
# must be able to read the format_version of a manifest.
FORMAT_VERSION = 1
NAME = "manifest.json"
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"  # A save in flight, or killed.
_CHUNK_BYTES = 1 << 22
_DIGEST_BYTES = 32


class CheckpointError(errors.UserError, RuntimeError):
  """One line: what is wrong, where, and how to mend it."""


class BrokenError(Exception):
  """A file of the step is not what was written: "file: what is wrong"."""


@dataclasses.dataclass(frozen=True)
class Saved:
  """A whole step: everything but its arrays.

  Attributes:
    step: optimizer steps taken.
    config_json: the run's configuration, as given to `Checkpoints.save`.
    data_state: the data iterator's state, as given.
    metric: the value that `best` minimises, or None if there was none.
  """

  step: int
  config_json: str
  data_state: dict[str, Any]
  metric: float | None


class Steps:
  """The steps in one directory, which need not exist.

  `delete`, `clean` and `retain` change files; the rest only reads.
  """

  def __init__(self, directory: epath.Path):
    self.directory = directory

  def at(self, step: int) -> epath.Path:
    """The step's folder."""
    return self.directory / str(int(step))

  def folders(self) -> list[int]:
    """Numbers of all step folders, whole or not, ascending."""
    if not self.directory.is_dir():
      return []
    names = [path.name for path in self.directory.iterdir()]
    return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

  def finished(self) -> list[int]:
    """Steps that have a manifest, ascending."""
    return [step for step in self.folders() if present(self.at(step))]

  def record(self, step: int) -> dict:
    """The manifest's record.

    Raises:
      BrokenError: the manifest is missing or not what was written.
      CheckpointError: it is of another format version.
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
    """The step, if every file is what was written; raises as `record`."""
    verify(self.at(step), self.record(step))
    return self.unverified(step)

  def unverified(self, step: int) -> Saved:
    """The step as its manifest has it; raises as `record`."""
    record = self.record(step)
    return Saved(
      step=record["step"],
      config_json=record["config"],
      data_state=record["data_state"],
      metric=record["metric"],
    )

  def check_leaves(self, step: int, wanted: dict[str, str]) -> None:
    """Compares leaves {"part/name": "float32[3,7]"} with those saved.

    Raises:
      CheckpointError: at the first that differs. A whole part may be left
        out, but nothing inside a part.
      BrokenError: as `record`.
    """
    saved = self.record(step)["leaves"]
    parts = {name.partition("/")[0] for name in wanted}
    inside = [name for name in saved if name.partition("/")[0] in parts]
    for name in [*wanted, *inside]:
      have, want = saved.get(name, "absent"), wanted.get(name, "absent")
      if have != want:
        raise CheckpointError(
          f"leaf {name} is {have} in checkpoint {self.at(step)} but {want} in "
          "the state asked for: use the configuration saved there"
        )

  def newest(self) -> Saved | None:
    """See `checkpoint.Checkpoints.newest`."""
    return self._first_whole(lambda: self.folders()[::-1])

  def best(self) -> Saved | None:
    """See `checkpoint.Checkpoints.best`."""
    return self._first_whole(self._by_metric)

  def delete(self, step: int) -> None:
    # The manifest goes first: half a step must not look like a checkpoint.
    (self.at(step) / NAME).unlink(missing_ok=True)
    self.at(step).rmtree()

  def retain(self, saved_step: int, keep_last: int, keep_best: int) -> None:
    """Deletes what need not be kept now that `saved_step` is whole.

    Newer steps are left alone and do not count: they stand there because they
    are broken and the run resumed from before them.
    """
    older = [step for step in self.finished() if step <= saved_step]
    best = self._by_metric()[:keep_best] if keep_best else []
    for step in older[:-keep_last]:
      if step not in best:
        self.delete(step)

  def clean(self) -> None:
    """Removes what killed or failed saves left behind."""
    for step in self.folders():
      if not present(self.at(step)):
        self.delete(step)
    for path in self.directory.iterdir():
      number, mark, _ = path.name.partition(_ORBAX_TEMPORARY)
      if mark and number.isdecimal():
        path.rmtree()

  def _by_metric(self):
    """Steps that have a comparable metric, lowest metric first."""
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

  def _first_whole(self, candidates):
    """The first of `candidates()` that verifies; reports those before it."""
    problems, saved = {}, None
    steps = candidates()
    while steps and saved is None:
      step = steps.pop(0)
      try:
        saved = self.verified(step)
      except BrokenError as error:
        if self.at(step).exists():
          problems[step] = error
        else:  # The run that goes on has just deleted it; look again.
          steps = [s for s in candidates() if s not in problems]
    if saved is None and any(present(self.at(step)) for step in problems):
      found = "; ".join(f"step {s}: {e}" for s, e in problems.items())
      raise CheckpointError(
        f"no checkpoint in {self.directory} is whole ({found}): restore that "
        "folder from a copy, or start in another directory"
      )
    used = f"using step {saved.step} instead" if saved else "there is no other"
    for step, error in problems.items():
      self._warn(step, f"{error}; {used}")
    return saved

  def _warn(self, step, what):
    logging.warning(
      "checkpoint step %d in %s is broken: %s", step, self.directory, what
    )


def present(directory: epath.Path) -> bool:
  """Whether the step claims to be whole; `verify` finds out if it is."""
  return (directory / NAME).exists()


def checksums(directory: epath.Path) -> dict[str, dict]:
  """Sizes (bytes) and checksums of all files below, by relative name."""
  return {
    name: dict(zip(("bytes", "blake2b"), _digest(directory / name)))
    for name in sorted(_names(directory))
  }


def write(directory: epath.Path, record: dict) -> None:
  """Writes or replaces the manifest, in one step as seen from outside.

  Args:
    directory: the step's folder.
    record: JSON values only; `record["files"]` as `checksums` returns it.
  """
  run_dir.write_atomically(directory / NAME, _encode(record))


def read(directory: epath.Path) -> dict:
  """The record, if the manifest itself is whole.

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
  # Bytes are compared, not values: so every flipped bit is noticed.
  if _encode(record) != raw:
    raise BrokenError(f"{NAME}: checksum differs")
  return record


def verify(directory: epath.Path, record: dict) -> None:
  """Reads every file that the record lists and compares.

  Raises:
    BrokenError: naming the first file that is missing or different.
  """
  for name, wanted in record["files"].items():
    try:
      # The size comes first: it costs nothing and says more than a checksum.
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
  """The one spelling of a manifest in bytes."""
  digest = _hasher()
  digest.update(json.dumps(record).encode())
  whole = {"record": record, "blake2b": digest.hexdigest()}
  return (json.dumps(whole, indent=1) + "\n").encode()


def _hasher():
  return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _digest(path):
  """(size in bytes, checksum) of one file."""
  digest, length = _hasher(), 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      digest.update(chunk)
      length += len(chunk)
  return length, digest.hexdigest()


def _names(directory, prefix=""):
  """Yields the relative names of all files below, the manifest left out."""
  for path in directory.iterdir():
    if path.is_dir():
      yield from _names(path, f"{prefix}{path.name}/")
    elif prefix or path.name != NAME:
      yield prefix + path.name
