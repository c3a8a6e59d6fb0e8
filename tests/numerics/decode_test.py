"""Decoding: laws by enumeration, drafts, targets chosen on the way."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective, orders
from aoarm_jax.config import mechanisms
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import steps as decode_steps
from aoarm_jax.model import cached

_T, _V, _MANY = 4, 3, 60_000
_LAW = sampling.Sampling(np.float32(1), np.int32(0), np.float32(1))
_GREEDY = _LAW._replace(temperature=np.float32(0))
# Seven tests below compare samples with two laws each; were the seed not fixed,
# each would fail by chance twice in 10,000.
_LEAST_P = 1e-4
_CASES = (
  ("two_stream", 1),
  ("two_stream", 2),
  ("decoupled_rope", 1),
  ("ao_gpt", 2),
)


@functools.cache
def _network(mechanism, s):
  made = tiny.make(mechanism, s, T=_T, V=_V, D=8, N=2)
  return made, tiny.sharp(made)


def _prompts(B=_MANY):
  """In turn nothing known, and positions 2 and 3; in different orders."""
  order = np.tile(np.array([[3, 1, 4, 2], [4, 3, 1, 2]], np.int32), (B, 1))
  known = np.tile([[False] * 4, [False, True, True, False]], (B, 1))
  tokens = np.tile(np.array([[1, 1, 1, 1], [1, 0, 2, 1]], np.int32), (B, 1))
  return tokens[:B], known[:B], order[:B]


_USED = ((3, 1, 4, 2), (2, 3, 4, 1))  # Known ones first.
_KNOWN = ({}, {2: 0, 3: 2})


@functools.cache
def _sampler(case, plan):
  made, _ = _network(*case)
  return tiny.quick_jit(
    lambda params, key, law, *args: decode.generate(
      made, params, key, *args, law, plan=plan
    )
  )


@functools.cache
def _drawn(case, plan, law=_LAW, B=_MANY):
  run, params = _sampler(case, plan), _network(*case)[1]
  out = run(params, jax.random.key(1), law, *_prompts(B))
  return jax.tree.map(np.asarray, out)


@functools.cache
def _uncached(case):
  """Jitted (params, slots) -> logits."""
  return tiny.quick_jit(_network(*case)[0].apply)


@functools.cache
def _nll(case):
  made, _ = _network(*case)
  texts = tiny.all_sequences(_V, _T)
  return tiny.quick_jit(
    lambda params, order: objective.order_nll(
      made.bind(params), made.layout, texts, order
    )
  )


@functools.cache
def _nats(case, order):
  """float64 [81, T]: -log p of every text's ranks in this order, uncached."""
  tiled = np.tile(np.array(order, np.int32), (_V**_T, 1))
  return np.asarray(_nll(case)(_network(*case)[1], tiled), np.float64)


def _law(case, which, width):
  """p [81] where `width` ranks at a time are independent of each other."""
  order, known = _USED[which], _KNOWN[which]
  texts = tiny.all_sequences(_V, _T)
  p = np.ones(len(texts))
  for position, token in known.items():
    p *= texts[:, position - 1] == token
  for first in range(len(known), _T, width):
    for rank in range(first, min(first + width, _T)):
      # As if it came next.
      ahead = [*order[:first], order[rank]]
      rest = [position for position in order if position not in ahead]
      p *= np.exp(-_nats(case, (*ahead, *rest))[:, first])
  np.testing.assert_allclose(p.sum(), 1.0, atol=1e-5)
  return p


def _p_values(case, out, width):
  ids = out.tokens @ (_V ** np.arange(_T - 1, -1, -1))
  return [
    tiny.p_value(
      np.bincount(ids[which::2], minlength=_V**_T), _law(case, which, width)
    )
    for which in (0, 1)
  ]


