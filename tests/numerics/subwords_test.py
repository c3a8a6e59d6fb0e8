"""Exact laws over parts of words: a BPE of 40 symbols, windows and padding."""

import functools

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import bpe
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.evaluation import score
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate
from aoarm_jax.model import network as network_lib

setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())

_T, _V, _LEAST_P = 2, 40, 1e-4
# Mechanism, sentinels, documents.
_CASES = (
  ("two_stream", 1, "join"),
  ("two_stream", 1, "pad"),
  ("decoupled_rope", 2, "pad"),
  ("causal", 1, "pad"),
  ("sigma_gpt", 2, "join"),
  ("mdlm", 2, "pad"),
)


@functools.cache
def _tokenizer():
  """Eight letters, and 32 pairs of them."""
  letters = "abcdefgh"
  pairs = [(a, b) for a in letters for b in letters[::2]]
  symbols = [*letters, *(a + b for a, b in pairs)]
  return bpe.of_hugging_face(
    {
      "model": {
        "type": "BPE",
        "vocab": {symbol: i for i, symbol in enumerate(symbols)},
        "merges": [f"{a} {b}" for a, b in pairs],
      },
      "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
  )


@functools.cache
def _made(mechanism, s, documents):
  """(network, params on its mesh)."""
  config = config_lib.Config(
    model=config_lib.Model(
      mechanism=mechanism, sentinels=s, T=_T, D=8, L=2, N=2
    ),
    data=config_lib.Data(tokenizer="bpe", documents=documents),
    compute=config_lib.Compute(dtype="float32", attention="xla"),
  )
  mesh = meshes.make_mesh(config_lib.Mesh(data=1))
  network = network_lib.Network(config, mesh, _tokenizer())
  return network, sharding.put(mesh, tiny.sharp(network))


def _lengths(s, documents):
  """The lengths of texts, and whether the model says which one it is."""
  if documents == "join":
    return [_T], False
  return [*range(s - 1, _T + 1)], s == 1


@functools.cache
def _law(case, order):
  """{tokens: probability} of all texts, generated in one order.

  Args:
    case: mechanism, sentinels, documents.
    order: a permutation of 1..T.
  """
  network, params = _made(*case)
  texts = [
    tuple(text)
    for n in _lengths(*case[1:])[0]
    for text in tiny.all_sequences(_V, n).tolist()
  ]
  rows = np.full((len(texts), _T), _V, np.int32)  # The end is the last symbol.
  for row, text in zip(rows, texts):
    row[: len(text)] = text
  with jax.set_mesh(network.mesh):
    nats = tiny.quick_jit(
      lambda params, *args: objective.order_nll(
        functools.partial(network.apply, params), network.layout, *args
      )
    )(params, rows, np.tile(np.array(order, np.int32), (len(rows), 1)))
  return dict(zip(texts, np.exp(-np.asarray(nats, np.float64).sum(axis=1))))


def _orders(case):
  """All orders that have a law of whole texts."""
  one_way = case[0] == "causal" or _lengths(*case[1:])[1]
  return [(1, 2)] if one_way else [(1, 2), (2, 1)]


class SubwordsTest(parameterized.TestCase):
  def test_the_tokenizer(self):
    made = _tokenizer()
    self.assertEqual((made.V, made.name), (_V, "bpe"))
    ids = made.encode(b"abeagh")
    self.assertLess(len(ids), 6)
    self.assertEqual(made.decode(ids), "abeagh")

  @parameterized.parameters(*_CASES)
  def test_texts_sum_to_one(self, *case):
    lengths, says_end = _lengths(*case[1:])
    for order in _orders(case):
      law = _law(case, order)
      totals = dict.fromkeys(lengths, 0.0)
      for text, p in law.items():
        totals[len(text)] += p
      if says_end:
        totals = {"of all lengths": sum(totals.values())}
      for total in totals.values():
        self.assertAlmostEqual(total, 1, delta=1e-5)

  def test_samples_have_the_enumerated_law(self):
    self.check_samples(*_CASES[1])

  @parameterized.parameters(*_CASES[4:])
  @pytest.mark.slow
  def test_more_samples_have_the_enumerated_law(self, *case):
    self.check_samples(*case)

  def check_samples(self, *case):
    """Samples and their scores against the law of every order."""
    network, params = _made(*case)
    says_end, one_way = _lengths(*case[1:])[1], len(_orders(case)) == 1
    config = network.config.replace(
      "sample",
      config_lib.Sample(
        count=4000,
        batch_size=4000,
        length=0 if says_end else _T,
        order="left_to_right" if one_way else "uniform",
      ),
    )
    with jax.set_mesh(network.mesh):
      drawn = generate.Sampler(config, network).sample(params)
    self.assertLen(drawn, 4000)
    for order in _orders(case):
      law = _law(case, order)
      if not says_end:
        law = {text: p for text, p in law.items() if len(text) == _T}
      counts = dict.fromkeys(law, 0)
      for text in drawn:
        tokens = tuple(int(t) for t in text.tokens if t != _V)
        if one_way or tuple(text.order) == order:
          counts[tokens] += 1
          self.assertAlmostEqual(text.log_p, np.log(law[tokens]), delta=1e-4)
          self.assertEqual(text.text, network.tokenizer.decode(tokens))
      self.assertGreater(sum(counts.values()), 1500)
      p = np.array([*law.values()])
      counts = np.array([*counts.values()])
      self.assertGreater(tiny.p_value(counts, p / p.sum()), _LEAST_P)

  @pytest.mark.thorough
  def test_scores_have_the_enumerated_law(self):
    case = _CASES[1]
    network, params = _made(*case)
    law = _law(case, (1, 2))
    texts = ["ba", "a", "hg", "heag"]
    marked = [
      (text, prompts.parse_marked(text, network.tokenizer, "", "", text))
      for text in texts
    ]
    config = network.config.replace(
      "score", config_lib.Score(order="left_to_right")
    )
    with jax.set_mesh(network.mesh):
      scores = score.Scorer(config, network).score(params, marked)
    for text, result in zip(texts, scores):
      ids = tuple(network.tokenizer.encode(text.encode()).tolist())
      self.assertAlmostEqual(result.log_p, np.log(law[ids]), delta=1e-4)
      self.assertEqual(result.bytes, len(text))


if __name__ == "__main__":
  absltest.main()
