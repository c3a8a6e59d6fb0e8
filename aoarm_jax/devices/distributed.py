"""Several processes as one run, started and synchronised by JAX's runtime."""

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from aoarm_jax.config import exit_codes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import neighbours, rendezvous, stopping, waits

# Environment variables and the fields of config.distributed that they set. They
# hold all that differs between launchers and processes, so every process can
# run the same command.
VARIABLES = {
  "AOARM_DISTRIBUTED": "enabled",
  "AOARM_COORDINATOR_ADDRESS": "coordinator_address",
  "AOARM_PROCESS_COUNT": "process_count",
  "AOARM_PROCESS_ID": "process_id",
  "AOARM_NOTICE_SECONDS": "notice_seconds",
}


def with_environment(
  fields: config_lib.Distributed, environment: Mapping[str, str]
) -> config_lib.Distributed:
  """Return the fields, with values from the environment where it sets them.

  Args:
    fields: the section of the config.
    environment: variables by name; see VARIABLES.

  Raises:
    ConfigError: a variable is not a value of its field, or fields contradict
      each other. The message names the variable and the field.
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
  """Return the text of a variable as a bool, an int or a str."""
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
  """Raise ConfigError unless the fields agree with each other."""
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
  address = fields.coordinator_address
  if given["coordinator_address"] and not rendezvous.is_address(address):
    raise config_lib.ConfigError(
      f"config.distributed.coordinator_address={address!r} "
      f"({variables['coordinator_address']}): must be host:port, with a port "
      "from 1 to 65535"
    )


def start(
  fields: config_lib.Distributed,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Join this process to the others; call it before using any device.

  Nothing happens unless config.distributed.enabled or AOARM_DISTRIBUTED=1 asks
  for it. Without an address, JAX finds the processes of a Cloud TPU slice, a
  Slurm step, or a Kubernetes job.

  Args:
    fields: the section of the config.
    environment: variables that override the fields; see VARIABLES.

  Raises:
    ConfigError: a field is not valid, no cluster is found, or the port of the
      coordinator is in use.
    NeighbourError: another process failed or did not come.
  """
  fields = with_environment(fields, environment)
  if not fields.enabled:
    return
  explicit: dict[str, Any] = {}
  if fields.coordinator_address:
    _meet(fields)
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
      # A process that failed waits this long for the others at its exit.
      shutdown_timeout_seconds=fields.heartbeat_timeout_seconds,
    )
  except ValueError as error:
    raise config_lib.ConfigError(
      f"config.distributed.enabled=True: no cluster was found ({error}); "
      "outside of Cloud TPU, Slurm and Kubernetes give "
      "config.distributed.coordinator_address, process_count and process_id"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    if "Failed to start RPC server" in str(error):
      raise config_lib.ConfigError(
        f"{neighbours.coordinator()}: another program uses the port of this "
        "address on the host of process 0; choose another one: give "
        "config.distributed.coordinator_address, process_count and process_id"
      ) from error
    raise neighbours.NeighbourError(
      f"the processes cannot be joined ({str(error).splitlines()[0]}): see "
      "what process 0 says, and start the same command again on all processes"
    ) from error
  neighbours.listen(fields.heartbeat_timeout_seconds)
  logging.info("process %d of %d", jax.process_index(), jax.process_count())
  if jax.process_index() > 0:  # Process 0 speaks for all.
    logging.set_verbosity(logging.WARNING)


_has_met = False


def _meet(fields, failure=None):
  """Wait for the other processes, at the address that the config gives."""
  global _has_met
  _has_met = True
  rendezvous.meet(
    fields.coordinator_address,
    fields.process_count,
    fields.process_id,
    fields.initialization_timeout_seconds,
    failure,
  )


class Watchdog:
  """Ends a process that makes no progress, so that it can be restarted.

  JAX notices a process that is gone. It does not notice a process that is
  stuck: in a collective whose partner hangs, in a disk, or in a lock.

  A thread reports the problem, prints the stack of every thread, and ends the
  process. The thread cannot run if the interpreter's lock is never released.
  For this case the kernel's timer raises SIGALRM a little later.

  The exit code is exit_codes.STUCK. The default action of a signal would not
  do: the kernel drops it for process 1 of a container.
  """

  def __init__(self, seconds: float):
    """Set the limit; nothing is watched yet.

    Args:
      seconds: the longest time without progress, as in
        config.distributed.step_timeout_seconds. With 0 nothing ever ends.
    """
    self._seconds = seconds
    self._sign_of_life = threading.Event()
    self._is_over = False
    self._step = 0

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
      self._former_action = _set_alarm_action(_exit_function())
      self.beat(0)
    return self

  def __exit__(self, *_: object) -> None:
    if self._seconds:
      signal.setitimer(signal.ITIMER_REAL, 0)
      _set_alarm_action(self._former_action)
      self._is_over = True
      self._sign_of_life.set()

  def beat(self, step: int | None = None) -> None:
    """Report progress.

    Args:
      step: the current step. None means that the step has not changed.
    """
    if self._seconds:
      self._step = self._step if step is None else step
      grace = min(5.0, self._seconds)
      signal.setitimer(signal.ITIMER_REAL, self._seconds + grace)
      self._sign_of_life.set()

  def _watch(self):
    while not self._is_over and self._sign_of_life.wait(self._seconds):
      self._sign_of_life.clear()
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
    stderr: Any = sys.__stderr__  # None only in a program without a console.
    faulthandler.dump_traceback(file=stderr, all_threads=True)
    os._exit(exit_codes.STUCK)


def _exit_function() -> int | None:
  """Return the address of C's _exit.

  As the handler of SIGALRM it needs no interpreter, and it takes the number of
  the signal as the exit code: exit_codes.STUCK.
  """
  return ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p).value