@pytest.mark.thorough
class LawTest(parameterized.TestCase):
  @parameterized.parameters(*zip(_CASES[1:3], (4, 3)))
  def test_speculative_is_exact(self, case, width):
    self.check_speculative(case, width)

  @parameterized.parameters(*zip(_CASES[::3], (2, 2)))
  @pytest.mark.slow
  def test_speculative_of_more_cases_is_exact(self, case, width):
    self.check_speculative(case, width)

  def check_speculative(self, case, width):
    out = _drawn(case, plan_lib.Plan("speculative", width))
    self.assertGreater(min(_p_values(case, out, 1)), _LEAST_P)
    for which in (0, 1):
      self.assertTrue((out.order[which::2] == _USED[which]).all())
    # The drafts alone have another law.
    self.assertLess(_p_values(case, out, width)[0], _LEAST_P)

  @pytest.mark.slow
  def test_a_slightly_wrong_acceptance_is_noticed(self):
    """2 percent more often than p / q."""
    right = decode_steps._kept

    def generous(keys, at, log_p, log_q, drafts):
      return right(keys, at, log_p + 0.02, log_q, drafts)

    case, plan = ("two_stream", 1), plan_lib.Plan("speculative", 3)
    run = _sampler.__wrapped__(case, plan)
    with mock.patch.object(decode_steps, "_kept", generous):
      params = _network(*case)[1]
      out = run(params, jax.random.key(1), _LAW, *_prompts())
    out = jax.tree.map(np.asarray, out)
    self.assertLess(min(_p_values(case, out, 1)), _LEAST_P)

  @parameterized.parameters(*zip(_CASES[1:3], (3, 2)))
  def test_parallel_is_that_of_independent_draws(self, case, width):
    """So drafts, of which single streams make copies, are marginals."""
    self.check_parallel(case, width)

  @pytest.mark.slow
  def test_parallel_of_one_more_mechanism(self):
    self.check_parallel(_CASES[3], 3)

  def check_parallel(self, case, width):
    out = _drawn(case, plan_lib.Plan("parallel", width))
    self.assertGreater(min(_p_values(case, out, width)), _LEAST_P)
    self.assertLess(_p_values(case, out, 1)[0], _LEAST_P)

  @parameterized.parameters(*_CASES[1:3])
  def test_one_at_a_time_is_sequential(self, *case):
    self.check_one_at_a_time(case)

  @pytest.mark.slow
  def test_one_at_a_time_of_one_more_mechanism(self):
    self.check_one_at_a_time(_CASES[3])

  def check_one_at_a_time(self, case):
    """Text by text: a rank's draw depends on row and slot alone."""
    want = _drawn(case, plan_lib.Plan(), B=50)
    got = _drawn(case, plan_lib.Plan("parallel", 1), B=50)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # And a speculation that always agrees; here with greedy draws.
    want = _drawn(case, plan_lib.Plan(), _GREEDY, B=50)
    got = _drawn(case, plan_lib.Plan("speculative", 3), _GREEDY, B=50)
    np.testing.assert_array_equal(got.tokens, want.tokens)

  @parameterized.parameters(*_CASES[1:3])
  def test_log_probability_of_what_was_drawn(self, *case):
    self.check_log_p(case)

  @pytest.mark.slow
  def test_log_probability_of_one_more_mechanism(self):
    self.check_log_p(_CASES[3])

  def check_log_p(self, case):
    """Of the blanks, in the order that was used, without a cache."""
    for plan in (plan_lib.Plan(), plan_lib.Plan("speculative", 3)):
      out = _drawn(case, plan, B=50)
      for which, known in enumerate(_KNOWN):
        ids = out.tokens[which::2] @ (_V ** np.arange(_T - 1, -1, -1))
        nats = _nats(case, _USED[which])[ids]
        nats[:, : len(known)] = 0  # They are given.
        tiny.assert_same(out.log_p[which::2], -nats.sum(axis=1))
        by_rank = out.token_log_p[which::2][:, np.array(_USED[which]) - 1]
        tiny.assert_same(by_rank, -nats)

  def test_rows_stand_alone(self):
    self.check_rows(plan_lib.Plan("speculative", 3))

  @parameterized.parameters(
    (plan_lib.Plan("parallel", 3),), (plan_lib.Plan("adaptive", 2),)
  )
  @pytest.mark.slow
  def test_rows_of_more_methods_stand_alone(self, plan):
    self.check_rows(plan)

  def check_rows(self, plan):
    many = _drawn(("two_stream", 1), plan, B=50)
    few = _drawn(("two_stream", 1), plan, B=6)
    for got, want in zip(few, many):
      tiny.assert_same(got, want[:6])


