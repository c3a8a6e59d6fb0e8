"""Likelihoods of texts longer than T: blocks behind context, by brute force."""

import functools
import itertools

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.config import mechanisms, purposes
from aoarm_jax.config import schema as config
from aoarm_jax.data import documents, pipeline
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.evaluation import estimators, evaluate
from aoarm_jax.model import network as network_lib

_T, _V, _STRIDE, _K, _SEED = 7, 3, 3, 2, 5
_LENGTH = 17  # The last block has 2 tokens.
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


@functools.cache
def _pieces(mechanism, sentinels):
  """(network, params on its mesh)."""
  mesh = meshes.make_mesh(config.Mesh(data=1))
  network = tiny.make(mechanism, sentinels, T=_T, V=_V, L=1, mesh=mesh)
  return network, sharding.put(mesh, tiny.sharp(network))


@functools.cache
def _evaluator(mechanism, sentinels, times=2):
  network, _ = _pieces(mechanism, sentinels)
  options = config.Eval(ensemble_orders=_K, times=times, seed=_SEED)
  return evaluate.Evaluator(
    network.config.replace("eval", options).replace("train.least_time", 1e-6),
    network,
  )


def _blocks(text, stride=_STRIDE, batch_size=4, ends=None, end=None):
  ends = np.array([len(text)] if ends is None else ends)
  return pipeline.StridedBatches(
    text, ends, T=_T, stride=stride, batch_size=batch_size, end=end
  )


def _estimate(case, batches, estimator, **kwargs):
  network, params = _pieces(*case)
  with jax.set_mesh(network.mesh):
    return _evaluator(*case, **kwargs).estimate(params, batches, estimator, 0)


@functools.cache
def _logits(mechanism, sentinels):
  """Jitted (slots) -> logits [B, R, V]."""
  network, params = _pieces(mechanism, sentinels)
  return tiny.quick_jit(lambda slots: network.apply(params, slots))


def _log_p_of_one(case, window, order, rank):
  """log p of the token of a rank; tokens of later ranks are not looked at."""
  network, _ = _pieces(*case)
  tokens = np.array(window)
  tokens[order[rank:] - 1] = (tokens[order[rank:] - 1] + 1) % _V  # Others.
  target = order[rank] - 1
  if network.layout.masked:
    masked = np.isin(np.arange(1, _T + 1), order[rank:])
    slots = orders.to_masked_slots(tokens[None], masked[None], network.layout)
    row = target + network.layout.sentinels
  else:
    slots = orders.to_slots(tokens[None], order[None], network.layout)
    row = rank + network.layout.sentinels - 1
  logits = np.asarray(_logits(*case)(slots)[0, row], np.float64)
  return (logits - np.log(np.exp(logits).sum()))[window[target]]


def _drawn(case, draw=None):
  """Orders of all blocks; None: from left to right."""
  natural = np.tile(np.arange(1, _T + 1), (6, 1))
  if draw is None:
    return natural
  key = jax.random.fold_in(jax.random.key(_SEED), purposes.EVALUATION)
  key = key if draw < 0 else jax.random.fold_in(key, draw)
  network, _ = _pieces(*case)
  options = network.config.replace("orders.family", "uniform").orders
  return np.asarray(orders.draw(key, 6, _T, options))


def _by_hand(case, text, draw=None):
  """Nats of every block, token by token."""
  nats = []
  for block, drawn in enumerate(_drawn(case, draw)):
    first = block * _STRIDE
    last = min(first + _STRIDE, len(text))
    start = max(0, last - _T)
    window = np.resize(text[start:last], _T)  # Arbitrary after the block.
    known, end = first - start, last - start
    inside = [p for p in drawn if known < p <= end]
    after = [p for p in drawn if p > end]
    order = np.array([*range(1, known + 1), *inside, *after])
    ranks = range(known, end)
    nats.append(-sum(_log_p_of_one(case, window, order, r) for r in ranks))
  return np.array(nats)


