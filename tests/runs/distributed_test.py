"""Several processes are one run: the same numbers, one end, one writer."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.config import errors
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import distributed, rendezvous

PLACE = {
  "AOARM_DISTRIBUTED": "1",
  "AOARM_COORDINATOR_ADDRESS": "h:1",
  "AOARM_PROCESS_COUNT": "3",
  "AOARM_PROCESS_ID": "2",
}
CHANGES = {
  "model.T": 8,
  "model.L": 1,
  "train.steps": 12,
  "optimizer.schedule": "constant",
  "telemetry.log_every": 1,
  "checkpoint.every": 4,
  "eval.every": 6,
  "eval.batches": 3,
  "sample.every": 0,
  "distributed.heartbeat_timeout_seconds": 10,
}
# Slow enough for a signal to arrive in the midst of them. The tokens trained on
# are appended to a file of the process, if WATCHED names a folder.
SLOW = """
import os, pathlib, time
from aoarm_jax.devices import sharding
put_batch = sharding.put_batch
folder = os.environ.get("WATCHED")
def slow(mesh, batch):
  time.sleep(0.1)
  if folder and hasattr(batch, "tobytes"):
    path = pathlib.Path(folder, os.environ.get("AOARM_PROCESS_ID", "one"))
    with path.open("ab") as file:
      file.write(batch.tobytes())
  return put_batch(mesh, batch)
