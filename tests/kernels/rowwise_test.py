"""The work on rows: plain JAX against float64, and the kernels against it.

The interpreter of Mosaic GPU needs a process of its own, see hopper_test.
"""

import functools
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import devices, rowwise
from pallas_kernels.hopper import mosaic, rows

_H200 = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
_ROOT = pathlib.Path(__file__).resolve().parents[2]


class _Case(NamedTuple):
  """A call. `turns` has a number of positions for each part, or None."""

  function: str
  shape: tuple[int, ...]
  turns: tuple[int | None, ...] = ()
  dtype: str = "bfloat16"
  epsilon: float = rowwise.EPSILON


_INTERPRETED = (
  _Case("norm", (3, 35, 256)),
  _Case("norm", (64, 64)),
  _Case("sum", (2, 33, 192), epsilon=3.0),
  _Case("heads", (2, 35, 3, 4, 64), (1, 1, None), epsilon=3.0),
  _Case("heads", (1, 70, 2, 3, 32), (2, 0)),
  _Case("heads", (1, 64, 1, 1, 128), (1,), "float16"),
  _Case("gelu", (70, 256)),
  # The width of the hidden units stands in the place of `turns`.
  _Case("mlp", (4, 98, 128), (384,)),
  # Two heads of 64 for each part.
  _Case("project", (2, 92, 128), (1, 1, None)),
  _Case("project", (1, 200, 64), (0,), epsilon=3.0),
)
# The width of the 8M model, in whole tiles: the rows that a last tile repeats
# are written twice, which counts as a race.
_WITHOUT_RACES = (
  _Case("mlp", (1, 448, 256), (128,)),
  _Case("project", (1, 448, 256), (1, None)),
)
_ON_GPU = (
  *(
    _Case(name, (B, T, D))
    for name in ("norm", "sum")
    for B, T, D in ((512, 128, 256), (3, 129, 768), (1, 64, 64), (7, 1001, 320))
  ),
  *(
    _Case("heads", (B, T, len(turns), N, H), turns)
    for turns in ((1, 1, None), (2,), (0, None))
    for B, T, N, H in (
      (512, 128, 4, 64),
      (3, 129, 12, 64),
      (1, 64, 3, 128),
      (5, 1001, 2, 32),
    )
  ),
  _Case("heads", (2, 300, 3, 2, 256), (1, 1, None), "float16"),
  *(_Case("gelu", shape) for shape in ((512, 128, 1024), (129, 3, 256))),
  *(
    _Case("mlp", (B, T, D), (F,))
    for B, T, D, F in (
      (512, 128, 256, 1024),
      (1, 128, 64, 128),
      (8, 1001, 192, 640),
      (8, 129, 256, 1024),
      (3, 129, 256, 1024),  # GELU on its own, since 387 is no multiple of 8.
      (2, 129, 768, 3072),  # GELU on its own.
    )
  ),
  *(
    _Case("project", (B, T, D), turns)
    for turns in ((1, 1, None), (1,), (0, None))
    for B, T, D in ((512, 128, 256), (8, 129, 192), (8, 1001, 64))
  ),
)


def _arrays(case):
  """Return (function of arrays and options, its arrays)."""
  function, arrays = _called(case)
  if case.function not in ("gelu", "mlp"):
    function = functools.partial(function, epsilon=case.epsilon)
  return function, arrays


def _called(case):
  keys = iter(jax.random.split(jax.random.key(0), 8))
  x = 2 * jax.random.normal(next(keys), case.shape, case.dtype)
  width = case.shape[-1]

  if case.function == "project":
    shape = width, len(case.turns), 2, 64
    weight = jax.random.normal(next(keys), shape, case.dtype) * width**-0.5
    width = 64

  def scale():
    return jax.random.uniform(next(keys), (width,), jnp.float32, 0.5, 2)

  match case.function:
    case "norm":
      return rowwise.rms_norm, (x, scale())
    case "sum":
      # Sums of few bits: plain JAX may leave their rounding out.
      update = jax.random.normal(next(keys), case.shape, case.dtype)
      x, update = (jnp.round(8 * y.clip(-7, 7)) / 8 for y in (x, update))
      return rowwise.rms_norm, (x, scale(), update)
    case "gelu":
      return rowwise.gelu, (x,)
    case "mlp":
      shapes = (width, case.turns[0]), (case.turns[0], width)
      weights = [
        jax.random.normal(next(keys), shape, case.dtype) * width**-0.5
        for shape in shapes
      ]
      return pallas_kernels.gelu_mlp, (x / 2, *weights)

  def rotation(K):
    if not K:
      return None
    shape = (*case.shape[:2], K)
    position = jax.random.randint(next(keys), shape, 0, 5000)
    return rowwise.rotation(position, width, 1e4)

  parts = [
    None if K is None else rowwise.Part(scale(), rotation(K))
    for K in case.turns
  ]
  if case.function == "project":
    return pallas_kernels.project_heads, (x, weight, parts)
  return rowwise.split_heads, (x, parts)