class BruteForceTest(parameterized.TestCase):
  @parameterized.parameters(("two_stream", 2), ("mdlm", 2))
  def test_a_sum_over_single_tokens(self, *case):
    self.check_sums(case)

  @parameterized.parameters(("ao_gpt", 1), ("causal", 1))
  @pytest.mark.slow
  def test_a_sum_over_single_tokens_of_others(self, *case):
    self.check_sums(case)

  def check_sums(self, case):
    text = tiny.tokens(1, _LENGTH, _V, seed=2)[0]
    batches = _blocks(text)
    wanted = {"left_to_right": _by_hand(case, text)}
    if not mechanisms.MECHANISMS[case[0]].left_to_right:
      wanted["any_order"] = _by_hand(case, text, -1)
      each = np.stack([_by_hand(case, text, k) for k in range(_K)])
      wanted["ensembled"] = np.log(_K) - np.log(np.exp(-each).sum(axis=0))
    for name, nats in wanted.items():
      found = _estimate(case, batches, name)
      self.assertEqual((found.tokens, found.sequences), (_LENGTH, 6))
      self.assertAlmostEqual(
        found.nats_per_token, nats.sum() / _LENGTH, delta=1e-5, msg=name
      )
    self.assertLen(
      {round(nats.sum(), 3) for nats in wanted.values()}, len(wanted)
    )

  @pytest.mark.thorough
  def test_one_stride_of_t_is_todays_windows(self):
    self.check_windows("two_stream", 2)

  @pytest.mark.slow
  def test_one_stride_of_t_of_a_masked_model(self):
    self.check_windows("mdlm", 2)

  def check_windows(self, *case):
    text = tiny.tokens(1, 3 * _T, _V, seed=3)[0]
    windows = pipeline.eval_batches(text, T=_T, batch_size=4)
    for name in mechanisms.MECHANISMS[case[0]].estimators:
      if name == "given_order":
        continue
      found = _estimate(case, _blocks(text, stride=_T), name)
      wanted = _estimate(case, windows, name)
      self.assertAlmostEqual(
        found.nats_per_token, wanted.nats_per_token, delta=1e-5, msg=name
      )

  @parameterized.parameters(("two_stream", 2))
  @pytest.mark.thorough
  def test_blocks_sum_to_one(self, *case):
    """Also where every conditional is a mean over orders of its context."""
    network, params = _pieces(*case)
    known, B = 2, _V**3
    tokens = np.array([
      [1, 0, *block, 2, 2] for block in itertools.product(range(_V), repeat=3)
    ])  # fmt: skip
    ranks = np.tile(known + np.arange(3), (B, 1)).astype(np.int32)
    for name in network.model.kind.estimators:
      if name in ("given_order", "elbo"):
        continue
      config_here = _evaluator(*case)._config

      def nats_of(row, tokens, name=name, config_here=config_here):
        # Every filling has the draws of one row.
        return estimators.estimate(
          name,
          config_here,
          network,
          params,
          jax.random.key(1),
          np.int32(0),
          np.int32(0),
          tokens[row][None],
          np.ones(1, bool),
          ranks[:1],
        )[0][0]

      with jax.set_mesh(network.mesh):
        nats = tiny.quick_jit(
          lambda: jax.lax.map(
            lambda row: nats_of(row, jax.numpy.asarray(tokens)),
            jax.numpy.arange(B),
          )
        )()
      self.assertAlmostEqual(np.exp(-nats).sum(), 1, delta=1e-5, msg=name)

  @pytest.mark.thorough
  def test_padded_documents_have_the_nats_of_whole_rows(self):
    self.check_padded(1)

  @pytest.mark.slow
  def test_padded_documents_whose_end_is_given(self):
    self.check_padded(2)

  def check_padded(self, sentinels):
    """Where every document fits, with its end."""
    mesh = meshes.make_mesh(config.Mesh(data=1))
    base = _pieces("two_stream", sentinels)[0].config
    base = base.replace("data", config.Data(documents="pad"))
    base = base.replace("eval.seed", _SEED)
    network = network_lib.Network(base, mesh, tiny.tokenizer(_V))
    params = sharding.put(mesh, tiny.sharp(network))
    text = np.array([0, 1, 3, 2, 0, 1, 1, 3, 2, 3], np.uint8)
    rows = pipeline.eval_batches(text, T=_T, batch_size=3, end=network.end)
    ends = np.array([2, 7, 9]) + (not network.end.is_given)
    blocks = _blocks(text, _T, 3, ends, network.end)
    found = []
    for batches in (blocks, rows):
      with jax.set_mesh(mesh):
        evaluator = evaluate.Evaluator(base, network)
        found.append(evaluator.estimate(params, batches, "any_order", 0))
    self.assertEqual(found[0].tokens, found[1].tokens)
    self.assertAlmostEqual(
      found[0].nats_per_token, found[1].nats_per_token, delta=1e-5
    )

  def test_the_elbo_of_a_block_is_the_mean_over_its_orders(self):
    case = ("mdlm", 2)
    text = tiny.tokens(1, 5, _V, seed=4)[0]
    window, nats = np.resize(text, _T), []
    for inside in itertools.permutations((4, 5)):
      order = np.array([1, 2, 3, *inside, 6, 7])
      nats.append(-sum(_log_p_of_one(case, window, order, r) for r in (3, 4)))
    batches = _blocks(np.tile(text, 400), ends=np.arange(1, 401) * 5)
    network, params = _pieces(*case)
    with jax.set_mesh(network.mesh):
      found, _ = evaluate.over_batches(
        jax.jit(
          functools.partial(
            estimators.estimate,
            "elbo",
            _evaluator(*case, times=16)._config,
            network,
            params,
            jax.random.key(0),
            np.int32(0),
          )
        ),
        batches,
        network.mesh,
      )
    second = found[1::2]  # The blocks of 2 tokens behind 3.
    error = second.std(ddof=1) / np.sqrt(len(second))
    self.assertLess(abs(second.mean() - np.mean(nats)), 4 * error)
    self.assertLess(error, 0.05 * np.mean(nats))


