"""Command line, clients and exit codes, shared by all launchers.

Every launcher takes the whole command to start after `--`; it is the same for
every process. If that command exits with 75, it was preempted and has saved:
start the same command again.
"""

import argparse
import contextlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from aoarm_jax.config import exit_codes

# Folder for the files that launchers write. It is beside the runs, and git
# ignores it.
FOLDER = "runs/launch"
PREEMPTED = exit_codes.PREEMPTED
INTERRUPTED = exit_codes.INTERRUPTED

# Variables of every process: join the others, and print lines at once.
ENVIRONMENT = {"AOARM_DISTRIBUTED": "1", "PYTHONUNBUFFERED": "1"}
# The seconds from SIGTERM to the kill, so that a save can be compared.
NOTICE_VARIABLE = "AOARM_NOTICE_SECONDS"

_SLURM = "this is a Slurm command: run on a login node of the cluster"
_INSTALL = {
  "gcloud": "https://cloud.google.com/sdk/docs/install",
  "git": "https://git-scm.com/downloads",
  "kubectl": "https://kubernetes.io/docs/tasks/tools",
  "sbatch": _SLURM,
  "scancel": _SLURM,
  "squeue": _SLURM,
}
# Names of launches become names of hosts, jobs and files.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class LaunchError(Exception):
  """An error that the user can mend; the line names the value and the fix."""

  def __init__(self, message: str, exit_code: int = exit_codes.REFUSED):
    super().__init__(message)
    self.exit_code = exit_code


class Shell:
  """Runs commands of a client, or prints them in a dry run."""

  def __init__(self, dry_run: bool):
    self.dry_run = dry_run

  def require(self, client: str) -> None:
    """Raise LaunchError if the client is not installed; pass in a dry run."""
    if not self.dry_run and shutil.which(client) is None:
      how = _INSTALL.get(client, "install it")
      raise LaunchError(f"{client} is not installed: {how}")

  def run(self, *argv: str) -> None:
    """Run a command to its end, in this terminal.

    Raises:
      LaunchError: the client is not installed, or the command failed.
    """
    if self.dry_run:
      print(shlex.join(argv))
      return
    self.require(argv[0])
    code = subprocess.run(argv).returncode
    if code:
      raise LaunchError(
        f"{' '.join(argv[:5])} ... failed with exit code {code}; see above", 1
      )

  def read(self, *argv: str) -> str | None:
    """Return what a command prints, or None if it failed.

    The error output of the command goes to this terminal.

    Raises:
      LaunchError: the client is not installed.
    """
    self.require(argv[0])
    process = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    return process.stdout.strip() if process.returncode == 0 else None

  def write(self, path: str, content: str) -> None:
    """Write a file, or print it in a dry run.

    Raises:
      LaunchError: the file cannot be written.
    """
    if self.dry_run:
      print(f"# {path}\n{content}")
      return
    try:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
      pathlib.Path(path).write_text(content)
    except OSError as error:
      raise LaunchError(
        f"{path}: cannot be written here: {error.strerror}", 1
      ) from error

  def submit(self, path: str, content: str, *argv: str) -> None:
    """Write a file and run the command that reads it.

    Raises:
      LaunchError: the client is not installed (then nothing is written), the
        file cannot be written, or the command failed.
    """
    self.require(argv[0])
    self.write(path, content)
    self.run(*argv)


def path_of(name: str, suffix: str) -> str:
  """Return the path of a file that belongs to the launch `name`."""
  return f"{FOLDER}/{name}.{suffix}"


def assignments(environment: Mapping[str, str]) -> str:
  """Return variables as a shell takes them, as in A=1 B='2 3'."""
  return " ".join(f"{k}={shlex.quote(v)}" for k, v in environment.items())


def join_variables(address: str, processes: int) -> dict[str, str]:
  """Return the variables by which processes find each other.

  AOARM_PROCESS_ID, which differs between the processes, is not among them.

  Args:
    address: host and port of process 0.
    processes: number of processes.
  """
  return {
    "AOARM_COORDINATOR_ADDRESS": address,
    "AOARM_PROCESS_COUNT": str(processes),
  }


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
  """Return a parser whose help names the module.

  Args:
    module: name of the module, as in launch.local.
    description: docstring of the module.
  """
  return argparse.ArgumentParser(
    prog=f"python -m {module}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_verbs(
  to: argparse.ArgumentParser, verbs: Mapping[str, str], *, named: str
) -> dict[str, argparse.ArgumentParser]:
  """Add subcommands with the flags --name and --dry-run; return their parsers.

  Args:
    to: parser of the launcher.
    verbs: help text of each subcommand.
    named: what --name names.
  """
  subparsers = to.add_subparsers(dest="verb", required=True)
  parsers = {}
  for verb, text in verbs.items():
    parsers[verb] = subparsers.add_parser(verb, help=text)
    parsers[verb].add_argument(
      "--name", required=True, help=f"name of the {named}"
    )
    add_dry_run(parsers[verb])
  return parsers


def add_dry_run(to: argparse.ArgumentParser) -> None:
  """Add the flag --dry-run."""
  to.add_argument(
    "--dry-run",
    action="store_true",
    help="print the commands and files, run and write nothing",
  )


