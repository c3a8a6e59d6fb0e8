"""Attention block by block: numbers, linear memory, shards, the choice."""

import functools
from unittest import mock

import attention_cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import blockwise, tuning

Case = attention_cases.Case

# Whole blocks, a rest in rows or in slots, one row, one slot, one block.
_CASES = (
  Case(32, 32, N=2, H=16, mask="groups", lse_cotangent=True),
  Case(33, 50, H=16, mask="ranks_tied", dtype="float32", lse_cotangent=True),
  Case(50, 33, H=16, mask="empty", dtype="float32", lse_cotangent=True),
  Case(1, 40, H=16, mask="ragged", dtype="float32"),
  Case(9, 9, H=16, mask="causal", lse_cotangent=True),
)
_SLOW_CASES = tuple(
  Case(T, S, N=2, H=16, mask=mask, dtype=dtype, lse_cotangent=True)
  for T, S in ((40, 40), (33, 50), (50, 33), (1, 40), (40, 1))
  for mask in attention_cases.MASKS
  for dtype in ("bfloat16", "float32")
)


def _loss(name, q, k, v, visible, **options):
  out = pallas_kernels.any_order_attention(
    q, k, v, visible, implementation=name, **options
  )
  return (out**2).sum()


@mock.patch.object(tuning, "BLOCK", 16)
class NumbersTest(parameterized.TestCase):
  @parameterized.named_parameters((str(case), case) for case in _CASES)
  def test_case(self, case):
    got = attention_cases.run(blockwise.attention, case)
    attention_cases.check(got, case)

  @parameterized.named_parameters((str(case), case) for case in _SLOW_CASES)
  @pytest.mark.slow
  def test_slow_case(self, case):
    got = attention_cases.run(blockwise.attention, case)
    attention_cases.check(got, case)

  @parameterized.parameters(0, 5, 40)
  def test_one_number_for_all_rows(self, visible):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 40, 2, 8))
    want, got = (
      jax.grad(functools.partial(_loss, name), (0, 1, 2))(
        *(x.astype(np.float32) for x in (q, k, v)), visible
      )
      for name in ("reference", "blockwise")
    )
    chex.assert_trees_all_close(want, got, atol=1e-5)

  def test_shards_share_keys(self):
    """jax.shard_map checks what varies; gradients of shared keys are sums."""
    q, k, v = (
      jnp.asarray(x, jnp.float32)
      for x in np.random.default_rng(0).normal(size=(3, 1, 40, 2, 8))
    )

    def loss(q, k, v):
      return jax.lax.psum(_loss("blockwise", q, k, v, None), "data")

    kinds = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=kinds)):
      sharded = jax.shard_map(
        jax.grad(loss, (0, 1, 2)),
        in_specs=(jax.P("data"), jax.P(), jax.P()),
        out_specs=(jax.P("data"), jax.P(), jax.P()),
      )
      got = sharded(q, k, v)
    want = jax.grad(functools.partial(_loss, "reference"), (0, 1, 2))(
      q, k, v, None
    )
    chex.assert_trees_all_close(want, got, atol=1e-5)


class MemoryTest(absltest.TestCase):
  def test_it_is_linear_in_the_length(self):
    """Forward and backward, as the compiler plans it; dense scores are not."""

    def planned(name, T):
      shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
      visible = jax.ShapeDtypeStruct((1, T), jnp.int32)
      gradient = jax.jit(jax.grad(functools.partial(_loss, name), (0, 1, 2)))
      compiled = gradient.lower(shape, shape, shape, visible).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    with mock.patch.object(tuning, "BLOCK", 128):
      some, many = (planned("blockwise", T) for T in (2048, 4096))
    # Dense scores would give 4.
    self.assertLess(many / some, 2.1)
    self.assertGreater(planned("xla", 4096), 20 * many)


class ChoiceTest(parameterized.TestCase):
  @parameterized.parameters(
    (1024, 1024, "xla"), (2048, 2048, "blockwise"), (1, 8192, "xla")
  )
  def test_it_serves_many_scores_where_no_kernel_does(self, T, S, name):
    q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, S, 2, 8), jnp.float32)
    visible = jax.ShapeDtypeStruct((1, T), jnp.int32)
    found = mock.Mock(side_effect=blockwise.attention)
    with mock.patch.object(blockwise, "attention", found):
      jax.eval_shape(pallas_kernels.any_order_attention, q, k, k, visible)
    self.assertEqual(found.called, name == "blockwise")


if __name__ == "__main__":
  absltest.main()
