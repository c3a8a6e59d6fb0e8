"""The TPU kernel through the real TPU compiler, without a TPU.

Needs libtpu (the extra `tpu`): python -m pytest -n 0 -m tpu_compiler
"""

import importlib.util
import os
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import topologies

import pallas_kernels
from pallas_kernels.tpu import attention as tpu

_CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_MASKS = ("causal", "visible", "ranks")
_LENGTHS, _WIDTHS = (128, 1024, 8192), (64, 128)


class TpuCompilerTest(parameterized.TestCase):
  @parameterized.parameters(*_CHIPS)
  @pytest.mark.tpu_compiler
  def test_forward_and_backward_compile(self, chip):
    """In a process of its own: the compiler may crash, and it holds a lock."""
    if importlib.util.find_spec("libtpu") is None:
      self.skipTest("libtpu is not installed: pip install -e '.[tpu]'")
    done = subprocess.run(
      [sys.executable, __file__, "--compile", chip],
      env=helpers.environment(TPU_SKIP_MDS_QUERY="1"),
      stdout=subprocess.PIPE,
      text=True,
      check=True,
      timeout=900,
    ).stdout.splitlines()
    shapes = len(_LENGTHS) * len(_WIDTHS) * len(_MASKS) + 3
    self.assertLen([line for line in done if line.startswith("ok")], shapes)


def _arguments(B, T, S, N, group, H, dtype, mask, sharding):
  """Abstract (q, k, v, visible, key_rank, cotangents) on a topology."""

  def shape(*dims, dtype=dtype, heads=True):
    spec = sharding(heads) if callable(sharding) else sharding
    return jax.ShapeDtypeStruct(dims, dtype, sharding=spec)

  q, k = shape(B, T, N * group, H), shape(B, S, N, H)
  visible = key_rank = None
  if mask != "causal":
    visible = shape(B, T, group, dtype=jnp.int32, heads=False)
  if mask == "ranks":
    key_rank = shape(B, S, dtype=jnp.int32, heads=False)
  lse = shape(B, T, N * group, dtype=jnp.float32)
  return q, k, k, visible, key_rank, (q, lse)


def _both(q, k, v, visible, key_rank, cotangents):
  def forward(q, k, v):
    return tpu.attention(q, k, v, visible, key_rank, q.shape[-1] ** -0.5)

  out, pull = jax.vjp(forward, q, k, v)
  return out, pull(cotangents)


def _compile(function, arguments):
  """Compiles, and sees to it that two kernels are in the program."""
  compiled = jax.jit(function).lower(*arguments).compile()
  assert compiled.as_text().count('"tpu_custom_call"') >= 2


def compile_all(chip):
  """What the child process does; prints a line for every program."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=_CHIPS[chip]
  ).devices
  one = jax.sharding.SingleDeviceSharding(devices[0])
  bfloat16, float32 = jnp.bfloat16, jnp.float32
  shapes = [
    (2, T, T, 4, 2, H, bfloat16, mask)
    for T in _LENGTHS
    for H in _WIDTHS
    for mask in _MASKS
  ]
  shapes += [
    (2, 200, 97, 3, 2, 32, float32, "ranks"),
    (2, 1, 1000, 1, 1, 64, bfloat16, "visible"),
  ]
  for shape in shapes:
    _compile(_both, _arguments(*shape, one))
    print("ok", chip, *shape[:6], jnp.dtype(shape[6]).name, shape[7])
  mesh = jax.sharding.Mesh(
    [devices[:2], devices[2:]],
    ("data", "heads"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  rows, heads = jax.P("data"), jax.P("data", None, "heads")

  def spread(has_heads):
    return jax.NamedSharding(mesh, heads if has_heads else rows)

  sharded = jax.shard_map(
    _both,
    mesh=mesh,
    in_specs=(heads, heads, heads, rows, rows, heads),
    out_specs=heads,
  )
  shape = 4, 1024, 1024, 4, 2, 64, bfloat16, "ranks"
  _compile(sharded, _arguments(*shape, spread))
  print("ok", chip, "sharded", *shape[:6])


if __name__ == "__main__":
  if sys.argv[1:2] == ["--compile"]:
    with pallas_kernels.interpret(False):
      compile_all(sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
  absltest.main()
