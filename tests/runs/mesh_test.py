"""Eight devices in any mesh compute what one does, and store no more."""

import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

import pallas_kernels
from aoarm_jax import objective
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import hlo, meshes, sharding
from aoarm_jax.model import network as network_lib
from aoarm_jax.model import vocabulary
from aoarm_jax.training import program as program_lib
from aoarm_jax.training import state as train_state
from pallas_kernels import devices as kernel_devices

V, B = 27, 16


MESHES = {
  "1": config_lib.Mesh(1),
  "8": config_lib.Mesh(),
  "2,2,2": config_lib.Mesh(2, 2, 2, smallest_shard=1),
  "1,4,2": config_lib.Mesh(1, 4, 2, smallest_shard=1),
  "1,1,1,8": config_lib.Mesh(1, 1, 1, 8),
  "1,8": config_lib.Mesh(1, 8, smallest_shard=1),
  "2,4": config_lib.Mesh(2, 4, smallest_shard=1),
  "2,4, parameters whole": config_lib.Mesh(2, 4, smallest_shard=5),
  "1,2,2,2": config_lib.Mesh(1, 2, 2, 2, smallest_shard=1),
}
ALL_IN_LOOPS = {"remat": True, "scan_layers": True, "accumulate": 2}
AS_GPU = {"rowwise": "xla", "loss_block": 10}  # See take_step.
# (mechanism, mesh, what else is changed): a few for every day.
CASES = (
  ("two_stream", "8", {}),
  ("two_stream", "1,1,1,8", {}),
  ("two_stream", "2,4", {}),
  ("two_stream", "2,4, parameters whole", {}),
  ("sigma_gpt", "2,2,2", ALL_IN_LOOPS),
  ("decoupled_rope", "1,2,2,2", {"attention": "mosaic_tpu", "L": 1}),
  # EVERY_CASE has what is named here, one by one.
  ("two_stream", "1,2,2,2", {**AS_GPU, "sees": "nearest:2"}),
)
EVERY_CASE = (
  *(
    (mechanism, mesh, changes)
    for mechanism in tiny.MECHANISMS
    for mesh in MESHES
    if mesh != "1"
    for changes in (
      {},
      {"attention": "mosaic_tpu"},
      ALL_IN_LOOPS,
      {"dtype": "bfloat16", "remat": True},
    )
    if not changes or mechanism in ("two_stream", "decoupled_rope", "ao_gpt")
  ),
  *(
    ("two_stream", mesh, changes)
    for changes in (
      {"groups": "fixed"},
      {"sentinels": 2},
      {"sees": "last:2"},
      {"sees": "nearest:2"},
      {"sees": "random:2"},
      {"backbone": "grouped"},
      {"backbone": "unnormed"},
      {"backbone": "learned"},
      AS_GPU,
    )
    for mesh in ("1,1,1,8", "1,2,2,2")
  ),
  ("two_stream", "2,2,2", {"lora": 3, "teacher": True}),
)


def configuration(
  mechanism,
  mesh,
  groups="none",
  sentinels=1,
  sees="prefix",
  backbone="",
  L=2,
  lora=0,
  teacher=False,
  **compute,
):
  """B = 16, 16 slots, 4 heads of width 4."""
  more = {
    "": {},
    "grouped": tiny.GROUPED,
    "unnormed": tiny.UNNORMED,
    "learned": tiny.LEARNED | {"kv_heads": 2},
  }[backbone]
  model = config_lib.Model(
    mechanism=mechanism,
    sentinels=sentinels,
    D=16,
    L=L,
    N=4,
    content_sees=sees,
    **{name: value for name, value in more.items() if name != "N"},
  )
  model = dataclasses.replace(model, T=16 - (model.S - model.T))
  order = "left_to_right" if model.kind.left_to_right else "uniform"
  return config_lib.Config(
    model=model,
    orders=config_lib.Orders(family=order, groups=groups, group_width=3),
    train=config_lib.Train(
      batch_size=B,
      steps=10,
      lora_rank=lora,
      distill="teacher" if teacher else "",
      distill_temperature=2.0,
    ),
    # Not clipped: Adam's first moment is a tenth of the gradient.
    optimizer=config_lib.Optimizer(clip_norm=1e9, ema_decay=0.9),
    compute=config_lib.Compute(**{"dtype": "float32"} | compute),
    mesh=mesh,
  )


