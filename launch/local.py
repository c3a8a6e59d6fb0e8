"""Starts a command as N processes on this machine, which JAX joins to one.

  python -m launch.local --processes=2 -- \\
    python -m aoarm_jax.main --config=configs/two_stream.py:tiny

--platform=cpu: every process has --devices virtual CPU devices.
--platform=gpu: process i has GPU i alone.

When one process fails, the others are ended, and the command is started again
where that helps: after exit code 75 (preempted, saved) and after a crash. It
is not after any other exit code: the command has said what is wrong. Ctrl-C
and SIGTERM ask all processes to save and stop; a second Ctrl-C kills them.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from launch import common

_POLL_SECONDS = 0.1


def make_parser() -> argparse.ArgumentParser:
  parser = common.parser("launch.local", __doc__)
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
    help="cpu: virtual devices a process (default: 1)",
  )
  parser.add_argument(
    "--max-restarts",
    type=int,
    default=3,
    help="starts again at most, after preemption or a crash (default: 3)",
  )
  parser.add_argument(
    "--grace-seconds",
    type=float,
    default=15.0,
    help="from the first process's failure until the others are killed "
    "(default: 15)",
  )
  common.add_dry_run(parser)
  return parser


def environment(flags: argparse.Namespace, index: int, port: int):
  """What process `index` has in its environment besides this one's."""
  own = {
    "AOARM_DISTRIBUTED": "1",
    "AOARM_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "AOARM_PROCESS_COUNT": str(flags.processes),
    "AOARM_PROCESS_ID": str(index),
    "PYTHONUNBUFFERED": "1",
  }
  if flags.platform == "cpu":
    return own | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(flags.devices),
    }
  return own | {"CUDA_VISIBLE_DEVICES": str(index)}


@dataclasses.dataclass(frozen=True)
class Failure:
  """How one start ended.

  Attributes:
    index: of the process that failed first.
    code: its return code, as of subprocess.
    silent: the processes that did not end by themselves and were killed.
  """

  index: int
  code: int
  silent: list[int]


class Group:
  """The processes of one start."""

  def __init__(self, flags: argparse.Namespace):
    self._grace_seconds = flags.grace_seconds
    port = _free_port()
    self._processes = []
    self._readers = []
    try:
      for index in range(flags.processes):
        own = environment(flags, index, port)
        self._start(flags.command, index, os.environ | own)
    except OSError as error:
      self.kill()
      raise common.LaunchError(
        f"{flags.command[0]}: cannot be started: {error.strerror}"
      ) from error

  def _start(self, command, index, env):
    process = subprocess.Popen(
      command,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      # Out of the terminal's reach: Ctrl-C would stop them at different steps.
      start_new_session=True,
    )
    self._processes.append(process)
    reader = threading.Thread(
      target=_print_lines, args=(index, process.stdout), daemon=True
    )
    reader.start()
    self._readers.append(reader)

  def wait(self) -> Failure | None:
    """Waits until all are done (None), or one failed and the rest are ended."""
    while True:
      codes = self._codes()
      if any(codes):
        return Failure(*_culprit(self._codes_at_failure), self._end())
      if None not in codes:
        self._join_readers()
        return None
      time.sleep(_POLL_SECONDS)

  def _codes(self):
    codes = [process.poll() for process in self._processes]
    if any(codes):
      # Asked once more: what made the first one fail had happened before.
      codes = [process.poll() for process in self._processes]
      self._codes_at_failure = codes
    return codes

  def _end(self):
    """Waits for the others to end by themselves; kills and returns the rest."""
    deadline = time.monotonic() + self._grace_seconds
    while time.monotonic() < deadline and any(
      process.poll() is None for process in self._processes
    ):
      time.sleep(_POLL_SECONDS)
    silent = [i for i, p in enumerate(self._processes) if p.poll() is None]
    self.kill()
    return silent

  def kill(self):
    """Ends all processes and theirs at once."""
    for process in self._processes:
      # Also where it is gone: its children may not be.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    self._join_readers()

  def terminate(self):
    for process in self._processes:
      if process.poll() is None:
        process.terminate()

  def _join_readers(self):
    for reader in self._readers:
      reader.join(timeout=5)


def _culprit(codes):
  """Who failed first, as (index, code), of those that had when it was seen.

  A lost process makes others fail in their ways, and JAX ends them by an
  abort.
  """
  failed = [(index, code) for index, code in enumerate(codes) if code]
  lost = [one for one in failed if one[1] < 0 and one[1] != -signal.SIGABRT]
  spoken = [one for one in failed if one[1] > 0]
  return (lost or spoken or failed)[0]


_lock = threading.Lock()


def _print_lines(index, pipe):
  for line in pipe:
    with _lock:
      sys.stdout.write(f"[{index}] {line.decode(errors='replace')}")
      sys.stdout.flush()


def _free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _say(text):
  print(f"launch.local: {text}", file=sys.stderr, flush=True)


class _Stop:
  """Passes SIGTERM and Ctrl-C on to the processes, as SIGTERM."""

  def __init__(self):
    self.received = 0
    self.group = None
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._note)

  def _note(self, number, _):
    if self.received == signal.SIGINT == number:
      raise KeyboardInterrupt
    self.received = number
    if self.group:
      self.group.terminate()


def start(flags: argparse.Namespace) -> int:
  """Runs the command; returns the exit code of the last start."""
  common.check_at_least("--processes", flags.processes, 1)
  common.check_at_least("--devices", flags.devices, 1)
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  common.check_at_least("--grace-seconds", flags.grace_seconds, 0)
  common.check_command(flags.command)
  if flags.dry_run:
    for index in range(flags.processes):
      common.print_command(flags.command, environment(flags, index, "PORT"))
    return 0
  former = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    return _start_again_and_again(flags, _Stop())
  finally:
    for number, handler in former.items():
      signal.signal(number, handler)


def _start_again_and_again(flags, stop):
  for restart in range(flags.max_restarts + 1):
    stop.group = Group(flags)
    try:
      if stop.received:  # It came before there was a group to tell.
        stop.group.terminate()
      failure = stop.group.wait()
    finally:
      stop.group.kill()
    if failure is None:
      return 0
    code = failure.code if failure.code > 0 else 128 - failure.code
    _say(_what_happened(failure, flags))
    if stop.received:
      return common.INTERRUPTED if stop.received == signal.SIGINT else code
    if code != common.PREEMPTED and not common.died_by_signal(code):
      return code
    if restart < flags.max_restarts:
      _say(
        f"restart {restart + 1} of {flags.max_restarts}: the run goes on from "
        "its last checkpoint"
      )
  _say(f"gave up after {flags.max_restarts} restarts (--max-restarts)")
  return code


def _what_happened(failure, flags):
  who = f"process {failure.index} of {flags.processes}"
  if failure.code == common.PREEMPTED:
    text = "the run was preempted and saved"
  elif failure.code == -signal.SIGALRM:
    text = f"{who} was stuck and ended itself, or another it waited for was"
  elif failure.code < 0:
    text = f"{who} was lost: {signal.Signals(-failure.code).name}"
  else:
    text = f"{who} failed with exit code {failure.code}"
  for index in failure.silent:
    seconds = f"{flags.grace_seconds:g}"
    text += f"; process {index} did not end within {seconds} s: killed"
  return text


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
