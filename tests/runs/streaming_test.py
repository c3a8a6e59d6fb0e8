"""Tokens as they come: the same draws as those of whole texts."""

import functools

import helpers
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import schema as config_lib
from aoarm_jax.generation import streaming

_PADDED = config_lib.Data(documents="pad")
_GROUPS = config_lib.Orders(groups="fixed", group_width=2)
_OPTIONS = {
  "parallel": ({"width": 3}, {"steps": 2, "schedule": "cosine"}),
  "speculative": ({"width": 3},),
  "adaptive": ({"width": 2, "score": "margin"},),
  "ancestral": ({"steps": 3},),
  "confidence": ({"steps": 3},),
}
_model = functools.partial(helpers.model_of, "abcde", L=1)
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


class SameDrawsTest(parameterized.TestCase):
  def check(self, text, tokens, n_known):
    """The tokens of a stream are those of a text, in its order."""
    tokens = list(tokens)
    self.assertEqual([x.position for x in tokens], text.order[n_known:])
    ranks = range(n_known, len(text.order))
    self.assertEqual([x.rank for x in tokens], [*ranks])
    for token in tokens:
      self.assertEqual(token.token, text.tokens[token.position - 1])
      self.assertLessEqual(token.log_p, 0)
      self.assertEqual(token.seed, text.seed)
    total = sum(token.log_p for token in tokens)
    self.assertAlmostEqual(total, text.log_p, delta=1e-4)
    self.assertEqual(tokens[-1].text, text.text)
    if self.is_ended(text):
      return
    decided = {*text.order[:n_known]}
    for token in tokens:
      decided.add(token.position)
      shown = [c if p in decided else "_" for p, c in enumerate(text.text, 1)]
      self.assertEqual(token.text, "".join(shown[: max(decided)]))

  def is_ended(self, text):
    """Whether the last token is an end, which is not in the text."""
    return len(text.tokens) > len(text.text)

  def check_method(self, model, method, options):
    given = dict(options, method=method, seed=3)
    prompt, filled = "ab", "_b_d_"
    text = model.generate(prompt=prompt, **given)[0]
    self.check(text, model.generate_stream(prompt=prompt, **given), 2)
    if model.config.model.kind.left_to_right:
      return
    text = model.infill(filled, **given)[0]
    self.check(text, model.infill_stream(filled, **given), 2)

  @parameterized.parameters(
    ("two_stream", 2, "sequential"), ("mdlm", 1, "sequential")
  )
  def test_one_token_in_a_step(self, mechanism, sentinels, method):
    self.check_method(_model(mechanism, sentinels), method, {})

  @parameterized.parameters(
    *((m, "sequential") for m in ("decoupled_rope", "register", "causal")),
    ("two_stream", "parallel"),
    ("two_stream", "speculative"),
    ("decoupled_rope", "adaptive"),
    ("mdlm", "ancestral"),
    ("mdlm", "confidence"),
  )
  @pytest.mark.slow
  def test_every_method(self, mechanism, method):
    for options in _OPTIONS.get(method, ({},)):
      self.check_method(_model(mechanism), method, options)

  @pytest.mark.thorough
  def test_laws_and_orders(self):
    model = _model("two_stream", 2)
    for options in (
      {"temperature": 0.5, "top_k": 2},
      {"order": [5, 4, 3, 2, 1]},
      {"order": "right_to_left"},
    ):
      text = model.infill("_b_d_", seed=1, **options)[0]
      self.check(text, model.infill_stream("_b_d_", seed=1, **options), 2)

  @pytest.mark.thorough
  def test_groups(self):
    model = _model("two_stream", orders=_GROUPS)
    self.check_method(model, "parallel", {"width": 2})

  @pytest.mark.thorough
  def test_a_text_whose_end_is_drawn(self):
    self.check_end("left_to_right")

  @pytest.mark.slow
  def test_a_text_whose_length_is_drawn(self):
    self.check_end("uniform")

  def check_end(self, order):
    network = _model("two_stream", data=_PADDED).network
    model = helpers.in_memory(network)
    # So that texts of all lengths come.
    model.params = model.params | {"head": 0.1 * model.params["head"]}
    lengths = set()
    for seed in range(5):
      text = model.generate(order=order, seed=seed)[0]
      tokens = [*model.generate_stream(order=order, seed=seed)]
      end = model.tokenizer.end
      is_drawn = tokens[-1].token == end
      if order == "left_to_right" or len(tokens) == 1:
        self.check(text, tokens, 0)
        self.assertEqual(is_drawn, len(text.tokens) < 7)
      else:  # The length is drawn before, so the end is known.
        self.assertEqual(tokens[-1].text, text.text)
        inside = [p for p in text.order if p <= len(text.text)]
        self.assertEqual([x.position for x in tokens], inside)
        self.assertEqual([x.rank for x in tokens], [*range(len(inside))])
      lengths.add(len(text.text))
    self.assertGreater(len(lengths), 1)


class StreamTest(parameterized.TestCase):
  def test_settings_do_not_stay_between_two_tokens(self):
    """The caller's own work sees its own mesh, and may stop at any token."""
    model = _model("two_stream", 2)
    stream = model.infill_stream("_b_d_", seed=0)
    first = next(stream)
    self.assertTrue(jax.sharding.get_abstract_mesh().empty)
    self.assertEqual(model.infill("_b_d_", seed=0)[0].order[2], first.position)
    stream.close()
    self.assertEqual(next(model.infill_stream("_b_d_", seed=0)), first)
    self.assertNotEqual(
      next(model.infill_stream("_b_d_")).seed,
      next(model.infill_stream("_b_d_")).seed,
    )

  def test_errors_come_with_the_call(self):
    model = _model("two_stream", 2)
    for call, message in (
      (lambda: model.infill_stream("ab"), "text 1='ab' has no blank '_'"),
      (lambda: model.infill_stream(["a_"]), r"\['a_'\] is no text: give one s"),
      (lambda: model.generate_stream(prompt="X"), "prompt: abcde: character"),
      (lambda: model.generate_stream(length=8), "length=8: must be at least 1"),
      (lambda: model.generate_stream(width=2), "width=2: has no effect here"),
      (
        lambda: model.generate_stream(count=2),
        "count: no such option; there are: prompt",
      ),
    ):
      with self.assertRaisesRegex(aoarm_jax.UserError, f"^{message}"):
        call()

  def test_the_text_so_far(self):
    ids, alphabet = np.arange(5), _model("two_stream", 2).tokenizer
    for decided, want in (
      ("00000", ""),
      ("11111", "abcde"),
      ("01010", "_b_d"),
      ("00001", "____e"),
      ("11000", "ab"),
    ):
      is_decided = np.array([x == "1" for x in decided])
      self.assertEqual(streaming.so_far(alphabet, ids, is_decided), want)


if __name__ == "__main__":
  absltest.main()