def add_max_restarts(
  to: argparse.ArgumentParser, default: int, after: str
) -> None:
  """Add the flag --max-restarts.

  Args:
    to: parser.
    default: default number of restarts.
    after: what a restart follows, for the help.
  """
  to.add_argument(
    "--max-restarts",
    type=int,
    default=default,
    help=f"most restarts after {after} (default: {default})",
  )


def main(
  make_parser: Callable[[], argparse.ArgumentParser],
  start: Callable[[argparse.Namespace], int],
  argv: Sequence[str] | None = None,
) -> int:
  """Parse the command line, start, and print a LaunchError as one line.

  Args:
    make_parser: returns the parser of the launcher.
    start: takes the flags and returns the exit code. The words after `--` are
      in the flag `command`, a list of str that may be empty.
    argv: the words after the program's name; None takes those of this process.

  Returns:
    The exit code: 2 if the command line is wrong, 1 if a client failed.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  split = words.index("--") if "--" in words else len(words)
  launcher_parser = make_parser()
  flags = launcher_parser.parse_args(words[:split])
  flags.command = words[split + 1 :]
  try:
    return start(flags)
  except LaunchError as error:
    say(launcher_parser.prog.split()[-1], f"error: {error}")
    return error.exit_code
  except KeyboardInterrupt:
    return INTERRUPTED


def say(module: str, text: str) -> None:
  """Print a line of a launcher to the error output, if anybody reads it."""
  with contextlib.suppress(OSError):
    print(f"{module}: {text}", file=sys.stderr, flush=True)


def check_name(name: str) -> None:
  """Raise LaunchError if a cloud would refuse the name."""
  if not _NAME.fullmatch(name):
    raise LaunchError(
      f"--name={name}: use up to 40 lower-case letters, digits and hyphens, "
      "from a letter to a letter or digit"
    )


def check_no_command(command: Sequence[str], verb: str) -> None:
  """Raise LaunchError if there is a command after `--`."""
  if command:
    raise LaunchError(f"{verb} takes no command after --: drop {command[0]!r}")


def check_at_least(flag: str, value: float, low: int) -> None:
  """Raise LaunchError if the value of a flag is below `low` or is nan."""
  if not value >= low:
    raise LaunchError(f"{flag}={value}: must be at least {low}")


def check_range(flag: str, value: float, low: int, high: int) -> None:
  """Raise LaunchError unless low <= value <= high."""
  if not low <= value <= high:
    raise LaunchError(f"{flag}={value}: must be from {low} to {high}")


def nearest(size: int, sizes: Sequence[int]) -> str:
  """Return the sizes next below and above one that does not exist."""
  around = [
    *[x for x in sizes if x < size][-1:],
    *[x for x in sizes if x > size][:1],
  ]
  return " and ".join(map(str, around))


def check_processes_per_node(processes: int, gpus: int) -> None:
  """Raise LaunchError unless a node has one process, or one for each GPU."""
  if processes not in (1, gpus or 1):
    raise LaunchError(
      f"--processes-per-node={processes}: must be 1, or --gpus-per-node={gpus} "
      "for one process on each GPU"
    )


def check_command(
  command: Sequence[str],
  *,
  shared_workdir: str = "",
  mounts: Sequence[str] = (),
) -> None:
  """Raise LaunchError if the command could not train here.

  Args:
    command: the words after `--`.
    shared_workdir: how a work directory that all hosts see begins, as in
      "gs://"; "" checks no work directory.
    mounts: paths of shared disks, below which a work directory may be, too.
  """
  if not command:
    raise LaunchError(
      "no command: end with -- python -m aoarm_jax.main --config=... "
      "--workdir=..."
    )
  if not shared_workdir or "aoarm_jax.main" not in command:
    return
  workdir = _workdir(command)
  shared = (shared_workdir, *[f"{mount}/" for mount in mounts])
  if not workdir.startswith(shared):
    raise LaunchError(
      f"--workdir={workdir or '(none)'}: the hosts share no disk and lose "
      f"theirs; give a bucket, as in --workdir={shared_workdir}bucket/run"
    )


def _workdir(command: Sequence[str]) -> str:
  """Return the last value of --workdir in a command, which counts, or ""."""
  workdir = ""
  for word, following in zip(command, [*command[1:], ""]):
    flag, equals, value = word.partition("=")
    if flag in ("--workdir", "-workdir"):
      workdir = value if equals else following
  return workdir


def verdict_function() -> str:
  """Return a shell function that judges how a start of processes ended.

  `verdict` reads the exit codes of the processes, one a line. It prints "done",
  "again" or "end", and the code that explains the others, as in "end 2". See
  exit_codes.cause.
  """
  arms = []
  other = ""
  for number, row in enumerate(exit_codes.TABLE):
    word = f'row="{number} {"again" if row.again else "end"}"'
    if row.codes:
      arms.append(f"      {' | '.join(row.codes)}) {word} ;;\n")
    else:
      other = word
  return (
    "verdict() {\n"
    "  while read -r code; do\n"
    "    case $code in\n"
    f'      0) row="{len(exit_codes.TABLE)} done" ;;\n'
    + "".join(arms)
    + f"      *) {other} ;;\n"
    "    esac\n"
    '    echo "$row $code"\n'
    "  done | sort -s -n -k 1,1 | head -n 1 | cut -d ' ' -f 2-\n"
    "}\n"
  )
