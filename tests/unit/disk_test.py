"""Tests of runs/disk.py: files that are whole at any moment."""

import errno
import json
import math
import os
import tempfile
from unittest import mock

from absl.testing import absltest
from etils import epath

from aoarm_jax.runs import disk


class WriteTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_a_link_of_the_temporary_name_is_not_followed(self):
    other = self.workdir / "other"
    other.write_text("of somebody else")
    temporary = self.workdir / f".file.{os.getpid()}.tmp"
    os.symlink(other, temporary)
    disk.write_atomically(self.workdir / "file", "ours")
    self.assertEqual(other.read_text(), "of somebody else")
    self.assertEqual((self.workdir / "file").read_text(), "ours")

  def test_what_cannot_be_written_is_logged(self):
    (self.workdir / "file").write_text("")
    path = self.workdir / "file" / "x.json"
    with self.assertLogs(level="WARNING") as logs:
      written = disk.attempt(lambda: disk.write_atomically(path, "x"))
    self.assertFalse(written)
    self.assertRegex(logs.output[0], "not written: .*file: .*[Ee]xists")
    path = self.workdir / "x.json"
    self.assertTrue(disk.attempt(lambda: path.write_text("x")))
    with self.assertRaises(ValueError):  # A defect of the program.
      disk.attempt(lambda: path.write_text(int("x")))

  def test_the_file_is_named_where_nothing_can_be_written_or_removed(self):
    """As on a file system that is read-only."""
    read_only = OSError(errno.EROFS, "Read-only file system", ".x.tmp")
    with (
      mock.patch("builtins.open", side_effect=read_only),
      mock.patch("pathlib.Path.unlink", side_effect=read_only),
      self.assertRaises(OSError) as caught,
    ):
      disk.write_atomically(self.workdir / "x.json", "x")
    self.assertEqual(caught.exception.filename, str(self.workdir / "x.json"))


class JsonTest(absltest.TestCase):
  def test_no_number_is_null(self):
    value = {"a": [1, math.nan, {"b": (math.inf, 2.5, True)}], "c": "NaN"}
    read = json.loads(disk.to_json(value), parse_constant=self.fail)
    self.assertEqual(
      read, {"a": [1, None, {"b": [None, 2.5, True]}], "c": "NaN"}
    )


if __name__ == "__main__":
  absltest.main()
