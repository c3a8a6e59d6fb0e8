"""Scores: enumerated laws, those of generation, parts, orders, bad texts."""

import functools
import itertools
import math
import re
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

import pallas_kernels
from aoarm_jax import objective
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config
from aoarm_jax.data import cleaning, tokenizers
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.evaluation import score
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate
from aoarm_jax.model import network as network_lib

_ABC = tokenizers.Tokenizer("abc", b"abc")
# One of every kind: what is predicted from where, with and without EOS.
_CASES = (
  ("two_stream", 2),
  ("decoupled_rope", 1),
  ("ao_gpt", 2),
  ("causal", 1),
  ("mdlm", 2),
)

setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


@functools.cache
def _made(mechanism, s, T=6):
  """(config, network, mesh, params on it)."""
  model = config.Model(mechanism=mechanism, sentinels=s, T=T, D=8, L=2, N=2)
  compute = config.Compute(dtype="float32", attention="xla")
  mesh = meshes.make_mesh(config.Mesh(data=1))
  options = config.Config(model=model, compute=compute)
  network = network_lib.Network(options, mesh, _ABC)
  return options, network, mesh, sharding.put(mesh, tiny.sharp(network))


@functools.cache
def _scorer(mechanism, s):
  options, network, _, params = _made(mechanism, s)
  return score.Scorer(options, network), params


def _score(case, texts, order="left_to_right", given=(), **options):
  """Scores of texts; `order` by config.score."""
  base, _, mesh, _ = _made(*case)
  scorer, params = _scorer(*case)
  changed = config.Config(
    model=base.model,
    score=config.Score(order=order, **options),
    orders=config.Orders(given=given),
  )
  parsed = [
    (text, prompts.parse_marked(text, _ABC, "_", "[]", f"text {i}"))
    for i, text in enumerate(texts, 1)
  ]
  with jax.set_mesh(mesh):
    return scorer.score(params, parsed, changed)


def _order_of(mechanism):
  one_way = mechanisms.MECHANISMS[mechanism].left_to_right
  return "left_to_right" if one_way else "uniform"


