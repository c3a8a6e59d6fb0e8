"""Knock-outs: masks by loops, and bits by a second implementation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import written
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import looks
from aoarm_jax.study import knockouts, layerwise, profiles

B, T, V, L = 2, 7, 5, 3
KINDS = ("own", "last:2", "own+last:2", "nearest:2", "random:2")


def slots_of(s, T=T):
  tokens, order = tiny.tokens(B, T, V), tiny.orders_of("two_stream", B, T)
  slots = orders.to_slots(tokens, order, tiny.layout(s, V, T))
  return tokens, order, jax.tree.map(np.asarray, slots)


def barred_by_hand(text, s, stream, position, target):
  """Slots barred from the rows of one sequence, bool [S, S], by loops."""
  kind, _, count = text.removeprefix("own+").partition(":")
  S = len(position)
  mask = np.zeros((S, S), bool)
  for row in range(S):
    earlier, own = list(range(s, row)), [row] * (row >= s)
    if kind == "last":
      chosen = earlier[-int(count) :]
    elif kind == "nearest":
      here = position[row] if stream == "content" else target[row]
      visible = earlier if stream == "content" else [*earlier, *own]
      visible.sort(key=lambda j: (abs(position[j] - here), position[j]))
      chosen = visible[: int(count)]
    else:
      chosen = []
    mask[row, [*chosen, *(own if text.startswith("own") else [])]] = True
  return mask


def nats_by_hand(model, params, slots, tokens, order, masks):
  """Nats [B] with masks[layer][stream], bool [B, S, S], of what is seen."""
  hand, total = written.Written(model, params), []
  for b in range(len(tokens)):
    ids, c, t = (x[b] for x in slots[:3])
    streams = profiles.streams(model.kind)
    x = [hand.content(ids, c, t)]
    places = [c if len(streams) == 2 else t, t]
    if len(streams) == 2:
      x.append(np.tile(hand.params["start"]["query_start"], (len(ids), 1)))
    for layer, block in enumerate(hand.blocks):
      keys = hand.keys(block, x[0], c)
      x = [
        hand.update(block, x[g], places[g], keys, masks[layer][g][b])
        for g in range(len(streams))
      ]
    logits = hand.read_out(x[-1])[-T:]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    total.append(-log_p[np.arange(T), tokens[b][order[b] - 1]].sum())
  return np.array(total)


@functools.cache
def program(mechanism, s, text, content_sees="prefix", kv_heads=0, **options):
  """(model, params, function of `active` -> (nats, mass))."""
  made = tiny.make(
    mechanism, s, L=L, content_sees=content_sees, kv_heads=kv_heads
  )
  params, knockout = tiny.sharp(made), knockouts.parse(text)
  tokens, order, slots = slots_of(s)

  @tiny.quick_jit
  def run(params, active):
    network = made.bind(params)
    laid = orders.Slots(*slots[:3])
    states = layerwise.record(network, laid)
    marked = knockouts.marks(network, laid, knockout)
    by_rank, mass = knockouts.nats(
      network,
      tokens,
      order,
      states,
      marked,
      active,
      jnp.int32(0),
      knockout.equal_mass,
      **options,
    )
    return by_rank.sum(axis=1), mass

  return made.model, params, functools.partial(run, params)


class MarkTest(parameterized.TestCase):
  @parameterized.product(text=KINDS, s=(1, 2))
  def test_equals_a_loop(self, text, s):
    made = tiny.make("two_stream", s, T=13)
    _, _, slots = slots_of(s, T=13)
    network = made.bind(tiny.sharp(made))
    found = knockouts.marks(
      network, orders.Slots(*slots[:3]), knockouts.parse(text)
    )
    causal = np.tri(slots.tokens.shape[1], dtype=bool)
    for stream, got in zip(("content", "query"), found, strict=True):
      np.testing.assert_array_equal(got > 0, np.broadcast_to(causal, got.shape))
      for b in range(B):
        barred = np.asarray(got[b] == layerwise.BARRED)
        if text == "random:2":
          counts = np.minimum(2, np.maximum(np.arange(len(causal)) - s, 0))
          np.testing.assert_array_equal(barred.sum(axis=1), counts)
          self.assertFalse(np.triu(barred).any())
          self.assertFalse(barred[:, :s].any())
          continue
        want = barred_by_hand(
          text, s, stream, slots.position[b], slots.target_position[b]
        )
        np.testing.assert_array_equal(barred, want)

  @parameterized.parameters(
    "", "last:0", "own+nearest:2", "equal_mass:random:2"
  )
  def test_others_are_refused(self, text):
    with self.assertRaisesRegex(config_lib.ConfigError, "knockouts.*is none"):
      knockouts.parse(text)


class NatsTest(parameterized.TestCase):
  @parameterized.parameters(
    *(
      (mechanism, s, text, layer)
      for (mechanism, s), (text, layer) in zip(
        itertools.cycle((("two_stream", 1), ("decoupled_rope", 2))),
        (("own+last:2", 1), ("nearest:2", 0), ("last:2", 2), ("own", 1)),
      )
    )
  )
  def test_one_layer_equals_a_second_implementation(
    self, mechanism, s, text, layer
  ):
    model, params, run = program(mechanism, s, text)
    streams = profiles.streams(model.kind)
    tokens, order, slots = slots_of(s)
    causal = np.tri(model.S, dtype=bool)
    barred = [
      [
        barred_by_hand(text, s, name, c, t)
        for c, t in zip(slots.position, slots.target_position)
      ]
      for name in streams
    ]
    plain = [np.broadcast_to(causal, (B, *causal.shape))] * len(streams)
    intact = nats_by_hand(model, params, slots, tokens, order, [plain] * L)
    for g in range(len(streams)):
      active = np.zeros((L, len(streams)), bool)
      active[layer, g] = True
      masks = [list(plain) for _ in range(L)]
      masks[layer][g] = causal & ~np.array(barred[g])
      want = nats_by_hand(model, params, slots, tokens, order, masks)
      got, mass = run(active)
      np.testing.assert_allclose(got, want, rtol=2e-5)
      nothing_reads = layer == L - 1 and g < len(streams) - 1
      self.assertEqual(np.allclose(got, intact, rtol=2e-5), nothing_reads)
      self.assertEqual(float(mass[layer, g].min()) > 0, not nothing_reads)
      self.assertLessEqual(float(mass.max()), 1)

  @pytest.mark.thorough
  def test_all_layers_and_streams(self):
    model, params, run = program("two_stream", 1, "nearest:2")
    tokens, order, slots = slots_of(1)
    masks = [
      np.tri(model.S, dtype=bool)
      & ~np.array(
        [
          barred_by_hand("nearest:2", 1, name, c, t)
          for c, t in zip(slots.position, slots.target_position)
        ]
      )
      for name in ("content", "query")
    ]
    want = nats_by_hand(model, params, slots, tokens, order, [masks] * L)
    got, _ = run(np.ones((L, 2), bool))
    np.testing.assert_allclose(got, want, rtol=2e-5)

  @pytest.mark.thorough
  def test_a_network_whose_content_sees_few_slots(self):
    s, sees = 1, "nearest:2"
    model, params, run = program("two_stream", s, "last:2", content_sees=sees)
    tokens, order, slots = slots_of(s)
    places = looks.Places(jnp.arange(model.S)[None], slots.position)
    seen = np.asarray(looks.seen(model.look, s, places, places))
    barred = [
      barred_by_hand("last:2", s, "content", c, t)
      for c, t in zip(slots.position, slots.target_position)
    ]
    queries = np.broadcast_to(np.tri(model.S, dtype=bool), seen.shape)
    masks = [[seen & ~np.array(barred), queries], *[[seen, queries]] * (L - 1)]
    want = nats_by_hand(model, params, slots, tokens, order, masks)
    active = np.zeros((L, 2), bool)
    active[0, 0] = True
    got, _ = run(active)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    intact, _ = run(np.zeros((L, 2), bool))
    self.assertGreater(np.abs(got - intact).min(), 1e-3)

  @pytest.mark.thorough
  def test_heads_that_share_keys(self):
    model, params, run = program("decoupled_rope", 1, "nearest:2", kv_heads=1)
    tokens, order, slots = slots_of(1)
    barred = [
      barred_by_hand("nearest:2", 1, "only", c, t)
      for c, t in zip(slots.position, slots.target_position)
    ]
    masks = [[np.tri(model.S, dtype=bool) & ~np.array(barred)]] * L
    want = nats_by_hand(model, params, slots, tokens, order, masks)
    got, _ = run(np.ones((L, 1), bool))
    np.testing.assert_allclose(got, want, rtol=2e-5)

  @pytest.mark.slow
  def test_content_that_stays_is_not_computed_again(self):
    active = np.array([[False, True]] * 2 + [[False, False]])
    for text in ("last:2", "equal_mass:nearest:2"):
      want, want_mass = program("two_stream", 1, text)[2](active)
      got, mass = program("two_stream", 1, text, content_stays=True)[2](active)
      np.testing.assert_allclose(got, want, rtol=1e-5)
      np.testing.assert_allclose(mass, want_mass, atol=1e-5)

  def test_with_nothing_to_bar_the_bits_stay(self):
    """Slots of equal mass: those of a layer that is not knocked out."""
    model, params, run = program("decoupled_rope", 2, "equal_mass:nearest:2")
    tokens, order, slots = slots_of(2)
    causal = np.broadcast_to(np.tri(model.S, dtype=bool), (B, model.S, model.S))
    intact = nats_by_hand(model, params, slots, tokens, order, [[causal]] * L)
    nothing, _ = run(np.zeros((L, 1), bool))
    np.testing.assert_allclose(nothing, intact, rtol=2e-5)
    one, mass = run(np.eye(L, dtype=bool)[:, :1])
    self.assertGreater(np.abs(one - intact).min(), 1e-3)
    self.assertEqual(np.flatnonzero(np.asarray(mass).any((1, 2))), [0])


class EqualMassTest(parameterized.TestCase):
  def test_slots_are_spread_and_their_mass_is_what_is_wanted(self):
    rng = np.random.default_rng(0)
    R = S = 200
    weights = rng.exponential(size=(R, S)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    weights[:, :3] = 0
    wanted = rng.uniform(0, 0.9, R).astype(np.float32)
    wanted[7] = 0
    taken = np.asarray(knockouts.taken(weights, wanted, jax.random.key(1)))
    mass = (weights * taken).sum(axis=1)
    np.testing.assert_allclose(mass, wanted, atol=weights.max() / 2)
    self.assertAlmostEqual(mass.mean(), wanted.mean(), delta=1e-3)
    self.assertFalse(taken[:, :3].any())
    self.assertFalse(taken[7].any())
    share = taken[:, 3:].mean(axis=0)
    self.assertGreater(share.min(), 0.25)
    self.assertLess(share.max(), 0.65)

  def test_own_slot_and_sentinels_are_never_taken(self):
    S, s = 30, 2
    marks = np.tri(S, dtype=np.int8)
    for row in range(S):
      marks[row, max(s, row - 2) : row] = layerwise.BARRED
    weights = np.tri(S, dtype=np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    choose = knockouts.random_of_equal_mass(s, jnp.int32(0))
    taken = np.asarray(
      choose(jnp.asarray(weights), jnp.asarray(marks), jnp.zeros(3, jnp.int32))
    )
    self.assertFalse((taken & (marks != layerwise.SEEN)).any())
    self.assertFalse(taken[:, :s].any())
    self.assertFalse(np.trace(taken))
    counts = np.clip(np.arange(S) - s, 0, 2)
    free = np.clip(np.arange(S) - s - 2, 0, None)
    np.testing.assert_array_equal(taken.sum(axis=1), np.minimum(counts, free))


if __name__ == "__main__":
  absltest.main()
