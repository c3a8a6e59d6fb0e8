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
an environment there. run starts the command on every host and returns; each
host starts it again after exit code 75 (preempted, saved) and after a crash, at
most --max-restarts times. resume, with the flags of create and the command of
run, does what is to be done after the slice was taken away: create it anew,
install, run. gcloud's current project is used.
"""

import argparse
import re
import shlex
import sys
import time

from launch import common

# Accelerator type: runtime version, its sizes (in cores, or in chips).
_CHIPS = (1, *(2**n for n in range(2, 9)))
_TPUS = {
  "v4": ("tpu-ubuntu2204-base", range(8, 8193, 8)),
  "v5litepod": ("v2-alpha-tpuv5-lite", _CHIPS),
  "v5p": ("v2-alpha-tpuv5", range(8, 12289, 8)),
  "v6e": ("v2-alpha-tpuv6e", _CHIPS),
}
_POLL_SECONDS = 30
# States of a queued resource that waiting does not change.
_LOST = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")

_IDLE = """\
if ! flock --nonblock run.lock true; then
  echo "$(hostname): a command is running; see logs, or stop it first"
  exit 1
fi
"""

# The system's Python is older than jax wants.
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

# The lock is held by whoever has file 9 open: the loop and what it starts.
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
export PATH="$HOME/venv/bin:$PATH" AOARM_DISTRIBUTED=1 PYTHONUNBUFFERED=1
cd aoarm_jax
for restart in $(seq 0 {max_restarts}); do
  echo "$(hostname): start $restart"
  {command} &
  echo $! > ~/run.pid
  wait $!
  code=$?
  echo "$(hostname): exit code $code"
  if [ -e ~/run.stop ] || ! {{ {again}; }}; then
    break
  fi
done
"""
_STOP = "touch run.stop; kill $(cat run.pid)"


def make_parser() -> argparse.ArgumentParser:
  parser = common.parser("launch.tpu_pod", __doc__)
  verbs = parser.add_subparsers(dest="verb", required=True)
  made = {
    verb: verbs.add_parser(verb, help=text)
    for verb, text in (
      ("create", "ask for the slice and wait for it"),
      ("install", "copy this repository to all hosts and install it"),
      ("run", "start the command after -- on all hosts"),
      ("logs", "follow the output of the hosts"),
      ("resume", "create, install and run what preemption left undone"),
      ("stop", "ask the command to save and stop"),
      ("delete", "give the slice back"),
    )
  }
  for verb in made.values():
    verb.add_argument("--name", required=True, help="of the slice")
    verb.add_argument("--zone", required=True, help="as in us-east5-a")
    common.add_dry_run(verb)
  for verb in (made["create"], made["resume"]):
    verb.add_argument(
      "--accelerator", required=True, help="as in v5litepod-16, v5p-256, v6e-64"
    )
    verb.add_argument("--spot", action="store_true", help="cheap, preemptible")
    verb.add_argument(
      "--also",
      action="append",
      default=[],
      metavar="FLAG",
      help="for gcloud's create, as in --also=--reserved or "
      "--also=--service-account=...; may be repeated",
    )
    verb.add_argument(
      "--wait-minutes",
      type=int,
      default=24 * 60,
      help="for the slice, at most (default: a day)",
    )
  for verb in (made["run"], made["resume"]):
    verb.add_argument(
      "--max-restarts",
      type=int,
      default=100,
      help="on a host, starts again at most (default: 100)",
    )
  made["logs"].add_argument(
    "--worker", default="0", help="number of the host, or all (default: 0)"
  )
  return parser


