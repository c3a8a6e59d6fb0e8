"""Masked mechanisms: two estimators of one likelihood, and their samplers."""

import functools
import itertools
import math
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective, orders
from aoarm_jax.generation import diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib

_T, _V, _LONG, _MANY = 4, 3, 6, 40_000
_PLAIN = sampling.Sampling(np.float32(1), np.int32(0), np.float32(1))


def _bind(s, T=_T):
  return tiny.make("mdlm", s, T=T, V=_V, D=8, N=2)


@functools.cache
def _masked_nll(s, T=_T):
  """Jitted (tokens, masked) -> nats by position."""
  made = _bind(s, T)
  params = tiny.sharp(made)
  run = tiny.quick_jit(
    lambda tokens, masked: objective.masked_nll(
      made.bind(params), made.layout, tokens, masked
    )
  )
  return lambda *args: np.asarray(run(*args), np.float64)


@functools.cache
def _chain(s):
  """Jitted (tokens, order) -> nats by rank."""
  made = _bind(s)
  params = tiny.sharp(made)
  run = tiny.quick_jit(
    lambda tokens, order: objective.order_nll(
      made.bind(params), made.layout, tokens, order
    )
  )
  return lambda *args: np.asarray(run(*args), np.float64)


def _texts_and_orders():
  texts, every = tiny.all_sequences(_V, _T), tiny.all_orders(_T)
  return np.tile(texts, (len(every), 1)), np.repeat(every, len(texts), axis=0)


class LikelihoodTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_the_law_of_every_order_sums_to_one(self, s):
    p = np.exp(-_chain(s)(*_texts_and_orders()).sum(axis=1)).reshape(24, -1)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    self.assertGreater(p.max(), 4 / _V**_T)

  @parameterized.parameters(1, 2)
  def test_a_rank_is_conditioned_on_what_came_before(self, s):
    """The chain rule, rank by rank, from masks laid out by hand."""
    tokens, order = tiny.tokens(3, _T, _V), tiny.orders_of("mdlm", 3, _T)
    by_rank = _chain(s)(tokens, order)
    for r in range(_T):
      masked = np.ones((3, _T), bool)
      np.put_along_axis(masked, order[:, :r] - 1, False, axis=1)
      nats = _masked_nll(s)(tokens, masked)
      want = np.take_along_axis(nats, order[:, r : r + 1] - 1, axis=1)[:, 0]
      np.testing.assert_allclose(by_rank[:, r], want, atol=1e-5)

  @parameterized.parameters(1, 2)
  def test_masked_tokens_are_not_seen(self, s):
    """Bitwise; and those that are not masked move every masked position."""
    tokens = tiny.tokens(3, _T, _V)
    masked = np.array([[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]], bool)
    made = _bind(s)
    params = tiny.sharp(made)
    logits = jax.jit(
      lambda tokens: made.apply(
        params, orders.to_masked_slots(tokens, masked, made.layout)
      )
    )
    hidden = np.where(masked, (tokens + 1) % _V, tokens)
    shown = np.where(masked, tokens, (tokens + 1) % _V)
    np.testing.assert_array_equal(logits(tokens), logits(hidden))
    moved = np.abs(logits(tokens) - logits(shown))[:, s:].max(axis=-1)
    self.assertGreater(moved[masked].min(), 1e-3)

  @parameterized.parameters(1, 2)
  def test_the_elbo_is_the_mean_over_orders(self, s):
    """Both enumerated: masks and times, and orders (arXiv 2406.07524)."""
    tokens = tiny.tokens(3, _T, _V, seed=2)
    elbo = np.zeros(3)
    for pattern in itertools.product((False, True), repeat=_T):
      m = sum(pattern)
      if m:  # The integral of t ** (m - 1) (1 - t) ** (T - m) over times.
        share = math.factorial(m - 1) * math.factorial(_T - m)
        draws = objective.Draws(
          None,
          time=np.ones(3, np.float32),
          masked=np.tile(np.array(pattern), (3, 1)),
        )
        nats = _training_nll(s)(tokens, draws)
        elbo += share / math.factorial(_T) * np.asarray(nats, np.float64)
    every = tiny.all_orders(_T)
    chain = _chain(s)(
      np.repeat(tokens, len(every), axis=0), np.tile(every, (3, 1))
    )
    want = chain.sum(axis=1).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(elbo, want, rtol=1e-6)

  def test_weight_of_a_time(self):
    tokens, masked = tiny.tokens(3, _T, _V), np.ones((3, _T), bool)
    half = objective.Draws(
      None, time=np.array([1.0, 0.5, 0.25], np.float32), masked=masked
    )
    whole = half._replace(time=np.ones(3, np.float32))
    np.testing.assert_allclose(
      _training_nll(1)(tokens, half),
      _training_nll(1)(tokens, whole) * np.array([1, 2, 4]),
      rtol=1e-6,
    )


