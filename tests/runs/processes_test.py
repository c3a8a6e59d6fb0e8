"""What is wrong with one of two processes ends both of them, with one line."""

import contextlib
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import helpers
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax import command_line
from aoarm_jax.devices import meshes
from aoarm_jax.runs import agreement

CHANGES = {
  "model.T": 8,
  "model.L": 1,
  "train.steps": 3,
  "eval.every": 0,
  "eval.batches": 1,
  "sample.every": 0,
  "distributed.heartbeat_timeout_seconds": 10,
}
IMPATIENT = """
from aoarm_jax.runs import agreement
agreement._DISK_SECONDS = 1.0
"""
# A process that reads its text for ever, as from a disk that hangs.
HANGS = """
import time
from aoarm_jax.data import corpora
corpora.load = lambda *args: time.sleep(1000)
"""
# A save without a training run, in the folder sys.argv[1]. To the process
# sys.argv[3] happens what sys.argv[2] says: full, killed or hangs.
SAVES = """
import os, sys, time
import jax, numpy as np
from aoarm_jax.config import schema
from aoarm_jax.devices import distributed
from aoarm_jax.runs import arrays, checkpoint

def save():
  distributed.start(schema.Distributed(heartbeat_timeout_seconds=10))
  process = jax.process_index()
  def strike(*args, **kwargs):
    if sys.argv[2] == "full":
      raise OSError(28, "No space left on device")
    if sys.argv[2] == "killed":
      os.kill(os.getpid(), 9)
    time.sleep(1000)
  with checkpoint.Checkpoints(sys.argv[1], keep_last=1, keep_best=0) as saves:
    saves.newest()  # A collective, which connects the processes.
    if process == int(sys.argv[3]):
      if sys.argv[2] == "killed":
        distributed.multihost_utils.broadcast_one_to_all = strike
      arrays.v1.save_checkpointables_async = strike
    print("saving", flush=True)
    saves.save(1, {"x": np.ones(3)}, data_state={}, config_json="")

with distributed.failing_at_once():
  try:
    with distributed.blaming_neighbours():
      save()
  except Exception as error:
    print("error:", error, flush=True)
    sys.exit(getattr(error, "exit_code", 1))
"""
# Process 0 loses its run directory before the save of step 2.
LOSES_FOLDER = """
import shutil
from aoarm_jax.training import loop
def visit(run, step, *rest, visit=loop._Run._visit):
  if step == 2 and run.primary:
    shutil.rmtree(run.workdir)
  visit(run, step, *rest)
loop._Run._visit = visit
"""
_contexts = contextlib.ExitStack()
_folder: pathlib.Path  # Of this module's runs.


def setUpModule():
  global _folder
  _contexts.enter_context(helpers.quick_compilation())
  _folder = pathlib.Path(_contexts.enter_context(tempfile.TemporaryDirectory()))
  helpers.write_text(_folder / "text")
  shutil.copytree(_folder / "text", _folder / "copy")


def tearDownModule():
  _contexts.close()


def arguments(name, *more, **changes):
  return helpers.command_in(_folder, CHANGES, name, *more, **changes)


