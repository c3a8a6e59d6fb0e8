"""Files of prompts and texts: where they may come from, and their size."""

import io
import os
import pathlib
import sys
import tempfile
import threading
from unittest import mock

from absl.testing import absltest

from aoarm_jax.generation import prompts


class ReadLinesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )

  def refused(self, path):
    with self.assertRaises(prompts.PromptError) as caught:
      prompts.read_lines(path)
    return str(caught.exception)

  def test_a_device(self):
    self.assertStartsWith(
      self.refused("/dev/zero"), "--input=/dev/zero: is a device"
    )

  def test_a_pipe(self):
    """As a shell makes it of --input=<(command)."""
    path = self.folder / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("ab\ncd\n",))
    writer.start()
    lines = prompts.read_lines(str(path))
    writer.join()
    self.assertEqual([text for _, text in lines], ["ab", "cd"])

  def test_too_long(self):
    self.enter_context(mock.patch.object(prompts, "_MOST_INPUT", 5))
    path = self.folder / "long.txt"
    path.write_text("abc\nde\n")
    self.assertEqual(
      self.refused(str(path)),
      f"{path}: more than 5 bytes; cut it into several files",
    )
    stdin = io.TextIOWrapper(io.BytesIO(b"abcdef"))
    self.enter_context(mock.patch.object(sys, "stdin", stdin))
    self.assertStartsWith(self.refused("-"), "standard input: more than 5")


if __name__ == "__main__":
  absltest.main()