@pytest.mark.thorough
class LawTest(parameterized.TestCase):
  @parameterized.parameters(*_CASES[:2], _CASES[4])
  def test_fillings_of_a_part_sum_to_one(self, *case):
    self.check_sum(case)

  @parameterized.parameters(*_CASES[2:4])
  @pytest.mark.slow
  def test_fillings_sum_to_one_by_more_mechanisms(self, *case):
    self.check_sum(case)

  def check_sum(self, case):
    """Given what is known; what is unknown is in no law."""
    order = _order_of(case[0])
    pattern = "b[{}{}]_" if order == "left_to_right" else "_[{}]b[{}]"
    texts = [pattern.format(*xy) for xy in itertools.product("abc", repeat=2)]
    scores = _score(case, texts, order, orders=3)
    p = np.exp([each.log_p for each in scores])
    np.testing.assert_allclose(p.sum(), 1.0, atol=1e-5)
    self.assertGreater(p.max(), 2 * p.min())
    # What is known matters, and is not just any token.
    other = _score(case, [text.replace("b", "c", 1) for text in texts], order)
    self.assertNotAlmostEqual(other[0].log_p, scores[0].log_p, places=3)

  @parameterized.parameters(*_CASES[:2], _CASES[4])
  def test_generation_says_the_same(self, *case):
    self.check_generation(case)

  @parameterized.parameters(*_CASES[2:4])
  @pytest.mark.slow
  def test_generation_of_more_mechanisms_says_the_same(self, *case):
    self.check_generation(case)

  def check_generation(self, case):
    """Cached and uncached: texts of 5 of the model's 6 tokens."""
    base, network, mesh, params = _made(*case)
    order = _order_of(case[0])
    pattern = "b[{}{}{}]" if order == "left_to_right" else "[{}]b[{}{}]c"
    prompt = prompts.parse_prompt(
      pattern.replace("{}", "_").translate({91: None, 93: None}), _ABC, "_"
    )
    options = config.Config(
      model=base.model, sample=config.Sample(count=6, order=order)
    )
    sampler = generate.Sampler(options, network)
    with jax.set_mesh(mesh):
      (texts,) = sampler.fill(params, [prompt])
    for text in texts[:3]:
      found = [t for t, known in zip(text.text, prompt.known) if not known]
      rest = [p for p in range(1, 7) if p not in text.order]
      (scored,) = _score(
        case, [pattern.format(*found)], "given", (*text.order, *rest)
      )
      self.assertAlmostEqual(scored.log_p, text.log_p, delta=1e-4)
      self.assertEqual(scored.order, text.order[int(prompt.known.sum()) :])

  def test_parts_multiply(self):
    """The chain rule, of three parts and of tokens."""
    case = ("two_stream", 2)
    whole, first, rest = _score(case, ["abcab", "[ab]___", "ab[cab]"])
    self.assertAlmostEqual(whole.log_p, first.log_p + rest.log_p, delta=1e-4)
    self.assertAlmostEqual(sum(whole.token_log_p), whole.log_p, delta=1e-4)
    self.assertAlmostEqual(whole.bits, -whole.log_p / math.log(2))
    self.assertAlmostEqual(sum(whole.token_bits), whole.bits, delta=1e-4)
    self.assertEqual(whole.positions, [1, 2, 3, 4, 5])
    self.assertEqual(rest.order, [3, 4, 5])

  def test_tokens_stand_at_their_positions(self):
    """Whatever the order; beside a likelihood of the whole text."""
    case = ("two_stream", 2)
    (scored,) = _score(case, ["a[bc]a__"], "right_to_left")
    self.assertEqual((scored.positions, scored.order), ([2, 3], [3, 2]))
    _, network, _, params = _made(*case)
    layout = network.layout._replace(end=7)
    nats = tiny.quick_jit(
      lambda params, *args: objective.order_nll(
        network.bind(params), layout, *args
      )
    )(
      params,
      np.array([[0, 1, 2, 0, 0, 0]]),
      np.array([[1, 4, 3, 2, 5, 6]], np.int32),
    )
    np.testing.assert_allclose(
      scored.token_log_p, [-nats[0, 3], -nats[0, 2]], atol=1e-5
    )

  def test_an_average_over_orders(self):
    """Of two tokens: both orders come among 16, and nothing else."""
    case = ("two_stream", 2)
    (mean,) = _score(case, ["a[bc]"], "uniform", orders=16)
    single = [
      _score(case, ["a[bc]"], order)[0].log_p
      for order in ("left_to_right", "right_to_left")
    ]
    self.assertIsNone(mean.order)
    self.assertLen(mean.order_log_p, 16)
    away = np.abs(np.subtract.outer(mean.order_log_p, single))
    self.assertLess(away.min(axis=1).max(), 1e-5)
    self.assertLess(away.min(axis=0).max(), 1e-5)
    self.assertAlmostEqual(
      mean.log_p, np.log(np.exp(mean.order_log_p).mean()), delta=1e-5
    )
    self.assertNotAlmostEqual(mean.log_p, np.mean(single), places=3)


@pytest.mark.thorough
class BatchTest(parameterized.TestCase):
  def test_a_text_is_scored_alone(self):
    self.check_alone("two_stream", 2)

  @parameterized.parameters(("ao_gpt", 1), ("mdlm", 1))
  @pytest.mark.slow
  def test_a_text_of_others_is_scored_alone(self, *case):
    self.check_alone(*case)

  def check_alone(self, *case):
    """Whatever stands beside it, and however many at once."""
    texts = ["abcabc", "[a]b_", "cc", "a[bca]", "b"]
    want = [_score(case, [text], "uniform", orders=2)[0] for text in texts]
    for batch_size in (2, 64):
      got = _score(case, texts, "uniform", orders=2, batch_size=batch_size)
      for a, b in zip(got, want):
        self.assertEqual((a.text, a.positions), (b.text, b.positions))
        np.testing.assert_allclose(a.order_log_p, b.order_log_p, atol=1e-4)

  @parameterized.parameters(
    (
      "two_stream",
      "abcabca",
      "text 1 has 7 tokens; .* at most 6 .config.model",
    ),
    ("causal", "[a]b", "text 1: mechanism causal .* left to right only"),
    ("causal", "_[b]", "text 1: mechanism causal .* left to right only"),
  )
  def test_texts_that_cannot_be_scored(self, mechanism, text, message):
    with self.assertRaisesRegex(prompts.PromptError, message):
      _score((mechanism, 2), [text])


