"""Runs that begin with the weights of another run."""

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
from aoarm_jax.runs import checkpoint
from aoarm_jax.training import program as program_lib

_folder = pathlib.Path(tempfile.mkdtemp())
setUpModule, _leave = helpers.around_module(helpers.quick_compilation())

FIELDS = {
  **{"train.steps": 2, "checkpoint.every": 2, "eval.every": 0},
  **{"sample.every": 0, "sample.count": 1, "eval.batches": 1, "model.L": 1},
  **{"optimizer.schedule": "constant", "optimizer.ema_decay": 0.9},
  "eval.estimators": "('any_order',)",
  # The letters of the Markov source alone, without punctuation.
  "data.tokenizer": "chars",
}
# Steps at this rate change no float32 number.
STILL = {"optimizer__peak_learning_rate": 1e-30, "train__steps": 1}


def tearDownModule():
  _leave()
  shutil.rmtree(_folder)


def command(name, *more, **changes):
  fields = FIELDS | {"data.path": _folder / "text"}
  fields |= {key.replace("__", "."): value for key, value in changes.items()}
  return helpers.arguments(_folder / name, fields, *more)


def state_of(name):
  """The whole newest state of a run."""
  with checkpoint.Checkpoints(
    _folder / name / "checkpoints", keep_last=1, keep_best=0
  ) as checkpoints:
    saved = checkpoints.newest()
    config = config_lib.from_json(saved.config_json)
    tokenizer = aoarm_jax.load(_folder / name, progress=False).tokenizer
    program = program_lib.make(config, tokenizer=tokenizer)
    with jax.set_mesh(program.network.mesh):
      return checkpoints.restore(saved, program.abstract)


class StartFromTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    helpers.write_text(_folder / "text")
    helpers.run(command("source"))
    # A text of fewer letters: its own symbols would be others.
    for folder, text in (("other", "banana bread "), ("lines", "bread\n")):
      (_folder / folder).mkdir()
      for name in ("train", "valid"):
        (_folder / folder / f"{name}.txt").write_text(50 * text)
    cls.new = dict(
      train__start_from=_folder / "source", data__path=_folder / "other"
    )

  def check_weights(self, name, part):
    """The first step changed nothing, so the state shows where it began."""
    state, source = state_of(name), state_of("source")
    wanted = getattr(source, part)
    chex.assert_trees_all_equal(state.params, wanted)
    chex.assert_trees_all_equal(state.ema, wanted)
    self.assertEqual((int(state.step), int(source.step)), (1, 2))
    # The moments of Adam know one step of one batch.
    leaves = jax.tree.leaves(state.opt_state)
    counts = {int(leaf) for leaf in leaves if leaf.dtype == np.int32}
    self.assertEqual(counts, {1})
    facts = json.loads((_folder / name / "start.json").read_text())
    self.assertEqual((facts["step"], facts["weights"]), (2, part))

  def test_another_text_length_and_rate(self):
    """The run goes on where the other run is gone."""
    copy = _folder / "copy"
    shutil.copytree(_folder / "source", copy)
    longer = dict(model__rope_scaling="yarn", model__rope_factor=2.0)
    longer |= dict(model__T=24, model__rope_original_T=16)
    fields = self.new | STILL | longer | dict(train__start_from=copy)
    helpers.run(command("new", **fields))
    self.check_weights("new", "ema")
    shutil.rmtree(copy)
    helpers.run(command("new", **fields | dict(train__steps=2)))
    self.assertEqual(int(state_of("new").step), 2)
    with self.assertRaisesRegex(
      aoarm_jax.UserError, "config.train.start_from='': the run in .* has '/"
    ):
      helpers.run(command("new", **fields | dict(train__start_from="")))

  @pytest.mark.thorough
  def test_the_last_weights(self):
    fields = self.new | STILL | dict(train__start_from_ema=False)
    helpers.run(command("last", **fields))
    self.check_weights("last", "params")

  @parameterized.named_parameters(
    ("another width", dict(model__D=8), "config.model.D=8: .*source has 16; "),
    (
      "other heads",
      dict(model__kv_heads=1),
      "config.model.kv_heads=1: .*source has 0; ",
    ),
    (
      "another mechanism",
      dict(model__mechanism="mdlm", eval__estimators="('elbo',)"),
      "config.model.mechanism='mdlm': .* has 'two_stream'; set",
    ),
    (
      "another end",
      dict(
        data__documents="stream",
        data__lines=True,
        data__path=_folder / "lines",
        model__T=24,
      ),
      "config.model.T=24 and config.data.documents='stream': .* has 16 and "
      "'join', and .*embedding: .*30, 16. here, .*29, 16. there",
    ),
    (
      "other symbols",
      dict(data__tokenizer="byte"),
      "config.data.tokenizer='byte': .* has 'chars'",
    ),
    (
      "the run itself",
      dict(train__start_from="NAME"),
      "start_from=.*: is the --workdir of this run itself",
    ),
    (
      "no run",
      dict(train__start_from=_folder / "absent", data__path=_folder / "text"),
      "no checkpoint in .*absent.*: name a trained run with --config.train.st",
    ),
  )
  def test_what_does_not_fit(self, changes, message):
    name = self.id().rpartition(".")[2]
    workdir = _folder / name
    if changes.get("train__start_from") == "NAME":
      changes = changes | {"train__start_from": workdir}
    with self.assertRaisesRegex(aoarm_jax.UserError, message) as caught:
      helpers.run(command(name, **self.new | changes))
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse((workdir / "config.json").exists())

  @pytest.mark.slow
  def test_symbols_of_another_file(self):
    """A prepared text or a file decides, and must have the run's symbols."""
    helpers.run(
      command("letters", data__path=_folder / "other", train__steps=1)
    )
    file = _folder / "letters" / "tokenizer.json"
    with self.assertRaisesRegex(
      aoarm_jax.UserError,
      "its symbols are not those of config.train.start_from=.*source.*: take "
      "the tokenizer.json of that run",
    ):
      helpers.run(command("x", **self.new, data__tokenizer_file=file))

  @pytest.mark.slow
  def test_positions_that_are_learned(self):
    """Their number is a shape, so T is bound."""
    learned = dict(model__mechanism="sigma_gpt", train__steps=1)
    helpers.run(command("sigma", **learned))
    fields = self.new | learned | dict(train__start_from=_folder / "sigma")
    with self.assertRaisesRegex(
      aoarm_jax.UserError,
      "config.model.T=8: .*sigma has 16, and with the mechanism sigma_gpt "
      r"shapes of parameters .*start/added: \(2, 10, 8\) here, \(2, 18, 8\)",
    ):
      helpers.run(command("y", **fields, model__T=8))

  def test_a_study_begins_with_new_weights(self):
    with self.assertRaisesRegex(
      aoarm_jax.UserError, "config.train.start_from='x': the runs of a study"
    ):
      helpers.run(
        command(
          "z",
          "--mode=study",
          train__start_from="x",
          study__sweep="T=8",
          data__tokenizer="char27",
        )
      )


if __name__ == "__main__":
  absltest.main()
