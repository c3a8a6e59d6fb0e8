"""Checkpoints: round trips, and every way in which one can be damaged."""

import asyncio
import dataclasses
import functools
import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore
from absl.testing import absltest, parameterized
from orbax.checkpoint import v1

from aoarm_jax.devices import distributed
from aoarm_jax.runs import checkpoint, manifest
from aoarm_jax.runs import steps as steps_lib

CONFIG = json.dumps({"model": {"D": 7}, "text": "naïve ☃"})


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state", "ema", "key"],
  meta_fields=[],
)
@dataclasses.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  ema: dict
  key: jax.Array


def make_state(seed=0, width=7):
  key = jax.random.key(seed)
  params = {
    "layers": [{"w": jax.random.normal(key, (3, width))}, {"w": jnp.ones(5)}],
    "half": jax.random.normal(key, (width,), jnp.bfloat16),
    "empty": jnp.zeros((0, 3)),
  }
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.constant_schedule(1e-3)),
  )
  opt_state = tx.init(params)
  updates, opt_state = tx.update(params, opt_state, params)
  ema = optax.apply_updates(params, updates)
  return State(
    jnp.asarray(seed, jnp.int32),
    params,
    opt_state,
    ema,
    jax.random.split(jax.random.fold_in(key, 3), 3),
  )


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def files_of(step_directory):
  return sorted(
    os.path.join(folder, name)
    for folder, _, names in os.walk(step_directory)
    for name in names
  )


