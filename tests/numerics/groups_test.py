"""Two streams over groups of ranks, and over some of the ranks.

Groups in likelihoods, in generation and in scores.
"""

import functools
import itertools
import tempfile

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl import logging
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax import objective, orders
from aoarm_jax.api import options
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.evaluation import score
from aoarm_jax.generation import decode, prompts
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import sample as sample_lib
from aoarm_jax.generation import texts as generate
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import checkpoint

pytestmark = pytest.mark.thorough

_B, _T, _V = 3, 7, 5
_ABC = tokenizers.Tokenizer("abc", b"abc")


def _starts(*sizes):
  """bool [T] with groups of these sizes."""
  start = np.zeros(sum(sizes), bool)
  start[np.cumsum([0, *sizes[:-1]])] = True
  return start


_GROUPS = np.stack([_starts(2, 3, 2), _starts(1, 1, 4, 1), _starts(7)])


@functools.cache
def _nll(s, T=_T, V=_V, **shape):
  """Jitted (tokens, order, group_start) -> nats by rank."""
  made = tiny.make("two_stream", s, T=T, V=V, **shape)
  params = tiny.sharp(made)
  run = tiny.quick_jit(
    lambda tokens, order, groups, ranks: objective.order_nll(
      made.bind(params),
      made.layout,
      tokens,
      order,
      group_start=groups,
      ranks=ranks,
    )
  )
  return lambda tokens, order, groups=None, ranks=None: np.asarray(
    run(tokens, order, groups, ranks), np.float64
  )


class GroupsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(_B, _T, _V)
    self.order = tiny.orders_of("two_stream", _B, _T)

  @parameterized.parameters(1, 2)
  def test_what_each_row_sees(self, s):
    slots = orders.to_slots(
      self.tokens, self.order, tiny.layout(s, _V, _T), group_start=_GROUPS
    )
    for b, start in enumerate(_GROUPS):
      ends = [*np.flatnonzero(start)[1:], _T]
      for i in range(_T + s - 1):
        content, query = slots.visible[b, i]
        if i < s:
          self.assertEqual(content, i + 1)
        else:  # Slot i holds rank i - s: to the end of its group.
          end = next(e for e in ends if e > i - s)
          self.assertEqual(content, min(end + s, _T + s - 1))
        if i >= s - 1:  # It predicts rank i - s + 1: to the start of its group.
          rank = i - s + 1
          self.assertEqual(query, start[: rank + 1].nonzero()[0][-1] + s)

  @parameterized.parameters(1, 2)
  def test_groups_of_one_are_the_chain_rule(self, s):
    ones = np.ones((_B, _T), bool)
    tiny.assert_same(
      _nll(s)(self.tokens, self.order, ones),
      _nll(s)(self.tokens, self.order),
    )

  @parameterized.parameters(1, 2)
  def test_law_sums_to_one(self, s):
    T, V = 4, 3
    texts, every = tiny.all_sequences(V, T), tiny.all_orders(T)
    tokens = np.tile(texts, (len(every), 1))
    order = np.repeat(every, len(texts), axis=0)
    nll = _nll(s, T, V, D=8, N=2)
    for rest in itertools.product((False, True), repeat=T - 1):
      groups = np.tile([True, *rest], (len(tokens), 1))
      p = np.exp(-nll(tokens, order, groups).sum(axis=1)).reshape(24, -1)
      np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)

  @parameterized.parameters(1, 2)
  def test_only_groups_before_move_a_rank(self, s):
    """Bitwise: its own group and later ones do not, all before it do."""
    base = self.logits(s, self.tokens)
    for r in range(_T):
      other, at = self.tokens.copy(), self.order[:, r : r + 1] - 1
      new = (np.take_along_axis(other, at, axis=1) + 1) % _V
      np.put_along_axis(other, at, new, axis=1)
      moved = (self.logits(s, other) != base).any(axis=-1)
      for b, start in enumerate(_GROUPS):
        group = np.cumsum(start)
        np.testing.assert_array_equal(moved[b], group > group[r])

  def logits(self, s, tokens):
    params, run = _logits(s)
    slots = orders.to_slots(
      tokens, self.order, tiny.layout(s, _V, _T), group_start=_GROUPS
    )
    return np.asarray(run(params, slots))[:, s - 1 :]

  def test_order_inside_a_group_is_no_order(self):
    """The same tokens in groups: any order inside gives the same nats."""
    groups = np.tile(_starts(2, 3, 2), (_B, 1))
    permuted = self.order[:, [1, 0, 4, 2, 3, 6, 5]]
    got = _nll(1)(self.tokens, permuted, groups)
    want = _nll(1)(self.tokens, self.order, groups)
    tiny.assert_same(got, want[:, [1, 0, 4, 2, 3, 6, 5]])
    # Without groups it is one.
    apart = _nll(1)(self.tokens, permuted).sum(axis=1)
    self.assertGreater(
      np.abs(apart - _nll(1)(self.tokens, self.order).sum(axis=1)).min(), 1e-3
    )

  def test_draws(self):
    def draw(B=500, first_row=0, **options):
      options = config.Orders(**options)
      return np.asarray(
        orders.draw_groups(
          jax.random.key(0), B, 8, options, first_row=first_row
        )
      )

    np.testing.assert_array_equal(
      draw(3, groups="fixed", group_width=3), [_starts(3, 3, 2)] * 3
    )
    np.testing.assert_array_equal(
      draw(3, groups="given", group_sizes=(1, 4, 3)), [_starts(1, 4, 3)] * 3
    )
    self.assertIsNone(
      orders.draw_groups(jax.random.key(0), 3, 8, config.Orders())
    )
    start = draw(groups="random", group_width=4)
    self.assertTrue(start[:, 0].all())
    self.assertAlmostEqual(start[:, 1:].mean(), 0.25, delta=0.03)
    # A row depends on its index alone.
    np.testing.assert_array_equal(
      start[7:10], draw(3, first_row=7, groups="random", group_width=4)
    )