def _set_alarm_action(action: int | None) -> int | None:
  """Set the action of SIGALRM and return the former one, as C sees them."""
  signal_function = ctypes.CDLL(None).signal
  signal_function.argtypes = (ctypes.c_int, ctypes.c_void_p)
  signal_function.restype = ctypes.c_void_p
  former: int | None = signal_function(signal.SIGALRM, action)
  return former


@contextlib.contextmanager
def blaming_neighbours() -> Iterator[None]:
  """Raise NeighbourError for an error that another process has caused.

  When a process is gone, the others get an error of their connections. If that
  process has said why it failed, the error of the others says the same.

  Raises:
    NeighbourError: see `neighbours.cause_of`.
  """
  try:
    yield
  except Exception as error:
    cause = neighbours.cause_of(error)
    if cause is None:
      raise
    raise cause from error


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
  """End one of several processes as soon as it fails, with its exit code.

  The other processes are told, and they end, too. At its exit, JAX would make
  the process wait for the others. They wait for it in turn, until all are
  aborted. A preempted run ends in agreement, so it may wait.
  """
  try:
    yield
  except BaseException as error:
    code: Any = exit_codes.FAILED
    cause: BaseException | None = error
    if isinstance(error, SystemExit):
      # The program has printed the error that made it exit.
      code, cause = error.code, error.__context__
    blames = isinstance(cause, neighbours.NeighbourError)
    if code in (0, None) or (code == exit_codes.PREEMPTED and not blames):
      raise
    line = str(cause or "").strip() or f"exit code {code}"
    if isinstance(cause, KeyboardInterrupt):
      line = "interrupted by Ctrl-C"
    elif cause is error:
      line = f"{type(error).__name__}: {line}"
    line = line.splitlines()[0]
    # A text in place of a number is printed, and the exit code is 1.
    number = exit_codes.FAILED if isinstance(code, str) else code
    if not neighbours.several():
      _tell_early(number, line)
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    elif isinstance(code, str):
      print(code, file=sys.stderr)
    stopping.flush()
    os._exit(neighbours.tell(number, line).exit_code)


def _tell_early(code, line):
  """Tell the other processes, if any, that this one will not join them."""
  with contextlib.suppress(config_lib.ConfigError):
    fields = with_environment(config_lib.Distributed(), os.environ)
    if fields.enabled and fields.coordinator_address and not _has_met:
      _meet(fields, neighbours.Failure(fields.process_id, code, line))


def process_0_says(decide: Callable[[], int]) -> int:
  """Return the decision of process 0 in every process.

  Use this for decisions that depend on files which process 0 changes.

  Args:
    decide: makes the decision, an int32. Only process 0 calls it.
  """
  # A single process reads files without starting a backend.
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return decide()
  with waits.ending_at_sigterm():
    decision = decide() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(decision)))
