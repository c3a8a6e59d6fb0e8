"""The log-probability as a function of parameters: values and gradients."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import schema as config_lib

_T = 4
_model = functools.partial(helpers.model_of, "abc", T=_T, L=1)
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


@functools.cache
def _jitted(*case):
  """Jitted (params, tokens, order) -> LogProb."""
  return jax.jit(_model(*case).log_prob)


class ValuesTest(parameterized.TestCase):
  @parameterized.parameters(("two_stream", 2))
  def test_it_is_the_score(self, *case):
    self.check_scores(case)

  @parameterized.parameters(("mdlm", 1), ("register", 1), ("ao_gpt", 2))
  @pytest.mark.slow
  def test_it_is_the_score_of_others(self, *case):
    self.check_scores(case)

  def check_scores(self, case):
    """Of single texts, shorter ones too; and of texts that were drawn."""
    model = _model(*case)
    for n in (3, _T):
      tokens = tiny.tokens(3, n, 3, seed=n)
      order = tiny.orders_of(case[0], 3, n)
      found = _jitted(*case)(model.params, tokens, order)
      self.assertEqual(found.by_token.shape, (3, n))
      np.testing.assert_allclose(
        found.total, found.by_token.sum(axis=1), rtol=1e-5
      )
      texts = [model.tokenizer.decode(row) for row in tokens]
      scores = model.score(texts, order=order.tolist())
      for row, score in zip(found.by_token, scores):
        np.testing.assert_allclose(row, score.token_log_p, atol=2e-5)
    texts = model.generate(3, seed=1)
    order = np.array([text.order for text in texts])
    tokens = np.array([text.tokens for text in texts])
    found = _jitted(*case)(model.params, tokens, order).total
    np.testing.assert_allclose(found, [text.log_p for text in texts], atol=2e-4)
    # One order for all rows.
    one = _jitted(*case)(model.params, tokens, order[0])
    same = _jitted(*case)(model.params, tokens, np.tile(order[0], (3, 1)))
    np.testing.assert_array_equal(one.total, same.total)

  @pytest.mark.thorough
  def test_padding_counts_nothing(self):
    model = _model("two_stream", data=config_lib.Data(documents="pad"))
    end = model.tokenizer.end
    tokens = np.array([[1, 2, end, 0], [1, 2, end, 2]])
    log_prob = jax.jit(model.log_prob)
    found = log_prob(model.params, tokens, np.array([2, 1, 3, 4]))
    np.testing.assert_array_equal(found.by_token[0], found.by_token[1])
    np.testing.assert_array_equal(found.by_token[:, 3], 0)
    last = log_prob(model.params, tokens, np.array([4, 2, 1, 3]))
    np.testing.assert_array_equal(last.by_token, found.by_token)
    score = model.score("bc", order=[2, 1, 3])
    np.testing.assert_allclose(
      found.by_token[0, :3], score.token_log_p, atol=2e-5
    )

  @parameterized.parameters(
    ([0, 1], [1, 2], r"tokens: shape \(2,\); must be \[B, n\], 1 <= n <= 4"),
    ([[0] * 5], [1, 2], r"tokens: shape \(1, 5\)"),
    ([[0, 1]], [1, 2, 3], r"order: shape \(3,\); must be that of tokens, \(1,"),
    ([[0, 1]], [[1, 2]] * 2, r"order: shape \(2, 2\)"),
    ([[0.0, 1.0]], [1, 2], "tokens: float32 array; give whole numbers"),
    ([[0, 3]], [1, 2], "tokens: 3 is no token id; ids are 0 to 2"),
    (
      [[0, 1]],
      [0, 1],
      r"order: a row is no permutation of 1\.\.2; positions c",
    ),
  )
  def test_what_cannot_be(self, tokens, order, message):
    model = _model("two_stream", 2)
    with self.assertRaisesRegex(aoarm_jax.ConfigError, f"^{message}") as caught:
      model.log_prob(model.params, tokens, order)
    self.assertLen(str(caught.exception).splitlines(), 1)

  def test_one_way_only(self):
    model = _model("causal")
    with self.assertRaisesRegex(
      aoarm_jax.ConfigError, "^order: mechanism caus"
    ):
      model.log_prob(model.params, [[0, 1]], [2, 1])


class GradientTest(parameterized.TestCase):
  @parameterized.parameters(("two_stream", 2))
  def test_finite_differences(self, *case):
    self.check_differences(case)

  @parameterized.parameters(("decoupled_rope", 1), ("mdlm", 2))
  @pytest.mark.slow
  def test_finite_differences_of_others(self, *case):
    self.check_differences(case)

  def check_differences(self, case):
    """Along random directions, with weights of both signs on the tokens."""
    model = _model(*case)
    tokens, order = (
      tiny.tokens(3, _T, 3, seed=7),
      tiny.all_orders(_T)[[5, 9, 22]],
    )
    weights = np.random.default_rng(1).normal(size=(3, _T)).astype(np.float32)

    def f(params):
      found = model.log_prob(params, tokens, order)
      return jnp.sum(weights * found.by_token) + found.total[0]

    value_and_gradient = jax.jit(jax.value_and_grad(f))

    def moved(direction, step):
      return jax.tree.map(lambda x, d: x + step * d, model.params, direction)

    _, gradient = value_and_gradient(model.params)
    leaves, tree = jax.tree.flatten(gradient)
    for seed in range(3):
      rng = np.random.default_rng(seed)
      along = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
      direction, step = jax.tree.unflatten(tree, along), 2e-3
      ends = [
        float(value_and_gradient(moved(direction, h))[0]) for h in (step, -step)
      ]
      slope = sum(float(np.vdot(g, d)) for g, d in zip(leaves, along))
      self.assertGreater(abs(slope), 0.1)
      self.assertAlmostEqual(
        (ends[0] - ends[1]) / (2 * step), slope, delta=0.02 * abs(slope) + 0.02
      )

  def test_all_texts_together_have_no_gradient(self):
    """Their probabilities sum to 1, whatever the parameters (REINFORCE)."""
    model = _model("two_stream", 2)
    tokens = tiny.all_sequences(3, 3)

    @jax.jit
    def total(params):
      return jnp.exp(model.log_prob(params, tokens, [3, 1, 2]).total).sum()

    value, gradient = jax.value_and_grad(total)(model.params)
    self.assertAlmostEqual(float(value), 1, delta=1e-5)
    for leaf in jax.tree.leaves(gradient):
      np.testing.assert_allclose(leaf, 0, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