def run_python(code, *args, **env):
  """Output of a process that may fork, damage or kill itself."""
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *args],
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    check=True,
    capture_output=True,
    text=True,
    timeout=120,
  ).stdout


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    temporary = self.enter_context(tempfile.TemporaryDirectory())
    self.directory = os.path.join(temporary, "run", "ck")

  def open(self, keep_last=9, keep_best=0, **more):
    checkpoints = checkpoint.Checkpoints(
      self.directory, keep_last=keep_last, keep_best=keep_best, **more
    )
    self.addCleanup(checkpoints.close)
    return checkpoints

  def fill(self, checkpoints, steps, metrics=None, state=None):
    state = make_state() if state is None else state
    for step, metric in zip(steps, metrics or [None] * len(steps)):
      checkpoints.save(
        step,
        state,
        data_state={"at": [step]},
        config_json=CONFIG,
        metric=metric,
      )
    checkpoints.wait()

  def folder(self, step):
    return os.path.join(self.directory, str(step))

  def assert_same(self, got, want):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    bits = lambda x: (  # noqa: E731
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      self.assertEqual(
        np.asarray(bits(a)).tobytes(), np.asarray(bits(b)).tobytes()
      )


class RoundTripTest(CheckpointTest):
  def test_bit_exact_with_everything(self):
    state = make_state()
    state.params["half"] = state.params["half"].at[0].set(jnp.nan)
    checkpoints = self.open()
    data_state = {"at": [3, {"x": None}], "seed": 2**40}
    checkpoints.save(
      3, state, data_state=data_state, config_json=CONFIG, metric=1.25
    )
    data_state["at"].append("changed after save")
    checkpoints.wait()
    saved = self.open().newest()
    self.assertEqual(
      saved,
      checkpoint.Saved(
        3,
        CONFIG,
        {"at": [3, {"x": None}], "seed": 2**40},
        1.25,
        frozenset(("step", "params", "opt_state", "ema", "key")),
        manifest.digest(self.open().files(3)),
      ),
    )
    restored = self.open().restore(saved, abstract(state))
    self.assertEqual(jax.tree.structure(restored), jax.tree.structure(state))
    self.assert_same(restored, state)
    chex.assert_trees_all_equal(
      jax.random.bits(restored.key[0]), jax.random.bits(state.key[0])
    )

  def test_restored_state_may_be_donated(self):
    state = make_state()
    checkpoints = self.open()
    self.fill(checkpoints, [1], state=state)
    restored = checkpoints.restore(checkpoints.newest(), abstract(state))
    doubled = jax.jit(
      lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0
    )(restored.opt_state)
    self.assert_same(doubled, jax.tree.map(lambda x: 2 * x, state.opt_state))

  def test_parts(self):
    state = make_state()
    checkpoints = self.open()
    self.fill(checkpoints, [1], state=state)
    for part in ("params", "ema", "key"):
      tree = {part: getattr(state, part)}
      got = checkpoints.restore(checkpoints.newest(), abstract(tree))
      self.assert_same(got, tree)

  def test_no_sharding_means_default_device(self):
    state = make_state()
    checkpoints = self.open()
    self.fill(checkpoints, [1], state=state)
    got = checkpoints.restore(
      checkpoints.newest(), jax.eval_shape(lambda: state)
    )
    self.assert_same(got, state)

  @parameterized.named_parameters(
    ("shape", "params/layers/0/w", r"float32\[3,7\] .*but float32\[3,5\]"),
    (
      "dtype",
      "params/half",
      r"bfloat16\[7\] .*but float32\[7\].*JAX_ENABLE_X64",
    ),
    ("new", "params/extra", r"absent .*but float32\[2\]"),
    ("left_out", "params/empty", r"float32\[0,3\] .*but absent"),
    ("key", "key", r"key<fry>\[3\] .*but uint32\[3,2\]"),
  )
  def test_other_leaf_is_named(self, leaf, message):
    state = make_state()
    checkpoints = self.open()
    self.fill(checkpoints, [1], state=state)
    match leaf:
      case "params/layers/0/w":
        state.params["layers"][0]["w"] = jnp.ones((3, 5))
      case "params/half":
        state.params["half"] = jnp.ones(7)
      case "params/extra":
        state.params["extra"] = jnp.ones(2)
      case "params/empty":
        del state.params["empty"]
      case "key":
        state.key = jax.random.key_data(state.key)
    with self.assertRaisesRegex(
      checkpoint.CheckpointError, f"leaf {leaf} is {message}"
    ) as caught:
      checkpoints.restore(checkpoints.newest(), abstract(state))
    self.assertNotIn("\n", str(caught.exception))

  def test_names_that_would_collide_are_refused(self):
    with self.assertRaisesRegex(checkpoint.CheckpointError, "a.b"):
      self.fill(self.open(), [1], state={"a.b": jnp.ones(1)})

  def test_donation_right_after_save(self):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree):
      key, _ = jax.random.split(tree["key"])
      return jax.tree.map(lambda x: x + 1, tree | {"key": None}) | {"key": key}

    state = {f"w{i}": jnp.full(70_001, i, jnp.float32) for i in range(7)}
    state = step(state | {"key": jax.random.key(3)})
    checkpoints = self.open()
    keys = {}
    for number in range(1, 5):
      keys[number] = np.array(jax.random.key_data(state["key"]))
      checkpoints.save(number, state, data_state={}, config_json=CONFIG)
      for _ in range(3):
        state = step(state)
      jax.block_until_ready(state)
    checkpoints.wait()
    for number in range(1, 5):
      got = checkpoints.restore(checkpoints.at(number), abstract(state))
      np.testing.assert_array_equal(
        jax.random.key_data(got["key"]), keys[number]
      )
      for i in range(7):
        np.testing.assert_array_equal(got[f"w{i}"], i + 1 + 3 * (number - 1))

  def test_under_a_transfer_guard(self):
    state = make_state()
    with jax.transfer_guard("disallow"):
      checkpoints = self.open()
      self.fill(checkpoints, [1], state=state)
      got = checkpoints.restore(checkpoints.newest(), abstract(state))
    self.assert_same(got, state)

  def test_numpy_leaf_changed_after_save(self):
    state = {"w": np.zeros(70_001, np.float32)}
    checkpoints = self.open()
    checkpoints.save(1, state, data_state={}, config_json=CONFIG)
    state["w"] += 1
    checkpoints.wait()
    got = checkpoints.restore(
      checkpoints.newest(), jax.eval_shape(lambda: {"w": jnp.zeros(70_001)})
    )
    np.testing.assert_array_equal(got["w"], 0)

  def test_other_device_count(self):
    code = """
      import sys
      import jax, jax.numpy as jnp, numpy as np
      from aoarm_jax.runs import checkpoint
      assert jax.device_count() == 4
      mesh = jax.make_mesh((4,), ("data",))
      named = lambda *spec: jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*spec))
      leaf = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=named("data"))
      same = jax.ShapeDtypeStruct((7,), jnp.float32, sharding=named())
      key = jax.ShapeDtypeStruct(
        (), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=named())
      step = jax.jit(lambda t: {"w": t["w"] + 1, "same": t["same"] * 2,
        "key": t["key"]}, donate_argnums=0)
      with checkpoint.Checkpoints(sys.argv[1], keep_last=9, keep_best=0) as c:
        state = c.restore(
          c.newest(), {"w": leaf, "same": same, "key": key})
        assert state["w"].sharding == named("data")
        assert len(state["same"].sharding.device_set) == 4
        for number in (2, 3):
          state = step(state)
          c.save(number, state, data_state={}, config_json="{}")
        state = step(state)
        jax.block_until_ready(state)
    """
    state = {
      "w": jnp.arange(24.0).reshape(8, 3),
      "same": jnp.arange(7.0),
      "key": jax.random.key(5),
    }
    checkpoints = self.open()
    self.fill(checkpoints, [1], state=state)
    run_python(
      code, self.directory, XLA_FLAGS="--xla_force_host_platform_device_count=4"
    )
    for number in (2, 3):
      got = checkpoints.restore(checkpoints.at(number), abstract(state))
      want = state | {
        "w": state["w"] + (number - 1),
        "same": state["same"] * 2 ** (number - 1),
      }
      self.assert_same(got, want)


