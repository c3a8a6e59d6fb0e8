"""Generation: the law of what comes out, by enumeration; prompts; orders."""

import contextlib
import functools
import io
import json
import tempfile
from typing import NamedTuple
from unittest import mock

import jax
import law_test
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax import orders
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.generation import decode, prompts
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import sample as sample_lib
from aoarm_jax.generation import texts as generate
from aoarm_jax.model import network as network_lib

_T, _V, _MANY = 4, 3, 40_000
# Positions of the network: more than are generated, for the first mechanism.


_LONGER = {tiny.ALTERNATING[0][0]: _T + 2}


_PLAIN = law_test.law_of()
_CUT = law_test.law_of(1.3, 2, 0.95)


@functools.cache
def _generate(mechanism, s):
  """(params, jitted (params, key, tokens, known, order, law))."""
  made = _bind(mechanism, s)
  return tiny.sharp(made), tiny.quick_jit(
    lambda params, *args: decode.generate(made, params, *args)
  )


def _bind(mechanism, s):
  return tiny.make(mechanism, s, T=_LONGER.get(mechanism, _T), V=_V, D=8, N=2)


@functools.cache
def _logits(mechanism, s, order, end):
  """float64 [sequences, T, V] of all sequences, by rank, without a cache."""
  made = _bind(mechanism, s)
  texts = tiny.all_sequences(_V, _T)
  tiled = np.tile(np.array(order, np.int32), (len(texts), 1))
  slots = orders.to_slots(texts, tiled, orders.Layout(s, _V, end))
  network = tiny.quick_jit(made.apply)
  return np.asarray(network(tiny.sharp(made), slots), np.float64)[:, s - 1 :]


def _enumerate(case, order, known, law, end=None):
  """p [sequences] of what generate() should give for one prompt."""
  mechanism, s = case
  end = end or _LONGER.get(mechanism, _T) + 1
  logits = _logits(mechanism, s, tuple(order), end)
  found = []
  for text, by_rank in zip(tiny.all_sequences(_V, _T), logits):
    p = 1.0
    for position, row in zip(order, by_rank):
      token = text[position - 1]
      if position in known:
        p *= known[position] == token
      else:
        p *= law_test.slow_law(row, law)[token]
    found.append(p)
  np.testing.assert_allclose(sum(found), 1.0, atol=1e-5)
  return np.array(found)

  @pytest.mark.slow
  def test_rare_tokens_come_as_often_as_they_should(self):
    V, draws, rare = 65536, 10_000, 1e-7
    log_p = np.full(V, np.log(rare), np.float32)
    log_p[0] = np.log1p(-rare * (V - 1))
    drawn = jax.jit(
      lambda keys: jax.lax.map(
        lambda key: sampling.draw(key, log_p), keys, batch_size=50
      )
    )(jax.random.split(jax.random.key(0), draws))
    due = draws * rare * (V - 1)
    # Four standard deviations of a Poisson number.
    self.assertLess(abs((np.asarray(drawn) > 0).sum() - due), 4 * due**0.5)


class Prompt(NamedTuple):
  """A prompt of the tests: order asked for, token by known position, order."""

  order: tuple
  known: dict
  used: tuple


def _prompts(mechanism):
  if mechanisms.MECHANISMS[mechanism].left_to_right:
    natural = (1, 2, 3, 4)
    return Prompt(natural, {}, natural), Prompt(natural, {1: 2}, natural)
  return (
    Prompt((3, 1, 4, 2), {}, (3, 1, 4, 2)),
    Prompt((4, 3, 1, 2), {3: 1, 2: 0}, (2, 3, 4, 1)),
  )


def _inputs(mechanism, B=_MANY):
  """(tokens, known, order) of rows with either prompt in turn."""
  tokens = np.full((B, _T), 1, np.int32)  # Junk where not known.
  known, order = np.zeros((B, _T), bool), np.zeros((B, _T), np.int32)
  for i, prompt in enumerate(_prompts(mechanism)):
    order[i::2] = prompt.order
    for position, token in prompt.known.items():
      known[i::2, position - 1], tokens[i::2, position - 1] = True, token
  return tokens, known, order


@functools.cache
def _drawn(case, law, seed=0, B=_MANY):
  params, run = _generate(*case)
  result = run(params, jax.random.key(seed), *_inputs(case[0], B), law)
  return jax.tree.map(np.asarray, result)


def _counts(texts):
  """How often each of all sequences came."""
  ids = texts @ (_V ** np.arange(_T - 1, -1, -1))
  return np.bincount(ids, minlength=_V**_T)


