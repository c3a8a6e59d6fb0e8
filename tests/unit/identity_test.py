"""What makes a run this run, and what a checkpoint says of it."""

import contextlib
import tempfile
import time
from unittest import mock

import jax
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, tokenizers
from aoarm_jax.devices import switches
from aoarm_jax.runs import identity, manifest, patience

TEXT = {"train": "a" * 64, "valid": "b" * 64}
OTHER = "c" * 64
CONFIG = config_lib.Config(data=config_lib.Data(path="old"))


def saved(text=None, **more):
  return manifest.Saved(
    step=7,
    config_json=config_lib.to_json(CONFIG),
    data_state=identity.record(TEXT if text is None else text) | more,
    metric=None,
  )


class IdentityTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.workdir = folder / "run"
    self.workdir.mkdir()

  def refused(self, config=CONFIG, text=None, checkpoint=None):
    """The message about a start that is not of the run."""
    with self.assertRaises(config_lib.ConfigError) as caught:
      identity.check_same_run(
        checkpoint or saved(), config, text or TEXT, self.workdir
      )
    message = str(caught.exception)
    self.assertNotIn("\n", message)
    self.assertIn(f"the run in {self.workdir} (step 7 of 2,000)", message)
    self.assertEndsWith(
      message,
      f"choose another --workdir, as in --workdir={self.workdir}-2",
    )
    return message

  def test_the_same_run(self):
    config = CONFIG.replace("data.path", "a copy").replace("eval.every", 3)
    config = config.replace("train.steps", 9)  # training/resuming.py.
    identity.check_same_run(saved(), config, TEXT, self.workdir)
    self.assertEqual(list(identity.differences(saved(), CONFIG, TEXT)), [])

  @parameterized.parameters(
    ("model.D", 128),
    ("model.norm_epsilon", 1e-5),
    ("optimizer.b1", 0.5),
    ("orders.family", "mixture"),
    ("seed", 1),
  )
  def test_another_field(self, path, value):
    message = self.refused(CONFIG.replace(path, value))
    self.assertStartsWith(message, f"config.{path}={value!r}: ")

  @parameterized.parameters("train", "valid")
  def test_another_text(self, split):
    message = self.refused(
      CONFIG.replace("data.path", "new"), TEXT | {split: OTHER}
    )
    self.assertStartsWith(message, f"config.data.path='new': the {split} text")
    self.assertIn("which has config.data.path='old'", message)
    self.assertIn("c" * 12, message)

  def test_another_reading_of_the_same_text(self):
    """The message does not name a path that is the same."""
    other = TEXT | {"train": OTHER}
    message = self.refused(CONFIG.replace("data.normalise", True), other)
    self.assertIn("which has config.data.normalise=False (sha256", message)
    message = self.refused(CONFIG, other)
    self.assertIn(
      "the text has changed since, or it begins with a byte order mark", message
    )

  @parameterized.parameters(
    ("jax_default_prng_impl", "rbg"),
    ("jax_threefry_partitionable", False),
    ("jax_random_seed_offset", 5),
  )
  def test_another_switch(self, name, value):
    checkpoint, before = saved(), jax.config.values[name]
    self.addCleanup(jax.config.update, name, before)
    jax.config.update(name, value)
    message = self.refused(checkpoint=checkpoint)
    self.assertStartsWith(message, f"{name.upper()}={value!r}: ")
    self.assertIn(f"has {before!r}", message)
    # Reading the parameters stays possible, but is another draw.
    with self.assertLogs(level="WARNING") as logs:
      identity.check_same_model(checkpoint, CONFIG, self.workdir)
    self.assertLen(logs.output, 1)
    self.assertIn(f"{name.upper()}={value!r}: ", logs.output[0])

  def test_earlier_checkpoints_record_less(self):
    checkpoint = saved()
    checkpoint.data_state.clear()
    checkpoint.data_state["text"] = {}
    identity.check_same_run(checkpoint, CONFIG, TEXT, self.workdir)
    self.assertEqual(list(identity.differences(checkpoint, None, TEXT)), [])

  def test_another_model_cannot_be_read(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, r"^config\.model\.L=3: the checkpoint in .* has 1"
    ):
      identity.check_same_model(
        saved(), CONFIG.replace("model.L", 3), self.workdir
      )
    with self.assertNoLogs(level="WARNING"):
      identity.check_same_model(
        saved(), CONFIG.replace("seed", 3), self.workdir
      )

  def test_another_directory(self):
    (self.workdir.parent / "run-2").mkdir()
    self.assertEqual(identity.another(self.workdir).name, "run-3")
    (self.workdir / "x").mkdir()
    with contextlib.chdir(self.workdir / "x"):
      for text, name in ((".", "x-2"), ("..", "run-3"), ("y", "y-2")):
        path = identity.another(epath.Path(text))
        self.assertEqual(path.name, name)
        self.assertFalse(path.exists())
      self.assertEqual(str(path), "y-2")

  def test_a_text_that_is_read_for_long(self):
    """It says so, and then what it is."""
    tokenizer, lines = tokenizers.get("char27"), []
    load = corpora.load

    def slow(*args):
      time.sleep(0.05)
      return load(*args)

    with (
      mock.patch.object(corpora, "load", slow),
      patience.of_call(0.01, lines.append),
      self.assertLogs(level="INFO") as logs,
    ):
      identity.read_text(config_lib.Data(), tokenizer, "valid")
    self.assertStartsWith(lines[0], "reading the text: ")
    self.assertRegex(logs.output[0], "text: built-in text.*: valid [0-9,]+ ch")

  def test_every_switch_is_known_to_jax(self):
    self.assertEqual(tuple(switches.streams()), switches.STREAMS)


if __name__ == "__main__":
  absltest.main()
