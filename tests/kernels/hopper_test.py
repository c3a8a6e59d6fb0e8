"""Hopper kernels: lowering anywhere, numbers in the interpreter or on a GPU.

The interpreter of Mosaic GPU (JAX 0.11 and newer) runs the threads of a block
on the threads of JAX's CPU client, and needs as many: a process of its own.
"""

import itertools
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import devices, tuning
from pallas_kernels.hopper import attention as hopper
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_Case = attention_cases.Case
_MASKS = ("causal", "prompt", "groups", "ragged", "empty")
_INTERPRETED = {
  # Both kinds of kernels; the rest takes minutes.
  "some": [
    _Case(65, 65, B=1, mask="groups", lse_cotangent=True),
    _Case(150, 140, B=1, mask="empty"),
    # Few rows of a group are one tile, and the slots are split.
    _Case(3, 520, B=1, mask="empty"),
    # Read as two devices have them.
    _Case(65, 256, B=1, mask="groups", P=2),
  ],
  # One warpgroup forward; one kernel backward.
  "short": [
    *(_Case(128, 128, mask=mask) for mask in _MASKS),
    _Case(64, 64, group=1, lse_cotangent=True),
    _Case(65, 65, N=3),
    _Case(100, 128, mask="empty", lse_cotangent=True),
    _Case(1, 63, group=4),
    _Case(97, 40, H=32),
    _Case(65, 40, B=1, H=44),
    _Case(128, 128, logits=100.0),
    _Case(128, 128, constant_v=True),
  ],
  # Rings of tiles; two kernels backward.
  "long": [
    *(_Case(200, 200, mask=mask) for mask in _MASKS),
    _Case(200, 200, N=3, group=1),
    _Case(520, 520, B=1, mask="groups", lse_cotangent=True),
    _Case(200, 328, group=4, mask="prompt"),
    _Case(200, 129),
    _Case(16, 1100, group=4, mask="ragged"),
    _Case(130, 384, N=2, mask="ragged", P=3),
    _Case(3, 512, mask="empty", P=2),
    _Case(65, 200, mask="groups", P=2),  # Chunks that no tiles fit.
  ],
  "wide": [
    _Case(65, 65, H=128),
    _Case(65, 65, H=96),
    _Case(130, 200, B=1, H=80, mask="groups"),
    _Case(200, 200, H=128, mask="empty", lse_cotangent=True),
    _Case(200, 200, H=128, constant_v=True),
    _Case(330, 330, H=128, B=1, group=3),
  ],
}
_ON_GPU = [
  *(
    _Case(T, T, N=N, group=group, H=H)
    for T in (1, 2, 63, 64, 65, 97, 128, 200, 1000, 1024)
    for N, group, H in ((1, 2, 64), (3, 1, 128), (1, 4, 32), (3, 2, 128))
  ),
  *(
    _Case(T, S, mask=mask, H=H, lse_cotangent=True)
    for T, S in ((128, 128), (200, 200), (1000, 1024), (65, 1), (1, 1000))
    for mask in _MASKS
    for H in (64, 128)
  ),
  *(
    _Case(T, S, N=3, group=group, mask=mask, H=H)
    for T, S, group in ((1, 1000, 2), (16, 1024, 2), (16, 5000, 4), (2, 97, 1))
    for mask in ("ragged", "empty")
    for H in (64, 128)
  ),
  *(
    _Case(S // P, S, N=3, mask=mask, H=H, P=P, lse_cotangent=True)
    for S, P in ((512, 2), (1024, 2), (3072, 3), (1024, 8))
    for mask in ("causal", "ragged", "groups")
    for H in (64, 128)
  ),
  *(_Case(16, S, mask="ragged", P=2) for S in (1024, 4096)),
  *(
    _Case(T, T, N=3, mask=mask, H=H, lse_cotangent=True)
    for T in (65, 128, 200, 1024)
    for mask in ("causal", "groups")
    for H in (16, 40, 48, 80, 96, 112)
  ),
  *(_Case(T, T, logits=100.0) for T in (128, 1024)),
  *(_Case(T, T, constant_v=True) for T in (128, 1024)),
]


def _shapes(T, S, N=2, group=2, H=64, dtype=jnp.bfloat16, B=2):
  return (
    jax.ShapeDtypeStruct((B, T, N * group, H), dtype),
    jax.ShapeDtypeStruct((B, S, N, H), dtype),
    jax.ShapeDtypeStruct((B, S, N, H), dtype),
  )


def _loss(q, k, v, visible=None, config=None):
  out, lse = hopper.attention(q, k, v, visible, None, 0.1, config)
  return out.astype(jnp.float32).sum() + lse.sum()


def _check(kernel, case):
  """With gradients, which save more in the forward pass, and without."""
  kernel = attention_cases.dealt(kernel, case.P)
  got = attention_cases.run(kernel, case)
  attention_cases.check(got, case)
  q, k, v, visible, key_rank, scale, *_ = attention_cases.inputs(case)
  plain = jax.jit(lambda *arrays: kernel(*arrays, key_rank, scale))
  out, lse = (np.asarray(x) for x in plain(q, k, v, visible))
  attention_cases.check(got._replace(out=out, lse=lse), case)


def _kernels(function, *shapes) -> int:
  """How many Mosaic GPU kernels the function has when lowered for CUDA."""
  lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
  return lowered.as_text().count("custom_call @mosaic_gpu")


# (T, S, H): one kernel makes all gradients, or two do; whole tiles, and others.
_SIZES = (
  (128, 128, 64),
  (128, 128, 128),
  (1024, 1024, 64),
  (1024, 1024, 128),
  (65, 65, 64),
  (100, 100, 80),
  (200, 300, 128),
  (5, 7, 32),
  (1, 1000, 64),
)
# The slots that a row sees: as many as its index, a number for each row, and
# for each stream. Sizes have them in turn.
_VISIBLE = ("streams", "causal", "rows")
_LOWERED = tuple((sizes, _VISIBLE[i % 3]) for i, sizes in enumerate(_SIZES))


class LoweringTest(parameterized.TestCase):
  @parameterized.parameters(*_LOWERED)
  def test_every_size_and_mask(self, sizes, kind):
    self.check_lowering(*sizes, kind)

  @parameterized.parameters(
    *sorted({*itertools.product(_SIZES, _VISIBLE)} - {*_LOWERED})
  )
  @pytest.mark.slow
  def test_other_pairs_of_size_and_mask(self, sizes, kind):
    self.check_lowering(*sizes, kind)

  def check_lowering(self, T, S, H, kind):
    """Forward and backward: 2 kernels where one makes all gradients, or 3."""
    shapes = _shapes(T, S, H=H)
    gradient = jax.grad(_loss, (0, 1, 2))
    number = 2 if S in (7, 65, 100, 128) else 3
    rows = {"causal": None, "rows": (2, T), "streams": (2, T, 2)}[kind]
    visible = rows and jax.ShapeDtypeStruct(rows, jnp.int32)
    self.assertEqual(_kernels(gradient, *shapes, visible), number)

  @parameterized.parameters((1024, 128, 4, True), (512, 64, 8, False))
  def test_dealt_out_keys_are_not_moved(self, S, H, P, in_place):
    self.check_dealt(S, H, P, in_place)

  @parameterized.parameters(
    (768, 64, 3, True), (1024, 32, 2, True), (1024, 40, 2, False)
  )
  @pytest.mark.slow
  def test_more_keys_that_are_dealt_out(self, S, H, P, in_place):
    self.check_dealt(S, H, P, in_place)

  def check_dealt(self, S, H, P, in_place):
    """Unless a tile of them had slots of two chunks, or must be padded."""
    q, k, v = _shapes(S // P, S, H=H)
    k, v = (
      jax.ShapeDtypeStruct((P, 2, S // P, *x.shape[2:]), x.dtype)
      for x in (k, v)
    )
    text = str(jax.make_jaxpr(jax.grad(_loss, (0, 1, 2)))(q, k, v))
    self.assertEqual("concatenate" not in text, in_place)
    self.assertEqual(_kernels(jax.grad(_loss, (0, 1, 2)), q, k, v), 3)

  @parameterized.parameters(
    (129, 64, True),
    (130, 32, True),
    (128, 80, True),
    (1024, 96, True),
    (129, 128, False),
    (128, 40, False),
  )
  def test_nothing_is_padded(self, T, H, in_place):
    """Unless H is no multiple of 16, or T none of 8 for heads of many tiles."""
    gradient = jax.grad(_loss, (0, 1, 2))
    text = str(jax.make_jaxpr(gradient)(*_shapes(T, T, H=H)))
    self.assertEqual(not re.findall(r"bf16\S+ = pad\[", text), in_place)

  @parameterized.parameters(1, 3, 4)
  def test_groups(self, group):
    gradient = jax.grad(_loss, (0, 1, 2))
    self.assertEqual(_kernels(gradient, *_shapes(128, 128, group=group)), 2)

  def test_transformations(self):
    """vmap adds to the grid; a checkpoint runs the forward kernel again."""
    gradient = jax.grad(_loss, (0, 1, 2))
    shapes = _shapes(128, 128)
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes]
    self.assertEqual(_kernels(jax.vmap(gradient), *stacked), 2)
    checkpointed = jax.grad(jax.checkpoint(_loss), (0, 1, 2))
    self.assertEqual(_kernels(checkpointed, *shapes), 2)

  @parameterized.parameters(((), 128, 2), ((2,), 256, 3))
  def test_shard_map(self, groups, S, number):
    self.check_shard_map(groups, S, number)

  @pytest.mark.slow
  def test_shard_map_of_causal_rows(self):
    self.check_shard_map(None, 256, 3)

  def check_shard_map(self, groups, S, number):
    """Over batch and heads, with types that say what varies; gradients too."""
    kind = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), kind)
    heads = jax.sharding.PartitionSpec("data", None, "model")
    counts = jax.sharding.PartitionSpec("data")
    attend = jax.shard_map(
      lambda *arrays: hopper.attention(*arrays, None, 0.1)[0],
      mesh=mesh,
      in_specs=(*(heads,) * 3, None if groups is None else counts),
      out_specs=heads,
    )

    def loss(*arrays):
      return attend(*arrays).astype(jnp.float32).sum()

    visible = groups
    if groups is not None:
      visible = jax.ShapeDtypeStruct((2, S, *groups), jnp.int32)
    arrays = (*_shapes(S, S), visible)
    self.assertEqual(_kernels(attend, *arrays), 1)
    self.assertEqual(_kernels(jax.grad(loss, (0, 1, 2)), *arrays), number)

  def test_integers_of_64_bits(self):
    gradient = jax.grad(_loss, (0, 1, 2))
    with jax.enable_x64(True):
      for S, number, visible in (
        (128, 2, None),
        (256, 3, jax.ShapeDtypeStruct((2, 256), jnp.int64)),
      ):
        arrays = (*_shapes(S, S), visible)
        self.assertEqual(_kernels(gradient, *arrays), number)


class LacksTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("rank", dict(dtype=jnp.bfloat16), True, "`key_rank`"),
    ("dtype", dict(dtype=jnp.float32), False, "float32 .bfloat16 and float16"),
    (
      "head",
      dict(H=136),
      False,
      r"H=136 \(up to 128\); this call is supported by 'blockwise', 'xla'$",
    ),
    ("platform", dict(), False, r"device 'cpu' \(NVIDIA Hopper only\)"),
  )
  def test_it_says_what_it_lacks(self, options, ranks, message):
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in _shapes(7, 7, **options))
    visible, key_rank = None, None
    if ranks:
      visible, key_rank = (np.ones(q.shape[:2], np.int32) for _ in range(2))
    message = "attention 'mosaic_gpu' does not support " + message
    with self.assertRaisesRegex(pallas_kernels.UnsupportedError, message):
      pallas_kernels.any_order_attention(
        q, k, v, visible, key_rank=key_rank, implementation="mosaic_gpu"
      )

  def test_a_hopper_is_supported(self):
    device = mock.Mock(compute_capability="9.0", core_count=114)
    with mock.patch.object(jax, "local_devices", return_value=[device]):
      q, k, _ = _shapes(128, 128)
      self.assertEqual(hopper.unsupported(q, k, None, None), "")
      self.assertEqual(devices.of(q, k).cores, 114)


