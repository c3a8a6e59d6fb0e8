"""Types are the library's, whatever JAX's switches say."""

from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import main
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import switches
from aoarm_jax.training import program as program_lib


def types(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


class SwitchesTest(parameterized.TestCase):
  @parameterized.parameters(*tiny.MECHANISMS)
  def test_states_have_32_bits(self, mechanism):
    config = config_lib.Config(
      model=config_lib.Model(mechanism=mechanism, T=8, D=8, L=1, N=1),
      optimizer=config_lib.Optimizer(ema_decay=0.9),
      train=config_lib.Train(batch_size=8),
    )
    if mechanisms.MECHANISMS[mechanism].left_to_right:
      config = config.replace("orders.family", "left_to_right")
    wanted = {"float32", "int32", "key<fry>"}
    with jax.enable_x64(True):
      program = program_lib.make(config, "train")
      self.assertEqual(types(program.abstract), wanted)
      self.assertEqual(types(program.network.abstract_params), {"float32"})
      with jax.set_mesh(program.network.mesh):
        state, _ = jax.eval_shape(
          program.step, program.abstract, program.tokens
        )
      self.assertEqual(types(state), wanted)

  def test_context(self):
    with jax.enable_x64(True):
      with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        switches.fixed_types(),
      ):
        self.assertEqual(jnp.zeros(()).dtype, jnp.float32)
        self.assertEqual((jnp.zeros((2, 1)) + jnp.zeros(1)).ndim, 2)
        self.assertEqual((jnp.zeros(1) + jnp.arange(1)).dtype, jnp.float32)
      self.assertEqual(jnp.zeros(()).dtype, jnp.float64)

  def test_the_program_switches_64_bits_off_and_says_so(self):
    self.addCleanup(jax.config.update, "jax_enable_x64", False)
    jax.config.update("jax_enable_x64", True)
    with self.assertLogs(level="WARNING") as logs:
      switches.fix_types()
    self.assertIn("JAX_ENABLE_X64 is set to False here", logs.output[0])
    self.assertEqual(jnp.zeros(()).dtype, jnp.float32)
    jax.config.update("jax_enable_x64", True)
    with mock.patch.object(main.matching, "table", return_value=""):
      helpers.run([f"--config={helpers.TINY}", "--mode=count"])
    self.assertEqual(jnp.zeros(()).dtype, jnp.float32)
    with self.assertNoLogs(level="WARNING"):
      switches.fix_types()

  def test_a_switch_that_would_stop_every_program(self):
    name = "jax_numpy_rank_promotion"
    self.addCleanup(jax.config.update, name, jax.config.values[name])
    jax.config.update(name, "raise")
    with self.assertLogs(level="WARNING") as logs:
      switches.fix_types()
    self.assertIn("JAX_NUMPY_RANK_PROMOTION is set to 'allow'", logs.output[0])
    self.assertEqual((jnp.zeros((2, 1)) + jnp.zeros(1)).ndim, 2)


if __name__ == "__main__":
  absltest.main()