@pytest.mark.thorough
class AttentionTest(parameterized.TestCase):
  def test_a_named_one_is_called_for_what_it_can(self):
    """Of cuDNN: causal, as many rows as slots; here by what XLA computes."""
    called = []

    def attention(q, k, v, visible, *, implementation=None, **options):
      if implementation == "cudnn":
        self.assertIsNone(visible)
        self.assertEqual(q[0].shape[1], k.shape[1])
        called.append(q[0].shape[1])
      return right(q, k, v, visible, implementation="xla", **options)

    right = pallas_kernels.any_order_attention
    base, _, mesh, params = _made("two_stream", 2)
    texts = [(t, prompts.parse_marked(t, _ABC, "_", "[]")) for t in ("a[b]c",)]
    prompt = prompts.parse_prompt("a_c", _ABC, "_")
    want = _score(("two_stream", 2), ["a[b]c"])
    for name, count in (("cudnn", base.model.L), ("xla", 0)):
      compute = config.Compute(dtype="float32", attention=name)
      options = config.Config(model=base.model, compute=compute)
      network = network_lib.Network(options, mesh, _ABC)
      with (
        jax.set_mesh(mesh),
        mock.patch.object(pallas_kernels, "any_order_attention", attention),
      ):
        called.clear()
        made = score.Scorer(options, network)
        (got,) = made.score(params, texts)
        self.assertAlmostEqual(got.log_p, want[0].log_p, delta=1e-5)
        self.assertLen(called, count)  # Once a layer; and of the prompt.
        called.clear()
        generate.Sampler(options, network).sample(params, prompt)
        self.assertLen(called, count)