def _steps_seen(method, ran):
  """A patch: every step that runs appends the slots of its cache to `ran`."""
  make = decode_steps.METHODS[method]

  def seen(*args):
    advance, passes = make(*args)

    def step(i, state):
      slots = state.cache.k[0].shape[2]
      jax.debug.callback(lambda: ran.append(slots))
      return advance(i, state)

    return step, passes

  return mock.patch.dict(decode_steps.METHODS, {method: seen})


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(
    (decode, "mdlm", "sequential", "mechanism mdlm is masked: diffusion.gen"),
    (decode, "causal", "adaptive", "method 'adaptive': mechanism causal gener"),
    (decode, "two_stream", "ancestral", "'ancestral': .* by: sequential, par"),
    (diffusion, "mdlm", "parallel", "'parallel': .* by: sequential, ancestral"),
    (
      diffusion,
      "causal",
      "sequential",
      "causal is not masked: decode.generate",
    ),
  )
  def test_a_method_that_the_mechanism_has_not(
    self, module, mechanism, method, message
  ):
    made = tiny.make(mechanism)
    blank = np.zeros((1, 7), np.int32)
    with self.assertRaisesRegex(ValueError, message) as caught:
      module.generate(
        made,
        made.abstract_params,
        jax.random.key(0),
        blank,
        blank > 0,
        tiny.orders_of(mechanism, 1, 7),
        sampling.make_law(),
        plan=plan_lib.Plan(method),
      )
    self.assertNotIn("\n", str(caught.exception))


@pytest.mark.thorough
class StagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (("two_stream", 2), plan_lib.Plan(), False),
    (("decoupled_rope", 1), plan_lib.Plan("parallel", 2), True),
  )
  def test_a_growing_cache_changes_nothing(self, case, plan, traced):
    self.check_growing(case, plan, traced)

  @parameterized.parameters(
    # A wider round does not fit into the first stage.
    (("two_stream", 1), plan_lib.Plan("speculative", 2), False),
    (("two_stream", 2), plan_lib.Plan("adaptive", 1), True),
  )
  @pytest.mark.slow
  def test_a_growing_cache_of_more_methods(self, case, plan, traced):
    self.check_growing(case, plan, traced)

  def check_growing(self, case, plan, traced):
    """Of rows with 8 or 6 blanks: 8 or 9 slots, and fewer at first."""
    B, T = 6, 8
    made = tiny.make(*case, T=T, V=_V, D=8, N=2)
    known = np.tile(np.arange(T) < 2, (B, 1)) & (np.arange(B) % 2 == 1)[:, None]
    inputs = tiny.tokens(B, T, _V), known, tiny.orders_of(case[0], B, T)

    def run(most_known):
      return tiny.quick_jit(
        lambda params, key, most, *args: decode.generate(
          made,
          params,
          key,
          *args,
          _LAW,
          plan=plan,
          most_known=most_known,
          most_blanks=most if traced and most_known else None,
        )
      )(tiny.sharp(made), jax.random.key(1), np.int32(T), *inputs)

    want, ran = run(None), []
    with (
      mock.patch.multiple(decode, _LARGE=0, _TILE=1, _GROUP=2),
      _steps_seen(plan.method, ran),
    ):
      got = run(2)
      jax.effects_barrier()
    self.assertGreater(len({*ran}), 1)
    for a, b in zip(got, want):
      tiny.assert_same(a, b)


