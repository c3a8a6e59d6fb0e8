"""The main job as a user runs it: train, evaluate, sample, stop, resume."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import threading
import time

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import errors
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.devices import sharding, stopping
from aoarm_jax.runs import (
  identity,
  locking,
  manifest,
  metrics,
  opening,
  telemetry,
)
from aoarm_jax.training import loop as train
from aoarm_jax.training import program as program_lib
from aoarm_jax.training import resuming

_folder: pathlib.Path  # Of this module's runs.
_contexts = contextlib.ExitStack()

# Constant at first, then a decay; micro-batches; an average of the parameters.
BASE = {
  "optimizer.schedule": "stable_decay",
  "optimizer.decay_steps": 60,
  "optimizer.ema_decay": 0.9,
  "compute.accumulate": 2,
  "train.steps": 160,
  "telemetry.log_every": 1,
  "eval.every": 40,
  "eval.batches": 0,
  "sample.every": 100,
  "checkpoint.every": 10,
  "checkpoint.keep_last": 9,
}
# A constant rate, and nothing else.
SHORT = {
  "optimizer.schedule": "constant",
  "train.steps": 12,
  "telemetry.log_every": 1,
  "eval.every": 6,
  "sample.every": 0,
  "checkpoint.every": 4,
}

LONGER = SHORT | {"train.steps": 20}


def setUpModule():
  global _folder
  if jax.default_backend() != "cpu":
    raise absltest.SkipTest("for the CPU: start with JAX_PLATFORMS=cpu")
  _contexts.enter_context(helpers.quick_compilation())
  temporary = _contexts.enter_context(tempfile.TemporaryDirectory())
  _folder = pathlib.Path(temporary)
  helpers.write_text(_folder / "text")


def tearDownModule():
  _contexts.close()
  # A worker may come back to this module, with another folder.
  base.cache_clear()
  short.cache_clear()


def arguments(workdir, changes, *more, **kwargs):
  changes = {"data.path": _folder / "text", **changes}
  return helpers.arguments(workdir, changes, *more, **kwargs)


def logged(command):
  """Runs a command; its log lines."""
  with absltest.TestCase().assertLogs("absl", "INFO") as logs:
    helpers.run(command)
  return [record.getMessage() for record in logs.records]


@functools.cache
def base():
  """A finished run, not to be changed: (workdir, log lines)."""
  workdir = _folder / "base"
  return workdir, logged(
    arguments(
      workdir, BASE, experiment=str(helpers.ROOT / "configs" / "two_stream.py")
    )
  )


@functools.cache
def short():
  """A finished short run, not to be changed."""
  helpers.run(arguments(_folder / "short", SHORT))
  return _folder / "short"


def copy_of(run, name):
  shutil.copytree(run, _folder / name)
  return _folder / name


def measured(workdir):
  """The records, without how fast they came."""
  speed = ("tokens_per_second", "mfu")
  return [
    {key: value for key, value in record.items() if key not in speed}
    for record in metrics.read(workdir)
  ]


class TrainTest(parameterized.TestCase):
  def matching(self, pattern, lines):
    """The one line that has `pattern`."""
    found = [line for line in lines if re.search(pattern, line)]
    self.assertLen(found, 1, f"{pattern!r} in:\n" + "\n".join(lines))
    return found[0]

  def assert_same_run(self, got, want, changes):
    """Same state, same place in the data, same numbers on the way there."""
    self.assertEqual(measured(got), measured(want))
    config = helpers.config_of(arguments(got, changes))
    (got_saved, got), (want_saved, want) = (
      helpers.final_state(run, config) for run in (got, want)
    )
    self.assertEqual(got_saved.step, config.train.steps)
    self.assertEqual(got_saved.data_state, want_saved.data_state)
    self.assertEqual(got_saved.metric, want_saved.metric)
    self.assertEqual(
      helpers.leaves_as_bytes(got), helpers.leaves_as_bytes(want)
    )
    self.assertEqual(bool(got.ema), config.optimizer.ema_decay > 0)

  def refused(self, error, command):
    """The message of a command that changes nothing in the run."""
    with self.assertRaises(error) as caught:
      helpers.run(command)
    self.assertNotIn("\n", str(caught.exception))
    return str(caught.exception)


class RunTest(TrainTest):
  def test_the_directory_explains_itself(self):
    workdir, _ = base()
    saved = config_lib.from_json((workdir / "config.json").read_text())
    for path, _, value in config_lib.leaves(saved):
      wanted = (helpers.SMALLEST | BASE).get(path.removeprefix("config."))
      self.assertIn(wanted, (None, value), path)
    self.assertEqual((saved.name, saved.variant), ("two_stream", "default"))
    command = (workdir / "command.txt").read_text()
    self.assertLen(command.splitlines(), 1)
    self.assertIn("--config.train.steps=160", command)
    versions = json.loads((workdir / "versions.json").read_text())
    self.assertEqual(versions["jax"], jax.__version__)
    table = (workdir / "parameters.txt").read_text()
    # 29 embeddings, blocks, the norm, the head, the start of the queries.
    block = 4 * 16 * 16 + 2 * 8 + 2 * 64 * 16 + 2 * 16
    total = 29 * 16 + 2 * block + 16 + 16 * 27
    count = int(re.search(r"total .* ([\d,]+)\n", table)[1].replace(",", ""))
    self.assertBetween(count, total, total + 32)
    for picture in ("loss.png", "slot_curve.png"):
      self.assertStartsWith((workdir / picture).read_bytes(), b"\x89PNG")
    steps = sorted(map(int, os.listdir(workdir / "checkpoints")))
    self.assertEqual(steps, list(range(80, 161, 10)))

  def test_metrics(self):
    records = metrics.read(base()[0])
    steps = [r["step"] for r in records if r["kind"] == "train"]
    self.assertEqual(steps, list(range(1, 161)))
    valid = [r for r in records if r["kind"] == "valid"]
    self.assertEqual([r["step"] for r in valid], [40, 80, 120, 160])
    for record in valid:
      self.assertEqual(record["estimator"], "any_order")
      self.assertEqual(record["sequences"], 1000 // 16)
      self.assertLen(record["slot_curve_bits"], 16)
      self.assertAlmostEqual(
        np.mean(record["slot_curve_bits"]), record["bits_per_char"], places=5
      )
    for record in records:
      self.assertAlmostEqual(
        record["bits_per_char"],
        record.get("loss_nats_per_token", record.get("nats_per_token"))
        / math.log(2),
      )

  def test_learns_more_than_symbol_frequencies(self):
    records = metrics.read(base()[0])
    losses = [r["bits_per_char"] for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"][-1]
    self.assertLess(np.mean(losses[-10:]), losses[0] - 0.5)
    self.assertBetween(valid["unigram_bits"], 4.7, math.log2(27))
    self.assertLess(valid["bits_per_char"], valid["unigram_bits"] - 0.5)
    # The more is known, the less is left to guess.
    curve = valid["slot_curve_bits"]
    self.assertLess(np.mean(curve[-4:]), np.mean(curve[:4]) - 0.25)

  def test_samples_in_training(self):
    for step in (100, 160):
      path = base()[0] / "samples" / f"step_{step:08d}.jsonl"
      lines = path.read_text().splitlines()
      self.assertLen(lines, 4)
      for line in map(json.loads, lines):
        self.assertEqual(line["step"], step)
        self.assertRegex(line["text"], "^[a-z ]{16}$")
        self.assertEqual(sorted(line["order"]), list(range(1, 17)))

  def test_says_what_it_does(self):
    _, lines = base()
    self.matching(r"text: folder .*text: train 20,000, valid 1,000", lines)
    self.matching(r"model: two_stream, [\d,]+ parameters; 1 x cpu", lines)
    self.matching(
      "no accelerator found: ':tiny' is the size for a CPU "
      ".*configs/two_stream.py:tiny.*ETA",
      lines,
    )
    self.matching(
      r"step +20/160  loss .* nats/token  .* bits/char .* tokens/s  ETA", lines
    )
    self.matching(
      r"step 160  valid: any_order .*unigram entropy 4\.7\d* bits/char\)", lines
    )
    self.matching("done: .*base", lines)
    with self.assertRaises(AssertionError):
      self.matching("finished", lines)

  def test_tiny_is_not_told_to_take_tiny(self):
    workdir = _folder / "tiny"
    with (
      absltest.mock.patch.object(
        train._Run, "loop", side_effect=telemetry.NonFiniteError
      ),
      self.assertLogs("absl", "INFO") as logs,
      self.assertRaises(telemetry.NonFiniteError),
    ):
      helpers.run(arguments(workdir, SHORT))
    self.assertNotIn("accelerator", "\n".join(logs.output))

  def test_started_again_when_finished(self):
    workdir, _ = base()
    before = helpers.contents(workdir)
    lines = logged(arguments(workdir, BASE))
    line = self.matching("finished: .*base holds step 160 of 160", lines)
    self.assertIn("choose another --workdir", line)
    self.assertEqual(helpers.contents(workdir), before)

  @parameterized.parameters(
    ("seed", 5, 0),
    ("model.mechanism", "decoupled_rope", "two_stream"),
    ("model.D", 32, 16),
    ("model.sentinels", 2, 1),
    ("optimizer.b1", 0.5, 0.9),
    ("optimizer.ema_decay", 0.0, 0.9),
    ("optimizer.peak_learning_rate", 0.5, 0.01),
    ("train.batch_size", 16, 8),
    ("orders.family", "mixture", "uniform"),
    ("data.tokenizer", "byte", "char27"),
    ("eval.seed", 2, 1),
  )
  def test_resume_with_another(self, path, value, former):
    workdir, _ = base()
    before = helpers.contents(workdir)
    message = self.refused(
      config_lib.ConfigError, arguments(workdir, {**BASE, path: value})
    )
    self.assertStartsWith(message, f"config.{path}={value!r}: ")
    self.assertIn(f"has {former!r}", message)
    self.assertEqual(helpers.contents(workdir), before)


class ReadTest(TrainTest):
  def test_eval_is_the_last_validation(self):
    workdir = copy_of(base()[0], "evaluated")
    lines = logged(
      arguments(
        workdir,
        BASE | {"eval.estimators": ("any_order", "left_to_right", "ensembled")},
        "--mode=eval",
      )
    )
    self.matching(r"restored step 160 .* \(EMA\)", lines)
    (path,) = (workdir / "evaluations").glob("step_00000160_valid_*.json")
    report = json.loads(path.read_text())
    self.assertEqual((report["step"], report["split"]), (160, "valid"))
    valid = metrics.read(workdir)[-1]
    estimates = {e["estimator"]: e for e in report["estimates"]}
    self.assertLen(estimates, 3)
    for name, value in estimates["any_order"].items():
      if not name.startswith("by_"):  # Bins are in reports alone.
        self.assertEqual(value, valid[name], name)
    self.assertEqual(report["unigram_bits"], valid["unigram_bits"])
    self.assertLess(
      estimates["ensembled"]["nats_per_token"], valid["nats_per_token"]
    )
    self.matching(rf"any_order +{valid['bits_per_char']:.4f} bits/char", lines)
    self.assertTrue((workdir / "slot_curve_valid.png").exists())

  def test_eval_of_a_split_that_is_missing(self):
    text = _folder / "no_test"
    helpers.write_text(text, test=False)
    changes = BASE | {"data.path": text, "eval.split": "test"}
    message = self.refused(
      corpora.DataError, arguments(base()[0], changes, "--mode=eval")
    )
    self.assertRegex(message, "no_test: the test split .* there is no test.txt")

  def test_eval_of_another_text_says_so(self):
    workdir = copy_of(base()[0], "other_text")
    helpers.write_text(_folder / "text_1", seed=1)
    changes = BASE | {"data.path": _folder / "text_1"}
    line = "the valid text is not the checkpoint's"
    self.matching(line, logged(arguments(workdir, changes, "--mode=eval")))
    with self.assertRaises(AssertionError):
      self.matching(line, logged(arguments(workdir, BASE, "--mode=eval")))

  @parameterized.product(
    mode=["eval", "sample"],
    change=[("model.mechanism", "decoupled_rope"), ("model.L", 3)],
  )
  def test_another_model(self, mode, change):
    path, value = change
    before = helpers.contents(base()[0])
    message = self.refused(
      config_lib.ConfigError,
      arguments(base()[0], {**BASE, path: value}, f"--mode={mode}"),
    )
    place = "run" if path == "model.mechanism" else "checkpoint"
    self.assertStartsWith(message, f"config.{path}={value!r}: the {place} ")
    self.assertEqual(helpers.contents(base()[0]), before)

  def test_sample_needs_nothing_but_the_checkpoint(self):
    workdir = _folder / "sampled"
    workdir.mkdir()
    copy_of(base()[0] / "checkpoints", "sampled/checkpoints")
    prompt = "ab___fg__j"
    command = arguments(
      workdir,
      BASE | {"data.path": _folder / "deleted", "sample.temperature": 0.0},
      "--mode=sample",
      f"--prompt={prompt}",
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      helpers.run(command)
    texts = out.getvalue().splitlines()
    self.assertLen(texts, 4)
    pattern = re.compile(prompt.replace("_", "[a-z ]"))
    for text in texts:
      self.assertIsNotNone(pattern.fullmatch(text), text)
    (path,) = (workdir / "samples").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    self.assertEqual([line["text"] for line in lines], texts)
    known = [i + 1 for i, symbol in enumerate(prompt) if symbol != "_"]
    for line in lines:
      self.assertEqual((line["step"], line["prompt"]), (160, prompt))
      self.assertEqual(line["order"][: len(known)], known)
      self.assertEqual(sorted(line["order"]), list(range(1, 11)))

  def test_sample_without_a_prompt(self):
    workdir = _folder / "sampled_freely"
    workdir.mkdir()
    copy_of(base()[0] / "checkpoints", "sampled_freely/checkpoints")
    outs = []
    for seed in (3, 3, 4):
      out = io.StringIO()
      with contextlib.redirect_stdout(out):
        helpers.run(
          arguments(workdir, BASE | {"sample.seed": seed}, "--mode=sample")
        )
      outs.append(out.getvalue())
    self.assertEqual(outs[0], outs[1])
    self.assertNotEqual(outs[0], outs[2])
    self.assertLen(list((workdir / "samples").iterdir()), 3)

  def stopped(self, mode, batch, changes, *more):
    """(stdout, log lines, error) of a mode that gets SIGTERM in a batch."""
    workdir, calls = copy_of(base()[0], f"stopped_{self._testMethodName}"), []
    out = io.StringIO()

    def signalled(put):
      def call(*args):
        calls.append(1)
        if len(calls) == batch:
          os.kill(os.getpid(), signal.SIGTERM)
        return put(*args)

      return call

    with (
      absltest.mock.patch.object(
        sharding, "put_batch", signalled(sharding.put_batch)
      ),
      absltest.mock.patch.object(
        sharding, "put_rows", signalled(sharding.put_rows)
      ),
      contextlib.redirect_stdout(out),
      self.assertLogs("absl", "INFO") as logs,
      self.assertRaises(stopping.Stopped) as caught,
    ):
      helpers.run(arguments(workdir, BASE | changes, f"--mode={mode}", *more))
    self.assertEqual(caught.exception.exit_code, 75)
    lines = [record.getMessage() for record in logs.records]
    self.matching("SIGTERM: stopping after this batch", lines)
    self.assertLen(calls, batch)
    return workdir, out.getvalue().splitlines(), lines, str(caught.exception)

  def test_eval_stops_at_the_next_batch(self):
    estimators = ("any_order", "left_to_right")
    workdir, _, lines, message = self.stopped(
      "eval", 3, {"eval.estimators": estimators}
    )
    self.matching("stopped after 3 of 8 batches", lines)
    self.matching(r"valid  any_order .*\(24 sequences, 384 characters\)", lines)
    self.assertStartsWith(message, "SIGTERM after 0 of 2 estimators")
    self.assertFalse((workdir / "evaluations").exists())

  def test_sample_stops_at_the_next_batch(self):
    changes = {"sample.count": 12, "sample.batch_size": 4}
    workdir, out, _, message = self.stopped("sample", 2, changes)
    self.assertLen(out, 8)
    self.assertStartsWith(message, "SIGTERM after 8 of 12 texts")
    texts = [p for p in (workdir / "samples").iterdir() if "step" not in p.name]
    self.assertLen(texts[0].read_text().splitlines(), 8)

  @parameterized.parameters("sample", "score")
  def test_a_file_stops_at_the_next_batch(self, mode):
    path = _folder / "lines.txt"
    path.write_text("ab_d\n" * 6)
    changes = {f"{mode}.batch_size": 4, "sample.count": 1}
    _, out, _, message = self.stopped(mode, 1, changes, f"--input={path}")
    self.assertLen(list(map(json.loads, out)), 4)
    self.assertStartsWith(message, "SIGTERM after 4 of 6 texts")


class StopTest(TrainTest):
  def test_killed_and_stopped_in_every_way_is_uninterrupted(self):
    """One run, stopped four times, ends as if it had never been.

    SIGKILL at any moment, SIGKILL while a checkpoint is half written, SIGTERM
    and SIGINT, as launchers and terminals send them: to the process group.
    """
    base()
    workdir = _folder / "stopped"
    command = arguments(workdir, BASE)
    steps = workdir / "checkpoints"
    lines = random.randrange(25)

    with self.subTest("SIGKILL", lines=lines):
      process = helpers.start(command)
      seen = helpers.read_until(process, "saved checkpoint step 10", lines)
      os.killpg(process.pid, signal.SIGKILL)
      self.assertEqual(helpers.finish(process)[0], -signal.SIGKILL, seen)

    with self.subTest("SIGKILL in a save"):
      # Dies when orbax is done with a second save and no manifest stands yet.
      process = helpers.start(command, code=DIES_IN_SECOND_SAVE)
      code, _, err = helpers.finish(process)
      self.assertEqual(code, -signal.SIGKILL, err)
      self.assertIn("resumed from step", err)
      half = [
        step
        for step in steps.iterdir()
        if not (step / "manifest.json").exists()
      ]
      self.assertNotEmpty(half)

    for number, exit_code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
      with self.subTest(number.name):
        # A loader process is signalled with the group, and gives batches on.
        workers = int(number == signal.SIGTERM)
        process = helpers.start([*command, f"--config.data.workers={workers}"])
        helpers.read_until(process, "resumed from step")
        helpers.read_until(process, "loss", 3)
        for _ in range(3):  # A key that is pressed once may come twice.
          os.killpg(process.pid, number)
          time.sleep(0.005)
        code, _, err = helpers.finish(process)
        self.assertEqual(code, exit_code, err)
        self.assertNotIn("Traceback", err)
        stop = re.search(rf"{number.name} at step (\d+)\D.*saved", err)
        self.assertIsNotNone(stop, err)
        self.assertIn("the same command", stop.string)
        self.assertTrue((steps / stop[1] / "manifest.json").exists(), stop[0])

    newest = stop[1]
    self.assertLess(int(newest), 160)
    self.matching(f"resumed from step {newest}", logged(command))
    self.assert_same_run(workdir, base()[0], BASE)
    starts = (workdir / "command.txt").read_text().splitlines()
    self.assertLen(starts, 5)

  def test_cosine_cannot_be_prolonged(self):
    workdir = copy_of(short(), "cosine")
    changes = SHORT | {"optimizer.schedule": "cosine"}
    config = helpers.config_of(arguments(workdir, changes))
    step = epath.Path(workdir / "checkpoints" / "12")
    record = manifest.read(step) | {"config": config_lib.to_json(config)}
    manifest.write(step, record)
    before = helpers.contents(workdir)
    self.matching("finished", logged(arguments(workdir, changes)))
    message = self.refused(
      config_lib.ConfigError, arguments(workdir, changes | {"train.steps": 20})
    )
    self.assertStartsWith(message, "config.train.steps=20: the run has 12, and")
    self.assertIn("cosine", message)
    self.assertEqual(helpers.contents(workdir), before)

  def test_decay_that_has_begun_cannot_be_prolonged(self):
    message = self.refused(
      config_lib.ConfigError, arguments(base()[0], BASE | {"train.steps": 200})
    )
    self.assertStartsWith(message, "config.train.steps=200: the run has 160")
    self.assertIn("lies in the decay, which starts at step 100", message)

  @pytest.mark.thorough
  def test_decay_that_has_not_begun_can(self):
    workdir = copy_of(base()[0], "prolonged_decay")
    for step in range(110, 161, 10):
      shutil.rmtree(workdir / "checkpoints" / str(step))
    changes = BASE | {"train.steps": 170}
    line = self.matching(
      "train.steps: 170", logged(arguments(workdir, changes))
    )
    self.assertIn("goes on at 0.01 and ends at 0.00115", line)
    rates = {
      r["step"]: r["learning_rate"]
      for r in metrics.read(workdir)
      if r["kind"] == "train"
    }
    self.assertEqual(list(rates), list(range(1, 171)))
    # Of the step that led there: the decay starts with step 110 (from 0).
    self.assertAlmostEqual(rates[111], 1e-2)
    self.assertLess(rates[112], 0.999e-2)
    self.assertAlmostEqual(rates[170], 1e-2 * (1 - 0.9 * 59 / 60), places=6)

  def test_constant_rate_can_be_prolonged(self):
    workdir = copy_of(short(), "prolonged")
    # The same text may lie elsewhere.
    shutil.copytree(_folder / "text", _folder / "text_moved")
    changes = SHORT | {"train.steps": 16, "data.path": _folder / "text_moved"}
    lines = logged(arguments(workdir, changes))
    self.matching(
      r"train.steps: 16 instead of 12; the learning rate \(constant schedule\) "
      "goes on at 0.01 and ends at 0.01",
      lines,
    )
    self.matching("resumed from step 12", lines)
    self.assertEqual(measured(workdir)[:14], measured(short()))
    self.assertEqual(measured(workdir)[-1]["step"], 16)
    config = json.loads((workdir / "config.json").read_text())
    self.assertEqual(config["train"]["steps"], 16)

  def test_a_run_cannot_lose_steps(self):
    message = self.refused(
      config_lib.ConfigError, arguments(short(), SHORT | {"train.steps": 6})
    )
    self.assertStartsWith(message, "config.train.steps=6: the run has 12, and")
    self.assertIn("at step 12: train no fewer steps", message)

  @parameterized.parameters(12, 16)
  def test_another_text_is_another_run(self, steps):
    """It is neither finished nor resumed; see ReadTest for evaluation."""
    helpers.write_text(_folder / "text_2", seed=2)
    before = helpers.contents(short())
    for path, error, line in (
      ("text_2", config_lib.ConfigError, "the train text is not that of the "),
      ("absent", corpora.DataError, "no such file or folder"),
    ):
      changes = {"train.steps": steps, "data.path": _folder / path}
      message = self.refused(error, arguments(short(), SHORT | changes))
      self.assertStartsWith(message, "config.data.path=")
      self.assertIn(line, message)
    self.assertEqual(helpers.contents(short()), before)

  def test_another_stream_of_random_numbers_is_another_run(self):
    name = "jax_random_seed_offset"
    self.addCleanup(jax.config.update, name, jax.config.values[name])
    jax.config.update(name, 3)
    message = self.refused(
      config_lib.ConfigError, arguments(short(), SHORT | {"train.steps": 16})
    )
    self.assertStartsWith(message, "JAX_RANDOM_SEED_OFFSET=3: the run in ")

  @pytest.mark.thorough
  def test_the_step_is_chosen_under_the_lock(self):
    """The process before saves once more, and deletes, until it ends."""
    workdir = copy_of(short(), "preempted")
    steps, later = workdir / "checkpoints", workdir.parent / "preempted_later"
    shutil.move(steps / "12", later)
    lock = locking.lock

    @contextlib.contextmanager
    def lock_after_a_save(path):
      with lock(path) as is_there:
        shutil.move(later, steps / "12")
        shutil.rmtree(steps / "8")
        yield is_there

    changes = SHORT | {"train.steps": 14}
    with absltest.mock.patch.object(locking, "lock", lock_after_a_save):
      lines = logged(arguments(workdir, changes))
    self.matching("resumed from step 12", lines)

  def test_a_run_that_finishes_while_the_text_is_read_stays(self):
    """The later start has another seed, and looked into an empty folder."""
    workdir, load = _folder / "raced", corpora.load

    def load_late(*args):
      shutil.copytree(short(), workdir, dirs_exist_ok=True)
      return load(*args)

    with absltest.mock.patch.object(corpora, "load", load_late):
      message = self.refused(
        config_lib.ConfigError, arguments(workdir, SHORT | {"seed": 1})
      )
    self.assertStartsWith(message, "config.seed=1: the run in ")
    files = helpers.contents(workdir)
    del files[".lock"]
    want = helpers.contents(short())
    del want[".lock"]
    self.assertEqual(files, want)

  def goes_on(self, name, strike, at=14):
    """(workdir, error) of the short run, prolonged, and struck in a step."""
    workdir, tick = copy_of(short(), name), telemetry.Progress.tick

    def tick_and_strike(progress, step):
      if step == at:
        strike(workdir)
      tick(progress, step)

    with absltest.mock.patch.object(
      telemetry.Progress, "tick", tick_and_strike
    ):
      message = self.refused(locking.EvictedError, arguments(workdir, LONGER))
    return workdir, message

  @parameterized.parameters("removed", "replaced")
  @pytest.mark.thorough
  def test_a_run_directory_that_goes(self, how):
    def strike(workdir):
      shutil.rmtree(workdir)
      if how == "replaced":
        workdir.mkdir()

    workdir, message = self.goes_on(how, strike)
    saved = workdir.with_name(f"{how}-2")
    self.assertStartsWith(message, f"--workdir={workdir} was removed, moved or")
    self.assertIn(f"step 16 is saved in {saved}: ", message)
    self.assertEqual(list(workdir.glob("*")), [])
    # The message tells the truth.
    config = helpers.config_of(arguments(saved, LONGER))
    self.assertEqual(opening.read_config(epath.Path(saved)), config)
    found, _ = helpers.final_state(saved, config)
    text = {name: found.data_state["text"][name] for name in ("train", "valid")}
    resuming.check_resume(found, config, text, epath.Path(saved))
    self.assertEqual(found.step, 16)

  @pytest.mark.thorough
  def test_a_run_directory_that_goes_with_all_around_it(self):
    folder = _folder / "temporary"
    folder.mkdir()
    with (
      absltest.mock.patch.object(tempfile, "tempdir", str(folder)),
      absltest.mock.patch.object(
        identity, "another", lambda workdir: epath.Path("/proc/no/place")
      ),
    ):
      _, message = self.goes_on("alone", shutil.rmtree)
    (saved,) = folder.iterdir()
    self.assertIn(f"step 16 is saved in {saved}: ", message)
    self.assertTrue((saved / "checkpoints" / "16" / "manifest.json").exists())

  @pytest.mark.thorough
  def test_a_step_of_another_run_stays(self):
    """A second process does not see the lock, as on some network disks."""
    config = helpers.config_of(arguments("", LONGER | {"seed": 1}))

    def strike(workdir):
      steps = epath.Path(workdir) / "checkpoints"
      shutil.copytree(steps / "12", steps / "16")
      record = manifest.read(steps / "16")
      changes = {"step": 16, "config": config_lib.to_json(config)}
      manifest.write(steps / "16", record | changes)
      before.update(helpers.contents(workdir / "checkpoints" / "16"))

    before: dict[str, bytes] = {}
    workdir, message = self.goes_on("shared", strike)
    self.assertIn("checkpoint step 16 in ", message)
    self.assertIn("another run", message)
    saved = workdir.with_name("shared-2")
    self.assertIn(f"step 16 is saved in {saved}: ", message)
    self.assertTrue((saved / "checkpoints" / "16" / "manifest.json").exists())
    self.assertEqual(helpers.contents(workdir / "checkpoints" / "16"), before)

  @pytest.mark.thorough
  def test_a_running_save_ends_under_the_lock(self):
    """The run fails at step 14 while it still saves step 12."""
    workdir = copy_of(short(), "failing")
    shutil.rmtree(workdir / "checkpoints" / "12")
    has_failed, was_refused = threading.Event(), []
    checksums = manifest.checksums

    def checksums_late(directory):
      has_failed.wait(60)
      time.sleep(0.2)
      try:
        with locking.lock(workdir):
          was_refused.append(False)
      except config_lib.ConfigError:
        was_refused.append(True)
      return checksums(directory)

    def check_finite(step, values):
      if step == 14:
        has_failed.set()
        raise telemetry.NonFiniteError("no number")

    with (
      absltest.mock.patch.object(manifest, "checksums", checksums_late),
      absltest.mock.patch.object(telemetry, "check_finite", check_finite),
    ):
      self.refused(errors.UserError, arguments(workdir, LONGER))
    self.assertEqual(was_refused, [True])

  @pytest.mark.thorough
  def test_samples_do_not_pile_up(self):
    workdir = copy_of(short(), "samples")
    written = workdir / "samples" / "20260101T000000.000000.jsonl"
    written.write_text("written by --mode=sample")
    changes = {"sample.every": 2, "sample.keep_last": 2}
    helpers.run(arguments(workdir, LONGER | changes))
    self.assertEqual(
      sorted(os.listdir(workdir / "samples")),
      [written.name, "step_00000018.jsonl", "step_00000020.jsonl"],
    )

  @pytest.mark.thorough
  def test_newest_checkpoint_damaged(self):
    workdir = copy_of(short(), "damaged")
    files = (workdir / "checkpoints" / "12" / "state").rglob("*")
    victim = max(
      (f for f in files if f.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    victim.write_bytes(data)
    lines = logged(arguments(workdir, SHORT))
    line = self.matching("step 12 in .*using step 8 instead", lines)
    self.assertIn(victim.name, line)
    self.matching("resumed from step 8", lines)
    self.assert_same_run(workdir, short(), SHORT)

  @pytest.mark.thorough
  def test_loss_that_is_no_number_keeps_the_last_good_state(self):
    workdir, well = _folder / "not_finite", _folder / "well"
    make_step = program_lib.make_step

    def bad_at(step):
      """One program to the compiler whatever the step: equal bits."""

      def make_bad_step(*args):
        def bad_step(state, tokens):
          after, sums = make_step(*args)(state, tokens)
          bad = jnp.where(state.step == step, jnp.nan, 0.0)
          params = jax.tree.map(lambda p: p + bad, after.params)
          after = dataclasses.replace(after, params=params)
          return after, sums | {"nats": sums["nats"] + bad}

        return bad_step

      return absltest.mock.patch.object(program_lib, "make_step", make_bad_step)

    with bad_at(8):
      message = self.refused(errors.UserError, arguments(workdir, SHORT))
    self.assertStartsWith(message, "loss is nan at step 9; ")
    self.assertIn("peak_learning_rate", message)
    steps = sorted(os.listdir(workdir / "checkpoints"))
    self.assertEqual(steps, ["4", "8"])
    for record in metrics.read(workdir):
      self.assertLess(record["step"], 9)
    # Well again: the last good state is the state at that step.
    with bad_at(1000):
      self.matching("resumed from step 8", logged(arguments(workdir, SHORT)))
      helpers.run(arguments(well, SHORT))
    self.assert_same_run(workdir, well, SHORT)


DIES_IN_SECOND_SAVE = """
import os, signal
from aoarm_jax.runs import manifest