# A second stream, one stream, and one that reads from left to right.
_KINDS = tuple(
  case
  for case in tiny.ALTERNATING
  if case[0] in ("two_stream", "decoupled_rope", "causal")
)
_OTHERS = tuple(case for case in tiny.ALTERNATING if case not in _KINDS)


class GenerateTest(parameterized.TestCase):
  @parameterized.product(case=tiny.ALTERNATING[:1], law=(_PLAIN, _CUT))
  def test_texts_come_with_the_enumerated_law(self, case, law):
    self.check_law(case, law)

  @parameterized.product(case=_KINDS[1:], law=(_PLAIN, _CUT))
  @pytest.mark.thorough
  def test_more_mechanisms_have_the_enumerated_law(self, case, law):
    self.check_law(case, law)

  @parameterized.product(case=_OTHERS, law=(_PLAIN, _CUT))
  @pytest.mark.slow
  def test_all_mechanisms_have_the_enumerated_law(self, case, law):
    self.check_law(case, law)

  def check_law(self, case, law):
    """Exact, for both prompts of one ragged batch."""
    result = _drawn(case, law)
    for i, prompt in enumerate(_prompts(case[0])):
      counts = _counts(result.tokens[i::2])
      right = _enumerate(case, prompt.used, prompt.known, law)
      self.assertGreater(tiny.p_value(counts, right), 1e-4)
      self.assertEqual(counts[right == 0].sum(), 0)
      # The test has the power to see a slightly wrong law, and a missing cut.
      other = law_test.law_of(1.1) if law is _PLAIN else law_test.law_of(1.3)
      wrong = _enumerate(case, prompt.used, prompt.known, other)
      self.assertLess(tiny.p_value(counts, wrong), 1e-4)

  def test_a_shorter_text_keeps_its_end(self):
    """EOS stays behind the network's last position, not the text's."""
    case = tiny.ALTERNATING[0]
    self.assertEqual(case[1], 2)
    prompt = _prompts(case[0])[0]
    counts = _counts(_drawn(case, _PLAIN).tokens[::2])
    wrong = _enumerate(case, prompt.used, prompt.known, _PLAIN, end=_T + 1)
    self.assertLess(tiny.p_value(counts, wrong), 1e-4)

  @parameterized.parameters(*_KINDS)
  @pytest.mark.thorough
  def test_known_tokens_stay_and_come_first(self, *case):
    self.check_known(case)

  @parameterized.parameters(*_OTHERS)
  @pytest.mark.slow
  def test_known_tokens_of_all_mechanisms_stay_and_come_first(self, *case):
    self.check_known(case)

  def check_known(self, case):
    result = _drawn(case, _PLAIN)
    for i, prompt in enumerate(_prompts(case[0])):
      self.assertTrue((result.order[i::2] == prompt.used).all())
      for position, token in prompt.known.items():
        self.assertTrue((result.tokens[i::2, position - 1] == token).all())

  @parameterized.parameters(*_KINDS)
  @pytest.mark.thorough
  def test_temperature_zero_takes_the_likeliest(self, *case):
    self.check_likeliest(case)

  @parameterized.parameters(*_OTHERS)
  @pytest.mark.slow
  def test_temperature_zero_of_all_mechanisms(self, *case):
    self.check_likeliest(case)

  def check_likeliest(self, case):
    """Greedily, rank by rank, from logits without a cache."""
    result = _drawn(case, law_test.law_of(0))
    texts = [tuple(text) for text in tiny.all_sequences(_V, _T)]
    end = _LONGER.get(case[0], _T) + 1
    for i, prompt in enumerate(_prompts(case[0])):
      text = [prompt.known.get(p, 0) for p in range(1, _T + 1)]
      for r, position in enumerate(prompt.used):
        if position not in prompt.known:
          logits = _logits(*case, prompt.used, end)[texts.index(tuple(text))]
          text[position - 1] = int(logits[r].argmax())
      self.assertTrue((result.tokens[i::2] == text).all())

  @pytest.mark.thorough
  def test_a_row_depends_on_its_index_alone(self):
    """Not on the batch; but on the key."""
    case = tiny.ALTERNATING[0]
    whole, few = _drawn(case, _PLAIN), _drawn(case, _PLAIN, B=25)
    np.testing.assert_array_equal(few.tokens, whole.tokens[:25])
    np.testing.assert_array_equal(few.order, whole.order[:25])
    other = _drawn(case, _PLAIN, seed=1, B=25)
    self.assertFalse(np.array_equal(few.tokens, other.tokens))

  @pytest.mark.thorough
  def test_a_row_with_nothing_to_generate(self):
    """It stays, while the other rows go on."""
    case = tiny.ALTERNATING[0]
    params, run = _generate(*case)
    tokens, known, order = _inputs(case[0], 25)
    tokens[::2], known[::2] = tiny.tokens(13, _T, _V), True
    result = run(params, jax.random.key(0), tokens, known, order, _PLAIN)
    self.assertTrue((result.tokens[::2] == tokens[::2]).all())
    self.assertTrue((result.order[::2] == np.arange(1, _T + 1)).all())
    np.testing.assert_array_equal(
      result.tokens[1::2], _drawn(case, _PLAIN, B=25).tokens[1::2]
    )

  @pytest.mark.thorough
  def test_without_a_prompt_there_is_no_prefill(self):
    """One sentinel: BOS comes with the first step, or it came before."""
    made = _bind("decoupled_rope", 1)
    order = tiny.orders_of("decoupled_rope", 25, _T)
    tokens, known = np.zeros((25, _T), np.int32), np.zeros((25, _T), bool)

    def run(params, prefill):
      return decode.generate(
        made,
        params,
        jax.random.key(0),
        tokens,
        known,
        order,
        _PLAIN,
        prefill=prefill,
      )

    run = tiny.quick_jit(run, static_argnums=1)
    want, got = (run(tiny.sharp(made), prefill) for prefill in (True, False))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    self.assertGreater(len(np.unique(got.tokens, axis=0)), 1)


