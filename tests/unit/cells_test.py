"""The cells of a sweep, and the configuration of each."""

import dataclasses

import helpers
import numpy as np
from absl.testing import absltest, parameterized
from studies import STUDY, config

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import profiles
from aoarm_jax.tools import matching


class SweepTest(parameterized.TestCase):
  def test_order_is_line_by_line_and_the_last_key_fastest(self):
    cells = cells_lib.expand(
      config("seed=0,1 mechanism=two_stream,mdlm; mechanism=mdlm,ao_gpt T=128")
    )
    self.assertEqual(
      [(cell.seed, cell.mechanism) for cell in cells],
      [
        (0, "two_stream"),
        (0, "mdlm"),
        (1, "two_stream"),
        (1, "mdlm"),
        (0, "ao_gpt"),
      ],
    )

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
      ("T=4096", 1024),
      ("T=256", 128),
      ("T=512", 1024),
      ("T=1024 orders=block16", 1024),
      ("T=128 size=32x2x2 seed=3", 128),
      ("T=128 budget=flops", 128),
    ):
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
    ("seed=0 seed=1", "seed is there twice"),
  )
  def test_a_line_that_cannot_be(self, sweep, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      cells_lib.expand(config(sweep))

  def test_what_cannot_be_matched_is_named(self):
    line = "mechanism=ao_gpt size=64x2x2 T=16 budget=parameters"
    with self.assertRaisesRegex(
      config_lib.ConfigError,
      "sweep: ao_gpt 64x2x2 T=16 .*: no mlp_width gives ao_gpt the parameters "
      "of two_stream; the nearest has",
    ):
      self.resolved(line)
    with self.assertRaisesRegex(config_lib.ConfigError, "tokens_per_step=8"):
      self.resolved("T=16", tokens_per_step=8)

  def resolved(self, line, **study):
    study = config(line, **study)
    (cell,) = cells_lib.expand(study)
    return cell, cells_lib.resolve(cell, study, 1e-3)

  def test_equal_flops(self):
    cell, got = self.resolved("mechanism=decoupled_rope budget=flops steps=500")
    other = dataclasses.replace(cell, mechanism="two_stream")
    reference = cells_lib.resolve(other, config(""), 1e-3)
    self.assertEqual(reference.train.steps, 500)
    ratio = matching.training_flops(got) / matching.training_flops(reference)
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

  def test_changed_fields_are_words_of_a_label_and_of_no_reference(self):
    line = "mechanism=decoupled_rope with=model.L:18 budget=flops steps=500"
    cell, got = self.resolved(line)
    self.assertContainsSubset(
      {"decoupled_rope", "with=model.L:18", "L=18"}, cell.label.split()
    )
    self.assertEqual((got.model.L, got.train.steps), (18, 488))
    self.assertStartsWith(
      cells_lib.folder_name(cell, got), "decoupled_rope-256x18x4-"
    )
    cell, got = self.resolved("with=model.content_sees:last:4")
    self.assertIn("content_sees=last:4", cell.label.split())
    self.assertEqual(got.model.content_sees, "last:4")

  @parameterized.parameters("", "rates", "long", "tiny")
  def test_arms_of_the_study_of_reasons_can_be(self, variant):
    path = helpers.ROOT / "configs" / "study_why.py"
    study = helpers.config_of([f"--config={path}:{variant}"])
    cells = cells_lib.expand(study)
    arms = {(cell.mechanism, cell.changes) for cell in cells}
    self.assertLen(arms, 13)
    for cell in cells:
      got = cells_lib.resolve(cell, study, 1e-3)
      self.assertEqual(cells_lib.trials(cell, study), [])
      if cell.budget == "flops":
        other = dataclasses.replace(cell, mechanism="two_stream", changes="")
        reference = cells_lib.resolve(other, study, 1e-3)
        ratio = matching.training_flops(got) / matching.training_flops(
          reference
        )
        delta = 0.05 if variant == "tiny" else 1e-3
        self.assertAlmostEqual(ratio, 1, delta=delta, msg=cell.label)

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
    order = profiles.orders_of(got, 8)  # At step 0 it would be sorted.
    self.assertGreater(np.mean(np.diff(order) < 0), 0.3)

  @parameterized.parameters("", "quick", "repeat", "tiny")
  def test_sweeps_of_the_config_can_be(self, variant):
    got = helpers.config_of([f"--config={STUDY}:{variant}"])
    for cell in cells_lib.expand(got):
      if cell.budget == "steps":
        cells_lib.resolve(cell, got, 1e-3)


if __name__ == "__main__":
  absltest.main()