class StepsTest(CheckpointTest):
  def test_reading_a_directory_that_is_not_there(self):
    checkpoints = self.open()
    self.assertIsNone(checkpoints.newest())
    self.assertIsNone(checkpoints.best())
    self.assertEqual(checkpoints.steps(), [])
    with self.assertRaisesRegex(checkpoint.CheckpointError, "steps there: no"):
      checkpoints.at(3)
    self.assertFalse(os.path.exists(os.path.dirname(self.directory)))

  @parameterized.parameters(
    dict(last=1, best=0, kept=[50]),
    dict(last=2, best=0, kept=[40, 50]),
    dict(last=1, best=1, kept=[20, 50]),
    dict(last=2, best=2, kept=[20, 40, 50]),
    dict(last=9, best=2, kept=[10, 20, 30, 40, 50]),
  )
  def test_retention(self, last, best, kept):
    metrics = [None, 1.5, float("nan"), 2.5, 3.5]
    checkpoints = self.open(last, best)
    self.fill(checkpoints, [10, 20, 30, 40, 50], metrics, {"a": jnp.ones(1)})
    self.assertEqual(checkpoints.steps(), kept)
    self.assertEqual(sorted(os.listdir(self.directory)), list(map(str, kept)))
    self.assertEqual(checkpoints.newest().step, 50)
    lowest = 20 if 20 in kept else 40 if 40 in kept else 50
    self.assertEqual(checkpoints.best().step, lowest)

  def test_all_processes_take_what_process_0_finds(self):
    """Here as process 1, which decides nothing."""
    checkpoints = self.open(9, 0)
    self.fill(checkpoints, [10, 20], [1.0, 2.0], {"a": jnp.ones(1)})

    def found(step):
      with absltest.mock.patch.object(
        distributed, "process_0_says", lambda decide: step
      ):
        return checkpoints.newest()

    self.assertEqual((found(10).step, found(10).metric), (10, 1.0))
    self.assertIsNone(found(-1))
    for step, message in (
      (-2, "process 0 can use no"),
      (30, "step 30 .* here"),
    ):
      with self.assertRaisesRegex(checkpoint.CheckpointError, message):
        found(step)

  def test_step_deleted_by_the_run_while_it_is_read(self):
    checkpoints = self.open()
    self.fill(checkpoints, [1, 2])
    verify = manifest.verify

    def delete_then_verify(directory, record):
      if directory.name == "2":
        shutil.rmtree(directory)
      verify(directory, record)

    with (
      absltest.mock.patch.object(manifest, "verify", delete_then_verify),
      self.assertNoLogs("absl", "WARNING"),
    ):
      self.assertEqual(checkpoints.newest().step, 1)

  def test_impossible_retention(self):
    with self.assertRaisesRegex(checkpoint.CheckpointError, "keep_last=0"):
      self.open(0)

  @parameterized.parameters((0, 0), (60, 0), (1e-6, 1))
  def test_a_save_that_takes_longer_than_the_notice(self, seconds, warnings):
    with self.assertLogs(level="INFO") as logs:
      self.fill(self.open(notice_seconds=seconds), [1, 2])
    text = "".join(logs.output)
    self.assertEqual(text.count("saved checkpoint"), 2)
    self.assertEqual(text.count("this save took longer than the"), warnings)

  def test_older_step_goes_only_after_the_newer_is_whole(self):
    checkpoints = self.open(1)
    self.fill(checkpoints, [1])
    written = manifest.write
    seen = []

    def write(directory, record):
      seen.append(checkpoints.steps())
      written(directory, record)

    manifest.write = write
    self.addCleanup(setattr, manifest, "write", written)
    self.fill(checkpoints, [2])
    self.assertEqual(seen, [[1]])
    self.assertEqual(checkpoints.steps(), [2])

  def test_saving_a_whole_step_again_changes_its_metric_only(self):
    checkpoints = self.open()
    self.fill(checkpoints, [7], state=make_state(1))
    before = {f: os.stat(f).st_mtime_ns for f in files_of(self.folder(7))}
    self.fill(checkpoints, [7], state=make_state(2))
    after = {f: os.stat(f).st_mtime_ns for f in files_of(self.folder(7))}
    self.assertEqual(before, after)
    self.assertIsNone(checkpoints.best())
    self.fill(checkpoints, [7], [0.5], state=make_state(2))
    self.assertEqual(checkpoints.best().metric, 0.5)
    self.fill(checkpoints, [7], state=make_state(2))
    self.assertEqual(checkpoints.best().metric, 0.5)
    got = checkpoints.restore(checkpoints.newest(), abstract(make_state()))
    self.assert_same(got, make_state(1))

  def test_saves_leave_no_objects_behind(self):
    """Some 20 kB of them at every save are much in a long run."""
    checkpoints = self.open(keep_last=1)
    counts = []
    for first in (1, 4, 7):
      self.fill(checkpoints, range(first, first + 3))
      gc.collect()
      counts.append(len(gc.get_objects()))
    self.assertLess(counts[2] - counts[1], 20)

  def test_strangers_in_the_directory_are_left_alone(self):
    os.makedirs(os.path.join(self.directory, "notes"))
    os.makedirs(os.path.join(self.directory, "007"))
    os.makedirs(os.path.join(self.directory, "5.orbax-checkpoint-tmp-3", "d"))
    os.makedirs(self.folder(5))
    checkpoints = self.open()
    with self.assertLogs("absl", "WARNING"):
      self.assertIsNone(checkpoints.newest())
    self.assertLen(os.listdir(self.directory), 4)
    self.fill(checkpoints, [6])
    self.assertEqual(sorted(os.listdir(self.directory)), ["007", "6", "notes"])