@functools.cache
def _training_nll(s):
  made = _bind(s)
  params = tiny.sharp(made)
  return tiny.quick_jit(
    lambda tokens, draws: objective.training_nll(
      made.bind(params), made.layout, tokens, draws
    )
  )


class DrawTest(parameterized.TestCase):
  def test_times_are_evenly_spread(self):
    for seed in range(3):
      times = objective.draw_times(jax.random.key(seed), 50, 0.01)
      share = (np.sort(np.asarray(times)) - 0.01) / 0.99
      np.testing.assert_allclose(np.diff(share), 1 / 50, atol=1e-5)
      self.assertTrue(((share >= 0) & (share < 1)).all())

  def test_uniform_orders_mask_each_token_on_its_own(self):
    B, time = 60_000, 0.3
    order = jax.vmap(lambda key: jax.random.permutation(key, np.arange(1, 4)))(
      jax.random.split(jax.random.key(0), B)
    )
    keys = objective.row_keys(jax.random.key(1), B)
    masked = objective.draw_masked(keys, order, np.full(B, time, np.float32))
    counts = np.bincount(np.asarray(masked) @ [4, 2, 1], minlength=8)
    ones = np.array([bin(i).count("1") for i in range(8)])
    law = time**ones * (1 - time) ** (3 - ones)
    self.assertGreater(tiny.p_value(counts, law), 1e-4)
    wrong = 0.31**ones * 0.69 ** (3 - ones)
    self.assertLess(tiny.p_value(counts, wrong), 1e-4)

  def test_the_last_of_an_order_are_masked(self):
    order = np.tile(np.array([3, 1, 4, 2]), (200, 1))
    keys = objective.row_keys(jax.random.key(1), 200)
    masked = np.asarray(
      objective.draw_masked(keys, order, np.full(200, 0.5, np.float32))
    )
    seen = {tuple(row) for row in masked[:, order[0] - 1].tolist()}
    tails = [(False,) * (4 - m) + (True,) * m for m in range(5)]
    self.assertEqual(seen, set(tails))


@functools.cache
def _generate(s, method, steps, T=_T):
  made = _bind(s, T)
  return tiny.sharp(made), tiny.quick_jit(
    lambda params, *args: diffusion.generate(
      made, params, *args, plan=plan_lib.Plan(method, steps=steps)
    )
  )


@functools.cache
def _logits(s):
  """(tokens [T], masked [T]) -> log p [T, V] of the model's own law."""
  made = _bind(s)
  params = tiny.sharp(made)
  run = tiny.quick_jit(
    lambda tokens, masked: jax.nn.log_softmax(
      made.apply(
        params,
        orders.to_masked_slots(tokens[None], masked[None], made.layout),
      )[0, s:]
    )
  )
  return lambda *args: np.asarray(run(*args))


def _prompt(B=_MANY):
  """Position 3 is known to be 1; order 4, 3, 1, 2."""
  order = np.tile(np.array([4, 3, 1, 2], np.int32), (B, 1))
  known = np.tile([False, False, True, False], (B, 1))
  return np.ones((B, _T), np.int32), known, order


def _counts(texts):
  ids = np.asarray(texts) @ (_V ** np.arange(_T - 1, -1, -1))
  return np.bincount(ids, minlength=_V**_T)


