"""Devices share the work and change nothing: 1 = 4, also between saves."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import chex
import helpers
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.runs import metrics

CHANGES = {
  "optimizer.schedule": "constant",
  "train.steps": 3,
  "compute.accumulate": 2,
  "optimizer.ema_decay": 0.9,
  "telemetry.log_every": 1,
  "eval.every": 0,
  # Five batches of 12 windows and one that is not full.
  "eval.batches": 0,
  "eval.batch_size": 12,
  "sample.every": 0,
  "sample.count": 3,
}
# A run is handed on from one to the next: processes, devices of each, sizes.
EVERY_MESH = (
  (1, 1, {}),
  (1, 8, {}),
  (1, 8, {"data": 2, "fsdp": 2, "tensor": 2, "smallest_shard": 1}),
  (2, 4, {"fsdp": 0, "smallest_shard": 1}),
  (1, 8, {"tensor": 8}),
  (4, 2, {"data": 2, "tensor": 4}),
  (1, 8, {"sequence": 8}),
  (2, 1, {"tensor": 2}),
)
_contexts = contextlib.ExitStack()
_folder: pathlib.Path  # Of this module's runs.


def arguments(folder, name, *more, **changes):
  return helpers.command_in(folder, CHANGES, name, *more, **changes)


def scored(folder, **changes):
  """log p of a part of a text by the run on one device, over uniform orders."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    helpers.run(
      arguments(
        folder,
        "one",
        "--mode=score",
        "--text=ab[cd]ef",
        score__order="uniform",
        score__orders=3,
        **changes,
      )
    )
  return json.loads(out.getvalue())["order_log_p"]


def on_four_devices(folder):
  """What the process with four devices does; prints what it saw."""
  assert jax.device_count() == 4
  score = scored(folder, mesh__tensor=2, mesh__sequence=2)
  helpers.run(arguments(folder, "four"))
  errors = {}
  for name, changes in {
    "batch": {"train__batch_size": 6},
    "eval_batch": {"eval__batch_size": 6},
    "mesh": {"mesh__data": 5},
    "heads": {"mesh__tensor": 4},
    "score": {"mesh__tensor": 4},
  }.items():
    text = ["--mode=score", "--text=a"] if name == "score" else []
    try:
      where = "one" if text else "refused"
      helpers.run(arguments(folder, where, *text, **changes))
    except config_lib.ConfigError as error:
      errors[name] = str(error)
  shutil.copytree(folder / "one", folder / "one_to_four")
  helpers.run(arguments(folder, "one_to_four", "--mode=eval"))
  helpers.run(arguments(folder, "one_to_four", train__steps=6))
  mesh = meshes.make_mesh(config_lib.Mesh())
  batch = sharding.put_batch(mesh, np.arange(24, dtype=np.uint8).reshape(8, 3))
  shards = [(s.device.id, s.data.tolist()) for s in batch.addressable_shards]
  return {"errors": errors, "shards": sorted(shards), "score": score}


def setUpModule():
  global _folder
  if jax.default_backend() != "cpu":
    raise absltest.SkipTest("for the CPU: start with JAX_PLATFORMS=cpu")
  _contexts.enter_context(helpers.quick_compilation())
  temporary = _contexts.enter_context(tempfile.TemporaryDirectory())
  _folder = pathlib.Path(temporary)


def tearDownModule():
  _contexts.close()


