"""The answers of the study, and the statistics that they rest on."""

import math
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from studies import config

from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import (
  findings,
  statistics,
  tables,
)

WITH_LENGTH = (
  "equal flops: does decoupled_rope's deficit against two_stream grow with len"
)
WITH_WIDTH = "equal flops: does the deficit against two_stream grow with order"


class AnswersTest(absltest.TestCase):
  def row(self, T, difference, error, seeds=2, orders="uniform"):
    return {
      "mechanism": "decoupled_rope",
      "T": T,
      "orders": orders,
      "size": "8x1x1",
      "budget": "flops",
      "reference": "two_stream",
      "seeds": seeds,
      "difference_bits": difference,
      "error": error,
      "degrees": seeds - 1,
      "error_of": "seeds",
    }

  def deficit(self, rows):
    return self.answer(rows, "equal flops: does decoupled_rope need")

  def answer(self, rows, part, areas=(), specialisation=()):
    found = findings.all_of(rows, areas, specialisation, "two_stream", "8x1x1")
    (one,) = [a for a in found if part in a.question]
    return one.answer

  def test_growth_with_length(self):
    for last, wanted in ((0.2, "yes"), (-0.2, "no"), (0.05, "unclear")):
      rows = [self.row(1024, last, 0.01), self.row(128, 0.0, 0.01)]
      self.assertEqual(self.answer(rows, WITH_LENGTH), wanted)
    self.assertEqual(self.answer(rows[:1], WITH_LENGTH), "not measured")

  def test_growth_with_the_width_of_blocks(self):
    """Uniform orders are the widest block; narrower first, whatever T."""
    rows = [
      self.row(64, 0.2, 0.01),
      self.row(64, 0.0, 0.01, orders="block16"),
      self.row(64, 0.3, 0.01, orders="block1", seeds=1),
      self.row(16, -9.0, 0.01),
    ]
    widths = [width for width, _ in tables.by_width(rows[:3])]
    self.assertEqual(widths, [1, 16, 64])
    self.assertEqual(self.answer(rows, WITH_WIDTH), "yes")
    self.assertEqual(self.answer(rows[:1], WITH_WIDTH), "not measured")

  def test_what_growth_leaves_out_is_said(self):
    rows = [self.row(16, 0.0, 0.001, seeds=1)]
    rows += [self.row(T, T / 1000, 0.001, seeds=3) for T in (128, 512)]
    found = findings.all_of(rows, (), (), "two_stream", "8x1x1")
    (one,) = [a for a in found if WITH_LENGTH in a.question]
    self.assertStartsWith(
      one.numbers, "from T = 128 to 512, of those with several seeds: +0.3840"
    )
    self.assertEqual(one.answer, "yes")

  def test_growth_is_asked_about_at_equal_steps_too(self):
    rows = [
      self.row(T, T / 1000, 0.001, seeds=3) | {"budget": "steps"}
      for T in (128, 512)
    ]
    steps = WITH_LENGTH.replace("flops", "steps")
    self.assertEqual(self.answer(rows, steps), "yes")
    self.assertEqual(self.answer(rows, WITH_LENGTH), "not measured")

  def test_another_size_is_another_question(self):
    rows = [self.row(128, 0.2, 0.01, seeds=3)]
    rows.append(self.row(1024, -0.2, 0.01, seeds=3) | {"size": "16x1x1"})
    self.assertEqual(self.deficit(rows), "yes")

  def test_seeds_that_part_widely_are_named(self):
    arm = {
      "mechanism": "decoupled_rope",
      "T": 64,
      "orders": "uniform",
      "size": "8x1x1",
      "budget": "steps",
    }
    rows = [arm | {"error_over_seeds": error} for error in (0.01, "", 0.0766)]
    self.assertEqual(
      findings.seeds_apart(rows),
      ["`decoupled_rope` 8x1x1 at T = 64, uniform orders, equal steps: 0.077"],
    )

  def test_one_seed_cannot_tell(self):
    rows = [self.row(T, T / 1000, 0.001, seeds=1) for T in (128, 1024)]
    one_seed = "unclear (one seed)"
    self.assertEqual(self.answer(rows, WITH_LENGTH), one_seed)
    self.assertEqual(self.deficit(rows), one_seed)
    rows += [self.row(T, 0.1, 0.005) for T in (256, 512)]
    self.assertEqual(self.answer(rows, WITH_LENGTH), "unclear")
    self.assertEqual(self.deficit(rows), "yes")  # Of two lengths.

  def test_a_deficit_at_some_lengths_only_is_yes_and_no(self):
    rows = [self.row(1024, 0.2, 0.01), self.row(128, -0.2, 0.01)]
    self.assertEqual(self.deficit(rows), "yes and no")
    self.assertEqual(self.deficit(rows[:1]), "yes")
    rows.append(self.row(256, 0.1, 0.1))
    self.assertEqual(self.deficit(rows), "unclear")

  def test_equal_runs_are_asked_about_once(self):
    row = self.row(128, 0.2, 0.01, seeds=3)
    rows = [row | {"budget": budget} for budget in ("steps", "parameters")]
    rows.append(row | {"T": 256, "budget": "steps"})  # Has no other budget.
    found = findings.all_of(rows, (), (), "two_stream", "8x1x1")
    asked = [a.question for a in found if "more bits" in a.question]
    self.assertLen([q for q in asked if "equal steps" in q], 1)
    self.assertEmpty([q for q in asked if "parameters" in q])

  def test_content_is_a_rival_explanation(self):
    row = self.row(128, 0.2, 0.01, seeds=3) | {
      "mechanism": "decoupled_rope_content",
      "budget": "steps",
    }
    rows = [row, row | {"reference": "decoupled_rope", "difference_bits": 0.0}]
    self.assertEqual(self.answer(rows, "know their content"), "yes")

  def test_fewer_seeds_need_a_larger_effect(self):
    """5 standard errors are few of 2 seeds; 3 suffice of 8."""
    for seeds, error, wanted in (
      (2, 0.04, "unclear"),
      (3, 0.04, "yes"),
      (3, 0.05, "unclear"),
      (8, 0.05, "yes"),
      (30, 0.05, "yes"),
    ):
      rows = [self.row(128, 0.2, error, seeds)]
      self.assertEqual(self.deficit(rows), wanted)

  def test_a_false_alarm_is_rare_whatever_the_seeds(self):
    """Where nothing is there, an answer is yes or no in 5% of the studies."""
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 5):
      answers = [
        findings._decide(statistics.over_seeds(x))
        for x in generator.normal(size=(2000, seeds))
      ]
      alarms = np.mean([answer != findings.UNCLEAR for answer in answers])
      self.assertAlmostEqual(alarms, 0.05, delta=0.02)

  def area(self, mechanism, value, seeds, T=128):
    return {
      "mechanism": mechanism,
      "T": T,
      "budget": "steps",
      "orders": "uniform",
      "size": "8x1x1",
      "seeds": seeds,
      "area_from_4": value,
      "area_from_4_error": 0.02 if seeds == 2 else 0.001,
    }

  def test_other_lengths_are_asked_about_where_they_have_seeds(self):
    areas = [
      self.area(name, value, 1 if T == 256 else 3, T)
      for T in (128, 256, 512)
      for name, value in (("decoupled_rope", 0.5), ("two_stream", 0.6))
    ]
    found = findings.all_of([], areas, (), "two_stream", "8x1x1")
    asked = [a for a in found if "steps: is " in a.question]
    self.assertEqual(
      [(a.question[:7], a.answer) for a in asked],
      [
        ("T = 128", "not measured"),  # Of mdlm.
        ("T = 128", "yes"),
        ("T = 512", "yes"),
      ],
    )

  def test_areas(self):
    for two_stream, mdlm, seeds, ahead, level in (
      (0.6, 0.6, 3, "yes", "no"),
      (0.4, 0.4, 3, "no", "no"),
      (0.51, 0.51, 3, findings.LEVEL, "yes"),  # By less than matters.
      (0.52, 0.52, 3, "yes", "no"),
      (0.518, 0.518, 3, "unclear", "unclear"),
      (0.55, 0.5, 2, "unclear", "unclear"),  # Wide errors: level is not said.
      (0.9, 0.9, 2, "yes", "no"),
      (0.9, 0.5, 1, "unclear (one seed)", "unclear (one seed)"),
    ):
      rows = [
        self.area("decoupled_rope", 0.5, seeds),
        self.area("two_stream", two_stream, seeds),
        self.area("mdlm", mdlm, seeds),
      ]
      self.assertEqual(
        self.answer([], "T = 128, equal steps: is two_stream", rows), ahead
      )
      self.assertEqual(
        self.answer([], "T = 128, equal steps: is decoupled_r", rows), level
      )

  def test_streams(self):
    def locality(mechanism, stream, index, value, seeds):
      return {
        "mechanism": mechanism,
        "T": 16,
        "budget": "steps",
        "orders": "uniform",
        "size": "8x1x1",
        "stream": stream,
        "index": index,
        "locality": value,
        "error": 0.01 if seeds > 1 else "",
        "seeds": seeds,
        "mass_own": 0.04,
      }

    for own, seeds, between, more in (
      (0.5, 3, "yes", "yes"),
      (0.43, 3, "unclear", "yes"),  # Inside, but so near to one of them.
      (0.1, 3, "no", "yes"),
      (0.5, 2, "yes", "yes"),
      (0.5, 1, "unclear (one seed)", "unclear (one seed)"),
    ):
      rows = [
        row
        for index in ("semantic", "structural")
        for row in (
          locality("two_stream", "content", index, 0.4, seeds),
          locality("two_stream", "query", index, 0.6, seeds),
          locality("two_stream", "query - content", index, 0.2, seeds),
          locality("decoupled_rope", "only", index, own, seeds),
        )
      ]
      self.assertEqual(self.answer([], "between", (), rows), between)
      self.assertEqual(self.answer([], "more semantic", (), rows), more)
    # Outside of one index is not between, whatever the other one says; where
    # the streams do not part nothing is between them.
    rows[-1]["locality"] = rows[3]["locality"] = 0.5
    for row in rows:
      row["seeds"], row["error"] = 3, 0.001
    self.assertEqual(self.answer([], "between", (), rows), "yes")
    rows[3]["locality"] = 0.7
    self.assertEqual(self.answer([], "between", (), rows), "no")
    rows[4]["locality"] = rows[5]["locality"] = 0.001
    rows[7]["locality"] = 0.003
    rows[3]["locality"] = 0.5
    self.assertEqual(self.answer([], "between", (), rows), "yes")
    self.assertEqual(
      self.answer([], "do content rows look", (), rows), findings.LEVEL
    )
    # Of lengths of one seed nothing is asked, unless there are no others.
    more = [row | {"T": 512, "seeds": 1} for row in rows]
    for asked, found in ((False, rows + more), (True, more)):
      all_of = findings.all_of([], (), found, "two_stream", "8x1x1")
      self.assertEqual(any("512" in a.question for a in all_of), asked)