class MarksTest(parameterized.TestCase):
  @parameterized.parameters(
    ("ab_c", "char27", "11-1", "[]"),
    ("a[b]_c", "char27", "01-0", "[]"),
    ("[a]b[cd]", "char27", "1011", "[]"),
    ("[a_]b", "char27", "1-0", "[]"),
    ("<a>[b]", "byte", "1000", "<>"),
    ("[a]_", "byte", "1111", ""),
    ("é[é]", "byte", "0011", "[]"),
    ("a[b]c", "char27", "010", "auto"),
    ("x[0] = 1", "byte", "11111111", "auto"),
  )
  def test_parts(self, text, name, kinds, marks):
    marked = prompts.parse_marked(
      text, tokenizers.get(name), "_" if "-" in kinds else "", marks
    )
    found = np.where(marked.scored, "1", np.where(marked.known, "0", "-"))
    self.assertEqual("".join(found), kinds)

  def test_a_long_line_is_encoded_in_few_pieces(self):
    """And not letter by letter, which took half a minute for a long one."""
    tokenizer = mock.Mock(wraps=tokenizers.get("char27"))
    marked = prompts.parse_marked(
      "ab" * 50 + "[c]" + "_" * 50, tokenizer, "_", "[]"
    )
    self.assertLen(marked.tokens, 151)
    self.assertEqual(marked.scored.nonzero()[0].tolist(), [100])
    self.assertEqual(tokenizer.encode.call_count, 2)

  @parameterized.parameters(
    ("char27", "auto", "auto", ("_", "[]")),
    ("byte", "auto", "auto", ("", "")),
    ("byte", "_", "auto", ("_", "")),
    ("byte", "auto", "[]", ("", "[]")),
    ("byte", "_", "[]", ("_", "[]")),
    ("char27", "", "", ("", "")),
    ("char27", "?", "<>", ("?", "<>")),
    ("char27", "[", "auto", ("[", "")),
    ("char27", "auto", "_|", ("", "_|")),
  )
  def test_syntax_is_no_letter_or_is_asked_for(self, name, blank, marks, want):
    got = prompts.syntax(tokenizers.get(name), blank, marks)
    self.assertEqual(got, want)

  @parameterized.parameters(
    ("Hello World!", "hello world"),
    ("  She said: [Nothing!] ", "she said [nothing]"),
    ("It was [3]?", "it was [three]"),
    ("the [2] x 3", "the [two] x three"),
    ("a[2]b", "a[ two] b"),
    ("3[3] [3", "three[ three] [three"),
    ("_2_ [2,2]", "_ two _ [two two]"),
    ("no[ 3 x]", "no[ three x]"),
    ("the Qu__k, Élan ___.", "the qu__k lan ___"),
    ("[ ] - [a]", "[][a]"),
    ("a [b] c", "a [b] c"),
    ("\u212a3", "three"),
  )
  def test_a_text_in_normal_form_keeps_blanks_and_marks(self, text, want):
    char27 = tokenizers.get("char27")
    lines = prompts.normalised([("x", text)], char27, "auto", "auto")
    name = "x" if want == text else "x (in normal form)"
    self.assertEqual(lines, [(name, want)])
    plain = text.translate(dict.fromkeys(map(ord, "[]_"), " "))
    form = cleaning.normal_form(plain.encode()).decode()
    got = want.translate(dict.fromkeys(map(ord, "[]_"), " "))
    self.assertEqual(got.split(), form.split())

  @parameterized.parameters("...", " ", "[,]", "é [ ] 中")
  def test_a_text_of_which_nothing_is_left(self, text):
    """The message has the text as the user gave it."""
    char27 = tokenizers.get("char27")
    lines = [("x", "a"), ("y", text), ("z", "b"), ("w", "?")]
    with self.assertRaisesRegex(
      prompts.PromptError,
      rf"^y={re.escape(repr(text))}: has no letter .*1 other is wrong too; the "
      "next is w",
    ):
      prompts.normalised(lines, char27, "auto", "auto")

  @parameterized.parameters("x[0] = 1", "assert_stmt", "]", "_", "a [b_] _c[")
  def test_the_text_of_a_byte_model_is_text(self, text):
    byte = tokenizers.get("byte")
    marked = prompts.parse_marked(text, byte, "auto", "auto")
    self.assertEqual(byte.decode(marked.tokens), text)
    self.assertTrue(marked.scored.all())
    with self.assertRaisesRegex(prompts.PromptError, "config.sample.blank=_"):
      prompts.parse_prompt(text, byte, "auto")
    prompt = prompts.parse_prompt(text + "▢", byte, "▢")
    self.assertEqual(byte.decode(prompt.tokens[:-1]), text)
    self.assertEqual((~prompt.known).sum(), 1)

  @parameterized.parameters(
    ("", "--text='': there is nothing to score"),
    ("a[]b", r"--text='a\[\]b': there is nothing to score"),
    ("__", "--text='__': there is nothing to score"),
    ("a[b", "--text: '.' at offset 1 has no partner ']'"),
    ("ab]", "--text: ']' at offset 2 has no partner; marks are"),
    ("[a[b]]", "--text: '.' at offset 2 has no partner; marks are"),
    ("ab[cX]", "--text: char27: character 'X' at offset 4 is not a-z"),
  )
  def test_marks_that_cannot_be(self, text, message):
    with self.assertRaisesRegex(prompts.PromptError, f"^{message}"):
      prompts.parse_marked(text, tokenizers.get("char27"), "_", "[]")


if __name__ == "__main__":
  absltest.main()
