"""Tests of runs/directory.py: places, and files that explain a run."""

import json
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import directory as run_dir


class _FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))


class PlacesTest(_FolderTest):
  def test_a_run_directory_is_a_folder(self):
    file = self.workdir / "file"
    file.write_text("")
    for path in (file, file / "x" / "y"):
      with self.assertRaisesRegex(
        config_lib.ConfigError,
        f"--workdir={path}: {file} is a file; name a folder",
      ):
        run_dir.check_workdir(path)
    run_dir.check_workdir(self.workdir)
    run_dir.check_workdir(self.workdir / "new" / "x")
    run_dir.check_workdir("gs://bucket/x")

  @parameterized.parameters("metrics.jsonl", "loss.png", ".shared")
  def test_a_folder_in_place_of_a_file(self, name):
    run_dir.check_places(self.workdir)
    (self.workdir / name).mkdir()
    with self.assertRaisesRegex(
      config_lib.ConfigError, f"{name}: is a folder, and training writes a file"
    ):
      run_dir.check_places(self.workdir)

  def test_a_file_in_place_of_a_folder(self):
    (self.workdir / "samples").touch()
    with self.assertRaisesRegex(
      config_lib.ConfigError, "samples: is a file, and training writes a folder"
    ):
      run_dir.check_places(self.workdir)


class RunDirTest(_FolderTest):
  def setUp(self):
    super().setUp()
    self.params = {
      "embed": jax.ShapeDtypeStruct((28, 6), jnp.float32),
      "layers": [{"scale": np.ones(6, np.float32)}, {"step": jnp.int32(3)}],
    }

  def test_parameter_table(self):
    self.assertEqual(run_dir.parameter_count(self.params), 28 * 6 + 6 + 1)
    lines = run_dir.parameter_table(self.params).splitlines()
    self.assertEqual(lines[0].split(), ["path", "shape", "dtype", "count"])
    self.assertEqual(
      lines[1].split(), ["embed", "28", "x", "6", "float32", "168"]
    )
    self.assertEqual(lines[2].split(), ["layers/0/scale", "6", "float32", "6"])
    self.assertEqual(lines[3].split()[1:], ["scalar", "int32", "1"])
    self.assertEqual(lines[-1].split(), ["total", "0.0", "MiB", "175"])
    self.assertLen({len(line) for line in lines}, 1)

  def test_a_parameter_may_be_called_value(self):
    table = run_dir.parameter_table({"attention": {"value": np.ones(3)}})
    self.assertIn("attention/value ", table)

  def _describe(self, *argv):
    run_dir.describe_run(
      self.workdir,
      config_json=config_lib.to_json(config_lib.Config()),
      argv=argv,
      params=self.params,
    )

  def test_describe_run(self):
    self._describe("main.py", "--config=a.py", "--prompt=the qu___")
    self._describe("tool", "--prompt=two\nlines")
    self.assertEqual(
      config_lib.from_json((self.workdir / "config.json").read_text()),
      config_lib.Config(),
    )
    lines = (self.workdir / "command.txt").read_text().splitlines()
    self.assertLen(lines, 2)
    self.assertEndsWith(
      lines[0], "  python main.py --config=a.py '--prompt=the qu___'"
    )
    self.assertEndsWith(lines[1], r"  tool '--prompt=two\nlines'")
    versions = json.loads((self.workdir / "versions.json").read_text())
    self.assertEqual(versions["jax"], jax.__version__)
    self.assertEqual(versions["device_count"], jax.device_count())
    self.assertIn("git_commit", versions)
    self.assertIn(
      "175", (self.workdir / "parameters.txt").read_text().splitlines()[-1]
    )
    self.assertLen(list(self.workdir.iterdir()), 4)

  def test_git_state(self):
    folder = self.workdir / "checkout"
    folder.mkdir()
    source, other = folder / "a.py", folder / "b.py"
    source.write_text("x = 1\n")
    other.write_text("x = 1\n")

    def git(*arguments):
      identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
      subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
      )

    self.assertEqual(run_dir._git_state(source), (None, None))
    git("init", "-q")
    git("add", "a.py")
    self.assertEqual(run_dir._git_state(source), (None, None))  # no commit
    git("commit", "-q", "-m", "first")
    commit, is_dirty = run_dir._git_state(source)
    self.assertLen(commit, 40)
    self.assertTrue(is_dirty)  # b.py
    self.assertEqual(run_dir._git_state(other), (None, None))
    other.unlink()
    self.assertFalse(run_dir._git_state(source)[1])


if __name__ == "__main__":
  absltest.main()
