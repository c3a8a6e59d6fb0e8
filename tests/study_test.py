"""The study: its sweep, and a tiny one from end to end, killed on the way."""

import csv
import dataclasses
import json
import os
import pathlib
import signal
import tempfile
import weakref
from concurrent import futures
from unittest import mock

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax import config as config_lib
from aoarm_jax import (
  decode,
  diffusion,
  matching,
  sampling,
  sharding,
  telemetry,
  train,
  train_state,
)
from aoarm_jax.data import tokenizers
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import (
  findings,
  measure,
  profiles,
  programs,
  statistics,
  sweep,
  tables,
)

# On the older Python alone, but for what profiles_test.py and coherence_test.py
# say of the measures.
pytestmark = pytest.mark.once

STUDY = str(helpers.ROOT / "configs" / "study_tradeoff.py")
V = 27


def config(sweep, **study):
  return config_lib.Config(study=config_lib.Study(sweep=sweep, **study))


class SweepTest(parameterized.TestCase):
  def test_order_is_line_by_line_and_the_last_key_fastest(self):
    cells = cells_lib.expand(
      config("seed=0,1 mechanism=two_stream,mdlm; mechanism=mdlm,ao_gpt T=128")
    )
    self.assertEqual(
      [(cell.seed, cell.mechanism) for cell in cells],
      [(0, "two_stream"), (0, "mdlm"), (1, "two_stream"), (1, "mdlm"),
       (0, "ao_gpt")],
    )  # fmt: skip

  def test_trials_come_before_what_needs_them_and_once(self):
    asked = cells_lib.expand(config("seed=0,1 rate=tuned"))
    cells = cells_lib.with_trials(asked, config(""))
    self.assertEqual(
      [c.rate for c in cells],
      ["0.001", "0.002", "0.004", "0.008", "tuned", "tuned"],
    )

  def test_arms_that_differ_by_more_than_the_mechanism_share_their_trials(self):
    """At the nearest of two lengths, and at the configuration's own size."""
    for line, T in (
      ("T=4096", 1024), ("T=256", 128), ("T=512", 1024),
      ("T=1024 orders=block16", 1024), ("T=128 size=32x2x2 seed=3", 128),
      ("T=128 budget=flops", 128),
    ):  # fmt: skip
      (cell,) = cells_lib.expand(config(f"rate=tuned {line}"))
      (plain,) = cells_lib.expand(config(f"rate=0.001 T={T} seed=0"))
      self.assertEqual(cells_lib.trials(cell, config(""))[0], plain)

  def test_an_ablation_has_the_rate_of_what_it_changes(self):
    names = ("decoupled_rope_content", "decoupled_rope", "ao_gpt")
    found = [
      cells_lib.trials(
        *cells_lib.expand(config(f"rate=tuned mechanism={name}")), config("")
      )[0].mechanism
      for name in names
    ]
    self.assertEqual(found, ["decoupled_rope", "decoupled_rope", "ao_gpt"])

  @parameterized.parameters(
    ("", "no cells"),
    ("mechanism=three_stream", "mechanism=three_stream cannot be"),
    ("mechanisms=mdlm", "'mechanisms=mdlm' is not key=values"),
    ("T=", "'T=' is not key=values"),
    ("T=1e3", "T=1e3 cannot be"),
    ("orders=blocks", "orders=blocks cannot be"),
    ("rate=fast", "rate=fast cannot be"),
  )
  def test_a_line_that_cannot_be(self, sweep, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      cells_lib.expand(config(sweep))

  def resolved(self, line, **study):
    study = config(line, **study)
    (cell,) = cells_lib.expand(study)
    return cell, cells_lib.resolve(cell, study, 1e-3, V)

  def test_equal_flops(self):
    cell, got = self.resolved("mechanism=decoupled_rope budget=flops steps=500")
    other = dataclasses.replace(cell, mechanism="two_stream")
    reference = cells_lib.resolve(other, config(""), 1e-3, V)
    self.assertEqual(reference.train.steps, 500)
    ratio = matching.training_flops(got, V) / matching.training_flops(
      reference, V
    )
    self.assertAlmostEqual(ratio, 1, delta=2e-3)
    self.assertGreater(got.train.steps, 800)

  def test_equal_steps_is_equal_text_at_any_length(self):
    for T in (128, 4096):
      _, got = self.resolved(f"T={T}")
      self.assertEqual(got.train.batch_size * T, 65536)

  def test_equal_parameters(self):
    _, got = self.resolved("mechanism=ao_gpt budget=parameters")
    _, plain = self.resolved("mechanism=ao_gpt")
    self.assertLess(got.model.F, plain.model.F)

  def test_an_arm_that_is_as_large_already_is_not_run_again(self):
    names = {
      cells_lib.folder_name(
        *self.resolved(f"mechanism=decoupled_rope budget={budget}")
      )
      for budget in ("steps", "parameters")
    }
    self.assertLen(names, 1)

  def test_a_folder_is_bound_to_all_that_decides_the_numbers(self):
    cell, got = self.resolved("mechanism=mdlm")
    name = cells_lib.folder_name(cell, got)
    for section, changes in (
      ("optimizer", {"b1": 0.5}),
      ("study", {"temperatures": 3}),
      ("eval", {"batches": 3}),
    ):
      part = dataclasses.replace(getattr(got, section), **changes)
      other = dataclasses.replace(got, **{section: part})
      self.assertNotEqual(cells_lib.folder_name(cell, other), name, section)
    moved = dataclasses.replace(
      got,
      data=dataclasses.replace(got.data, path="elsewhere"),
      study=dataclasses.replace(got.study, limit_seconds=3, cells="x"),
    )
    self.assertEqual(cells_lib.folder_name(cell, moved), name)

  def test_the_reference_has_one_folder_for_all_budgets(self):
    names = {
      cells_lib.folder_name(*self.resolved(f"budget={budget}"))
      for budget in cells_lib.BUDGETS
    }
    self.assertLen(names, 1)

  def test_a_block_as_wide_as_the_text_is_uniform(self):
    for orders, wanted in (("block15", "block15"), ("block16", "uniform")):
      cell, _ = self.resolved(f"T=16 orders={orders}")
      self.assertEqual(cell.orders, wanted)

  def test_a_curriculum_is_judged_by_uniform_orders(self):
    _, got = self.resolved("mechanism=ao_gpt orders=curriculum T=16")
    self.assertEqual(got.orders.family, "curriculum")
    self.assertEqual(got.sample.order, "uniform")
    self.assertEqual(got.eval.estimators, ("any_order",))
    cell, _ = self.resolved("mechanism=ao_gpt orders=curriculum T=16")
    trials = cells_lib.trials(
      dataclasses.replace(cell, rate="tuned"), config("")
    )
    self.assertEqual({trial.orders for trial in trials}, {"uniform"})
    order = profiles.orders_of(got, 0)  # At step 0 it would be sorted.
    self.assertGreater(np.mean(np.diff(order) < 0), 0.3)

  @parameterized.parameters("", "quick", "tiny")
  def test_sweeps_of_the_config_can_be(self, variant):
    got = helpers.config_of([f"--config={STUDY}:{variant}"])
    for cell in cells_lib.expand(got):
      if cell.budget == "steps":
        cells_lib.resolve(cell, got, 1e-3, V)


class AnswersTest(absltest.TestCase):
  def row(self, T, difference, error, seeds=2, orders="uniform"):
    return {
      "mechanism": "decoupled_rope", "T": T, "orders": orders, "size": "8x1x1",
      "budget": "flops", "reference": "two_stream", "seeds": seeds,
      "difference_bits": difference, "error": error, "degrees": seeds - 1,
      "error_of": "seeds",
    }  # fmt: skip

  def deficit(self, rows):
    return self.answer(rows, "equal flops: does decoupled_rope need")

  def answer(self, rows, part, areas=(), specialisation=()):
    found = findings.all_of(rows, areas, specialisation, "two_stream", "8x1x1")
    (one,) = [a for a in found if part in a.question]
    return one.answer

  def test_growth_with_length(self):
    for last, wanted in ((0.2, "yes"), (-0.2, "no"), (0.05, "unclear")):
      rows = [self.row(1024, last, 0.01), self.row(128, 0.0, 0.01)]
      self.assertEqual(self.answer(rows, "grow with length"), wanted)
    self.assertEqual(self.answer(rows[:1], "grow with length"), "not measured")

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
    self.assertEqual(self.answer(rows, "order divergence"), "yes")
    self.assertEqual(self.answer(rows[:1], "order divergence"), "not measured")

  def test_another_size_is_another_question(self):
    rows = [self.row(128, 0.2, 0.01, seeds=3)]
    rows.append(self.row(1024, -0.2, 0.01, seeds=3) | {"size": "16x1x1"})
    self.assertEqual(self.deficit(rows), "yes")

  def test_one_seed_cannot_tell(self):
    rows = [self.row(T, T / 1000, 0.001, seeds=1) for T in (128, 1024)]
    one_seed = "unclear (one seed)"
    self.assertEqual(self.answer(rows, "grow with length"), one_seed)
    self.assertEqual(self.deficit(rows), one_seed)
    rows += [self.row(T, 0.1, 0.005) for T in (256, 512)]
    self.assertEqual(self.answer(rows, "grow with length"), "unclear")
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
    found = findings.all_of(rows, (), (), "two_stream", "8x1x1")
    asked = [a.question for a in found if "more bits" in a.question]
    self.assertLen([q for q in asked if "equal steps" in q], 1)
    self.assertEmpty([q for q in asked if "parameters" in q])

  def test_content_is_a_rival_explanation(self):
    row = self.row(128, 0.2, 0.01, seeds=3) | {
      "mechanism": "decoupled_rope_content", "budget": "steps",
    }  # fmt: skip
    rows = [row, row | {"reference": "decoupled_rope", "difference_bits": 0.0}]
    self.assertEqual(self.answer(rows, "know their content"), "yes")

  def test_fewer_seeds_need_a_larger_effect(self):
    """5 standard errors are few of 2 seeds; 3 suffice of 8."""
    for seeds, error, wanted in (
      (2, 0.04, "unclear"), (3, 0.04, "yes"), (3, 0.05, "unclear"),
      (8, 0.05, "yes"), (30, 0.05, "yes"),
    ):  # fmt: skip
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

  def test_areas(self):
    def area(mechanism, value, seeds):
      return {
        "mechanism": mechanism, "T": 128, "budget": "steps",
        "orders": "uniform", "size": "8x1x1", "seeds": seeds,
        "area_from_4": value,
        "area_from_4_error": 0.02 if seeds == 2 else 0.001,
      }  # fmt: skip

    for two_stream, mdlm, seeds, ahead, level in (
      (0.6, 0.6, 3, "yes", "no"),
      (0.4, 0.4, 3, "no", "no"),
      (0.51, 0.51, 3, "no", "yes"),  # Level: by less than matters.
      (0.52, 0.52, 3, "yes", "no"),
      (0.518, 0.518, 3, "unclear", "unclear"),
      (0.55, 0.5, 2, "unclear", "unclear"),  # Wide errors: level is not said.
      (0.9, 0.9, 2, "yes", "no"),
      (0.9, 0.5, 1, "unclear (one seed)", "unclear (one seed)"),
    ):
      rows = [
        area("decoupled_rope", 0.5, seeds),
        area("two_stream", two_stream, seeds),
        area("mdlm", mdlm, seeds),
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
        "mechanism": mechanism, "T": 16, "budget": "steps",
        "orders": "uniform", "size": "8x1x1", "stream": stream, "index": index,
        "locality": value, "error": 0.01 if seeds > 1 else "",
        "seeds": seeds,
      }  # fmt: skip

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
    self.assertEqual(self.answer([], "do content rows look", (), rows), "no")


class TemperaturesTest(parameterized.TestCase):
  @parameterized.parameters("decoupled_rope", "mdlm")
  def test_a_law_a_row_is_the_law_of_each_row(self, mechanism):
    """All temperatures in one batch give what one batch for each would."""
    bind = tiny.bind(mechanism, L=1)
    params, B, T = tiny.sharp(bind), 4, 7
    order = tiny.orders_of(mechanism, B, T)

    @tiny.quick_jit
    def texts(params, temperature):
      law = sampling.Sampling(temperature, jnp.int32(0), jnp.float32(1))
      blank = jnp.zeros((B, T), jnp.int32)
      network, key = bind(params), jax.random.key(0)
      arguments = network, key, blank, blank > 0, order, law
      if mechanism == "mdlm":
        return diffusion.generate(
          *arguments, method="sequential", steps=0
        ).tokens
      return decode.generate(*arguments).tokens

    levels = np.float32([0.1, 3.0, 0.1, 3.0])
    together = texts(params, levels[:, None, None])
    cold, hot = (texts(params, levels[i]) for i in (0, 1))
    self.assertFalse(np.array_equal(cold, hot))
    for b in range(B):
      np.testing.assert_array_equal(together[b], (cold, hot)[b % 2][b])


class ProgramsTest(parameterized.TestCase):
  def test_rates_and_seeds_share_a_training_step_which_is_that_of_a_run(self):
    base = config("T=16 size=16x1x2", tokens_per_step=32)
    (cell,) = cells_lib.expand(base)
    mesh = sharding.of_run(base, "train", "eval")
    made = programs.Programs(mesh, V)
    self.addCleanup(made.close)
    other = cells_lib.resolve(cell, base, 5e-3, V)
    step = made._future("train", other)
    for rate, seed in ((5e-3, 1), (1e-3, 0)):
      got = cells_lib.resolve(
        dataclasses.replace(cell, seed=seed), base, rate, V
      )
      self.assertIs(made._future("train", got), step)
    with jax.set_mesh(mesh):
      tokens = sharding.put(mesh, np.arange(32, dtype=np.uint8) % V)
      tokens = tokens.reshape(2, 16)
      bind, _, _ = train_state.create(got, V, mesh)
      wanted = train.make_step(got, bind, V)
      start = made._future("init", got).result()
      one, two = (start(jnp.int32(3)) for _ in range(2))
      sums = jax.jit(wanted)(one, tokens)[1]
      # Made for a rate of 5e-3, called with 1e-3.
      found = step.result()(two, tokens, jnp.float32(1e-3))[1]
      chex.assert_trees_all_close(found, sums, rtol=1e-5)

  @parameterized.parameters((1, [4, 8, 12, 16]), (2, [5, 9, 13, 17]))
  def test_a_large_cache_grows_while_texts_are_sampled(self, sentinels, wanted):
    base = config("T=16 size=16x1x2", characters=32, temperatures=2)
    base = dataclasses.replace(
      base, model=dataclasses.replace(base.model, sentinels=sentinels)
    )
    (cell,) = cells_lib.expand(base)
    got = cells_lib.resolve(cell, base, 1e-3, V)
    mesh = sharding.of_run(got, "train", "eval")
    with (
      mock.patch.multiple(decode, _LARGE=0, _TILE=1),
      mock.patch.object(
        decode.cached, "resized", side_effect=decode.cached.resized
      ) as resized,
    ):
      program, arguments, _ = programs._sample_program(got, V, mesh)
      tokens = jax.eval_shape(program, *arguments)
    self.assertEqual(tokens.shape[1], 16)
    lengths = [call.args[1] for call in resized.call_args_list]
    self.assertEqual(lengths, wanted)


class StudyTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / "run"
    helpers.write_text(pathlib.Path(folder) / "text", test=False)
    self.enter_context(helpers.quick_compilation())
    self.command = [
      f"--config={STUDY}:tiny", "--mode=study", f"--workdir={self.workdir}",
      f"--config.data.path={folder}/text",
    ]  # fmt: skip

  def test_killed_and_started_again(self):
    process = helpers.start(self.command)
    helpers.read_until(process, "cell 2/4")
    os.killpg(process.pid, signal.SIGKILL)
    helpers.finish(process)
    before = helpers.contents(self.workdir / "cells")
    done = {n: x for n, x in before.items() if n.endswith(measure.RESULT)}
    self.assertLen(done, 1)
    # No time is left: nothing is begun.
    helpers.run(
      [*self.command, "--config.study.limit_seconds=1",
       "--config.study.part=cells"]
    )  # fmt: skip
    self.assertEqual(self.results(), done)
    with mock.patch.object(
      measure.Lab, "run", autospec=True, side_effect=measure.Lab.run
    ) as runs:
      helpers.run(self.command)
    self.assertEqual(
      [call.args[1].mechanism for call in runs.call_args_list],
      ["mdlm", "decoupled_rope", "decoupled_rope"],
    )
    self.assertLen(self.results(), 4)
    self.check_another_text_is_refused()
    self.assertEqual(self.results(), self.results() | done)
    files = helpers.contents(self.workdir / "cells")
    self.assertLess(sum(map(len, files.values())), 100_000)
    self.check_report()
    self.check_differences()
    self.check_it_can_be_made_again()

  def results(self):
    files = helpers.contents(self.workdir / "cells")
    return {n: x for n, x in files.items() if n.endswith(measure.RESULT)}

  def check_another_text_is_refused(self):
    helpers.write_text(self.workdir.parent / "other", seed=1, test=False)
    other = f"--config.data.path={self.workdir.parent}/other"
    with self.assertRaisesRegex(config_lib.ConfigError, "another text"):
      helpers.run(
        [
          *self.command,
          other,
          "--config.seed=1",
          "--config.study.sweep=mechanism=two_stream T=16 seed=1",
        ]
      )

  def check_it_can_be_made_again(self):
    """From nothing but the cells' files; what is missing is shown empty."""
    report = self.workdir / "report"
    first = helpers.contents(report)
    for path in report.iterdir():
      path.unlink()
    (gone,) = [name for name in self.results() if name.startswith("mdlm")]
    (self.workdir / "cells" / gone).unlink()
    with mock.patch.object(measure, "Lab", side_effect=AssertionError):
      helpers.run([*self.command, "--config.study.part=report"])
    again = helpers.contents(report)
    self.assertEqual(set(again), set(first))
    for name in ("locality.csv", "profiles_T16.svg"):
      self.assertEqual(again[name], first[name], name)
    self.assertIn(b"3 of 4 cells", again["README.md"])
    rows = self.table("cells")
    self.assertEqual(
      [r["done"] for r in rows], ["True", "False"] + 2 * ["True"]
    )
    self.assertEqual(rows[1]["bits_per_char"], "")

  def table(self, name):
    text = (self.workdir / f"report/{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))

  def check_report(self):
    report = self.workdir / "report"
    text = (report / "README.md").read_text()
    self.assertIn("4 of 4 cells", text)
    self.assertNotIn(str(self.workdir), text)
    for name in ("coherence_diversity_from_4", "locality", "profiles_T16"):
      for suffix in ("png", "svg"):
        self.assertGreater((report / f"{name}.{suffix}").stat().st_size, 1000)
      self.assertIn(f"({name}.png)", text)

  def check_differences(self):
    """The mean of paired differences is the difference of the means."""
    bits = {
      (row["mechanism"], row["budget"]): row["bits_per_char"]
      for row in self.table("cells")
    }
    for row in self.table("differences"):
      own = bits[row["mechanism"], row["budget"]]
      wanted = float(own) - float(bits["two_stream", "steps"])
      self.assertAlmostEqual(float(row["difference_bits"]), wanted, places=4)
      self.assertGreater(float(row["error"]), 0)
    self.assertLen(self.table("differences"), 3)


class SharesTest(absltest.TestCase):
  def test_shares_are_all_cells_once_with_the_trials_that_they_need(self):
    study = config("seed=0,1,2 mechanism=two_stream,mdlm rate=tuned")
    cells = cells_lib.expand(study)
    seen = []
    for index in range(4):
      share = dataclasses.replace(study.study, share_index=index, share_count=4)
      mine = sweep.chosen(dataclasses.replace(study, study=share), cells)
      for cell in mine:
        for trial in cells_lib.trials(cell, study):
          self.assertLess(mine.index(trial), mine.index(cell))
      seen += [cell for cell in mine if cell in cells]
    self.assertCountEqual(seen, cells)

  def test_trials_may_be_chosen_by_their_labels(self):
    study = config("mechanism=two_stream,mdlm rate=tuned", cells="rate=0.004")
    mine = sweep.chosen(study, cells_lib.expand(study))
    self.assertEqual([cell.rate for cell in mine], ["0.004"] * 2)

  def test_an_empty_share_is_no_error(self):
    study = config(
      "seed=0,1", share_index=2, share_count=3, part="cells", cells="seed"
    )
    with (
      mock.patch.object(measure, "Lab", side_effect=AssertionError),
      self.assertLogs(level="INFO") as logs,
    ):
      sweep.study(study, epath.Path("/absent"), [])
    self.assertIn("nothing to do in this share", "".join(logs.output))

  def test_cells_by_their_label(self):
    study = config("T=128,1024 mechanism=two_stream,mdlm")
    cells = cells_lib.expand(study)
    study = dataclasses.replace(study.study, cells="T=1024,mdlm")
    mine = sweep.chosen(config_lib.Config(study=study), cells)
    self.assertEqual(
      [(cell.T, cell.mechanism) for cell in mine],
      [(128, "mdlm"), (1024, "two_stream"), (1024, "mdlm")],
    )
    study = dataclasses.replace(study, cells="T=9")
    with self.assertRaisesRegex(config_lib.ConfigError, "no cell's label"):
      sweep.chosen(config_lib.Config(study=study), cells)


class FailureTest(absltest.TestCase):
  """A cell that fails stops no other, and the next start knows it."""

  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.config = config("mechanism=two_stream,mdlm,ao_gpt")
    corpus = mock.Mock(tokenizer=tokenizers.get("char27"))
    corpus.hash.return_value = "0"
    corpus.split.return_value = np.zeros(3, np.uint8)
    self.enter_context(
      mock.patch.object(sweep.corpora, "load", return_value=corpus)
    )
    self.enter_context(mock.patch.object(sweep.programs_lib, "Programs"))

  def start(self, errors):
    """The mechanisms that were run, and what the study raised, if anything.

    Args:
      errors: of a mechanism, or of a rate.
    """

    def run(lab, cell, config, folder):
      for name in (cell.mechanism, cell.rate):
        if name in errors:
          raise errors[name]
      result = {
        "text": lab.text, "training_flops": 1, "seconds": {"all": 1},
        "estimate": {"bits_per_char": 2.0},
      }  # fmt: skip
      measure._write_json(folder / measure.RESULT, result)
      return result

    with (
      mock.patch.object(measure.Lab, "run", autospec=True) as runs,
      mock.patch.object(sweep.report, "write") as write,
    ):
      runs.side_effect = run
      try:
        sweep.study(self.config, self.folder, [])
        raised = ""
      except sweep.FailedCellsError as error:
        raised = str(error)
      write.assert_called_once()  # Whatever failed.
    return [call.args[1].mechanism for call in runs.call_args_list], raised

  def test_others_go_on_and_only_memory_is_tried_again(self):
    try:
      telemetry.check_finite(3, {"loss": float("nan")})
    except telemetry.NonFiniteError as error:
      diverged = error
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    runs, raised = self.start({"two_stream": diverged, "mdlm": memory})
    self.assertEqual(runs, ["two_stream", "mdlm", "ao_gpt"])
    self.assertRegex(
      raised,
      "^2 of the study's cells failed: two_stream .* seed=0: loss is nan at "
      r"step 3 \(not tried again unless cells/two_stream-.* is deleted\); mdlm "
      r".*: out of memory \(the same command tries it again\)$",
    )
    self.assertEqual(self.start({"mdlm": memory}), (["mdlm"], raised))
    runs, raised = self.start({})
    self.assertEqual(runs, ["mdlm"])
    self.assertStartsWith(raised, "1 of the study's cells failed: two_stream")
    (path,) = self.folder.glob("cells/two_stream-*")
    path.rmtree()
    self.assertEqual(self.start({}), (["two_stream"], ""))

  def test_a_rate_that_is_too_high_is_no_failure(self):
    """It is not tried again either, and the best is not run twice."""
    self.config = config(
      "seed=0,1 mechanism=mdlm rate=tuned", rates=(1e-3, 4e-3)
    )
    diverged = telemetry.NonFiniteError("the loss is nan")
    runs, raised = self.start({"0.004": diverged})
    self.assertEqual((runs, raised), (["mdlm"] * 3, ""))
    self.assertEqual(self.start({}), ([], ""))
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    (path,) = self.folder.glob("cells/*rate0.004*")
    path.rmtree()
    runs, raised = self.start({"0.004": memory})
    self.assertEqual(runs, ["mdlm"])
    self.assertRegex(raised, "^1 of the study's cells failed: .*rate=0.004")

  def test_the_report_has_an_empty_cell_with_the_reason(self):
    cells = cells_lib.expand(self.config)
    results = sweep.Results(self.config, self.folder, V)
    measure.note_failure(results.folder(cells[1]), "loss is nan", again=False)
    folder = self.folder / "report"
    sweep.report.write(self.config, cells, results, folder, [""])
    rows = csv.DictReader((folder / "cells.csv").read_text().splitlines())
    self.assertEqual(
      [(r["done"], r["failed"], r["bits_per_char"]) for r in rows],
      [("False", "", ""), ("False", "loss is nan", ""), ("False", "", "")],
    )
    text = (folder / "README.md").read_text()
    self.assertIn(f"1 failed:\n\n- {cells[1].label}: loss is nan", text)

  def test_a_report_of_nothing_is_refused(self):
    study = dataclasses.replace(self.config.study, part="report")
    nothing = dataclasses.replace(self.config, study=study)
    with self.assertRaisesRegex(
      config_lib.ConfigError, f"no cell of this study in {self.folder}/cells: "
    ):
      sweep.study(nothing, self.folder, [""])
    self.assertEqual(list(self.folder.iterdir()), [])

  def test_the_command_names_a_text_that_is_not_built_in(self):
    argv = ["main.py", "--config=x", "--config.data.path=a", "--workdir=b"]
    plain = "python -m aoarm_jax.main --config=x"
    self.assertEqual(sweep.report.command(argv, ""), plain)
    self.assertEqual(
      sweep.report.command(argv, "a"), f"{plain} --config.data.path=<folder>"
    )

  def test_a_program_that_did_not_compile_keeps_no_parameters(self):
    program = futures.Future()  # Kept for the cells that share it.
    program.set_exception(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"))
    seen = []

    def run(*_):
      params = np.ones(3)
      seen.append(weakref.ref(params))
      program.result()

    (cell,) = cells_lib.expand(config("seed=0"))
    results = sweep.Results(self.config, self.folder, V)
    sweep._run_cell(mock.Mock(run=run), results, cell, sweep._Clock())
    self.assertTrue(results.failure(cell)["again"])
    self.assertIsNone(seen[0]())

  def test_an_error_that_is_not_the_cells_own_is_raised(self):
    lost = jax.errors.JaxRuntimeError("INTERNAL: device lost")
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "device lost"):
      self.start({"two_stream": lost})
    self.assertEmpty(list(self.folder.glob("cells/*/*.json")))


class RateTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.study = config("rate=tuned", rates=(1e-3, 2e-3, 4e-3))
    (self.cell,) = cells_lib.expand(self.study)
    self.trials = cells_lib.trials(self.cell, self.study)
    folder = epath.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.results = sweep.Results(self.study, folder, V)

  def end(self, trial, bits, unigram=4.0):
    folder = self.results.folder(trial)
    if bits is None:
      return measure.note_failure(folder, "the loss is nan", again=False)
    folder.mkdir(parents=True)
    estimate = {"bits_per_char": bits}
    result = {"estimate": estimate, "unigram_bits": unigram}
    (folder / measure.RESULT).write_text(json.dumps(result))

  def test_a_loss_that_is_no_number_is_raised(self):
    corpus = mock.Mock(tokenizer=tokenizers.get("char27"))
    corpus.hash.return_value = "0"
    corpus.split.return_value = np.zeros(3, np.uint8)
    lab = measure.Lab(self.study, corpus, None, mock.MagicMock())
    resolved = self.results.resolved(self.trials[0])
    folder = self.results.folder(self.trials[0])
    diverged = telemetry.NonFiniteError("the loss is nan")
    with (
      mock.patch.object(lab, "_train", side_effect=diverged),
      self.assertRaises(telemetry.NonFiniteError),
    ):
      lab.run(self.trials[0], resolved, folder)
    # The last step's update shows in the evaluation alone.
    with (
      mock.patch.object(lab, "_train", return_value=({}, [2.0], 1)),
      mock.patch.object(
        lab, "_evaluate", return_value={"bits_per_char": float("nan")}
      ),
      self.assertRaisesRegex(telemetry.NonFiniteError, "bits/char is nan"),
    ):
      lab.run(self.trials[0], resolved, folder)

  def test_the_best_decides_when_all_are_done_and_is_the_cell_itself(self):
    for trial, bits in zip(self.trials, (2.5, 2.4, 2.25)):
      self.assertIsNone(self.results.rate(self.cell))
      self.assertIsNone(self.results.result(self.cell))
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 4e-3)
    self.assertEqual(self.results.at_edge(self.cell), "yes")
    self.assertEqual(self.results.bits(self.cell), 2.25)
    (row,) = tables.rates_table([self.cell], self.results, self.study)
    found = [row[name] for name in ("0.001", "0.002", "0.004", "chosen")]
    self.assertEqual(found, [2.5, 2.4, 2.25, "0.004"])

  def test_one_that_diverges_is_worse_than_any(self):
    for trial, bits in zip(self.trials, (2.5, 2.6, None)):
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 1e-3)
    (row,) = tables.rates_table([self.cell], self.results, self.study)
    self.assertEqual(row["0.004"], np.inf)

  def test_of_rates_that_are_as_good_the_configuration_s(self):
    for trial, bits in zip(self.trials, (2.2, 2.205, 2.3)):
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 2e-3)

  def test_where_nothing_was_learned_the_configuration_s(self):
    for trial, bits in zip(self.trials, (None, 4.0, 3.95)):
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 2e-3)


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
    self.assertAlmostEqual(apart.degrees, 2.0, delta=0.1)
    self.assertAlmostEqual(apart.value, same.value)

  def test_effects(self):
    for value, error, least, wanted in (
      (0.1, 0.01, 0.02, 1), (-0.1, 0.01, 0.02, -1), (0.1, 0.1, 0.02, None),
      (0.01, 0.001, 0.02, 0), (0.01, 0.001, 0.0, 1), (0.0, 0.0, 0.0, 0),
      (0.1, float("nan"), 0.0, None),
    ):  # fmt: skip
      found = statistics.Estimate(value, error, 2, 3)
      self.assertEqual(statistics.effect(found, least), wanted)


if __name__ == "__main__":
  absltest.main()
