"""Scores of texts longer than T, against sums over single tokens."""

import functools
import math

import helpers
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import schema as config_lib

_T, _STRIDE = 7, 3
_TEXT = "edacbbdaecadbceab"  # 17 tokens, so the last block has 2.
_model = functools.partial(helpers.model_of, "abcde", T=_T, L=1)
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


def _blocks(n, stride=_STRIDE):
  """Triples (start of the window, first token, after the last) by hand."""
  for first in range(0, n, stride):
    last = min(first + stride, n)
    yield max(0, last - _T), first, last


class BlocksTest(parameterized.TestCase):
  @parameterized.parameters("left_to_right", "right_to_left")
  def test_every_token_is_scored_once_in_its_block(self, order):
    self.check_tokens(_model("two_stream", 2), order)

  @parameterized.parameters(("mdlm", 2), ("causal", 1), ("decoupled_rope", 1))
  @pytest.mark.thorough
  def test_tokens_of_other_mechanisms(self, *case):
    self.check_tokens(_model(*case), "left_to_right")

  def check_tokens(self, model, order):
    """The sum over tokens that are scored one by one, in texts of their own."""
    score = model.score(_TEXT, stride=_STRIDE, order=order)
    texts, positions = [], []
    for start, first, last in _blocks(len(_TEXT)):
      places = [*range(first, last)]
      for i in places:
        before, after = _TEXT[start:i], _TEXT[i + 1 : last]
        if order == "right_to_left":
          before = _TEXT[start:first] + "_" * (i - first)
        else:
          after = ""
        texts.append(f"{before}[{_TEXT[i]}]{after}")
      positions += places[:: 1 - 2 * (order == "right_to_left")]
    want = [one.log_p for one in model.score(texts)]
    self.assertLen(want, len(_TEXT))
    np.testing.assert_allclose(score.token_log_p, want, atol=2e-5)
    self.assertAlmostEqual(score.log_p, sum(want), delta=1e-4)
    self.assertAlmostEqual(score.bits, -sum(want) / math.log(2), delta=1e-4)
    self.assertEqual(score.order, [i + 1 for i in positions])
    self.assertEqual(score.positions, [*range(1, 18)])
    self.assertEqual((score.text, score.bytes), (_TEXT, 17))
    self.assertAlmostEqual(score.bits_per_char, score.bits / 17)

  def test_several_orders(self):
    """Every block is the mixture of its orders."""
    model = _model("two_stream", 2)
    options = dict(order="uniform", orders=3, seed=2)
    score = model.score(_TEXT, stride=_STRIDE, **options)
    blocks = []
    for start, first, last in _blocks(len(_TEXT)):
      rest = "_" * (start + _T - last)
      blocks.append(f"{_TEXT[start:first]}[{_TEXT[first:last]}]{rest}")
    parts = model.score(blocks, **options)
    self.assertAlmostEqual(
      score.log_p, sum(part.log_p for part in parts), delta=1e-4
    )
    np.testing.assert_allclose(
      score.order_log_p,
      np.sum([part.order_log_p for part in parts], axis=0),
      atol=1e-4,
    )
    self.assertLen({round(x, 3) for x in score.order_log_p}, 3)
    self.assertIsNone(score.order)

  def test_short_and_long_texts_in_one_call(self):
    """The stride is half of T, and short texts are as they were."""
    model = _model("two_stream", 2)
    texts = [_TEXT, "abc", _TEXT[:8], "[ab]c", _TEXT[:7]]
    scores = model.score(texts)
    self.assertEqual([score.text for score in scores], texts)
    for text, score in zip(texts, scores):
      want = model.score(text, stride=3)
      np.testing.assert_allclose(score.token_log_p, want.token_log_p, atol=1e-5)
    one_stride = model.score(_TEXT, stride=_T).log_p
    windows = [_TEXT[:7], _TEXT[7:14], f"{_TEXT[10:14]}[{_TEXT[14:]}]"]
    want = sum(score.log_p for score in model.score(windows))
    self.assertAlmostEqual(one_stride, want, delta=1e-4)

  @parameterized.parameters(1, 2)
  @pytest.mark.thorough
  def test_padded_documents(self, sentinels):
    """A predicted end is the last token, and inside of the text none can be."""
    data = config_lib.Data(documents="pad")
    model = _model("two_stream", sentinels, data=data)
    score = model.score(_TEXT, stride=_STRIDE)
    n = 17 + (sentinels == 1)
    texts = []
    for start, first, last in _blocks(n):
      for i in range(first, min(last, 17)):
        after = "_" * (start + _T - i - 1)  # T tokens have no end behind them.
        texts.append(f"{_TEXT[start:i]}[{_TEXT[i]}]{after}")
    want = [one.log_p for one in model.score(texts)]
    if sentinels == 1:
      want.append(model.score(f"{_TEXT[11:16]}[{_TEXT[16]}]").token_log_p[-1])
    np.testing.assert_allclose(score.token_log_p, want, atol=2e-5)
    self.assertEqual(score.positions, [*range(1, n + 1)])
    self.assertEqual(score.bytes, 17)

  @parameterized.parameters(
    ("[ab]" + "c" * 6, {}, "text 1 has 8 tokens; a text of more than 7 .* so "),
    ("_" + "c" * 7, {}, "text 1 has 8 tokens; a text of more than 7 "),
    (_TEXT, {"stride": 0}, "stride=0: must be at least 1 and at most 7 "),
    (_TEXT, {"stride": 8}, "stride=8: must be at least 1 and at most 7 "),
    (_TEXT, {"stride": 1.5}, "stride=1.5: must be a whole number"),
    (
      _TEXT,
      {"order": [*range(1, 18)]},
      "order: a list of positions is for texts of up to 7 tokens",
    ),
  )
  def test_what_cannot_be(self, text, options, message):
    with self.assertRaisesRegex(aoarm_jax.UserError, f"^{message}") as caught:
      _model("two_stream", 2).score(text, **options)
    self.assertLen(str(caught.exception).splitlines(), 1)


if __name__ == "__main__":
  absltest.main()
