"""Runs a command on all hosts of a Cloud TPU slice.

  python -m launch.tpu_pod create --name=pod --zone=us-east5-a \\
    --accelerator=v5p-256 --spot
  python -m launch.tpu_pod install --name=pod --zone=us-east5-a
  python -m launch.tpu_pod run --name=pod --zone=us-east5-a -- \\
    python -m aoarm_jax.main --config=configs/two_stream.py:base \\
    --workdir=gs://bucket/base
  python -m launch.tpu_pod logs --name=pod --zone=us-east5-a
  python -m launch.tpu_pod delete --name=pod --zone=us-east5-a

create asks for the slice as a queued resource and waits for it. install copies
the last commit of the repository in the current folder to all hosts and makes
an environment there. run starts the command on every host and returns. Each
host starts it again after exit code 75 (preempted, saved) and after a crash, at
most --max-restarts times. resume is for a slice that was taken away: it creates
the slice anew, installs and runs. It takes the flags of create and the command
of run. gcloud's current project is used.
"""

import argparse
import re
import shlex
import sys
import time

from launch import common, published

_TPUS = {tpu.accelerator: tpu for tpu in published.TPUS.values()}
_POLL_SECONDS = 30
# Waiting does not change these states of a queued resource.
_LOST = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")

_IDLE = """\
if ! flock --nonblock run.lock true; then
  echo "$(hostname): a command is running; see logs, or stop it first"
  exit 1
fi
"""

# uv installs a newer Python: the system's Python is too old for jax.
_INSTALL = (
  "#!/bin/bash\n"
  + _IDLE
  + """\
set -e
rm -rf aoarm_jax
mkdir aoarm_jax
tar -xzf aoarm_jax.tar.gz -C aoarm_jax
python3 -m pip install --quiet --user uv
export PATH="$HOME/.local/bin:$PATH"
uv venv --quiet --allow-existing --python 3.12 venv
uv pip install --quiet --python venv/bin/python -e 'aoarm_jax[tpu,gcs]'
venv/bin/python -c 'import jax; print("installed: jax", jax.__version__)'
"""
)

