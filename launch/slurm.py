"""Runs a command on a Slurm cluster, with one process per GPU or per node.

  python -m launch.slurm submit --name=base --nodes=2 --gpus-per-node=8 \\
    --time=24:00:00 -- python -m aoarm_jax.main \\
    --config=configs/two_stream.py:base --workdir=/shared/runs/base

submit writes runs/launch/<name>.sbatch and submits it from the current folder.
All nodes must see this folder and the work directory. Before the time limit all
processes get SIGTERM: they save and exit with 75, and the job goes into the
queue again. It also does after a crash. It is queued again at most
--max-restarts times.

With --processes-per-node=1 one process has all GPUs of its node. --also passes
other options to sbatch, as in --also=--reservation=mine; it may be repeated.

status, logs and cancel take the name.
"""

import argparse
import re
import shlex
import sys

from launch import common, published

# When one process has ended, srun gives the others time to end by themselves,
# and then it kills them. The exit code of srun is the highest one of all, which
# may be a consequence. So every task prints its own one if it ends by itself.
# --export=ALL counts more than --export=NONE of sbatch, which would also take
# AOARM_DISTRIBUTED from the tasks. Every task would then train by itself.
# The shell of a task must survive the SIGTERM that Slurm sends to all of them.
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
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
  srun --label --export=ALL --wait={wait}{step} bash -c {task} task \\
    {command} 2>&1 | (
    # Slurm sends SIGTERM to these, too, before the tasks have ended.
    trap '' TERM INT
    tee -a /dev/stderr | sed -n 's/.*{mark}\\([0-9]*\\)$/\\1/p'
  )
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
# Flags of sbatch that --also may not change: the script depends on them. JAX
# chooses the GPU of a process, so a process must see all GPUs of its node.
_SET_HERE = {
  *(
    "array",
    "chdir",
    "gpu-bind",
    "gpus",
    "gpus-per-task",
    "ntasks",
    "ntasks-per-gpu",
  ),
  *("ntasks-per-node", "no-requeue", "open-mode", "output", "requeue"),
  *("signal", "wrap"),
}
# Flags of sbatch that are flags here.
_FLAGS = {
  *("account", "constraint", "cpus-per-task", "gpus-per-node"),
  *("job-name", "mem", "nodes", "partition", "qos", "time"),
}
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
    help="GPUs of a node; 0: the processes compute on CPUs (default: 0)",
  )
  submit.add_argument(
    "--processes-per-node",
    type=int,
    help="1, or as many as GPUs (default: one for each GPU)",
  )
  submit.add_argument(
    "--cpus-per-task", type=int, help="CPUs of a process (default: sbatch's)"
  )
  submit.add_argument(
    "--mem", default="", help="memory of a node, as in 200G; 0: all of it"
  )
  submit.add_argument(
    "--exclusive", action="store_true", help="share no node with other jobs"
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
  for name in ("partition", "account", "qos", "constraint"):
    submit.add_argument(f"--{name}", default="", help=f"{name}, for sbatch")
  submit.add_argument(
    "--also",
    action="append",
    default=[],
    metavar="FLAG",
    help="flag for sbatch, as in --also=--reservation=mine; may be repeated",
  )
  return parser


def script(flags: argparse.Namespace) -> str:
  """Return the batch script of a job.

  Raises:
    LaunchError: a flag has a value that is not possible.
  """
  gpus = flags.gpus_per_node
  processes = flags.processes_per_node
  processes = (gpus or 1) if processes is None else processes
  most = published.MOST_SLURM_COUNT
  common.check_range("--nodes", flags.nodes, 1, most)
  common.check_range("--gpus-per-node", gpus, 0, most)
  common.check_processes_per_node(processes, gpus)
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  seconds = published.MOST_SLURM_NOTICE_SECONDS
  common.check_range("--notice-seconds", flags.notice_seconds, 30, seconds)
  if flags.notice_seconds >= _seconds(flags.time):
    raise common.LaunchError(
      f"--notice-seconds={flags.notice_seconds}: must be below "
      f"--time={flags.time}"
    )
  common.check_command(flags.command)
  environment = common.ENVIRONMENT | {
    common.NOTICE_VARIABLE: str(flags.notice_seconds)
  }
  if processes < gpus:
    # On Slurm, JAX gives a process the GPU of its number on the node alone.
    environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(gpus)))
  cpus = flags.cpus_per_task
  return _SCRIPT.format(
    name=flags.name,
    nodes=flags.nodes,
    tasks=processes,
    time=flags.time,
    notice=flags.notice_seconds,
    log=common.path_of(flags.name, "log"),
    options="".join(f"#SBATCH {x}\n" for x in _options(flags)),
    environment=common.assignments(environment),
    verdict=common.verdict_function(),
    mark=_MARK,
    task=shlex.quote(_TASK),
    wait=_WAIT_SECONDS,
    # Since Slurm 22.05 srun does not take this from sbatch.
    step="" if cpus is None else f" --cpus-per-task={cpus}",
    command=shlex.join(flags.command),
    max_restarts=flags.max_restarts,
  )