def _program(case, implementation, wide=False):
  """Return a jitted function without arguments, see `_results`."""
  function, arrays = _arrays(case)
  keys = iter(jax.random.split(jax.random.key(1), 8))

  def widen(x):
    return x.astype(jnp.float32) if x.dtype == case.dtype else x

  shapes = jax.eval_shape(
    lambda *a: function(*a, implementation="xla"), *arrays
  )
  weights = jax.tree.map(
    lambda x: jax.random.normal(next(keys), x.shape, x.dtype), shapes
  )
  if wide:
    arrays, weights = (jax.tree.map(widen, x) for x in (arrays, weights))

  def both(arrays, weights):
    values, pull = jax.vjp(
      lambda *a: function(*a, implementation=implementation), *arrays
    )
    return values, pull(weights)

  return functools.partial(jax.jit(both), arrays, weights)


def _results(case, implementation, wide=False):
  """Return (values, gradients of the arrays that have one in training)."""
  values, gradients = _program(case, implementation, wide)()
  gradients = [
    x
    for x in jax.tree.leaves(gradients)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  # Angles have no gradient in the kernels, and none in training.
  wanted = {case.shape, case.shape[-1:]}
  if case.function in ("mlp", "project"):
    weights = jax.tree.leaves(_arrays(case)[1])
    wanted |= {x.shape for x in weights if x.dtype == case.dtype} | {(64,)}
  return jax.tree.leaves(values), [x for x in gradients if x.shape in wanted]


def _check(case):
  """Each error is at most twice the one of plain JAX in the same dtype."""
  exact, plain, kernel = (
    _results(case, "xla", wide=True),
    _results(case, "xla"),
    _results(case, "mosaic_gpu"),
  )

  def error(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)

  names = "value", "gradient"
  for name, wanted, other, got in zip(names, exact, plain, kernel):
    for i, (x, y, z) in enumerate(zip(wanted, other, got, strict=True)):
      limit = 2 * error(y, x) + 1e-6
      assert error(z, x) <= limit, (case, name, i, error(z, x), limit)


def _kernels(case):
  """Return how many kernels both passes have when lowered for CUDA."""
  function, arrays = _arrays(case)

  def both(arrays):
    values, pull = jax.vjp(
      lambda *a: function(*a, implementation=None), *arrays
    )
    return pull(values)

  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=_H200)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(both).trace(arrays).lower(lowering_platforms=("cuda",))
  return lowered.as_text().count("custom_call @mosaic_gpu")


