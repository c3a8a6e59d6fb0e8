"""Which cells of a study run, at which rates, and what becomes of failures."""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
import weakref
from concurrent import futures
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest
from etils import epath
from studies import config

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, tokenizers
from aoarm_jax.runs import telemetry
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import measure, sweep
from aoarm_jax.study import results as results_lib


class SharesTest(absltest.TestCase):
  def test_shares_are_all_cells_once_with_the_trials_that_they_need(self):
    study = config("seed=0,1,2 mechanism=two_stream,mdlm rate=tuned")
    cells = cells_lib.expand(study)
    seen = []
    for index in range(4):
      share = dataclasses.replace(study.study, share_index=index, share_count=4)
      mine = sweep.chosen(dataclasses.replace(study, study=share), cells)
      for cell in mine:
        for trial in cells_lib.trials(cell, study):
          self.assertLess(mine.index(trial), mine.index(cell))
      seen += [cell for cell in mine if cell in cells]
    self.assertCountEqual(seen, cells)

  def test_trials_may_be_chosen_by_their_labels(self):
    study = config("mechanism=two_stream,mdlm rate=tuned", cells="rate=0.004")
    mine = sweep.chosen(study, cells_lib.expand(study))
    self.assertEqual([cell.rate for cell in mine], ["0.004"] * 2)

  def test_a_limit_shorter_than_a_cell_is_said(self):
    study = config("mechanism=two_stream,mdlm", limit_seconds=10)
    cells, clock = cells_lib.expand(study), sweep._Clock()
    results = results_lib.Results(study, epath.Path("/absent"))
    for seconds, said in (
      (30.0, "takes about 30 s: raise the limit"),
      (8.0, "start the same command again"),
    ):
      with mock.patch.object(sweep, "_seconds_left", return_value=seconds):
        start = time.monotonic() - 5
        self.assertFalse(sweep._fits(clock, cells[0], start, results))
        self.assertTrue(sweep._fits(clock, cells[0], start + 40, results))
        with self.assertLogs(level="INFO") as logs:
          sweep._say_what_is_left(clock, cells, results)
      self.assertIn(said, logs.output[0])

  def test_a_shorter_cell_fills_the_time_that_is_left(self):
    self.assertEqual(self.started(lambda cell: cell.T <= 16), [8, 16])
    self.assertEqual(self.started(lambda cell: True), [32, 8, 64, 16])
    self.assertEqual(self.started(lambda cell: False), [])

  def started(self, fits):
    """The lengths of the cells that are begun."""
    study = config("T=32,8,64,16 mechanism=two_stream")
    with tempfile.TemporaryDirectory() as folder:
      results = results_lib.Results(study, epath.Path(folder))
      with (
        mock.patch.object(
          sweep, "_fits", side_effect=lambda _, cell, *args: fits(cell)
        ),
        mock.patch.object(sweep, "_run_cell") as run,
        mock.patch.object(sweep, "pipeline"),
        mock.patch.object(sweep, "measure"),
        mock.patch.object(sweep.programs_lib, "Programs"),
      ):
        sweep._run_cells(study, cells_lib.expand(study), results)
    return [call.args[2].T for call in run.call_args_list]

  def test_a_report_is_no_file(self):
    study = config("mechanism=two_stream", report=__file__)
    with self.assertRaisesRegex(config_lib.ConfigError, "name a folder"):
      sweep.study(study, epath.Path("/absent"))

  def test_an_empty_share_is_no_error(self):
    study = config(
      "seed=0,1", share_index=2, share_count=3, part="cells", cells="two_stream"
    )
    with (
      mock.patch.object(measure, "Lab", side_effect=AssertionError),
      self.assertLogs(level="INFO") as logs,
    ):
      sweep.study(study, epath.Path("/absent"))
    self.assertIn("nothing to do in this share", "".join(logs.output))

  def test_cells_by_their_label(self):
    study = config("T=128,1024 mechanism=two_stream,mdlm")
    cells = cells_lib.expand(study)
    study = dataclasses.replace(study.study, cells="T=1024,mdlm")
    mine = sweep.chosen(config_lib.Config(study=study), cells)
    self.assertEqual(
      [(cell.T, cell.mechanism) for cell in mine],
      [(128, "mdlm"), (1024, "two_stream"), (1024, "mdlm")],
    )
    study = dataclasses.replace(study, cells="T=128 two_stream, mdlm T=1024")
    mine = sweep.chosen(config_lib.Config(study=study), cells)
    self.assertEqual(
      [(cell.T, cell.mechanism) for cell in mine],
      [(128, "two_stream"), (1024, "mdlm")],
    )
    # A part of a word is none: T=1 is not the beginning of T=1024.
    study = dataclasses.replace(study, cells="T=1")
    with self.assertRaisesRegex(config_lib.ConfigError, "no cell's label"):
      sweep.chosen(config_lib.Config(study=study), cells)


