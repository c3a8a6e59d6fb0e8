"""Generation and scores of padded documents: where a text ends."""

import functools

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.evaluation import score
from aoarm_jax.generation import decode, prompts
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import texts as generate
from aoarm_jax.model import network as network_lib

pytestmark = pytest.mark.thorough

_ABC = tokenizers.Tokenizer("abc", b"abc")
_END, _T, _LEAST_P = 3, 5, 1e-4
_CASES = (("two_stream", 1), ("causal", 1), ("sigma_gpt", 2), ("mdlm", 2))

setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


@functools.cache
def _made(mechanism, s, T=_T):
  """(config, network, params on its mesh)."""
  options = config.Config(
    model=config.Model(mechanism=mechanism, sentinels=s, T=T, D=8, L=2, N=2),
    data=config.Data(documents="pad"),
    compute=config.Compute(dtype="float32", attention="xla"),
  )
  mesh = meshes.make_mesh(config.Mesh(data=1))
  network = network_lib.Network(options, mesh, _ABC)
  return options, network, sharding.put(mesh, tiny.sharp(network))


def _texts(case, **sample):
  """Texts of `sample`, a config.Sample."""
  options, network, params = _made(*case)
  options = options.replace("sample", config.Sample(seed=4, **sample))
  with jax.set_mesh(network.mesh):
    return generate.Sampler(options, network).sample(params)


def _scores(case, texts, ends, order):
  """Scores of texts, whose ends are given if they are not in `ends`."""
  options, network, params = _made(*case)
  marked = []
  for i, text in enumerate(texts):
    tokens = np.array(text, np.int32)
    every = np.ones(len(tokens), bool)
    name = f"text {i}"
    marked.append(
      (name, prompts.Marked(tokens, ~every, every, name, not ends[i]))
    )
  options = options.replace("score", config.Score(order="given"))
  with jax.set_mesh(network.mesh):
    scorer = score.Scorer(options, network)
    return scorer.score(params, marked, given=order)


class OpenTest(parameterized.TestCase):
  def test_law_of_all_texts(self):
    self.check_law("two_stream", plan_lib.Plan(is_open=True))

  @pytest.mark.slow
  def test_law_of_all_texts_by_speculation(self):
    self.check_law("causal", plan_lib.Plan("speculative", 2, is_open=True))

  def check_law(self, mechanism, plan):
    # From left to right, texts of all lengths have the law of their likelihood.
    T, B = 3, 8192
    _, network, params = _made(mechanism, 1, T)
    order = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    nothing = np.zeros((B, T), np.int32)
    with jax.set_mesh(network.mesh):
      out = tiny.quick_jit(
        functools.partial(decode.generate, network, plan=plan, prefill=False)
      )(
        params,
        jax.random.key(5),
        nothing,
        nothing > 0,
        order,
        sampling.make_law(),
      )
      every = [t for n in range(T + 1) for t in tiny.all_sequences(3, n)]
      rows = np.full((len(every), T), _END, np.int32)
      for row, text in zip(rows, every):
        row[: len(text)] = text
      nats = tiny.quick_jit(
        lambda params, *args: objective.order_nll(
          functools.partial(network.apply, params), network.layout, *args
        )
      )(params, rows, order[: len(rows)])
    law = np.exp(-np.asarray(nats, np.float64).sum(axis=1))
    place = {tuple(row): i for i, row in enumerate(rows.tolist())}
    drawn = np.asarray(out.tokens)
    ended = (drawn == _END).cumsum(axis=1) > 0
    np.testing.assert_array_equal(drawn[:, 1:][ended[:, :-1]], 0)
    drawn = np.where(ended, _END, drawn)
    ids = np.array([place[tuple(row)] for row in drawn.tolist()])
    counts = np.bincount(ids, minlength=len(rows))
    self.assertGreater(tiny.p_value(counts, law / law.sum()), _LEAST_P)
    np.testing.assert_allclose(out.log_p, np.log(law)[ids], atol=1e-4)


