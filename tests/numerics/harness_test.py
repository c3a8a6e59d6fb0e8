"""Answers to an evaluation harness, beside scores of single texts."""

import itertools
import math

import benchmark_parts_test
import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax.benchmark import harness
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.generation import prompts

_LETTERS = benchmark_parts_test._LETTERS
_WORDS = benchmark_parts_test._WORDS
_PAIRS = tokenizers.Tokenizer(
  "pairs",
  (b"a", b"b", b"ab"),
  tokenizers.Codec(
    "token",
    lambda text: np.array([2] if text == b"ab" else [text == b"b"], int),
    lambda: None,
    "",
  ),
)
_T = 8
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


def _opened(mechanism="two_stream", tokenizer=_LETTERS, order=None, **options):
  """(a harness, its session)."""
  opened = benchmark_parts_test.session_of(
    mechanism, _T, tokenizer, **dict(orders=2, batch_size=4) | options
  )
  if order:
    opened.config = opened.config.replace("score.order", order)
  return harness.Harness(opened), opened


def _score(opened, tokens, known, order="left_to_right"):
  """log p of the tokens that are not known, in one window."""
  tokens = np.asarray(tokens, np.int32)
  known = np.arange(len(tokens)) < known
  marked = prompts.Marked(tokens, known, ~known)
  with jax.set_mesh(opened.network.mesh):
    return opened.score([marked], order)[0].log_p