def flip_bit(path, rng):
  with open(path, "r+b") as file:
    data = bytearray(file.read())
    if not data:
      return False
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.seek(0)
    file.write(data)
  return True


def truncate(path, rng):
  size = os.path.getsize(path)
  if not size:
    return False
  os.truncate(path, rng.randrange(size))
  return True


def empty(path, rng):
  del rng
  changed = os.path.getsize(path) > 0
  os.truncate(path, 0)
  return changed


def remove(path, rng):
  del rng
  os.remove(path)
  return True


class DamageTest(CheckpointTest):
  @parameterized.parameters(flip_bit, truncate, empty, remove)
  def test_any_damaged_file_is_noticed(self, damage):
    rng = random.Random(damage.__name__)
    checkpoints = self.open()
    self.fill(checkpoints, [10, 20], [0.2, 0.1])
    damaged = 0
    for path in files_of(self.folder(20)):
      name = os.path.relpath(path, self.folder(20))
      with open(path, "rb") as file:
        content = file.read()
      for _ in range(4 if damage in (flip_bit, truncate) else 1):
        if damage(path, rng):
          damaged += 1
          with self.assertLogs("absl", "WARNING") as logs:
            self.assertEqual(checkpoints.newest().step, 10)
          self.assertLen(logs.output, 1)
          self.assertRegex(
            logs.output[0], f"step 20 in .* {name}: .*; using step 10 instead"
          )
          self.assertEqual(checkpoints.best().step, 10)
          with self.assertRaisesRegex(
            checkpoint.CheckpointError, f"step 20 .*{name}: .*there: 10"
          ):
            checkpoints.at(20)
        with open(path, "wb") as file:
          file.write(content)
    self.assertGreater(damaged, 7)
    with self.assertNoLogs("absl", "WARNING"):
      self.assertEqual(checkpoints.newest().step, 20)

  def test_all_broken(self):
    checkpoints = self.open()
    self.fill(checkpoints, [10, 20])
    for step in (10, 20):
      flip_bit(os.path.join(self.folder(step), "manifest.json"), random)
    with self.assertRaisesRegex(
      checkpoint.CheckpointError, r"whole \(step 20: .*; step 10: .*restore"
    ) as caught:
      checkpoints.newest()
    self.assertNotIn("\n", str(caught.exception))

  def test_broken_step_is_replaced(self):
    checkpoints = self.open(keep_last=1)
    self.fill(checkpoints, [10], state=make_state(1))
    self.fill(self.open(keep_last=2), [20], state=make_state(2))
    largest = max(files_of(self.folder(20)), key=os.path.getsize)
    flip_bit(largest, random)
    # A broken newer step does not push the whole ones out.
    self.fill(checkpoints, [15], state=make_state(3))
    self.assertEqual(checkpoints.steps(), [15, 20])
    with self.assertLogs("absl", "WARNING"):
      self.assertEqual(checkpoints.newest().step, 15)
    with self.assertLogs("absl", "WARNING") as logs:
      self.fill(checkpoints, [20], state=make_state(4))
    self.assertIn("it is replaced", logs.output[0])
    self.assertEqual(checkpoints.steps(), [20])
    got = checkpoints.restore(checkpoints.newest(), abstract(make_state()))
    self.assert_same(got, make_state(4))

  def test_other_format_version(self):
    checkpoints = self.open()
    self.fill(checkpoints, [10])
    self.enter_context(
      absltest.mock.patch.object(manifest, "FORMAT_VERSION", 2)
    )
    for use in (checkpoints.newest, lambda: checkpoints.at(10)):
      with self.assertRaisesRegex(
        checkpoint.CheckpointError, "format version 1, this code .*version 2"
      ):
        use()

  def test_damage_after_verification_is_one_line(self):
    state = make_state()
    checkpoints = self.open()
    self.fill(checkpoints, [10], state=state)
    saved = checkpoints.newest()
    for path in files_of(self.folder(10)):
      if not path.endswith("manifest.json"):
        os.remove(path)
    with self.assertRaisesRegex(
      checkpoint.CheckpointError, "cannot read checkpoint .*10"
    ) as caught:
      checkpoints.restore(saved, abstract(state))
    self.assertNotIn("\n", str(caught.exception))


