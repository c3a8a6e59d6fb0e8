"""One run on several processes: JAX's own runtime, started and agreed in."""

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from aoarm_jax.config import schema as config_lib

# Variable of the environment -> field of config.distributed. They are what
# differs between launchers and processes, so that the command need not.
VARIABLES = {
  "AOARM_DISTRIBUTED": "enabled",
  "AOARM_COORDINATOR_ADDRESS": "coordinator_address",
  "AOARM_PROCESS_COUNT": "process_count",
  "AOARM_PROCESS_ID": "process_id",
}


def with_environment(
  fields: config_lib.Distributed, environment: Mapping[str, str]
) -> config_lib.Distributed:
  """The fields, those that the environment sets replaced.

  Raises:
    ConfigError: a variable that is no value of its field, or fields that do
      not go together; names both.
  """
  changes = {}
  for variable, field in VARIABLES.items():
    if variable in environment:
      text = environment[variable]
      changes[field] = _parse(variable, text, type(getattr(fields, field)))
  fields = dataclasses.replace(fields, **changes)
  _check(fields)
  return fields


def _parse(variable, text, kind):
  if kind is bool:
    if text not in ("0", "1"):
      raise config_lib.ConfigError(f"{variable}={text!r}: must be 0 or 1")
    return text == "1"
  try:
    return kind(text)
  except ValueError:
    raise config_lib.ConfigError(
      f"{variable}={text!r}: must be a whole number"
    ) from None


def _check(fields):
  if not fields.enabled:
    return
  given = {
    "coordinator_address": fields.coordinator_address != "",
    "process_count": fields.process_count > 0,
    "process_id": fields.process_id >= 0,
  }
  variables = {field: variable for variable, field in VARIABLES.items()}
  for name, is_given in given.items():
    if not is_given and any(given.values()):
      raise config_lib.ConfigError(
        f"config.distributed.{name} ({variables[name]}) is missing: give "
        f"{', '.join(given)} together, or none of them on Cloud TPU, Slurm and "
        "Kubernetes"
      )
  if all(given.values()) and fields.process_id >= fields.process_count:
    raise config_lib.ConfigError(
      f"config.distributed.process_id={fields.process_id} "
      f"({variables['process_id']}): must be below "
      f"config.distributed.process_count={fields.process_count}"
    )
  host, _, port = fields.coordinator_address.rpartition(":")
  if given["coordinator_address"] and not (host and port.isdigit()):
    raise config_lib.ConfigError(
      f"config.distributed.coordinator_address="
      f"{fields.coordinator_address!r} ({variables['coordinator_address']}): "
      "must be host:port"
    )


def start(
  fields: config_lib.Distributed,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Joins this process to the others; call it before any look at a device.

  Does nothing unless config.distributed.enabled or AOARM_DISTRIBUTED=1 asks
  for it. Without an address JAX finds the processes of a Cloud TPU slice, of
  a Slurm step, of a Kubernetes job.

  Raises:
    ConfigError: a field that cannot be, or no cluster to be found.
  """
  fields = with_environment(fields, environment)
  if not fields.enabled:
    return
  explicit = {}
  if fields.coordinator_address:
    explicit = {
      "coordinator_address": fields.coordinator_address,
      "num_processes": fields.process_count,
      "process_id": fields.process_id,
      "cluster_detection_method": "deactivate",
    }
  try:
    jax.distributed.initialize(
      **explicit,
      heartbeat_timeout_seconds=fields.heartbeat_timeout_seconds,
      initialization_timeout=fields.initialization_timeout_seconds,
      # What a process that failed waits for the others at its exit.
      shutdown_timeout_seconds=fields.heartbeat_timeout_seconds,
    )
  except ValueError as error:
    raise config_lib.ConfigError(
      f"config.distributed.enabled=True: no cluster was found ({error}); "
      "outside of Cloud TPU, Slurm and Kubernetes give "
      "config.distributed.coordinator_address, process_count and process_id"
    ) from error
  logging.info("process %d of %d", jax.process_index(), jax.process_count())
  if jax.process_index() > 0:  # Process 0 speaks for all.
    logging.set_verbosity(logging.WARNING)


class Watchdog:
  """Ends a process that makes no progress, by SIGALRM, so that it is restarted.

  JAX notices a process that is gone, not one that is stuck, in a collective
  whose partner hangs, in a disk, in a lock. A thread says what is wrong and
  shows where every thread stands; where it cannot, because the interpreter's
  lock is never released, the kernel's timer ends the process a little later.
  """

  def __init__(self, seconds: float):
    """Of config.distributed.step_timeout_seconds; 0 never ends anything."""
    self._seconds = seconds
    self._sign = threading.Event()
    self._is_over = False
    self._step = 0

  def __enter__(self):
    if self._seconds:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
      self.beat(0)
    return self

  def __exit__(self, *_):
    if self._seconds:
      signal.setitimer(signal.ITIMER_REAL, 0)
      self._is_over = True
      self._sign.set()

  def beat(self, step: int | None = None):
    """A sign of life, at `step` or where it was."""
    if self._seconds:
      self._step = self._step if step is None else step
      grace = min(5.0, self._seconds)
      signal.setitimer(signal.ITIMER_REAL, self._seconds + grace)
      self._sign.set()

  def _watch(self):
    while not self._is_over and self._sign.wait(self._seconds):
      self._sign.clear()
    if self._is_over:
      return
    print(
      f"aoarm_jax: error: stuck at step {self._step:,}: no progress for "
      f"{self._seconds:g} s (config.distributed.step_timeout_seconds); start "
      "the same command again to continue from the last checkpoint. It stands "
      "at:",
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    signal.raise_signal(signal.SIGALRM)


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
  """Ends one of several processes as soon as it fails, with its exit code.

  At its exit JAX would have it wait for the others, who wait for it, until
  all are aborted. A preempted run ends in agreement and may wait.
  """
  try:
    yield
  except BaseException as error:
    code = error.code if isinstance(error, SystemExit) else 1
    if code in (0, None, 75) or not jax.distributed.is_initialized():
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def process_0_says(decide: Callable[[], int]) -> int:
  """The verdict of process 0 on all; for what depends on files it changes."""
  # A lone process need not start a backend to read files.
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return decide()
  verdict = decide() if jax.process_index() == 0 else 0
  return int(multihost_utils.broadcast_one_to_all(np.int32(verdict)))
