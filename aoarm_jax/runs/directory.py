"""The files that make a run directory explain itself.

config.json      the whole configuration of the last start
command.txt      the time and the command of every start
versions.json    interpreter, libraries, devices, git commit
parameters.txt   path, shape, dtype and count of every parameter
metrics.jsonl    measurements, one JSON object per line
"""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config
from aoarm_jax.devices import neighbours
from aoarm_jax.runs import text

fcntl: types.ModuleType | None
try:
  import fcntl
except ImportError:  # Windows.
  fcntl = None

METRICS_FILE = "metrics.jsonl"

# Training writes these into a run directory, besides the lock.
_FILES = (
  *("config.json", "parameters.txt", "versions.json", "command.txt"),
  *(METRICS_FILE, "loss.png", "slot_curve.png", ".shared", "start.json"),
  "wandb.txt",
)
_FOLDERS = ("checkpoints", "samples")
LIBRARIES = (
  "aoarm_jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)
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
_MOST_COMMANDS = 1 << 24  # Bytes of command.txt.
# Object stores cannot append, so the file is rewritten at this interval.
_REMOTE_FLUSH_SECONDS = 30.0


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
  if not _is_local(path):
    path.write_bytes(data)  # Object stores show an object when it is complete.
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with _naming(path):
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
def _naming(path: epath.PathLike) -> Iterator[None]:
  """Names the file in errors, which may name none or a temporary one."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error


def check_workdir(workdir: epath.PathLike, flag: str = "--workdir") -> None:
  """Refuses a run directory that is a file, or lies below one.

  Args:
    workdir: the folder.
    flag: the flag that names it, for messages.

  Raises:
    config.ConfigError: names the file.
  """
  workdir = epath.Path(workdir)
  if not _is_local(workdir):
    return
  for path in (workdir, *workdir.parents):
    if path.exists() and not path.is_dir():
      raise config.ConfigError(
        f"{flag}={workdir}: {path} is a file; name a folder"
      )


def check_places(workdir: epath.PathLike) -> None:
  """Refuses a run directory where a folder is in the place of a file.

  Training would notice some of these places only after many steps.

  Raises:
    config.ConfigError: names the place.
  """
  workdir = epath.Path(workdir)
  if not _is_local(workdir):
    return
  kinds = dict.fromkeys(_FILES, False) | dict.fromkeys(_FOLDERS, True)
  for name, is_folder in kinds.items():
    path = workdir / name
    if path.exists() and path.is_dir() != is_folder:
      kind, wanted = "a folder", "a file"
      if is_folder:
        kind, wanted = wanted, kind
      raise config.ConfigError(
        f"{path}: is {kind}, and training writes {wanted} of this name; move "
        "it away, or choose another --workdir"
      )


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


@contextlib.contextmanager
def lock(
  workdir: epath.PathLike, flag: str = "--workdir", what: str = "training"
) -> Iterator[Callable[[], bool]]:
  """Keeps a second training run out of a local run directory.

  The lock ends with the process, even if the process is killed. Nothing is
  locked where the folder is remote or cannot be written to, or the system has
  no such locks.

  Args:
    workdir: the folder, which is made if absent.
    flag: the flag that names it, for messages.
    what: what the process does there, for messages.

  Yields:
    A function that returns whether the folder still stands at its path. Where
    nothing is locked the function always returns True.

  Raises:
    config.ConfigError: another process holds the lock; names the process.
    OSError: the lock cannot be written; names its file.
  """
  workdir = epath.Path(workdir)
  if fcntl is None or not _is_local(workdir) or neighbours.process() != 0:
    yield lambda: True
    return
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / ".lock"
  try:
    # A link or a pipe of this name is not opened for writing.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
  except OSError as error:
    kinds = {errno.ELOOP: "a link", errno.EISDIR: "a folder"}
    if kind := kinds.get(error.errno or 0):
      raise config.ConfigError(
        f"{path}: is {kind}; delete it, or choose another --workdir"
      ) from error
    if os.access(workdir, os.W_OK):
      raise
    # Nobody can train in such a folder, and a finished run is still told so.
    yield lambda: True
    return
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise config.ConfigError(
      f"{path}: is no file; delete it, or choose another --workdir"
    )
  with os.fdopen(descriptor, "r+") as file, watched(workdir) as is_there:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = text.printable(file.read(200).strip())
      raise config.ConfigError(
        f"{flag}={workdir}: {holder or 'another process'} is {what} there; "
        f"stop it, or choose another {flag}"
      ) from None
    with _naming(path):
      file.truncate(0)
      file.write(f"process {os.getpid()} on {platform.node()}")
      file.flush()
    yield is_there


@contextlib.contextmanager
def watched(folder: epath.Path) -> Iterator[Callable[[], bool]]:
  """Yields a function that returns whether a folder still stands at its path.

  While the folder is open, no other folder gets its number, even if the folder
  is removed. The function always returns True if the folder is remote.

  Args:
    folder: made if it is absent.
  """
  if not _is_local(folder):
    yield lambda: True
    return
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)

  def is_there():
    try:
      return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except OSError:
      return False

  try:
    yield is_there
  finally:
    os.close(descriptor)


def _is_local(path: epath.PathLike) -> bool:
  return "://" not in str(path)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl in order; [] if there is no file.

  A partial last line, left by a killed process, is skipped. Any other line that
  is no record is skipped with a warning.

  Raises:
    reading.ReadError: metrics.jsonl is no regular file.
  """
  path = epath.Path(workdir) / METRICS_FILE
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


class MetricsWriter:
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
    self._path = epath.Path(workdir) / METRICS_FILE
    self._primary = primary
    self._closed = False
    self._file = None
    self._trackers = trackers
    if not primary:
      return
    records = read_metrics(workdir) if start_step > 0 else []
    kept = [r for r in records if r["step"] <= start_step]
    if len(kept) < len(records):
      logging.info(
        "%s: dropped %d records after step %d, to be written again",
        METRICS_FILE,
        len(records) - len(kept),
        start_step,
      )
    # The validation of the step from which the run resumes may run twice.
    self._held = {_key(r) for r in kept if r["step"] == start_step}
    self._lines = [json.dumps(r) + "\n" for r in kept]
    self._rewrite()
    if _is_local(self._path):
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
      with _naming(self._path):
        self._file.write(line)
        self._file.flush()
    else:
      self._lines.append(line)
      if time.monotonic() - self._rewritten > _REMOTE_FLUSH_SECONDS:
        self._rewrite()
    for tracker in self._trackers:
      tracker.write(record)

  def _rewrite(self):
    write_atomically(self._path, "".join(self._lines))
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
      with _naming(self._path):
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


def describe_run(
  workdir: epath.PathLike, *, config_json: str, argv: Sequence[str], params: Any
) -> None:
  """Writes config.json, command.txt, versions.json and parameters.txt.

  Call it once per start, on the primary process, when devices are initialized.

  Args:
    workdir: the run directory, local or gs://; made if absent.
    config_json: the result of config.to_json.
    argv: sys.argv of this start.
    params: pytree of arrays or jax.ShapeDtypeStruct.
  """
  workdir = epath.Path(workdir)
  write_atomically(workdir / "config.json", config_json.rstrip() + "\n")
  write_atomically(workdir / "parameters.txt", parameter_table(params))
  write_atomically(
    workdir / "versions.json", json.dumps(versions(), indent=2) + "\n"
  )
  commands = workdir / "command.txt"
  before = ""
  if commands.exists():
    before = reading.read(commands, _MOST_COMMANDS).decode(errors="replace")
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  write_atomically(commands, f"{before}{now}  {_command_line(argv)}\n")


def _command_line(argv):
  """Returns the command as one line that a shell understands."""
  main = getattr(sys.modules["__main__"], "__spec__", None)
  if main is not None and main.origin == argv[0]:
    argv = ["python", "-m", main.name, *argv[1:]]
  elif argv[0].endswith(".py"):
    argv = ["python", *argv]
  return shlex.join(argv).replace("\n", "\\n")


def versions() -> dict[str, Any]:
  """Returns the content of versions.json."""
  found: dict[str, Any] = {"python": platform.python_version()}
  found["platform"] = platform.platform()
  for name in LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None  # The package runs from its sources.
  devices = jax.devices()
  found["device_kind"] = devices[0].device_kind
  found["device_count"] = len(devices)
  found["process_count"] = jax.process_count()
  found["git_commit"], found["git_dirty"] = _git_state(pathlib.Path(__file__))
  return found


def _git_state(source: pathlib.Path) -> tuple[str | None, bool | None]:
  """Returns (commit, has uncommitted changes) of the checkout of `source`.

  Both are None where git does not track the file itself. The package may be
  installed in an environment inside the checkout of another project.
  """
  try:
    _git(source, "ls-files", "--error-unmatch", source.name)
    commit = _git(source, "rev-parse", "HEAD").strip()
    return commit, bool(_git(source, "status", "--porcelain").strip())
  except (OSError, subprocess.SubprocessError):  # No git, or no checkout.
    return None, None


def _git(source, *arguments):
  return subprocess.run(
    ["git", "-C", str(source.parent), *arguments],
    check=True,
    capture_output=True,
    text=True,
    timeout=20,
    env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
  ).stdout


def parameter_count(params: Any) -> int:
  """Returns how many numbers a pytree of arrays or their shapes has."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def parameter_table(params: Any) -> str:
  """Returns path, shape, dtype and count of every parameter, and the total.

  Args:
    params: pytree of arrays or jax.ShapeDtypeStruct.
  """
  rows = [("path", "shape", "dtype", "count")]
  size = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    dtype = np.dtype(leaf.dtype)
    count = math.prod(leaf.shape)
    size += count * dtype.itemsize
    shape = " x ".join(map(str, leaf.shape)) or "scalar"
    rows.append((name, shape, dtype.name, f"{count:,}"))
  rows.append(
    ("total", "", f"{size / 2**20:,.1f} MiB", f"{parameter_count(params):,}")
  )
  return text.aligned(rows, "<<<>")
