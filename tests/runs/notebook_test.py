"""The notebook of the documentation: it runs from top to bottom."""

import ast
import pathlib
import re
import subprocess
import sys
import tempfile

import helpers
import pytest
from absl.testing import absltest

NOTEBOOK = helpers.ROOT / "docs" / "notebook.py"


class NotebookTest(absltest.TestCase):
  def test_it_is_made_of_cells(self):
    """As jupytext's percent format has them: text in comments, then code."""
    head, *cells = re.split(r"^# %%", NOTEBOOK.read_text(), flags=re.MULTILINE)
    self.assertIn("format_name: percent", head)
    self.assertGreater(len(cells), 10)
    for cell in cells:
      first, _, rest = cell.partition("\n")
      if first == " [markdown]":
        for line in filter(None, rest.splitlines()):
          self.assertStartsWith(line, "#")
      else:
        self.assertEqual(first, "")
        ast.parse(rest)

  @pytest.mark.thorough
  def test_it_runs(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    with helpers.quick_compilation():
      done = subprocess.run(
        [sys.executable, NOTEBOOK],
        cwd=folder,
        env=helpers.environment(NOTEBOOK_STEPS="10"),
        capture_output=True,
        text=True,
      )
    self.assertEqual(done.returncode, 0, done.stderr)
    lines = done.stdout.splitlines()
    self.assertStartsWith(lines[0], "<aoarm_jax.Model '")
    for line in lines[1:5]:
      self.assertRegex(line, r"^ *-\d+\.\d\d  she said noth... to her moth..")
    likely, unlikely = (float(line.split()[0]) for line in lines[5:7])
    self.assertLess(likely + 20, unlikely)
    order = [line for line in lines if line.startswith("she opened the ")]
    self.assertEqual([line.count("_") for line in order], [12, 9, 6, 3, 0])
    bits = [line for line in lines if line.endswith("bits per character")]
    names = [line.split(":")[0] for line in bits]
    self.assertEqual(names, ["two_stream", "mdlm"])
    page = (folder / "replay.html").read_text()
    self.assertIn("mdlm, four steps", page)


if __name__ == "__main__":
  absltest.main()
