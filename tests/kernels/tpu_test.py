"""The TPU kernel, interpreted: values, gradients, what it loads, transforms."""

import functools
import itertools
import os
import subprocess
import sys
from unittest import mock

import attention_cases
import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from aoarm_jax import orders
from pallas_kernels import reference, tuning
from pallas_kernels.tpu import attention as tpu
from pallas_kernels.tpu import blocks as tpu_blocks

Case = attention_cases.Case

# Every width, head count, group, mask and dtype is in _CASES, and every size is
# in one of both lists; odd ones stand together. With tiles of 128 slots and of
# 256 rows, most have several.
_CASES = (
  Case(1, 1, group=1),
  Case(2, 200, N=3, H=32, mask="prompt", dtype="float32"),
  Case(64, 63, B=3, group=4, mask="ragged", dtype="float32"),
  Case(97, 65, H=128, mask="empty", lse_cotangent=True),
  Case(200, 200, dtype="float32", lse_cotangent=True),
  Case(128, 200, group=1, mask="ranks_random", dtype="float32"),
  Case(200, 200, N=3, H=32, mask="ranks_structured"),
  Case(200, 97, mask="ranks_tied", dtype="float32", lse_cotangent=True),
  Case(200, 200, mask="empty", logits=100.0),
  Case(200, 200, constant_v=True, mask="groups"),
)
_MORE_CASES = (
  Case(63, 64, N=3, group=1, H=32, mask="groups"),
  Case(65, 97, mask="empty", dtype="float32", lse_cotangent=True),
  Case(128, 128, H=128, mask="groups", dtype="float32", lse_cotangent=True),
  Case(200, 1, mask="ragged"),
  Case(1, 200, N=3, mask="ragged"),
  Case(200, 128, group=4, mask="prompt"),
  Case(128, 128, logits=100.0, dtype="float32"),
  Case(97, 97, constant_v=True, mask="ranks_random", dtype="float32"),
)
_SIZES = (1, 2, 63, 64, 65, 97, 128, 200, 1000, 1024)
_OTHERS = itertools.cycle(
  itertools.product(
    ("bfloat16", "float32"), (1, 2, 4), (32, 64, 128), (1, 3), (False, True)
  )
)


def _slow_cases():
  """All pairs of sizes with all masks; the other fields take turns."""
  for T, S, mask in itertools.product(_SIZES, _SIZES, attention_cases.MASKS):
    dtype, group, H, N, lse = next(_OTHERS)
    yield Case(T, S, N, group, H, mask, dtype, lse_cotangent=lse)


setUpModule, tearDownModule = helpers.around_module(
  helpers.quick_compilation(), pallas_kernels.interpret(True)
)


def small_tiles():
  """Tiles of 128 slots and 256 rows, so that short sequences have several."""
  return mock.patch.multiple(tuning, TPU_ROWS=256, TPU_SLOTS=128)


def _call(case):
  """(kernel of q, k, v, visible, key_rank; the arrays)."""
  given = attention_cases.inputs(case)
  kernel = functools.partial(tpu.attention, scale=given.scale)
  return kernel, given[:5]


def _both(kernel):
  """Jitted (q, k, v, visible, key_rank) -> out, lse, dq, dk, dv for ones."""

  def both(*arrays):
    outputs, pull = jax.vjp(lambda *qkv: kernel(*qkv, *arrays[3:]), *arrays[:3])
    return *outputs, *pull(jax.tree.map(jnp.ones_like, outputs))

  return jax.jit(both)