_CHAR27 = tokenizers.get("char27")


class PromptTest(parameterized.TestCase):
  @parameterized.parameters(
    ("a_c", "char27", "_", [1, 0, 1]),
    ("_", "char27", "_", [0]),
    ("__b_", "char27", "_", [0, 0, 1, 0]),
    ("a c", "char27", " ", [1, 0, 1]),
    ("é_", "byte", "_", [1, 1, 0]),
    ("_a", "byte", "a", [1, 0]),
    ("x…y", "byte", "…", [1, 0, 1]),
  )
  def test_blanks_are_one_token_each(self, text, name, blank, known):
    tokenizer = tokenizers.get(name)
    prompt = prompts.parse_prompt(text, tokenizer, blank)
    self.assertEqual(prompt.known.tolist(), [bool(k) for k in known])
    self.assertEqual(prompt.known.dtype, bool)
    self.assertEqual(prompt.tokens.shape, prompt.known.shape)
    self.assertEqual(
      tokenizer.to_bytes(prompt.tokens[prompt.known]).decode(),
      text.replace(blank, ""),
    )

  @parameterized.parameters("", "abc")
  def test_without_a_blank(self, text):
    with self.assertRaisesRegex(
      prompts.PromptError, f"--prompt='{text}' has no blank '_'"
    ):
      prompts.parse_prompt(text, _CHAR27, "_")

  def test_a_wrong_character_is_found_where_it_stands(self):
    """The offset counts from the start of the prompt, over blanks."""
    with self.assertRaisesRegex(
      prompts.PromptError, r"^--prompt: .* character 'X' at offset 5 "
    ):
      prompts.parse_prompt("ab_c_X", _CHAR27, "_")


def _sampler(mechanism="two_stream", **sample):
  options = config.Config(
    model=config.Model(mechanism=mechanism, T=7, D=8, L=1, N=2),
    orders=config.Orders(given=(4, 1, 7, 2, 6, 3, 5)),
    sample=config.Sample(**dict(count=3) | sample),
    compute=config.Compute(dtype="float32", attention="xla"),
  )
  mesh = meshes.make_mesh(config.Mesh(data=1))
  made = network_lib.Network(options, mesh)
  sampler = generate.Sampler(options, made)
  params = sharding.put(mesh, tiny.sharp(made))

  def draw(text=None):
    prompt = text and prompts.parse_prompt(
      text, _CHAR27, sample.get("blank", "_")
    )
    with jax.set_mesh(mesh):
      return sampler.sample(params, prompt)

  return draw