class RoundTripTest(parameterized.TestCase):
  @parameterized.parameters(*_CASES[::3])
  def test_score_is_the_log_p_of_a_text(self, mechanism, s):
    self.check_score(mechanism, s)

  @parameterized.parameters(*_CASES[1:3])
  @pytest.mark.slow
  def test_score_is_the_log_p_of_more_mechanisms(self, mechanism, s):
    self.check_score(mechanism, s)

  def check_score(self, mechanism, s):
    # Texts have a given length. If the model predicts the end, others have any.
    one_way = mechanisms.MECHANISMS[mechanism].left_to_right
    order = "left_to_right" if one_way else "uniform"
    drawn = _texts((mechanism, s), count=4, length=3, order=order)
    if one_way and s == 1:
      drawn = []  # Its end cannot be given; so the law is not the model's.
    if s == 1:
      drawn += _texts((mechanism, s), count=12, order="left_to_right")
      # A text of T tokens has no place for an end that tells its length.
      found = _texts((mechanism, s), count=12, order=order)
      drawn += [text for text in found if len(text.tokens) < _T]
    texts, ends = [], []
    for text in drawn:
      has_end = text.tokens[-1] == _END
      texts.append(text.tokens[: len(text.tokens) - has_end])
      ends.append(has_end)
      self.assertNotIn(_END, texts[-1])
      self.assertEqual(text.text.encode(), bytes(b"abc"[i] for i in texts[-1]))
      self.assertCountEqual(text.order, range(1, len(text.tokens) + 1))
    if s == 1:
      self.assertGreater(len({len(text) for text in texts}), 1)
      self.assertTrue(any(ends))
    scores = _scores((mechanism, s), texts, ends, [t.order for t in drawn])
    got = [text.log_p for text in drawn]
    np.testing.assert_allclose([s.log_p for s in scores], got, atol=1e-4)

  @parameterized.parameters(1, 2)
  def test_score_is_the_log_p_of_blanks(self, s):
    options, network, params = _made("sigma_gpt", s)
    tokens, known = np.array([0, 2, 0], np.int32), np.arange(3) == 1
    with jax.set_mesh(network.mesh):
      (drawn,) = generate.Sampler(options, network).fill(
        params, [prompts.Prompt(tokens, known)]
      )
      marked = [
        ("", prompts.Marked(np.array(text.tokens), known, ~known, "", True))
        for text in drawn
      ]
      options = options.replace("score", config.Score(order="given"))
      scores = score.Scorer(options, network).score(
        params, marked, given=[text.order for text in drawn]
      )
    got = [text.log_p for text in drawn]
    np.testing.assert_allclose([s.log_p for s in scores], got, atol=1e-4)
    for text in drawn:
      self.assertEqual(text.order[0], 2)

  def test_the_end_is_scored_like_the_last_token(self):
    case = ("sigma_gpt", 1)
    options, network, params = _made(*case)
    parsed = {
      text: prompts.parse_marked(text, _ABC, "_", "[]", text)
      for text in ("abc", "a[b]c", "ab[c]", "[a]__", "abcab")
    }
    options = options.replace("score", config.Score())
    with jax.set_mesh(network.mesh):
      scores = score.Scorer(options, network).score(params, [*parsed.items()])
    want = [[1, 2, 3, 4], [2], [3, 4], [1], [1, 2, 3, 4, 5]]
    self.assertEqual([s.positions for s in scores], want)
    self.assertEqual([s.bytes for s in scores], [3, 1, 1, 1, 5])
    # A given end comes first, so what is known differs.
    apply = functools.partial(network.apply, params)
    nats = tiny.quick_jit(
      lambda *args: objective.order_nll(apply, network.layout, *args)
    )(
      np.array([[0, 1, 2, _END, _END]]),
      np.array([[1, 3, 4, 2, 5]], np.int32),
    )
    self.assertAlmostEqual(scores[1].log_p, -float(nats[0, 3]), delta=1e-4)


if __name__ == "__main__":
  absltest.main()
