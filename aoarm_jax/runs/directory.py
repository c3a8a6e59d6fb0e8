"""The files that make a run directory explain itself.

config.json      the whole configuration of the last start
command.txt      the time and the command of every start
versions.json    interpreter, libraries, devices, git commit
parameters.txt   path, shape, dtype and count of every parameter
metrics.jsonl    measurements, one JSON object per line
"""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import disk, metrics, text

# Training writes these into a run directory, besides the lock.
_FILES = (
  *("config.json", "parameters.txt", "versions.json", "command.txt"),
  *(metrics.FILE, "loss.png", "slot_curve.png", ".shared", "start.json"),
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
_MOST_COMMANDS = 1 << 24  # Bytes of command.txt.


def check_workdir(workdir: epath.PathLike, flag: str = "--workdir") -> None:
  """Refuses a run directory that is a file, or lies below one.

  Args:
    workdir: the folder.
    flag: the flag that names it, for messages.

  Raises:
    ConfigError: names the file.
  """
  workdir = epath.Path(workdir)
  if not disk.is_local(workdir):
    return
  for path in (workdir, *workdir.parents):
    if path.exists() and not path.is_dir():
      raise config_lib.ConfigError(
        f"{flag}={workdir}: {path} is a file; name a folder"
      )


def check_places(workdir: epath.PathLike) -> None:
  """Refuses a run directory where a folder is in the place of a file.

  Training would notice some of these places only after many steps.

  Raises:
    ConfigError: names the place.
  """
  workdir = epath.Path(workdir)
  if not disk.is_local(workdir):
    return
  kinds = dict.fromkeys(_FILES, False) | dict.fromkeys(_FOLDERS, True)
  for name, is_folder in kinds.items():
    path = workdir / name
    if path.exists() and path.is_dir() != is_folder:
      kind, wanted = "a folder", "a file"
      if is_folder:
        kind, wanted = wanted, kind
      raise config_lib.ConfigError(
        f"{path}: is {kind}, and training writes {wanted} of this name; move "
        "it away, or choose another --workdir"
      )


def describe_run(
  workdir: epath.PathLike, *, config_json: str, argv: Sequence[str], params: Any
) -> None:
  """Writes config.json, command.txt, versions.json and parameters.txt.

  Call it once per start, on the primary process, when devices are initialized.

  Args:
    workdir: the run directory, local or gs://; made if absent.
    config_json: the result of schema.to_json.
    argv: sys.argv of this start.
    params: pytree of arrays or jax.ShapeDtypeStruct.
  """
  workdir = epath.Path(workdir)
  disk.write_atomically(workdir / "config.json", config_json.rstrip() + "\n")
  disk.write_atomically(workdir / "parameters.txt", parameter_table(params))
  disk.write_atomically(
    workdir / "versions.json", json.dumps(versions(), indent=2) + "\n"
  )
  commands = workdir / "command.txt"
  before = ""
  if commands.exists():
    before = reading.read(commands, _MOST_COMMANDS).decode(errors="replace")
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  disk.write_atomically(commands, f"{before}{now}  {_command_line(argv)}\n")


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