class SamplerTest(parameterized.TestCase):
  def test_whole_texts(self):
    draw = _sampler()
    texts = draw()
    self.assertLen(texts, 3)
    self.assertLen({text.text for text in texts}, 3)
    for text in texts:
      self.assertLen(text.text, 7)
      self.assertEqual(sorted(text.order), list(range(1, 8)))
    self.assertEqual(texts, draw())

  def test_a_prompt_is_kept_and_comes_first(self):
    """Shorter than the model's texts, and the given order cut to it."""
    texts = _sampler(order="given", count=20)("_b_ e")
    for text in texts:
      self.assertRegex(text.text, r"^[a-z ]b[a-z ] e$")
      self.assertEqual(text.order, [2, 4, 5, 1, 3])
      self.assertEqual(text.steps, [1, 0, 2, 0, 0])
      self.assertEqual(np.array(text.token_log_p)[[1, 3, 4]].tolist(), [0] * 3)
      self.assertLess(max(text.token_log_p[0], text.token_log_p[2]), 0)
      self.assertAlmostEqual(sum(text.token_log_p), text.log_p, places=5)
    self.assertGreater(len({text.text for text in texts}), 1)

  @parameterized.parameters(
    ("two_stream", "abcdefg_", "has 8 tokens; .* at most 7 .config.model.T"),
    (
      "causal",
      "a_c_",
      "blank at position 2 stands before known text, but mechanism causal",
    ),
    ("causal", "_b", "blank at position 1 "),
  )
  def test_prompts_that_cannot_be_filled(self, mechanism, text, message):
    with self.assertRaisesRegex(prompts.PromptError, message):
      _sampler(mechanism, order="left_to_right")(text)

  def test_a_causal_prompt_ends_in_blanks(self):
    for text in _sampler("causal", order="left_to_right")("ab__"):
      self.assertRegex(text.text, "^ab[a-z ]{2}$")
      self.assertEqual(text.order, [1, 2, 3, 4])

  def test_texts_are_written_as_json_lines(self):
    directory = self.enterContext(tempfile.TemporaryDirectory())
    path = epath.Path(directory) / "samples" / "x.jsonl"
    texts = [
      generate.Text(
        *("a b", [1, 0, 2], [2, 1, 3], -1.5, 4, 2, 3),
        *([1, 0, 2], [-1.0, 0.0, -0.5]),
      ),
      generate.Text("c", [3], [1], 0.0, 1),
    ]
    generate.write(path, texts, 7, prompt="a_b")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    self.assertEqual(
      lines,
      [
        {
          "step": 7,
          "prompt": "a_b",
          "text": "a b",
          "tokens": [1, 0, 2],
          "order": [2, 1, 3],
          "log_p": -1.5,
          "calls": 4,
          "accepted": 2,
          "seed": 3,
          "steps": [1, 0, 2],
          "token_log_p": [-1.0, 0.0, -0.5],
        },
        {
          "step": 7,
          "prompt": "a_b",
          "text": "c",
          "tokens": [3],
          "order": [1],
          "log_p": 0.0,
          "calls": 1,
          "accepted": 0,
          "seed": 0,
          "steps": [],
          "token_log_p": [],
        },
      ],
    )

  def test_texts_are_printed_before_they_are_written(self):
    """On one line each; the program goes on where nothing can be written."""
    workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    options = config.Config(mesh=config.Mesh(data=1))
    run = mock.Mock(step=7)
    run.network.mesh = meshes.make_mesh(options.mesh)
    texts = [
      generate.Text("a\n\x1b[2Jb", [1, 2], [1, 2], -1.5, 2),
      generate.Text("c", [3], [1], 0.0, 1),
    ]
    with (
      mock.patch.object(sample_lib.opening, "open_run", return_value=run),
      mock.patch.object(generate, "Sampler") as sampler,
    ):
      sampler.return_value.sample.return_value = texts
      shown = io.StringIO()
      with contextlib.redirect_stdout(shown):
        sample_lib.sample(options, workdir)
      self.assertEqual(shown.getvalue(), "a\\n\\x1b[2Jb\nc\n")
      (written,) = (workdir / "samples").iterdir()
      self.assertIn('"text": "a\\n\\u001b[2Jb"', written.read_text())
      # The folder of the texts cannot be made below a file.
      with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        self.assertLogs(level="WARNING") as logs,
      ):
        sample_lib.sample(options, written)
      self.assertEqual(shown.getvalue(), "a\\n\\x1b[2Jb\nc\n")
      self.assertIn("not written: ", logs.output[0])
      # A reader that has ended loses nothing of the file.
      with (
        mock.patch.object(
          sample_lib, "print", side_effect=BrokenPipeError, create=True
        ),
        self.assertRaises(BrokenPipeError),
      ):
        sample_lib.sample(options, workdir)
      self.assertLen(list((workdir / "samples").iterdir()), 2)


if __name__ == "__main__":
  absltest.main()
