"""Estimators: what is averaged, what is not counted, what changes nothing."""

import dataclasses
import functools
import math
import re
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax import objective, orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config
from aoarm_jax.data import pipeline
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.evaluation import averages, evaluate
from aoarm_jax.runs import patience

_T, _V, _COUNT, _K = 7, 5, 8, 3


def _config(**order_options):
  options = dict(family="block", block_width=3, given=tuple(range(1, _T + 1)))
  return config.Config(
    model=config.Model(T=_T, D=12, L=1, N=3),
    orders=config.Orders(**options | order_options),
    eval=config.Eval(ensemble_orders=_K, seed=3),
    compute=config.Compute(dtype="float32", attention="xla"),
  )


@functools.cache
def _pieces():
  """(mesh, network, params on the mesh)."""
  mesh = meshes.make_mesh(config.Mesh(data=1))
  network = tiny.make(T=_T, V=_V, L=1, mesh=mesh)
  return mesh, network, sharding.put(mesh, tiny.sharp(network))


def _evaluator(**order_options):
  _, network, _ = _pieces()
  return evaluate.Evaluator(_config(**order_options), network)


_shared = functools.cache(_evaluator)


def _text():
  return tiny.tokens(1, _COUNT * _T, _V)[0].astype(np.uint8)


def _batches(batch_size):
  return pipeline.eval_batches(_text(), T=_T, batch_size=batch_size, seed=0)


def _key():
  return jax.random.fold_in(jax.random.key(3), purposes.EVALUATION)


def _estimate(estimator, batches, evaluator=None, step=2000, **kwargs):
  mesh, _, params = _pieces()
  evaluator = evaluator or _shared()
  with jax.set_mesh(mesh):
    return evaluator.estimate(params, batches, estimator, step, **kwargs)


@functools.cache
def _nll():
  """Jitted (params, tokens, order) -> [B, T] nats, without an Evaluator."""
  _, network, _ = _pieces()
  return tiny.quick_jit(
    lambda params, tokens, order: objective.order_nll(
      network.bind(params), network.layout, tokens, order
    )
  )


def _by_hand(batches, family, key):
  """float64 [sequences, T] nats of the real rows, in one batch."""
  tokens = np.concatenate([tokens[real] for tokens, real in batches])
  options = _config(family=family).orders
  # Row i of the split has the i-th order.
  order = orders.draw(key, len(tokens), _T, options, step=2000)
  _, _, params = _pieces()
  return np.asarray(_nll()(params, tokens.astype(np.int32), order), np.float64)


class UnitTest(absltest.TestCase):
  def test_bits_per_byte_and_per_character(self):
    found = averages.mean("elbo", 4, np.float32([8.0, 8.0]), None)
    byte = dataclasses.replace(
      found,
      unit="byte",
      characters=4,
      by_distance=(averages.Bin(1, 1, 2.0, 8),),
    )
    bits = 2 / math.log(2)
    record = byte.report()
    self.assertAlmostEqual(record["bits_per_byte"], bits)
    self.assertAlmostEqual(record["bits_per_char"], 2 * bits)
    self.assertAlmostEqual(record["by_distance"][0]["bits_per_byte"], bits)
    self.assertRegex(
      str(byte),
      r"2.8854 bits/byte .* = 5.7708 bits/char .* 8 bytes, 4 characters\)",
    )
    self.assertEqual((record["tokens"], record["characters"]), (8, 4))
    record = found.record()
    self.assertEqual((record["tokens"], record["characters"]), (8, 8))
    self.assertAlmostEqual(record["bits_per_char"], bits)
    self.assertNotIn("bits_per_byte", record)
    self.assertRegex(str(found), r"2.8854 bits/char .*, 8 characters\)")
    unknown = dataclasses.replace(byte, characters=0).record()
    self.assertNotIn("bits_per_char", unknown)
    self.assertIsNone(unknown["characters"])

  def test_bits_per_token(self):
    found = averages.mean("elbo", 4, np.float32([8.0, 8.0]), None)
    found = dataclasses.replace(found, unit="token", bytes=32, characters=16)
    record = found.record()
    bits = 2 / math.log(2)
    for unit, size in (("token", 1), ("char", 2), ("byte", 4)):
      self.assertAlmostEqual(record[f"bits_per_{unit}"], bits / size)
    self.assertRegex(
      str(found),
      r"2.8854 bits/token .* = 0.7213 bits/byte .* = 1.4427 bits/char .* 8 "
      r"tokens, 32 bytes, 16 characters\)",
    )

  def test_the_error_of_bits_a_byte_follows_the_bytes(self):
    """Long sequences have more nats, which is no error."""
    sizes = np.array([100, 200, 300])
    self.assertEqual(averages.error_of_ratio(2.0 * sizes, sizes), 0)
    nats = np.random.default_rng(0).normal(3, 1, 4000)
    want = nats.std(ddof=1) / math.sqrt(4000) / 5
    got = averages.error_of_ratio(nats, np.full(4000, 5))
    self.assertAlmostEqual(got, want, places=12)