class TpuTest(parameterized.TestCase):
  @parameterized.named_parameters((str(case), case) for case in _CASES)
  @pytest.mark.thorough
  def test_case(self, case):
    self.check_case(case)

  @parameterized.named_parameters((str(case), case) for case in _MORE_CASES)
  @pytest.mark.slow
  def test_more_cases(self, case):
    self.check_case(case)

  def check_case(self, case):
    with small_tiles():
      got = attention_cases.run(tpu.attention, case)
    attention_cases.check(got, case)

  @parameterized.named_parameters((str(c), c) for c in _slow_cases())
  @pytest.mark.slow
  def test_slow_case(self, case):
    got = attention_cases.run(tpu.attention, case)
    attention_cases.check(got, case)

  def test_a_long_sequence_in_parts(self):
    """Where dq does not fit into VMEM, the rows come in several calls."""
    case = Case(200, 200, dtype="float32")
    with small_tiles(), mock.patch.object(tpu_blocks, "VMEM_BYTES", 1):
      got = attention_cases.run(tpu.attention, case)
    attention_cases.check(got, case)

  @parameterized.parameters(-0.3, 0.0)
  def test_a_scale_that_is_not_positive(self, scale):
    _, arrays = _call(Case(7, 9, mask="empty", dtype="float32"))
    chex.assert_trees_all_close(
      *(
        jax.jit(f, static_argnums=5)(*arrays, scale)
        for f in (tpu.attention, reference.attention)
      ),
      atol=1e-6,
    )

  def test_on_a_simulated_tpu(self):
    """Copies between memories and a race detector; nothing depends on them.

    But for the last bit: it is another program to the compiler.
    """
    case = Case(200, 200, N=3, group=1, H=32, mask="ranks_structured")
    with small_tiles():
      want = attention_cases.run(tpu.attention, case)
      simulated = pltpu.InterpretParams(detect_races=True)
      with pallas_kernels.interpret(simulated):
        got = attention_cases.run(tpu.attention, case)
    attention_cases.check(got, case)
    for name, x, y in zip(got._fields, got, want):
      one = float(jnp.finfo(x.dtype).eps)
      x, y = (np.asarray(z, np.float64) for z in (x, y))
      np.testing.assert_allclose(x, y, rtol=2 * one, atol=one / 4, err_msg=name)

  def test_wrong_results_are_seen(self):
    """The judge of the cases is not satisfied with a weight that is missing."""
    case = Case(65, 97, mask="prompt")

    def wrong(q, k, v, visible, key_rank, scale):
      return tpu.attention(q, k, v, visible - 1, key_rank, scale)

    got = attention_cases.run(wrong, case)
    with self.assertRaisesRegex(AssertionError, "'out': .*'dq': .*'dv': "):
      attention_cases.check(got, case)

  @parameterized.parameters("causal", "ragged", "ranks_structured")
  def test_tiles_that_no_row_sees_are_not_read(self, mask):
    """They hold what is not a number, and nothing is changed by it."""
    case = Case(256, 384, mask=mask, dtype="float32", B=1)
    kernel, (q, k, v, visible, key_rank) = _call(case)
    hidden = slice(256, 384)
    if mask == "ragged":
      visible = np.minimum(visible, 130)
    elif mask == "ranks_structured":
      hidden = slice(128, 256)
      key_rank = np.where((np.arange(384) // 128) == 1, 999, key_rank)
    full = q, k, v, visible, key_rank
    k, v = np.array(k), np.array(v)
    k[:, hidden], v[:, hidden] = np.nan, np.nan
    poisoned = q, k, v, visible, key_rank
    both = _both(kernel)
    with small_tiles():
      want, got = both(*full), both(*poisoned)
    self.assertFalse(any(np.isnan(x).any() for x in got))
    chex.assert_trees_all_equal(got, want)
    for gradient in got[3:]:
      np.testing.assert_array_equal(gradient[:, hidden], 0.0)

  @parameterized.parameters("causal", "groups", "ranks_tied")
  def test_the_same_bits_again_and_in_any_place(self, mask):
    """Twice, and for equal sequences of a batch."""
    case = Case(97, 200, N=3, mask=mask)
    kernel, arrays = _call(case)
    arrays = [x if x is None else np.stack([x[0], x[0]]) for x in arrays]
    both = _both(kernel)
    with small_tiles():
      once, again = both(*arrays), both(*arrays)
    chex.assert_trees_all_equal(once, again)
    for x in jax.tree.leaves(once):
      np.testing.assert_array_equal(x[0], x[1])

  @parameterized.parameters("causal", "ranks_random")
  def test_vmap(self, mask):
    """A vmapped call and its gradients equal the calls one by one."""
    kernel, first = _call(Case(7, 9, mask=mask, dtype="float32"))
    _, second = _call(Case(7, 9, mask=mask, dtype="float32", seed=1))
    stacked = [
      x if x is None else np.stack([x, y]) for x, y in zip(first, second)
    ]
    axes = tuple(x if x is None else 0 for x in stacked)

    both = _both(kernel)
    got = jax.jit(jax.vmap(both, axes))(*stacked)
    for i, arrays in enumerate((first, second)):
      one = jax.tree.map(lambda x, i=i: x[i], got)
      chex.assert_trees_all_close(one, both(*arrays), atol=1e-6)

  @parameterized.parameters("causal", "groups", "ranks_random")
  def test_no_rank_is_promoted(self, mask):
    kernel, arrays = _call(Case(7, 9, mask=mask, dtype="float32"))
    with tiny.rank_promotion_raises():
      jax.eval_shape(_both(kernel), *arrays)

  def test_checkpoint(self):
    """Recomputed in the backward pass: the same gradients."""
    kernel, arrays = _call(Case(7, 9, mask="prompt", dtype="float32"))
    chex.assert_trees_all_close(
      *(_both(f)(*arrays) for f in (jax.checkpoint(kernel), kernel)), atol=1e-6
    )

  def test_shard_map(self):
    """Sequences and heads over four devices, in a process that has them."""
    subprocess.run(
      [sys.executable, __file__, "--on_four_devices"],
      env=helpers.environment(JAX_NUM_CPU_DEVICES="4"),
      check=True,
      timeout=120,
    )

  def test_a_model(self):
    """Through the chooser: logits and gradients of two streams."""
    B, T, V = 2, 7, 5
    slots = orders.to_slots(
      tiny.tokens(B, T, V),
      tiny.orders_of("two_stream", B, T),
      tiny.layout(1, V, T),
    )
    results = []
    for name in ("xla", "mosaic_tpu"):
      bind = tiny.make(attention=name)

      def loss(params, bind=bind):
        logits = bind.apply(params, slots)
        return (logits**2).mean(), logits

      params = tiny.sharp(bind)
      grad = jax.grad(loss, has_aux=True)
      results.append(jax.jit(grad)(params))
    chex.assert_trees_all_close(*results, atol=2e-4)


class LacksTest(parameterized.TestCase):
  def test_none_is_this_kernel_on_a_tpu(self):
    q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    half = jax.ShapeDtypeStruct(q.shape, jnp.float16)

    def program(x):
      return str(jax.make_jaxpr(pallas_kernels.any_order_attention)(x, x, x))

    mesh = jax.sharding.AbstractMesh(
      (1,),
      ("data",),
      abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
    )
    with jax.sharding.use_abstract_mesh(mesh):
      self.assertIn("any_order_attention_forward", program(q))
      self.assertNotIn("any_order_attention_forward", program(half))

  def test_the_platform(self):
    q, k, v = (np.ones((1, 4, 2, 8), np.float32) for _ in range(3))
    message = "'mosaic_tpu' does not support platform 'cpu' .tpu, or see"
    with (
      pallas_kernels.interpret(None),
      self.assertRaisesRegex(pallas_kernels.UnsupportedError, message),
    ):
      pallas_kernels.any_order_attention(q, k, v, implementation="mosaic_tpu")

  @parameterized.parameters(
    (dict(dtype=jnp.float16), r"float16 \(bfloat16 and float32 only\)"),
    (dict(H=272), r"H=272 \(up to 256\)"),
    (dict(T=200_000), r"`visible` with 76636 pairs of tiles \(32768 at most"),
    (dict(), ""),
  )
  def test_what_else(self, changes, message):
    given = dict(T=4, H=8, dtype=jnp.float32) | changes
    q = jax.ShapeDtypeStruct((1, given["T"], 2, given["H"]), given["dtype"])
    visible = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
    self.assertRegex(tpu.unsupported(q, q, visible, None), f"^{message}")
    self.assertEqual(bool(tpu.unsupported(q, q, visible, None)), bool(message))

  def test_causal_is_never_too_long(self):
    q = jax.ShapeDtypeStruct((1, 200_000, 2, 64), jnp.bfloat16)
    self.assertEqual(tpu.unsupported(q, q, None, None), "")


def on_four_devices():
  """What the process with four devices does."""
  assert jax.device_count() == 4
  mesh = jax.make_mesh(
    (2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  heads = jax.P("data", None, "heads")
  # Without ranks, tests/runs/mesh_test.py runs the kernel in a whole step.
  kernel, arrays = _call(
    Case(7, 9, N=2, mask="ranks_tied", dtype="float32", B=4)
  )
  rows = [None if x is None else jax.P("data") for x in arrays[3:]]
  # Not every step of the interpreter says over what it varies; tests/
  # tpu_compiler_test.py compiles the kernel with that check.
  sharded = jax.shard_map(
    kernel,
    mesh=mesh,
    in_specs=(heads,) * 3 + tuple(rows),
    out_specs=heads,
    check_vma=False,
  )
  want, got = (_both(f)(*arrays) for f in (kernel, sharded))
  chex.assert_trees_all_close(got, want, atol=1e-6)
  assert got[0].sharding.spec == heads, got[0].sharding
  with jax.set_mesh(mesh):
    unsupported = tpu.unsupported(*arrays[:2], *arrays[3:])
  assert "outside jax.shard_map" in unsupported, unsupported


if __name__ == "__main__":
  if sys.argv[1:] == ["--on_four_devices"]:
    with pallas_kernels.interpret(True):
      on_four_devices()
    sys.stdout.flush()
    os._exit(0)
  absltest.main()