@contextlib.contextmanager
def pair(*commands, environments=({}, {})):
  """Both processes of a run, each with its own command; killed in the end."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  processes = [
    subprocess.Popen(
      command,
      env=helpers.environment(
        AOARM_DISTRIBUTED="1",
        AOARM_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        AOARM_PROCESS_COUNT="2",
        AOARM_PROCESS_ID=str(index),
        **environment,
      ),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index, (command, environment) in enumerate(zip(commands, environments))
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def saving(what, index):
  """The command of a process that saves, as SAVES describes it."""
  folder = str(_folder / f"{what}_{index}")
  return [sys.executable, "-c", SAVES, folder, what, str(index)]


def ends(processes, seconds=100):
  """[(exit code, output)] of both processes, once both have ended."""
  outputs = [process.communicate(timeout=seconds)[0] for process in processes]
  return [(p.returncode, out) for p, out in zip(processes, outputs)]


def read_until(process, text):
  lines = []
  while not lines or text not in lines[-1]:
    lines.append(process.stdout.readline())
    assert lines[-1], "".join(lines)


class Compared(Exception):
  """The processes have been compared."""


class ModesTest(parameterized.TestCase):
  @parameterized.parameters(*command_line.MODES)
  def test_every_mode_compares_first(self, mode):
    """Before it looks at a device; the modes that read a run look for it."""
    more = {
      "score": ["--text=a"],
      "compile": ["--topology=v5e:2x4"],
      "prepare": ["--out=prepared"],
      "export": ["--out=exported"],
      "convert": ["--input=source"],
    }
    command = arguments(mode, f"--mode={mode}", *more.get(mode, []))
    with (
      mock.patch.object(agreement, "check_disk") as check_disk,
      mock.patch.object(agreement, "check_command", side_effect=Compared),
      mock.patch.object(meshes, "all_devices") as all_devices,
      self.assertRaises(Compared),
    ):
      helpers.run(command)
    all_devices.assert_not_called()
    reading = "eval", "sample", "score", "benchmark", "export"
    self.assertEqual(check_disk.called, mode in reading)


class DifferenceTest(parameterized.TestCase):
  def assert_refused(self, processes, *words):
    """Both processes say the same in one line, and exit with 2."""
    for code, out in ends(processes):
      lines = [x for x in out.splitlines() if "aoarm_jax: error:" in x]
      self.assertEqual(code, 2, out)
      self.assertLen(lines, 1, out)
      self.assertNotIn("Traceback", out)
      self.assertNotIn("resumed", out)
      for word in words:
        self.assertIn(word, lines[0])

  def differing(self, first, second, code=""):
    """Both processes with their arguments; process 1 runs `code` before."""
    return pair([*helpers.program(), *first], [*helpers.program(code), *second])

  def test_a_field(self):
    """The hosts may have the text in different places, and no other field."""
    with self.differing(
      arguments("seed"), arguments("seed", seed=1, data__path=_folder / "copy")
    ) as processes:
      self.assert_refused(
        processes, "process 1 ", "config.seed is 1, and it is 0 in process 0"
      )
    self.assertFalse((_folder / "seed").exists())

  @pytest.mark.thorough
  def test_the_command_line(self):
    """A process that cannot read its command ends the other one, too."""
    with self.differing(
      arguments("line"), arguments("line", "--nothing")
    ) as processes:
      self.assert_refused(processes, "Unknown command line flag 'nothing'")

  @pytest.mark.thorough
  def test_the_disk(self):
    """The folder of process 1 lies on a disk of its own."""
    with self.differing(
      arguments("disk"), arguments("disk_of_1"), IMPATIENT
    ) as processes:
      self.assert_refused(
        processes,
        "process 1 ",
        f"--workdir={_folder / 'disk_of_1'}: cannot read the file .shared",
        "shared disk",
      )
    self.assertFalse((_folder / "disk" / "config.json").exists())


@pytest.mark.thorough
class FailureTest(parameterized.TestCase):
  def test_a_save_that_fails_ends_the_other_process(self):
    begin = time.monotonic()
    with pair(*[saving("full", 1)] * 2) as processes:
      for k, (code, out) in enumerate(ends(processes)):
        self.assertEqual(code, 1, out)
        self.assertIn("checkpoint step 1 was not saved", out)
        self.assertIn("No space left on device", out)
        self.assertEqual("process 1 failed" in out, k == 0, out)
    self.assertLess(time.monotonic() - begin, 60)  # Not after a timeout.

  def test_a_killed_process(self):
    """The other one says in a line what it lost; it can be started again."""
    with pair(*[saving("killed", 1)] * 2) as processes:
      (code, out), (killed, _) = ends(processes)
    self.assertEqual(killed, -signal.SIGKILL)
    self.assertEqual(code, 76, out)
    self.assertRegex(out, "error: process 0 lost a neighbour .*Gloo")
    self.assertNotIn("Traceback", out)

  @pytest.mark.slow
  def test_a_run_directory_that_goes(self):
    """Both processes save the step elsewhere, and say so."""
    command = [
      *helpers.program(LOSES_FOLDER),
      *arguments("gone", checkpoint__every=2),
    ]
    with pair(command, command) as processes:
      for code, out in ends(processes):
        self.assertEqual(code, 1, out)
        self.assertIn(f"--workdir={_folder / 'gone'} was removed, moved", out)
        self.assertIn(f"step 2 is saved in {_folder / 'gone-2'}: ", out)
    self.assertTrue((_folder / "gone-2/checkpoints/2/manifest.json").exists())
    self.assertFalse((_folder / "gone").exists())

  @pytest.mark.slow
  def test_sigterm_while_another_process_reads_its_text(self):
    with pair(
      [*helpers.program(), *arguments("hangs")],
      [*helpers.program(HANGS), *arguments("hangs")],
    ) as processes:
      read_until(processes[0], "text: folder")
      processes[0].terminate()
      self.assert_ended(processes)

  def test_sigterm_while_another_process_hangs_in_a_save(self):
    with pair(*[saving("hangs", 1)] * 2) as processes:
      read_until(processes[0], "saving")
      time.sleep(1)
      processes[0].terminate()
      self.assert_ended(processes)

  def assert_ended(self, processes):
    """Process 0 by the signal, and process 1 because of that."""
    for code, out in ends(processes, seconds=60):
      self.assertEqual(code, 75, out)
      self.assertIn("process 0 was ended by SIGTERM while it waited", out)


if __name__ == "__main__":
  absltest.main()