class InterruptedSaveTest(CheckpointTest):
  def test_full_disk(self):
    checkpoints = self.open(keep_last=1)
    self.fill(checkpoints, [10])
    big = {"w": jnp.arange(300_000.0)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for report in (
      checkpoints.wait,
      lambda: checkpoints.save(30, big, data_state={}, config_json=CONFIG),
    ):
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
      try:
        checkpoints.save(20, big, data_state={}, config_json=CONFIG)
        with (
          self.assertNoLogs("absl", "WARNING"),
          self.assertRaisesRegex(
            checkpoint.CheckpointError,
            f"step 20 was not saved in {self.directory}: .*large.*there: 10",
          ) as caught,
        ):
          report()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
      self.assertNotIn("\n", str(caught.exception))
      self.assertNotIn("orbax-checkpoint-tmp", str(caught.exception))
      self.assertEqual(checkpoints.newest().step, 10)
      self.assertEqual(os.listdir(self.directory), ["10"])
    self.fill(checkpoints, [20], state=big)
    self.assertEqual(checkpoints.steps(), [20])

  def test_remains_of_writes_that_outlive_a_failed_save_are_deleted(self):
    """A late write makes a file in the folder while it is deleted."""
    checkpoints = self.open()
    self.fill(checkpoints, [10])
    clean = steps_lib.Steps.clean
    late = os.path.join(self.directory, "20.orbax-checkpoint-tmp", "late")

    def clean_too_early(steps):
      clean(steps)
      if not os.path.exists(os.path.dirname(late)) and written.pop():
        os.makedirs(late)

    def fail(*_):
      raise OSError(28, "No space left on device", late)

    written = [False, True]
    with (
      mock.patch.object(v1, "save_checkpointables_async", fail),
      mock.patch.object(steps_lib.Steps, "clean", clean_too_early),
      self.assertRaisesRegex(
        checkpoint.CheckpointError,
        f"step 20 was not saved in {self.directory}: No space left on device;",
      ),
    ):
      self.fill(checkpoints, [20])
    self.assertEqual(os.listdir(self.directory), ["10"])

  def test_writes_that_outlive_a_failed_save_are_silent(self):
    reported = []
    self.enter_context(
      mock.patch.object(sys, "unraisablehook", reported.append)
    )

    def end_of_a_write(tell):
      promise, write = tensorstore.Promise.new()
      write.add_done_callback(tell)
      promise.set_result(None)

    loop = asyncio.new_event_loop()
    loop.close()
    end_of_a_write(lambda _: loop.call_soon_threadsafe(print))
    self.assertRegex(str(reported.pop().exc_value), "Event loop is closed")
    self.open()
    self.open()
    end_of_a_write(lambda _: loop.call_soon_threadsafe(print))
    self.assertEmpty(reported)
    end_of_a_write(lambda _: 1 / 0)
    self.assertIsInstance(reported.pop().exc_value, ZeroDivisionError)

    class Unclosed:
      def __del__(self):
        loop.call_soon_threadsafe(print)

    Unclosed()
    self.assertRegex(str(reported.pop().exc_value), "Event loop is closed")
    self.assertEmpty(reported)

  def test_directory_that_cannot_be(self):
    for file in (os.path.dirname(self.directory), self.directory):
      with open(file, "w"):
        pass
      checkpoints = self.open()
      self.assertIsNone(checkpoints.newest())
      with self.assertRaisesRegex(
        checkpoint.CheckpointError, "step 1 was not saved in .*exist|director"
      ) as caught:
        self.fill(checkpoints, [1])
      self.assertNotIn("\n", str(caught.exception))
      os.remove(file)
      os.makedirs(os.path.dirname(self.directory), exist_ok=True)

  def test_first_error_is_not_hidden_by_a_failed_save(self):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
      with (
        self.assertRaises(ZeroDivisionError),
        self.assertLogs("absl", "ERROR"),
        self.open() as checkpoints,
      ):
        checkpoints.save(
          1, {"w": jnp.arange(300_000.0)}, data_state={}, config_json=CONFIG
        )
        _ = 1 / 0
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

  def test_killed_at_any_moment(self):
    # One process imports, then forks before any backend starts: a child saves
    # in a tight loop until it is killed, and says which steps were whole.
    code = """
      import os, random, signal, sys, time
      import jax, numpy as np
      from aoarm_jax.runs import checkpoint
      directory, rng = sys.argv[1], random.Random(7)

      def save_forever(pipe):
        checkpoints = checkpoint.Checkpoints(directory, keep_last=1,
          keep_best=1)
        saved = checkpoints.newest()
        step = saved.step if saved else 0
        if saved:
          got = checkpoints.restore(saved, jax.eval_shape(lambda: {
            "w": np.zeros(90_001, np.float32), "v": np.zeros(3, np.int32)}))
          assert (got["w"] == step).all() and (got["v"] == step).all()
        os.write(pipe, b"0\\n")
        while True:
          step += 1
          checkpoints.save(step, {"w": np.full(90_001, step, np.float32),
            "v": np.full(3, step, np.int32)}, data_state={},
            config_json="{}", metric=float(-step))
          checkpoints.wait()
          os.write(pipe, b"%d\\n" % step)

      whole = 0
      for trial in range(12):
        out, pipe = os.pipe()
        child = os.fork()
        if not child:
          os.close(out)
          try:
            save_forever(pipe)
          finally:
            os._exit(1)
        os.close(pipe)
        text = os.read(out, 2)
        assert text == b"0\\n", "the child failed"
        while trial % 3 and b"\\n" not in text[2:]:
          text += os.read(out, 4096)
        time.sleep(rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(out, 4096):
          text += part
        os.close(out)
        told = max(int(line) for line in text.decode().split("\\n")[:-1])
        whole = max(whole, told)
        saved = checkpoint.Checkpoints(directory, keep_last=1,
          keep_best=1).newest()
        step = saved.step if saved else 0
        # The one after may have become whole before it could be told.
        assert step in (whole, whole + 1), (step, whole)
        whole = step
        print(whole)
    """
    out = run_python(code, self.directory)
    self.assertLen(out.splitlines(), 12)
    self.assertGreater(int(out.splitlines()[-1]), 3)


if __name__ == "__main__":
  absltest.main()
