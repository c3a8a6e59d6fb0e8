"""Waits for other processes that a SIGTERM ends.

With several processes JAX catches SIGTERM, and the run stops when all processes
have reached the same step. A process that waits for a stuck neighbour would
never come there. So the waits are marked, and neighbours.py looks at the marks.
"""

import contextlib
import ctypes
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple


class _Wait(NamedTuple):
  """A wait that a SIGTERM ends.

  Attributes:
    since: the earliest signal that counts, as time.monotonic() tells it.
    seconds: time from the signal to the end of the process.
  """

  since: float
  seconds: float


class _Sigterm:
  """The state of SIGTERM in this process.

  Attributes:
    came: time of the first signal in a wait, as time.monotonic() tells it; None
      before.
    wait: the wait that the main thread is in; else None.
    patience_seconds: time from a signal to the end where a wait names none.
  """

  came: float | None = None
  wait: _Wait | None = None
  patience_seconds = 100.0


@contextlib.contextmanager
def ending_at_sigterm(seconds: float | None = None) -> Iterator[None]:
  """End this process by a SIGTERM, although it waits for other processes.

  Args:
    seconds: time from the signal to the end of the process. With 0 an earlier
      signal counts, too. None is config.distributed.heartbeat_timeout_seconds.
      Then only a signal during the wait counts, since the run may be saving
      because of an earlier one.
  """
  before = _Sigterm.wait
  if before is None:  # The outer wait decides.
    since = 0.0 if seconds == 0 else time.monotonic()
    seconds = _Sigterm.patience_seconds if seconds is None else seconds
    _Sigterm.wait = _Wait(since, seconds)
  try:
    yield
  finally:
    _Sigterm.wait = before


def is_ended_by_sigterm() -> bool:
  """Return whether a SIGTERM ends the wait that the main thread is in."""
  wait, came = _Sigterm.wait, _Sigterm.came
  return (
    wait is not None
    and came is not None
    and came >= wait.since
    and time.monotonic() >= came + wait.seconds
  )


def catch_sigterm(patience_seconds: float) -> None:
  """Note every SIGTERM, and pass it on to JAX.

  The main thread may wait outside of Python, where Python's handlers do not
  run. A thread can still read the numbers of signals from a socket.

  Args:
    patience_seconds: the default time of `ending_at_sigterm`.
  """
  _Sigterm.patience_seconds = patience_seconds
  if threading.current_thread() is not threading.main_thread():
    return
  of_jax = _getsig(signal.SIGTERM)
  signal.signal(signal.SIGTERM, lambda *_: None)
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

  def read():
    with writer:  # It stays open.
      while numbers := reader.recv(16):
        if signal.SIGTERM in numbers:
          wait, came = _Sigterm.wait, _Sigterm.came
          if came is None or wait is None or came < wait.since:
            _Sigterm.came = time.monotonic()
          if of_jax:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(of_jax)(signal.SIGTERM)

  threading.Thread(target=read, name="sigterm", daemon=True).start()


def _getsig(number):
  function = ctypes.pythonapi.PyOS_getsig
  function.restype = ctypes.c_void_p
  return function(int(number))
