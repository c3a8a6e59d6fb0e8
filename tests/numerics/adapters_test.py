"""Low-rank adapters, and which arrays are trained."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import adapters, cost
from aoarm_jax.model import network as network_lib
from aoarm_jax.training import program as program_lib

B, T, V = 3, 7, 5
LORA = config_lib.Train(lora_rank=3, lora_alpha=5.0)
CASES = (
  ("two_stream_untied", {}),
  ("two_stream", tiny.GROUPED),
)
MORE_CASES = (
  ("two_stream", {}),
  ("decoupled_rope", tiny.UNNORMED),
  ("two_stream", tiny.LEARNED),
)


def pair(mechanism, fields, train=LORA):
  """(network without adapters, network with them)."""
  plain = tiny.make(mechanism, T=T, V=V, **fields)
  return plain, network_lib.Network(
    plain.config, None, tiny.tokenizer(V), train
  )


def slots(network):
  order = tiny.orders_of(network.model.mechanism, B, T)
  return orders.to_slots(tiny.tokens(B, T, V), order, network.layout)


def named(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree):
  return {named(path) for path, _ in jax.tree.leaves_with_path(tree)}


class AdapterTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_logits(self, mechanism, fields):
    self.check_logits(mechanism, fields)

  @parameterized.parameters(*MORE_CASES)
  @pytest.mark.slow
  def test_logits_of_more_mechanisms(self, mechanism, fields):
    self.check_logits(mechanism, fields)

  def check_logits(self, mechanism, fields):
    """Fresh adapters change nothing; then merged weights give the same."""
    plain, adapted = pair(mechanism, fields)
    with_adapters, apply = jax.jit(adapted.apply), jax.jit(plain.apply)
    base, where = tiny.sharp(plain), slots(plain)
    params = tiny.sharp(adapted, 1)
    fresh = jax.tree_util.tree_map_with_path(
      lambda path, x: 0 * x if named(path).endswith("out") else x, params
    )
    fresh = adapters.joined(fresh, base)
    chex.assert_trees_all_equal(adapters.merged(fresh, LORA), base)
    # Merged weights are equal bit by bit. Logits are, too, unless XLA fuses the
    # two programs in different ways.
    tiny.assert_same(with_adapters(fresh, where), apply(base, where), 16)
    params = adapters.joined(params, base)
    got = with_adapters(params, where)
    whole = adapters.merged(params, LORA)
    tiny.assert_same(apply(whole, where), got)
    # All adapters matter.
    for name in names(adapters.split(params, LORA)[0]):
      if name.endswith("into"):
        less = jax.tree_util.tree_map_with_path(
          lambda path, x, name=name: 0 * x if named(path) == name else x, params
        )
        other = apply(adapters.merged(less, LORA), where)
        self.assertGreater(float(jnp.abs(other - got).max()), 1e-3, name)

  def test_targets(self):
    train = config_lib.Train(lora_rank=2, lora_targets=("value", "mlp"))
    _, adapted = pair("two_stream", tiny.GROUPED, train)
    trained, frozen = adapters.split(adapted.abstract_params, train)
    found = {name.rpartition("adapters/")[2] for name in names(trained)}
    pairs = [f"{w}/{a}" for w in ("value", "gate", "up", "down") for a in AB]
    self.assertEqual(found, {*pairs, "start/query_start"})
    self.assertEqual(
      names(frozen),
      names(pair("two_stream", tiny.GROUPED)[0].abstract_params)
      - {"start/query_start"},
    )


AB = ("into", "out")


class FrozenTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, (), "", "blocks/mlp/up"),
    (0, ("embedding", "blocks/*"), "embedding blocks/mlp/up", "norm/scale"),
    (0, ("*", "!*norm*"), "embedding", "norm/scale blocks/mlp_norm/scale"),
    (4, (), "embedding blocks/mlp/up norm/scale", "start/query_start"),
    (4, ("!norm/*", "start/*"), "start/query_start embedding", "norm/scale"),
    # Adapters are always trained.
    (4, ("*",), "start/query_start", "blocks/mlp/adapters/up/into"),
  )
  def test_the_last_pattern_decides(self, rank, patterns, frozen, trained):
    train = config_lib.Train(lora_rank=rank, frozen=patterns)
    for name in frozen.split():
      self.assertTrue(adapters.is_frozen(name, train), name)
    for name in trained.split():
      self.assertFalse(adapters.is_frozen(name, train), name)

  def test_halves_make_the_whole(self):
    params = tiny.make().abstract_params
    train = config_lib.Train(frozen=("*", "!*norm*"))
    trained, frozen = adapters.split(params, train)
    self.assertEqual(names(trained) | names(frozen), names(params))
    self.assertEqual(adapters.joined(trained, frozen), params)
    self.assertFalse(names(trained) & names(frozen))

  @parameterized.parameters(
    (("blocks/mpl/*",), "frozen=.'blocks/mpl/.',.: 'blocks/mpl/.' matches no"),
    (("*",), "leaves no array to train; exempt"),
  )
  def test_patterns_that_cannot_be(self, patterns, message):
    train = config_lib.Train(frozen=patterns)
    with self.assertRaisesRegex(config_lib.ConfigError, message) as caught:
      adapters.check(tiny.make().abstract_params, train)
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.parameters(
    (dict(frozen=(1,)), "train.frozen=.1,.: 1 is not a text"),
    (dict(lora_targets=("gate",)), "config.model.mlp=gelu has no gate"),
    (dict(lora_targets=(), lora_rank=2), "name at least one"),
    (dict(lora_targets=("head",)), "'head' is not one of attention, query"),
    (dict(lora_rank=-1), "must be at least 0"),
  )
  def test_fields_that_cannot_be(self, fields, message):
    config = config_lib.Config(train=config_lib.Train(**fields))
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      config_rules.validate(config)


@functools.cache
def made(**train):
  """(program, first state, compiled step) of a training."""
  config = config_lib.Config(
    model=config_lib.Model(T=15, D=64, L=2, N=2),
    train=config_lib.Train(batch_size=4, steps=3, **train),
    optimizer=config_lib.Optimizer(ema_decay=0.9),
    compute=config_lib.Compute(dtype="float32", attention="xla"),
  )
  program = program_lib.make(config, devices=jax.devices()[:1])
  with jax.set_mesh(program.network.mesh):
    compiled = program.step.lower(program.abstract, program.tokens).compile()
    state = program.init(np.int32(0))
  return program, state, compiled


class StepTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(lora_rank=2), dict(frozen=("blocks/*", "!*norm*"))
  )
  def test_only_trained_arrays_have_moments_and_change(self, **train):
    program, before, compiled = made(**train)
    tokens = np.random.default_rng(0).integers(0, 27, (4, 15)).astype(np.uint8)
    shown = jax.tree.map(np.asarray, before.frozen)
    trained = sum(x.size for x in jax.tree.leaves(before.params))
    moments = jax.tree.leaves(before.opt_state)
    # Two moments of 4 bytes, and two counters of steps.
    self.assertEqual(sum(x.nbytes for x in moments), 8 * trained + 8)
    self.assertEqual(sum(x.size for x in jax.tree.leaves(before.ema)), trained)
    frozen = sum(x.size for x in jax.tree.leaves(before.frozen))
    whole = program.network.abstract_params
    if not train.get("lora_rank"):
      self.assertEqual(
        frozen + trained,
        sum(math.prod(x.shape) for x in jax.tree.leaves(whole)),
      )
    first = jax.tree.map(np.asarray, before.params)
    with jax.set_mesh(program.network.mesh):
      batch = jax.device_put(tokens, program.tokens.sharding)
      after, _ = compiled(jax.tree.map(jnp.copy, before), batch)
      after, _ = compiled(after, batch)
    chex.assert_trees_all_equal(after.frozen, shown)
    for path, x in jax.tree.leaves_with_path(after.params):
      old = first
      for key in path:
        old = old[key.key]
      self.assertTrue((np.asarray(x) != old).any(), jax.tree_util.keystr(path))
    read = program.read_out(after)
    chex.assert_trees_all_equal_shapes_and_dtypes(read, whole)

  @pytest.mark.thorough
  def test_the_weights_are_those_that_are_drawn_without_adapters(self):
    (_, plain, _), (program, adapted, _) = made(), made(lora_rank=2)
    chex.assert_trees_all_equal(
      adapters.merged(
        adapters.joined(adapted.params, adapted.frozen),
        program.network.config.train,
      ),
      plain.params,
    )

  @pytest.mark.slow
  def test_no_gradient_of_a_frozen_array_is_computed(self):
    """A third of the products of a step are gradients of weights."""
    flops = {
      rank: made(**(dict(lora_rank=rank) if rank else {}))[2].cost_analysis()[
        "flops"
      ]
      for rank in (0, 2)
    }
    self.assertLess(flops[2] / flops[0], 0.78)
    counted = [
      cost.training_flops(made(**train)[0].network.config)
      for train in ({}, dict(lora_rank=2))
    ]
    # What is not counted, such as norms, is the same in both.
    self.assertAlmostEqual(
      (flops[0] - flops[2]) / (counted[0] - counted[1]), 1.0, delta=0.15
    )


if __name__ == "__main__":
  absltest.main()
