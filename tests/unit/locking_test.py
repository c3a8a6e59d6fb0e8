"""Tests of runs/locking.py: who may write into a run directory."""

import contextlib
import os
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import locking


class LockTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_a_second_process_is_kept_out(self):
    """The lock names who holds it, and goes with its holder."""
    with (
      locking.lock(self.workdir),
      self.assertRaisesRegex(
        config_lib.ConfigError,
        rf"process {os.getpid()} on .* is training there",
      ),
      locking.lock(self.workdir),
    ):
      pass
    with locking.lock(self.workdir):
      pass

  def test_a_folder_that_cannot_be_written_to_needs_no_lock(self):
    """A finished run there is told to be finished."""
    for is_writable in (False, True):
      with (
        mock.patch.object(os, "open", side_effect=PermissionError),
        mock.patch.object(os, "access", return_value=is_writable),
        self.assertRaises(PermissionError)
        if is_writable
        else contextlib.nullcontext(),
        locking.lock(self.workdir),
      ):
        pass

  @parameterized.parameters("link", "pipe", "folder")
  def test_a_lock_that_is_no_file_is_left_alone(self, kind):
    path, other = self.workdir / ".lock", self.workdir / "other"
    other.write_text("of somebody else")
    match kind:
      case "link":
        os.symlink(other, path)
      case "pipe":
        os.mkfifo(path)
      case "folder":
        path.mkdir()
    with (
      self.assertRaisesRegex(config_lib.ConfigError, r"\.lock: is .*; delete"),
      locking.lock(self.workdir),
    ):
      pass
    self.assertEqual(other.read_text(), "of somebody else")


if __name__ == "__main__":
  absltest.main()
