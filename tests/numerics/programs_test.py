"""The programs that a study's cells share."""

import dataclasses
from unittest import mock

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized
from studies import V, config

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import programs
from aoarm_jax.training import optimizer
from aoarm_jax.training import program as program_lib

pytestmark = pytest.mark.thorough


class MeshTest(absltest.TestCase):
  def test_a_given_mesh_must_divide_the_batches(self):
    mesh = jax.sharding.AbstractMesh((3, 1, 1, 1), meshes.AXES)
    made = config_lib.Config(
      train=config_lib.Train(batch_size=6),
      eval=config_lib.Eval(batch_size=4),
    )
    with self.assertRaisesRegex(
      config_lib.ConfigError, "config.eval.batch_size=4"
    ):
      program_lib.make(made, "train", "eval", mesh=mesh)


class TemperaturesTest(parameterized.TestCase):
  @parameterized.parameters("decoupled_rope", "mdlm")
  def test_a_law_a_row_is_the_law_of_each_row(self, mechanism):
    """All temperatures in one batch give what one batch for each would."""
    network = tiny.make(mechanism, L=1)
    params, B, T = tiny.sharp(network), 4, 7
    order = tiny.orders_of(mechanism, B, T)

    @tiny.quick_jit
    def texts(params, temperature):
      law = sampling.Sampling(temperature, jnp.int32(0), jnp.float32(1))
      blank = jnp.zeros((B, T), jnp.int32)
      arguments = (
        network,
        params,
        jax.random.key(0),
        blank,
        blank > 0,
        order,
        law,
      )
      if mechanism == "mdlm":
        return diffusion.generate(*arguments, plan=plan_lib.Plan()).tokens
      return decode.generate(*arguments).tokens

    levels = np.float32([0.1, 3.0, 0.1, 3.0])
    together = texts(params, levels[:, None, None])
    cold, hot = (texts(params, levels[i]) for i in (0, 1))
    self.assertFalse(np.array_equal(cold, hot))
    for b in range(B):
      np.testing.assert_array_equal(together[b], (cold, hot)[b % 2][b])


class ProgramsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(helpers.quick_compilation())

  def test_rates_and_seeds_share_a_training_step_which_is_that_of_a_run(self):
    base = config("T=16 size=16x1x2", tokens_per_step=32)
    (cell,) = cells_lib.expand(base)
    mesh = meshes.of_run(base, "train", "eval")
    made = self.enter_context(programs.Programs(mesh))
    other = cells_lib.resolve(cell, base, 5e-3)
    step = made._future("train", other)
    for rate, seed in ((5e-3, 1), (1e-3, 0)):
      got = cells_lib.resolve(dataclasses.replace(cell, seed=seed), base, rate)
      self.assertIs(made._future("train", got), step)
    with jax.set_mesh(mesh):
      tokens = sharding.put(mesh, np.arange(32, dtype=np.uint8) % V)
      tokens = tokens.reshape(2, 16)
      wanted = program_lib.make(got, mesh=mesh).step
      start = made._future("init", got).result()
      one, two = (start(jnp.int32(3)) for _ in range(2))
      sums = wanted(one, tokens)[1]
      # Made for a rate of 5e-3; told the rate of the other's first step.
      rate = optimizer.schedule(got.optimizer, got.train.steps)(0)
      found = step.result()(two, tokens, jnp.float32(rate))[1]
      chex.assert_trees_all_close(found, sums, rtol=1e-5)

  @parameterized.parameters((1, [4, 8, 12, 16]), (2, [5, 9, 13, 17]))
  def test_a_large_cache_grows_while_texts_are_sampled(self, sentinels, wanted):
    base = config("T=16 size=16x1x2", characters=32, temperatures=2)
    base = dataclasses.replace(
      base, model=dataclasses.replace(base.model, sentinels=sentinels)
    )
    (cell,) = cells_lib.expand(base)
    got = cells_lib.resolve(cell, base, 1e-3)
    mesh = meshes.of_run(got, "train", "eval")
    with (
      mock.patch.multiple(decode, _LARGE=0, _TILE=1),
      mock.patch.object(
        decode.cached, "resized", side_effect=decode.cached.resized
      ) as resized,
    ):
      made = program_lib.make(got, mesh=mesh)
      program, arguments = programs._sample_program(made)
      tokens = jax.eval_shape(program, *arguments)
    self.assertEqual(tokens.shape[1], 16)
    lengths = [call.args[1] for call in resized.call_args_list]
    self.assertEqual(lengths, wanted)


if __name__ == "__main__":
  absltest.main()
