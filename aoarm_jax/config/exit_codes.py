"""The exit codes of the program: one table for the program and all launchers.

A launcher sees the exit codes of all processes of one start. Most of them are
consequences: a process that loses another process fails, too. So the table is
sorted. The code whose row comes first is the cause of the others, and its row
says whether the same command is started again.

This file imports the standard library only, because a launcher may run where
JAX is not installed.
"""

import fnmatch
from collections.abc import Iterable
from typing import NamedTuple

FAILED = 1
REFUSED = 2
STUCK = 14  # The number of SIGALRM, see devices.distributed.Watchdog.
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h.
LOST = 76
INTERRUPTED = 130  # As shells say it: 128 and the number of SIGINT.
KILLED = 137


class Row(NamedTuple):
  """Exit codes with one meaning.

  Attributes:
    codes: the codes as patterns of a shell. A code belongs to the first row
      whose pattern fits; () takes the codes that fit no row.
    again: whether a launcher starts the same command again.
    meaning: what happened, as part of a sentence.
  """

  codes: tuple[str, ...]
  again: bool
  meaning: str


TABLE = (
  Row(
    (f"{REFUSED}", "126", "127", f"{INTERRUPTED}"),
    False,
    "the command cannot be run as it is written, or Ctrl-C came",
  ),
  # Nothing but the kernel or a person kills a process. So this is a cause.
  Row((f"{KILLED}",), True, "the process was killed"),
  Row((), False, "the run failed"),
  Row(
    (f"{STUCK}", "142"),
    True,
    "the process was stuck, or waited for a stuck one, and ended itself",
  ),
  Row((f"{PREEMPTED}",), True, "SIGTERM came, and the run saved its state"),
  # An abort may be seen as 139: where it cannot end the process, for example in
  # process 1 of a container, the C library ends it by an invalid access.
  Row(
    (f"{LOST}", "134", "139"),
    True,
    "the process crashed, or it was ended because another process was lost",
  ),
  Row(("129", "13?", "1[4-9]?", "2??"), True, "a signal ended the process"),
)


def of_return_code(code: int) -> int:
  """Return the exit code, as a shell says it, of a return code of subprocess.

  Args:
    code: an exit code, or -n after signal n.
  """
  return 128 - code if code < 0 else code


def row_of(code: int) -> int:
  """Return the number of the row in TABLE of an exit code other than 0."""
  for number, row in enumerate(TABLE):
    if any(fnmatch.fnmatchcase(str(code), pattern) for pattern in row.codes):
      return number
  return next(number for number, row in enumerate(TABLE) if not row.codes)


def is_restartable(code: int) -> bool:
  """Return whether the same command is started again after an exit code."""
  return code != 0 and TABLE[row_of(code)].again


def cause(codes: Iterable[int]) -> int:
  """Return the exit code that explains the others; 0 if all are 0.

  Args:
    codes: exit codes of the processes of one start.
  """
  return min(filter(None, codes), key=row_of, default=0)