class _Pod:
  """The commands for one slice."""

  def __init__(self, flags: argparse.Namespace):
    self._flags = flags
    self._shell = common.Shell(flags.dry_run)
    self._zone = f"--zone={flags.zone}"

  def _queued(self, verb, *more):
    return (
      "gcloud", "compute", "tpus", "queued-resources", verb,
      self._flags.name, self._zone, *more,
    )  # fmt: skip

  def _ssh(self, script, worker="all"):
    self._shell.run(
      "gcloud", "compute", "tpus", "tpu-vm", "ssh", self._flags.name,
      self._zone, f"--worker={worker}", f"--command={script}",
    )  # fmt: skip

  def create(self):
    runtime = _runtime(self._flags.accelerator)
    self._shell.run(
      *self._queued(
        "create",
        f"--node-id={self._flags.name}",
        f"--accelerator-type={self._flags.accelerator}",
        f"--runtime-version={runtime}",
        *["--spot"] * self._flags.spot,
        *self._flags.also,
      )
    )
    self._wait()

  def _state(self):
    return self._shell.read(
      *self._queued("describe", "--format=value(state.state)")
    )

  def _wait(self):
    minutes = self._flags.wait_minutes
    describe = self._queued("describe", "--format=value(state.state)")
    if self._flags.dry_run:
      print(f"# until it says ACTIVE, every {_POLL_SECONDS} s, {minutes} min:")
      return self._shell.run(*describe)
    deadline = time.monotonic() + 60 * minutes
    before = None
    while (state := self._state()) != "ACTIVE":
      if state in _LOST or time.monotonic() > deadline:
        late = f" after {minutes} minutes (--wait-minutes)"
        raise common.LaunchError(
          f"{self._flags.name}: the slice is {state}, not ACTIVE"
          + late * (state not in _LOST)
          + f"; why: {shlex.join(self._queued('describe'))}; it stays in the "
          "queue until delete",
          1,
        )
      if state != before:
        print(f"{self._flags.name}: {state}", flush=True)
      before = state
      time.sleep(_POLL_SECONDS)

  def _copy(self, *paths):
    self._shell.run(
      "gcloud", "compute", "tpus", "tpu-vm", "scp", *paths,
      f"{self._flags.name}:", self._zone, "--worker=all",
    )  # fmt: skip

  def install(self):
    archive = f"{common.FOLDER}/aoarm_jax.tar.gz"
    script = f"{common.FOLDER}/install.sh"
    self._shell.write(script, _INSTALL)
    self._shell.run(
      "git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"
    )
    self._copy(archive, script)
    self._ssh("bash install.sh")

  def run(self):
    loop, script = f"{common.FOLDER}/next.sh", f"{common.FOLDER}/start.sh"
    content = _RUN.format(
      max_restarts=self._flags.max_restarts,
      command=shlex.join(self._flags.command),
      again=common.restart_test("code"),
    )
    self._shell.write(loop, content)
    self._shell.write(script, _START)
    self._copy(loop, script)
    self._ssh("bash start.sh")

  def logs(self):
    self._ssh("tail -n +1 -F run.log", self._flags.worker)

  def stop(self):
    self._ssh(_STOP)

  def delete(self):
    self._shell.run(*self._queued("delete", "--force", "--quiet"))

  def resume(self):
    """After preemption the resource stands, SUSPENDED, without its machines."""
    if self._flags.dry_run:
      print("# if the slice was taken away:")
      self.delete()
      print("# if it was taken away or is not there:")
      self.create()
      self.install()
      print("# in any case:")
      return self.run()
    state = self._state()
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


def _runtime(accelerator):
  """Runtime version of an accelerator type, which must exist."""
  match = re.fullmatch(r"([a-z0-9]+)-(\d+)", accelerator)
  if not match or match[1] not in _TPUS:
    raise common.LaunchError(
      f"--accelerator={accelerator}: write <type>-<size>, the type one of "
      f"{', '.join(_TPUS)}"
    )
  runtime, sizes = _TPUS[match[1]]
  if int(match[2]) not in sizes:
    listed = ", ".join(map(str, sizes[:5]))
    raise common.LaunchError(
      f"--accelerator={accelerator}: {match[1]} has the sizes {listed}, ..., "
      f"{sizes[-1]}"
    )
  return runtime


def start(flags: argparse.Namespace) -> int:
  common.check_name(flags.name)
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", flags.zone):
    raise common.LaunchError(f"--zone={flags.zone}: write as in us-east5-a")
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