def _options(flags: argparse.Namespace) -> list[str]:
  """Return the options for sbatch that are given, quoted for #SBATCH lines.

  Raises:
    LaunchError: sbatch would refuse an option or read it otherwise.
  """
  if flags.cpus_per_task is not None:
    most = published.MOST_SLURM_COUNT
    common.check_range("--cpus-per-task", flags.cpus_per_task, 1, most)
  if flags.mem and not re.fullmatch(r"\d{1,12}([KMGT]B?)?", flags.mem, re.I):
    raise common.LaunchError(
      f"--mem={flags.mem}: write a whole number with K, M, G or T, as in 200G"
    )
  options = [
    f"--{name}={value}"
    for name, value in {
      "gpus-per-node": flags.gpus_per_node or "",
      "cpus-per-task": flags.cpus_per_task or "",
      "mem": flags.mem,
      "partition": flags.partition,
      "account": flags.account,
      "qos": flags.qos,
      "constraint": flags.constraint,
    }.items()
    if value != ""
  ]
  options += ["--exclusive"] * flags.exclusive
  for option in flags.also:
    name = option.removeprefix("--").partition("=")[0]
    if not re.fullmatch(r"--[a-z][-a-z0-9]*(=.+)?", option):
      raise common.LaunchError(
        f"--also={option}: write one long flag of sbatch, as in "
        "--also=--reservation=mine"
      )
    # sbatch takes the beginning of a flag for the flag.
    if any(known.startswith(name) for known in _FLAGS):
      raise common.LaunchError(
        f"--also={option}: write --{name} without --also"
      )
    if any(known.startswith(name) for known in _SET_HERE):
      raise common.LaunchError(
        f"--also={option}: this launcher sets --{name} or needs it unset"
      )
    options.append(option)
  return [_quoted(option) for option in options]


def _quoted(option: str) -> str:
  """Return an option as a #SBATCH line takes it.

  Raises:
    LaunchError: the option cannot be written in such a line.
  """
  # Even between quotes, sbatch takes a backslash away.
  if not option.isprintable() or "\\" in option:
    raise common.LaunchError(
      f"{option!r}: sbatch reads no backslash and no control character"
    )
  flag, equals, value = option.partition("=")
  return f"{flag}{equals}{shlex.quote(value)}" if equals else flag


def _seconds(time: str) -> int:
  """Return the seconds of a time limit as Slurm writes it."""
  match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", time, re.ASCII)
  if not match:
    raise common.LaunchError(
      f"--time={time}: write [days-]hours:minutes:seconds, as in 24:00:00"
    )
  days, hours, minutes, seconds = (int(x or 0) for x in match.groups())
  total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
  if total > published.MOST_SLURM_SECONDS:
    raise common.LaunchError(
      f"--time={time}: Slurm counts up to "
      f"{published.MOST_SLURM_SECONDS // 86400} days"
    )
  return total


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
