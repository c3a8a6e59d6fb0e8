"""A soak looks at a process, and draws its tables."""

import os
import pathlib
import tempfile

from absl.testing import absltest

from aoarm_jax.tools import soak


class SoakTest(absltest.TestCase):
  def test_an_open_file_and_memory_are_seen(self):
    before = soak._look(os.getpid())
    memory = b"x" * 200_000_000
    with open(os.devnull):
      after = soak._look(os.getpid())
    self.assertEqual(after["descriptors"], before["descriptors"] + 1)
    grown = after["rss_megabytes"] - before["rss_megabytes"]
    # Memory from before may be given back meanwhile.
    self.assertBetween(grown, 150, 210)
    self.assertLen(memory, 200_000_000)

  def test_the_step_of_a_run_that_writes(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.assertEqual(soak._step_of(folder), 0)
    line = '{"step": 7, "kind": "train"}\n'
    (folder / "metrics.jsonl").write_text(line * 500)
    self.assertEqual(soak._step_of(folder), 7)
    (folder / "metrics.jsonl").write_text(line + '{"ste')
    self.assertEqual(soak._step_of(folder), 0)

  def test_the_picture(self):
    seen = {"rss_megabytes": 3.0, "descriptors": 5, "threads": 2}
    steps = [{"step": n, "files": 9, **seen} for n in (1, 2)]
    calls = [{"call": n, "compilations": 1, **seen} for n in (10, 20)]
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "soak.png"
      soak.draw(steps, calls, str(path))
      self.assertEqual(path.read_bytes()[:4], b"\x89PNG")


if __name__ == "__main__":
  absltest.main()
