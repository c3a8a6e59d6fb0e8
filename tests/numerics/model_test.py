"""The backbone and its mechanisms: leaks, laws, equivariances, caches."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tiny
import written
from absl.testing import absltest, parameterized

import pallas_kernels
from aoarm_jax import objective, orders
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config
from aoarm_jax.model import cached, cost, layers, parameters, vocabulary

_B, _T, _V = 3, 7, 5


def _slots(tokens, order, s, V=_V) -> orders.Slots:
  """As numpy, laid out by hand."""
  B, T = tokens.shape
  ids = [np.full((B, 1), V + i) for i in range(s)]
  ends = [np.full((B, 1), p) for p in (0, T + 1)[:s]]
  content = np.take_along_axis(tokens, order - 1, axis=1)[:, :-1]
  targets = [np.zeros((B, 1)), order][2 - s :]
  return orders.Slots(
    *(
      np.concatenate(parts, axis=1).astype(np.int32)
      for parts in ([*ids, content], [*ends, order[:, :-1]], targets)
    )
  )


def _in_natural_order(hand, tokens, order):
  """Logits [T, V] by rank, computed by position with dense rank masks.

  Rows stand at positions 0, 1..T (and T + 1); the last token generated is
  among the keys too, hidden by its rank alone.
  """
  model, V = hand.model, hand.V
  T, s = len(order), model.sentinels
  ids = np.array([V, *tokens, V + 1][: T + s])
  position = np.arange(T + s)
  rank = np.full(T + s, -1)
  rank[order] = np.arange(T)
  if s == 2:
    rank[0] = -2  # BOS stands before EOS.
  seen = rank[:, None] >= rank
  before = np.argsort(rank)[s - 1 : -1]  # The row before each target.
  if model.kind.streams == 2:
    _, cache = hand.one_stream(ids, position, position, seen)
    seen = rank[order][:, None] > rank
    return hand.query_stream(order, cache, seen, ids, position)
  target = np.zeros(T + s, int)
  target[before] = order
  turns = {"content": position, "target": target - model.shifted}
  lead = np.stack([turns[name] for name in model.kind.query or ["content"]], 1)
  return hand.one_stream(ids, lead, position, seen, target)[0][before]


def _sequence_nll(network, params, tokens, order, s, V):
  return objective.order_nll(
    functools.partial(network, params),
    tiny.layout(s, V, tokens.shape[1]),
    tokens,
    order,
  ).sum(axis=1)


def _reaches(network, params, tokens, order, s):
  """bool [T, S, B]: does the token of rank r move the logits of slot i?

  Bitwise, and every call runs the same program on the same shapes.
  """
  base = np.asarray(network(params, _slots(tokens, order, s)))
  moved = []
  for r in range(tokens.shape[1]):
    other, at = tokens.copy(), order[:, r : r + 1] - 1
    new = (np.take_along_axis(tokens, at, axis=1) + 1 + r % 2) % _V
    np.put_along_axis(other, at, new, axis=1)
    logits = np.asarray(network(params, _slots(other, order, s)))
    moved.append((logits != base).any(axis=-1).T)
  return np.array(moved)


def _may_reach(T, s):
  """bool [T, S, 1]: rank r is the content of slot r + s, seen from there on."""
  reach = np.arange(T + s - 1) >= np.arange(T)[:, None] + s
  return reach[..., None]


def _leaky(q, k, v, visible=None, **kwargs):
  """Attention in which each row also sees the next slot."""
  if visible is None:
    rows = q[0].shape[:2]
    visible = jnp.broadcast_to(jnp.arange(rows[1]) + 1, rows)
  visible = jnp.minimum(visible + 1, k.shape[1])
  return _attention(q, k, v, visible, **kwargs)


_attention = pallas_kernels.any_order_attention
_plant = functools.partial(
  mock.patch.object, pallas_kernels, "any_order_attention", _leaky
)


class LeakTest(parameterized.TestCase):
  @parameterized.parameters(*tiny.CASES, *tiny.BACKBONES)
  def test_only_visible_tokens_move_logits(self, mechanism, s, options=()):
    """Every token moves the slots that see it, and no bit of any other."""
    _, params, network = tiny.jitted(mechanism, s, **dict(options))
    tokens = tiny.tokens(_B, _T, _V)
    families = config.ORDER_FAMILIES
    if mechanisms.MECHANISMS[mechanism].left_to_right:
      families = ("left_to_right",)
    for family in families:
      order = _family_orders()[family]
      reaches = _reaches(network, params, tokens, order, s)
      expected = np.broadcast_to(_may_reach(_T, s), reaches.shape)
      np.testing.assert_array_equal(reaches, expected, family)

  @parameterized.parameters(*tiny.ANY_ORDER)
  def test_the_order_to_come_moves_nothing(self, mechanism, s):
    """Logits at rank r know sigma(r), and nothing of sigma(> r)."""
    _, params, network = tiny.jitted(mechanism, s)
    tokens = tiny.tokens(_B, _T, _V)
    order = tiny.orders_of(mechanism, _B, _T)
    base = network(params, _slots(tokens, order, s))
    for r in range(_T - 2):
      tail = np.roll(order[:, r + 1 :], 1, axis=1)
      other = np.concatenate([order[:, : r + 1], tail], axis=1)
      logits = network(params, _slots(tokens, other, s))
      np.testing.assert_array_equal(logits[:, : r + s], base[:, : r + s])
      moved = np.abs(logits[:, r + s] - base[:, r + s])
      self.assertGreater(moved.max(), 1e-2)

  @parameterized.parameters("two_stream", "decoupled_rope")
  def test_a_planted_leak_is_found(self, mechanism):
    made = tiny.make(mechanism, 2, L=1)
    order = tiny.orders_of(mechanism, _B, _T)
    tokens = tiny.tokens(_B, _T, _V)
    with _plant():
      network = jax.jit(made.apply)
      reaches = _reaches(network, tiny.sharp(made), tokens, order, 2)
    leaks = reaches & ~_may_reach(_T, 2)
    # Every row but the last, which has no next slot, sees its own target.
    self.assertEqual(leaks.any(axis=(1, 2)).sum(), _T - 1)


@functools.cache
def _family_orders():
  """int32 [B, T] by family."""
  given = dict(block_width=3, given=(4, 1, 7, 2, 6, 3, 5))

  def draw(key):
    return {
      family: orders.draw(
        key, _B, _T, config.Orders(family=family, **given), step=500
      )
      for family in config.ORDER_FAMILIES
    }

  return jax.tree.map(np.asarray, tiny.quick_jit(draw)(jax.random.key(0)))


class NormalisationTest(parameterized.TestCase):
  T, V = 4, 3

  def totals(self, mechanism, s, options=()):
    """Sum over all sequences of p(x | sigma), by order."""
    sizes = dict(T=self.T, V=self.V, D=8, N=2) | dict(options)
    made = tiny.make(mechanism, s, **sizes)
    params = tiny.sharp(made)
    every = tiny.all_orders(self.T)
    if mechanisms.MECHANISMS[mechanism].left_to_right:
      every = every[:1]
    texts = tiny.all_sequences(self.V, self.T)
    tokens = np.tile(texts, (len(every), 1))
    order = np.repeat(every, len(texts), axis=0)
    network = made.apply
    nll = tiny.quick_jit(
      functools.partial(_sequence_nll, network, s=s, V=self.V)
    )(params, tokens, order)
    p = np.exp(-np.asarray(nll, np.float64)).reshape(len(every), -1)
    # The law is sharp enough for a fault to show.
    self.assertGreater(p.max(), 4 / len(texts))
    return p.sum(axis=1)

  @parameterized.parameters(*tiny.CASES, *tiny.BACKBONES)
  def test_the_law_of_every_order_sums_to_one(self, mechanism, s, options=()):
    totals = self.totals(mechanism, s, options)
    self.assertLen(totals, 1 if mechanism == "causal" else 24)
    np.testing.assert_allclose(totals, 1.0, atol=1e-5)

  @parameterized.parameters(*tiny.CHAIN)
  def test_a_planted_leak_breaks_it(self, mechanism):
    with _plant():
      totals = self.totals(mechanism, 1)
    off = np.sort(np.abs(totals - 1))
    # In a few orders a small gate may hide it.
    self.assertGreater(off[len(off) // 4], 1e-3)
    self.assertGreater(off.max(), 0.1)


class WrittenTest(parameterized.TestCase):
  """Against the second implementation."""

  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(_B, _T, _V)

  def both(self, mechanism, s, options=()):
    """(written by hand, slots, logits [B, S, V] of the library)."""
    model, params, network = tiny.jitted(mechanism, s, **dict(options))
    self.order = tiny.orders_of(mechanism, _B, _T)
    slots = _slots(self.tokens, self.order, s)
    logits = np.asarray(network(params, slots))
    self.assertEqual((logits.shape, logits.dtype), ((_B, _T + s - 1, _V), "f4"))
    return written.Written(model, params), slots, logits

  def assert_close(self, got, want):
    self.assertGreater(np.std(want), 0.5)
    tiny.assert_same(got, want, roundings=256)

  @parameterized.parameters(1, 2)
  def test_two_streams_are_content_and_query_separately(self, s):
    hand, slots, logits = self.both("two_stream", s)
    causal = np.tri(_T + s - 1, dtype=bool)
    for b in range(_B):
      ids, c, t = (x[b] for x in slots[:3])
      _, cache = hand.one_stream(ids, c, c, causal)
      self.assert_close(logits[b], hand.query_stream(t, cache, causal))

  @parameterized.parameters(1, 2)
  def test_decoupled_rope_left_to_right_is_rope_with_a_shift(self, s):
    """The query at position p turns by p + 1, the key by p."""
    model, params, network = tiny.jitted("decoupled_rope", s)
    natural = np.tile(np.arange(1, _T + 1), (_B, 1))
    logits = network(params, _slots(self.tokens, natural, s))
    hand = written.Written(model, params)
    for b in range(_B):
      ids = np.array([_V, *self.tokens[b, :-1]])
      lead, lag = np.arange(_T) + 1, np.arange(_T)
      if s == 2:  # EOS second, it predicts position 1; BOS predicts nothing.
        ids = np.insert(ids, 1, _V + 1)
        lead, lag = np.insert(lead, 0, 0), np.insert(lag, 1, _T + 1)
      causal = np.tri(len(ids), dtype=bool)
      want, _ = hand.one_stream(ids, lead, lag, causal)
      self.assert_close(logits[b], want)

  def test_causal_is_rope_without_the_shift(self):
    hand, _, logits = self.both("causal", 1)
    causal, position = np.tri(_T, dtype=bool), np.arange(_T)
    for b in range(_B):
      ids = np.array([_V, *self.tokens[b, :-1]])
      want, _ = hand.one_stream(ids, position, position, causal)
      self.assert_close(logits[b], want)
      # The shift is no matter of taste.
      other, _ = hand.one_stream(ids, position + 1, position, causal)
      self.assertGreater(np.abs(other - want).max(), 0.1)

  @parameterized.parameters(
    ("two_stream", None),
    ("two_stream", [6, 3, 0]),
    ("two_stream_untied", None),
    ("decoupled_rope", None),
  )
  def test_shifted_left_to_right_is_causal(self, mechanism, ranks):
    """A converted left-to-right model predicts what it did."""
    _, params, network = tiny.jitted("causal", 1, kv_heads=1)
    natural = np.tile(np.arange(1, _T + 1, dtype=np.int32), (_B, 1))
    want = network(params, _slots(self.tokens, natural, 1))
    made = tiny.make(mechanism, 1, kv_heads=1, shifted=True)
    other = tiny.sharp(made, seed=5) | params
    if mechanism == "two_stream_untied":
      copy = jax.tree.map(lambda x: x, params["blocks"])
      del copy["attention"]["key"], copy["attention"]["key_norm"]
      del copy["attention"]["value"]
      other["blocks"] = params["blocks"] | {"of_queries": copy}
    if ranks is not None:
      ranks = np.tile(np.array(ranks, np.int32), (_B, 1))
      want = np.take_along_axis(np.asarray(want), ranks[..., None], axis=1)
    slots = orders.to_slots(self.tokens, natural, made.layout, ranks=ranks)
    tiny.assert_same(jax.jit(made.apply)(other, slots), want)
    # In another order it predicts something else.
    slots = orders.to_slots(self.tokens, natural[:, ::-1], made.layout)
    got = np.asarray(jax.jit(made.apply)(other, slots))
    self.assertGreater(np.abs(got[:, 0] - np.asarray(want)[:, -1]).max(), 0.1)

  @parameterized.parameters(*tiny.CASES, *tiny.BACKBONES)
  def test_relabelling(self, mechanism, s, options=()):
    """Slots in generation order equal natural order with the rank mask."""
    hand, _, logits = self.both(mechanism, s, options)
    for b in range(_B):
      want = _in_natural_order(hand, self.tokens[b], self.order[b])
      self.assert_close(logits[b, s - 1 :], want)

  @parameterized.parameters(*tiny.ANY_ORDER)
  def test_swapping_two_earlier_slots_moves_logits(self, mechanism, s):
    """No invariance of causal orders: earlier rows see other prefixes."""
    _, params, network = tiny.jitted(mechanism, s)
    order = tiny.orders_of(mechanism, _B, _T)
    swapped = order.copy()
    swapped[:, [1, 2]] = order[:, [2, 1]]
    logits, other = (
      network(params, _slots(self.tokens, o, s))[:, s + 3 :]
      for o in (order, swapped)
    )
    self.assertGreater(np.abs(logits - other).max(axis=(0, 2)).min(), 1e-2)

  @parameterized.parameters(*tiny.ANY_ORDER)
  def test_single_key_blindness(self, mechanism, s):
    """With BOS alone, rank 0 cannot tell sigma(0); with EOS beside it can.

    Not so where the target enters by more than rotation, or where BOS has
    several rows.
    """
    kind = mechanisms.MECHANISMS[mechanism]
    _, params, network = tiny.jitted(mechanism, s)
    natural = np.arange(1, _T + 1)
    order = np.array([np.roll(natural, -2 * b) for b in range(_B)])
    first = network(params, _slots(self.tokens, order, s))[:, s - 1]
    moved = np.abs(first - first[0]).max(axis=-1)[1:]
    by_rotation = "target" not in kind.added and not kind.condition
    if s == kind.copies == 1 and by_rotation:
      tiny.assert_same(first, np.broadcast_to(first[0], first.shape))
    else:
      self.assertGreater(moved.min(), 1e-2)


@functools.cache
def _extend(mechanism, s, **options):
  made = tiny.make(mechanism, s, **options)
  return tiny.quick_jit(
    lambda params, *args: cached.Cached(made.bind(params)).extend(*args)
  )


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(_B, _T, _V)

  def prepare(self, mechanism, s, **options):
    """(extend, slots, uncached logits, empty cache)."""
    model, params, network = tiny.jitted(mechanism, s, **options)
    order = tiny.orders_of(mechanism, _B, _T)
    slots = _slots(self.tokens, order, s)
    cache = cached.empty_cache(
      model, config.Compute(dtype="float32"), _B, _T + s - 1
    )
    extend = functools.partial(_extend(mechanism, s, **options), params)
    return extend, slots, np.asarray(network(params, slots)), cache

  @parameterized.parameters(
    *tiny.ALTERNATING,
    *tiny.BACKBONES,
    ("two_stream_untied", 1, tiny.GROUPED),
    ("register", 1, tiny.GROUPED),
  )
  def test_cached_logits_are_uncached_logits(self, mechanism, s, options=()):
    """In chunks of 1, 3 and all slots."""
    options = dict(options)
    extend, slots, want, empty = self.prepare(mechanism, s, **options)
    S = want.shape[1]
    for chunks in ([1] * S, [3, 1, 3, *[1] * (s - 1)], [S]):
      cache, at, got = empty, 0, []
      for R in chunks:
        part = orders.Slots(*(x[:, at : at + R] for x in slots[:3]))
        logits, cache = extend(part, cache, np.full(_B, at, np.int32))
        got.append(logits)
        at += R
      self.assertEqual(at, S)
      tiny.assert_same(np.concatenate(got, axis=1), want)

  @parameterized.parameters(*tiny.ALTERNATING)
  def test_ragged_starts_after_junk(self, mechanism, s):
    """Rows at different slots of one cache, whose later slots hold junk."""
    extend, slots, want, cache = self.prepare(mechanism, s)
    start, R = np.array([2, 0, 4], np.int32), 3
    at = start[:, None] + np.arange(R)
    junk = np.where(np.arange(want.shape[1]) < start[:, None], slots.tokens, 0)
    _, cache = extend(
      slots._replace(tokens=junk), cache, np.zeros(_B, np.int32)
    )
    part = orders.Slots(*(np.take_along_axis(x, at, axis=1) for x in slots[:3]))
    logits, _ = extend(part, cache, start)
    want = np.take_along_axis(want, at[..., None], axis=1)
    tiny.assert_same(logits, want)

  @parameterized.parameters("two_stream", "decoupled_rope")
  def test_one_text_is_alone_what_it_is_in_a_batch(self, mechanism):
    """Also where one row predicts, which gets the company of another row."""
    extend, slots, want, empty = self.prepare(mechanism, 1)
    tokens = orders.Slots(*(np.tile(x, (22, 1))[:64] for x in slots[:3]))
    for rows in (slice(1, 2), slice(0, 64)):
      cache = jax.tree.map(
        lambda x, n=rows.stop - rows.start: np.zeros((n, *x.shape[1:]), "f4"),
        empty,
      )
      for at in range(3):
        part = orders.Slots(*(x[rows, at : at + 1] for x in tokens[:3]))
        logits, cache = extend(part, cache, np.full(len(part[0]), at, "i4"))
        self.assertEqual(logits.shape, (len(part[0]), 1, _V))
      text = logits[0 if len(logits) == 1 else 1]
      tiny.assert_same(text, want[1, 2:3])

  @parameterized.parameters(("two_stream", 2), ("decoupled_rope", 1))
  def test_what_a_cached_slot_is_bound_to(self, mechanism, free):
    """Two streams: to the past only. One: to its target from layer 2 on."""
    extend, slots, _, empty = self.prepare(mechanism, 1)
    start = np.zeros(_B, np.int32)
    _, cache = extend(slots, empty, start)
    other = slots._replace(target_position=slots.target_position[:, ::-1])
    _, moved = extend(other, empty, start)
    for a, b in zip(cache, moved):
      np.testing.assert_array_equal(a[:free], b[:free])
      for layer in range(free, len(a)):
        self.assertGreater(np.abs(a[layer] - b[layer]).max(), 1e-2)


def _value_and_gradients(mechanism, L, gradients=True, **compute):
  """(nll [B], gradients of its sum or None) at parameters drawn for L."""
  made = tiny.make(mechanism, 1, L=L, **compute)
  tokens = tiny.tokens(_B, _T, _V)
  order = tiny.orders_of(mechanism, _B, _T)

  def loss(params):
    nll = _sequence_nll(made.apply, params, tokens, order, 1, _V)
    return nll.sum(), nll

  params = tiny.sharp(made)
  if not gradients:
    return tiny.quick_jit(loss)(params)[1], None
  (_, nll), slopes = tiny.quick_jit(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  return nll, slopes


_plain = functools.cache(_value_and_gradients)


class ComputeTest(parameterized.TestCase):
  """The same mathematics, however it is run."""

  def assert_same(self, got, want):
    for leaf in jax.tree.leaves(want):
      self.assertGreater(np.abs(leaf).max(), 1e-3)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-4),
      got,
      want,
    )

  @parameterized.parameters(
    (True, "two_stream", dict(scan_layers=True)),
    (True, "two_stream", dict(attention="reference", remat=True)),
    (False, "decoupled_rope", dict(scan_layers=True, remat=True)),
    (False, "causal", dict(scan_layers=True, attention="reference")),
  )
  def test_options_change_nothing(self, gradients, mechanism, options):
    """Neither likelihoods nor their gradients."""
    got = _value_and_gradients(mechanism, 3, gradients, **options)
    self.assert_same(got, _plain(mechanism, 3, gradients))

  def test_the_last_content_is_dead(self):
    """To compute both streams in the last layer changes no gradient.

    With one layer, content is keys and values only.
    """
    block = layers.Block.__call__
    outputs = []

    def whole(self, streams, setting, attend, S, read_out=None):
      outputs.append(block(self, streams, setting, attend, S))
      return read_out(outputs[-1]) if read_out else outputs[-1]

    with mock.patch.object(layers.Block, "__call__", whole):
      got = _value_and_gradients("two_stream", 1)
    # Both streams were there, in the last layer too.
    self.assertLen(outputs[-1], 2)
    self.assert_same(got, _plain("two_stream", 1))

  def test_bfloat16(self):
    """Near float32, and the head's output is float32."""
    got, _ = _value_and_gradients("two_stream", 3, False, dtype="bfloat16")
    want, _ = _plain("two_stream", 3, True)
    self.assertEqual(got.dtype, jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0.1)
    self.assertGreater(np.abs(got - want).max(), 1e-4)

  def test_initial_parameters(self):
    """Float32, of the documented scale, and of no two layers alike."""
    made = tiny.make(L=3, D=32, V=27, N=2)
    params = tiny.quick_jit(made.init)(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, made.abstract_params)
    chex.assert_tree_all_finite(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      self.assertEqual(leaf.dtype, jnp.float32)
      name = path[-1].key
      if name == "scale":
        np.testing.assert_array_equal(leaf, 1.0)
        continue
      scale = 0.02 / 6**0.5 if name in ("out", "down") else 0.02
      self.assertAlmostEqual(float(leaf.std()) / scale, 1.0, delta=0.3)
      if path[0].key == "blocks":
        self.assertGreater(np.abs(leaf[1] - leaf[0]).max(), scale)
        self.assertGreater(np.abs(leaf[2] - leaf[1]).max(), scale)


class CountTest(parameterized.TestCase):
  @parameterized.product(mechanism=tiny.MECHANISMS, s=(1, 2))
  def test_parameters(self, mechanism, s):
    V, D, L, N, T = 5, 12, 3, 3, 7
    H, F, P = D // N, 4 * D, T + 2
    layer = 4 * D * D + 2 * D * F + 2 * D + 2 * H
    count = (V + 2) * D + L * layer + D + D * V
    kind = mechanisms.MECHANISMS[mechanism]
    # The start of the query rows, MASK, the embeddings of positions, and adaLN.
    own = D * (kind.streams == 2) + D * kind.masked + P * D * bool(kind.added)
    own += D * (kind.copies - 1)
    # Untied query rows have all but keys and values.
    own += kind.untied * L * (layer - 2 * D * D - H)
    if width := kind.condition:
      own += P * width + (6 * L + 2) * (width * D + D)
    params = tiny.make(mechanism, s, T=T, V=V, D=D, L=L, N=N).abstract_params
    self.assertEqual(
      sum(leaf.size for leaf in jax.tree.leaves(params)), count + own
    )

  @parameterized.product(mechanism=tiny.MECHANISMS, s=(1, 2), L=(1, 3))
  def test_flops_are_those_of_the_program(self, mechanism, s, L):
    """XLA's count of the forward pass of the plain attention."""
    self.check_count(mechanism, s, L, _empty_slots)

  def test_parameters_of_a_backbone(self):
    """Two streams with every option: each array, by hand."""
    V, D, L, N, M, H, F, T = 5, 12, 3, 4, 2, 6, 20, 7
    options = tiny.GROUPED | dict(T=T, V=V, D=D, L=L, mlp_width=F)
    layer = 2 * N * D * H + 2 * M * D * H + 3 * D * F + 2 * D + 2 * H
    for name, fewer in (("qk_norm", 2 * H * L), ("tied", -D * V)):
      made = tiny.make("two_stream", 1, **options)
      other = tiny.make("two_stream", 1, **options | {name: False})
      first, second = (
        sum(leaf.size for leaf in jax.tree.leaves(each.abstract_params))
        for each in (made, other)
      )
      self.assertEqual(first, (V + 2) * D + L * layer + 2 * D)
      self.assertEqual(second, first - fewer)
    # LayerNorm, biases and positions, and no gate.
    more = N * H + 2 * M * H + D + F + D
    more = L * (more - 2 * H - D * F + 2 * D) + D + (T + 2) * D
    options |= dict(mlp="gelu", norm="layer", biases=True, positions="learned")
    options |= dict(rope_scaling="none", rope_factor=1.0, rope_original_T=0)
    other = tiny.make("two_stream", 1, **options | dict(qk_norm=False))
    second = sum(leaf.size for leaf in jax.tree.leaves(other.abstract_params))
    self.assertEqual(second, first + more)
    shapes = cached.empty_cache(made.model, made.config.compute, 1, 1)
    size = sum(leaf.nbytes for leaf in (*shapes.k, *shapes.v))
    self.assertEqual(cost.cache_bytes_per_token(made.model, "float32"), size)
    self.assertEqual(size, 2 * 4 * L * M * H)

  @parameterized.parameters(
    ("two_stream", "rotary"), ("decoupled_rope", "rotary"), ("mdlm", "learned")
  )
  def test_flops_of_a_backbone(self, mechanism, positions):
    options = dict(kv_heads=1, head_size=32, mlp="swiglu", mlp_width=256)
    options |= dict(positions=positions, biases=True, norm="layer")
    self.check_count(mechanism, 1, 3, _empty_slots, **options)

  def test_flops_of_a_fraction_of_the_queries(self):
    def slots(model):
      chosen = jax.ShapeDtypeStruct((1, 128), jnp.int32)
      queries = orders.Queries(chosen, chosen)
      return _empty_slots(model)._replace(queries=queries)

    train = config.Train(batch_size=1, query_fraction=0.25)
    self.check_count("two_stream", 1, 3, slots, train)

  def check_count(self, mechanism, s, L, slots, train=None, **options):
    # Attention is a third of it.
    options = dict(T=511, V=27, D=128, L=L, N=1) | options
    made = tiny.make(mechanism, s, attention="reference", **options)
    model, D = made.model, 128
    lowered = jax.jit(made.apply).lower(made.abstract_params, slots(model))
    train = train or config.Train(batch_size=1)
    counts = config.Config(model=model, train=train)
    expected = cost.forward_flops(counts, visible_only=False)
    counted = lowered.cost_analysis()["flops"]
    self.assertAlmostEqual(counted / expected, 1.0, delta=0.05)
    # One layer's rows more, or a causal program, would be seen.
    rows = model.S * model.kind.copies
    self.assertGreater(rows * 24 * D * D / expected, 0.1)
    if not model.kind.masked:
      needed = cost.forward_flops(counts)
      self.assertGreater(expected / needed, 1.1)

  def test_by_hand(self):
    """Two streams, two layers: every matmul of one sequence."""
    D, F, S, V = 12, 48, 7, 27
    model = config.Model(mechanism="two_stream", T=7, D=D, L=2, N=3)
    attend = 4 * D * sum(range(1, S + 1))
    projections = S * 2 * D * D
    mlp = 2 * S * 2 * D * F
    stream = 2 * projections + attend + mlp  # Queries, outputs.
    total = 3 * stream + 2 * 2 * projections + 2 * S * D * V
    run = config.Config(model=model, train=config.Train(batch_size=3))
    self.assertEqual(cost.forward_flops(run), 3 * total)
    self.assertEqual(cost.training_flops_per_token(run), 3 * total / 7)
    self.assertEqual(cost.cache_bytes_per_token(model, "bfloat16"), 2 * 24 * 2)


def _empty_slots(model):
  row = jax.ShapeDtypeStruct((1, model.S), jnp.int32)
  return orders.Slots(row, row, row)


class EmbedTest(parameterized.TestCase):
  """Rows of a table, with a gradient that is a matmul."""

  def setUp(self):
    super().setUp()
    self.enterContext(tiny.rank_promotion_raises())
    generator = np.random.default_rng(0)
    self.tokens = tiny.tokens(_B, _T, _V)
    self.tokens[0] = 2  # One token many times; and token 4 never.
    self.tokens[self.tokens == 4] = 1
    self.table = generator.normal(size=(_V, 12)).astype(np.float32)
    self.weight = generator.normal(size=(_B, _T, 12)).astype(np.float32)

  def test_value_and_gradient_are_those_of_the_gather(self):
    def loss(take, table):
      out = take(table, self.tokens)
      return (out * self.weight).sum(), out

    grad = jax.grad(loss, argnums=1, has_aux=True)
    run = jax.jit(grad, static_argnums=0)
    got, out = run(vocabulary.embed, self.table)
    want, _ = run(lambda table, tokens: table[tokens], self.table)
    np.testing.assert_array_equal(out, self.table[self.tokens])
    tiny.assert_same(got, want)
    np.testing.assert_array_equal(got[4], 0.0)
    # Without jit too.
    got, _ = grad(vocabulary.embed, jnp.asarray(self.table))
    tiny.assert_same(got, want)

  def test_vmap_over_tokens_and_tables(self):
    tables = np.stack([self.table, 2 * self.table, -self.table])
    take = jax.jit(jax.vmap(vocabulary.embed))
    each = [table[ids] for table, ids in zip(tables, self.tokens)]
    np.testing.assert_array_equal(take(tables, self.tokens), each)
    shared = jax.jit(jax.vmap(vocabulary.embed, (None, 0)))
    np.testing.assert_array_equal(
      shared(self.table, self.tokens), self.table[self.tokens]
    )

    def gradient(take, table, ids, weight):
      return jax.grad(lambda table: (take(table, ids) * weight).sum())(table)

    got, want = (
      jax.jit(jax.vmap(functools.partial(gradient, take)))(
        tables, self.tokens, self.weight
      )
      for take in (vocabulary.embed, lambda table, ids: table[ids])
    )
    tiny.assert_same(got, want)

  def test_the_gradient_has_no_scatter(self):
    def loss(table):
      return vocabulary.embed(table, self.tokens).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(self.table))
    self.assertNotIn("scatter", program)
    self.assertIn("dot_general", program)


class LookUpTest(parameterized.TestCase):
  """Rows of a table at positions that differ within a sequence."""

  def test_value_and_gradient_are_those_of_the_gather(self):
    generator = np.random.default_rng(0)
    table = generator.normal(size=(9, 12)).astype(np.float32)
    position = np.stack([generator.permutation(9)[:_T] for _ in range(_B)])
    weight = generator.normal(size=(_B, _T, 12)).astype(np.float32)

    def loss(take, table):
      return (take(table, position) * weight).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    got = run(parameters.look_up, table)
    want = run(lambda table, at: table[at], table)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    unused = sorted(set(range(9)) - set(position.flat))
    np.testing.assert_array_equal(np.asarray(got[1])[unused], 0.0)


if __name__ == "__main__":
  absltest.main()
