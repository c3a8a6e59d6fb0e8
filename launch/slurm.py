"""Runs a command on a Slurm cluster, one process a GPU or a node.

  python -m launch.slurm submit --name=base --nodes=2 --gpus-per-node=8 \\
    --time=24:00:00 -- python -m aoarm_jax.main \\
    --config=configs/two_stream.py:base --workdir=/shared/runs/base

submit writes runs/launch/<name>.sbatch and submits it from the current folder,
which all nodes must see, as they must the work directory. Ahead of the time
limit all processes get SIGTERM: they save, exit with 75, and the job is put
into the queue again, as it is after a crash, at most --max-restarts times.

status, logs and cancel go by the name.
"""

import argparse
import re
import shlex
import sys

from launch import common

# srun gives the others time to end by themselves when one process has ended,
# and the highest exit code of all as its own, 128 + n after signal n.
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

export AOARM_DISTRIBUTED=1 PYTHONUNBUFFERED=1
restarts=${{SLURM_RESTART_COUNT:-0}}
echo "start $restarts of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
srun --label --wait={wait} \\
  {command}
code=$?
echo "exit code $code"
if {again}; then
  if [ "$restarts" -lt {max_restarts} ]; then
    echo "starting again: the run goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  fi
  echo "gave up after $restarts restarts"
fi
exit $code
"""
_WAIT_SECONDS = 120


def make_parser() -> argparse.ArgumentParser:
  parser = common.parser("launch.slurm", __doc__)
  verbs = parser.add_subparsers(dest="verb", required=True)
  submit = verbs.add_parser("submit", help="write the script and submit it")
  submit.add_argument("--nodes", type=int, required=True, help="machines")
  submit.add_argument(
    "--gpus-per-node",
    type=int,
    default=0,
    help="one process each; 0: one process a node, on its CPUs (default: 0)",
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
  submit.add_argument(
    "--max-restarts",
    type=int,
    default=100,
    help="starts again at most, time limits included (default: 100)",
  )
  submit.add_argument("--partition", default="", help="as of sbatch")
  submit.add_argument("--account", default="", help="as of sbatch")
  status = verbs.add_parser("status", help="the job in the queue")
  logs = verbs.add_parser("logs", help="follow the output of all processes")
  cancel = verbs.add_parser(
    "cancel", help="end the job; it saves if KillWait is enough"
  )
  for verb in (submit, status, logs, cancel):
    verb.add_argument("--name", required=True, help="of the job")
    common.add_dry_run(verb)
  return parser


def script(flags: argparse.Namespace) -> str:
  """The batch script of a job.

  Raises:
    LaunchError: a flag that cannot be.
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
    log=_path(flags, "log"),
    options="".join(
      f"#SBATCH --{name}={value}\n" for name, value in options.items() if value
    ),
    wait=_WAIT_SECONDS,
    command=shlex.join(flags.command),
    again=common.restart_test("code"),
    max_restarts=flags.max_restarts,
  )


def _path(flags, suffix):
  return f"{common.FOLDER}/{flags.name}.{suffix}"


def _seconds(time):
  match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", time)
  if not match:
    raise common.LaunchError(
      f"--time={time}: write [days-]hours:minutes:seconds, as in 24:00:00"
    )
  days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
  return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def start(flags: argparse.Namespace) -> int:
  common.check_name(flags.name)
  shell = common.Shell(flags.dry_run)
  if flags.verb == "submit":
    path = _path(flags, "sbatch")
    content = script(flags)
    shell.require("sbatch")
    shell.write(path, content)
    shell.run("sbatch", path)
    return 0
  common.check_no_command(flags.command, flags.verb)
  if flags.verb == "status":
    shell.run("squeue", "--me", f"--name={flags.name}")
  elif flags.verb == "logs":
    shell.run("tail", "-n", "+1", "-F", _path(flags, "log"))
  else:
    shell.run("scancel", "--me", f"--name={flags.name}")
  return 0


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