@pytest.mark.thorough
class CallsTest(parameterized.TestCase):
  def test_steps_end_with_the_blanks(self):
    """One program for any number; in groups, here of 2."""
    made, params = _network("two_stream", 1)
    run = tiny.quick_jit(
      lambda params, most, *args: decode.generate(
        made, params, jax.random.key(1), *args, _LAW, most_blanks=most
      )
    )
    (tokens, _, order), ran = _prompts(20), []
    with (
      mock.patch.object(decode, "_GROUP", 2),
      _steps_seen("sequential", ran),
    ):
      for most in (1, 2, 3, 4):
        known = np.arange(_T)[None] >= np.full((20, 1), most)
        ran.clear()
        out = run(params, np.int32(most), tokens, known, order)
        jax.effects_barrier()
        self.assertLen(ran, -(-most // 2) * 2)
        self.assertTrue((out.calls == 1 + most).all())
        self.assertTrue((out.tokens[known] == tokens[known]).all())
        self.assertTrue((np.sort(out.order) == np.arange(1, _T + 1)).all())
    self.assertEqual(run._cache_size(), 1)

  def test_sequential_and_parallel(self):
    """One pass for the prompt, and one a step."""
    case = ("two_stream", 1)
    out = _drawn(case, plan_lib.Plan(), B=50)
    self.assertTrue((out.calls[::2] == 1 + 4).all())
    self.assertTrue((out.calls[1::2] == 1 + 2).all())
    out = _drawn(case, plan_lib.Plan("parallel", 3), B=50)
    self.assertTrue((out.calls[::2] == 1 + 2).all())
    self.assertTrue((out.calls[1::2] == 1 + 1).all())

  @parameterized.parameters(
    (plan_lib.Plan(), [[1, 2, 3, 4], [-1, -1, 1, 2]]),
    (plan_lib.Plan("parallel", 3), [[1, 1, 1, 2], [-1, -1, 1, 1]]),
    (plan_lib.Plan("adaptive", 2), [[1, 1, 2, 2], [-1, -1, 1, 1]]),
  )
  def test_steps_of_tokens(self, plan, want):
    """By rank, without the gaps between passes."""
    out = _drawn(("two_stream", 1), plan, B=50)
    steps = np.take_along_axis(out.steps, out.order - 1, axis=1)
    for which, wanted in enumerate(want):
      for row in steps[which::2]:
        numbers = np.unique(row[row >= 0])
        by_rank = np.where(row < 0, -1, 1 + np.searchsorted(numbers, row))
        self.assertEqual(by_rank.tolist(), wanted)

  def test_steps_of_speculation_are_its_rounds(self):
    out = _drawn(("two_stream", 1), plan_lib.Plan("speculative", 3), B=50)
    steps = np.take_along_axis(out.steps, out.order - 1, axis=1)[::2]
    self.assertTrue((np.diff(steps) >= 0).all())
    rounds = 1 + (np.diff(steps) > 0).sum(axis=1)
    np.testing.assert_array_equal(rounds, (out.calls[::2] - 1) // 2)
    self.assertGreater(len(np.unique(steps, axis=0)), 1)

  @parameterized.parameters(("linear", 3), ("cosine", 2))
  def test_in_so_many_steps(self, schedule, steps):
    """Of the larger prompt; the smaller one may take fewer."""
    plan = plan_lib.Plan("parallel", steps=steps, schedule=schedule)
    out = _drawn(("decoupled_rope", 1), plan, B=50)
    self.assertTrue((out.calls[::2] == 1 + steps).all())
    self.assertTrue((out.calls[1::2] <= 1 + min(steps, 2)).all())
    self.assertTrue((np.sort(out.order) == [1, 2, 3, 4]).all())

  def test_speculative_takes_no_more_calls_than_tokens(self):
    """Two calls decide at least two tokens: the first draft is always kept."""
    out = _drawn(_CASES[1], plan_lib.Plan("speculative", 4))
    self.assertTrue((out.calls[::2] <= 1 + 4).all())
    self.assertTrue((out.calls[1::2] <= 1 + 2).all())
    self.assertLess(out.calls[::2].mean(), 1 + 3.9)
    # Rounds of two calls end at a refused draft, after `width`, or with the
    # text: of 4 blanks and a width of 4, as many as were refused, and one more
    # unless the last one was.
    rounds = (out.calls[::2] - 1) // 2
    refused = 4 - out.accepted[::2]
    self.assertTrue((rounds - refused >= 0).all())
    self.assertTrue((rounds - refused <= 1).all())
    self.assertGreater(refused.max(), 0)
    # The first draft of a round cannot fail, and it counts.
    self.assertTrue((out.accepted[::2] >= rounds).all())
    self.assertGreater(out.accepted.min(), 0)

  def test_single_drafts_are_all_accepted(self):
    """They are drawn from the law itself; other methods have none."""
    out = _drawn(_CASES[0], plan_lib.Plan("speculative", 1), B=50)
    self.assertEqual(out.accepted[::2].tolist(), [4] * 25)
    self.assertEqual(out.accepted[1::2].tolist(), [2] * 25)
    out = _drawn(_CASES[0], plan_lib.Plan(), B=50)
    self.assertEqual(out.accepted.tolist(), [0] * 50)


def _that_draft(cases):
  """The cases of mechanisms that can predict several targets at once."""
  return [
    case
    for case in cases
    if "speculative" in mechanisms.MECHANISMS[case[0]].methods
  ]


_FIRST = tuple(
  case
  for case in tiny.ALTERNATING
  if case[0] in ("two_stream", "decoupled_rope")
)


@pytest.mark.thorough
class PredictTest(parameterized.TestCase):
  @parameterized.parameters(*_FIRST)
  def test_equals_each_target_next(self, mechanism, s):
    self.check_each_target_next(mechanism, s)

  @parameterized.parameters(
    *sorted(_that_draft({*tiny.CASES} - {*_FIRST})), *tiny.BACKBONES
  )
  @pytest.mark.slow
  def test_equals_each_target_next_in_more_cases(
    self, mechanism, s, options=()
  ):
    self.check_each_target_next(mechanism, s, **dict(options))

  def check_each_target_next(self, mechanism, s, **options):
    """Ragged: 3 slots are cached, or 1; 1, 2 or 3 more come, junk behind."""
    T, B, V = 7, 3, 5
    made = tiny.make(mechanism, s, **options)
    params = tiny.sharp(made)
    tokens, order = tiny.tokens(B, T, V), tiny.orders_of(mechanism, B, T)
    slots = orders.to_slots(tokens, order, made.layout)
    slots = orders.Slots(*(np.asarray(x) for x in slots[:3]))
    start, count = np.array([3, 1, 2], np.int32), np.array([1, 3, 2], np.int32)
    S = T + s - 1
    at = start[:, None] + np.arange(3)
    rank = start + count - s  # Of the first target.
    targets = np.stack([o[r : r + 3] for o, r in zip(order, rank)])

    def window(x):
      return np.take_along_axis(x, at, axis=1)

    junk = np.where(np.arange(3) < count[:, None], window(slots.tokens), 0)
    part = orders.Slots(
      junk, window(slots.position), window(slots.target_position)
    )

    @tiny.quick_jit
    def predict(params, slots, part, start, count, targets):
      network = cached.Cached(made.bind(params))
      cache = network.prefill(slots, network.empty_cache(B, S))
      after = jnp.arange(S)[:, None] >= start[:, None, None, None]
      cache = jax.tree.map(
        lambda x: jnp.where(after, x.dtype.type(1e3), x), cache
      )
      return network.predict(part, cache, start, count, targets)[0]

    got = predict(params, slots, part, start, count, targets)
    uncached = tiny.quick_jit(made.apply)
    for q in range(3):
      if mechanisms.MECHANISMS[mechanism].left_to_right and q:
        continue  # Its rows do not know what they predict.
      swapped = order.copy()
      for b, r in enumerate(rank):
        swapped[b, [r, r + q]] = order[b, [r + q, r]]
      logits = np.asarray(
        uncached(params, orders.to_slots(tokens, swapped, made.layout))
      )
      want = logits[np.arange(B), rank + s - 1]
      tiny.assert_same(got[:, q], want)


@pytest.mark.thorough
class AdaptiveTest(parameterized.TestCase):
  # Both lists together have all pairs. One sentinel would leave two streams
  # blind at first: all targets tie.
  @parameterized.parameters(
    (("two_stream", 2), "confidence", 1),
    (("two_stream", 2), "entropy", 2),
    (("sigma_gpt", 1), "margin", 2),
  )
  def test_takes_the_surest_next(self, case, score, width):
    self.check_surest(case, score, width)

  @parameterized.parameters(
    (("sigma_gpt", 1), "confidence", 2),
    (("sigma_gpt", 1), "entropy", 1),
    (("two_stream", 2), "margin", 1),
  )
  @pytest.mark.slow
  def test_takes_the_surest_next_in_more_cases(self, case, score, width):
    self.check_surest(case, score, width)

  def check_surest(self, case, score, width):
    """Followed by hand, greedily, with uncached passes."""
    made, params = _network(*case)
    out = _drawn(
      case, plan_lib.Plan("adaptive", width, score=score), _GREEDY, B=2
    )
    network = _uncached(case)
    for b in range(2):
      text = np.ones(_T, np.int32)
      done = list(_KNOWN[b])
      for position, token in _KNOWN[b].items():
        text[position - 1] = token
      while len(done) < _T:
        left = [p for p in range(1, _T + 1) if p not in done]
        laws = {}
        for target in left:
          rest = [p for p in left if p != target]
          slots = orders.to_slots(
            text[None], np.array([[*done, target, *rest]]), made.layout
          )
          logits = np.asarray(network(params, slots), np.float64)
          law = np.exp(logits[0, len(done) + case[1] - 1])
          laws[target] = law / law.sum()

        def sure(target, laws=laws):
          law = np.sort(laws[target])
          return {
            "confidence": law[-1],
            "entropy": (law * np.log(law)).sum(),
            "margin": law[-1] - law[-2],
          }[score]

        chosen = sorted(left, key=sure, reverse=True)[:width]
        for target in chosen:
          text[target - 1] = laws[target].argmax()
        done += chosen
      self.assertEqual(out.order[b].tolist(), done)
      self.assertEqual(out.tokens[b].tolist(), text.tolist())

  @pytest.mark.slow
  def test_more_targets_than_a_chunk(self):
    with mock.patch.object(decode_steps, "CHUNK", 3):
      got = _drawn(
        ("two_stream", 2),
        plan_lib.Plan("adaptive", schedule="cosine"),
        _GREEDY,
        B=20,
      )
    want = _drawn(("two_stream", 2), plan_lib.Plan("adaptive"), _GREEDY, B=20)
    # The prompt, and for each token a pass and those of the chunks not done:
    # of 4 targets 2, 2, 2, 1 chunks, of the last 2 of them 2, 1.
    self.assertEqual(got.calls[:2].tolist(), [1 + 4 + 7, 1 + 2 + 3])
    self.assertEqual(want.calls[:2].tolist(), [1 + 4 + 4, 1 + 2 + 2])
    np.testing.assert_array_equal(got.order, want.order)
    np.testing.assert_array_equal(got.tokens, want.tokens)


if __name__ == "__main__":
  absltest.main()