# Every process that has file 9 open holds the lock: the loop and its children.
_START = (
  "#!/bin/bash\n"
  + _IDLE
  + """\
mv next.sh run.sh
rm -f run.stop
setsid bash run.sh 9> run.lock >> run.log 2>&1 < /dev/null &
"""
)
_RUN = """\
#!/bin/bash
flock --nonblock 9 || exit 1
export PATH="$HOME/venv/bin:$PATH" {environment}
{verdict}\
cd aoarm_jax || exit
for restart in $(seq 0 {max_restarts}); do
  echo "$(hostname): start $restart"
  {command} &
  echo $! > ~/run.pid
  wait $!
  code=$?
  echo "$(hostname): exit code $code"
  read -r next _ <<< "$(verdict <<< "$code")"
  if [ -e ~/run.stop ] || [ "$next" != again ]; then
    break
  fi
done
"""
# A command that has not ended after five minutes is killed.
_STOP = (
  'touch run.stop; pid=$(cat run.pid); kill "$pid"; '
  'timeout 300 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"'
)


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of this launcher."""
  parser = common.parser("launch.tpu_pod", __doc__)
  verbs = common.add_verbs(
    parser,
    {
      "create": "ask for the slice and wait for it",
      "install": "copy this repository to all hosts and install it",
      "run": "start the command after -- on all hosts",
      "logs": "follow the output of the hosts",
      "resume": "create, install and run after the slice was taken away",
      "stop": "ask the command to save and stop",
      "delete": "give the slice back",
    },
    named="slice",
  )
  for verb in verbs.values():
    verb.add_argument("--zone", required=True, help="zone, as in us-east5-a")
  for verb in (verbs["create"], verbs["resume"]):
    _add_slice(verb)
  for verb in (verbs["run"], verbs["resume"]):
    common.add_max_restarts(verb, 100, "preemption or a crash, on a host")
  verbs["logs"].add_argument(
    "--worker", default="0", help="number of the host, or all (default: 0)"
  )
  return parser


def _add_slice(verb: argparse.ArgumentParser) -> None:
  """Add the flags that describe a slice to create."""
  verb.add_argument(
    "--accelerator", required=True, help="as in v5litepod-16, v5p-256, v6e-64"
  )
  verb.add_argument("--spot", action="store_true", help="cheap, preemptible")
  verb.add_argument(
    "--also",
    action="append",
    default=[],
    metavar="FLAG",
    help="flag for gcloud's create, as in --also=--reserved or "
    "--also=--service-account=...; may be repeated",
  )
  verb.add_argument(
    "--wait-minutes",
    type=int,
    default=24 * 60,
    help="longest wait for the slice (default: a day)",
  )


class _Pod:
  """The verbs, for one slice."""

  def __init__(self, flags: argparse.Namespace):
    self._flags = flags
    self._shell = common.Shell(flags.dry_run)
    self._zone = f"--zone={flags.zone}"

  def _queued_resource(self, verb: str, *options: str) -> list[str]:
    """Return a command of gcloud about the queued resource."""
    command = ["gcloud", "compute", "tpus", "queued-resources", verb]
    return [*command, self._flags.name, self._zone, *options]

  def _on_hosts(self, verb: str, *options: str) -> None:
    """Run a command of gcloud about the hosts: ssh or scp."""
    self._shell.run("gcloud", "compute", "tpus", "tpu-vm", verb, *options)

  def _ssh(self, script: str, worker: str = "all") -> None:
    """Run a shell script on a host, or on all."""
    self._on_hosts(
      "ssh",
      self._flags.name,
      self._zone,
      f"--worker={worker}",
      f"--command={script}",
    )

  def _copy(self, *paths: str) -> None:
    """Copy files to the home folder of all hosts."""
    target = f"{self._flags.name}:"
    self._on_hosts("scp", *paths, target, self._zone, "--worker=all")

  def create(self) -> None:
    """Ask for the slice, and wait until it is there."""
    runtime = _runtime(self._flags.accelerator)
    self._shell.run(
      *self._queued_resource(
        "create",
        f"--node-id={self._flags.name}",
        f"--accelerator-type={self._flags.accelerator}",
        f"--runtime-version={runtime}",
        *["--spot"] * self._flags.spot,
        *self._flags.also,
      )
    )
    self._wait()

  def _describe(self) -> list[str]:
    return self._queued_resource("describe", "--format=value(state.state)")

  def _wait(self) -> None:
    """Wait until the slice is there.

    Raises:
      LaunchError: it failed, was taken away, or --wait-minutes have passed.
    """
    minutes = self._flags.wait_minutes
    if self._flags.dry_run:
      print(f"# until it says ACTIVE, every {_POLL_SECONDS} s, {minutes} min:")
      self._shell.run(*self._describe())
      return
    deadline = time.monotonic() + 60 * minutes
    state_before = None
    while (state := self._shell.read(*self._describe())) != "ACTIVE":
      if state in _LOST or time.monotonic() > deadline:
        late = f" after {minutes} minutes (--wait-minutes)"
        why = shlex.join(self._queued_resource("describe"))
        raise common.LaunchError(
          f"{self._flags.name}: the slice is {state}, not ACTIVE"
          + late * (state not in _LOST)
          + f"; why: {why}; it stays in the queue until delete",
          1,
        )
      if state != state_before:
        print(f"{self._flags.name}: {state}", flush=True)
      state_before = state
      time.sleep(_POLL_SECONDS)

  def install(self) -> None:
    """Copy the last commit to all hosts and install it."""
    archive = common.path_of("aoarm_jax", "tar.gz")
    script = common.path_of("install", "sh")
    self._shell.write(script, _INSTALL)
    self._shell.run(
      "git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"
    )
    self._copy(archive, script)
    self._ssh("bash install.sh")

  def run(self) -> None:
    """Start the command on all hosts."""
    loop, script = common.path_of("next", "sh"), common.path_of("start", "sh")
    content = _RUN.format(
      environment=common.assignments(common.ENVIRONMENT),
      max_restarts=self._flags.max_restarts,
      command=shlex.join(self._flags.command),
      verdict=common.verdict_function(),
    )
    self._shell.write(loop, content)
    self._shell.write(script, _START)
    self._copy(loop, script)
    self._ssh("bash start.sh")

  def logs(self) -> None:
    """Follow the output of the hosts."""
    self._ssh("tail -n +1 -F run.log", self._flags.worker)

  def stop(self) -> None:
    """Ask the command to save and stop."""
    self._ssh(_STOP)

  def delete(self) -> None:
    """Give the slice back."""
    self._shell.run(*self._queued_resource("delete", "--force", "--quiet"))

  def resume(self) -> None:
    """Bring the slice back if it was taken away, and run the command.

    After preemption the queued resource still exists in the state SUSPENDED,
    but its machines are gone.
    """
    if self._flags.dry_run:
      print("# if the slice was taken away:")
      self.delete()
      print("# if it was taken away or is not there:")
      self.create()
      self.install()
      print("# in any case:")
      self.run()
      return
    state = self._shell.read(*self._describe())
    if state in _LOST:
      self.delete()
      state = None
    if state is None:
      self.create()
    elif state != "ACTIVE":
      self._wait()
    if state != "ACTIVE":
      self.install()
    self.run()


def _runtime(accelerator: str) -> str:
  """Return the runtime version of an accelerator type.

  Raises:
    LaunchError: the type does not exist.
  """
  match = re.fullmatch(r"([a-z0-9]+)-(\d+)", accelerator)
  if not match or match[1] not in _TPUS:
    raise common.LaunchError(
      f"--accelerator={accelerator}: write <type>-<size>, the type one of "
      f"{', '.join(_TPUS)}"
    )
  tpu = _TPUS[match[1]]
  if match[2] not in map(str, tpu.sizes()):
    near = common.nearest(int(match[2]), tpu.sizes())
    raise common.LaunchError(
      f"--accelerator={accelerator}: there is no such size; {match[1]} has "
      f"{near}, up to {tpu.sizes()[-1]}"
    )
  return tpu.runtime


def start(flags: argparse.Namespace) -> int:
  """Carry out the verb; return the exit code."""
  common.check_name(flags.name)
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", flags.zone):
    raise common.LaunchError(f"--zone={flags.zone}: write as in us-east5-a")
  if "worker" in flags and not re.fullmatch(r"all|[0-9]+", flags.worker):
    raise common.LaunchError(
      f"--worker={flags.worker}: write the number of a host, or all"
    )
  if "accelerator" in flags:
    _runtime(flags.accelerator)
    common.check_at_least("--wait-minutes", flags.wait_minutes, 1)
  if flags.verb in ("run", "resume"):
    common.check_at_least("--max-restarts", flags.max_restarts, 0)
    common.check_command(flags.command, shared_workdir="gs://")
  else:
    common.check_no_command(flags.command, flags.verb)
  getattr(_Pod(flags), flags.verb)()
  return 0


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
