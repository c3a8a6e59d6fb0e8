"""Messages between the processes of a run, beside their computations.

The messages go through the key-value store of JAX's coordination service. They
arrive while a process waits in a collective, in a disk or in a compilation.
"""

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed as runtime

from aoarm_jax.config import errors, exit_codes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import rendezvous, stopping, waits

Failure = rendezvous.Failure
NeighbourError = rendezvous.NeighbourError

_FOLDER = "aoarm_jax"
_POLL_SECONDS = 1.0
# A process whose neighbour failed may fail by itself within this time.
_GRACE_SECONDS = 1.0
# The neighbour that caused a broken connection may tell why within this time.
_CAUSE_SECONDS = 2.0
# The other processes have heard of a failure within this time.
_HEARD_SECONDS = 3.0
# Errors of Gloo, NCCL and the coordination service say this when another
# process is gone. Their types are those of all errors of JAX.
_LOST = re.compile(
  r"gloo|connection (reset|closed|refused)|socket closed|broken pipe"
  r"|nccl.*(remote|system error|abort|timed? ?out)"
  r"|barrier.*(fail|timed out|error)|heartbeat|coordination ?service",
  re.IGNORECASE | re.DOTALL,
)

_fails = threading.Event()  # The main thread is ending this process.
_saves = threading.Lock()  # Held while this process writes a manifest.
_patience_seconds = 100.0


_calls: dict[str, int] = {}  # Comparisons by their names.


def several() -> bool:
  """Return whether this process has joined other processes."""
  # jax.process_count() would wait for the devices of all processes.
  return _client() is not None and _count() > 1


def listen(patience_seconds: float) -> None:
  """Begin to listen for the failures of other processes.

  When another process fails, this process ends within seconds, with the line
  and the exit code of that process. It does so even in a collective, and then
  nothing else could end it.

  Args:
    patience_seconds: config.distributed.heartbeat_timeout_seconds, the time
      after which a silent process is lost.
  """
  global _patience_seconds
  _patience_seconds = patience_seconds
  if not several():
    return
  is_over = threading.Event()
  thread = threading.Thread(
    target=_listen, args=(is_over,), name="neighbours", daemon=True
  )
  thread.start()

  def stop():
    # Python may not end while a thread is in a call of JAX.
    is_over.set()
    thread.join()

  atexit.register(stop)
  waits.catch_sigterm(patience_seconds)


def tell(exit_code: int, line: str) -> Failure:
  """Tell the other processes that this process fails.

  Process 0 keeps what is told. So it also waits until the others have heard,
  and the writing of a manifest comes to its end.

  Args:
    exit_code: the exit code of this process.
    line: its message.

  Returns:
    The first failure among all processes, which is the cause of the others.
  """
  _fails.set()
  first = failure = Failure(process(), exit_code, line)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      # The first failure stays.
      _client().key_value_set(f"{_FOLDER}/failure/first", json.dumps(failure))
    first = _failure() or failure
    _heard()
  _finish_saving()
  return first


def cause_of(error: BaseException) -> NeighbourError | None:
  """Return why an error is the fault of another process.

  Args:
    error: an error of a computation, or one that such an error caused.

  Returns:
    None if the error is none of a connection between processes.
  """
  if not (several() and (line := _lost(error))):
    return None
  failure = None
  deadline = time.monotonic() + _CAUSE_SECONDS
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    while failure is None and time.monotonic() < deadline:
      failure = _failure()
      time.sleep(0.1)
  return (
    failure.error()
    if failure
    else NeighbourError(
      f"process {process()} lost a neighbour ({line}): start the same command "
      "again on all processes, and the run goes on from its last checkpoint"
    )
  )


def is_lost(error: BaseException) -> bool:
  """Return whether an error says that another process is gone."""
  return several() and _lost(error) is not None


