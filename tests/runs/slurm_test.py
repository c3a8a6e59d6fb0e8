"""Our script on a real Slurm: two nodes on this machine, as root.

The packages slurm-wlm and munge of Debian must be installed. Nothing outside a
temporary folder is changed. A run of two processes is disturbed in every way
that Slurm knows, and it ends with the bits of an undisturbed run.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import helpers
import pytest
from absl.testing import absltest

pytestmark = pytest.mark.slurm

CHANGES = {
  "model.T": 8,
  "model.L": 1,
  "train.steps": 50,
  "telemetry.log_every": 5,
  "checkpoint.every": 5,
  "eval.every": 0,
  "eval.batches": 2,
  "sample.every": 0,
  "distributed.heartbeat_timeout_seconds": 10,
}
# Slow enough to be disturbed, with the number of the process in a file.
SLOW = """
import os, pathlib, time
from aoarm_jax.devices import sharding
put_batch = sharding.put_batch
pathlib.Path("pid" + os.environ["SLURM_PROCID"]).write_text(str(os.getpid()))
def slow(mesh, batch):
  time.sleep(0.1)
  return put_batch(mesh, batch)
sharding.put_batch = slow
"""
# A job that was queued again waits for cred_expire seconds.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmUser=root
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool_%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MpiDefault=none
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1
PartitionName=all Nodes=ALL Default=YES GraceTime=60 PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10
"""
_contexts = contextlib.ExitStack()
_folder: pathlib.Path  # Of this module's runs.


def setUpModule():
  global _folder
  if os.getuid() or not shutil.which("slurmctld") or not shutil.which("munged"):
    raise RuntimeError("needs root, and: apt-get install -y slurm-wlm munge")
  _contexts.enter_context(helpers.quick_compilation())
  _folder = pathlib.Path(_contexts.enter_context(tempfile.TemporaryDirectory()))
  helpers.write_text(_folder / "text")
  _contexts.enter_context(cluster(_folder / "cluster"))


def tearDownModule():
  _contexts.close()


def free_ports(count):
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for each in sockets:
      each.bind(("127.0.0.1", 0))
    return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def cluster(folder):
  """A controller and two nodes, for as long as the context lasts."""
  folder.mkdir(mode=0o755)
  folder.parent.chmod(0o755)  # munged asks for it.
  host = socket.gethostname().partition(".")[0]
  for name in ("state", f"spool_{host}", f"spool_{host}-2", "munge"):
    (folder / name).mkdir(mode=0o700)
  ports = dict(zip(("port", "port1", "port2"), free_ports(3)))
  text = CONFIG.format(host=host, folder=folder, **ports)
  (folder / "slurm.conf").write_text(text)
  key = folder / "munge" / "key"
  key.write_bytes(os.urandom(1024))
  key.chmod(0o400)
  os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
  own = {"pid-file": "pid", "seed-file": "seed", "log-file": "log"}
  try:
    call(
      *("munged", f"--key-file={key}", f"--socket={folder}/munge.socket"),
      *(f"--{flag}={folder}/munge/{name}" for flag, name in own.items()),
    )
    call("slurmctld")
    for node in (host, f"{host}-2"):
      call("slurmd", "-N", node)
    wait_until(lambda: " idle" in call("sinfo", "-h", "-o", "%D %T"))
    yield
  finally:
    with contextlib.suppress(AssertionError):
      call("scancel", "--user=root")
      wait_until(lambda: not call("squeue", "-h"), 40)
    for pid in (*folder.glob("*.pid"), folder / "munge" / "pid"):
      with contextlib.suppress(OSError, ValueError):
        os.kill(int(pid.read_text()), signal.SIGTERM)
    with contextlib.suppress(AssertionError):
      wait_until(lambda: not list(folder.glob("*.pid")), 20)
    del os.environ["SLURM_CONF"]


