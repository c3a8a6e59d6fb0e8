"""Many random kills of a run of two processes: it ends with the same bits.

  python -m pytest -n 0 -s -m slow tests/runs/kills_test.py

AOARM_TEST_KILLS says how many (100), and AOARM_TEST_SEED which. A table of them
is printed.
"""

import collections
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time

import helpers
import pytest
from absl.testing import absltest

KILLS = int(os.environ.get("AOARM_TEST_KILLS", "100"))
SEED = int(os.environ.get("AOARM_TEST_SEED", "0"))
STEPS = 200
CHANGES = {
  "model.T": 8,
  "model.L": 1,
  "train.steps": STEPS,
  "optimizer.schedule": "constant",
  "telemetry.log_every": 20,
  "checkpoint.every": 10,
  "eval.every": 50,
  "eval.batches": 2,
  "sample.every": 0,
  "distributed.heartbeat_timeout_seconds": 10,
}
# Every process tells its number, its process id and each of its steps.
TOLD = """
import os, pathlib
from aoarm_jax.devices import sharding
put_batch = sharding.put_batch
me = pathlib.Path(os.environ["TOLD"], os.environ["AOARM_PROCESS_ID"])
me.write_text(f"{os.getpid()} 0")
steps = 0
def told(mesh, batch):
  global steps
  steps += 1
  me.write_text(f"{os.getpid()} {steps}")
  return put_batch(mesh, batch)
sharding.put_batch = told
"""


class Run:
  """A run of two processes under a launcher that starts them again."""

  def __init__(self, folder: pathlib.Path, name: str):
    self.workdir = folder / name
    self.told = folder / f"told_{name}"
    self.told.mkdir()
    self.command = helpers.arguments(
      self.workdir, {**CHANGES, "data.path": folder / "text"}
    )
    self.log = folder / f"{name}.log"
    self.start()

  def start(self):
    """Starts the launcher."""
    with self.log.open("a") as log:
      self.launcher = subprocess.Popen(
        helpers.launcher(
          2,
          self.command,
          *("--max-restarts=1000", "--grace-seconds=5"),
          code=TOLD,
        ),
        env=helpers.environment(TOLD=str(self.told)),
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def read(self) -> dict[int, list[int]]:
    """{number of a process: [process id, steps since its start]}."""
    found = {}
    for number in (0, 1):
      try:
        words = (self.told / str(number)).read_text().split()
      except OSError:
        continue
      if len(words) == 2:
        found[number] = [int(word) for word in words]
    return found

  def wait(self, seconds: float, steps: int, old: set[int]) -> set[int] | None:
    """Waits for new processes to live so long and to take so many steps.

    Returns:
      their process ids; None if the run has ended.
    """
    since = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
      if self.launcher.poll() is not None:
        return None
      told = self.read()
      ids = {process for process, _ in told.values()}
      if len(ids) == 2 and not ids & old:
        since = since or time.monotonic()
        lived = time.monotonic() - since >= seconds
        if lived and min(done for _, done in told.values()) >= steps:
          return ids
      time.sleep(0.002)
    raise AssertionError(f"no progress; see {self.log}")


def kill(process: int) -> None:
  """Kills a process that may have ended."""
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, signal.SIGKILL)


@pytest.mark.slow
class KillsTest(absltest.TestCase):
  def test_the_same_bits_after_random_kills(self):
    generator = random.Random(SEED)
    counts = collections.Counter[str]()
    with tempfile.TemporaryDirectory() as name, helpers.quick_compilation():
      folder = pathlib.Path(name)
      helpers.write_text(folder / "text")
      whole = Run(folder, "whole")
      self.assertEqual(whole.launcher.wait(), 0)
      want = self.bits(whole)
      runs = 0
      while sum(counts.values()) < KILLS:
        runs += 1
        run = Run(folder, f"killed_{runs}")
        self.disturb(run, generator, counts)
        self.assertEqual(run.launcher.wait(), 0, str(run.log))
        self.assertEqual(self.bits(run), want, str(run.log))
        print(f"run {runs}: the same bits; kills so far {dict(counts)}")
    print("| what was killed | times |\n|---|---|")
    for what, count in sorted(counts.items()):
      print(f"| {what} | {count} |")
    print(f"{runs} runs of {STEPS} steps, all with the bits of a whole one")

  def disturb(self, run, generator, counts):
    """Kills again and again, until the run ends or all kills are done."""
    old: set[int] = set()
    while sum(counts.values()) < KILLS:
      # While it starts, or after some steps.
      early = generator.random() < 0.25
      seconds = generator.uniform(0, 5) if early else generator.uniform(0, 0.1)
      ids = run.wait(seconds, 0 if early else generator.randint(1, 40), old)
      if ids is None:
        return
      what = generator.choice(("process 0", "process 1", "both", "launcher"))
      moment = "while it starts" if early else "after some steps"
      counts[f"{what}, {moment}"] += 1
      if what == "launcher":
        run.launcher.kill()
        run.launcher.wait()
        run.start()
      else:
        processes = [process for process, _ in run.read().values()]
        if what != "both":
          processes = [processes[int(what[-1])]]
        for process in processes:
          kill(process)
      old |= ids

  def bits(self, run):
    """All arrays of the final state."""
    config = helpers.config_of(run.command)
    return helpers.leaves_as_bytes(helpers.final_state(run.workdir, config)[1])


if __name__ == "__main__":
  absltest.main()