@dataclasses.dataclass
class Step:
  """One training step from the same state on some devices."""

  abstract: train_state.TrainState
  state: train_state.TrainState
  loss: float
  text: str

  def gradient(self):
    return jax.device_get(self.state.opt_state[1].mu)


_draws = {}


def first_state(program):
  """The state before the first step.

  To draw it is compiled for meshes that share every axis, and for one device.
  The other meshes get the state of one device.
  """
  network = program.network
  seed = np.int32(network.config.seed)
  if min(network.mesh.devices.shape[:3]) > 1:
    return program.init(seed)
  one = meshes.make_mesh(config_lib.Mesh(1), jax.devices()[:1])
  key = network.model, network.config.train
  if key not in _draws:
    alone = program_lib.make(network.config, mesh=one, open_teacher=teacher)
    _draws[key] = alone.init
  with jax.set_mesh(one):
    state = _draws[key](seed)
  fresh = dataclasses.replace(program.abstract, teacher={})
  shardings = jax.tree.map(lambda leaf: leaf.sharding, fresh)
  return jax.device_put(state, shardings)


def teacher(network):
  """A causal network on the mesh of another one."""
  model = configuration("causal", None).model
  model = dataclasses.replace(model, T=network.model.T)
  config = network.config.replace("model", model)
  return network_lib.Network(config, network.mesh)


def taught(program):
  """The state before the first step, with a teacher if there is one."""
  state = first_state(program)
  if not program.teacher:
    return state
  weights = jax.device_put(
    tiny.sharp(network_lib.Network(program.teacher.config)),
    jax.tree.map(lambda leaf: leaf.sharding, program.teacher.abstract_params),
  )
  return dataclasses.replace(state, teacher=weights)


def take_step(config, devices):
  """Take a step; if it names compute.rowwise, rows are cut as for a GPU."""
  mesh = meshes.make_mesh(config.mesh, devices)
  meshes.check(mesh, config)
  as_gpu = contextlib.nullcontext()
  if config.compute.rowwise != "auto":
    gpu = kernel_devices.Device("gpu", "")
    as_gpu = mock.patch.object(kernel_devices, "of", return_value=gpu)
  with jax.set_mesh(mesh), pallas_kernels.interpret(True), as_gpu:
    program = program_lib.make(config, mesh=mesh, open_teacher=teacher)
    tokens = np.random.default_rng(0).integers(0, V, (B, config.model.T))
    batch = sharding.put_batch(mesh, tokens.astype(np.uint8))
    compiled = program.step.lower(program.abstract, program.tokens).compile()
    state, sums = compiled(taught(program), batch)
  return Step(program.abstract, state, float(sums["nats"]), compiled.as_text())


_steps = {}


def cached_step(mechanism, mesh, changes):
  """On one device where `mesh` is "1"."""
  key = json.dumps([mechanism, mesh, changes])
  if key not in _steps:
    devices = jax.devices()[:1] if mesh == "1" else None
    _steps[key] = take_step(
      configuration(mechanism, MESHES[mesh], **changes), devices
    )
  return _steps[key]


def compared(mechanism, mesh, changes):
  """(relative difference of loss, gradient from one device; their bound)."""
  one = cached_step(mechanism, "1", changes)
  got = cached_step(mechanism, mesh, changes)
  bound = 1e-5
  if changes.get("dtype") == "bfloat16":
    # Both round, in their own ways: each is as far from float32 as this one.
    others = {k: v for k, v in changes.items() if k != "dtype"}
    exact = cached_step(mechanism, "1", others)
    bound = 2 * helpers.distance(one.gradient(), exact.gradient())
  return (
    abs(got.loss / one.loss - 1),
    helpers.distance(got.gradient(), one.gradient()),
    bound,
  )


