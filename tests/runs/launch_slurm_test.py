"""launch.slurm: the script of a job, run with a stand-in for srun."""

import os
import shlex
import signal
import subprocess

from absl.testing import absltest, parameterized
from launchers import SUBMIT, TRAIN, LaunchTest, launch

from launch import slurm

# srun and the tasks of a step. The n-th task takes the n-th word of ENDS: its
# exit code, KILL for a task that srun kills, or ABRT for one that aborts.
SRUN = r"""
while [ "$1" != bash ]; do shift; done
shift 2; script=$1; shift; worst=0; n=0
for end in $ENDS; do
  case $end in
    KILL) code=137 ;;
    ABRT) bash -c "$script" task bash -c 'kill -ABRT $$' | sed "s/^/$n: /"
      code=${PIPESTATUS[0]} ;;
    *) bash -c "$script" task bash -c "exit $end" | sed "s/^/$n: /"
      code=${PIPESTATUS[0]} ;;
  esac
  n=$((n + 1)); [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


class SlurmTest(LaunchTest):
  def lines(self, *flags):
    code, out, err = launch("slurm", *SUBMIT, *flags, "--dry-run")
    self.assertEqual((code, err), (0, ""))
    return out.splitlines()

  def test_options_are_quoted(self):
    lines = self.lines(
      *("--cpus-per-task=12", "--mem=200G", "--qos=high", "--exclusive"),
      *("--constraint=a&(b|c)", "--partition=gpu,all", "--account=it's"),
      *("--also=--comment=a #b", "--also=--no-kill"),
    )
    options = {x.removeprefix("#SBATCH ") for x in lines if x[:8] == "#SBATCH "}
    self.assertContainsSubset(
      {
        "--cpus-per-task=12",
        "--mem=200G",
        "--qos=high",
        "--exclusive",
        "--constraint='a&(b|c)'",
        "--partition=gpu,all",
        """--account='it'"'"'s'""",
        "--comment='a #b'",
        "--no-kill",
      },
      options,
    )
    # srun does not take this one from sbatch.
    self.assertIn(" --cpus-per-task=12 ", next(x for x in lines if "srun" in x))

  @parameterized.parameters(
    ([], 1, None),
    (["--gpus-per-node=4"], 4, None),
    (["--gpus-per-node=4", "--processes-per-node=4"], 4, None),
    (["--gpus-per-node=4", "--processes-per-node=1"], 1, "0,1,2,3"),
    (["--gpus-per-node=1"], 1, None),
  )
  def test_processes_of_a_node(self, flags, tasks, devices):
    lines = self.lines(*flags)
    self.assertIn(f"#SBATCH --ntasks-per-node={tasks}", lines)
    (export,) = [x for x in lines if x.startswith("export ")]
    # JAX would take one GPU for the one process on a node.
    self.assertEqual(
      export.partition("JAX_LOCAL_DEVICE_IDS=")[2] or None, devices
    )

  @parameterized.parameters(
    # Ends of the tasks, restarts before: exit code of the job, queued again.
    ("0", 0, 0, False),
    ("0 0", 0, 0, False),
    ("1", 0, 1, False),
    ("3", 0, 3, False),
    ("130", 0, 130, False),
    ("75 75", 0, 0, True),
    ("75", 3, 0, True),
    ("75", 4, 75, False),
    ("14 76", 0, 0, True),
    ("134", 0, 0, True),
    ("137", 4, 137, False),
    # The cause, and not the highest code.
    ("2 ABRT", 0, 2, False),
    ("139 1", 0, 1, False),
    ("76 137", 0, 0, True),
    ("1 KILL", 0, 1, False),
    ("KILL", 0, 0, True),
  )
  def test_what_is_queued_again(self, ends, restarts, job_code, is_again):
    self.client("sbatch", "cp $1 submitted")
    self.client("srun", 'echo "srun $@" $AOARM_DISTRIBUTED' + SRUN)
    self.client("scontrol", 'echo "$@" > scontrol')
    path = f"{self.folder}/bin:{os.environ['PATH']}"
    self.assertEqual(
      launch(
        "slurm",
        "submit",
        "--name=run",
        "--nodes=2",
        "--gpus-per-node=4",
        "--max-restarts=4",
        path=path,
      ),
      (0, "", ""),
    )
    with open("log", "a") as log:
      done = subprocess.run(
        ["bash", "submitted"],
        env={
          "PATH": path,
          "SLURM_RESTART_COUNT": str(restarts),
          "SLURM_JOB_ID": "7",
          "SLURM_JOB_NODELIST": "n[1-2]",
          "ENDS": ends,
        },
        stdout=log,
        stderr=log,
      )
    text = (self.folder / "log").read_text()
    self.assertEqual(done.returncode, job_code, text)
    self.assertTrue(text.startswith("start "), text)
    self.assertIn("--label --export=ALL --wait=120 bash -c", text)
    self.assertIn(f"{shlex.join(TRAIN)} 1", text)
    asked = self.folder / "scontrol"
    self.assertEqual(asked.exists(), is_again, text)
    if is_again:
      self.assertEqual(asked.read_text(), "requeue 7\n")

  def test_a_task_survives_the_notice(self):
    """Slurm signals all processes of a task. The shell waits for its end."""
    notice = "kill -TERM $PPID; sleep 0.1; exit 75"
    done = subprocess.run(
      ["bash", "-c", slurm._TASK, "task", "bash", "-c", notice],
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 75)
    self.assertEqual(done.stdout, "launch.slurm: exit code 75\n")

  def test_the_last_words_come_after_sigterm(self):
    """Slurm sends SIGTERM to all processes of the script."""
    self.client("sbatch", "cp $1 submitted")
    self.client(
      "srun",
      "trap 'sleep 0.2; echo last words; exit 75' TERM\n"
      "echo up\n"
      "for _ in {1..200}; do sleep 0.05; done",
    )
    path = f"{self.folder}/bin:{os.environ['PATH']}"
    self.assertEqual(launch("slurm", *SUBMIT, path=path), (0, "", ""))
    job = subprocess.Popen(
      ["bash", "submitted"],
      env={"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
      stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      start_new_session=True,
      text=True,
    )
    self.assertEqual(job.stderr.readline(), "up\n")
    os.killpg(job.pid, signal.SIGTERM)
    self.assertIn("last words\n", job.communicate(timeout=10)[1])


if __name__ == "__main__":
  absltest.main()