class PairsTest(parameterized.TestCase):
  """Which cell of the reference an arm is held against."""

  def difference(self, sweep, done):
    """Of decoupled_rope; `done`: (mechanism, rate) -> bits a character.

    A run of 4 bits has learned nothing.
    """
    study = config(sweep)
    cells = cells_lib.expand(study)

    def bits_of(cell):
      return done.get((cell.mechanism, cell.rate))

    def windows(_, cell):
      bits = bits_of(cell)
      return None if bits is None else np.full(48, bits * 16 * math.log(2))

    results = mock.Mock(is_untrained=lambda cell: bits_of(cell) == 4)
    with mock.patch.object(tables, "_windows", windows):
      (row,) = tables.differences_table(cells, results, study)
    return row["difference_bits"]

  @parameterized.named_parameters(
    ("the_same", {0.1: 2, 0.2: 3}, 0.5),
    ("the_only_one", {0.2: 2}, 0.5),
    ("the_same_which_learned_nothing", {0.1: 4, 0.2: 3}, ""),
    ("several_others", {0.2: 2, 0.3: 3}, ""),
  )
  def test_rates_of_the_reference(self, reference, wanted):
    rates = ",".join(map(str, reference))
    found = self.difference(
      f"T=16 rate={rates} mechanism=two_stream; "
      "T=16 rate=0.1 mechanism=decoupled_rope",
      {("two_stream", str(rate)): bits for rate, bits in reference.items()}
      | {("decoupled_rope", "0.1"): 2.5},
    )
    self.assertAlmostEqual(found, wanted)


