"""A tiny study from end to end, killed on the way."""

import csv
import os
import pathlib
import signal
import tempfile
from unittest import mock

import helpers
import pytest
from absl.testing import absltest
from studies import STUDY

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.study import measure

pytestmark = pytest.mark.slow


class StudyTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / "run"
    helpers.write_text(pathlib.Path(folder) / "text", test=False)
    self.enter_context(helpers.quick_compilation())
    self.command = [
      f"--config={STUDY}:tiny",
      "--mode=study",
      f"--workdir={self.workdir}",
      f"--config.data.path={folder}/text",
      "--config.train.steps=100",
      "--config.study.temperatures=2",
      "--config.study.characters=64",
    ]

  def test_killed_and_started_again(self):
    process = helpers.start(self.command)
    helpers.read_until(process, "cell 2/4")
    os.killpg(process.pid, signal.SIGKILL)
    helpers.finish(process)
    before = helpers.contents(self.workdir / "cells")
    done = {n: x for n, x in before.items() if n.endswith(measure.RESULT)}
    self.assertLen(done, 1)
    # No time is left: nothing is begun.
    helpers.run(
      [
        *self.command,
        "--config.study.limit_seconds=1",
        "--config.study.part=cells",
      ]
    )
    self.assertEqual(self.results(), done)
    with mock.patch.object(
      measure.Lab, "run", autospec=True, side_effect=measure.Lab.run
    ) as runs:
      helpers.run(self.command)
    self.assertEqual(
      [call.args[1].mechanism for call in runs.call_args_list],
      ["mdlm", "decoupled_rope", "decoupled_rope"],
    )
    self.assertLen(self.results(), 4)
    self.check_another_text_is_refused()
    self.assertEqual(self.results(), self.results() | done)
    files = helpers.contents(self.workdir / "cells")
    self.assertLess(sum(map(len, files.values())), 100_000)
    self.check_report()
    self.check_differences()
    self.check_damage_is_named()
    self.check_it_can_be_made_again()

  def results(self):
    files = helpers.contents(self.workdir / "cells")
    return {n: x for n, x in files.items() if n.endswith(measure.RESULT)}

  def check_another_text_is_refused(self):
    helpers.write_text(self.workdir.parent / "other", seed=1, test=False)
    other = f"--config.data.path={self.workdir.parent}/other"
    with self.assertRaisesRegex(config_lib.ConfigError, "another text"):
      helpers.run(
        [
          *self.command,
          other,
          "--config.seed=1",
          "--config.study.sweep=mechanism=two_stream T=16 seed=1",
        ]
      )
    # Also where nothing is left to be run.
    with self.assertRaisesRegex(config_lib.ConfigError, "another text"):
      helpers.run([*self.command, other])

  def check_damage_is_named(self):
    for name in (measure.RESULT, "windows.npz"):
      path = next((self.workdir / "cells").glob(f"mdlm*/{name}"))
      whole = path.read_bytes()
      path.write_bytes(whole[:100])
      with self.assertRaisesRegex(
        tokenizers.DataError, f"mdlm.*/{name}: damaged .* delete .*mdlm"
      ):
        helpers.run([*self.command, "--config.study.part=report"])
      path.write_bytes(whole)
    # As folders of two runs that were copied over each other.
    path, other = sorted((self.workdir / "cells").glob("decoupled*/*.npz"))[::3]
    self.assertEqual((path.name, other.name), 2 * ("profile.npz",))
    whole = path.read_bytes()
    for change in (path.unlink, lambda: path.write_bytes(other.read_bytes())):
      change()
      with self.assertRaisesRegex(
        tokenizers.DataError, "profile.npz: damaged .it is not .* delete"
      ):
        helpers.run([*self.command, "--config.study.part=report"])
    path.write_bytes(whole)

  def check_it_can_be_made_again(self):
    """From nothing but the cells' files; what is missing is shown empty."""
    report = self.workdir / "report"
    first = helpers.contents(report)
    for path in report.iterdir():
      path.unlink()
    for name in ("mine.png", "f2_delay.png"):  # The other's is stale.
      (report / name).touch()
    (gone,) = [name for name in self.results() if name.startswith("mdlm")]
    (self.workdir / "cells" / gone).unlink()
    with mock.patch.object(measure, "Lab", side_effect=AssertionError):
      helpers.run([*self.command, "--config.study.part=report"])
    again = helpers.contents(report)
    gone = {"masked.csv", "f5_masked.png"}
    self.assertEqual(set(again), {*first, "mine.png"} - gone)
    self.assertEqual(again["locality.csv"], first["locality.csv"])
    text = " ".join(again["README.md"].decode().split())
    self.assertIn("3 of 4 of `study_tradeoff` are done", text)
    self.assertIn("not done: 1 of `mdlm` at T = 16.", text)

  def table(self, name):
    text = (self.workdir / f"report/{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))

  def check_report(self):
    report = self.workdir / "report"
    text = (report / "README.md").read_text()
    self.assertIn("4 of 4 of `study_tradeoff` are done", text)
    self.assertNotIn(str(self.workdir), text)
    for name in ("f1_bits", "f3_locality", "f5_masked"):
      self.assertGreater((report / f"{name}.png").stat().st_size, 1000)
      self.assertIn(f"({name}.png)", text)

  def check_differences(self):
    """The mean of paired differences is the difference of the means."""
    runs = self.table("runs")
    self.assertLen(runs, 4)
    for row in runs:
      self.assertBetween(float(row["area_from_4"]), 0, 1)
    bits = {
      (row["arm"], row["steps"]): float(row["any_order"])
      for row in runs
      if row["arm"] != "mdlm"
    }
    rows = self.table("differences")
    self.assertLen(rows, 3)
    for row in rows:
      if row["arm"] == "decoupled_rope" and row["equal"] == "steps":
        wanted = bits["decoupled_rope", "100"] - bits["two_stream", "100"]
        self.assertAlmostEqual(float(row["difference_bits"]), wanted, places=4)
        self.assertGreater(float(row["half_of_95_percent"]), 0)


if __name__ == "__main__":
  absltest.main()
