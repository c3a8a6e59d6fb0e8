"""Lines that say what the program waits for, where a wait is long."""

import collections
import contextlib
import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from absl import logging

from aoarm_jax.runs import telemetry

# After its first line, a long wait says at these intervals that it goes on.
_SECONDS_BETWEEN_WAITS = 30.0
# The progress of a command is logged at these intervals.
SECONDS_BETWEEN_LINES = 15.0


class _Pace:
  """How many of the batches of some work are done, and how fast it goes."""

  def __init__(self, total: int) -> None:
    self.total, self.done = total, 0
    self._second_start = time.monotonic()

  def tick(self) -> None:
    """Note that one more batch is done."""
    self.done += 1
    # The first batch also compiles, so the time left is told without it.
    if self.done == 1:
      self._second_start = time.monotonic()

  @property
  def eta(self) -> str:
    """The time left in words; "" if it is not known."""
    if self.done < 2 or self.done == self.total:
      return ""
    seconds = (time.monotonic() - self._second_start) / (self.done - 1)
    return (
      f"ETA {telemetry.format_duration(seconds * (self.total - self.done))}"
    )


class _Call:
  """A call that waits many times: when it began, and when it says a line.

  Attributes:
    next_line: the time of the next line, on the clock time.monotonic.
    pace: the pace of the work that it does now, or None.
  """

  def __init__(self, seconds: float) -> None:
    self._start = time.monotonic()
    self.next_line = self._start + seconds
    self._waits = collections.Counter[str]()
    self.pace: _Pace | None = None

  def begin(self, what: str) -> str:
    """Return the words for one more wait of a kind."""
    self._waits[what] += 1
    number = self._waits[what]
    if self.pace is not None and self.pace.total > 1:
      return f"{what}, batch {self.pace.done + 1} of {self.pace.total}"
    return f"{what}, batch {number}" if number > 1 else what

  @property
  def eta(self) -> str:
    """The end of a line that says the time left; "" if it is not known."""
    eta = self.pace.eta if self.pace is not None else ""
    return f", {eta}" if eta else ""

  @property
  def passed(self) -> float:
    """Seconds since the call began."""
    return time.monotonic() - self._start


class _Patience(NamedTuple):
  """How long a wait is silent, and the function that takes its lines.

  Attributes:
    seconds: time before the first line; 0 means no lines.
    say: takes a line.
    call: the call that waits. None: every wait stands for itself.
  """

  seconds: float
  say: Callable[[str], None]
  call: _Call | None = None


def _log(line):
  logging.info("%s", line)


_patience: contextvars.ContextVar[_Patience] = contextvars.ContextVar(
  "patience"
)


def set_seconds(
  seconds: float, say: Callable[[str], None] | None = None
) -> contextvars.Token:
  """Sets for how long the waits of this thread are silent; see `waiting`.

  Args:
    seconds: the time before the first line; 0 means no lines.
    say: takes a line. None logs it.

  Returns:
    The token that undoes it.
  """
  return _patience.set(_Patience(seconds, say or _log))


@contextlib.contextmanager
def of_call(seconds: float, say: Callable[[str], None]) -> Iterator[None]:
  """Does what `set_seconds` does, for one call.

  Lines also come where the call takes long and each of its waits is short.
  """
  token = _patience.set(_Patience(seconds, say, _Call(seconds)))
  try:
    yield
  finally:
    _patience.reset(token)


def on_stderr(
  seconds: float,
) -> contextlib.AbstractContextManager[None]:
  """Returns `of_call` whose lines go to stderr, for calls from Python."""
  return of_call(
    seconds, lambda line: print(f"aoarm_jax: {line}", file=sys.stderr)
  )


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Says what the program waits for, if the time inside is long.

  Args:
    what: the work, as in "compiling the training step".
  """
  seconds, say, call = _patience.get(_Patience(2.0, _log))
  if seconds <= 0:
    yield
    return
  start, is_over = time.monotonic(), threading.Event()
  words = call.begin(what) if call else what

  def watch():
    silence = seconds
    if call:
      silence = min(seconds, max(0.0, call.next_line - start))
    while not is_over.wait(silence):
      silence = _SECONDS_BETWEEN_WAITS
      passed = call.passed if call else time.monotonic() - start
      eta = call.eta if call else ""
      say(f"{words}: {telemetry.format_duration(passed)} so far{eta}")
      if call:
        call.next_line = time.monotonic() + silence

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()


_Item = TypeVar("_Item")


def counted(items: Sequence[_Item]) -> Iterator[_Item]:
  """Yield batches, and let the lines of long work say the time left.

  A call from Python says them in `waiting`. A command logs a line between two
  batches, every 15 seconds at most.

  Args:
    items: the batches, or their numbers.
  """
  call = _patience.get(_Patience(2.0, _log)).call
  pace, last_line = _Pace(len(items)), time.monotonic()
  if call is not None:
    call.pace = pace
  for item in items:
    now = time.monotonic()
    if call is None and pace.done and now - last_line > SECONDS_BETWEEN_LINES:
      last_line = now
      eta = f"  {pace.eta}" if pace.eta else ""
      logging.info("%d of %d batches%s", pace.done, pace.total, eta)
    yield item
    pace.tick()
  if call is not None:
    call.pace = None