def placed(tree):
  """{path: (shape, names of the mesh axes by dimension, shape on a device)}."""
  return {
    jax.tree_util.keystr(path): (
      leaf.shape,
      tuple(leaf.sharding.spec) if hasattr(leaf.sharding, "spec") else (),
      leaf.sharding.shard_shape(leaf.shape),
    )
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def on_eight_devices(which):
  """What the process with eight devices does; prints what it saw."""
  assert jax.device_count() == 8
  cases = EVERY_CASE if which == "every" else CASES
  for mechanism, mesh, changes in cases:
    try:
      seen = compared(mechanism, mesh, changes)
    except pallas_kernels.UnsupportedError as error:
      seen = str(error)
    print(json.dumps([mechanism, mesh, changes, seen]), flush=True)
  if which == "every":
    return
  seen = {"traffic": {}}
  for mesh in ("8", "2,4", "2,4, parameters whole", "1,1,1,8"):
    step = cached_step("two_stream", mesh, {})
    seen["traffic"][mesh] = {
      kind: (one.count, one.sent_bytes)
      for kind, one in hlo.traffic(step.text).items()
      if one.count
    }
  step = cached_step(*next(case for case in CASES if case[0] == "sigma_gpt"))
  seen["abstract"], seen["stepped"] = placed(step.abstract), placed(step.state)
  seen["errors"] = errors()
  seen["vocabularies"] = large_vocabularies()
  print(json.dumps(seen))


def large_vocabularies():
  """Largest differences from one device, of losses and gradients.

  Of 27 and 28 symbols, the axis tensor divides the latter alone.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  x, weights = jax.random.normal(keys[0], (2, 8, 4, 6))

  def nll(head, V):
    targets = jnp.arange(32).reshape(8, 4) % V
    barred = objective.Barred(25, targets % 3 == 0)
    return vocabulary.nll(x, head, targets, 10, barred) * weights[..., 0]

  size = vocabulary.LARGE
  tokens = jax.random.randint(keys[1], (8, 4), size - 9, size)

  def difference(loss, table):
    run = jax.jit(jax.value_and_grad(loss))
    wanted = run(table)
    with jax.set_mesh(meshes.make_mesh(MESHES["2,2,2"])):
      got = run(table)
    parts = jax.tree.map(lambda x, y: float(abs(x - y).max()), got, wanted)
    return max(parts)

  def embedded(table):
    return (vocabulary.embed(table, tokens) * weights).sum()

  head = jax.random.normal(keys[2], (6, 28))
  return [
    difference(lambda head: nll(head, 27).sum(), head[:, :27]),
    difference(lambda head: nll(head, 28).sum(), head),
    difference(embedded, jnp.ones((size, 6))),
  ]


def errors():
  """Messages of meshes that cannot be."""

  def message(mesh, batch=B, **changes):
    try:
      config = configuration("two_stream", mesh, **changes)
      made = meshes.make_mesh(mesh)
      meshes.check(made, config)
      meshes.check_batch(
        made, "config.train.batch_size", batch, config.compute.accumulate
      )
      program_lib.make(config, mesh=made)
    except config_lib.ConfigError as error:
      return str(error)
    return ""

  return {
    "left": message(config_lib.Mesh(0, 3)),
    "many": message(config_lib.Mesh(2, 2, 4)),
    "heads": message(config_lib.Mesh(1, 1, 8)),
    "key heads": message(config_lib.Mesh(1, 1, 4), backbone="grouped"),
    "slots": message(config_lib.Mesh(1, 1, 1, 3)),
    "batch": message(config_lib.Mesh(8), accumulate=4),
    "width": message(config_lib.Mesh(1, 3, smallest_shard=1), batch=9),
    "cudnn": message(config_lib.Mesh(1, 1, 1, 8), attention="cudnn"),
  }


def started(which, **environment):
  out = subprocess.run(
    [sys.executable, __file__, "--on_eight_devices", which],
    env=helpers.environment(JAX_NUM_CPU_DEVICES="8", **environment),
    stdout=subprocess.PIPE,
    check=True,
    text=True,
    timeout=7200,
  ).stdout
  return [json.loads(line) for line in out.splitlines()]


@pytest.mark.thorough
class MeshTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    if jax.default_backend() != "cpu":
      raise absltest.SkipTest("for the CPU: start with JAX_PLATFORMS=cpu")
    with helpers.quick_compilation():
      *cls.compared, cls.seen = started("some")

  def assert_equals_one_device(self, compared):
    for mechanism, mesh, changes, seen in compared:
      with self.subTest(mechanism, mesh=mesh, **changes):
        loss, gradient, bound = seen
        self.assertLess(bound, 5e-2)
        self.assertLess(loss, bound)
        self.assertLess(gradient, bound)

  def test_loss_and_gradient_are_those_of_one_device(self):
    self.assertLen(self.compared, len(CASES))
    self.assert_equals_one_device(self.compared)

  def test_large_vocabularies_are_those_of_one_device(self):
    # Sums of some hundred float32 numbers.
    self.assertLess(max(self.seen["vocabularies"]), 1e-4)

  @pytest.mark.slow
  def test_every_mechanism_on_every_mesh(self):
    with helpers.quick_compilation():
      compared = started("every")
    self.assertLen(compared, len(EVERY_CASE))
    self.assert_equals_one_device(compared)

  def test_where_every_parameter_and_moment_lies(self):
    """As written here, not as the table says: nothing is replicated unseen."""
    wanted = {
      "['embedding']": (None, "fsdp"),
      "['start']['added']": (None, None, "fsdp"),
      "['head']": ("fsdp", None),
      "['norm']['scale']": (None,),
      "['blocks']['attention_norm']['scale']": (None, None),
      "['blocks']['mlp_norm']['scale']": (None, None),
      "['blocks']['attention']['query_norm']['scale']": (None, None),
      "['blocks']['attention']['key_norm']['scale']": (None, None),
      "['blocks']['attention']['query']": (None, "fsdp", "tensor", None),
      "['blocks']['attention']['key']": (None, "fsdp", "tensor", None),
      "['blocks']['attention']['value']": (None, "fsdp", "tensor", None),
      "['blocks']['attention']['out']": (None, "tensor", None, "fsdp"),
      "['blocks']['mlp']['up']": (None, "fsdp", "tensor"),
      "['blocks']['mlp']['down']": (None, "tensor", "fsdp"),
    }
    trees = (".params", ".ema", ".opt_state[1].mu", ".opt_state[1].nu")
    scalars = [".step", ".key", ".opt_state[1].count", ".opt_state[3].count"]
    leaves = {
      tree + name: spec for tree in trees for name, spec in wanted.items()
    }
    leaves |= dict.fromkeys(scalars, ())
    for name in ("abstract", "stepped"):
      seen = self.seen[name]
      self.assertEqual(sorted(seen), sorted(leaves))
      for path, (shape, spec, on_device) in seen.items():
        with self.subTest(name, path=path):
          full = tuple(spec) + (None,) * (len(shape) - len(spec))
          self.assertEqual(full, leaves[path])
          parts = [n // 2 if axis else n for n, axis in zip(shape, full)]
          self.assertEqual(on_device, parts)

  def test_what_is_sent(self):
    config = configuration("two_stream", MESHES["8"])
    network = network_lib.Network(config)
    size = 4 * sum(
      leaf.size for leaf in jax.tree.leaves(network.abstract_params)
    )
    matrices = 4 * sum(
      leaf.size
      for leaf, axes in zip(
        jax.tree.leaves(network.abstract_params),
        jax.tree.leaves(network.axes, is_leaf=lambda x: isinstance(x, tuple)),
      )
      if "embed" in axes
    )
    small = 1000  # Norms, sums.
    around = 7 / 8
    for mesh in ("8", "2,4, parameters whole"):
      with self.subTest("gradients once, and nothing else", mesh=mesh):
        traffic = self.seen["traffic"][mesh]
        self.assertEqual(list(traffic), ["all-reduce"])
        self.assertBetween(
          traffic["all-reduce"][1], 2 * around * size, 2 * around * size + small
        )
    with self.subTest("fsdp: and parameters twice at most, no activations"):
      traffic = self.seen["traffic"]["2,4"]
      self.assertLen(traffic, 3)
      # Where we do not ask for it, the CPU compiler knows no reduce-scatter.
      # Over data only pieces are summed: else it would be more in all.
      self.assertBetween(
        traffic["all-reduce"][1] + 2 * traffic["reduce-scatter"][1],
        2 * around * size,
        2 * around * size + small,
      )
      self.assertGreater(traffic["reduce-scatter"][1], 0)
      once = 3 / 4 * matrices
      self.assertBetween(traffic["all-gather"][1], once, 2 * once)
    with self.subTest("sequence: keys and values, and back"):
      traffic = self.seen["traffic"]["1,1,1,8"]
      keys = 4 * B * config.model.S * config.model.D
      L = config.model.L
      self.assertEqual(traffic["reduce-scatter"][0], 2 * L)
      self.assertAlmostEqual(
        traffic["reduce-scatter"][1], around * 2 * L * keys, delta=1
      )
      self.assertLess(traffic["all-gather"][1], around * 2 * L * keys + small)
      logits = 4 * B * config.model.S * V
      # Of those and their cotangents, what a device has of another's.
      self.assertLess(traffic["collective-permute"][1], 2 * logits / 8 + small)
      self.assertLess(traffic["all-reduce"][1], 2 * around * size + small)

  @parameterized.parameters(
    ("left", "config.mesh: fsdp 3 does not divide the 8 cpu devices; cho"),
    ("many", "config.mesh.data=2: there are 8 cpu devices, and data 2 x fsdp"),
    ("heads", "config.mesh.tensor=8: must divide config.model.N=4 heads"),
    ("key heads", "config.mesh.tensor=4: must divide config.model.kv_heads=2 "),
    ("slots", "config.mesh.sequence=3: twice that must divide the 16 slots"),
    ("batch", "config.train.batch_size=16: must be a multiple of the 8 dev"),
    ("width", "config.mesh.fsdp=3: must divide the embed axis of every"),
    ("cudnn", "config.compute.attention='cudnn': sees contiguous slots only"),
  )
  def test_what_cannot_be(self, name, message):
    self.assertStartsWith(self.seen["errors"][name], message)
    self.assertNotIn("\n", self.seen["errors"][name])


class ShardsTest(absltest.TestCase):
  def test_short_shards_are_not_made(self):
    mesh = jax.sharding.AbstractMesh((2, 4, 2, 1), meshes.AXES)

    def spec(smallest_shard):
      axes, shape = ("embed", "heads", "head"), (5, 32, 4, 4)
      axes = sharding.parameter_axes(mesh, axes, shape, smallest_shard)
      return sharding._parameter_spec(mesh, axes, shape)

    self.assertEqual(spec(8), jax.P(None, "fsdp", "tensor", None))
    self.assertEqual(spec(9), jax.P(None, None, "tensor", None))
    config = configuration("two_stream", config_lib.Mesh())
    one = jax.sharding.AbstractMesh((1, 1, 1, 1), meshes.AXES)
    for on, smallest_shard, whole in ((mesh, 4, 0), (mesh, 5, 8), (one, 99, 0)):
      cut = config.replace("mesh.smallest_shard", smallest_shard)
      network = network_lib.Network(cut, on)
      self.assertEqual(network.kept_whole, whole)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--on_eight_devices"]:
    gc.freeze()  # As in conftest.py.
    gc.set_threshold(20_000, 20, 100)
    with contextlib.suppress(BrokenPipeError):
      on_eight_devices(sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
  absltest.main()
