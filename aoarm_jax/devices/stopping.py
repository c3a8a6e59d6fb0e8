"""SIGTERM and Ctrl-C: the end of the program, at once or after a batch.

A program that has nothing to keep ends at once, see `end_at_once`. A loop whose
work can be kept asks `Signals` before every step or batch.

This file is imported before JAX, which takes seconds. So it imports JAX only
where it is needed.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from absl import logging

from aoarm_jax.config import errors, exit_codes

# A terminal and a parent may both pass one Ctrl-C on. Signals within this time
# after the first are the same wish.
_ECHO_SECONDS = 0.5
COMPILES = "compiles"  # Names of threads that compile begin so.
_CODES = {
  signal.SIGTERM: exit_codes.PREEMPTED,
  signal.SIGINT: exit_codes.INTERRUPTED,
}


class Stopped(errors.UserError):
  """A signal stopped the program before its work was complete.

  Attributes:
    exit_code: 130 after SIGINT, else 75.
  """

  def __init__(self, message: str, number: int) -> None:
    """Choose the exit code.

    Args:
      message: the line for the user.
      number: the signal, SIGTERM or SIGINT.
    """
    super().__init__(message)
    self.exit_code = _CODES[signal.Signals(number)]


class _End:
  """The end of the program by a signal.

  Attributes:
    began: time.monotonic() at the first signal; None before.
    unwinds: whether the end is an exception, which closes files and locks.
  """

  began: float | None = None
  unwinds = False


def end_at_once(*, unwinds: bool = False) -> None:
  """End the program at SIGTERM and at Ctrl-C, with a line and its exit code.

  Args:
    unwinds: whether the main thread raises SystemExit or KeyboardInterrupt.
      Otherwise the process ends on the spot: an exception in the middle of an
      import would be printed with its traceback.
  """
  _End.unwinds = unwinds
  for number in _CODES:
    signal.signal(number, _end)


def forget_signals() -> None:
  """Let no signal interrupt the last lines of the program."""
  _End.began = _End.began or time.monotonic()


def flush() -> None:
  """Write out what is printed; os._exit does not."""
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:  # It may be closed.
      with contextlib.suppress(OSError, ValueError):
        stream.flush()


def leave_compilations(code: object) -> None:
  """End the process now if a thread named COMPILES still compiles a program.

  Python would wait for the thread. This takes minutes, and nothing can
  interrupt a compilation.

  Args:
    code: the exit code, as SystemExit has it.
  """
  names = [thread.name for thread in threading.enumerate()]
  if isinstance(code, int) and any(n.startswith(COMPILES) for n in names):
    flush()
    os._exit(code)


def _end(number: int, _: FrameType | None = None) -> None:
  """End the program; handles a signal."""
  is_first = _End.began is None
  if _End.began is not None and time.monotonic() < _End.began + _ECHO_SECONDS:
    return
  _End.began = _End.began or time.monotonic()
  raises = is_first and _End.unwinds
  if raises and number == signal.SIGINT:
    raise KeyboardInterrupt
  if is_first:
    how = "SIGTERM: start the same command again"
    _say("error: interrupted" if number == signal.SIGINT else how)
  if raises:
    raise SystemExit(exit_codes.PREEMPTED)
  os._exit(_CODES[signal.Signals(number)])


def _say(text: str) -> None:
  """Write a line, also in the midst of another line's being written."""
  os.write(2, f"aoarm_jax: {text}\n".encode())


class Signals:
  """Remembers the first signal until the step or batch is done.

  Several processes must stop at the same step. So with several processes JAX
  catches the SIGTERM of any process and tells the others, and all processes
  see the signal in the same poll.
  """

  def __init__(
    self,
    what: str,
    numbers: tuple[signal.Signals, ...] = (signal.SIGTERM,),
    beat: Callable[[int | None], None] = lambda step: None,
  ) -> None:
    """Catch nothing yet.

    Args:
      what: what is completed before the stop, as in "step".
      numbers: the signals that are remembered, SIGTERM and SIGINT.
      beat: called by every poll with its step.
    """
    self.received = 0
    self._what, self._numbers, self._beat = what, numbers, beat
    self._polls = 0
    self._since = 0.0
    self._has_stopped = False

  def __enter__(self) -> "Signals":
    import jax

    handled = () if jax.distributed.is_initialized() else self._numbers
    self._former = {n: signal.signal(n, self._note) for n in handled}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._former.items():
      signal.signal(number, handler)

  def _interrupt(self, frame: FrameType | None) -> None:
    """Do at the second Ctrl-C what the first one would do elsewhere."""
    former = self._former[signal.SIGINT]
    if not callable(former):
      raise KeyboardInterrupt
    former(signal.SIGINT, frame)

  def _note(self, number: int, frame: FrameType | None) -> None:
    if not self.received:
      self.received, self._since = number, time.monotonic()
      name = signal.Signals(number).name
      logging.warning("%s: stopping after this %s", name, self._what)
      return
    is_echo = time.monotonic() < self._since + _ECHO_SECONDS
    if number == signal.SIGINT and not is_echo:
      self._interrupt(frame)

  def poll(self, step: int | None = None) -> int:
    """Return the signal received, or 0 if there was none.

    All processes must poll equally often, before every step or batch.

    Args:
      step: the step that begins; None within a step.
    """
    import jax
    from jax.experimental import multihost_utils

    self._beat(step)
    if jax.distributed.is_initialized() and not self.received:
      self._polls += 1
      if multihost_utils.reached_preemption_sync_point(self._polls):
        self._note(signal.SIGTERM, None)
    self._has_stopped |= bool(self.received)
    return self.received

  def raise_if_stopped(self, done: str) -> None:
    """Raise Stopped if a poll has ended a loop before its work was complete.

    Args:
      done: what is done, as in "2 of 5 texts".
    """
    if self._has_stopped:
      name = signal.Signals(self.received).name
      raise Stopped(
        f"{name} after {done}: start the same command again for the whole "
        "result",
        self.received,
      )
