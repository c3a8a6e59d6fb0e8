"""Tests of runs/directory.py: metrics.jsonl, and files that explain a run."""

import contextlib
import errno
import json
import math
import os
import subprocess
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config
from aoarm_jax.runs import directory as run_dir


class _FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.metrics = self.workdir / "metrics.jsonl"

  def writer(self, start_step=0, *, primary=True):
    return run_dir.MetricsWriter(
      self.workdir, start_step=start_step, primary=primary
    )


class MetricsTest(_FolderTest):
  def test_records_come_back(self):
    with self.writer() as writer:
      writer.write(
        np.int32(5),
        "valid",
        estimator="any_order",
        bits_per_char=np.float32(2.5),
        nats_per_token=jnp.float32(1.5),
        slot_curve_bits=np.array([4.0, 0.5]),
        mfu=None,
      )
    self.assertEqual(
      run_dir.read_metrics(self.workdir),
      [
        dict(
          step=5,
          kind="valid",
          estimator="any_order",
          bits_per_char=2.5,
          nats_per_token=1.5,
          slot_curve_bits=[4.0, 0.5],
          mfu=None,
        )
      ],
    )

  def test_no_file_is_no_records(self):
    self.assertEqual(run_dir.read_metrics(self.workdir), [])

  def test_a_record_is_on_disk_at_once(self):
    writer = self.writer()
    writer.write(1, "train", loss_nats_per_token=2.0)
    self.assertLen(run_dir.read_metrics(self.workdir), 1)
    writer.close()
    writer.close()
    with self.assertRaisesRegex(ValueError, "closed"):
      writer.write(2, "train", loss_nats_per_token=2.0)

  def test_non_finite_values_are_null(self):
    with self.writer() as writer:
      writer.write(
        1, "train", a=math.nan, b=jnp.float32(jnp.inf), c=[1.0, -math.inf]
      )

    def refuse(token):
      raise AssertionError(f"{token} is not JSON")

    record = json.loads(self.metrics.read_text(), parse_constant=refuse)
    self.assertEqual(record["a"], None)
    self.assertEqual(record["b"], None)
    self.assertEqual(record["c"], [1.0, None])

  def test_a_value_that_cannot_be_written_is_named(self):
    with self.writer() as writer, self.assertRaisesRegex(TypeError, "metric a"):
      writer.write(1, "train", a=object())

  def _run(self, start, stop):
    """A run that validates when it starts and after every third step."""
    with self.writer(start) as writer:
      for step in range(start, stop + 1):
        if step > start:
          writer.write(step, "train", loss_nats_per_token=1 / step)
        if step % 3 == 0:
          for estimator in ("any_order", "left_to_right"):
            writer.write(step, "valid", estimator=estimator, bits_per_char=2.0)

  @parameterized.parameters(3, 6, 7)
  def test_resumed_file_equals_an_uninterrupted_one(self, resumed_from):
    self._run(0, 10)
    whole = self.metrics.read_text()
    self._run(0, 8)
    with open(self.metrics, "a") as file:
      file.write('{"step": 9, "kind": "tr')  # killed here
    self._run(resumed_from, 10)
    self.assertEqual(self.metrics.read_text(), whole)
    self.assertEqual(
      [p.name for p in self.workdir.iterdir()], ["metrics.jsonl"]
    )

  def test_a_run_from_the_start_starts_the_file_anew(self):
    self._run(0, 4)
    self._run(0, 2)
    self.assertEqual(run_dir.read_metrics(self.workdir)[-1]["step"], 2)

  def test_partial_last_line_is_passed_over(self):
    self.metrics.write_bytes(b'{"step": 1, "kind": "train"}\n{"step": \xff')
    self.assertLen(run_dir.read_metrics(self.workdir), 1)

  def test_damage_elsewhere_is_left_out_with_a_warning(self):
    """Metrics never keep a run from being resumed."""
    with self.writer() as writer:
      writer.write(1, "train", loss=1.0)
    path = self.workdir / "metrics.jsonl"
    path.write_text('{"st\n' + path.read_text())
    with self.assertLogs(level="WARNING") as log:
      self.assertLen(run_dir.read_metrics(self.workdir), 1)
    self.assertRegex(log.output[0], r"metrics\.jsonl, line 1 is left out")

  def test_a_second_process_is_kept_out(self):
    """The lock names who holds it, and goes with its holder."""
    with (
      run_dir.lock(self.workdir),
      self.assertRaisesRegex(
        config.ConfigError, rf"process {os.getpid()} on .* is training there"
      ),
      run_dir.lock(self.workdir),
    ):
      pass
    with run_dir.lock(self.workdir):
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
        run_dir.lock(self.workdir),
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
      self.assertRaisesRegex(config.ConfigError, r"\.lock: is .*; delete"),
      run_dir.lock(self.workdir),
    ):
      pass
    self.assertEqual(other.read_text(), "of somebody else")

  def test_a_full_disk_is_named(self):
    """A write to an open file names no file by itself."""
    with self.writer() as writer:
      writer._file.close()
      writer._file = open("/dev/full", "w")  # noqa: SIM115
      with self.assertRaisesRegex(OSError, r"No space .*metrics\.jsonl"):
        writer.write(1, "train", loss=1.0)
      with self.assertRaisesRegex(OSError, r"No space .*metrics\.jsonl"):
        writer.close()
      writer._file = None

  def test_a_link_of_the_temporary_name_is_not_followed(self):
    other = self.workdir / "other"
    other.write_text("of somebody else")
    temporary = self.workdir / f".file.{os.getpid()}.tmp"
    os.symlink(other, temporary)
    run_dir.write_atomically(self.workdir / "file", "ours")
    self.assertEqual(other.read_text(), "of somebody else")
    self.assertEqual((self.workdir / "file").read_text(), "ours")

  def test_other_processes_write_nothing(self):
    with self.writer(primary=False) as writer:
      writer.write(1, "train", loss_nats_per_token=2.0)
    self.assertEmpty(list(self.workdir.iterdir()))

  def test_where_files_cannot_grow_the_file_is_rewritten(self):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(run_dir, "_is_local", lambda path: False)
      with self.writer() as writer:
        writer.write(1, "train", loss_nats_per_token=2.0)
        self.assertEmpty(run_dir.read_metrics(self.workdir))
        patch.setattr(run_dir, "_REMOTE_FLUSH_SECONDS", -1.0)
        writer.write(2, "train", loss_nats_per_token=2.0)
        self.assertLen(run_dir.read_metrics(self.workdir), 2)
        patch.setattr(run_dir, "_REMOTE_FLUSH_SECONDS", 60.0)
        writer.write(3, "train", loss_nats_per_token=2.0)
    self.assertLen(run_dir.read_metrics(self.workdir), 3)


