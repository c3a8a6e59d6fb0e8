"""Runs that adapt a model: curriculum, adapters, frozen arrays, a teacher."""

import functools
import json
import pathlib
import re
import shlex
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

# Of every run, also where the page has other values.
FIELDS = {
  **{"train.steps": 2, "checkpoint.every": 1, "eval.every": 0, "model.L": 1},
  **{"sample.every": 0, "sample.count": 1, "eval.batches": 1},
  **{"optimizer.schedule": "constant", "optimizer.ema_decay": 0.9},
  **{"telemetry.log_every": 1, "orders.curriculum_steps": 2},
}
PAGE = (helpers.ROOT / "docs" / "adapting.md").read_text()
TEXTS = ["abcdefghijklmnop", "acegikmoqsuwyacd"]


def tearDownModule():
  _leave()
  shutil.rmtree(_folder)


def command(words, *more, **changes):
  """A command of the page, in the folder of the test, with tiny sizes."""
  fields = helpers.SMALLEST | FIELDS | {"data.path": _folder / "text"}
  fields |= {key.replace("__", "."): value for key, value in changes.items()}
  places = {
    "=runs/": f"={_folder}/",
    "=exported/": f"={_folder}/exported-",
    "--config=configs/": f"--config={helpers.ROOT}/configs/",
  }
  kept = []
  for word in words:
    for there, here in places.items():
      word = word.replace(there, here)
    if word.partition("=")[0].removeprefix("--config.") not in fields:
      kept.append(word)
  return [*kept, *(f"--config.{k}={v}" for k, v in fields.items()), *more]


def of_page():
  """The commands of the page, by the name of their run and their mode."""
  found = re.findall(r"^python -m aoarm_jax\.main (.*)$", PAGE, re.MULTILINE)
  return {
    (values.workdir.rpartition("/")[2], values.mode): shlex.split(words)
    for words in found
    if "--topology" not in words
    for values in [helpers.parse(shlex.split(words))[0]]
  }


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


@pytest.mark.slow
class AdaptTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    helpers.write_text(_folder / "text")
    cls.page = of_page()
    for words in cls.page.values():
      helpers.run(command(words))

  def test_a_run_that_is_stopped_is_the_run_that_is_not(self):
    """It goes on where the run that it came from and the teacher are gone."""
    words = self.page["adapted", "train"]
    moved = [word.replace("runs/adapted", "runs/cut") for word in words]
    for name in ("source", "teacher"):
      shutil.copytree(_folder / name, _folder / f"{name}-copy")
      moved = [re.sub(f"runs/{name}$", f"runs/{name}-copy", w) for w in moved]
    helpers.run(command(moved, train__steps=1))
    for name in ("source", "teacher"):
      shutil.rmtree(_folder / f"{name}-copy")
    helpers.run(command(moved))
    (whole, program), (cut, _) = state_of("adapted"), state_of("cut")
    self.assertEqual(
      helpers.leaves_as_bytes(cut), helpers.leaves_as_bytes(whole)
    )
    # What is frozen is what the run began with, and so is the teacher.
    train = program.network.config.train
    source = adapters.joined(state_of("source")[0].ema, {})
    chex.assert_trees_all_equal(whole.frozen, adapters.split(source, train)[1])
    chex.assert_trees_all_equal(whole.teacher, state_of("teacher")[0].ema)
    self.check_metrics("adapted")
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
    model = aoarm_jax.load(_folder / "adapted", progress=False)
    chex.assert_trees_all_close(model._params, want, atol=1e-7)
    exported = aoarm_jax.load(_folder / "exported-adapted", progress=False)
    for text in TEXTS:
      self.assertAlmostEqual(
        exported.score(text).log_p, model.score(text).log_p, places=4
      )
    # The run itself begins further runs.
    words = [
      word.replace("runs/full", "runs/next").replace("/source", "/adapted")
      for word in self.page["full", "train"]
    ]
    still = dict(optimizer__peak_learning_rate=1e-30, train__steps=1)
    helpers.run(command(words, **still))
    state, _ = state_of("next")
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
      "teacher: reads 16 tokens at most; config.model.T=24 must not exceed",
    ),
    (
      "a teacher of other symbols",
      dict(data__tokenizer="byte"),
      "teacher: has config.data.tokenizer='char27', and this run 'byte'; both",
    ),
    (
      "a teacher that has an end",
      dict(data__documents="stream", data__lines=True),
      "teacher: predicts 27 symbols, and this run 28: config.data.documents",
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
    fields = dict(train__distill="teacher") | changes
    if fields["train__distill"]:
      fields["train__distill"] = _folder / fields["train__distill"]
    words = [f"--config={helpers.TINY}", f"--workdir={_folder / name}"]
    with self.assertRaisesRegex(aoarm_jax.UserError, message) as caught:
      helpers.run(command(words, **fields))
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse((_folder / name / "config.json").exists())

  def test_other_adapters_are_another_run(self):
    with self.assertRaisesRegex(
      aoarm_jax.UserError, "config.train.lora_rank=3: the run in .* has 0"
    ):
      helpers.run(command(self.page["source", "train"], train__lora_rank=3))

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
            [f"--config={helpers.TINY}", "--mode=study"],
            study__sweep="T=8",
            **{f"train__{field}": value},
          )
        )


if __name__ == "__main__":
  absltest.main()
