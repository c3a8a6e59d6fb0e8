"""Padded documents: real lengths, in every mechanism."""

import functools

import jax
import numpy as np
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import lengths, objective, orders
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.evaluation import estimators
from aoarm_jax.model import network as network_lib

_V = 3  # Symbols of the text. The end token is the next id.
_END = _V
# A masked mechanism sees the length, so it needs to be told.
_ALTERNATING = (*tiny.ALTERNATING, *((m, 2) for m in tiny.MASKED))


@functools.cache
def _network(mechanism, sentinels, T, documents="pad"):
  model = config_lib.Model(
    mechanism=mechanism, sentinels=sentinels, T=T, D=12, L=2, N=3
  )
  config = config_lib.Config(
    model=model,
    data=config_lib.Data(documents=documents),
    compute=config_lib.Compute(dtype="float32", attention="xla"),
  )
  return network_lib.Network(config, None, tiny.tokenizer(_V))


@functools.cache
def _nll(mechanism, sentinels, T, groups=False):
  """Jitted (tokens, order[, group_start]) -> nats [B, T]."""
  network = _network(mechanism, sentinels, T)
  apply = functools.partial(network.apply, tiny.sharp(network))

  @tiny.quick_jit
  def nll(tokens, order, group_start=None):
    return objective.order_nll(
      apply, network.layout, tokens, order, group_start=group_start
    )

  return nll


def _rows(texts, T, filler=_END):
  """Rows [B, T] of texts: their end where it fits, and then the filler."""
  rows = np.full((len(texts), T), filler, np.int32)
  for row, text in zip(rows, texts):
    row[: len(text)] = text
    row[len(text) : len(text) + 1] = _END
  return rows


class RealTest(absltest.TestCase):
  def test_first_end_counts(self):
    rows = np.array([[0, 1, 3, 0, 3], [0, 1, 2, 0, 1], [0, 1, 2, 0, 3]])
    for s, want in ((1, [3, 5, 5]), (2, [2, 5, 4])):
      layout = orders.Layout(s, 4, 6, end_token=_END)
      np.testing.assert_array_equal(lengths.real(rows, layout), want)


class PaddingTest(parameterized.TestCase):
  @parameterized.parameters(*_ALTERNATING)
  def test_padded_row_has_the_nats_of_the_row_alone(self, mechanism, s):
    T = 7
    network, nll = _network(mechanism, s, T), _nll(mechanism, s, T)
    params = tiny.sharp(network)
    texts = [tiny.tokens(1, n, _V, seed=n)[0] for n in (1, 4)]
    order = tiny.orders_of(mechanism, len(texts), T)
    padded = np.asarray(nll(_rows(texts, T), order))
    # All that can lie in padded slots: symbols, ends, and ids of no symbol.
    for filler in range(_V + 2):
      other = np.asarray(nll(_rows(texts, T, filler), order))
      np.testing.assert_array_equal(padded, other)

    def alone(slots):
      """The same network on slots that know no padding."""
      logits = network.apply(params, slots)
      if s == 2:
        return logits
      furthest = jax.lax.cummax(slots.position, axis=1)
      never = slots.target_position <= furthest
      return logits.at[..., _END].set(
        jax.numpy.where(never, -1e9, logits[..., _END])
      )

    for text, row_order, nats in zip(texts, order, padded):
      length = len(text) + (s == 1)
      layout = network.layout._replace(end_token=None, end=length + 1)
      row = np.append(text, [_END] * (s == 1))[None].astype(np.int32)
      inside = row_order[row_order <= length][None]
      want = tiny.quick_jit(
        functools.partial(objective.order_nll, alone, layout)
      )(row, inside)
      tiny.assert_same(nats[:length], np.asarray(want)[0])
      np.testing.assert_array_equal(nats[length:], 0)

  @parameterized.parameters(1, 2)
  def test_groups_see_no_padding(self, s):
    T = 7
    nll = _nll("two_stream", s, T)
    texts = [tiny.tokens(1, n, _V, seed=n)[0] for n in (2, 3, 5)]
    order = tiny.orders_of("two_stream", len(texts), T)
    groups = np.tile(np.arange(T) % 3 == 0, (len(texts), 1))
    padded = nll(_rows(texts, T), order, groups)
    for filler in range(_V + 2):
      other = nll(_rows(texts, T, filler), order, groups)
      np.testing.assert_array_equal(padded, other)

  def test_masks_know_the_length(self):
    # Masks are drawn among real positions, and padding is in no loss.
    T, texts = 5, [tiny.tokens(1, n, _V)[0] for n in (1, 2, 4)]
    network = _network("mdlm", 2, T)
    apply = functools.partial(network.apply, tiny.sharp(network))
    natural = np.tile(np.arange(1, T + 1, dtype=np.int32), (3, 1))
    length = np.array([1, 2, 4], np.int32)
    masked = np.asarray(
      objective.draw_masked(
        jax.random.split(jax.random.key(0), 600),
        np.tile(natural, (200, 1)),
        np.full(600, 0.5, np.float32),
        np.tile(length, 200),
      )
    )
    # Half of the real positions in the mean, and no other.
    counts = masked.sum(axis=1).reshape(200, 3).mean(axis=0)
    np.testing.assert_allclose(counts, length / 2, atol=0.3)
    beyond = np.arange(T) >= np.tile(length, 200)[:, None]
    self.assertFalse((masked & beyond).any())
    masked = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 1, 1, 0, 1]], bool)
    nats = objective.masked_nll(apply, network.layout, _rows(texts, T), masked)
    np.testing.assert_array_equal(
      nats != 0, masked & (natural <= length[:, None])
    )
    other = _rows(texts, T, 0)
    np.testing.assert_array_equal(
      nats, objective.masked_nll(apply, network.layout, other, masked)
    )