class WriteTest(_FolderTest):
  def test_a_run_directory_is_a_folder(self):
    file = self.workdir / "file"
    file.write_text("")
    for path in (file, file / "x" / "y"):
      with self.assertRaisesRegex(
        config.ConfigError, f"--workdir={path}: {file} is a file; name a folder"
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
      config.ConfigError, f"{name}: is a folder, and training writes a file"
    ):
      run_dir.check_places(self.workdir)

  def test_a_file_in_place_of_a_folder(self):
    (self.workdir / "samples").touch()
    with self.assertRaisesRegex(
      config.ConfigError, "samples: is a file, and training writes a folder"
    ):
      run_dir.check_places(self.workdir)

  def test_what_cannot_be_written_is_logged(self):
    (self.workdir / "file").write_text("")
    path = self.workdir / "file" / "x.json"
    with self.assertLogs(level="WARNING") as logs:
      written = run_dir.attempt(lambda: run_dir.write_atomically(path, "x"))
    self.assertFalse(written)
    self.assertRegex(logs.output[0], "not written: .*file: .*[Ee]xists")
    path = self.workdir / "x.json"
    self.assertTrue(run_dir.attempt(lambda: path.write_text("x")))
    with self.assertRaises(ValueError):  # A defect of the program.
      run_dir.attempt(lambda: path.write_text(int("x")))

  def test_the_file_is_named_where_nothing_can_be_written_or_removed(self):
    """As on a file system that is read-only."""
    read_only = OSError(errno.EROFS, "Read-only file system", ".x.tmp")
    with (
      mock.patch("builtins.open", side_effect=read_only),
      mock.patch("pathlib.Path.unlink", side_effect=read_only),
      self.assertRaises(OSError) as caught,
    ):
      run_dir.write_atomically(self.workdir / "x.json", "x")
    self.assertEqual(caught.exception.filename, str(self.workdir / "x.json"))


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
      config_json=config.to_json(config.Config()),
      argv=argv,
      params=self.params,
    )

  def test_describe_run(self):
    self._describe("main.py", "--config=a.py", "--prompt=the qu___")
    self._describe("tool", "--prompt=two\nlines")
    self.assertEqual(
      config.from_json((self.workdir / "config.json").read_text()),
      config.Config(),
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


class JsonTest(absltest.TestCase):
  def test_no_number_is_null(self):
    value = {"a": [1, math.nan, {"b": (math.inf, 2.5, True)}], "c": "NaN"}
    read = json.loads(run_dir.to_json(value), parse_constant=self.fail)
    self.assertEqual(
      read, {"a": [1, None, {"b": [None, 2.5, True]}], "c": "NaN"}
    )


if __name__ == "__main__":
  absltest.main()
