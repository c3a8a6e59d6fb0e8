"""Masks of content rows: loops, laws, leaks, caches, costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import written
from absl.testing import absltest, parameterized

from aoarm_jax import objective, orders
from aoarm_jax.config import mechanisms, rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.generation import decode
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.model import cached, cost, looks

_B, _T, _V = 3, 7, 5
_SEES = ("self", "last:2", "nearest:2", "random:2")
# Every mask, with each mechanism and each number of sentinels in turn.
_CASES = tuple(
  (("two_stream", "two_stream_untied")[i % 2], 1 + i // 2 % 2, sees)
  for i, sees in enumerate(_SEES)
)


def _by_hand(sees, s, position):
  """bool [S, S] of one sequence, row by row."""
  kind, _, count = sees.partition(":")
  S = len(position)
  mask = np.zeros((S, S), bool)
  for row in range(S):
    earlier = list(range(s, row))
    if kind == "self":
      chosen = []
    elif kind == "last":
      chosen = earlier[-int(count) :]
    elif kind == "nearest":
      here = position[row]
      earlier.sort(key=lambda j: (abs(position[j] - here), position[j]))
      chosen = earlier[: int(count)]
    else:
      earlier.sort(key=functools.partial(_hash, row))
      chosen = earlier[: int(count)]
    mask[row, [*chosen, row, *range(min(s, row))]] = True
  return mask


def _hash(row, key):
  """In Python's whole numbers."""
  x = (row * 0x9E3779B1 + key) % 2**31
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = ((x ^ (x >> shift)) * factor) % 2**31
  return x


def _slots(s, seed=0, T=_T):
  tokens = tiny.tokens(_B, T, _V, seed)
  order = tiny.orders_of("two_stream", _B, T, seed)
  slots = orders.to_slots(tokens, order, tiny.layout(s, _V, T))
  return jax.tree.map(np.asarray, slots)


def _seen(sees, s, position):
  places = looks.Places(jnp.arange(position.shape[1])[None], position)
  return np.asarray(looks.seen(mechanisms.look(sees), s, places, places))


class MaskTest(parameterized.TestCase):
  @parameterized.product(
    sees=("self", "last:3", "nearest:3", "random:3", "random:20"), s=(1, 2)
  )
  def test_equals_a_loop(self, sees, s):
    position = _slots(s, T=13).position
    want = [_by_hand(sees, s, row) for row in position]
    got = _seen(sees, s, position)
    np.testing.assert_array_equal(
      np.broadcast_to(got, (_B, *got.shape[1:])), want
    )

  def test_random_slots_are_spread_and_stay_when_the_text_is_longer(self):
    position = np.arange(65)[None]
    long = _seen("random:4", 1, position)[0]
    np.testing.assert_array_equal(
      _seen("random:4", 1, position[:, :33])[0], long[:33, :33]
    )
    row, key = np.nonzero(np.tril(long[:, 1:], -2))
    place = (key + 0.5) / (row - 1 + 0.5)
    self.assertGreater(len(place), 200)
    self.assertAlmostEqual(place.mean(), 0.5, delta=0.07)
    self.assertGreater(len(set(row - key)), 40)