class NormalisationTest(parameterized.TestCase):
  @parameterized.parameters(*tiny.CHAIN)
  def test_texts_of_all_lengths_sum_to_one(self, mechanism):
    T, s = 3, 1
    texts = [t for n in range(T + 1) for t in tiny.all_sequences(_V, n)]
    order = np.tile(np.arange(1, T + 1, dtype=np.int32), (len(texts), 1))
    nats = np.asarray(_nll(mechanism, s, T)(_rows(texts, T), order), np.float64)
    self.assertAlmostEqual(np.exp(-nats.sum(axis=1)).sum(), 1, delta=1e-5)
    # The end first tells the length: then texts of this length sum to one.
    if mechanisms.MECHANISMS[mechanism].left_to_right:
      return
    for rest in ((1, 2), (2, 1)):
      texts = tiny.all_sequences(_V, 2)
      order = np.tile(np.array([3, *rest], np.int32), (len(texts), 1))
      nats = np.asarray(_nll(mechanism, s, T)(_rows(texts, T), order))
      total = np.exp(-nats[:, 1:].astype(np.float64).sum(axis=1)).sum()
      self.assertAlmostEqual(total, 1, delta=1e-5)

  @parameterized.parameters(*tiny.MECHANISMS)
  def test_texts_of_a_given_length_sum_to_one(self, mechanism):
    T, s = 3, 2
    ways = tiny.all_orders(T)
    if mechanisms.MECHANISMS[mechanism].left_to_right:
      ways = ways[:1]
    for n in range(1, T + 1):
      texts = _rows(tiny.all_sequences(_V, n), T)
      for order in ways:
        every = np.tile(order, (len(texts), 1))
        nats = np.asarray(_nll(mechanism, s, T)(texts, every), np.float64)
        total = np.exp(-nats.sum(axis=1)).sum()
        self.assertAlmostEqual(total, 1, delta=1e-5)


class TrainingTest(parameterized.TestCase):
  def test_chosen_ranks_are_real(self):
    # Where all real ranks are chosen, the loss of a share of the ranks is the
    # whole loss, and its gradient is finite.
    T, s = 7, 1
    network = _network("two_stream", s, T)
    params = tiny.sharp(network)
    rows = _rows([tiny.tokens(1, n, _V)[0] for n in (1, 2, 5)], T)
    length = lengths.real(rows, network.layout)

    def draws(fraction):
      return objective.draw(
        jax.random.key(1),
        3,
        T,
        config_lib.Orders(),
        config_lib.Train(query_fraction=fraction),
        network.model.kind,
        jax.numpy.int32(0),
        length,
      )

    @tiny.quick_jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, draws):
      apply = functools.partial(network.apply, params)
      nats = objective.training_nll(apply, network.layout, rows, draws)
      return nats.sum(), nats

    whole = _nll("two_stream", s, T)(rows, draws(1.0).order).sum(axis=1)
    chosen = draws(0.43)  # 3 ranks.
    np.testing.assert_array_equal(chosen.ranks[2] < length[2], True)
    (_, part), gradient = loss(params, chosen)
    tiny.assert_same(part[:2], whole[:2])
    nats = _nll("two_stream", s, T)(rows, chosen.order)[2, chosen.ranks[2]]
    tiny.assert_same(part[2], nats.sum() * length[2] / 3)
    for leaf in jax.tree.leaves(gradient):
      self.assertTrue(np.isfinite(leaf).all())

  def test_sums_count_no_padding(self):
    T = 6
    network = _network("sigma_gpt", 1, T)
    rows = _rows([tiny.tokens(1, n, _V)[0] for n in (1, 3, 5)], T)
    config = network.config.replace("orders.family", "right_to_left")
    nats, sums, *_ = estimators.estimate(
      "training_order",
      config,
      network,
      tiny.sharp(network),
      jax.random.key(0),
      jax.numpy.int32(0),
      jax.numpy.int32(0),
      rows,
      np.array([True, True, False]),
    )
    tiny.assert_same(sums["by_rank"].sum(), nats[:2].sum())
    # Lengths 2 and 4: the first rank knows nothing, and from right to left the
    # nearest token is the neighbour.
    np.testing.assert_array_equal(sums["by_distance"][1][:3], [2, 4, 0])


if __name__ == "__main__":
  absltest.main()