class BlocksTest(parameterized.TestCase):
  @parameterized.product(n=[1, 3, 7, 8, 20], stride=[1, 3, 7])
  def test_every_token_is_scored_once(self, n, stride):
    text = np.arange(2 * n, dtype=np.uint8)
    batches = _blocks(text, stride, ends=[n, 2 * n])
    scored = []
    for tokens, real, ranks in batches:
      for row, places in zip(tokens[real], ranks[real]):
        places = places[places < _T]
        scored += row[places].tolist()
        start = int(row[0])
        self.assertEqual(row[places].tolist(), (start + places).tolist())
        begin = n * (start >= n)
        if start > begin:
          self.assertGreaterEqual(places[0], _T - stride)
    self.assertEqual(scored, [*range(2 * n)])
    sizes = batches.sums(np.ones(2 * n, np.int64))
    self.assertEqual(sizes.tolist(), batches.lengths.tolist())
    self.assertEqual(batches.evaluated_tokens, 2 * n)

  @parameterized.parameters(True, False)
  def test_padded_documents(self, is_given):
    """The window of the last block is filled with ends."""
    text = np.array([1, 2, 9, 3, 4, 5, 9], np.uint8)
    ends = np.array([2, 6]) + (not is_given)
    batches = _blocks(text, ends=ends, end=documents.End(9, is_given))
    tokens, real, ranks = batches[0]
    scored = [
      row[places[places < _T]].tolist()
      for row, places in zip(tokens[real], ranks[real])
    ]
    if is_given:
      self.assertEqual(scored, [[1, 2], [3, 4, 5]])
    else:
      self.assertEqual(scored, [[1, 2, 9], [3, 4, 5], [9]])
    self.assertEqual(tokens[0].tolist(), [1, 2, 9, 9, 9, 9, 9])


if __name__ == "__main__":
  absltest.main()
