"""launch.local: processes that end, are lost or are stopped."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from absl.testing import absltest, parameterized
from launchers import ROOT, LaunchTest, launch

from launch import local

# One long sleep would not see a signal that comes as it begins.
SAVES = """
def save(*_):
  print('saved', flush=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b'up\\n')
for _ in range(600): time.sleep(0.1)
"""


def is_alive(pid):
  state = pathlib.Path(f"/proc/{pid}/stat")
  return state.exists() and state.read_text().split()[2] != "Z"


class LocalTest(LaunchTest):
  def start(self, code, *flags):
    """launch.local of two processes that run this Python code."""
    process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "launch.local",
        "--processes=2",
        *flags,
        "--",
        sys.executable,
        "-c",
        "import os, signal, sys, time\n"
        "me = os.environ['AOARM_PROCESS_ID']\n" + code,
      ],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    # A test that fails leaves nothing behind that makes others fail.
    self.addCleanup(process.communicate)
    self.addCleanup(process.kill)
    return process

  def ups(self, process, count=2):
    """The pids of as many processes, when they have said that they are up."""
    lines = [process.stdout.readline() for _ in range(count)]
    for line in lines:
      self.assertIn("up", line)
    return [int(pid) for line in lines for pid in re.findall(r"up (\d+)", line)]

  def assert_gone(self, pids):
    self.assertNotEmpty(pids)
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(pid)]:
      self.assertLess(time.monotonic(), deadline, alive)
      time.sleep(0.05)

  def finished(self, process, timeout=15):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err

  def test_every_process_knows_its_place(self):
    code, out, err = self.finished(
      self.start(
        "e = os.environ\n"
        "print(e['AOARM_DISTRIBUTED'], e['AOARM_COORDINATOR_ADDRESS'],"
        " e['AOARM_PROCESS_COUNT'], me, e['JAX_NUM_CPU_DEVICES'])\n"
        "print('to stderr', file=sys.stderr)",
        "--devices=3",
      )
    )
    self.assertEqual((code, err), (0, ""))
    lines = sorted(out.splitlines())
    port = re.search(r"127.0.0.1:(\d+)", out)[1]
    self.assertEqual(
      lines,
      [
        line
        for i in "01"
        for line in (f"[{i}] 1 127.0.0.1:{port} 2 {i} 3", f"[{i}] to stderr")
      ],
    )

  def test_the_port_is_none_of_a_connection(self):
    """The system could give it away before process 0 listens there."""
    with socket.create_server(("", 0)) as taken:
      busy = taken.getsockname()[1]
      with socket.create_server(("", 0)) as closed:
        free = closed.getsockname()[1]
      ports = absltest.mock.Mock(return_value=[busy, free])
      with absltest.mock.patch.object(local.random, "sample", ports):
        self.assertEqual(local._free_port(), free)
    ports.assert_called_once_with(range(20_000, 32_000), 100)

  def test_gpus_are_given_one_each(self):
    out = launch("local", "--processes=2", "--platform=gpu", "--dry-run")[1]
    self.assertRegex(
      out,
      r"ID=0 .*CUDA_VISIBLE_DEVICES=0 python.*\n.*ID=1 .*"
      r"CUDA_VISIBLE_DEVICES=1 python.*\n$",
    )
    self.assertNotIn("JAX_PLATFORMS", out)

  def test_a_lost_process_ends_the_others(self):
    """Within a bounded time, and also those that a process has started."""
    process = self.start(
      "if me == '1':\n"
      "  os.kill(os.getpid(), signal.SIGKILL)\n"
      "child = os.fork()\n"
      "print(f'pid {os.getpid()}', flush=True)\n"
      "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
      "time.sleep(60)",
      "--grace-seconds=0.5",
      "--max-restarts=0",
    )
    code, out, err = self.finished(process, 10)
    self.assertEqual(code, 137)
    self.assertIn(
      "process 1 of 2 was lost: SIGKILL; process 0 did not end", err
    )
    self.assertIn("gave up after 0 restarts", err)
    pids = re.findall(r"pid (\d+)", out)
    self.assertLen(pids, 2)
    for pid in map(int, pids):
      self.assertFalse(is_alive(pid), pid)

  def test_a_stopped_process_is_ended_too(self):
    process = self.start(
      "if me == '0': os.kill(os.getpid(), signal.SIGSTOP)\n"
      "time.sleep(0.2)\n"
      "sys.exit(3)",
      "--grace-seconds=0.5",
    )
    code, _, err = self.finished(process, 10)
    self.assertEqual(code, 3)
    self.assertIn(
      "process 1 of 2 failed with exit code 3; process 0 did not end", err
    )
    self.assertNotIn("restart", err)

  @parameterized.parameters(
    ("sys.exit(75)", "the run was preempted and saved"),
    ("os.abort()", "was lost: SIGABRT"),
  )
  def test_started_again_until_it_is_done(self, end, message):
    process = self.start(
      "name = f'starts{me}'\n"
      "open(name, 'a').write('x')\n"
      f"if len(open(name).read()) < 3: {end}",
      "--grace-seconds=5",
    )
    code, _, err = self.finished(process)
    self.assertEqual(code, 0, err)
    self.assertEqual(err.count(message), 2)
    self.assertIn("restart 2 of 3: the run goes on from its last check", err)
    for name in ("starts0", "starts1"):
      self.assertEqual((self.folder / name).read_text(), "xxx")

  @parameterized.parameters(
    (signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)
  )
  def test_a_signal_reaches_all_and_ends_it(self, number, exit_code):
    process = self.start(SAVES)
    self.ups(process)
    process.send_signal(number)
    code, out, err = self.finished(process, 10)
    self.assertEqual(code, exit_code, err)
    self.assertEqual(sorted(out.splitlines()), ["[0] saved", "[1] saved"])
    self.assertNotIn("restart", err)

  def test_an_impatient_ctrl_c_still_saves(self):
    """A terminal and a parent that both pass one Ctrl-C on."""
    process = self.start(SAVES)
    self.ups(process)
    for _ in range(5):
      process.send_signal(signal.SIGINT)
      time.sleep(0.003)
    code, out, err = self.finished(process, 10)
    self.assertEqual(code, 130, err)
    self.assertEqual(sorted(out.splitlines()), ["[0] saved", "[1] saved"])
    self.assertNotIn("Traceback", err)

  def test_no_process_outlives_a_killed_launcher(self):
    """It can save, and is killed then, with all that it has started."""
    process = self.start(
      "os.fork()\n"
      "signal.signal(signal.SIGTERM, lambda *_: open('saved', 'w'))\n"
      "os.write(1, b'up %d\\n' % os.getpid())\n"
      "for _ in range(600): time.sleep(0.1)",
      "--grace-seconds=0.5",
    )
    pids = self.ups(process, 4)
    process.kill()
    process.wait()
    self.assert_gone(pids)
    self.assertTrue((self.folder / "saved").exists())

  def test_a_signal_before_a_process_can_handle_it(self):
    process = self.start("os.write(1, b'up\\n')\ntime.sleep(60)")
    self.ups(process)
    process.send_signal(signal.SIGTERM)
    code, _, err = self.finished(process, 10)
    self.assertEqual(code, 75, err)

  def test_a_signal_is_followed_by_a_stronger_one(self):
    process = self.start(
      "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
      "print(f'up {os.getpid()}', flush=True)\n"
      "time.sleep(60)",
      "--stop-seconds=0.5",
    )
    pids = self.ups(process)
    process.send_signal(signal.SIGTERM)
    code, _, err = self.finished(process, 10)
    self.assertEqual(code, 137)
    self.assertIn(
      "process 0, 1 of 2 did not end within 0.5 s after the signal: killed", err
    )
    self.assertNotIn("restart", err)
    self.assert_gone(pids)

  def test_a_reader_that_goes_stops_nothing(self):
    process = self.start(
      "print('up', flush=True)\n"
      "time.sleep(0.2)\n"
      "print('x' * 200_000, flush=True)\n"
      "open(f'done{me}', 'w')"
    )
    process.stdout.readline()
    process.stdout.close()
    self.assertEqual(process.wait(10), 0)
    self.assertTrue((self.folder / "done0").exists())
    self.assertTrue((self.folder / "done1").exists())

  @parameterized.parameters(
    ([0, -9], (1, -9)),
    ([1, -11], (0, 1)),
    ([-9, 2], (1, 2)),
    ([76, 14], (1, 14)),
    ([-6, 1], (1, 1)),
    ([-6, None], (0, -6)),
    ([None, 75], (1, 75)),
    ([1, -6, -9], (2, -9)),
  )
  def test_who_failed(self, codes, failure):
    self.assertEqual(local._first_failure(codes), failure)


if __name__ == "__main__":
  absltest.main()
