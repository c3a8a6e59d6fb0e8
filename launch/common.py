"""What the launchers share: the command line, the clients, exit codes.

Every launcher takes the whole command to start after `--`, the same on every
process. Exit code 75 of that command means: preempted after a save, start the
same command again.
"""

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

# Where the files of a launcher go, beside the runs; git passes it over.
FOLDER = "runs/launch"
PREEMPTED = 75
INTERRUPTED = 130

_INSTALL = {
  "gcloud": "https://cloud.google.com/sdk/docs/install",
  "git": "https://git-scm.com/downloads",
  "kubectl": "https://kubernetes.io/docs/tasks/tools",
  "sbatch": "this is a Slurm command: run on a login node of the cluster",
  "scancel": "this is a Slurm command: run on a login node of the cluster",
  "squeue": "this is a Slurm command: run on a login node of the cluster",
}
# Names become those of hosts, jobs and files.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class LaunchError(Exception):
  """What a user can mend: one line that names the value and the fix."""

  def __init__(self, message: str, exit_code: int = 2):
    super().__init__(message)
    self.exit_code = exit_code


class Shell:
  """Runs commands of a client, or in a dry run prints them instead."""

  def __init__(self, dry_run: bool):
    self.dry_run = dry_run

  def require(self, client: str) -> None:
    """Raises LaunchError if a client is missing and not only to be printed."""
    if not self.dry_run and shutil.which(client) is None:
      how = _INSTALL.get(client, "install it")
      raise LaunchError(f"{client} is not installed: {how}")

  def run(self, *argv: str) -> None:
    """Runs to its end, with this terminal.

    Raises:
      LaunchError: the client is missing, or the command failed.
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
    """Standard output of a command; None if it failed, with its complaint.

    Raises:
      LaunchError: the client is missing.
    """
    self.require(argv[0])
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() if done.returncode == 0 else None

  def write(self, path: str, content: str) -> None:
    """Writes a file; a dry run prints it.

    Raises:
      LaunchError: it cannot be written.
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


def print_command(command: Sequence[str], environment: dict[str, str]) -> None:
  """Prints a command as a shell would take it, variables first."""
  variables = (f"{k}={shlex.quote(v)}" for k, v in environment.items())
  print(*variables, shlex.join(command))


def parser(module: str, description: str) -> argparse.ArgumentParser:
  """A parser whose help names the module; one-line errors come from argparse.

  Args:
    module: as in launch.local.
    description: the module's docstring.
  """
  return argparse.ArgumentParser(
    prog=f"python -m {module}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_dry_run(to: argparse.ArgumentParser) -> None:
  to.add_argument(
    "--dry-run",
    action="store_true",
    help="print the commands and files, run and write nothing",
  )


def main(
  make_parser: Callable[[], argparse.ArgumentParser],
  start: Callable[[argparse.Namespace], int],
  argv: Sequence[str] | None = None,
) -> int:
  """Parses, starts, and turns a LaunchError into one line.

  Args:
    make_parser: of the launcher.
    start: receives the flags, with `command` (list of str, maybe empty), the
      words after `--`; returns the exit code.
    argv: the words after the program's name; None: of this process.

  Returns:
    The exit code: 2 for what cannot be, 1 where a client failed.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  split = words.index("--") if "--" in words else len(words)
  made = make_parser()
  flags = made.parse_args(words[:split])
  flags.command = words[split + 1 :]
  try:
    return start(flags)
  except LaunchError as error:
    print(f"{made.prog.split()[-1]}: error: {error}", file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    return INTERRUPTED


def check_name(name: str) -> None:
  """Raises LaunchError where a cloud would refuse the name."""
  if not _NAME.fullmatch(name):
    raise LaunchError(
      f"--name={name}: use up to 40 lower-case letters, digits and hyphens, "
      "from a letter to a letter or digit"
    )


def check_no_command(command: Sequence[str], what: str) -> None:
  if command:
    raise LaunchError(f"{what} takes no command after --: drop {command[0]!r}")


def check_at_least(flag: str, value: float, low: int) -> None:
  if not value >= low:  # Nor is nan.
    raise LaunchError(f"{flag}={value}: must be at least {low}")


def check_command(command: Sequence[str], *, shared_workdir: str = "") -> None:
  """Raises LaunchError for a command that could not train here.

  Args:
    command: the words after `--`.
    shared_workdir: how a work directory must start for all hosts to see it, as
      in "gs://"; "" asks for none.
  """
  if not command:
    raise LaunchError(
      "no command: end with -- python -m aoarm_jax.main --config=... "
      "--workdir=..."
    )
  if not shared_workdir or "aoarm_jax.main" not in command:
    return
  workdir = _workdir(command)
  if not workdir.startswith(shared_workdir):
    raise LaunchError(
      f"--workdir={workdir or '(none)'}: the hosts share no disk and lose "
      f"theirs; give a bucket, as in --workdir={shared_workdir}bucket/run"
    )


def _workdir(command):
  for word, following in zip(command, [*command[1:], ""]):
    flag, equals, value = word.partition("=")
    if flag in ("--workdir", "-workdir"):
      return value if equals else following
  return ""


def died_by_signal(code: int) -> bool:
  """Whether an exit code of a shell is a crash: killed or aborted, no Ctrl-C.

  The survivors of a lost process are ended by JAX with an abort.
  """
  return code > 128 and code != INTERRUPTED


def restart_test(variable: str) -> str:
  """Shell: true where an exit code asks for the same command once more."""
  return (
    f"[ ${variable} -eq {PREEMPTED} ] || "
    f"{{ [ ${variable} -gt 128 ] && [ ${variable} -ne {INTERRUPTED} ]; }}"
  )
