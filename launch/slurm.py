"""Runs a command on a Slurm cluster, with one process per GPU or per node.

  python -m launch.slurm submit --name=base --nodes=2 --gpus-per-node=8 \\
    --time=24:00:00 -- python -m aoarm_jax.main \\
    --config=configs/two_stream.py:base --workdir=/shared/runs/base

submit writes runs/launch/<name>.sbatch and submits it from the current folder.
All nodes must see this folder and the work directory. Before the time limit all
processes get SIGTERM: they save and exit with 75, and the job goes into the
queue again. It also does after a crash. It is queued again at most
--max-restarts times.

status, logs and cancel take the name.
"""

import argparse
import re
import shlex
import sys

from launch import common

# When one process has ended, srun gives the others time to end by themselves,
# and then it kills them. The exit code of srun is the highest one of all, which
# may be a consequence. So every task prints its own one if it ends by itself.
# The shell of a task must survive the SIGTERM that Slurm sends to all of them.
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
{resources}\
#SBATCH --time={time}
#SBATCH --signal=TERM@{notice}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
{options}\

export {environment}
restarts=${{SLURM_RESTART_COUNT:-0}}
echo "start $restarts of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
{verdict}\
codes=$(
  srun --label --wait={wait} bash -c {task} task \\
    {command} 2>&1 | tee -a /dev/stderr | \\
    sed -n 's/.*{mark}\\([0-9]*\\)$/\\1/p'
  echo "${{PIPESTATUS[0]}}"
)
# The last line is the exit code of srun. It counts if no task named its own.
read -r next code <<< "$(verdict <<< "${{codes%$'\\n'*}}")"
echo "exit code $code"
if [ "$next" = again ]; then
  if [ "$restarts" -lt {max_restarts} ]; then
    echo "starting again: the run goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  fi
  echo "gave up after $restarts restarts"
fi
exit "$code"
"""
_WAIT_SECONDS = 120
_MARK = "launch.slurm: exit code "
_TASK = (
  f'trap : TERM INT; "$@" || {{ code=$?; echo "{_MARK}$code"; exit $code; }}'
)


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of this launcher."""
  parser = common.parser("launch.slurm", __doc__)
  verbs = common.add_verbs(
    parser,
    {
      "submit": "write the script and submit it",
      "status": "show the job in the queue",
      "logs": "follow the output of all processes",
      "cancel": "end the job; it saves if KillWait is enough",
    },
    named="job",
  )
  submit = verbs["submit"]
  submit.add_argument("--nodes", type=int, required=True, help="machines")
  submit.add_argument(
    "--gpus-per-node",
    type=int,
    default=0,
    help="one process each; 0: one process per node, on its CPUs (default: 0)",
  )
  submit.add_argument(
    "--time", default="24:00:00", help="limit, [days-]hours:minutes:seconds"
  )
  submit.add_argument(
    "--notice-seconds",
    type=int,
    default=300,
    help="from SIGTERM to the time limit, enough for a save (default: 300)",
  )
  common.add_max_restarts(submit, 100, "a time limit or a crash")
  submit.add_argument("--partition", default="", help="partition, for sbatch")
  submit.add_argument("--account", default="", help="account, for sbatch")
  return parser


def script(flags: argparse.Namespace) -> str:
  """Return the batch script of a job.

  Raises:
    LaunchError: a flag has a value that is not possible.
  """
  common.check_at_least("--nodes", flags.nodes, 1)
  common.check_at_least("--gpus-per-node", flags.gpus_per_node, 0)
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  common.check_at_least("--notice-seconds", flags.notice_seconds, 30)
  if flags.notice_seconds >= _seconds(flags.time):
    raise common.LaunchError(
      f"--notice-seconds={flags.notice_seconds}: must be below "
      f"--time={flags.time}"
    )
  common.check_command(flags.command)
  gpus = flags.gpus_per_node
  options = {"partition": flags.partition, "account": flags.account}
  return _SCRIPT.format(
    name=flags.name,
    nodes=flags.nodes,
    tasks=gpus or 1,
    resources=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
    time=flags.time,
    notice=flags.notice_seconds,
    log=common.path_of(flags.name, "log"),
    options="".join(
      f"#SBATCH --{name}={value}\n" for name, value in options.items() if value
    ),
    environment=common.assignments(common.ENVIRONMENT),
    verdict=common.verdict_function(),
    mark=_MARK,
    task=shlex.quote(_TASK),
    wait=_WAIT_SECONDS,
    command=shlex.join(flags.command),
    max_restarts=flags.max_restarts,
  )


def _seconds(time: str) -> int:
  """Return the seconds of a time limit as Slurm writes it."""
  match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", time)
  if not match:
    raise common.LaunchError(
      f"--time={time}: write [days-]hours:minutes:seconds, as in 24:00:00"
    )
  days, hours, minutes, seconds = (int(x or 0) for x in match.groups())
  return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def start(flags: argparse.Namespace) -> int:
  """Carry out the verb; return the exit code."""
  common.check_name(flags.name)
  shell = common.Shell(flags.dry_run)
  if flags.verb == "submit":
    path = common.path_of(flags.name, "sbatch")
    shell.submit(path, script(flags), "sbatch", path)
    return 0
  common.check_no_command(flags.command, flags.verb)
  if flags.verb == "status":
    shell.run("squeue", "--me", f"--name={flags.name}")
  elif flags.verb == "logs":
    log = common.path_of(flags.name, "log")
    shell.run("tail", "-n", "+1", "-F", log)
  else:
    shell.run("scancel", "--me", f"--name={flags.name}")
  return 0


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
