"""One process at a time writes into a run directory."""

import contextlib
import errno
import os
import platform
import stat
import types
from collections.abc import Callable, Iterator

from etils import epath

from aoarm_jax.config import errors
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import neighbours
from aoarm_jax.runs import disk, text

fcntl: types.ModuleType | None
try:
  import fcntl
except ImportError:  # Windows.
  fcntl = None


class EvictedError(errors.UserError, RuntimeError):
  """The run directory no longer belongs to the run, which has stopped."""


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
    ConfigError: another process holds the lock; names the process.
    OSError: the lock cannot be written; names its file.
  """
  workdir = epath.Path(workdir)
  if fcntl is None or not disk.is_local(workdir) or neighbours.process() != 0:
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
      raise config_lib.ConfigError(
        f"{path}: is {kind}; delete it, or choose another --workdir"
      ) from error
    if os.access(workdir, os.W_OK):
      raise
    # Nobody can train in such a folder, and a finished run is still told so.
    yield lambda: True
    return
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise config_lib.ConfigError(
      f"{path}: is no file; delete it, or choose another --workdir"
    )
  with os.fdopen(descriptor, "r+") as file, watched(workdir) as is_there:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = text.printable(file.read(200).strip())
      raise config_lib.ConfigError(
        f"{flag}={workdir}: {holder or 'another process'} is {what} there; "
        f"stop it, or choose another {flag}"
      ) from None
    with disk.naming(path):
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
  if not disk.is_local(folder):
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
