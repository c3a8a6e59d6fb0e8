"""Stuck, killed, without space or permission: said in a line, nothing lost."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import helpers
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.config import exit_codes

CHANGES = {
  "model.T": 8,
  "model.L": 1,
  "train.steps": 12,
  "optimizer.schedule": "constant",
  "telemetry.log_every": 1,
  "checkpoint.every": 4,
  "eval.every": 0,
  "eval.batches": 1,
  "sample.every": 0,
}
# What goes wrong, in the process FAULT_PROCESS, the first time it is started:
# FAULT_WHAT at the FAULT_CALL-th step or save, FAULT_DELAY seconds later.
FAULT = """
import ctypes, os, pathlib, signal, threading, time
from aoarm_jax.devices import sharding
from aoarm_jax.runs import checkpoint

def strike():
  time.sleep(float(os.environ["FAULT_DELAY"]))
  what = os.environ["FAULT_WHAT"]
  if what == "lock":
    threading.Event().wait()
  elif what == "interpreter":
    ctypes.PyDLL(None).sleep(1000)  # Does not release the interpreter's lock.
  else:
    os.kill(os.getpid(), getattr(signal, what))

calls = 0
def first(call, wait):
  def called(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(os.environ["FAULT_CALL"]):
      mark = pathlib.Path(os.environ["FAULT_MARK"])
      if not mark.exists():
        mark.touch()
        strike() if wait else threading.Thread(target=strike).start()
    return call(*args, **kwargs)
  return called

if os.environ.get("AOARM_PROCESS_ID", "0") == os.environ["FAULT_PROCESS"]:
  wait = os.environ["FAULT_WHAT"] in ("lock", "interpreter")
  if os.environ["FAULT_AT"] == "step":
    sharding.put_batch = first(sharding.put_batch, wait)
  else:
    save = first(checkpoint.Checkpoints.save, wait)
    checkpoint.Checkpoints.save = lambda *args, **kwargs: save(*args, **kwargs)
"""
# It must say where it stands, and end. PyDLL keeps the interpreter's lock.
PROCESS_ONE = """
import ctypes, os, threading
from aoarm_jax.devices import distributed
libc = ctypes.PyDLL(None)
print(os.getpid(), flush=True)
with distributed.Watchdog(0.3):
  """
_contexts = contextlib.ExitStack()
_folder: pathlib.Path  # Of this module's runs.


def setUpModule():
  global _folder
  _contexts.enter_context(helpers.quick_compilation())
  _folder = pathlib.Path(_contexts.enter_context(tempfile.TemporaryDirectory()))
  _folder.chmod(0o755)
  helpers.write_text(_folder / "text")


def tearDownModule():
  _contexts.close()


def arguments(name, **changes):
  return helpers.command_in(_folder, CHANGES, name, **changes)


def fault(name, what, at="step", call=6, delay=0.0, process=0):
  """Variables of the environment; see FAULT."""
  return {
    "FAULT_WHAT": what,
    "FAULT_AT": at,
    "FAULT_CALL": str(call),
    "FAULT_DELAY": str(delay),
    "FAULT_PROCESS": str(process),
    "FAULT_MARK": str(_folder / f"{name}.struck"),
  }


def launched(name, processes, environment, grace=5, **changes):
  """(exit code, stdout, stderr) of the launcher of faulty processes."""
  command = arguments(name, **changes)
  done = subprocess.run(
    helpers.launcher(
      processes, command, f"--grace-seconds={grace}", code=FAULT
    ),
    env=helpers.environment(**environment),
    capture_output=True,
    text=True,
    timeout=240,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.thorough
class FaultsTest(parameterized.TestCase):
  def uninterrupted(self):
    if not (_folder / "one").exists():
      helpers.run(arguments("one"))
    return self.final("one")

  def final(self, name):
    return helpers.final_state(
      _folder / name, helpers.config_of(arguments(name))
    )

  def assert_uninterrupted(self, name, *, bitwise):
    (want, one), (got, other) = self.uninterrupted(), self.final(name)
    self.assertEqual(got.step, 12)
    self.assertEqual(got.data_state["iterator"], want.data_state["iterator"])
    if bitwise:
      self.assertEqual(
        helpers.leaves_as_bytes(other), helpers.leaves_as_bytes(one)
      )
    else:
      self.assertLess(helpers.distance(other.params, one.params), 1e-5)

  @parameterized.parameters("lock", "interpreter")
  @pytest.mark.slow
  def test_a_stuck_process_ends_itself(self, what):
    """Python's main thread waits for ever, or holds the interpreter's lock."""
    name = f"stuck_{what}"
    process = helpers.start(
      arguments(name, distributed__step_timeout_seconds=8),
      code=FAULT,
      **fault(name, what),
    )
    code, _, err = helpers.finish(process)
    self.assertEqual(code, 14, err)
    if what == "lock":
      self.assertIn(
        "aoarm_jax: error: stuck at step 5: no progress for 8 s "
        "(config.distributed.step_timeout_seconds); start the same command",
        err,
      )
      self.assertIn("in strike", err)  # Where it stands.
    helpers.run(arguments(name))
    self.assert_uninterrupted(name, bitwise=True)

  @parameterized.parameters("threading.Event().wait()", "libc.sleep(1000)")
  def test_process_one_of_a_container_ends_itself(self, stuck):
    """The kernel drops signals with default action for such a process."""
    command = ["unshare", "-Urp", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare"):
      self.skipTest("no unshare here, which makes a namespace of processes")
    if subprocess.run([*command, "true"], capture_output=True).returncode:
      self.skipTest("this user may not make a namespace of processes")
    done = subprocess.run(
      [*command, sys.executable, "-c", PROCESS_ONE + stuck],
      env=helpers.environment(),
      capture_output=True,
      text=True,
      timeout=60,
    )
    self.assertEqual(done.stdout, "1\n", done.stderr)
    self.assertEqual(done.returncode, exit_codes.STUCK, done.stderr)

  @pytest.mark.slow
  def test_a_stopped_process_ends_the_others(self):
    """SIGSTOP: it cannot end itself, but those who wait for it can."""
    code, out, err = launched(
      "stopped",
      2,
      fault("stopped", "SIGSTOP", process=1),
      distributed__step_timeout_seconds=60,
      distributed__heartbeat_timeout_seconds=200,
    )
    self.assertEqual(code, 0, out + err)
    self.assertIn("process 0 of 2 was stuck and ended itself", err)
    self.assertIn("process 1 did not end within 5 s: killed", err)
    self.assertIn("restart 1 of 3", err)
    self.assertIn("[0] aoarm_jax: error: stuck at step", out)
    self.assert_uninterrupted("stopped", bitwise=False)

  def killed(self, seed, processes):
    """SIGKILL at a moment that the seed tells, in a step or in a save."""
    random = np.random.default_rng(seed)
    at = ("step", "save")[seed % 2]
    call = random.integers(2, 11 if at == "step" else 3)
    delay = random.uniform(0, 0.05 if at == "step" else 0.4)
    name = f"killed_{seed}_of_{processes}"
    variables = fault(
      name, "SIGKILL", at, call, delay, random.integers(processes)
    )
    code, out, err = launched(name, processes, variables)
    self.assertEqual(code, 0, out + err)
    self.assertIn("SIGKILL", err)
    self.assertIn("restart 1 of 3", err)
    self.assertTrue(pathlib.Path(variables["FAULT_MARK"]).exists())
    self.assert_uninterrupted(name, bitwise=processes == 1)

  @pytest.mark.slow
  def test_killed_in_a_save(self):
    """The launcher restarts it; train_test.py kills a run in its steps."""
    self.killed(1, processes=1)

  @parameterized.parameters(*range(40))
  @pytest.mark.slow
  def test_one_of_four_processes_killed(self, seed):
    self.killed(seed, processes=4)

  def started_in(self, name, mount, **changes):
    """The run on a file system of its own, kept as `name` after its end."""
    own = _folder / f"mount_{name}"
    own.mkdir()
    command = [
      sys.executable,
      "-m",
      "aoarm_jax.main",
      *arguments(f"{own.name}/run", **changes),
    ]
    script = (
      f'{mount} && "$@"; code=$?; mount -o remount,rw {own}; '
      f"cp -r {own}/run {_folder / name}; exit $code"
    )
    done = subprocess.run(
      ["unshare", "-Urm", "sh", "-c", script.format(own=own), "sh", *command],
      env=helpers.environment(),
      capture_output=True,
      text=True,
      timeout=240,
    )
    return done.returncode, done.stderr

  def require_mounts(self):
    probe = "mount -t tmpfs none /mnt"
    if (
      not shutil.which("unshare")
      or subprocess.run(
        ["unshare", "-Urm", "sh", "-c", probe], capture_output=True
      ).returncode
    ):
      self.skipTest("cannot mount in a namespace of its own")

  @pytest.mark.slow
  def test_a_disk_that_fills_up(self):
    self.require_mounts()
    code, err = self.started_in(
      "full",
      "mount -t tmpfs -o size=1m none {own}",
      checkpoint__every=1,
      checkpoint__keep_last=99,
    )
    last = err.strip().splitlines()[-1]
    self.assertEqual(code, 1, err)
    self.assertStartsWith(last, "aoarm_jax: error: ")
    self.assertIn("No space left", last)
    self.assertNotIn("Traceback", err)
    whole = [
      int(path.parent.name)
      for path in (_folder / "full" / "checkpoints").glob("*/manifest.json")
    ]
    self.assertNotEmpty(whole)
    self.assertLess(max(whole), 12)
    helpers.run(arguments("full"))  # With space, from there.
    self.assert_uninterrupted("full", bitwise=True)

  def test_a_folder_that_may_not_be_written(self):
    folder = _folder / "forbidden"
    folder.mkdir()
    folder.chmod(0o555)
    # As root without what lets root write everywhere.
    unprivileged = ["unshare", "-U"] if os.getuid() == 0 else []
    if unprivileged and subprocess.run([*unprivileged, "true"]).returncode:
      self.skipTest("root, and cannot be less")
    done = subprocess.run(
      [
        *unprivileged,
        sys.executable,
        "-m",
        "aoarm_jax.main",
        *arguments("forbidden/run"),
      ],
      env=helpers.environment(),
      capture_output=True,
      text=True,
      timeout=240,
    )
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertIn("Permission denied", done.stderr.splitlines()[-1])
    self.assertStartsWith(done.stderr.splitlines()[-1], "aoarm_jax: error: ")
    self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
  absltest.main()