def _law_of_steps(s, T, step_of):
  """p [81] when position p is drawn in step step_of[p], -1: known to be 1."""
  texts = tiny.all_sequences(_V, _T)
  step_of = np.asarray(step_of)
  p = np.where((texts[:, step_of < 0] == 1).all(axis=1), 1.0, 0.0)
  beyond = np.ones((len(texts), T - _T), bool)
  padded = np.pad(texts, ((0, 0), (0, T - _T)))
  for step in sorted(set(step_of[step_of >= 0])):
    masked = np.tile(step_of >= step, (len(texts), 1))
    nats = _masked_nll(s, T)(padded, np.hstack([masked, beyond]))[:, :_T]
    p *= np.exp(-nats[:, step_of == step].sum(axis=1))
  np.testing.assert_allclose(p.sum(), 1.0, atol=1e-5)
  return p


@pytest.mark.thorough
class GenerateTest(parameterized.TestCase):
  @parameterized.parameters((1, _T), (2, _LONG))
  def test_sequential_is_exact(self, s, T):
    """Also where the network's window is longer than the text."""
    params, run = _generate(s, "sequential", 0, T)
    out = run(params, jax.random.key(0), *_prompt(), _PLAIN)
    self.assertTrue((np.asarray(out.order) == [3, 4, 1, 2]).all())
    counts = _counts(out.tokens)
    law = _law_of_steps(s, T, [1, 2, -1, 0])
    self.assertGreater(tiny.p_value(counts, law), 1e-4)
    other = _law_of_steps(s, T, [2, 1, -1, 0])
    self.assertLess(tiny.p_value(counts, other), 1e-4)

  def test_ancestral_law(self):
    self.check_ancestral(2)

  @parameterized.parameters(1, 3)
  @pytest.mark.slow
  def test_ancestral_law_of_other_steps(self, steps):
    self.check_ancestral(steps)

  def check_ancestral(self, steps):
    """Every blank's step is uniform: the law is the mean over all choices."""
    params, run = _generate(1, "ancestral", steps)
    out = run(params, jax.random.key(0), *_prompt(), _PLAIN)
    laws = [
      _law_of_steps(1, _T, [a, b, -1, c])
      for a, b, c in itertools.product(range(steps), repeat=3)
    ]
    counts = _counts(out.tokens)
    self.assertGreater(tiny.p_value(counts, np.mean(laws, axis=0)), 1e-4)
    exact = np.mean(
      [
        _law_of_steps(1, _T, [a, b, -1, c])
        for a, b, c in itertools.permutations(range(3))
      ],
      axis=0,
    )
    # Few steps are not the chain rule.
    self.assertLess(tiny.p_value(counts, exact), 1e-4)

  def test_confidence_keeps_the_surest(self):
    self.check_confidence(2)

  @parameterized.parameters(1, 3)
  @pytest.mark.slow
  def test_confidence_of_other_steps(self, steps):
    self.check_confidence(steps)

  def check_confidence(self, steps):
    """Followed by hand: draws are the likeliest, their laws are not cut."""
    params, run = _generate.__wrapped__(1, "confidence", steps)
    tokens, known, order = _prompt(3)
    tokens[:, 2] = np.arange(3)

    def likeliest(key, log_p):
      del key
      return jax.numpy.argmax(log_p, axis=-1)

    with mock.patch.object(sampling, "draw", likeliest):
      out = run(params, jax.random.key(0), tokens, known, order, _PLAIN)
    self.assertTrue((out.calls == steps).all())
    self.assertEqual(np.unique(out.steps).tolist(), [*range(-1, steps)])
    by_rank = np.take_along_axis(out.steps, out.order - 1, axis=1)
    self.assertTrue((np.diff(by_rank) >= 0).all())
    self.assertEqual(by_rank[:, 0].tolist(), [-1] * 3)
    tiny.assert_same(out.token_log_p.sum(axis=1), out.log_p)
    made, jumps = _bind(1), 0
    network = jax.jit(lambda slots: made.apply(params, slots))
    for b in range(3):
      text, masked, came = tokens[b].copy(), ~known[b], [3]
      for step in range(steps):
        slots = orders.to_masked_slots(text[None], masked[None], made.layout)
        log_p = np.asarray(jax.nn.log_softmax(network(slots)[0, 1:]))
        count = -(-masked.sum() // (steps - step))
        left = np.flatnonzero(masked)
        chosen = left[np.argsort(-log_p.max(axis=-1)[left])[:count]]
        chosen = np.sort(chosen)
        jumps += (chosen != left[:count]).any()
        text[chosen] = log_p[chosen].argmax(axis=-1)
        masked[chosen] = False
        came += list(chosen + 1)
      self.assertEqual(np.asarray(out.tokens[b]).tolist(), text.tolist())
      self.assertEqual(np.asarray(out.order[b]).tolist(), came)
    # Not just from left to right.
    self.assertEqual(jumps > 0, steps > 1)

  def test_confidence_is_that_of_the_draw(self):
    """The token that stays is the one drawn with the highest probability."""
    log_p = np.log([[[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]])
    drawn, masked = np.array([[0, 1, 1]]), np.array([[True, True, True]])
    place = diffusion._surest(log_p, drawn, masked)
    self.assertEqual(np.asarray(place).tolist(), [[1, 2, 0]])
    place = diffusion._surest(log_p, drawn, np.array([[True, True, False]]))
    self.assertEqual(np.asarray(place)[0, :2].tolist(), [0, 1])

  @parameterized.parameters((0.0, 0, 1.0), (1.0, 1, 1.0), (0.5, 0, 1e-6))
  def test_a_sharp_law_leaves_the_order_to_the_model(self, *numbers):
    """The likeliest tokens are drawn; the model's own law ranks them."""
    params, run = _generate(1, "confidence", _T)
    kinds = np.float32, np.int32, np.float32
    law = sampling.Sampling(*(kind(x) for kind, x in zip(kinds, numbers)))
    tokens, known, order = _prompt(3)
    tokens[:, 2] = np.arange(3)
    out = run(params, jax.random.key(0), tokens, known, order, law)
    apply, jumps = _logits(1), 0
    for b in range(3):
      text, masked, came = tokens[b].copy(), ~known[b], [3]
      while masked.any():
        log_p = apply(text, masked)
        sure = np.where(masked, log_p.max(axis=-1), -np.inf)
        chosen = sure.argmax()
        jumps += chosen != masked.argmax()
        text[chosen] = log_p[chosen].argmax()
        masked[chosen] = False
        came.append(chosen + 1)
      self.assertEqual(np.asarray(out.order[b]).tolist(), came)
      self.assertEqual(np.asarray(out.tokens[b]).tolist(), text.tolist())
    self.assertGreater(jumps, 0)  # Not just from left to right.

  @parameterized.parameters("sequential", "ancestral", "confidence")
  def test_known_tokens_stay_and_rows_stand_alone(self, method):
    params, run = _generate(1, method, 2)
    many, few = (
      run(params, jax.random.key(3), *_prompt(B), _PLAIN) for B in (40, 5)
    )
    self.assertTrue((np.asarray(many.tokens)[:, 2] == 1).all())
    self.assertTrue((np.sort(many.order) == [1, 2, 3, 4]).all())
    self.assertTrue((np.asarray(many.order)[:, 0] == 3).all())
    np.testing.assert_array_equal(many.tokens[:5], few.tokens)
    np.testing.assert_array_equal(many.order[:5], few.order)
    np.testing.assert_array_equal(many.calls[:5], few.calls)
    self.assertGreater(len(np.unique(many.tokens, axis=0)), 1)

  def test_passes_until_a_row_is_whole(self):
    """Of 3, 1 and no blanks; in few steps, or in more than there are blanks."""
    tokens, known, order = _prompt(3)
    known[1, :3], known[2] = True, True
    for method, steps, want in (
      ("sequential", 0, [3, 1, 0]),
      ("confidence", 2, [2, 1, 0]),
      ("confidence", 9, [3, 1, 0]),
    ):
      params, run = _generate(1, method, steps)
      out = run(params, jax.random.key(0), tokens, known, order, _PLAIN)
      self.assertEqual(out.calls.tolist(), want)


if __name__ == "__main__":
  absltest.main()
