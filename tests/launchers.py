"""Helpers of the tests of launchers: one call, and clients of ours."""

import contextlib
import io
import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from launch import common, gke, local, slurm, tpu_pod

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCHERS = {"gke": gke, "local": local, "slurm": slurm, "tpu_pod": tpu_pod}
TRAIN = [
  "python",
  "-m",
  "aoarm_jax.main",
  "--config=c.py",
  "--workdir=gs://b/r",
]
POD = ["--name=pod", "--zone=us-east5-a"]
SLICE = [*POD, "--accelerator=v5p-256"]
APPLY = ["apply", "--name=run", "--image=i:1"]
SUBMIT = ["submit", "--name=run", "--nodes=1"]


def launch(launcher, *argv, command=TRAIN, path=""):
  """(exit code, stdout, stderr) of a launcher, where PATH has no client."""
  out, err = io.StringIO(), io.StringIO()
  module = LAUNCHERS[launcher]
  words = [*argv, "--", *command] if command else argv
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    absltest.mock.patch.dict(os.environ, {"PATH": path}),
  ):
    code = common.main(module.make_parser, module.start, words)
  return code, out.getvalue(), err.getvalue()


class LaunchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(contextlib.chdir(self.folder))

  def client(self, name, script):
    """Puts a client of ours into the folder bin."""
    path = self.folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)

  def refused(self, *argv, **kwargs):
    """The one line of a command that cannot be."""
    code, out, err = launch(*argv, **kwargs)
    self.assertEqual((code, out), (2, ""), err)
    self.assertLen(err.splitlines(), 1)
    self.assertEmpty(os.listdir(self.folder))
    return err