class NetworkTest(parameterized.TestCase):
  @parameterized.parameters(*_CASES)
  def test_logits_are_those_of_the_mask_by_hand(self, mechanism, s, sees):
    model, params, network = tiny.jitted(mechanism, s, content_sees=sees)
    slots = _slots(s)
    logits = np.asarray(network(params, slots))
    plain = tiny.jitted(mechanism, s)[2](params, slots)
    self.assertGreater(np.abs(logits - plain).max(), 0.1)
    hand = written.Written(model, params)
    causal = np.tri(model.S, dtype=bool)
    for b in range(_B):
      ids, c, t = (x[b] for x in slots[:3])
      _, cache = hand.one_stream(ids, c, c, _by_hand(sees, s, c))
      want = hand.query_stream(t, cache, causal)
      tiny.assert_same(logits[b], want, roundings=256)

  @parameterized.parameters(*_CASES)
  def test_a_content_row_knows_what_it_sees(self, mechanism, s, sees):
    """Bitwise, in the keys of the second layer, which look once."""
    made = tiny.make(mechanism, s, content_sees=sees)
    params, slots = tiny.sharp(made), _slots(s)
    S = slots.tokens.shape[1]
    empty = cached.empty_cache(made.model, made.config.compute, _B, S)

    @jax.jit
    def keys(tokens):
      network = cached.Cached(made.bind(params))
      return network.prefill(slots._replace(tokens=tokens), empty).k[1]

    base = np.asarray(keys(slots.tokens))
    for slot in range(s, S):
      other = slots.tokens.copy()
      other[:, slot] = (other[:, slot] + 1) % _V
      moved = (np.asarray(keys(other)) != base).any(axis=(1, 3))
      seen = [_by_hand(sees, s, row)[:, slot] for row in slots.position]
      np.testing.assert_array_equal(moved, seen)

  @parameterized.parameters(*_CASES)
  def test_laws_sum_to_one_and_ranks_may_be_chosen(self, mechanism, s, sees):
    made = tiny.make(mechanism, s, T=4, V=3, D=8, N=2, content_sees=sees)
    params, texts = tiny.sharp(made), tiny.all_sequences(3, 4)
    every = tiny.all_orders(4)[[0, 7, 18]]
    order = np.repeat(every, len(texts), axis=0)
    tokens = np.tile(texts, (len(every), 1))

    @tiny.quick_jit
    def nats(ranks):
      network = made.bind(params)
      return objective.order_nll(
        network, made.layout, tokens, order, ranks=ranks
      )

    by_rank = np.asarray(nats(None), np.float64)
    p = np.exp(-by_rank.sum(axis=1)).reshape(len(every), -1)
    self.assertGreater(p.max(), 4 / len(texts))
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    ranks = np.tile([1, 3], (len(tokens), 1))
    np.testing.assert_allclose(nats(ranks), by_rank[:, [1, 3]], atol=1e-4)

  @parameterized.parameters(*_CASES)
  def test_cached_logits_are_uncached_logits(self, mechanism, s, sees):
    model, params, network = tiny.jitted(mechanism, s, content_sees=sees)
    slots = _slots(s)
    want = np.asarray(network(params, slots))
    made = tiny.make(mechanism, s, content_sees=sees)
    extend = tiny.quick_jit(
      lambda *args: cached.Cached(made.bind(params)).extend(*args)
    )
    cache = cached.empty_cache(model, made.config.compute, _B, model.S + 2)
    at, got = 0, []
    for R in (3, 1, 3, *[1] * (s - 1)):
      part = orders.Slots(*(x[:, at : at + R] for x in slots[:3]))
      logits, cache = extend(part, cache, np.full(_B, at, np.int32))
      got.append(logits)
      at += R
    tiny.assert_same(np.concatenate(got, axis=1), want)

  def test_a_prompt_is_filled_in_at_once(self):
    self.check_prompt("two_stream", 1)

  @pytest.mark.slow
  def test_a_prompt_of_an_ablation_is_filled_in_at_once(self):
    self.check_prompt("two_stream_untied", 2)

  def check_prompt(self, mechanism, s):
    """Then one slot of one text follows: few rows, and a lone query."""
    made = tiny.make(mechanism, s, content_sees="nearest:2")
    params = tiny.sharp(made)
    slots = jax.tree.map(lambda x: x[:1], _slots(s))

    @tiny.quick_jit
    def both(slots):
      network = cached.Cached(made.bind(params))
      empty = cached.empty_cache(
        made.model, made.config.compute, 1, made.model.S
      )
      prompt, last = (
        orders.Slots(*(x[:, part] for x in slots[:3]))
        for part in (slice(0, -1), slice(-1, None))
      )
      at = jnp.full(1, made.model.S - 1)
      logits, cache = network.extend(last, network.prefill(prompt, empty), at)
      return network.prefill(slots, empty), cache, logits

    whole, in_two, logits = both(slots)
    jax.tree.map(tiny.assert_same, in_two, whole)
    want = tiny.quick_jit(made.apply)(params, slots)
    tiny.assert_same(logits, want[:, -1:])

  def test_generated_texts_have_their_likelihood(self):
    self.check_likelihood("two_stream", 1, "nearest:2")

  @pytest.mark.slow
  def test_generated_texts_of_an_ablation_have_their_likelihood(self):
    self.check_likelihood("two_stream_untied", 2, "random:2")

  def check_likelihood(self, mechanism, s, sees):
    """By drafts, so that many rows ask at once and junk follows slots."""
    made = tiny.make(mechanism, s, content_sees=sees)
    params, law = tiny.sharp(made), sampling.Sampling(jnp.ones((_B, 1, 1)))
    order = tiny.orders_of(mechanism, _B, _T)
    tokens, known = tiny.tokens(_B, _T, _V), np.zeros((_B, _T), bool)
    known[:2, 3] = known[1, 5] = True

    @tiny.quick_jit
    def generate(tokens):
      texts = decode.generate(
        made,
        params,
        jax.random.key(0),
        tokens,
        known,
        order,
        law,
        plan=plan_lib.Plan("speculative", width=3),
      )
      network = made.bind(params)
      return texts, objective.order_nll(
        network, made.layout, texts.tokens, texts.order
      )

    texts, nats = generate(tokens)
    blank = np.arange(_T) >= known.sum(axis=1)[:, None]
    want = -np.where(blank, nats, 0).sum(axis=1)
    np.testing.assert_allclose(texts.log_p, want, rtol=1e-4)
    self.assertGreater(int(texts.accepted.sum()), _B)