class RowwiseTest(parameterized.TestCase):
  def test_plain_norm_of_float64(self):
    x, update = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    scale = np.linspace(0.5, 2, 7)
    with jax.enable_x64(True):
      y, normed = rowwise.rms_norm(jnp.asarray(x), jnp.asarray(scale), update)
    total = x + update
    root = np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, total, rtol=1e-15)
    np.testing.assert_allclose(normed, total / root * scale, rtol=1e-14)

  def test_plain_gelu_of_float64(self):
    x = np.linspace(-6, 6, 101)
    with jax.enable_x64(True):
      got = rowwise.gelu(jnp.asarray(x))
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    wanted = x * 0.5 * (1 + np.tanh(u))
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-15)

  def test_heads_turn_by_their_positions(self):
    """The product of two rotated heads depends on the distance alone."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 1, 8))
    x = jnp.broadcast_to(x[:, :1], x.shape)  # The same heads in every row.
    scale = jnp.ones(8)
    query, key = (
      jnp.asarray(p)[None, :, None] for p in ([3, 5, 9, 0], [1, 3, 7, 0])
    )
    parts = [
      rowwise.Part(scale, rowwise.rotation(p, 8, 1e4)) for p in (query, key)
    ]
    q, k = rowwise.split_heads(x, parts)
    products = jnp.sum(q * k, axis=-1)[0, :, 0]
    np.testing.assert_allclose(products[1:3], products[0], rtol=1e-5)
    self.assertGreater(abs(products[3] - products[0]), 1e-3)

  def test_heads_without_a_norm_are_only_rotated(self):
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 3, 8))
    by = rowwise.rotation(jnp.arange(4)[None, :, None], 8, 1e4)
    parts = [rowwise.Part(None, by), rowwise.Part(None, None)]
    turned, same = rowwise.split_heads(x, parts)
    np.testing.assert_array_equal(turned, rowwise.rotate(x[:, :, 0], by))
    np.testing.assert_array_equal(same, x[:, :, 1])

  def test_factors_of_frequencies(self):
    position = jnp.arange(4)[None, :, None]
    plain = rowwise.rotation(position, 4, 100.0)
    slow = rowwise.rotation(position, 4, 100.0, jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(slow.frequency, [0.5, 0.025], rtol=1e-6)
    np.testing.assert_allclose(
      slow.cos[0, 2, 0, 0], plain.cos[0, 1, 0, 0], rtol=1e-6
    )

  @parameterized.parameters(
    ("mosaic_gpu", "bfloat16", 64, "device 'cpu' .NVIDIA Hopper only"),
    ("mosaic_gpu", "float32", 64, "float32 .bfloat16 and float16 only"),
  )
  def test_it_says_what_it_lacks(self, name, dtype, D, message):
    x = jnp.zeros((64, D), dtype)
    with self.assertRaisesRegex(
      pallas_kernels.UnsupportedError, f"rms_norm '{name}' does not .*{message}"
    ):
      rowwise.rms_norm(x, jnp.ones(D), implementation=name)

  def test_an_unknown_name(self):
    with self.assertRaisesRegex(
      ValueError, "'cuda'; there are: xla, mosaic_gpu"
    ):
      rowwise.gelu(jnp.zeros(3), implementation="cuda")


class LoweringTest(parameterized.TestCase):
  @parameterized.parameters(
    _Case("norm", (16, 128, 256)),
    _Case("sum", (17, 129, 768)),
    _Case("heads", (16, 129, 3, 4, 64), (1, 1, None)),
    _Case("heads", (16, 128, 2, 3, 128), (2, None)),
    _Case("gelu", (16, 128, 1024)),
    _Case("mlp", (16, 129, 256), (1024,)),
    _Case("mlp", (16, 129, 768), (3072,)),  # GELU on its own.
    _Case("project", (16, 129, 256), (1, None)),
    _Case("project", (16, 129, 768), (1, None)),
  )
  def test_one_kernel_for_each_pass(self, *case):
    self.assertEqual(_kernels(_Case(*case)), 2)

  @parameterized.parameters(
    _Case("norm", (16, 128, 100)),  # No width of the kernels.
    _Case("heads", (16, 128, 1, 4, 80), (1,)),
    _Case("gelu", (16, 128, 1), (), "float32"),
    _Case("norm", (2, 128, 256)),  # Few rows.
  )
  def test_the_rest_is_plain(self, *case):
    self.assertEqual(_kernels(_Case(*case)), 0)

  @parameterized.parameters("heads", "project")
  def test_heads_without_a_norm_are_plain(self, function):
    part = rowwise.Part

    def unnormed(scale, by):
      return part(None, by)

    shape = (16, 128, 2, 4, 64) if function == "heads" else (16, 128, 256)
    case = _Case(function, shape, (1, None))
    self.assertEqual(_kernels(case), 2)
    with mock.patch.object(rowwise, "Part", unnormed):
      self.assertEqual(_kernels(case), 0)


@pytest.mark.skipif(
  not hasattr(mosaic.plgpu, "InterpretGPUParams"), reason="no interpreter"
)
class InterpretedTest(absltest.TestCase):
  def test_numbers(self):
    self.check(_INTERPRETED)

  @pytest.mark.slow
  def test_races(self):
    self.check(_WITHOUT_RACES, "races")

  def check(self, cases, *arguments):
    run = subprocess.run(
      [sys.executable, __file__, *arguments],
      env=dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(_ROOT)),
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    self.assertEqual(run.stdout, f"{len(cases)} cases\n", run.stderr)


@pytest.mark.gpu
class GpuTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (str(i), case) for i, case in enumerate(_ON_GPU)
  )
  def test_numbers(self, case):
    _check(case)

  @parameterized.parameters(
    _Case("sum", (64, 128, 256)),
    _Case("heads", (64, 128, 3, 4, 64), (1, 1, None)),
    _Case("gelu", (64, 128, 1024)),
    _Case("mlp", (64, 128, 256), (1024,)),
    _Case("project", (64, 128, 256), (1, 1, None)),
  )
  def test_a_hundred_times_the_same_bits(self, *case):
    program = _program(_Case(*case), "mosaic_gpu")
    first = jax.tree.leaves(program())
    for _ in range(99):
      for x, y in zip(first, jax.tree.leaves(program())):
        np.testing.assert_array_equal(x, y)


def _interpret(cases, **options):
  """Check cases in this process, and print how many."""
  # Three thread blocks, so that each has several tiles.
  rows.block_count = lambda rows, size, *_: min(-(-rows // size), 3)
  devices.of = lambda *_: devices.Device("gpu", "NVIDIA H200", "9.0", 2)
  with mosaic.interpreted(**options):
    for case in cases:
      _check(case)
  print(f"{len(cases)} cases")


if __name__ == "__main__":
  if sys.argv[1:] == ["races"]:
    _interpret(_WITHOUT_RACES, detect_races=True)
  else:
    _interpret(_INTERPRETED)