@functools.cache
def _logits(s):
  made = tiny.make("two_stream", s)
  run = jax.jit(made.apply)
  return tiny.sharp(made), run


class QueryFractionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tokens = tiny.tokens(_B, _T, _V)
    self.order = tiny.orders_of("two_stream", _B, _T)

  @parameterized.product(s=(1, 2), groups=(None, _GROUPS))
  def test_ranks_are_those_of_the_whole(self, s, groups):
    ranks = np.array([[0, 3, 6], [1, 2, 5], [4, 5, 6]])
    got = _nll(s)(self.tokens, self.order, groups, ranks)
    want = _nll(s)(self.tokens, self.order, groups)
    tiny.assert_same(got, np.take_along_axis(want, ranks, axis=1))

  def test_the_loss_is_unbiased(self):
    """The mean over all choices of 2 of 7 ranks is the whole; so of slopes."""
    made = tiny.make("two_stream", 1)
    params = tiny.sharp(made)

    def loss(params, ranks):
      draws = objective.Draws(self.order, ranks=ranks)
      return objective.training_nll(
        made.bind(params), made.layout, self.tokens, draws
      ).sum()

    value_and_slope = tiny.quick_jit(jax.value_and_grad(loss))
    want = value_and_slope(params, None)
    parts = [
      value_and_slope(params, np.tile(np.array(pair), (_B, 1)))
      for pair in itertools.combinations(range(_T), 2)
    ]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
      mean,
      want,
    )
    self.assertGreater(np.abs(parts[0][0] - want[0]), 0.1)

  def test_draws(self):
    """Distinct ranks in order, every one as often as any other."""
    draws = objective.draw(
      jax.random.key(0),
      4000,
      _T,
      config.Orders(),
      config.Train(query_fraction=0.4),
      config.Model().kind,
      np.int32(0),
    )
    ranks = np.asarray(draws.ranks)
    self.assertEqual(ranks.shape, (4000, 3))
    self.assertTrue((np.diff(ranks, axis=1) > 0).all())
    share = np.bincount(ranks.reshape(-1), minlength=_T) / 4000
    np.testing.assert_allclose(share, 3 / _T, atol=0.04)


