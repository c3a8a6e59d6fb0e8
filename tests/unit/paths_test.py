"""One text is one place, whichever flag or field it is given for."""

import argparse
import os
import pathlib
import tempfile
from unittest import mock

import helpers
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, tokenizers
from aoarm_jax.evaluation import evaluate
from aoarm_jax.generation import prompts
from aoarm_jax.runs import checkpoint
from aoarm_jax.study import sweep
from aoarm_jax.tools import arguments
from aoarm_jax.training import loop as train

ADDRESSES = (
  "http://x.org/text8.zip",
  "HTTPS://x.org/x",
  "hf://x/y",
  "file:///x",
  "gs:/x",
)


class PathsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.home = pathlib.Path(
      self.enterContext(tempfile.TemporaryDirectory())
    ).resolve()
    self.enterContext(mock.patch.dict(os.environ, HOME=str(self.home)))

  def test_home_is_home(self):
    self.assertEqual(str(paths.of("~/x", "--workdir")), f"{self.home}/x")
    self.assertEqual(paths.of("~", "--workdir").name, self.home.name)

  @parameterized.parameters(
    "x", "/x", "./~x", "a/~/b", "x:y", "gs://b/x", "C:/"
  )
  def test_other_texts_stay(self, text):
    self.assertEqual(
      str(paths.of(text, "--workdir")), text.removeprefix("./").rstrip("/")
    )

  @parameterized.parameters(*ADDRESSES, "~nobody_of_this_name/x")
  def test_refused(self, text):
    with self.assertRaisesRegex(
      config_lib.ConfigError, f"^--workdir={text}: [^\n]+$"
    ):
      paths.of(text, "--workdir")

  @parameterized.parameters(b"/x", None, 3)
  def test_no_path(self, text):
    with self.assertRaisesRegex(
      config_lib.ConfigError, f"^workdir={text!r}: is no path; give a str"
    ):
      aoarm_jax.load(text)

  def test_a_bucket_without_its_client(self):
    with (
      mock.patch.object(
        type(paths.epath.Path("x")), "exists", side_effect=ImportError("gcsfs")
      ),
      self.assertRaisesRegex(config_lib.ConfigError, "^--workdir=gs://b: gcs"),
    ):
      paths.reached(paths.of("gs://b", "--workdir"), "--workdir")

  def seen(self, module, name, *command):
    """The arguments with which the program calls a function."""
    with mock.patch.object(module, name, autospec=True) as function:
      helpers.run(helpers.arguments("~/run", {}, *command))
    return function.call_args.args

  def test_flags(self):
    self.assertEqual(str(self.seen(train, "train")[1]), str(self.home / "run"))
    self.assertEqual(
      str(self.seen(evaluate, "evaluate", "--mode=eval")[1]),
      str(self.home / "run"),
    )
    (self.home / "prompts").write_text("a_\n")
    self.assertEqual(prompts.read_lines("~/prompts")[0][1], "a_")

  def test_the_experiment_s_file(self):
    source = helpers.ROOT / "configs" / "two_stream.py"
    (self.home / "mine.py").write_text(source.read_text())
    config = helpers.config_of(["--config=~/mine.py:tiny"])
    self.assertEqual(config.variant, "tiny")

  def test_texts(self):
    helpers.write_text(self.home / "text")
    corpus = corpora.load("auto", "~/text", tokenizers.get("char27"))
    self.assertLen(corpus.split("valid"), 1000)

  def test_checkpoints_lie_where_the_run_does(self):
    """Only the door knows a home folder."""
    with tempfile.TemporaryDirectory() as folder:
      self.enterContext(mock.patch.object(os, "getcwd", return_value=folder))
      made = checkpoint.Checkpoints("~/x", keep_last=1, keep_best=0)
      self.assertEqual(str(made._steps.directory), f"{folder}/~/x")

  @parameterized.parameters(*ADDRESSES)
  def test_addresses_are_refused_at_every_door(self, text):
    tokenizer = tokenizers.get("char27")
    config = config_lib.Config(
      study=config_lib.Study(sweep="mechanism=two_stream", report=text)
    )
    for read in (
      lambda: helpers.run(
        [f"--config={helpers.TINY}", f"--workdir={text}", "--mode=eval"]
      ),
      lambda: aoarm_jax.load(text),
      lambda: corpora.load("auto", text, tokenizer),
      lambda: prompts.read_lines(text),
      lambda: sweep.study(config, paths.of("x", "")),
    ):
      with self.assertRaises(config_lib.ConfigError) as caught:
        read()
      self.assertNotIn("\n", str(caught.exception))
    for kind in (arguments.place, arguments.output):
      with self.assertRaisesRegex(
        argparse.ArgumentTypeError, f"^{text}: addresses"
      ):
        kind(text)


if __name__ == "__main__":
  absltest.main()