class EstimateTest(parameterized.TestCase):
  def test_the_error_of_one_sequence_is_unknown(self):
    one = averages.mean("elbo", 16, np.float32([2.0]), None)
    two = averages.mean("elbo", 16, np.float32([2.0, 3.0]), None)
    self.assertIsNone(one.record()["standard_error_bits"])
    self.assertIn("± unknown  (1 sequence, 16 characters)", str(one))
    self.assertGreater(two.record()["standard_error_bits"], 0)
    self.assertEqual((one.record()["tokens"], two.tokens), (16, 32))

  @parameterized.parameters(
    ("any_order", "uniform"),
    ("training_order", "block"),
    ("left_to_right", "left_to_right"),
  )
  def test_mean_error_and_curve(self, estimator, family):
    """Against numpy on the same orders."""
    batches = _batches(3)
    nats = _by_hand(batches, family, _key())
    estimate = _estimate(estimator, batches)
    per_token = nats.sum(axis=1) / _T
    error = per_token.std(ddof=1) / math.sqrt(_COUNT)
    self.assertEqual((estimate.estimator, estimate.sequences), (estimator, 8))
    self.assertAlmostEqual(
      estimate.nats_per_token, per_token.mean(), delta=1e-5
    )
    self.assertAlmostEqual(estimate.standard_error_nats, error, delta=1e-5)
    np.testing.assert_allclose(
      estimate.slot_curve_nats, nats.mean(axis=0), atol=1e-5
    )
    # In bits, once.
    bits = per_token.mean() / math.log(2)
    self.assertAlmostEqual(estimate.bits_per_token, bits, delta=1e-5)
    record = estimate.record()
    self.assertAlmostEqual(record["bits_per_char"], bits, delta=1e-5)
    self.assertAlmostEqual(
      np.mean(record["slot_curve_bits"]), record["bits_per_char"], delta=1e-5
    )
    self.assertAlmostEqual(
      record["standard_error_bits"], error / math.log(2), delta=1e-5
    )
    self.assertIn(f"{bits:.4f} bits/char", str(estimate))

  def test_long_ones_say_how_long(self):
    with (
      mock.patch.object(patience, "SECONDS_BETWEEN_LINES", 0.0),
      self.assertLogs("absl", level="INFO") as logs,
    ):
      _estimate("any_order", _batches(3))
    # On a slow machine it also says how long it has compiled.
    first, second = (line for line in logs.output if "batches" in line)
    # The first batch compiles: it says nothing about the others.
    self.assertRegex(first, "1 of 3 batches$")
    self.assertRegex(second, r"2 of 3 batches  ETA \d+s$")

  def test_the_time_left_does_not_count_compiling(self):
    clock = iter([0.0, *(300.0 + i for i in range(99))])
    batches = mock.MagicMock()
    batches.__len__.return_value = 5
    result = (np.zeros(1), {}, np.ones(1, bool), 0)
    with (
      mock.patch.object(patience.time, "monotonic", side_effect=clock),
      mock.patch.object(evaluate, "sharding"),
      mock.patch.object(patience, "SECONDS_BETWEEN_LINES", 0.0),
      self.assertLogs(level="INFO") as logs,
    ):
      evaluate.over_batches(lambda *_: result, batches, mock.Mock())
    for line in logs.output[1:]:
      (seconds,) = re.findall(r"ETA (\d+)s", line)
      self.assertLess(int(seconds), 20)

  def test_ensembled(self):
    """-log of the mean probability over K orders, which has no curve."""
    key, batches = _key(), _batches(3)
    each = np.array(
      [
        _by_hand(batches, "uniform", jax.random.fold_in(key, k)).sum(axis=1)
        for k in range(_K)
      ]
    )
    estimate = _estimate("ensembled", batches)
    nats = -np.log(np.exp(-each).mean(axis=0))
    self.assertAlmostEqual(
      estimate.nats_per_token, nats.mean() / _T, delta=1e-5
    )
    self.assertAlmostEqual(
      estimate.standard_error_nats,
      nats.std(ddof=1) / math.sqrt(_COUNT) / _T,
      delta=1e-5,
    )
    self.assertEqual(estimate.slot_curve_nats, ())
    self.assertLess(estimate.nats_per_token, each.mean() / _T)

  @pytest.mark.thorough
  def test_by_distance_and_recency(self):
    """Every real token in one bin; against numpy."""
    batches = _batches(3)
    nats = _by_hand(batches, "uniform", _key())
    order = orders.draw(_key(), _COUNT, _T, config.Orders())
    estimate = _estimate("any_order", batches)
    near = orders.nearest(order)
    for bins, number in (
      (estimate.by_distance, near.distance),
      (estimate.by_recency, near.recency),
    ):
      self.assertEqual(sum(each.tokens for each in bins), _COUNT * _T)
      self.assertEqual([each.low for each in bins][:3], [0, 1, 2])
      for each in bins:
        inside = (number >= each.low) & (number <= each.high)
        self.assertEqual(each.tokens, inside.sum())
        self.assertAlmostEqual(
          each.nats_per_token, nats[inside].mean(), delta=1e-5
        )

  @pytest.mark.thorough
  def test_context_ensembled(self):
    """Every conditional is a mean over permutations of its context."""
    network = tiny.make(
      T=_T, V=_V, L=2
    )  # With one layer all contexts are sets.
    params = tiny.sharp(network)
    tokens, order = tiny.tokens(3, _T, _V), tiny.orders_of("two_stream", 3, _T)
    keys = objective.row_keys(jax.random.key(0), 3)
    many = 300
    nats = jax.jit(
      lambda params: objective.context_ensembled_nll(
        network.bind(params),
        network.layout,
        keys,
        tokens,
        order,
        contexts=many,
      )
    )(params)

    in_one_order = tiny.quick_jit(
      lambda params, order: objective.order_nll(
        network.bind(params), network.layout, tokens, order
      )
    )

    def in_order(order):
      return np.asarray(in_one_order(params, order), np.float64)

    plain = in_order(order)
    # One context only: nothing known, or one token.
    np.testing.assert_allclose(nats[:, :2], plain[:, :2], atol=1e-5)
    swapped = order[:, [1, 0, *range(2, _T)]]
    both = np.stack([plain[:, 2], in_order(swapped)[:, 2]])
    low, high = both.min(axis=0), both.max(axis=0)
    self.assertGreater((high - low).min(), 1e-3)
    want = -np.log(np.exp(-both).mean(axis=0))
    error = np.exp(-low) - np.exp(-high)  # Of one draw; 300 are averaged.
    np.testing.assert_array_less(
      np.abs(np.exp(-nats[:, 2]) - np.exp(-want)), 4 * error / many**0.5
    )

  def test_training_order_has_the_groups_of_training(self):
    options = dict(groups="fixed", group_width=3)
    batches = _batches(3)
    apart = _estimate("training_order", batches)
    together = _estimate("training_order", batches, _evaluator(**options))
    self.assertNotEqual(apart.nats_per_token, together.nats_per_token)
    # Rank 0 starts a group either way.
    self.assertAlmostEqual(
      apart.slot_curve_nats[0], together.slot_curve_nats[0], delta=1e-5
    )

  @parameterized.parameters("any_order", "ensembled", "context_ensembled")
  @pytest.mark.thorough
  def test_batch_size_changes_nothing(self, estimator):
    """Of 8 sequences: 3 + 3 + 2, or 5 + 3."""
    want, got = (_estimate(estimator, _batches(size)) for size in (3, 5))
    self.assertEqual(got.sequences, want.sequences)
    self.assertAlmostEqual(got.nats_per_token, want.nats_per_token, delta=1e-6)
    self.assertAlmostEqual(
      got.standard_error_nats, want.standard_error_nats, delta=1e-6
    )
    np.testing.assert_allclose(
      got.slot_curve_nats, want.slot_curve_nats, atol=1e-5
    )

  @parameterized.parameters("any_order", "ensembled")
  def test_padding_counts_nowhere(self, estimator):
    """Whatever stands in the rows that are not real."""
    *whole, (tokens, real) = list(_batches(3))
    self.assertEqual(real.tolist(), [True, True, False])
    other = tokens.copy()
    other[2] = (other[2] + 1) % _V
    want = _estimate(estimator, [*whole, (tokens, real)])
    self.assertEqual(want, _estimate(estimator, [*whole, (other, real)]))
    # A real row does count.
    self.assertNotEqual(
      want, _estimate(estimator, [*whole, (other, np.ones(3, bool))])
    )

  def test_left_to_right_is_the_given_order_from_left_to_right(self):
    given = _estimate("given_order", _batches(3))
    plain = _estimate("left_to_right", _batches(3))
    self.assertEqual(given.nats_per_token, plain.nats_per_token)
    self.assertEqual(given.slot_curve_nats, plain.slot_curve_nats)
    other = _estimate(
      "given_order", _batches(3), _evaluator(given=(4, 1, 7, 2, 6, 3, 5))
    )
    self.assertGreater(abs(other.nats_per_token - plain.nats_per_token), 1e-3)

  @pytest.mark.thorough
  def test_a_curriculum_is_that_of_the_step(self):
    """Step 0 is left to right; a late step is uniform, like any_order."""
    evaluator = _evaluator(family="curriculum", curriculum_steps=100)
    batches = _batches(3)
    first, last = (
      _estimate("training_order", batches, evaluator, step=step)
      for step in (0, 100)
    )
    for got, name in ((first, "left_to_right"), (last, "any_order")):
      want = _estimate(name, batches)
      self.assertAlmostEqual(
        got.nats_per_token, want.nats_per_token, delta=1e-6
      )
    self.assertGreater(abs(first.nats_per_token - last.nats_per_token), 1e-3)

  def test_a_stop_is_asked_for_before_every_batch(self):
    asked = []

    def is_stopped():
      asked.append(True)
      return len(asked) > 2

    got = _estimate("left_to_right", _batches(3), is_stopped=is_stopped)
    self.assertIsNone(got)
    self.assertLen(asked, 3)

  def test_the_same_twice(self):
    """By the same evaluator; and a sequence's orders are its own."""
    self.assertEqual(
      _estimate("any_order", _batches(3)), _estimate("any_order", _batches(3))
    )
    tokens = np.tile(_batches(3)[0][0][:1], (3, 1))
    real = np.ones(3, bool)
    same = _estimate("any_order", [(tokens, real)])
    self.assertGreater(same.standard_error_nats, 1e-3)
    fixed = _estimate("left_to_right", [(tokens, real)])
    self.assertLess(fixed.standard_error_nats, 1e-6)