_MANY = 30_000
_PLAIN = sampling.make_law()
# Of texts of 4 tokens: nothing is known, or positions 2, 3 and 4.
_USED, _KNOWN = ((3, 1, 4, 2), (2, 3, 4, 1)), (0, 3)
_PARALLEL = plan_lib.Plan("parallel", 2, groups=True)


@functools.cache
def _drawn(s, plan, B, T=4, V=3):
  """Texts of the prompts _USED in turn; or of T tokens, with 0 to T - 1 known.

  Without groups of its own, a plan is that of a model trained without.
  """
  made = tiny.make("two_stream", s, T=T, V=V, D=8, N=2)
  if T == 4:
    order, rank = np.array(_USED, np.int32), np.arange(T)
    known = np.stack([np.isin(rank + 1, o[:n]) for o, n in zip(order, _KNOWN)])
    order, known = (np.tile(x, (B // 2, 1)) for x in (order, known))
    tokens = np.tile(np.array([1, 0, 2, 1], np.int32), (B, 1))
  else:
    order = tiny.orders_of("two_stream", B, T)
    known = np.arange(T) < np.arange(B)[:, None] % T
    known = np.random.default_rng(0).permuted(known, axis=1)
    tokens = tiny.tokens(B, T, V)
  run = tiny.quick_jit(
    lambda params, *args: decode.generate(
      made, params, *args, _PLAIN, plan=plan
    )
  )
  out = run(tiny.sharp(made), jax.random.key(1), tokens, known, order)
  return jax.tree.map(np.asarray, out), known.sum(axis=1)


def _starts_of(known, width, T):
  """bool [B, T]: groups of `width` known ranks, then of `width` others."""
  rank, known = np.arange(T), np.asarray(known)[:, None]
  return np.where(rank < known, rank, rank - known) % width == 0


class GenerationTest(parameterized.TestCase):
  def test_parallel_has_the_law_of_its_groups(self):
    self.check_law(2, 2)

  @pytest.mark.slow
  def test_parallel_has_the_law_of_wider_groups(self):
    self.check_law(1, 3)

  def check_law(self, s, width):
    """Enumerated, from nothing and from a prompt of a group and a part."""
    plan = _PARALLEL._replace(width=width)
    out, _ = _drawn(s, plan, _MANY)
    causal, _ = _drawn(s, plan._replace(groups=False), _MANY)
    texts = tiny.all_sequences(3, 4)
    without_groups = []
    for which, (order, known) in enumerate(zip(_USED, _KNOWN)):
      nats = _nll(s, 4, 3, D=8, N=2)(
        texts,
        np.tile(np.array(order, np.int32), (81, 1)),
        np.tile(_starts_of([known], width, 4), (81, 1)),
      )
      given = np.array(order[:known], int) - 1
      prompt = np.array([1, 0, 2, 1])[given]
      law = np.exp(-nats[:, known:].sum(axis=1))
      law *= (texts[:, given] == prompt).all(axis=1)
      self.assertAlmostEqual(law.sum(), 1.0, delta=1e-5)

      def p_value(drawn, law=law, which=which):
        ids = drawn.tokens[which::2] @ (3 ** np.arange(3, -1, -1))
        return tiny.p_value(np.bincount(ids, minlength=81), law)

      self.assertGreater(p_value(out), 1e-4)
      without_groups.append(p_value(causal))
    # So many texts do tell two laws apart.
    self.assertLess(min(without_groups), 1e-4)

  @parameterized.parameters((2, 4, "parallel"), (2, 3, "adaptive"))
  def test_log_probability_is_that_of_the_groups(self, s, width, method):
    self.check_log_p(s, width, method)

  @parameterized.parameters((1, 3), (2, 1))
  @pytest.mark.slow
  def test_log_probability_is_that_of_more_groups(self, s, width):
    self.check_log_p(s, width, "parallel")

  def check_log_p(self, s, width, method):
    """Text by text, whatever is known; of the order that was followed."""
    plan = plan_lib.Plan(method, width, groups=True)
    out, known = _drawn(s, plan, 14, _T, _V)
    nats = _nll(s, D=8, N=2)(
      out.tokens, out.order, _starts_of(known, width, _T)
    )
    blank = np.arange(_T) >= known[:, None]
    tiny.assert_same(out.log_p, -np.where(blank, nats, 0).sum(axis=1))

  def test_steps_are_groups(self):
    """In three steps of 7 tokens: 2, 2 and 3."""
    plan = plan_lib.Plan("parallel", steps=3, groups=True)
    out, known = _drawn(2, plan, 14, _T, _V)
    self.assertEqual(known[0], 0)
    groups = np.tile(_starts(2, 2, 3), (14, 1))
    nats = _nll(2, D=8, N=2)(out.tokens, out.order, groups)
    self.assertAlmostEqual(out.log_p[0], -nats[0].sum(), delta=1e-4)

  @pytest.mark.slow
  def test_the_chain_rule_knows_no_groups(self):
    plan = plan_lib.Plan("speculative", 3)
    for got, want in zip(
      _drawn(1, plan._replace(groups=True), 14, _T, _V)[0],
      _drawn(1, plan, 14, _T, _V)[0],
    ):
      np.testing.assert_array_equal(got, want)


@functools.cache
def _run(groups):
  """(config, network, mesh, params) of a model trained with these groups."""
  model = config.Model(sentinels=2, T=6, D=8, L=2, N=2)
  options = config.Config(
    model=model,
    orders=config.Orders(groups=groups, group_width=2),
    compute=config.Compute(dtype="float32", attention="xla"),
  )
  mesh = meshes.make_mesh(config.Mesh(data=1))
  made = network_lib.Network(options, mesh, _ABC)
  return options, made, mesh, sharding.put(mesh, tiny.sharp(made))


@functools.cache
def _scorer():
  return score.Scorer(*_run("random")[:2])


def _scores(texts, given=(), **options):
  base, _, mesh, params = _run("random")
  parsed = [
    (text, prompts.parse_marked(text, _ABC, "_", "[]")) for text in texts
  ]
  changed = base.replace("score", config.Score(**options))
  with jax.set_mesh(mesh):
    return _scorer().score(params, parsed, changed, given or None)


class ExperimentTest(absltest.TestCase):
  """configs/any_subset.py is sampled and scored as it is trained."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(helpers.quick_compilation())

  def test_its_law_is_that_of_its_groups(self):
    experiment = str(helpers.ROOT / "configs" / "any_subset.py:tiny")
    changes = {"model.T": 6, "model.D": 8, "model.L": 1, "sample.count": 6}
    changes |= {"orders.groups": "fixed", "orders.group_width": 4}
    base = helpers.config_of(
      helpers.arguments("x", changes, experiment=experiment)
    )
    mesh = meshes.make_mesh(config.Mesh(data=1))
    made = network_lib.Network(base, mesh, _ABC)
    params = sharding.put(mesh, tiny.sharp(made))
    with jax.set_mesh(mesh):
      texts = generate.Sampler(base, made).sample(params)
      order = base.replace("score.order", "given")
      scores = score.Scorer(order, made).score(
        params,
        [(t.text, prompts.parse_marked(t.text, _ABC, "", "")) for t in texts],
        given=[text.order for text in texts],
      )
      nll = jax.jit(
        lambda *args: objective.order_nll(
          made.bind(params),
          made.layout,
          *args,
          group_start=orders.draw_groups(jax.random.key(0), 6, 6, base.orders),
        )
      )
      nats = np.asarray(
        nll(
          np.array([text.tokens for text in texts]),
          np.array([text.order for text in texts]),
        )
      ).sum(axis=1)
    for text, scored, want in zip(texts, scores, nats):
      self.assertAlmostEqual(text.log_p, -want, delta=1e-4)
      self.assertAlmostEqual(scored.log_p, -want, delta=1e-4)

  def test_widths_are_those_of_training(self):
    groups = config.Orders(groups="random", group_width=5)
    sample = config.Sample(method="parallel", width=0)
    self.assertEqual(plan_lib.Plan.of(sample, groups).width, 5)
    self.assertEqual(plan_lib.Plan.of(sample, config.Orders()).width, 1)
    self.assertEqual(plan_lib.Plan.of(config.Sample(width=3), groups).width, 3)

  def test_the_chain_rule_is_said(self):
    """A model of groups hardly knows it."""
    workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    base = config.Config(orders=config.Orders(groups="random"))
    grouped = base.replace("sample.method", "parallel")
    grouped = grouped.replace("score.width", 0)
    for made, said in ((base, 1), (grouped, 0), (config.Config(), 0)):
      for call in (
        lambda: sample_lib.sample(made, workdir, "a_"),  # noqa: B023
        lambda: score.score(made, workdir, "ab"),  # noqa: B023
      ):
        with (
          self.assertLogs(level="INFO") as logs,
          self.assertRaises(checkpoint.CheckpointError),
        ):
          logging.info("start")
          call()
        lines = [x for x in logs.output if "trained with groups; --con" in x]
        self.assertLen(lines, said)

  def test_the_width_of_known_tokens_has_an_effect(self):
    """Also where the other tokens come in steps."""
    for groups, has_effect in (("random", True), ("none", False)):
      made = config.Config(
        orders=config.Orders(groups=groups),
        sample=config.Sample(method="parallel", steps=3),
      )
      effects = {
        name: holds for name, holds, _ in options.effects("sample", made)
      }
      self.assertEqual(effects["width"], has_effect)


class ScoreTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(helpers.quick_compilation())

  def test_parallel_generation_says_the_same(self):
    self.check_generation(2, "_b__c", False)

  @pytest.mark.slow
  def test_parallel_generation_of_whole_texts_says_the_same(self):
    self.check_generation(3, "_____", True)

  def check_generation(self, width, pattern, whole):
    """Texts of 5 of 6 tokens; for a model without groups it does not."""
    prompt = prompts.Prompt(np.zeros(5, np.int32), np.zeros(5, bool))
    if not whole:
      prompt = prompts.parse_prompt(pattern, _ABC, "_")
    away = {}
    for groups in ("random", "none"):
      base, made, mesh, params = _run(groups)
      sample = config.Sample(count=6, method="parallel", width=width)
      with jax.set_mesh(mesh):
        sampler = generate.Sampler(base.replace("sample", sample), made)
        (texts,) = sampler.fill(params, [prompt])
      scored = _scores(
        [
          "".join(f"[{x}]" if y == "_" else x for x, y in zip(t.text, pattern))
          for t in texts
        ],
        [text.order for text in texts],
        order="given",
        width=width,
      )
      away[groups] = [abs(a.log_p - b.log_p) for a, b in zip(texts, scored)]
    self.assertLess(max(away["random"]), 1e-4)
    self.assertGreater(max(away["none"]), 1e-3)

  def test_fillings_of_a_part_sum_to_one(self):
    """Also averaged over orders; an unknown token is in no group."""
    texts = [
      "_[{}]ab[{}{}]".format(*xyz) for xyz in itertools.product("abc", repeat=3)
    ]
    for width in (2, 4):
      scores = _scores(texts, order="uniform", orders=3, width=width)
      p = np.exp([each.log_p for each in scores])
      self.assertAlmostEqual(p.sum(), 1.0, delta=1e-5)
    one, two = (_scores(texts, width=width) for width in (1, 2))
    self.assertGreater(
      max(abs(a.log_p - b.log_p) for a, b in zip(one, two)), 1e-3
    )
    # The tokens of a group are independent of each other.
    (wide,) = _scores(["[ab]__"], width=2)
    (swapped,) = _scores(["[ab]__"], [[2, 1, 3, 4]], order="given", width=2)
    self.assertAlmostEqual(wide.log_p, swapped.log_p, delta=1e-5)


if __name__ == "__main__":
  absltest.main()
