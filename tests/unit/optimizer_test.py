"""Schedule, decay mask, AdamW and EMA by their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config
from aoarm_jax.training import optimizer

_PEAK, _WARMUP, _STEPS, _LAST = 0.5, 10, 110, 0.1


def _options(**overrides):
  options = dict(
    peak_learning_rate=_PEAK,
    warmup_steps=_WARMUP,
    final_share=_LAST,
    decay_steps=40,
  )
  return config.Optimizer(**options | overrides)


def _rates(steps=_STEPS, **overrides):
  """Learning rates of steps 0 .. steps."""
  schedule = optimizer.schedule(_options(**overrides), steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps + 1)))


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters("cosine", "constant", "stable_decay")
  def test_warmup_is_linear_and_ends_at_the_peak(self, schedule):
    """The first step moves already; step warmup - 1 is at the peak."""
    rates = _rates(schedule=schedule)
    ramp = _PEAK * np.arange(1, _WARMUP + 1) / _WARMUP
    np.testing.assert_allclose(rates[:_WARMUP], ramp, rtol=1e-5)
    np.testing.assert_allclose(rates[_WARMUP], _PEAK, rtol=1e-6)
    self.assertEqual(rates.argmax(), _WARMUP - 1)

  @parameterized.product(
    schedule=("cosine", "constant", "stable_decay"), warmup=(0, 1)
  )
  def test_without_a_ramp_the_first_step_is_at_the_peak(self, schedule, warmup):
    rates = _rates(schedule=schedule, warmup_steps=warmup)
    np.testing.assert_allclose(rates[:2].max(), _PEAK, rtol=1e-6)
    np.testing.assert_allclose(rates[0], _PEAK, rtol=1e-6)

  def test_cosine(self):
    rates, done = _rates(), np.arange(_STEPS - _WARMUP + 1)
    cosine = 0.5 * (1 + np.cos(np.pi * done / (_STEPS - _WARMUP)))
    want = _PEAK * (_LAST + (1 - _LAST) * cosine)
    np.testing.assert_allclose(rates[_WARMUP:], want, rtol=1e-5)
    np.testing.assert_allclose(rates[_STEPS], _PEAK * _LAST, rtol=1e-5)
    # The last step that is taken is the one before.
    self.assertGreater(rates[_STEPS - 1], rates[_STEPS])

  def test_constant(self):
    np.testing.assert_allclose(_rates(schedule="constant")[_WARMUP:], _PEAK)

  def test_stable_decay(self):
    """The peak up to the last decay_steps, then a line to the last rate."""
    rates = _rates(schedule="stable_decay")
    np.testing.assert_allclose(rates[_WARMUP : _STEPS - 39], [_PEAK] * 61)
    line = _PEAK * np.linspace(1, _LAST, 41)
    np.testing.assert_allclose(rates[_STEPS - 40 :], line, rtol=1e-5)

  def test_stable_decay_prolonged_keeps_the_steps_taken(self):
    short = _rates(schedule="stable_decay")
    long = _rates(steps=2 * _STEPS, schedule="stable_decay")
    before = _STEPS - 40 + 1
    np.testing.assert_array_equal(short[:before], long[:before])
    self.assertLess(short[before], long[before])


class ChainTest(parameterized.TestCase):
  @parameterized.parameters(*tiny.MECHANISMS)
  def test_matrices_decay_and_vectors_do_not(self, mechanism):
    bind = tiny.make(mechanism)
    mask = optimizer.decay_mask(bind.axes)
    jax.tree.map(lambda *_: None, mask, bind.abstract_params)  # One structure.
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
      vector = path[-1].key in ("scale", "query_start", "copy_start", "bias")
      self.assertEqual(decays, not vector, path)
    self.assertTrue(mask["embedding"] and mask["head"])
    self.assertTrue(mask["blocks"]["attention"]["query"])
    self.assertFalse(mask["blocks"]["attention"]["query_norm"]["scale"])

  def test_the_matrices_of_a_gated_mlp_decay(self):
    mask = optimizer.decay_mask(tiny.make(**tiny.GROUPED).axes)["blocks"]
    self.assertEqual(mask["mlp"], dict(gate=True, up=True, down=True))
    self.assertTrue(mask["attention"]["key"])

  def test_biases_do_not_decay(self):
    mask = optimizer.decay_mask(tiny.make(**tiny.LEARNED).axes)
    for names in (
      mask["blocks"]["attention"]["biases"],
      mask["blocks"]["mlp"]["biases"],
    ):
      self.assertFalse(any(names.values()))
    self.assertEqual(mask["norm"], dict(scale=False, bias=False))
    self.assertTrue(mask["start"]["added"])

  @parameterized.parameters(0.7, 1e6)
  def test_three_steps_of_adamw(self, clip_norm):
    """Clip by the global norm, Adam, decay apart from it, learning rate."""
    options = _options(
      clip_norm=clip_norm, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3
    )
    axes = {"w": ("embed", "hidden"), "scale": ("vector",)}
    schedule = optimizer.schedule(options, _STEPS)
    chain = optimizer.make(options, schedule, axes)
    generator = np.random.default_rng(0)
    params = {"w": generator.normal(size=(3, 5)), "scale": np.ones(5)}
    want = {k: v.copy() for k, v in params.items()}
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    params = jax.tree.map(jnp.float32, params)
    state = chain.init(params)
    for n in range(1, 4):
      gradients = {k: generator.normal(size=v.shape) for k, v in want.items()}
      updates, state = chain.update(
        jax.tree.map(jnp.float32, gradients), state, params
      )
      params = optax.apply_updates(params, updates)
      norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
      rate = _PEAK * n / _WARMUP
      for k, g in gradients.items():
        g = g * min(1.0, clip_norm / norm)
        first[k] = 0.8 * first[k] + 0.2 * g
        second[k] = 0.9 * second[k] + 0.1 * g**2
        root = np.sqrt(second[k] / (1 - 0.9**n)) + 1e-3
        step = first[k] / (1 - 0.8**n) / root
        decay = 0.3 * want[k] if k == "w" else 0.0
        want[k] = want[k] - rate * (step + decay)
    for k, value in want.items():
      np.testing.assert_allclose(params[k], value, atol=1e-5)


class EMATest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 0.9, 0.1), (8, 0.9, 0.5), (80, 0.9, 0.9), (10**6, 0.999, 0.999)
  )
  def test_formula(self, step, decay, d):
    ema, params = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 0.0])}
    new = optimizer.update_ema(ema, params, jnp.int32(step), decay)
    want = d * np.array([1.0, -2.0]) + (1 - d) * np.array([3.0, 0.0])
    np.testing.assert_allclose(new["w"], want, rtol=1e-5)

  def test_a_constant_is_its_own_average(self):
    params = {"w": jnp.array([3.0, 0.1])}
    new = optimizer.update_ema(params, params, jnp.int32(5), 0.99)
    np.testing.assert_array_equal(new["w"], params["w"])


if __name__ == "__main__":
  absltest.main()