def agree(what: str, facts: Mapping[str, str]) -> None:
  """Check that all processes know the same facts. All return, or none does.

  All processes must call this equally often. A SIGTERM ends the wait.

  Args:
    what: what the facts are about.
    facts: short texts by their names.

  Raises:
    ConfigError: this process knows something else than process 0. The message
      names the process, the fact and both values. It has to reach `tell`,
      which ends the others.
  """
  if not several():
    return
  folder = _new_folder(what)
  me, client = process(), _client()
  with waits.ending_at_sigterm(0):
    if me == 0:
      client.key_value_set(f"{folder}/facts", json.dumps(dict(facts)))
    expected = json.loads(_get(f"{folder}/facts"))
    for name in {**expected, **facts}:
      wants, has = (f.get(name, "absent") for f in (expected, facts))
      if wants != has:
        raise config_lib.ConfigError(
          f"process {me} ({socket.gethostname()}): {name} is {has}, and it is "
          f"{wants} in process 0: start all processes with the same command, "
          "text and code"
        )
    client.key_value_set(f"{folder}/agreed/{me}", "")
    if me == 0:
      while len(client.key_value_dir_get(f"{folder}/agreed/")) < _count():
        time.sleep(0.02)
      client.key_value_set(f"{folder}/all", "")
    _get(f"{folder}/all")


def from_process_0(name: str, value: str) -> str:
  """Return the value that process 0 gives.

  Args:
    name: what the value is.
    value: the value of this process.
  """
  folder = _new_folder(name)
  if process() == 0:
    _client().key_value_set(f"{folder}/value", value)
  text: str = _get(f"{folder}/value")
  return text


def _new_folder(name):
  """Return the folder of messages for one call by all processes."""
  _calls[name] = number = _calls.get(name, 0) + 1
  return f"{_FOLDER}/{name}/{number}"


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """Let this thread finish before a failure elsewhere ends the process."""
  with _saves:
    yield


def _end_by_sigterm():
  line = (
    f"process {process()} was ended by SIGTERM while it waited for the other "
    "processes: start the same command again on all processes"
  )
  print(f"aoarm_jax: error: {line}", file=sys.stderr, flush=True)
  tell(exit_codes.PREEMPTED, line)
  stopping.flush()
  os._exit(exit_codes.PREEMPTED)


def _listen(is_over):
  """Wait for a failure of another process; then end this one."""
  failure = None
  while failure is None:
    if is_over.wait(_POLL_SECONDS):
      return
    if waits.is_ended_by_sigterm():
      _end_by_sigterm()
    try:
      failure = _failure()
    except jax.errors.JaxRuntimeError:  # JAX is shutting down.
      return
  if failure.process == process() or _fails.wait(_GRACE_SECONDS):
    return
  error = failure.error()
  print(f"aoarm_jax: error: {error}", file=sys.stderr, flush=True)
  _finish_saving()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _heard()
  stopping.flush()
  os._exit(error.exit_code)


def _finish_saving():
  """Wait for a manifest that is being written, and let no other begin."""
  _saves.acquire(timeout=_patience_seconds)


def _heard():
  """Say that this process knows of the failure; process 0 waits for all."""
  client = _client()
  client.key_value_set(f"{_FOLDER}/heard/{process()}", "", True)
  if process() == 0:
    deadline = time.monotonic() + _HEARD_SECONDS
    while time.monotonic() < deadline:
      if len(client.key_value_dir_get(f"{_FOLDER}/heard/")) == _count():
        break
      time.sleep(0.05)


def _failure():
  """Return the first failure of any process, or None."""
  values = _client().key_value_dir_get(f"{_FOLDER}/failure/")
  return Failure(*json.loads(values[0][1])) if values else None


def _get(key):
  """Return a value as soon as there is one."""
  while True:  # Signals are handled between the calls.
    try:
      return _client().blocking_key_value_get(key, int(1000 * _POLL_SECONDS))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def _lost(error):
  """Return the line of JAX's error if another process is gone, or None."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    # JAX raises a ValueError where a jitted function is called anew.
    if (
      isinstance(error, (RuntimeError, ValueError))
      and not isinstance(error, errors.UserError)
      and _LOST.search(str(error))
    ):
      return str(error).strip().splitlines()[0]
    error = error.__cause__ or error.__context__
  return None


def _client() -> Any:
  return runtime.global_state.client


def process() -> int:
  """Return the number of this process, without looking at any device."""
  return runtime.global_state.process_id


def coordinator() -> str | None:
  """Return the address of process 0 that JAX was given or has found."""
  address: str | None = runtime.global_state.coordinator_address
  return address


def _count() -> int:
  return runtime.global_state.num_processes
