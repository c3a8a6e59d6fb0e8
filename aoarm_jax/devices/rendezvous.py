"""The processes of one run find each other, before JAX joins them.

JAX's runtime is no place for mistakes at the start. If it cannot connect, it
aborts the process with a stack trace. If another run listens at the address,
the processes of both runs are aborted, because both use the same numbers. So
the processes meet first at the same address, over plain TCP:

  k to 0   {"aoarm_jax": "hello", "process": k, "count": n, "failure": f}
  0 to k   {"aoarm_jax": "welcome"}, at once
  0 to k   {"aoarm_jax": "start", "failure": f}, when all are there

A failure f is null, or [process, exit code, line] of a process that has failed
already. Then all processes end with this line and this exit code.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import selectors
import socket
import time
from typing import Any, NamedTuple

from absl import logging

from aoarm_jax.config import errors, exit_codes, reading
from aoarm_jax.config import schema as config_lib

_ADDRESS = "config.distributed.coordinator_address"
_VARIABLE = "AOARM_COORDINATOR_ADDRESS"
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_AGAIN = "start the same command again on all processes"
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 0.3
# The former start of the same run may still be ending.
_PORT_SECONDS = 5.0
_ANSWER_SECONDS = 3.0
# Something that is not process 0 may be at the address for so long.
_STRANGER_SECONDS = 10.0
# A process that has failed already waits so long to tell the others.
_TELL_SECONDS = 10.0
# Then a wait is logged.
_SILENT_SECONDS = 5.0
_LONGEST_LINE = 1 << 16
_MOST_NAMED = 16  # Processes that one line names.
# The types of the fields of messages and of a failure, see reading.check.
_FIELDS = {
  "hello": {"process": int, "count": int, "failure": (list, None)},
  "start": {"failure": (list, None)},
}
_FAILURE = {"process": int, "exit_code": int, "line": str}


class NeighbourError(errors.UserError):
  """Another process failed or is gone, or could not be waited for.

  Attributes:
    exit_code: the exit code of the process that failed first. By default LOST,
      since the same command may succeed when it is started again.
  """

  def __init__(self, message: str, exit_code: int = exit_codes.LOST) -> None:
    super().__init__(message)
    self.exit_code = exit_code


class Failure(NamedTuple):
  """The first failure of a process.

  Attributes:
    process: number of the process.
    exit_code: its exit code.
    line: its message.
  """

  process: int
  exit_code: int
  line: str

  def error(self) -> NeighbourError:
    """Return the error that ends the other processes."""
    line = self.line
    if not line.startswith(f"process {self.process} "):
      line = f"process {self.process} failed: {line}"
    return NeighbourError(line, self.exit_code)


def is_address(text: str) -> bool:
  """Return whether a text is host:port, with a port from 1 to 65535."""
  match = re.fullmatch(r".+:([0-9]{1,5})", text)
  return match is not None and 1 <= int(match[1]) <= 65535


def meet(
  address: str,
  count: int,
  process: int,
  seconds: float,
  failure: Failure | None = None,
) -> None:
  """Wait until all processes of the run are there.

  Args:
    address: host:port of process 0.
    count: number of processes.
    process: number of this process.
    seconds: the longest wait.
    failure: how this process has failed already. Then the others are told, and
      nothing is raised in this process.

  Raises:
    ConfigError: the port is in use on the host of process 0, or the processes
      do not agree about their number.
    NeighbourError: a process failed or did not come.
  """
  if count < 2:
    return
  seconds = min(seconds, _TELL_SECONDS) if failure else seconds
  host, _, port = address.rpartition(":")
  try:
    if process == 0:
      # JAX can listen at another port, where a router leads to.
      bound = os.environ.get(_BIND, address)
      if not is_address(bound):
        raise config_lib.ConfigError(f"{_BIND}={bound!r}: must be host:port")
      listened = int(bound.rpartition(":")[2])
      _Host(address, count, seconds, failure).run(listened)
    else:
      _join(host.strip("[]"), int(port), count, process, seconds, failure)
  except errors.UserError:
    if not failure:
      raise


class _Host:
  """Process 0, which the others come to."""

  def __init__(self, address, count, seconds, failure):
    self._address, self._count = address, count
    self._seconds, self._failure = seconds, failure
    self._deadline = time.monotonic() + seconds
    self._says_at = time.monotonic() + _SILENT_SECONDS
    self._guests: dict[int, socket.socket] = {}
    self._selector = selectors.DefaultSelector()

  def run(self, port: int) -> None:
    """See `meet`."""
    with contextlib.closing(_listen(self._address, port)) as server:
      self._selector.register(server, selectors.EVENT_READ)
      with contextlib.closing(self._selector):
        try:
          while len(self._guests) < self._count - 1:
            self._wait(server)
        finally:
          start = {"aoarm_jax": "start", "failure": self._failure}
          for guest in self._guests.values():
            _send(guest, start)
            guest.close()
    if self._failure:
      raise self._failure.error()

  def _wait(self, server):
    """Welcome those who come, and forget those who go."""
    if time.monotonic() > self._says_at:
      logging.info(
        "waiting for process %s at %s", self._absent(), self._address
      )
      self._says_at = math.inf
    if time.monotonic() > self._deadline:
      if self._failure:
        raise self._failure.error()
      error = NeighbourError(
        f"process {self._absent()} of {self._count} did not come "
        f"to {_ADDRESS}={self._address} within {self._seconds:g} s "
        "(config.distributed.initialization_timeout_seconds): see what that "
        f"process says, and {_AGAIN}"
      )
      self._failure = Failure(0, error.exit_code, str(error))
      raise error
    for key, _ in self._selector.select(_POLL_SECONDS):
      if key.data is None:
        self._welcome(server.accept()[0])
      else:  # A guest says no more, so it is gone. It may come again.
        self._selector.unregister(key.fileobj)
        self._guests.pop(key.data).close()

  def _absent(self):
    """Return the numbers of those who have not come, of many the first."""
    absent = (k for k in range(1, self._count) if k not in self._guests)
    numbers = list(itertools.islice(absent, _MOST_NAMED + 1))
    more = ", ..." * (len(numbers) > _MOST_NAMED)
    return ", ".join(map(str, numbers[:_MOST_NAMED])) + more

  def _welcome(self, guest):
    """Take in a process of this run; leave out anything else."""
    hello = _receive(guest, _ANSWER_SECONDS)
    if hello.get("aoarm_jax") != "hello":
      guest.close()
      return
    process, count = hello["process"], hello["count"]
    if hello["failure"] and not self._failure:
      self._fail(Failure(*hello["failure"]))
    elif count != self._count:
      self._fail(
        f"config.distributed.process_count (AOARM_PROCESS_COUNT) is {count} in "
        f"process {process} and {self._count} in process 0: give all processes "
        "the same number"
      )
    elif process in self._guests or not 0 < process < self._count:
      self._fail(
        f"config.distributed.process_id={process} (AOARM_PROCESS_ID): several "
        "processes have this number: give each process its own, and each run "
        f"its own {_ADDRESS} ({_VARIABLE})"
      )
      process = -len(self._guests) - 1  # It is told, too.
    _send(guest, {"aoarm_jax": "welcome"})
    self._guests[process] = guest
    self._selector.register(guest, selectors.EVENT_READ, process)

  def _fail(self, failure):
    """Note the first failure; those who come soon are told, too."""
    if isinstance(failure, str):
      failure = Failure(0, config_lib.ConfigError.exit_code, failure)
    self._failure = self._failure or failure
    soon = time.monotonic() + _TELL_SECONDS
    self._deadline = min(self._deadline, soon)


def _listen(address, port):
  """Return a socket that listens at a port of this host."""
  both = socket.has_dualstack_ipv6()
  deadline = time.monotonic() + _PORT_SECONDS
  while True:
    try:
      return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=1024,
        dualstack_ipv6=both,
      )
    except OSError as error:
      if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
        why = "another program uses this port on the host of process 0"
        if error.errno != errno.EADDRINUSE:
          why = f"process 0 cannot listen there: {error.strerror}"
        raise config_lib.ConfigError(
          f"{_ADDRESS}={address} ({_VARIABLE}): {why}; choose another port, "
          "the same for all processes"
        ) from None
      time.sleep(_RETRY_SECONDS)


def _join(host, port, count, process, seconds, failure):
  """Come to process 0, and wait until all are there."""
  hello = {"aoarm_jax": "hello", "process": process, "count": count}
  hello["failure"] = failure
  where = f"{_ADDRESS}={host}:{port} ({_VARIABLE})"
  deadline = time.monotonic() + seconds
  stranger_since, why = None, ""
  says_at = time.monotonic() + _SILENT_SECONDS
  while time.monotonic() < deadline:
    if time.monotonic() > says_at:
      logging.info("waiting for process 0 at %s:%d: %s", host, port, why)
      says_at = math.inf
    try:
      connection = socket.create_connection((host, port), _ANSWER_SECONDS)
    except OSError as error:
      why, stranger_since = error.strerror or str(error), None
      time.sleep(_RETRY_SECONDS)
      continue
    with connection:
      _send(connection, hello)
      answer = _line(connection, _ANSWER_SECONDS)
      if _message(answer).get("aoarm_jax") == "welcome":
        # Process 0 knows when to give up, and says who is missing.
        start = _receive(connection, seconds + _TELL_SECONDS)
        if not start:
          raise NeighbourError(
            f"process {process} lost a neighbour: process 0 ended while it "
            f"waited for the other processes at {where}; {_AGAIN}"
          )
        if start["failure"]:
          raise Failure(*start["failure"]).error()
        return _until_it_listens(host, port)
    why = "another program answers there"
    stranger_since = stranger_since or time.monotonic()
    # HTTP/2 is what JAX's server speaks: an earlier start of this run may still
    # be ending there, and process 0 comes after it.
    is_jax = answer[:2] == b"\0\0" and answer[3:4] == b"\4"
    if not is_jax and time.monotonic() - stranger_since > _STRANGER_SECONDS:
      raise NeighbourError(
        f"{where}: process {process} finds another program than process 0 of "
        "this run at this address; choose another port, the same for all "
        "processes"
      )
    time.sleep(_RETRY_SECONDS)
  raise NeighbourError(
    f"{where}: process {process} did not reach process 0 within {seconds:g} s "
    f"(config.distributed.initialization_timeout_seconds): {why}; see what "
    f"process 0 says, and {_AGAIN}"
  )


def _until_it_listens(host, port):
  """Wait for JAX's server at the port: JAX itself would look once a second."""
  deadline = time.monotonic() + _ANSWER_SECONDS
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      socket.create_connection((host, port), _ANSWER_SECONDS).close()
      return
    time.sleep(0.02)


def _send(connection, message):
  """Send a message in one line; the other side may be gone."""
  with contextlib.suppress(OSError):
    connection.settimeout(_ANSWER_SECONDS)
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
  """Return the next message, or {} if there is none."""
  return _message(_line(connection, seconds))


def _message(line: bytes) -> dict[str, Any]:
  """Return the message in a line, or {} if it is none."""
  try:
    message = reading.parse(line, {"aoarm_jax": str})
    reading.check(message, _FIELDS.get(message["aoarm_jax"], {}))
    if failure := message.get("failure"):
      fields = zip(Failure._fields, failure, strict=True)
      reading.check(dict(fields), _FAILURE)
  except ValueError:
    return {}
  return dict(message)


def _line(connection: socket.socket, seconds: float) -> bytes:
  """Return the next line, or what there is of it when the time is over."""
  deadline = time.monotonic() + seconds
  line = b""
  with contextlib.suppress(OSError):
    while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
      connection.settimeout(max(0.001, deadline - time.monotonic()))
      received = connection.recv(1)  # No byte of the next message.
      if not received:
        break
      line += received
  return line
