"""Every experiment file as a user runs it: train, resume, evaluate, sample."""

import json
import pathlib
import re
import shutil
import tempfile
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import objective
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import metrics

# two_stream is run in train_test.py.
_EXPERIMENTS = sorted(
  path.stem
  for path in (helpers.ROOT / "configs").glob("*.py")
  if path.stem != "two_stream" and not path.stem.startswith("study_")
)
# In a whole run the others are as these or as two_stream. Their losses, laws,
# caches and leaks are tested with those of the whole table.
_KINDS = ("decoupled_rope", "mdlm")
_CHANGES = {
  "model.T": 8,
  "model.L": 1,
  "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 1,
  "train.steps": 4,
  "telemetry.log_every": 1,
  "eval.every": 4,
  "eval.batches": 2,
  "sample.every": 0,
  "checkpoint.every": 2,
}


class ExperimentTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if jax.default_backend() != "cpu":
      self.skipTest("for the CPU: start with JAX_PLATFORMS=cpu")
    self.enterContext(helpers.quick_compilation())
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    helpers.write_text(folder / "text")
    self.text, self.workdir = folder / "text", folder / "run"

  @parameterized.parameters(*_KINDS)
  @pytest.mark.thorough
  def test_trains_resumes_evaluates_samples(self, name):
    self.check_run(name)

  @parameterized.parameters(*sorted({*_EXPERIMENTS} - {*_KINDS}))
  @pytest.mark.slow
  def test_alike_ones_train_resume_evaluate_sample(self, name):
    self.check_run(name)

  def check_run(self, name):
    command = helpers.arguments(
      self.workdir,
      _CHANGES | {"data.path": self.text, "orders.group_width": 4},
      experiment=str(helpers.ROOT / "configs" / f"{name}.py:tiny"),
    )
    helpers.run(command)
    config = helpers.config_of(command)
    _, whole = helpers.final_state(self.workdir, config)
    valid = metrics.read(self.workdir)[-1]
    shutil.rmtree(self.workdir / "checkpoints" / "4")
    helpers.run(command)
    saved, again = helpers.final_state(self.workdir, config)
    self.assertEqual(saved.step, 4)
    self.assertEqual(
      helpers.leaves_as_bytes(again), helpers.leaves_as_bytes(whole)
    )
    self.assertEqual(metrics.read(self.workdir)[-1], valid)
    helpers.run([*command, "--mode=eval"])
    (report,) = (self.workdir / "evaluations").iterdir()
    estimates = json.loads(report.read_text())["estimates"]
    self.assertEqual(
      tuple(e["estimator"] for e in estimates), config.eval.estimators
    )
    self.assertEqual(estimates[0]["bits_per_char"], valid["bits_per_char"])
    before = set((self.workdir / "samples").iterdir())
    helpers.run([*command, "--mode=sample", "--prompt=ab__"])
    (texts,) = set((self.workdir / "samples").iterdir()) - before
    for line in texts.read_text().splitlines():
      text = json.loads(line)
      self.assertRegex(text["text"], "^ab[a-z ]{2}$")
      self.assertEqual(text["order"][:2], [1, 2])

  @pytest.mark.thorough
  def test_contributing_adds_one(self):
    """Its law sums to one, also after a user has added it to the table."""
    page = (helpers.ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(MECHANISMS\[.*?)```", page, re.DOTALL)
    (name,) = re.findall(r'^MECHANISMS\["(\w+)"\]', code)
    with mock.patch.dict(mechanisms.MECHANISMS):
      mechanisms.MECHANISMS.pop(name, None)
      before = set(mechanisms.MECHANISMS)
      exec(code, vars(mechanisms))  # As if the line stood there.
      self.assertEqual(set(mechanisms.MECHANISMS) - before, {name})
      made = tiny.make(name, T=4, V=3, D=8, N=2)
      texts = tiny.all_sequences(3, 4)
      order = np.tile(np.array([3, 1, 4, 2]), (len(texts), 1))
      nats = tiny.quick_jit(
        lambda params: objective.order_nll(
          made.bind(params), made.layout, texts, order
        )
      )(tiny.sharp(made))
    p = np.exp(-np.asarray(nats, np.float64).sum(axis=1))
    self.assertAlmostEqual(p.sum(), 1.0, delta=1e-5)

  def test_every_mechanism_has_an_experiment(self):
    used = {
      helpers.config_of(
        [f"--config={helpers.ROOT / 'configs' / name}.py"]
      ).model.mechanism
      for name in (*_EXPERIMENTS, "two_stream")
    }
    self.assertEqual(used, set(mechanisms.MECHANISMS))
    choices = next(
      field.metadata["choices"]
      for path, field, _ in config_lib.leaves(config_lib.Config())
      if path == "config.model.mechanism"
    )
    self.assertEqual(set(choices), used)


if __name__ == "__main__":
  absltest.main()