sharding.put_batch = slow
"""
_contexts = contextlib.ExitStack()
_folder: pathlib.Path  # Of this module's runs.


def setUpModule():
  global _folder
  _contexts.enter_context(helpers.quick_compilation())
  _folder = pathlib.Path(_contexts.enter_context(tempfile.TemporaryDirectory()))
  helpers.write_text(_folder / "text")


def tearDownModule():
  _contexts.close()


def arguments(name, *more, **changes):
  return helpers.command_in(_folder, CHANGES, name, *more, **changes)


@contextlib.contextmanager
def started(*command, processes, **environment):
  """The launcher of processes of the program, joined to one run."""
  process = subprocess.Popen(
    helpers.launcher(processes, command, code=SLOW),
    env=helpers.environment(**environment),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    try:
      yield process
    finally:
      while process.poll() is None:  # The second one kills.
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)


def records(name, kind):
  """{step: mean nats} of the records of a kind."""
  field = {"train": "loss_nats_per_token", "valid": "nats_per_token"}[kind]
  lines = (_folder / name / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return {r["step"]: r[field] for r in found if r["kind"] == kind}


def state(name):
  return helpers.final_state(_folder / name, helpers.config_of(arguments(name)))


def untimed(log):
  return re.sub(r"\d\d:\d\d:\d\d ", "", log)


class StartTest(parameterized.TestCase):
  def test_the_environment_goes_before(self):
    fields = config_lib.Distributed(
      coordinator_address="other:2", heartbeat_timeout_seconds=7
    )
    got = distributed.with_environment(fields, PLACE)
    want = config_lib.Distributed(True, "h:1", 3, 2, 7)
    self.assertEqual(got, want)
    notice = distributed.with_environment(
      config_lib.Distributed(), {"AOARM_NOTICE_SECONDS": "25"}
    )
    self.assertEqual(notice, config_lib.Distributed(notice_seconds=25))
    self.assertEqual(distributed.with_environment(fields, {}), fields)

  @parameterized.parameters(
    ({"AOARM_DISTRIBUTED": "yes"}, "AOARM_DISTRIBUTED='yes': must be 0 or 1"),
    ({"AOARM_PROCESS_ID": "a"}, "AOARM_PROCESS_ID='a': must be a whole number"),
    (
      {"AOARM_NOTICE_SECONDS": "1s"},
      "NOTICE_SECONDS='1s': must be a whole num",
    ),
    ({"AOARM_PROCESS_ID": "3"}, "process_id=3 .AOARM_PROCESS_ID.: must be bel"),
    ({"AOARM_PROCESS_ID": "-1"}, "process_id .AOARM_PROCESS_ID. is missing"),
    (
      {"AOARM_PROCESS_COUNT": "0"},
      "process_count .AOARM_PROCESS_COUNT. is mis",
    ),
    ({"AOARM_COORDINATOR_ADDRESS": ""}, "coordinator_address .*is missing"),
    ({"AOARM_COORDINATOR_ADDRESS": "h"}, "coordinator_address='h'.*host:port"),
    ({"AOARM_COORDINATOR_ADDRESS": "h:99999"}, "='h:99999'.* from 1 to 65535"),
  )
  def test_what_cannot_be(self, changes, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      distributed.with_environment(config_lib.Distributed(), PLACE | changes)

  def test_nothing_is_guessed(self):
    """Not asked for: not started, whatever else the environment says."""
    with mock.patch("jax.distributed.initialize") as initialize:
      distributed.start(
        config_lib.Distributed(), PLACE | {"AOARM_DISTRIBUTED": "0"}
      )
    initialize.assert_not_called()

  @parameterized.parameters(True, False)
  def test_jax_is_told_what_is_known(self, is_explicit):
    place = PLACE if is_explicit else {"AOARM_DISTRIBUTED": "1"}
    with (
      mock.patch("jax.distributed.initialize") as initialize,
      mock.patch.object(rendezvous, "meet") as meet,
    ):
      distributed.start(config_lib.Distributed(), place)
    self.assertEqual(meet.called, is_explicit)
    told = initialize.call_args.kwargs
    self.assertEqual(told["heartbeat_timeout_seconds"], 100)
    self.assertEqual(told["initialization_timeout"], 300)
    self.assertEqual("coordinator_address" in told, is_explicit)
    if is_explicit:
      self.assertEqual(
        (
          told["coordinator_address"],
          told["num_processes"],
          told["process_id"],
        ),
        ("h:1", 3, 2),
      )

  @parameterized.parameters(
    ("UNKNOWN: Failed to start RPC server", 2, "another program uses the port"),
    ("DEADLINE_EXCEEDED: too late\nmore", 76, "(DEADLINE_EXCEEDED: too late)"),
  )
  def test_jax_cannot_join(self, text, exit_code, message):
    """Where JAX finds the address by itself."""
    error = jax.errors.JaxRuntimeError(text)
    with (
      mock.patch("jax.distributed.initialize", side_effect=error),
      self.assertRaises(errors.UserError) as caught,
    ):
      distributed.start(config_lib.Distributed(), {"AOARM_DISTRIBUTED": "1"})
    self.assertEqual(caught.exception.exit_code, exit_code)
    self.assertIn(message, str(caught.exception))
    self.assertLen(str(caught.exception).splitlines(), 1)

  def test_no_cluster(self):
    """The error of a lone machine is shown, not swallowed."""
    process = helpers.start(arguments("nowhere"), AOARM_DISTRIBUTED="1")
    code, out, err = helpers.finish(process)
    self.assertEqual((code, out), (2, ""))
    self.assertLen(err.splitlines(), 1, err)
    self.assertIn("config.distributed.enabled=True: no cluster was found", err)
    self.assertFalse((_folder / "nowhere").exists())


@pytest.mark.thorough
class RunTest(parameterized.TestCase):
  def signalled(
    self, name, number, step, processes=2, environment=(), **changes
  ):
    """(stdout, stderr) of a run, one of whose processes got a signal."""
    command = arguments(name, **changes)
    with started(
      *command, processes=processes, **dict(environment)
    ) as launcher:
      seen = ""
      while not re.search(rf" {step}/\d+ ", seen):
        line = launcher.stdout.readline()
        self.assertNotEqual(line, "", seen)
        seen += line
      os.kill(self.process_1_of(launcher), number)
      out, err = launcher.communicate(timeout=200)
    self.assertEqual(launcher.returncode, 0, seen + out + err)
    return untimed(seen + out), err

  def process_1_of(self, launcher):
    for pid in subprocess.check_output(
      ["pgrep", "-P", str(launcher.pid)], text=True
    ).split():
      variables = pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0")
      if "AOARM_PROCESS_ID=1" in variables:
        return int(pid)
    return self.fail("process 1 is not there")

  def assert_same_run(self, name, one="one"):
    """As the uninterrupted run of one process."""
    if not (_folder / one).exists():
      helpers.run(arguments(one))
    for kind in ("train", "valid"):
      want, got = records(one, kind), records(name, kind)
      self.assertEqual(list(got), list(want))
      np.testing.assert_allclose(
        list(got.values()), list(want.values()), rtol=1e-5
      )
    (want, a), (got, b) = state(one), state(name)
    self.assertEqual(want.data_state["iterator"], got.data_state["iterator"])
    # Adam divides by small numbers: single entries may differ by more.
    self.assertLess(helpers.distance(b.params, a.params), 1e-5)

  def test_two_processes_are_one_run(self):
    """Also when a SIGTERM to one of them has stopped both."""
    out, err = self.signalled("two", signal.SIGTERM, step=5)
    with self.subTest("one agreed save, and on"):
      stop = re.findall(r"^\[(\d)\] .*SIGTERM at step (\d+), which", out, re.M)
      self.assertLen(stop, 2, out)
      self.assertEqual({rank for rank, _ in stop}, {"0", "1"})
      self.assertEqual(stop[0][1], stop[1][1])
      self.assertLess(int(stop[0][1]), 12)
      self.assertIn("the run was preempted and saved", err)
      self.assertIn("restart 1 of 3", err)
      self.assertIn(f"[0] resumed from step {stop[0][1]}", out)
    with self.subTest("only process 0 speaks"):
      self.assertEmpty(re.findall(r"^\[1\] .* step +\d+/12", out, re.M))
    with self.subTest("the same numbers"):
      self.assert_same_run("two")

  @pytest.mark.slow
  def test_an_evaluation_stops_in_all_processes(self):
    """At the same batch. JAX alone would take the signal and go on."""
    helpers.run(arguments("evaluated", train__steps=1))
    command = arguments("evaluated", "--mode=eval", eval__batches=0)
    with started(*command, processes=2) as launcher:
      seen = ""
      while "evaluated: " not in seen:
        line = launcher.stdout.readline()
        self.assertNotEqual(line, "", seen)
        seen += line
      launcher.terminate()
      out, err = launcher.communicate(timeout=200)
    self.assertEqual(launcher.returncode, 75, seen + out + err)
    stops = re.findall(r"^\[(\d)\] .*SIGTERM after 0 of 2 est", out, re.M)
    self.assertEqual(sorted(stops), ["0", "1"], out)

  @pytest.mark.slow
  def test_four_processes_are_one_run_of_fifty_steps(self):
    """Stopped by a SIGTERM to one of them; the same tokens, bit by bit."""
    watched = _folder / "watched"
    watched.mkdir()
    # Gentle: a larger rate lets the rounding of sums in another order grow.
    changes = {"train__steps": 50, "optimizer__peak_learning_rate": 1e-3}
    environment = {"WATCHED": str(watched)}
    one = helpers.start(
      arguments("one_of_fifty", **changes), code=SLOW, **environment
    )
    code, _, err = helpers.finish(one)
    self.assertEqual(code, 0, err)
    out, err = self.signalled(
      "four_of_fifty", signal.SIGTERM, 20, 4, environment, **changes
    )
    self.assertIn("the run was preempted and saved", err)
    step = re.search(r"^\[0\] resumed from step (\d+)$", out, re.M)[1]
    self.assertBetween(int(step), 20, 49)
    B, T = helpers.SMALLEST["train.batch_size"], CHANGES["model.T"]
    rows = [
      np.frombuffer((watched / str(rank)).read_bytes(), np.uint8).reshape(
        50, B // 4, T
      )
      for rank in range(4)
    ]
    self.assertEqual(
      np.concatenate(rows, axis=1).tobytes(), (watched / "one").read_bytes()
    )
    self.assert_same_run("four_of_fifty", "one_of_fifty")

  @parameterized.parameters(
    (signal.SIGKILL, 5), (signal.SIGKILL, 8), (signal.SIGSTOP, 6)
  )
  @pytest.mark.slow
  def test_a_lost_process_costs_no_more_than_a_restart(self, number, step):
    """Killed, or hung until the others miss its heartbeat."""
    name = f"lost_at_{step}"
    out, err = self.signalled(name, number, step, processes=4)
    self.assertRegex(err, "process [0-3] of 4 was lost: SIG(KILL|ABRT)")
    if number == signal.SIGSTOP:
      self.assertIn("process 1 did not end", err)
    self.assertIn("restart 1 of 3", err)
    self.assertRegex(out, r"\[0\] resumed from step (4|8)\n")
    self.assert_same_run(name)


if __name__ == "__main__":
  absltest.main()
