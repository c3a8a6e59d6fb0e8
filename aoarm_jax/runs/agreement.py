"""Check that all processes of a run do the same thing.

Each process reads its own command, code, text and disk. A stale file on one
host would train a model that no record describes. So the processes compare at
the start, before the first step:

  command      the mode, its texts, the config, JAX's switches
  code         versions of this package and of its libraries, the source files
  devices      how many this host has, and their kind
  disk         a file that process 0 writes into the run directory
  text         sha256 of every split that is read
  checkpoint   the step and the checksums of its files
"""

import contextlib
import hashlib
import importlib.metadata
import pathlib
import socket
import time
import uuid
from collections.abc import Mapping, Sequence

import jax
from etils import epath

import pallas_kernels
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import neighbours, switches, waits
from aoarm_jax.runs import (
  checkpoint,
  disk,
  exported,
  manifest,
  patience,
)
from aoarm_jax.runs import directory as run_dir

# The hosts may keep the text and the tokenizer in different places. Each sha256
# is compared.
_OWN_FIELDS = (
  "config.distributed.",
  "config.data.path",
  "config.data.tokenizer_file",
)
_TOKEN = ".shared"
# Network disks and buckets may show a new file after some seconds.
_DISK_SECONDS = 10.0


def check_command(
  config: config_lib.Config, words: Mapping[str, str | None]
) -> None:
  """Check that all processes have the same command and the same code.

  Args:
    config: the config of this process.
    words: values of the command line that are not in the config.

  Raises:
    ConfigError: something differs; see `neighbours.agree`.
  """
  if not neighbours.several():
    return
  facts = {f"--{name}": repr(value) for name, value in words.items()}
  facts |= {
    path: repr(value)
    for path, _, value in config_lib.leaves(config)
    if not path.startswith(_OWN_FIELDS)
  }
  facts |= {k.upper(): repr(v) for k, v in switches.streams().items()}
  # JAX adds its options as attributes, which type checkers do not see.
  precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  facts["JAX_DEFAULT_MATMUL_PRECISION"] = repr(precision)
  facts |= {
    f"the version of {name}": _version(name) for name in run_dir.LIBRARIES
  }
  facts["the source code of aoarm_jax (sha256)"] = _source_hash()
  _agree("command", facts)


def check_devices() -> None:
  """Check that all processes have as many devices of the same kind.

  Raises:
    ConfigError: something differs; see `neighbours.agree`.
  """
  if not neighbours.several():
    return
  local = jax.local_devices()
  kinds = sorted({device.device_kind for device in local})
  _agree(
    "devices",
    {
      "the number of devices": str(len(local)),
      "the kind of devices": ", ".join(kinds),
    },
  )


def check_text(text: Mapping[str, str], tokenizer: str = "") -> None:
  """Check that all processes read the same text with the same tokenizer.

  Args:
    text: sha256 of every split that is read, by its name.
    tokenizer: sha256 of the tokenizer's state; "" if the config fixes it.

  Raises:
    ConfigError: something differs; see `neighbours.agree`.
  """
  facts = {f"the {k} text (sha256)": v[:12] for k, v in text.items()}
  facts["the tokenizer (sha256)"] = tokenizer[:12] or "fixed"
  _agree("text", facts)


def check_lines(lines: Sequence[tuple[str, str]]) -> None:
  """Check that all processes have the same prompts or texts.

  Args:
    lines: pairs of a name and a text.

  Raises:
    ConfigError: something differs; see `neighbours.agree`.
  """
  texts = "\n".join(text for _, text in lines)
  _agree("input", {"the input (sha256)": _sha256(texts.encode())})


def check_checkpoint(
  checkpoints: checkpoint.Checkpoints | exported.Exported,
  saved: checkpoint.Saved | None,
) -> None:
  """Check that all processes see the same checkpoint.

  Args:
    checkpoints: of the run.
    saved: the checkpoint that is read; None is none.

  Raises:
    ConfigError: something differs; see `neighbours.agree`.
  """
  if not neighbours.several():
    return
  facts = {"the checkpoint's step": str(saved.step if saved else None)}
  if saved:
    files = checkpoints.files(saved.step)
    facts["the manifest of the checkpoint (sha256)"] = manifest.digest(files)
  _agree("checkpoint", facts)


def check_disk(workdir: epath.Path, *, writes: bool) -> None:
  """Check that all processes see the files of process 0 in the run directory.

  Args:
    workdir: run directory.
    writes: whether the mode needs a directory that can be written to. If it
      does not, a directory that cannot be written to is not checked.

  Raises:
    ConfigError: this process does not see the file that process 0 has written.
    OSError: process 0 cannot write.
  """
  if not neighbours.several():
    return
  token, path = uuid.uuid4().hex, workdir / _TOKEN
  if neighbours.process() == 0:
    try:
      if writes or workdir.exists():
        disk.write_atomically(path, token)
      else:
        token = ""
    except OSError:
      if writes:
        raise
      token = ""
  host = neighbours.from_process_0("host", socket.gethostname())
  token = neighbours.from_process_0("token", token)
  with (
    patience.waiting(f"looking for {path}"),
    waits.ending_at_sigterm(0),
  ):
    deadline = time.monotonic() + _DISK_SECONDS
    while token and _read(path) != token:
      if time.monotonic() > deadline:
        raise config_lib.ConfigError(
          f"process {neighbours.process()} ({socket.gethostname()}): "
          f"--workdir={workdir}: cannot read the file {path.name} that process "
          f"0 ({host}) has written there; all processes must see the same run "
          "directory: name one on a shared disk, or in a bucket (gs://...)"
        )
      time.sleep(0.05)
  _agree("disk", {})
  if neighbours.process() == 0:
    with contextlib.suppress(OSError):
      path.unlink(missing_ok=True)


def _read(path):
  try:
    # A network disk looks again at a folder whose files are listed.
    list(path.parent.iterdir())
    return path.read_text()
  except (OSError, ValueError):
    return None


def _agree(what, facts):
  if not neighbours.several():
    return
  with patience.waiting(f"comparing the {what} with all processes"):
    neighbours.agree(what, facts)


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"  # The package runs from its sources.


def _source_hash():
  """Return the hash of all modules of this package, by names and contents."""
  digest = hashlib.sha256()
  ours = pathlib.Path(__file__).parents[1]
  for folder in (ours, pathlib.Path(str(pallas_kernels.__file__)).parent):
    for path in sorted(folder.rglob("*.py")):
      digest.update(str(path.relative_to(folder)).encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def _sha256(data):
  return hashlib.sha256(data).hexdigest()[:12]