class ActiveTest(absltest.TestCase):
  def test_units_that_see_a_block_come_first(self):
    visible = np.zeros((1, 256), np.int32)
    visible[0, 70], visible[0, 200] = 129, 5
    summary = hopper_masks.summarize(jnp.asarray(visible), 200)
    order, count = hopper_masks.active(summary, 200, 128, 2)
    self.assertEqual(count.tolist(), [[4, 2]])
    self.assertEqual(order[0, 0, :4].tolist(), [2, 3, 6, 7])
    self.assertEqual(order[0, 1, :2].tolist(), [2, 3])


@pytest.mark.skipif(
  not hasattr(mosaic.plgpu, "InterpretGPUParams"), reason="no interpreter"
)
class InterpretedTest(parameterized.TestCase):
  def test_numbers_and_races(self):
    self.check_numbers_and_races("some")

  @parameterized.parameters("short", "long", "wide")
  @pytest.mark.slow
  def test_more_numbers_and_races(self, name):
    self.check_numbers_and_races(name)

  def check_numbers_and_races(self, name):
    """All results and gradients, with memory poisoned; no race is found."""
    output = _child(name)
    ending = f"{len(_INTERPRETED[name])} cases\n"
    self.assertTrue(output.endswith(ending), output[-4000:])
    self.assertNotIn("RACE DETECTED", output)

  def test_a_missing_fence_is_found(self):
    self.assertIn("RACE DETECTED", _child("long", "unfenced"))


