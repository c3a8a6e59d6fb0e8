"""Runs that adapt a model: curriculum, adapters, frozen arrays, a teacher."""

import functools
import json
import pathlib
import shutil
import tempfile

import chex
import helpers
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.model import adapters
from aoarm_jax.runs import checkpoint
from aoarm_jax.training import distilling
from aoarm_jax.training import program as program_lib

_folder = pathlib.Path(tempfile.mkdtemp())
setUpModule, _leave = helpers.around_module(helpers.quick_compilation())

FIELDS = {
  **{"train.steps": 2, "checkpoint.every": 2, "eval.every": 0},
  **{"sample.every": 0, "sample.count": 1, "eval.batches": 1, "model.L": 1},
  **{"optimizer.schedule": "constant", "optimizer.ema_decay": 0.9},
  **{"telemetry.log_every": 1, "eval.estimators": "('left_to_right',)"},
}
CAUSAL = str(helpers.ROOT / "configs" / "causal.py:tiny")
TEXTS = ["abcdefghijklmnop", "acegikmoqsuwyacd"]


def tearDownModule():
  _leave()
  shutil.rmtree(_folder)


def command(name, *more, experiment=helpers.TINY, **changes):
  fields = FIELDS | {"data.path": _folder / "text"}
  fields |= {key.replace("__", "."): value for key, value in changes.items()}
  return helpers.arguments(_folder / name, fields, *more, experiment=experiment)


def state_of(name):
  """The whole newest state of a run."""
  workdir = _folder / name
  with checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  ) as checkpoints:
    saved = checkpoints.newest()
    config = config_lib.from_json(saved.config_json)
    teacher = functools.partial(
      distilling.network,
      config,
      tokenizer=tokenizers.get(config.data.tokenizer),
      workdir=workdir,
    )
    program = program_lib.make(config, open_teacher=teacher)
    with jax.set_mesh(program.network.mesh):
      return checkpoints.restore(saved, program.abstract), program


@pytest.mark.thorough
class AdaptTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    helpers.write_text(_folder / "text")
    helpers.run(command("source"))
    helpers.run(command("causal", experiment=CAUSAL))
    cls.fields = dict(
      train__start_from=_folder / "source",
      train__distill=_folder / "causal",
      train__lora_rank=2,
      train__frozen="('!norm/*',)",
      orders__family="growing_blocks",
      orders__curriculum_steps=3,
    )

  def test_a_run_that_is_stopped_is_the_run_that_is_not(self):
    """It goes on where the run that it came from and the teacher are gone."""
    helpers.run(command("whole", **self.fields, train__steps=4))
    fields = dict(self.fields)
    for name in ("source", "causal"):
      shutil.copytree(_folder / name, _folder / f"{name}-copy")
    fields["train__start_from"] = _folder / "source-copy"
    fields["train__distill"] = _folder / "causal-copy"
    helpers.run(command("cut", **fields, train__steps=2))
    for name in ("source", "causal"):
      shutil.rmtree(_folder / f"{name}-copy")
    helpers.run(command("cut", **fields, train__steps=4))
    (whole, program), (cut, _) = state_of("whole"), state_of("cut")
    self.assertEqual(
      helpers.leaves_as_bytes(cut), helpers.leaves_as_bytes(whole)
    )
    # What is frozen is what the run began with, and so is the teacher.
    train = program.network.config.train
    source = adapters.joined(state_of("source")[0].ema, {})
    chex.assert_trees_all_equal(whole.frozen, adapters.split(source, train)[1])
    chex.assert_trees_all_equal(whole.teacher, state_of("causal")[0].ema)
    self.check_metrics("whole")
    self.check_reading(whole, program)

  def check_metrics(self, name):
    lines = (_folder / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    trained = [r for r in records if r["kind"] == "train"]
    # At first all orders are left to right, and all rows are compared.
    self.assertGreater(trained[0]["teacher_nats_per_token"], 0)
    self.assertLess(abs(trained[0]["loss_nats_per_token"] - np.log(27)), 0.2)

  def check_reading(self, state, program):
    """Evaluation and exports see merged weights."""
    want = adapters.merged(
      adapters.joined(state.ema, state.frozen), program.network.config.train
    )
    model = aoarm_jax.load(_folder / "whole", progress=False)
    chex.assert_trees_all_close(model._params, want, atol=1e-7)
    aoarm_jax.export(_folder / "whole", _folder / "exported", progress=False)
    exported = aoarm_jax.load(_folder / "exported", progress=False)
    for text in TEXTS:
      self.assertAlmostEqual(
        exported.score(text).log_p, model.score(text).log_p, places=4
      )
    # Such a folder, and the run itself, begin further runs.
    for name in ("whole", "exported"):
      fields = dict(train__start_from=_folder / name, train__steps=1)
      still = dict(optimizer__peak_learning_rate=1e-30)
      helpers.run(command(f"from {name}", **fields, **still))
      state, _ = state_of(f"from {name}")
      chex.assert_trees_all_close(state.params, want, atol=1e-7)
      self.assertEqual(state.frozen, {})

  @parameterized.named_parameters(
    (
      "a teacher in any order",
      dict(train__distill="source"),
      "train.distill=.*source: is of the mechanism two_stream; name a run of a "
      "left-to-right mechanism, such as causal",
    ),
    (
      "a teacher of shorter texts",
      dict(model__T=24),
      "train.distill=.*causal: reads 16 tokens at most; config.model.T=24 must",
    ),
    (
      "a teacher of other symbols",
      dict(data__tokenizer="byte"),
      "causal: has config.data.tokenizer='char27', and this run 'byte'; both",
    ),
    (
      "a teacher that has an end",
      dict(data__documents="stream", data__lines=True),
      "causal: predicts 27 symbols, and this run 28: config.data.documents",
    ),
    ("no teacher", dict(train__distill="absent"), "absent"),
    (
      "no array of this name",
      dict(train__distill="", train__frozen="('heads',)"),
      "train.frozen=.'heads',.: 'heads' matches no array; there are: blocks/at",
    ),
    (
      "a masked student",
      dict(model__mechanism="mdlm", eval__estimators="('elbo',)"),
      "train.distill=.*: mechanism mdlm has no order of known tokens",
    ),
    (
      "slots over devices",
      dict(mesh__sequence=2),
      "config.mesh.sequence=2: must be 1 with config.train.distill",
    ),
  )
  def test_what_does_not_fit(self, changes, message):
    name = self.id().rpartition(".")[2]
    fields = dict(train__distill="causal") | changes
    if fields["train__distill"]:
      fields["train__distill"] = _folder / fields["train__distill"]
    with self.assertRaisesRegex(aoarm_jax.UserError, message) as caught:
      helpers.run(command(name, **fields))
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse((_folder / name / "config.json").exists())

  def test_other_adapters_are_another_run(self):
    with self.assertRaisesRegex(
      aoarm_jax.UserError, "config.train.lora_rank=3: the run in .* has 0"
    ):
      helpers.run(command("source", train__lora_rank=3))

  def test_a_study_trains_all_weights(self):
    for field, value in (
      ("lora_rank", 2),
      ("frozen", "('head',)"),
      ("distill", "x"),
    ):
      with self.assertRaisesRegex(
        aoarm_jax.UserError, f"config.train.{field}=.*: the runs of a study"
      ):
        helpers.run(
          command(
            "study",
            "--mode=study",
            study__sweep="T=8",
            **{f"train__{field}": value},
          )
        )


if __name__ == "__main__":
  absltest.main()