@pytest.mark.thorough
class ShardingTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    if jax.device_count() != 1:
      raise absltest.SkipTest("compares with one device")
    helpers.write_text(_folder / "text")
    helpers.run(arguments(_folder, "one"))
    out = subprocess.run(
      [sys.executable, __file__, "--on_four_devices", str(_folder)],
      env=helpers.environment(JAX_NUM_CPU_DEVICES="4"),
      stdout=subprocess.PIPE,
      check=True,
      timeout=240,
    ).stdout
    cls.seen = json.loads(out.splitlines()[-1])

  def assert_same_run(self, got, want, steps):
    config = helpers.config_of(arguments(_folder, got, train__steps=steps))
    states = []
    for name in (got, want):
      saved, state = helpers.final_state(_folder / name, config)
      self.assertEqual(saved.step, steps)
      states.append(jax.device_get(state))
    a, b = states
    np.testing.assert_array_equal(
      jax.random.key_data(a.key), jax.random.key_data(b.key)
    )
    # Adam divides: where a gradient is nearly zero, rounding shows most.
    chex.assert_trees_all_close(a.params, b.params, atol=1e-4)
    chex.assert_trees_all_close(a.ema, b.ema, atol=1e-4)
    a, b = (metrics.read(_folder / name) for name in (got, want))
    self.assertEqual([r["step"] for r in a], [r["step"] for r in b])
    for one, other in zip(a, b):
      np.testing.assert_allclose(
        one["bits_per_char"], other["bits_per_char"], rtol=2e-6
      )

  def test_training(self):
    self.assert_same_run("four", "one", 3)
    records = metrics.read(_folder / "four")
    self.assertLen([r for r in records if r["kind"] == "train"], 3)

  def test_sampling(self):
    """The same texts in the same orders; their probabilities may round."""
    one, four = (
      [
        json.loads(line)
        for line in (_folder / name / "samples" / "step_00000003.jsonl")
        .read_text()
        .splitlines()
      ]
      for name in ("one", "four")
    )
    self.assertLen(one, 3)
    for text, same in zip(one, four):
      for name in ("log_p", "token_log_p"):
        np.testing.assert_allclose(text.pop(name), same.pop(name), atol=1e-4)
      self.assertEqual(text, same)

  def test_scores_where_slots_are_spread(self):
    np.testing.assert_allclose(self.seen["score"], scored(_folder), atol=1e-4)

  def test_four_devices_were_used(self):
    for name, count in (("one", 1), ("four", 4)):
      versions = json.loads((_folder / name / "versions.json").read_text())
      self.assertEqual(versions["device_count"], count)

  def test_batch_lies_in_contiguous_rows(self):
    rows = np.arange(24).reshape(4, 2, 3).tolist()
    self.assertEqual(self.seen["shards"], [list(x) for x in enumerate(rows)])

  def test_checkpoints_move_between_device_counts(self):
    with self.subTest("evaluated on 4, saved on 1"):
      self.assert_evaluates("one_to_four", "one")
    with self.subTest("evaluated on 1, saved on 4"):
      helpers.run(arguments(_folder, "four", "--mode=eval"))
      self.assert_evaluates("four", "four")
    with self.subTest("resumed on 4, saved on 1, and the reverse"):
      shutil.copytree(_folder / "four", _folder / "four_to_one")
      helpers.run(arguments(_folder, "four_to_one", train__steps=6))
      self.assert_same_run("four_to_one", "one_to_four", 6)

  @pytest.mark.slow
  def test_a_run_moves_over_every_mesh(self):
    """Also to other numbers of processes; its end is that of one device."""

    def command(name, steps, sizes):
      sizes = {f"mesh__{axis}": n for axis, n in sizes.items()}
      changes = {
        "model__N": 8,
        "train__batch_size": 16,
        "eval__batch_size": 16,
        # At 1e-2 the rounding of sums in another order grows to 0.1 in 24
        # steps, also of a run that stays on its mesh; here it stays at 2e-6.
        "optimizer__peak_learning_rate": 1e-3,
      }
      return arguments(_folder, name, train__steps=steps, **changes, **sizes)

    steps = 3 * len(EVERY_MESH)
    helpers.run(command("stays", steps, {}))
    for i, (processes, devices, sizes) in enumerate(EVERY_MESH):
      with self.subTest(processes=processes, devices=devices, **sizes):
        subprocess.run(
          helpers.launcher(
            processes,
            command("moves", 3 * (i + 1), sizes),
            f"--devices={devices}",
          ),
          env=helpers.environment(),
          check=True,
          timeout=400,
        )
    config = helpers.config_of(command("moves", steps, {}))
    (got, a), (want, b) = (
      helpers.final_state(_folder / name, config) for name in ("moves", "stays")
    )
    self.assertEqual((got.step, want.step), (steps, steps))
    self.assertEqual(got.data_state["iterator"], want.data_state["iterator"])
    self.assertLess(helpers.distance(a.params, b.params), 1e-5)

  def assert_evaluates(self, evaluated, trained):
    evaluations = _folder / evaluated / "evaluations"
    (path,) = evaluations.glob("step_00000003_valid_*.json")
    report = json.loads(path.read_text())
    records = metrics.read(_folder / trained)
    valid = next(r for r in records if r["kind"] == "valid")
    estimate = report["estimates"][0]
    self.assertEqual((estimate["sequences"], valid["step"]), (62, 3))
    for key in ("bits_per_char", "standard_error_bits", "slot_curve_bits"):
      np.testing.assert_allclose(estimate[key], valid[key], rtol=1e-5)

  @parameterized.parameters(
    ("batch", "config.train.batch_size=6: must be a multiple of the 4 devices"),
    ("eval_batch", "config.eval.batch_size=6: must be a multiple of the 4"),
    ("mesh", "config.mesh.data=5: there are 4 cpu devices"),
    ("heads", "config.mesh.tensor=4: must divide config.model.N=2 heads"),
    ("score", "config.mesh.tensor=4: must divide config.model.N=2 heads"),
  )
  def test_what_does_not_divide(self, name, message):
    self.assertStartsWith(self.seen["errors"][name], message)
    self.assertNotIn("\n", self.seen["errors"][name])
    self.assertFalse((_folder / "refused").exists())


class HereTest(absltest.TestCase):
  def test_mesh_of_chosen_devices(self):
    mesh = meshes.make_mesh(config_lib.Mesh(), jax.devices())
    self.assertEqual(dict(mesh.shape), dict.fromkeys(meshes.AXES, 1))
    self.assertTrue(sharding.replicated(mesh).is_fully_replicated)

  def test_too_few_devices_and_how_to_have_more(self):
    for mesh in (config_lib.Mesh(tensor=2), config_lib.Mesh(data=2)):
      with self.assertRaisesRegex(
        config_lib.ConfigError,
        "config.mesh.* (tensor|data) 2 .* start with 2 devices .XLA_FLAGS=--xla"
        "_force_host_platform_device_count=2.$",
      ):
        meshes.make_mesh(mesh, jax.devices()[:1])

  def test_constrain_does_nothing_on_one_device(self):
    x = np.ones((3, 7))
    self.assertIs(sharding.constrain(x, "batch", "embed"), x)
    with jax.set_mesh(meshes.make_mesh(config_lib.Mesh(), jax.devices()[:1])):
      self.assertIs(sharding.constrain(x, "batch", "embed"), x)
    with self.assertRaises(KeyError):
      sharding.named(meshes.make_mesh(config_lib.Mesh()), "bath")


if __name__ == "__main__":
  if sys.argv[1:2] == ["--on_four_devices"]:
    print(json.dumps(on_four_devices(pathlib.Path(sys.argv[2]))))
    sys.stdout.flush()
    os._exit(0)
  absltest.main()
