"""Starts a command as N processes on this machine; JAX joins them to one run.

  python -m launch.local --processes=2 -- \\
    python -m aoarm_jax.main --config=configs/two_stream.py:tiny

--platform=cpu: every process has --devices virtual CPU devices.
--platform=gpu: process i has GPU i alone.

One run may have processes on several machines. Start this launcher on each of
them, with --machines, --machine and --address. Every launcher starts its own
processes again.

When one process fails, the others are ended. The command is started again after
exit code 75 (preempted, saved) and after a crash, where this helps. It is not
started again after any other exit code: then the command has said what is
wrong. Ctrl-C, SIGTERM and the end of the terminal ask all processes to save and
stop. After --stop-seconds they are killed, and at once by a second Ctrl-C. If
this launcher is killed, its processes are asked to stop, too, and killed after
--grace-seconds.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from aoarm_jax.config import exit_codes
from launch import common

_MODULE = "launch.local"
_POLL_SECONDS = 0.1
_MOST_SECONDS = 10**6  # The guard cannot sleep for ever.
# A terminal and a parent may both pass one Ctrl-C on.
_ECHO_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# A small process that leads the process group of all processes of a start. The
# launcher holds the other end of its input, which ends with the launcher.
_GUARD = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
  signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read()
os.killpg(0, signal.SIGTERM)
time.sleep(float(sys.argv[1]))
os.killpg(0, signal.SIGKILL)
"""


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of this launcher."""
  parser = common.parser(_MODULE, __doc__)
  parser.add_argument(
    "--processes", type=int, required=True, help="processes to start"
  )
  parser.add_argument(
    "--platform",
    choices=("cpu", "gpu"),
    default="cpu",
    help="what the processes compute on (default: cpu)",
  )
  parser.add_argument(
    "--devices",
    type=int,
    default=1,
    help="with cpu: virtual devices of a process (default: 1)",
  )
  parser.add_argument(
    "--machines",
    type=int,
    default=1,
    help="machines of the run, each with --processes (default: 1)",
  )
  parser.add_argument(
    "--machine",
    type=int,
    default=0,
    help="with --machines: number of this one, from 0 (default: 0)",
  )
  parser.add_argument(
    "--address",
    default="",
    help="with --machines: machine 0 and a free port there, as in host:8476",
  )
  common.add_max_restarts(parser, 3, "preemption or a crash")
  parser.add_argument(
    "--grace-seconds",
    type=float,
    default=15.0,
    help="from the first process's failure until the others are killed "
    "(default: 15)",
  )
  parser.add_argument(
    "--stop-seconds",
    type=float,
    default=300.0,
    help="from SIGTERM or Ctrl-C until the processes are killed, enough for a "
    "save (default: 300)",
  )
  common.add_dry_run(parser)
  return parser


def environment(
  flags: argparse.Namespace, index: int, port: int | str
) -> dict[str, str]:
  """Return the variables of a process that differ from those of this one.

  Args:
    flags: flags of this launcher.
    index: number of the process on this machine.
    port: port at which process 0 listens if --address names none.
  """
  variables = {
    **common.ENVIRONMENT,
    **common.join_variables(
      flags.address or f"127.0.0.1:{port}", flags.machines * flags.processes
    ),
    "AOARM_PROCESS_ID": str(flags.machine * flags.processes + index),
  }
  if flags.platform == "cpu":
    return variables | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(flags.devices),
    }
  return variables | {"CUDA_VISIBLE_DEVICES": str(index)}


@dataclasses.dataclass(frozen=True)
class Failure:
  """The failure of a start of the processes.

  Attributes:
    index: number of the process that failed first.
    code: its return code, as in subprocess.
    killed: numbers of the processes that did not end by themselves.
  """

  index: int
  code: int
  killed: list[int]


class Group:
  """The processes of one start."""

  def __init__(self, flags: argparse.Namespace):
    """Start all processes.

    Raises:
      LaunchError: the command cannot be started.
    """
    self._grace_seconds = flags.grace_seconds
    self._stop_seconds = flags.stop_seconds
    self._kill_at = math.inf  # On time.monotonic's clock.
    self._is_killed = False
    self._guard = subprocess.Popen(
      [sys.executable, "-I", "-S", "-c", _GUARD, str(flags.grace_seconds)],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      process_group=0,
    )
    port = _free_port()
    self._processes: list[subprocess.Popen[bytes]] = []
    self._readers: list[threading.Thread] = []
    try:
      for index in range(flags.processes):
        variables = environment(flags, index, port)
        self._start(flags.command, index, os.environ | variables)
    except OSError as error:
      self.kill()
      raise common.LaunchError(
        f"{flags.command[0]}: cannot be started: {error.strerror}"
      ) from error

  def _start(
    self, command: Sequence[str], index: int, variables: Mapping[str, str]
  ) -> None:
    process = subprocess.Popen(
      command,
      env=variables,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      # In another group Ctrl-C does not reach it. Otherwise the processes would
      # stop at different steps.
      process_group=self._guard.pid,
    )
    self._processes.append(process)
    reader = threading.Thread(
      target=_print_lines, args=(index, process.stdout), daemon=True
    )
    reader.start()
    self._readers.append(reader)

  def wait(self) -> Failure | None:
    """Wait until all processes have ended.

    If one fails, the others are ended.

    Returns:
      The Failure, or None if all succeeded.
    """
    while True:
      codes = self._codes()
      if any(codes):
        index, code = _first_failure(codes)
        return Failure(index, code, self._end())
      if None not in codes:
        self._join_readers()
        return None
      if time.monotonic() > self._kill_at:
        killed = self._end()
        if killed:
          return Failure(killed[0], -signal.SIGKILL, killed)
      time.sleep(_POLL_SECONDS)

  def _codes(self) -> list[int | None]:
    """Return the exit code of each process, None for a running one."""
    codes = [process.poll() for process in self._processes]
    if any(codes):
      # The cause of this failure may be another process that ended before it,
      # but after its poll. So poll again.
      codes = [process.poll() for process in self._processes]
    return codes

  def _end(self) -> list[int]:
    """Give the running processes time to end; kill and return the others."""
    deadline = min(time.monotonic() + self._grace_seconds, self._kill_at)
    while time.monotonic() < deadline and any(
      process.poll() is None for process in self._processes
    ):
      time.sleep(_POLL_SECONDS)
    running = [i for i, p in enumerate(self._processes) if p.poll() is None]
    self.kill()
    return running

  def kill(self) -> None:
    """Kill all processes, and those that they have started."""
    if not self._is_killed:
      # The group of a guard that nobody has waited for cannot be another's.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._guard.pid, signal.SIGKILL)
      self._is_killed = True
    for process in (*self._processes, self._guard):
      process.wait()
    assert self._guard.stdin is not None  # It is a pipe.
    self._guard.stdin.close()
    self._join_readers()

  def terminate(self) -> None:
    """Send SIGTERM to all running processes; later they are killed."""
    self._kill_at = min(self._kill_at, time.monotonic() + self._stop_seconds)
    for process in self._processes:
      if process.poll() is None:
        process.terminate()

  def _join_readers(self) -> None:
    for reader in self._readers:
      reader.join(timeout=5)


def _first_failure(codes: Sequence[int | None]) -> tuple[int, int]:
  """Return (index, code) of the process whose failure caused the others.

  Args:
    codes: return code of each process, None for a running one; at least one is
      not 0.
  """
  failed = [(index, code) for index, code in enumerate(codes) if code]

  def row(failure: tuple[int, int]) -> int:
    return exit_codes.row_of(exit_codes.of_return_code(failure[1]))

  return min(failed, key=row)


_output_lock = threading.Lock()


def _print_lines(index: int, pipe: IO[bytes]) -> None:
  """Print the lines of a process, with its number in front."""
  for line in pipe:
    with _output_lock:
      try:
        sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
        sys.stdout.flush()
      except OSError:
        # Nobody reads the output any more. The process must not wait for it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _free_port() -> int:
  """Return a port of this machine that no program uses.

  Process 0 listens there after seconds only. So the port is none of those that
  Linux gives to connections meanwhile, which are 32768 and above.
  """
  for port in random.sample(range(20_000, 32_000), 100):
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(("", port))
      return port
  raise common.LaunchError("no port of this machine is free", 1)


class _Stop:
  """Passes SIGTERM, Ctrl-C and SIGHUP on to the processes, as SIGTERM.

  Attributes:
    received: number of the last signal, 0 before any.
    group: the processes; None before the first start.
  """

  def __init__(self) -> None:
    self.received = 0
    self.group: Group | None = None
    self._since = 0.0
    for number in _SIGNALS:
      # nohup ignores SIGHUP.
      if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, self._handle)

  def _handle(self, number: int, _: object) -> None:
    if self.received == signal.SIGINT == number:
      if time.monotonic() < self._since + _ECHO_SECONDS:
        return
      signal.signal(signal.SIGINT, signal.SIG_IGN)
      raise KeyboardInterrupt
    self.received, self._since = number, time.monotonic()
    if self.group:
      self.group.terminate()


def start(flags: argparse.Namespace) -> int:
  """Run the command; return the exit code of the last start."""
  common.check_at_least("--processes", flags.processes, 1)
  common.check_at_least("--devices", flags.devices, 1)
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  common.check_range("--grace-seconds", flags.grace_seconds, 0, _MOST_SECONDS)
  common.check_range("--stop-seconds", flags.stop_seconds, 0, _MOST_SECONDS)
  _check_machines(flags)
  common.check_command(flags.command)
  if flags.dry_run:
    for index in range(flags.processes):
      variables = environment(flags, index, "PORT")
      print(common.assignments(variables), shlex.join(flags.command))
    return 0
  handlers = {number: signal.getsignal(number) for number in _SIGNALS}
  try:
    return _run_with_restarts(flags, _Stop())
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def _check_machines(flags: argparse.Namespace) -> None:
  """Raise LaunchError unless the flags about several machines agree."""
  common.check_at_least("--machines", flags.machines, 1)
  common.check_range("--machine", flags.machine, 0, flags.machines - 1)
  match = re.fullmatch(r".+:([0-9]{1,5})", flags.address)
  is_given = match is not None and 1 <= int(match[1]) <= 65535
  if not is_given and (flags.address or flags.machines > 1):
    raise common.LaunchError(
      f"--address={flags.address}: write host:port of machine 0, the same for "
      "all --machines, with a port from 1 to 65535"
    )


def _run_with_restarts(flags: argparse.Namespace, stop: _Stop) -> int:
  """Start the processes again until they succeed; return the exit code."""
  code = 0
  for restart in range(flags.max_restarts + 1):
    stop.group = group = Group(flags)
    try:
      if stop.received:  # The signal came before this group existed.
        group.terminate()
      failure = group.wait()
    finally:
      group.kill()
    if failure is None:
      return 0
    code = exit_codes.of_return_code(failure.code)
    common.say(_MODULE, _describe(failure, flags))
    if stop.received == signal.SIGINT:
      return exit_codes.INTERRUPTED
    if stop.received:
      # The first instants of a process are too early for a handler.
      ended = failure.code == -signal.SIGTERM
      return exit_codes.PREEMPTED if ended else code
    if not exit_codes.is_restartable(code):
      return code
    if restart < flags.max_restarts:
      common.say(
        _MODULE,
        f"restart {restart + 1} of {flags.max_restarts}: the run goes on from "
        "its last checkpoint",
      )
  common.say(
    _MODULE, f"gave up after {flags.max_restarts} restarts (--max-restarts)"
  )
  return code


def _describe(failure: Failure, flags: argparse.Namespace) -> str:
  """Return a line that says how a start failed."""
  who = f"process {failure.index} of {flags.processes}"
  if failure.index in failure.killed:
    return (
      f"process {', '.join(map(str, failure.killed))} of {flags.processes} did "
      f"not end within {flags.stop_seconds:g} s after the signal: killed"
    )
  if failure.code == exit_codes.PREEMPTED:
    text = "the run was preempted and saved"
  elif failure.code == exit_codes.STUCK:
    text = (
      f"{who} was stuck and ended itself, or another process that it waited "
      "for was stuck"
    )
  elif failure.code == exit_codes.LOST:
    text = f"{who} lost another process"
  elif failure.code < 0:
    text = f"{who} was lost: {signal.Signals(-failure.code).name}"
  else:
    text = f"{who} failed with exit code {failure.code}"
  for index in failure.killed:
    seconds = f"{flags.grace_seconds:g}"
    text += f"; process {index} did not end within {seconds} s: killed"
  return text


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
