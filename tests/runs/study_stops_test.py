"""A study ends soon after a signal, and notices that its directory is gone."""

import os
import pathlib
import shutil
import signal
import tempfile
from unittest import mock

import helpers
import numpy as np
from absl.testing import absltest, parameterized
from etils import epath
from studies import STUDY

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import stopping
from aoarm_jax.runs import checkpoint, locking
from aoarm_jax.study import measure, place, trunks

COMPILES_FOR_EVER = """
import time
from aoarm_jax.study import programs
programs.Programs._compile = lambda *args: time.sleep(1000)
"""


class StudyStopsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.workdir = self.folder / "run"
    helpers.write_text(self.folder / "text", test=False)
    self.command = [
      f"--config={STUDY}:tiny",
      "--mode=study",
      f"--workdir={self.workdir}",
      f"--config.data.path={folder}/text",
    ]

  def test_a_signal_while_a_program_compiles(self):
    process = helpers.start(self.command, code=COMPILES_FOR_EVER)
    helpers.read_until(process, "cell 1/4")
    process.terminate()
    code, _, err = helpers.finish(process)  # Soon, or it is killed.
    self.assertEqual(code, 75, err)
    self.assertIn("SIGTERM: start the same command again", err)

  def test_the_directory_goes_while_a_cell_runs(self):
    ran = []

    def run(lab, cell, config, folder, keeper=None, where=None):
      ran.append(cell)
      shutil.rmtree(self.workdir)
      path = where(folder) / "result.json"
      path.parent.mkdir(parents=True)
      path.write_text("{}")
      return {"seconds": {"all": 1.0}, "training_flops": 1.0}

    with (
      mock.patch.object(measure.Lab, "run", run),
      self.assertRaises(locking.EvictedError) as caught,
    ):
      helpers.run(self.command)
    other = self.folder / "run-2"
    self.assertStartsWith(
      str(caught.exception), f"--workdir={self.workdir} was removed, moved or"
    )
    self.assertIn(f"the last files are in {other}: copy", str(caught.exception))
    self.assertLen(list(other.glob("cells/*/result.json")), 1)
    self.assertLen(ran, 1)
    self.assertFalse(self.workdir.exists())


class KeeperTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.study = epath.Path(folder) / "study"

  def keeper(self, where):
    config = config_lib.Config()
    for field, value in (
      ("train.steps", 100),
      ("optimizer.decay_steps", 20),
      ("checkpoint.every", 10),
    ):
      config = config.replace(field, value)
    keeper = trunks.Keeper(
      config,
      self.study / "trunks" / "a",
      self.study / "cells" / "a" / "branch",
      text={},
      deadline=None,
      where=where,
    )
    self.addCleanup(keeper.close)
    return keeper

  def test_a_signal_ends_the_run_after_a_save(self):
    keeper = self.keeper(lambda folder: folder)
    before = signal.getsignal(signal.SIGTERM)
    with self.assertRaises(stopping.Stopped) as caught, keeper:
      self.assertFalse(keeper.due(7))
      os.kill(os.getpid(), signal.SIGTERM)
      self.assertTrue(keeper.due(7))
      keeper.save(7, {"x": np.ones(3)}, [1.0])
    self.assertEqual(caught.exception.exit_code, 75)
    self.assertStartsWith(str(caught.exception), "SIGTERM at step 7 of this")
    self.assertEqual(signal.getsignal(signal.SIGTERM), before)
    self.assert_saved(self.study / "trunks" / "a", 7)

  def test_a_signal_after_the_last_save_is_not_lost(self):
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    self.addCleanup(signal.signal, signal.SIGTERM, before)
    with self.keeper(lambda folder: folder):
      os.kill(os.getpid(), signal.SIGTERM)
    self.assertEqual(caught, [1])

  def test_the_directory_is_gone(self):
    where = place.Place(self.study)
    with where.watched():
      where.check()
      keeper = self.keeper(where.of)
      keeper.save(10, {"x": np.ones(3)}, [1.0])
      keeper._trunk.wait()
      self.study.rmtree()
      with self.assertRaisesRegex(trunks.GoneError, "step 20 is saved in"):
        keeper.save(20, {"x": np.ones(3)}, [1.0])
      self.assertFalse(self.study.exists())
      other = self.study.with_name("study-2")
      self.assert_saved(other / "trunks" / "a", 20)
      with self.assertRaisesRegex(
        locking.EvictedError, f"are in {other}: copy"
      ):
        where.check()

  def assert_saved(self, folder, step):
    with checkpoint.Checkpoints(folder, keep_last=1, keep_best=0) as saves:
      self.assertEqual(saves.newest().step, step)


if __name__ == "__main__":
  absltest.main()