checksums, calls = manifest.checksums, []

def die_at_second(directory):
  calls.append(directory)
  if len(calls) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  return checksums(directory)

manifest.checksums = die_at_second
"""


def _pieces(changes):
  config = helpers.config_of(
    helpers.arguments(_folder, {"model.L": 3, **changes})
  )
  return program_lib.make(config, "train")


@functools.cache
def three_steps(*changes):
  """(state, [sums]) after three steps of three layers."""
  program = _pieces(dict(changes))
  with jax.set_mesh(program.network.mesh):
    state, sums = program.init(np.int32(0)), []
    for seed in range(3):
      tokens = np.random.default_rng(seed).integers(0, 27, (8, 16), np.uint8)
      state, out = program.step(state, jnp.asarray(tokens))
      sums.append(jax.device_get(out))
  return state, sums


class StepTest(TrainTest):
  """Ways to run a step that are not to change what it computes."""

  @parameterized.parameters(
    {"compute.accumulate": 4, "optimizer.ema_decay": 0.9},
    {"compute.remat": True, "compute.scan_layers": True},
  )
  def test_same_result(self, **changes):
    want, want_sums = three_steps()
    got, got_sums = three_steps(*changes.items())
    for a, b in zip(got_sums, want_sums):
      chex.assert_trees_all_close(a, b, rtol=2e-5)
    self.assertEqual(got_sums[0]["tokens"], 8 * 16)
    # Adam divides: where a gradient is nearly zero, rounding shows most.
    chex.assert_trees_all_close(got.params, want.params, atol=1e-4)
    initial = _pieces({}).init(np.int32(0)).params
    moved = jax.tree.map(lambda p, q: jnp.abs(p - q).max(), got.params, initial)
    self.assertGreater(min(jax.tree.leaves(moved)), 5e-3)

  def test_average_of_the_parameters(self):
    plain, _ = three_steps()
    averaged, _ = three_steps(
      ("compute.accumulate", 4), ("optimizer.ema_decay", 0.9)
    )
    self.assertEqual(plain.ema, {})
    self.assertIs(plain.read_out_params, plain.params)
    self.assertIs(averaged.read_out_params, averaged.ema)
    chex.assert_trees_all_equal_shapes_and_dtypes(averaged.ema, plain.params)
    lag = jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).max()), averaged.ema, averaged.params
    )
    self.assertGreater(min(jax.tree.leaves(lag)), 1e-5)

  def test_counts(self):
    state, sums = three_steps()
    self.assertEqual(int(state.step), 3)
    rates = [float(s["learning_rate"]) for s in sums]
    np.testing.assert_allclose(rates, [0.002, 0.004, 0.006], rtol=1e-6)

  def test_seeds_differ(self):
    one, other = (
      np.ravel(_pieces({}).init(np.int32(seed)).params["embedding"])
      for seed in (0, 1)
    )
    self.assertLess(abs(np.corrcoef(one, other)[0, 1]), 0.3)


class MeshTest(TrainTest):
  def test_more_devices_than_there_are(self):
    message = self.refused(
      errors.UserError,
      arguments(_folder / "mesh", SHORT | {"mesh.data": 64}),
    )
    self.assertStartsWith(
      message, f"config.mesh.data=64: there are {jax.device_count()} cpu devic"
    )
    self.assertFalse((_folder / "mesh").exists())


if __name__ == "__main__":
  absltest.main()
