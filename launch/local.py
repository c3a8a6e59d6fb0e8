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
wrong. Ctrl-C and SIGTERM ask all processes to save and stop; a second Ctrl-C
kills them.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from launch import common

_MODULE = "launch.local"
_POLL_SECONDS = 0.1


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
  """How a start of the processes failed.

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
      # In its own session Ctrl-C does not reach it. Otherwise the processes
      # would stop at different steps.
      start_new_session=True,
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
    deadline = time.monotonic() + self._grace_seconds
    while time.monotonic() < deadline and any(
      process.poll() is None for process in self._processes
    ):
      time.sleep(_POLL_SECONDS)
    running = [i for i, p in enumerate(self._processes) if p.poll() is None]
    self.kill()
    return running

  def kill(self) -> None:
    """Kill all processes, and those that they have started."""
    for process in self._processes:
      # A process may be gone while its children still run.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    self._join_readers()

  def terminate(self) -> None:
    """Send SIGTERM to all running processes."""
    for process in self._processes:
      if process.poll() is None:
        process.terminate()

  def _join_readers(self) -> None:
    for reader in self._readers:
      reader.join(timeout=5)


def _first_failure(codes: Sequence[int | None]) -> tuple[int, int]:
  """Return (index, code) of the process whose failure caused the others.

  A lost process makes others fail with an exit code, and JAX ends others by an
  abort. So a process that was lost comes first, then one with an exit code.

  Args:
    codes: exit code of each process, None for a running one; at least one is
      not 0.
  """
  failed = [(index, code) for index, code in enumerate(codes) if code]
  lost = [x for x in failed if x[1] < 0 and x[1] != -signal.SIGABRT]
  exited = [x for x in failed if x[1] > 0]
  return (lost or exited or failed)[0]


_output_lock = threading.Lock()


def _print_lines(index: int, pipe: IO[bytes]) -> None:
  """Print the lines of a process, with its number in front."""
  for line in pipe:
    with _output_lock:
      sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
      sys.stdout.flush()


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port: int = probe.getsockname()[1]
    return port


class _Stop:
  """Passes SIGTERM and Ctrl-C on to the processes, as SIGTERM.

  Attributes:
    received: number of the last signal, 0 before any.
    group: the processes; None before the first start.
  """

  def __init__(self) -> None:
    self.received = 0
    self.group: Group | None = None
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._handle)

  def _handle(self, number: int, _: object) -> None:
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number
    if self.group:
      self.group.terminate()


def start(flags: argparse.Namespace) -> int:
  """Run the command; return the exit code of the last start."""
  common.check_at_least("--processes", flags.processes, 1)
  common.check_at_least("--devices", flags.devices, 1)
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  common.check_at_least("--grace-seconds", flags.grace_seconds, 0)
  _check_machines(flags)
  common.check_command(flags.command)
  if flags.dry_run:
    for index in range(flags.processes):
      variables = environment(flags, index, "PORT")
      print(common.assignments(variables), shlex.join(flags.command))
    return 0
  handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    return _run_with_restarts(flags, _Stop())
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def _check_machines(flags: argparse.Namespace) -> None:
  """Raise LaunchError unless the flags about several machines agree."""
  common.check_at_least("--machines", flags.machines, 1)
  common.check_range("--machine", flags.machine, 0, flags.machines - 1)
  host, _, port = flags.address.rpartition(":")
  is_given = host != "" and port.isdigit()
  if not is_given and (flags.address or flags.machines > 1):
    raise common.LaunchError(
      f"--address={flags.address}: write host:port of machine 0, the same for "
      "all --machines"
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
    code = failure.code if failure.code > 0 else 128 - failure.code
    common.say(_MODULE, _describe(failure, flags))
    if stop.received:
      return common.INTERRUPTED if stop.received == signal.SIGINT else code
    if code != common.PREEMPTED and not common.died_by_signal(code):
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
  if failure.code == common.PREEMPTED:
    text = "the run was preempted and saved"
  elif failure.code == -signal.SIGALRM:
    text = (
      f"{who} was stuck and ended itself, or another process that it waited "
      "for was stuck"
    )
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
