"""What is taken from a run's config.json."""

import dataclasses
import tempfile
from unittest import mock

from absl.testing import absltest
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import checkpoint, opening


class AsTrainedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = epath.Path(folder.name)
    self.run_config = config_lib.Config(
      model=config_lib.Model(T=32),
      data=config_lib.Data(corpus="folder", path="books"),
      train=config_lib.Train(steps=7, least_time=0.5),
    )

  def as_trained(self, config=None, overridden=()):
    return opening.as_trained(
      config or config_lib.Config(), self.workdir, overridden
    )

  def write(self):
    text = config_lib.to_json(self.run_config)
    (self.workdir / "config.json").write_text(text)

  def test_model_and_text_are_the_run_s(self):
    self.write()
    got = self.as_trained()
    self.assertEqual(got.model, self.run_config.model)
    self.assertEqual((got.data.corpus, got.data.path), ("folder", "books"))
    self.assertEqual(got.train.least_time, 0.5)
    # How long it trained is of no matter.
    self.assertEqual(got.train.steps, config_lib.Train().steps)

  def test_what_the_command_line_names_stays(self):
    self.write()
    own = config_lib.Config(data=config_lib.Data(path="other"))
    got = self.as_trained(own, ["data.path"])
    self.assertEqual((got.data.corpus, got.data.path), ("folder", "other"))

  def test_groups_are_the_run_s(self):
    """Generation and scores follow them, whatever experiment is named."""
    groups = config_lib.Orders(
      family="block", groups="given", group_width=3, group_sizes=(30, 2)
    )
    self.run_config = dataclasses.replace(self.run_config, orders=groups)
    self.write()
    got = config_rules.validate(self.as_trained())
    self.assertEqual(got.orders, dataclasses.replace(groups, family="uniform"))
    got = self.as_trained(None, ["orders.groups"])
    self.assertEqual(got.orders.groups, "none")

  def test_a_run_on_docstrings_reads_another_text_and_says_so(self):
    """Its config.json names a corpus that there is no more."""
    self.run_config = dataclasses.replace(
      self.run_config, data=config_lib.Data(corpus="docstrings")
    )
    self.write()
    own = config_lib.Config(data=config_lib.Data(path="other"))
    for config, overridden in ((None, ()), (own, ["data.path"])):
      with self.assertLogs(level="WARNING") as logs:
        got = self.as_trained(config, overridden)
      self.assertEqual(got.data.corpus, "auto")
      self.assertEqual(got.data.path, "other" if overridden else "")
      config_rules.validate(got)
      self.assertLen(logs.output, 1)
      self.assertIn("config.json: config.data.corpus='docstr", logs.output[0])
      self.assertIn("--config.data.path=", logs.output[0])

  def test_another_mechanism_is_refused(self):
    """Neither its estimators nor its ways to sample are the run's."""
    self.write()
    for mechanism in ("mdlm", "decoupled_rope"):
      own = config_lib.Config(model=config_lib.Model(mechanism=mechanism))
      with self.assertRaisesRegex(
        config_lib.ConfigError,
        f"mechanism={mechanism!r}: the run in {self.workdir} is of "
        "'two_stream': give the --config .*experiment.*, or another --workdir",
      ):
        self.as_trained(own)

  def test_the_checkpoints_of_an_open_run_are_closed(self):
    """Its directory may be a str, and it may fail."""
    self.write()
    closed = []
    with (
      mock.patch.object(
        checkpoint.Checkpoints,
        "close",
        lambda self: closed.append(self._steps.directory),
      ),
      mock.patch.object(opening, "_opened", return_value="run") as opened,
    ):
      run = opening.open_run(str(self.workdir), self.run_config)
    self.assertEqual(run, "run")
    self.assertEqual(opened.call_args.args[0], self.workdir)
    self.assertEqual(closed, [self.workdir / "checkpoints"])
    with self.assertRaisesRegex(checkpoint.CheckpointError, "train first"):
      opening.open_run(str(self.workdir), self.run_config)
    self.assertEqual(opening.read_config(str(self.workdir)), self.run_config)

  def test_without_a_run(self):
    own = dataclasses.replace(config_lib.Config(), seed=3)
    self.assertEqual(self.as_trained(own), own)


if __name__ == "__main__":
  absltest.main()