class FailureTest(absltest.TestCase):
  """A cell that fails stops no other, and the next start knows it."""

  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.config = config("mechanism=two_stream,mdlm,ao_gpt")
    corpus = mock.Mock(tokenizer=tokenizers.get("char27"))
    corpus.hash.return_value = "0"
    corpus.split.return_value = np.zeros(200, np.uint8)
    self.enter_context(mock.patch.object(corpora, "load", return_value=corpus))
    self.enter_context(mock.patch.object(sweep.programs_lib, "Programs"))

  def start(self, errors):
    """The mechanisms that were run, and what the study raised, if anything.

    Args:
      errors: of a mechanism, or of a rate.
    """

    def run(lab, cell, config, folder, where):
      for name in (cell.mechanism, cell.rate):
        if name in errors:
          raise errors[name]
      result = {
        "text": lab.text,
        "training_flops": 1,
        "seconds": {"all": 1},
        "estimate": {"bits_per_char": 2.0},
      }
      measure._write_json(folder / measure.RESULT, result)
      return result

    with (
      mock.patch.object(measure.Lab, "run", autospec=True) as runs,
      mock.patch.object(sweep.report, "write") as write,
    ):
      runs.side_effect = run
      try:
        sweep.study(self.config, self.folder)
        raised = ""
      except sweep.FailedCellsError as error:
        raised = str(error)
      write.assert_called_once()  # Whatever failed.
    return [call.args[1].mechanism for call in runs.call_args_list], raised

  def test_a_text_that_is_too_short_is_said_before_anything_runs(self):
    self.config = config("T=16,256 mechanism=two_stream")
    with self.assertRaisesRegex(
      tokenizers.DataError, "200 tokens holds no sequence"
    ):
      self.start({})
    self.assertEqual(list(self.folder.glob("cells/*/*")), [])

  def test_a_text_is_compared_under_the_lock(self):
    """Another process may end a cell of another text before it is taken."""

    @contextlib.contextmanager
    def lock(folder):
      path = folder.parent / "a" / measure.RESULT
      measure._write_json(path, {"text": {"train": "1"}})
      yield

    with (
      mock.patch.object(sweep.locking, "lock", lock),
      self.assertRaisesRegex(config_lib.ConfigError, "another text"),
    ):
      self.start({})

  def test_damage_in_another_sweep_is_no_matter(self):
    other = self.folder / "cells/other/result.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"cell"')
    results = results_lib.Results(self.config, self.folder)
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(results.every(), [])
    self.assertIn("other/result.json: damaged", logs.output[0])

  def test_others_go_on_and_only_memory_is_tried_again(self):
    try:
      telemetry.check_finite(3, {"loss": float("nan")})
    except telemetry.NonFiniteError as error:
      diverged = error
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    runs, raised = self.start({"two_stream": diverged, "mdlm": memory})
    self.assertEqual(runs, ["two_stream", "mdlm", "ao_gpt"])
    self.assertRegex(
      raised,
      "^2 of the study's cells failed: two_stream .* seed=0: loss is nan at "
      r"step 3 \(not tried again unless cells/two_stream-.* is deleted\); mdlm "
      r".*: out of memory \(the same command tries it again\)$",
    )
    self.assertEqual(self.start({"mdlm": memory}), (["mdlm"], raised))
    runs, raised = self.start({})
    self.assertEqual(runs, ["mdlm"])
    self.assertStartsWith(raised, "1 of the study's cells failed: two_stream")
    (path,) = self.folder.glob("cells/two_stream-*")
    path.rmtree()
    self.assertEqual(self.start({}), (["two_stream"], ""))

  def test_a_rate_that_is_too_high_is_no_failure(self):
    """It is not tried again either, and the best is not run twice."""
    self.config = config(
      "seed=0,1 mechanism=mdlm rate=tuned", rates=(1e-3, 4e-3)
    )
    diverged = telemetry.NonFiniteError("the loss is nan")
    runs, raised = self.start({"0.004": diverged})
    self.assertEqual((runs, raised), (["mdlm"] * 3, ""))
    self.assertEqual(self.start({}), ([], ""))
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    (path,) = self.folder.glob("cells/*rate0.004*")
    path.rmtree()
    runs, raised = self.start({"0.004": memory})
    self.assertEqual(runs, ["mdlm"])
    self.assertRegex(raised, "^1 of the study's cells failed: .*rate=0.004")

  def test_a_program_that_did_not_compile_keeps_no_parameters(self):
    program = futures.Future()  # Kept for the cells that share it.
    program.set_exception(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"))
    seen = []

    def run(*_, where):
      params = np.ones(3)
      seen.append(weakref.ref(params))
      program.result()

    (cell,) = cells_lib.expand(config("seed=0"))
    results = results_lib.Results(self.config, self.folder)
    sweep._run_cell(mock.Mock(run=run), results, cell, sweep._Clock(), 0.0)
    self.assertTrue(results.failure(cell)["again"])
    self.assertIsNone(seen[0]())

  def test_an_error_that_is_not_the_cells_own_is_raised(self):
    lost = jax.errors.JaxRuntimeError("INTERNAL: device lost")
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "device lost"):
      self.start({"two_stream": lost})
    self.assertEmpty(list(self.folder.glob("cells/*/*.json")))


class RateTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.study = config("rate=tuned", rates=(1e-3, 2e-3, 4e-3))
    (self.cell,) = cells_lib.expand(self.study)
    self.trials = cells_lib.trials(self.cell, self.study)
    folder = epath.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.results = results_lib.Results(self.study, folder)

  def end(self, trial, bits, unigram=4.0):
    folder = self.results.folder(trial)
    if bits is None:
      return measure.note_failure(folder, "the loss is nan", again=False)
    folder.mkdir(parents=True)
    estimate = {"bits_per_char": bits}
    result = {"estimate": estimate, "unigram_bits": unigram}
    (folder / measure.RESULT).write_text(json.dumps(result))

  def test_a_loss_that_is_no_number_is_raised(self):
    corpus = mock.Mock(tokenizer=tokenizers.get("char27"))
    corpus.hash.return_value = "0"
    corpus.split.return_value = np.zeros(200, np.uint8)
    lab = measure.Lab(self.study, corpus, None, mock.MagicMock())
    resolved = self.results.resolved(self.trials[0])
    folder = self.results.folder(self.trials[0])
    diverged = telemetry.NonFiniteError("the loss is nan")
    with (
      mock.patch.object(lab, "_train", side_effect=diverged),
      self.assertRaises(telemetry.NonFiniteError),
    ):
      lab.run(self.trials[0], resolved, folder)
    # The last step's update shows in the evaluation alone.
    with (
      mock.patch.object(
        lab, "_train", return_value=(mock.MagicMock(), [2.0], 1, 1)
      ),
      mock.patch.object(
        lab, "_evaluate", return_value=([{"bits_per_char": math.nan}], b"")
      ),
      self.assertRaisesRegex(telemetry.NonFiniteError, "bits/char is nan"),
    ):
      lab.run(self.trials[0], resolved, folder)
    self.assertFalse(folder.exists())

  def test_the_best_decides_when_all_are_done_and_is_the_cell_itself(self):
    for trial, bits in zip(self.trials, (2.5, 2.4, 2.25)):
      self.assertIsNone(self.results.rate(self.cell))
      self.assertIsNone(self.results.result(self.cell))
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 4e-3)
    self.assertEqual(self.results.bits(self.cell), 2.25)

  def test_one_that_diverges_is_worse_than_any(self):
    for trial, bits in zip(self.trials, (2.5, 2.6, None)):
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 1e-3)

  def test_of_rates_that_are_as_good_the_configuration_s(self):
    for trial, bits in zip(self.trials, (2.2, 2.205, 2.3)):
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 2e-3)

  def test_where_nothing_was_learned_the_configuration_s(self):
    for trial, bits in zip(self.trials, (None, 4.0, 3.95)):
      self.end(trial, bits)
    self.assertEqual(self.results.rate(self.cell), 2e-3)


if __name__ == "__main__":
  absltest.main()
