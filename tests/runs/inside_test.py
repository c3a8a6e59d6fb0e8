"""Logits, states and attention of given texts and orders, as arrays."""

import functools

import helpers
import jax
import numpy as np
import plain_numpy
import pytest
import tiny
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import bpe
from aoarm_jax.model import network as network_lib

_T, _L, _N, _D = 7, 2, 3, 12
_PADDED = config_lib.Data(documents="pad")
_model = functools.partial(helpers.model_of, "abcde", T=_T, L=_L, N=_N, D=_D)
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


def _order(model, n, seed=0):
  """A random order of 1..n, or the natural one where there is no other."""
  natural = np.arange(1, n + 1)
  if model.config.model.kind.left_to_right:
    return natural.tolist()
  return np.random.default_rng(seed).permutation(natural).tolist()


def _log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(logits), np.float64)


def _check(case):
  """All that holds for every mechanism."""
  model = _model(*case)
  text, known = "ebadc", {}
  ids = model.tokenizer.encode(text)
  order, s = _order(model, 5), model.config.model.sentinels
  if model.config.model.kind.masked:
    known = {"known": 2}
  logits = model.logits(text, order=order)
  states = model.hidden_states(text, order=order, **known)
  attention = model.attention(text, order=order, **known)
  # The logits have the probabilities of scores.
  natural = order == sorted(order)
  named = "left_to_right" if natural else order
  want = model.score(text, order=named).token_log_p
  np.testing.assert_allclose(
    _log_softmax(logits)[np.arange(5), ids], want, atol=2e-5
  )
  # The states end in them. A masked mechanism predicts one token in a pass.
  rows = [order[2] - 1] if known else list(range(5))
  ends = states.read_out @ model.head
  np.testing.assert_allclose(ends[rows], logits[rows], atol=2e-5)
  # What the rows are.
  first, copies = order[: 5 - (not known)], model.config.model.kind.copies
  if known:  # The window from left to right, and what is known of it.
    V, shown = 5, order[:2]
    token = [ids[p - 1] if p in shown else V + 2 for p in range(1, _T + 1)]
    position = [*range(1, _T + 1)]
    target = [0 if p in shown else p for p in position]
  else:
    token, position = [ids[p - 1] for p in first], first
    target = order[1:]
  sentinels, ends = [5, 6][:s], [0, _T + 1][:s]
  before = [0] * s if known else [0] * (s - 1) + order[:1]
  for got, want in (
    (states.token, [*sentinels, *token]),
    (states.position, [*ends, *position]),
    (states.target, [*before, *target]),
  ):
    np.testing.assert_array_equal(got, np.repeat(want, copies))
  R = len(states.token)
  # Attention sums to one and sees no later slot.
  has_query = model.config.model.kind.streams == 2
  slot = np.arange(R) // copies
  may = np.ones((R, R), bool) if known else slot[None] <= slot[:, None]
  for name in ("content", "query")[: 1 + has_query]:
    weights = getattr(attention, name)
    assert weights.shape == (_L, _N, R, R)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (weights[..., ~may] == 0).all()
    assert (weights[..., may] > 0).all()
    assert getattr(states, name).shape == (_L + 1, R, _D)
  assert has_query == (attention.query is not None)
  assert has_query == (states.query is not None)
  for field in ("token", "position", "target"):
    np.testing.assert_array_equal(
      getattr(attention, field), getattr(states, field)
    )