def call(*command):
  done = subprocess.run(
    command,
    cwd=_folder,
    env=helpers.environment(),
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, (command, done.stdout, done.stderr)
  return done.stdout


def wait_until(is_so, seconds=60.0):
  deadline = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < deadline
    time.sleep(0.1)


class Job:
  """A job of two processes, submitted by our launcher."""

  def __init__(self, name, command, *flags):
    self.log = _folder / "runs" / "launch" / f"{name}.log"
    self.log.unlink(missing_ok=True)
    done = subprocess.run(
      [
        *(sys.executable, "-m", "launch.slurm", "submit", f"--name={name}"),
        *("--nodes=2", "--time=0:10:00", *flags, "--", *command),
      ],
      cwd=_folder,
      env=helpers.environment(),
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    self.id = re.search(r"Submitted batch job (\d+)", done.stdout)[1]

  def text(self):
    return self.log.read_text() if self.log.exists() else ""

  def show(self, field):
    shown = call("scontrol", "show", "job", self.id)
    return re.search(
      rf"\b{field}=(.*?)(?= +[\w:/]+=| *$)", shown, re.MULTILINE
    )[1]

  def wait_for(self, *texts, seconds=300.0):
    """Waits for the texts in the log, one after another."""
    pattern = ".*?".join(map(re.escape, texts))
    try:
      wait_until(lambda: re.search(pattern, self.text(), re.DOTALL), seconds)
    except AssertionError:
      raise AssertionError(f"no {texts}:\n{self.text()}") from None

  def end(self):
    """Waits for the end of the job; returns its state."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: self.show("JobState") in ended, 300)
    return self.show("JobState")


def training(name, *flags):
  command = [*helpers.program(SLOW), *arguments(name)]
  return Job(name, command, *flags)


def arguments(name):
  return helpers.command_in(_folder, CHANGES, name)


def final_state(name):
  config = helpers.config_of(arguments(name))
  saved, state = helpers.final_state(_folder / name, config)
  assert saved.step == CHANGES["train.steps"]
  return helpers.leaves_as_bytes(state)


class SlurmTest(absltest.TestCase):
  def test_disturbed_in_every_way(self):
    """A lost process, a requeue, a preemption with notice, a cancellation."""
    job = training("disturbed")
    job.wait_for("step 10/50")
    os.kill(int((_folder / "pid1").read_text()), signal.SIGKILL)
    job.wait_for("starting again", "start 1 of job", "resumed from", "step 20/")
    call("scontrol", "requeue", job.id)
    job.wait_for("which is saved", "start 2 of job", "resumed from", "step 30/")
    call("sbatch", "--partition=urgent", "--nodes=2", "--wrap=sleep 1")
    job.wait_for(
      *("start 2 of job", "which is saved", "start 3 of job"),
      *("resumed from", "step 40/"),
    )
    call(
      *(sys.executable, "-m", "launch.slurm", "cancel", "--name=disturbed"),
    )
    self.assertEqual(job.end(), "CANCELLED")
    job.wait_for("start 3 of job", "which is saved")
    self.assertNotIn("start 4 of job", job.text())
    job = training("disturbed")
    self.assertEqual(job.end(), "COMPLETED", job.text())
    self.assertIn("resumed from step", job.text())
    job = training("undisturbed")
    self.assertEqual(job.end(), "COMPLETED", job.text())
    self.assertEqual(final_state("disturbed"), final_state("undisturbed"))

  def test_the_last_words_of_a_cancelled_job(self):
    """Slurm sends SIGTERM to all that the script started, too."""
    toy = (
      "import signal, sys, time\n"
      "def save(*_):\n"
      "  time.sleep(1)\n"
      "  print('saved', flush=True)\n"
      "  sys.exit(75)\n"
      "signal.signal(signal.SIGTERM, save)\n"
      "print('up', flush=True)\n"
      "for _ in range(600): time.sleep(0.1)"
    )
    job = Job("words", [sys.executable, "-c", toy])
    job.wait_for("up", "up")
    call("scancel", job.id)
    self.assertEqual(job.end(), "CANCELLED")
    for rank in "01":
      job.wait_for(
        f"{rank}: saved", f"{rank}: launch.slurm: exit code 75", seconds=5
      )

  def test_what_is_refused_is_not_queued_again(self):
    """JAX would abort the neighbour, and srun ends with the higher code."""
    toy = (
      "import os, time\n"
      "if os.environ['SLURM_PROCID'] == '0': raise SystemExit(2)\n"
      "time.sleep(1)\n"
      "os.abort()"
    )
    job = Job("refused", [sys.executable, "-c", toy])
    self.assertEqual(job.end(), "FAILED")
    self.assertRegex(job.text(), r"1: launch.slurm: exit code 13[49]")
    self.assertEqual(job.show("ExitCode"), "2:0")
    self.assertEqual(job.show("Restarts"), "0")

  def test_a_job_without_the_users_variables(self):
    """The processes still learn that they are to join each other."""
    toy = "import os; raise SystemExit(os.environ['AOARM_DISTRIBUTED'] != '1')"
    job = Job("export", [sys.executable, "-c", toy], "--also=--export=NONE")
    self.assertEqual(job.end(), "COMPLETED", job.text())

  def test_options_arrive(self):
    job = Job(
      "options",
      ["true"],
      *("--cpus-per-task=1", "--mem=20M", "--exclusive", "--partition=all"),
      *("--also=--hold", "--also=--comment=it's (a) #b", "--qos=normal"),
    )
    try:
      self.assertEqual(job.show("Comment"), "it's (a) #b")
      self.assertEqual(job.show("CPUs/Task"), "1")
      self.assertEqual(job.show("MinMemoryNode"), "20M")
      self.assertEqual(job.show("OverSubscribe"), "NO")
      self.assertEqual(job.show("Partition"), "all")
    finally:
      call("scancel", job.id)


if __name__ == "__main__":
  absltest.main()