class LoglikelihoodTest(parameterized.TestCase):
  def test_a_continuation_given_its_context(self):
    self.check_continuation("two_stream", "uniform")

  @parameterized.parameters(
    ("two_stream", "left_to_right"),
    ("causal", "left_to_right"),
    ("ao_gpt", "uniform"),
    ("decoupled_rope", "right_to_left"),
    ("mdlm", "left_to_right"),
    ("mdlm", "uniform"),
  )
  @pytest.mark.slow
  def test_a_continuation_given_its_context_of_others(self, mechanism, order):
    self.check_continuation(mechanism, order)

  def check_continuation(self, mechanism, order):
    made, opened = _opened(mechanism, order=order)
    pairs = [("ab", "cda"), ("", "hg"), ("h ha.", "b"), ("ab", "")]
    got = made.loglikelihood(pairs)
    for (context, continuation), (log_p, _) in zip(pairs[:3], got):
      tokens = _LETTERS.encode(context + continuation)
      want = _score(opened, tokens, len(context), order)
      self.assertAlmostEqual(log_p, want, places=5)
    self.assertEqual(got[3], (0.0, True))
    self.assertLen({round(log_p, 4) for log_p, _ in got}, 4)

  def test_all_continuations_sum_to_one(self):
    made, _ = _opened(batch_size=64)
    letters = _LETTERS.symbols.decode()
    pairs = [("ab", a + b) for a, b in itertools.product(letters, repeat=2)]
    got = made.loglikelihood(pairs)
    total = sum(math.exp(log_p) for log_p, _ in got)
    self.assertAlmostEqual(total, 1, places=4)
    # One of them is what greedy decoding draws: so generation says, too.
    (likeliest,) = [p for p, (_, is_it) in zip(pairs, got) if is_it]
    (drawn,) = made.generate_until([("ab", {"max_gen_toks": 2})])
    self.assertEqual(likeliest, ("ab", drawn))

  def test_long_contexts_lose_their_start(self):
    made, opened = _opened()
    context, continuation = "abcdefgh hgfedcba", "bad"
    ((log_p, _),) = made.loglikelihood([(context, continuation)])
    tokens = _LETTERS.encode(context + continuation)[-_T:]
    self.assertAlmostEqual(log_p, _score(opened, tokens, _T - 3), places=5)

  def test_long_continuations_come_in_blocks(self):
    made, opened = _opened(stride=3)
    context, continuation = "abc", "defgh hgfe"
    ((log_p, is_greedy),) = made.loglikelihood([(context, continuation)])
    tokens = _LETTERS.encode(context + continuation)
    want = 0
    for first, last in ((3, 6), (6, 9), (9, 12), (12, 13)):
      begin = max(0, last - _T)
      want += _score(opened, tokens[begin:last], first - begin)
    self.assertAlmostEqual(log_p, want, places=4)
    self.assertFalse(is_greedy)

  def test_greedy_is_what_generation_draws_over_blocks(self):
    """With the same parts: half of T at once."""
    made, _ = _opened()
    (drawn,) = made.generate_until([("abcd", {"max_gen_toks": 9})])
    self.assertLen(drawn, 9)
    other = "b" if drawn[-1] == "a" else "a"
    got = made.loglikelihood([("abcd", drawn), ("abcd", drawn[:-1] + other)])
    self.assertEqual([is_it for _, is_it in got], [True, False])

  @parameterized.parameters(
    ("ab c", " ab", 3, "ab| |c| ab"),
    ("c ", "ab", 1, "c| ab"),  # The space belongs to the next token.
  )
  def test_tokens_are_those_of_the_whole_text(self, first, second, given, want):
    made, opened = _opened(tokenizer=_WORDS)
    ((log_p, _),) = made.loglikelihood([(first, second)])
    tokens = _WORDS.encode(first + second)
    pieces = [_WORDS.to_bytes([token]).decode() for token in tokens]
    self.assertEqual("|".join(pieces), want)
    self.assertAlmostEqual(log_p, _score(opened, tokens, given), places=5)

  def test_a_continuation_within_a_token(self):
    """No token begins where it begins, so both are encoded by themselves."""
    made, opened = _opened(tokenizer=_PAIRS)
    ((log_p, _),) = made.loglikelihood([("a", "b")])
    self.assertEqual(_PAIRS.encode("ab").tolist(), [2])
    self.assertAlmostEqual(log_p, _score(opened, [0, 1], 1), places=5)

  @pytest.mark.slow
  def test_answers_do_not_depend_on_the_batch(self):
    pairs = [("ab", "cd"), ("a", "h" * 11), ("", "bad"), ("gab", "c e")]
    one, _ = _opened(batch_size=1)
    many, _ = _opened(batch_size=4)
    for got, want in zip(one.loglikelihood(pairs), many.loglikelihood(pairs)):
      self.assertAlmostEqual(got[0], want[0], places=4)
      self.assertEqual(got[1], want[1])

  def test_normal_form(self):
    opened = benchmark_parts_test.session_of(
      "two_stream", 32, tokenizers.get("char27")
    )
    made = harness.Harness(opened, normalise=True)
    got = made.loglikelihood([("Ab, 2 c", "AT! "), ("ab two c", "at")])
    self.assertAlmostEqual(got[0][0], got[1][0], places=5)
    with self.assertRaisesRegex(tokenizers.TokenizerError, "character 'A'"):
      harness.Harness(opened).loglikelihood([("A", "b")])


class RollingTest(parameterized.TestCase):
  def test_texts_of_all_lengths(self):
    self.check_lengths("two_stream")

  @parameterized.parameters("causal", "mdlm")
  @pytest.mark.slow
  def test_texts_of_all_lengths_of_others(self, mechanism):
    self.check_lengths(mechanism)

  def check_lengths(self, mechanism):
    """Short ones in one window, long ones as the benchmark scores them."""
    made, opened = _opened(mechanism, stride=3)
    texts = ["a", "abcdefgh", "abcdefgh hgfedcba ab", ""]
    got = made.loglikelihood_rolling(texts)
    for text, log_p in zip(texts[:2], got):
      want = _score(opened, _LETTERS.encode(text), 0)
      self.assertAlmostEqual(log_p, want, places=5)
    long = opened.text_of(_LETTERS.encode(texts[2]), "")
    estimate = opened.estimate("left_to_right", long)
    nats = estimate.nats_per_token * len(texts[2])
    self.assertAlmostEqual(got[2], -nats, places=3)
    self.assertEqual(got[3], 0)

  @pytest.mark.thorough
  def test_a_document_ends_and_a_start_goes_on(self):
    made, opened = _opened(documents="pad", batch_size=64)
    letters = _LETTERS.symbols.decode()
    (whole,) = made.loglikelihood_rolling(["ab"])
    starts = ["ab", *(f"ab{letter}" for letter in letters)]
    start, *longer = (
      math.exp(log_p)
      for log_p, _ in made.loglikelihood([("", text) for text in starts])
    )
    self.assertAlmostEqual(start / (math.exp(whole) + sum(longer)), 1, places=4)
    self.assertLess(math.exp(whole), 0.9 * start)
    # Generation says where a document ends, and greedy decoding stops there.
    options = {"do_sample": True, "max_gen_toks": 30}
    texts = made.generate_until([("ab", options)] * 50)
    lengths = {len(text) for text in texts}
    self.assertGreater(len(lengths), 3)
    self.assertNoCommonElements("".join(texts), tokenizers.END)
    self.assertTrue(opened.network.layout.predicts_end)


