"""metrics.jsonl: the measurements of a run, one JSON object per line."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.runs import disk

FILE = "metrics.jsonl"

# The types of a record of metrics.jsonl, see reading.check.
_RECORD = {
  "step": reading.Count(),
  "kind": str,
  "estimator?": str,
  "loss_nats_per_token?": (float, None),
  "bits_per_char?": (float, None),
  "bits_per_byte?": (float, None),
  "bits_per_token?": (float, None),
  "slot_curve_bits?": [(float, None)],
}
_LONGEST_RECORD = 1 << 22  # Bytes of a line of metrics.jsonl.
# Object stores cannot append, so the file is rewritten at this interval.
_REMOTE_FLUSH_SECONDS = 30.0


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl in order; [] if there is no file.

  A partial last line, left by a killed process, is skipped. Any other line that
  is no record is skipped with a warning.

  Raises:
    reading.ReadError: metrics.jsonl is no regular file.
  """
  path = epath.Path(workdir) / FILE
  if not path.exists():
    return []
  records: list[dict[str, Any]] = []
  problem = ""
  with reading.open_file(path) as file:
    number = 0
    while line := file.readline(_LONGEST_RECORD + 1):
      number += 1
      if problem:
        logging.warning("%s, line %s", path, problem)
        problem = ""
      if len(line) > _LONGEST_RECORD:
        logging.warning(
          "%s, line %d has more than %d bytes; nothing from there is read",
          path,
          number,
          _LONGEST_RECORD,
        )
        break
      try:
        records.append(reading.parse(line, _RECORD))
      except ValueError as error:  # Unicode errors too.
        problem = f"{number} is left out: {error}"
  return records


class Tracker(Protocol):
  """A place to which metrics go besides metrics.jsonl; see tracking.py."""

  def write(self, record: Mapping[str, Any]) -> None:
    """Takes a record of metrics.jsonl."""

  def close(self, failed: bool = False) -> None:
    """Sends what is pending, and whether the run ends with an error."""


class Writer:
  """Appends records to metrics.jsonl, and gives them to trackers.

  A line is a strict JSON object: {"step": n, "kind": "train" | "valid", ...}.
  Values that are not finite are written as null. Only the run that owns the
  folder may use it: at its start it drops the records that it will write again.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    start_step: int,
    primary: bool,
    trackers: Sequence[Tracker] = (),
  ):
    """Opens the files.

    Args:
      workdir: the run directory, local or gs://.
      start_step: the step from which the run resumes. 0 begins a new file.
        Otherwise a partial last line is dropped. The records of later steps are
        dropped too: they are left from a run that was killed after its last
        checkpoint.
      primary: whether this is the primary process; the others write nothing.
      trackers: are given every record that is written, and closed in the end.

    Raises:
      ValueError: metrics.jsonl is damaged before its last line.
    """
    self._path = epath.Path(workdir) / FILE
    self._primary = primary
    self._closed = False
    self._file = None
    self._trackers = trackers
    if not primary:
      return
    records = read(workdir) if start_step > 0 else []
    kept = [r for r in records if r["step"] <= start_step]
    if len(kept) < len(records):
      logging.info(
        "%s: dropped %d records after step %d, to be written again",
        FILE,
        len(records) - len(kept),
        start_step,
      )
    # The validation of the step from which the run resumes may run twice.
    self._held = {_key(r) for r in kept if r["step"] == start_step}
    self._lines = [json.dumps(r) + "\n" for r in kept]
    self._rewrite()
    if disk.is_local(self._path):
      self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

  def write(self, step: int, kind: str, **values: Any) -> None:
    """Writes one record at once, or in a gs:// folder within half a minute.

    Args:
      step: optimizer steps done.
      kind: "train" or "valid".
      **values: floats, ints, strings, None, arrays, or flat lists of floats.

    Raises:
      TypeError: a value has another type; names the value.
      ValueError: the writer is closed.
    """
    if not self._primary:
      return
    if self._closed:
      raise ValueError(f"{self._path} is closed: nothing more can be written")
    record: dict[str, Any] = {"step": int(step), "kind": kind}
    record |= {name: _plain(name, value) for name, value in values.items()}
    if _key(record) in self._held:
      return
    line = json.dumps(record, allow_nan=False) + "\n"
    if self._file is not None:
      with disk.naming(self._path):
        self._file.write(line)
        self._file.flush()
    else:
      self._lines.append(line)
      if time.monotonic() - self._rewritten > _REMOTE_FLUSH_SECONDS:
        self._rewrite()
    for tracker in self._trackers:
      tracker.write(record)

  def _rewrite(self):
    disk.write_atomically(self._path, "".join(self._lines))
    self._rewritten = time.monotonic()

  def close(self, failed: bool = False) -> None:
    """Writes pending records and closes the files; may be called again.

    Args:
      failed: whether the run ends with an error.
    """
    if not self._primary or self._closed:
      return
    self._closed = True
    if self._file is not None:
      with disk.naming(self._path):
        self._file.close()
    else:
      self._rewrite()
    for tracker in self._trackers:
      tracker.close(failed)

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close(failed=exc_info[0] is not None)


def _key(record):
  return record["step"], record.get("kind"), record.get("estimator")


def _plain(name, value):
  """Returns a value of JSON: arrays become lists, and NaN and inf None."""
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    value = np.asarray(value).tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(name, item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (bool, int, str)):
    return value
  raise TypeError(
    f"metric {name}: a {type(value).__name__}; give a number, a string or a "
    "list of numbers"
  )