class MechanismsTest(parameterized.TestCase):
  @parameterized.parameters(("two_stream", 2), ("mdlm", 1))
  def test_arrays_agree_with_each_other(self, *case):
    _check(case)

  @parameterized.parameters(
    *((m, 1 + i % 2) for i, m in enumerate(tiny.MECHANISMS)), ("mdlm", 2)
  )
  @pytest.mark.slow
  def test_arrays_of_others_agree_with_each_other(self, *case):
    _check(case)

  def test_plain_numpy_finds_the_same(self):
    self.check_by_numpy("two_stream", 1)

  @pytest.mark.thorough
  def test_plain_numpy_finds_the_same_of_one_stream(self):
    self.check_by_numpy("decoupled_rope", 2)

  def check_by_numpy(self, mechanism, sentinels):
    """Every state and every weight, by a reading of the weights alone."""
    model = _model(mechanism, sentinels)
    paths = jax.tree.leaves_with_path(model.params)
    arrays = {
      ".".join(key.key for key in path): np.asarray(leaf, np.float64)
      for path, leaf in paths
    }
    sizes = ("T", "L", "rope_base", "sentinels", "mechanism", "tied")
    config = {
      "vocabulary": 5,
      "config": {
        "model": {name: getattr(model.config.model, name) for name in sizes}
      },
    }
    ids, order = np.array([4, 1, 0, 3, 2, 2, 0]), _order(model, _T, seed=1)
    seen = []
    logits = plain_numpy.logits(
      config, arrays, ids[None], np.array(order)[None], seen
    )[0]
    got = model.logits(ids, order=order)
    np.testing.assert_allclose(got[np.array(order) - 1], logits, atol=1e-4)
    states = model.hidden_states(ids, order=order)
    attention = model.attention(ids, order=order)
    for g, name in enumerate(["content", "query"][: len(seen[0])]):
      for layer, of_layer in enumerate(seen):
        weights, rows = of_layer[g]
        np.testing.assert_allclose(
          getattr(attention, name)[layer], weights[0], atol=1e-5
        )
        np.testing.assert_allclose(
          getattr(states, name)[layer + 1], rows[0], atol=1e-4
        )

  @pytest.mark.thorough
  def test_content_that_sees_few_slots(self):
    """Its weights vanish outside of the mask, and query rows see all."""
    model = _model("two_stream", content_sees="last:1")
    attention = model.attention("abcde", order=[3, 1, 5, 2, 4])
    slot = np.arange(5)
    back = slot[:, None] - slot
    may = (back >= 0) & ((back <= 1) | (slot[None] == 0))
    self.assertTrue((attention.content[..., ~may] == 0).all())
    self.assertTrue((attention.content[..., may] > 0).all())
    self.assertTrue((attention.query[..., back >= 0] > 0).all())

  @pytest.mark.thorough
  def test_padded_documents(self):
    self.check_padded("two_stream", 1)

  @parameterized.parameters(("two_stream", 2), ("mdlm", 2))
  @pytest.mark.slow
  def test_padded_documents_of_others(self, *case):
    self.check_padded(*case)

  def check_padded(self, *case):
    """The end is the last row where it is predicted, and never before."""
    model = _model(*case, data=_PADDED)
    n, s = 4, case[1]
    logits = model.logits("abca")
    score = model.score("abca")
    self.assertLen(logits, n + (s == 1))
    ids = [*model.tokenizer.encode("abca"), model.tokenizer.end][: len(logits)]
    log_p = _log_softmax(logits)[np.arange(len(ids)), ids]
    np.testing.assert_allclose(log_p, score.token_log_p, atol=2e-5)
    if s == 1:  # An order may say when the end comes.
      order = [2, 5, 1, 4, 3]
      logits = model.logits("abca", order=order)
      want = model.score("abca", order=order).token_log_p
      log_p = _log_softmax(logits)[np.arange(5), ids]
      np.testing.assert_allclose(log_p, want, atol=2e-5)
    # Other fillings of the batch change nothing: three lengths at once.
    texts = ["abca", "a", "eeeeeee"]
    for one, want in zip(model.logits(texts), map(model.logits, texts)):
      np.testing.assert_allclose(one, want, atol=1e-5)
    if case[0] == "mdlm":
      weights = model.attention("abca", known=1).content
      real = n + s + (s == 1)
      self.assertTrue((weights[..., real:] == 0).all())
      np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)

  @pytest.mark.thorough
  def test_parts_of_words(self):
    """With a BPE, tokens are parts of words, in arrays and in streams."""
    tokenizer = bpe.of_hugging_face(
      {
        "model": {
          "type": "BPE",
          "vocab": {x: i for i, x in enumerate(["a", "b", "c", "ab", "ca"])},
          "merges": ["a b", "c a"],
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
      }
    )
    config = tiny.make("two_stream", 2, T=_T).config
    config = config.replace("data.tokenizer", "bpe")
    model = helpers.in_memory(network_lib.Network(config, None, tokenizer))
    text, order = "abcacb", [3, 1, 4, 2]
    ids = tokenizer.encode(text)
    self.assertEqual(ids.tolist(), [3, 4, 2, 1])
    log_p = _log_softmax(model.logits(text, order=order))
    want = model.score(text, order=order).token_log_p
    np.testing.assert_allclose(log_p[range(4), ids], want, atol=2e-5)
    tokens = [*model.generate_stream(prompt="ab", length=5, seed=2)]
    (drawn,) = model.generate(prompt="ab", length=5, seed=2)
    self.assertEqual([x.position for x in tokens], drawn.order[1:])
    self.assertEqual(tokens[-1].text, drawn.text)
    first = tokens[0]  # A token of one or two letters, each blank a `_`.
    symbol = tokenizer.decode([first.token])
    self.assertEqual(first.text, "ab" + "_" * (first.position - 2) + symbol)


class TextsTest(parameterized.TestCase):
  def test_ways_to_give_texts(self):
    model = _model("two_stream", 2)
    ids = model.tokenizer.encode("abc")
    want = model.logits("abc")
    self.assertEqual((want.shape, want.dtype), ((3, 5), np.float32))
    (text,) = model.infill("abc_")
    for one in (ids, ids.tolist(), tuple(ids.tolist()), jax.numpy.array(ids)):
      np.testing.assert_array_equal(model.logits(one), want)
    for several in (["abc", "edcba"], iter(["abc", ids]), np.stack([ids, ids])):
      found = model.logits(several)
      self.assertLen(found, 2)
      np.testing.assert_allclose(found[0], want, atol=1e-6)
    self.assertEqual(model.logits([]), [])
    drawn = model.logits([text], order=[text.order])
    want = model.logits(text.tokens, order=text.order)
    np.testing.assert_array_equal(drawn[0], want)
    backwards = model.logits("abc", order="right_to_left")
    np.testing.assert_array_equal(
      backwards, model.logits("abc", order=[3, 2, 1])
    )
    self.assertGreater(np.abs(backwards - model.logits("abc")).max(), 0.1)

  @parameterized.parameters(
    (lambda m: m.logits(""), "text 1 is empty: give at least one token"),
    (lambda m: m.logits(["a", "b" * 8]), "text 2 has 8 tokens; the model know"),
    (lambda m: m.logits("aX"), "text 1: abcde: character 'X' at offset 1"),
    (lambda m: m.logits([0, 5]), "text 1: 5 is no token id; ids are 0 to 4"),
    (lambda m: m.logits([-1]), "text 1: -1 is no token id"),
    (lambda m: m.logits(3), "3 is no text: give a str, token ids or a list"),
    (lambda m: m.logits([0.5]), "0.5 is no text"),
    (lambda m: m.logits({"a"}), "{'a'} is no text"),
    (lambda m: m.logits(b"ab"), "b'ab' is no text"),
    (
      lambda m: m.logits("ab", order="uniform"),
      "order='uniform': must be 'left_to_right' or 'right_to_left', or a list",
    ),
    (
      lambda m: m.logits("ab", order=[1, 3]),
      r"order: must be a permutation of",
    ),
    (lambda m: m.logits("ab", order=[1]), "order: has 1 positions, and text 1"),
    (
      lambda m: m.logits(["a", "b"], order=[[1]]),
      "order: 1 orders for 2 texts",
    ),
    (
      lambda m: m.attention("ab", known=1),
      "known=1: has no effect here; a single pass of mechanism two_stream",
    ),
  )
  def test_what_cannot_be(self, call, message):
    with self.assertRaisesRegex(aoarm_jax.UserError, f"^{message}") as caught:
      call(_model("two_stream", 2))
    self.assertLen(str(caught.exception).splitlines(), 1)

  def test_what_a_masked_mechanism_needs(self):
    model = _model("mdlm", 1)
    for known, message in (
      (None, "known: mechanism mdlm takes a pass for every token; say how man"),
      (3, "known=3: must be 0 to 2, the number of tokens"),
      (0.5, "known=0.5: must be a whole number"),
    ):
      with self.assertRaisesRegex(aoarm_jax.ConfigError, f"^{message}"):
        model.hidden_states("ab", known=known)

  def test_what_goes_from_left_to_right_only(self):
    with self.assertRaisesRegex(
      aoarm_jax.ConfigError,
      "^order: mechanism causal reads from left to right only, and the order "
      "of text 1 is another one$",
    ):
      _model("causal").logits("ab", order=[2, 1])


class ParametersTest(parameterized.TestCase):
  @pytest.mark.thorough
  def test_a_model_in_memory(self):
    model = _model("two_stream", 2)
    self.assertStartsWith(repr(model), "<aoarm_jax.Model in memory: step 0, ")
    self.assertIsNone(model.workdir)
    config = model.config
    first, again, other = (
      aoarm_jax.Model.of(config, tokenizer=model.tokenizer, seed=seed).params
      for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first["embedding"], again["embedding"])
    self.assertGreater(np.abs(first["embedding"] - other["embedding"]).max(), 0)

  def test_later_calls_take_what_is_assigned(self):
    network = _model("two_stream", 2).network
    model = helpers.in_memory(network, seed=5)
    before = model.score("abc").log_p
    model.params = jax.tree.map(np.asarray, tiny.sharp(network))
    want = _model("two_stream", 2)
    self.assertNotAlmostEqual(model.score("abc").log_p, before, delta=0.1)
    np.testing.assert_allclose(model.logits("abc"), want.logits("abc"))
    wrong = dict(model.params)
    wrong["embedding"] = wrong["embedding"][1:]
    with self.assertRaisesRegex(
      aoarm_jax.ConfigError, r"^params: embedding has shape \(6, 12\), and the"
    ):
      model.params = wrong
    del wrong["embedding"]
    with self.assertRaisesRegex(
      aoarm_jax.ConfigError, "^params: embedding has shape None, and the netw"
    ):
      model.params = wrong


if __name__ == "__main__":
  absltest.main()