class GenerateTest(parameterized.TestCase):
  def test_likeliest_tokens_up_to_a_string(self):
    made, _ = _opened()
    requests = [("ab", {"max_gen_toks": 20}), ("", {"max_gen_toks": 3})]
    whole, short = made.generate_until(requests)
    self.assertLen(whole, 20)
    self.assertLen(short, 3)
    stop = whole[5:7]
    at = whole.index(stop)
    for until in (stop, [stop], ["\n\n", stop, "", whole[at:]]):
      options = {"until": until, "max_gen_toks": 20, "do_sample": False}
      self.assertEqual(made.generate_until([("ab", options)]), [whole[:at]])
    self.assertEqual(made.generate_until([("ab", {"max_new_tokens": 0})]), [""])

  def test_a_part_is_drawn_behind_what_fits(self):
    self.check_parts("two_stream")

  @parameterized.parameters("causal", "mdlm")
  @pytest.mark.slow
  def test_a_part_is_drawn_behind_what_fits_of_others(self, mechanism):
    self.check_parts(mechanism)

  def check_parts(self, mechanism):
    """Each token is the likeliest after the tokens of its window."""
    made, opened = _opened(mechanism)
    context = "abcdefgh"
    (text,) = made.generate_until([(context, {"max_gen_toks": 6})])
    tokens = _LETTERS.encode(context + text)
    for i in range(8, 14):
      part_ends = 12 if i < 12 else 14
      begin = part_ends - _T
      log_p = [
        _score(opened, [*tokens[begin:i], letter], i - begin)
        for letter in range(_LETTERS.V)
      ]
      self.assertEqual(int(np.argmax(log_p)), tokens[i])

  @pytest.mark.thorough
  def test_sampling_has_its_law(self):
    made, opened = _opened(batch_size=256)
    options = {"do_sample": True, "temperature": 1.3, "max_gen_toks": 1}
    texts = made.generate_until([("ab", options)] * 3000)
    counts = [texts.count(letter) for letter in _LETTERS.symbols.decode()]
    start = _LETTERS.encode("ab").tolist()
    log_p = [_score(opened, [*start, x], 2) for x in range(_LETTERS.V)]
    law = np.exp(np.array(log_p) / 1.3)
    p_value = tiny.p_value(np.array(counts), law / law.sum())
    self.assertGreater(p_value, 1e-4)
    again = made.generate_until([("ab", options)] * 3000)
    self.assertEqual(texts, again)

  @parameterized.parameters(
    ({"do_sample": True}, 1.0),
    ({"do_sample": False, "temperature": 0.7}, 0.0),
    ({"temperature": 0.7}, 0.7),
    ({}, 0.0),
  )
  def test_temperature(self, options, want):
    _, _, law = harness._read(options)
    self.assertEqual(law["temperature"], want)

  @parameterized.parameters(
    ({"num_beams": 4}, "generate_until: num_beams=4: no such option; there"),
    ({"max_gen_toks": 1.5}, "max_gen_toks=1.5: must be a whole number"),
  )
  def test_options_that_cannot_be(self, options, message):
    made, _ = _opened()
    with self.assertRaisesRegex(config.ConfigError, f"^{message}"):
      made.generate_until([("ab", options)])


if __name__ == "__main__":
  absltest.main()