@pytest.mark.thorough
class ElboTest(parameterized.TestCase):
  def test_two_estimators_of_one_quantity(self):
    """Within joint standard errors; a wrong schedule is not."""
    T, V = 5, 3
    mesh = _pieces()[0]
    network = tiny.make("mdlm", T=T, V=V, L=1, mesh=mesh)
    params = sharding.put(mesh, tiny.sharp(network))

    def estimate(estimator, least_time=1e-3):
      made = config.Config(
        model=config.Model(mechanism="mdlm", T=T, D=12, L=1, N=3),
        train=config.Train(least_time=least_time),
        eval=config.Eval(times=8),
      )
      evaluator = evaluate.Evaluator(made, network)
      tokens = tiny.tokens(4000, T, V).astype(np.uint8)
      with jax.set_mesh(mesh):
        return evaluator.estimate(
          params, [(tokens, np.ones(4000, bool))], estimator, 0
        )

    elbo, chain, late = (
      estimate("elbo"),
      estimate("any_order"),
      estimate("elbo", 0.3),
    )
    joint = math.hypot(elbo.standard_error_nats, chain.standard_error_nats)
    # Both see the same sequences, so this is generous.
    self.assertLess(abs(elbo.nats_per_token - chain.nats_per_token), 3 * joint)
    self.assertGreater(
      abs(late.nats_per_token - chain.nats_per_token), 5 * joint
    )
    self.assertEqual((elbo.slot_curve_nats, elbo.by_distance), ((), ()))
    self.assertLen(chain.slot_curve_nats, T)


class WriteTest(absltest.TestCase):
  def test_every_file_is_tried(self):
    """The numbers are in the log already."""
    workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (workdir / "evaluations").write_text("no folder")
    corpus = mock.Mock()
    corpus.describe.return_value = corpus.hash.return_value = "text"
    corpus.split.return_value, corpus.tokenizer.V = np.arange(9) % _V, _V
    corpus.tokenizer.unit = "char"
    estimate = averages.Estimate("any_order", 1.0, 0.1, 3, 21, (1.0,) * 7)
    with self.assertLogs(level="INFO") as logs:
      evaluate._write(
        config.Config(), workdir, 3, corpus, _batches(3), [estimate]
      )
    (warning,) = logs.output
    self.assertIn("not written: ", warning)
    self.assertTrue((workdir / "slot_curve_valid.png").exists())


if __name__ == "__main__":
  absltest.main()