def _child(*arguments) -> str:
  """Output and errors of this file as a program; JAX 0.12 raises at a race."""
  environment = dict(
    os.environ, JAX_PLATFORMS="cpu", NPROC="8", PYTHONPATH=str(_ROOT)
  )
  run = subprocess.run(
    [sys.executable, __file__, *arguments],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=500,
    check=False,
  )
  return run.stdout


def _interpret(name, unfenced=False):
  """Checks the cases of a name in this process; prints how many."""
  config = tuning.Hopper(keys=64, query_keys=64, blocks=2, fused_stages=3)

  def kernel(*arguments):
    return hopper.attention(*arguments, config)

  cases = _INTERPRETED[name][:1] if unfenced else _INTERPRETED[name]
  with mosaic.interpreted(detect_races=True):
    for case in cases:
      _check(kernel, case)
  print(f"{len(cases)} cases")


@pytest.mark.gpu
class GpuTest(parameterized.TestCase):
  @parameterized.named_parameters((str(case), case) for case in _ON_GPU)
  def test_numbers(self, case):
    _check(hopper.attention, case)

  @parameterized.parameters(128, 1024)
  def test_a_hundred_times_the_same_bits(self, T):
    case = _Case(T, T, N=3, mask="groups", lse_cotangent=True)
    run = attention_cases.program(
      hopper.attention, attention_cases.inputs(case)
    )
    first = run()
    for _ in range(99):
      again = run()
      for name in first._fields:
        np.testing.assert_array_equal(
          getattr(first, name), getattr(again, name), name
        )

  @parameterized.product(T=(100, 200), mask=("causal", "groups"))
  def test_vmap(self, T, mask):
    """Three batches of two are one of six: the same bits, and gradients."""
    given = attention_cases.inputs(_Case(T, T, B=6, mask=mask))
    arrays = (*given[:3], given.visible)

    def both(q, k, v, visible):
      out = hopper.attention(q, k, v, visible, None, 0.1)[0]
      return out, jax.grad(_loss, (0, 1, 2))(q, k, v, visible)

    stacked = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), arrays)
    wanted, got = jax.jit(both)(*arrays), jax.jit(jax.vmap(both))(*stacked)
    got = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), got)
    np.testing.assert_array_equal(got[0], wanted[0])
    for one, other in zip(*(map(np.float32, x[1]) for x in (wanted, got))):
      error = np.linalg.norm(one - other)  # XLA sums some numbers between.
      self.assertLess(error, 1e-3 * np.linalg.norm(one))


if __name__ == "__main__":
  if len(sys.argv) > 2:
    with mock.patch.object(mosaic.plgpu, "commit_smem"):
      _interpret(sys.argv[1], unfenced=True)
  else:
    _interpret(sys.argv[1])