class StatisticsTest(absltest.TestCase):
  def test_over_seeds(self):
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    self.assertAlmostEqual(found.value, 2.0)
    self.assertAlmostEqual(found.error, 1 / 3**0.5)
    self.assertAlmostEqual(found.half, 4.303 / 3**0.5, places=3)
    self.assertTrue(np.isnan(statistics.over_seeds([1.0]).half))

  def test_windows_that_are_alike_tell_less(self):
    generator = np.random.default_rng(0)
    books = np.repeat(generator.normal(size=24), 50)
    alike = statistics.over_windows(books)
    apart = statistics.over_windows(generator.permutation(books))
    self.assertAlmostEqual(alike.error, books[::50].std(ddof=1) / 24**0.5)
    self.assertLess(apart.error, alike.error / 3)
    self.assertEqual(alike.seeds, 1)

  def test_what_windows_leave_open_no_seed_closes(self):
    generator = np.random.default_rng(0)
    text = generator.normal(size=240)
    same = statistics.over_both([text, text, text])
    one = statistics.over_both([text])
    self.assertAlmostEqual(same.error, one.error)
    self.assertEqual((same.seeds, one.seeds), (3, 1))
    # Seeds that differ have the few degrees of freedom of seeds.
    apart = statistics.over_both([text, text + 5, text - 5])
    self.assertEqual(apart.degrees, 2)
    # So have seeds that lie together, as two may by luck.
    self.assertEqual(statistics.over_both([text, text + 1e-9]).degrees, 1)
    self.assertAlmostEqual(apart.value, same.value)

  def test_effects(self):
    for value, error, least, wanted in (
      (0.1, 0.01, 0.02, 1),
      (-0.1, 0.01, 0.02, -1),
      (0.1, 0.1, 0.02, None),
      (0.01, 0.001, 0.02, 0),
      (0.01, 0.001, 0.0, 1),
      (0.0, 0.0, 0.0, 0),
      (0.1, float("nan"), 0.0, None),
    ):
      found = statistics.Estimate(value, error, 2, 3)
      self.assertEqual(statistics.effect(found, least), wanted)


if __name__ == "__main__":
  absltest.main()