class CostTest(parameterized.TestCase):
  @parameterized.product(sees=_SEES, s=(1, 2))
  def test_only_the_slots_that_are_seen_cost(self, sees, s):
    model = config_lib.Model(
      sentinels=s, T=_T, D=12, L=3, N=3, content_sees=sees
    )
    run = config_lib.Config(model=model, train=config_lib.Train(batch_size=1))
    plain = run.replace("model.content_sees", "prefix")
    masks = _seen(sees, s, _slots(s).position)
    fewer = np.tri(model.S).sum() - masks[0].sum()
    saved = cost.forward_flops(plain) - cost.forward_flops(run)
    self.assertEqual(saved, 4 * model.D * (model.L - 1) * fewer)
    # Dense attention computes all scores.
    self.assertEqual(
      *(cost.forward_flops(x, visible_only=False) for x in (run, plain))
    )

  @parameterized.parameters("self", "nearest:1")
  def test_flops_are_those_of_the_program(self, sees):
    model = config_lib.Model(T=511, D=128, L=3, N=1, content_sees=sees)
    made = tiny.make(
      T=511, V=27, D=128, L=3, N=1, content_sees=sees, attention="reference"
    )
    row = jax.ShapeDtypeStruct((1, model.S), jnp.int32)
    lowered = jax.jit(made.apply).lower(
      made.abstract_params, orders.Slots(row, row, row)
    )
    run = config_lib.Config(model=model, train=config_lib.Train(batch_size=1))
    expected = cost.forward_flops(run, visible_only=False)
    counted = lowered.cost_analysis()["flops"]
    self.assertAlmostEqual(counted / expected, 1.0, delta=0.05)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters("", "selfish", "last", "last:0", "near:3", "last:x")
  def test_what_no_row_can_see_is_refused(self, sees):
    config = config_lib.Config(model=config_lib.Model(content_sees=sees))
    with self.assertRaisesRegex(
      config_lib.ConfigError, "content_sees=.*must be prefix, self, or last:k"
    ):
      rules.validate(config)

  def test_one_stream_and_groups_are_refused(self):
    config = config_lib.Config(model=config_lib.Model(content_sees="self"))
    rules.validate(config)
    for path, value, message in (
      ("model.mechanism", "decoupled_rope", "need two streams"),
      ("orders.groups", "fixed", "to the end of their group; take prefix"),
    ):
      with self.assertRaisesRegex(config_lib.ConfigError, message):
        rules.validate(config.replace(path, value))


if __name__ == "__main__":
  absltest.main()
