"""Batches: the same for any worker and process count, and from any state."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
from absl import flags
from absl.testing import absltest, parameterized

from aoarm_jax.data import corpora, mapped, pipeline, tokenizers

_B, _T = 12, 7


def _text(n: int) -> np.ndarray:
  """Text in which a crop's first four tokens tell where it starts."""
  assert n < 16**4
  digits = np.arange(n) // 4
  return (digits >> 4 * (np.arange(n) % 4) & 15).astype(np.uint8)


def _train(tokens=None, **overrides) -> pipeline.TrainBatches:
  kwargs = dict(T=_T, batch_size=_B, seed=3) | overrides
  return pipeline.train_batches(
    np.arange(250, dtype=np.uint8) if tokens is None else tokens, **kwargs
  )


def _take(batches: pipeline.TrainBatches, count: int) -> list[np.ndarray]:
  return [next(batches) for _ in range(count)]


class TrainBatchesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Loader processes need it; absl.app.run does it in the program.
    flags.FLAGS.mark_as_parsed()

  def batches(self, *args, **kwargs):
    batches = _train(*args, **kwargs)
    self.addCleanup(batches.close)
    return batches

  def test_crops_of_the_text(self):
    for crops in _take(self.batches(), 5):
      self.assertEqual((crops.shape, crops.dtype), ((_B, _T), np.uint8))
      # The text counts up, so every crop must.
      np.testing.assert_array_equal(np.diff(crops.astype(int)), 1)
      self.assertLessEqual(crops.max(), 249)

  @parameterized.parameters(_T, _T + 1, _T + 2)
  def test_every_start_is_drawn_equally_often(self, n):
    batches = self.batches(np.arange(n, dtype=np.uint8), batch_size=3000)
    starts = next(batches)[:, 0]
    counts = np.bincount(starts, minlength=n - _T + 1)
    self.assertLen(counts, n - _T + 1)
    np.testing.assert_allclose(counts * len(counts) / 3000, 1, atol=0.1)

  def test_seeds_and_batches_differ(self):
    a, b = _take(self.batches(seed=3), 2)
    (c,) = _take(self.batches(seed=4), 1)
    self.assertFalse((a == b).all() or (a == c).all() or (b == c).all())

  def test_the_first_batch_never_changes(self):
    # Resuming must find the same data under another numpy.
    np.testing.assert_array_equal(
      next(self.batches(seed=3))[:5, 0], [239, 113, 171, 202, 145]
    )

  @parameterized.parameters(1, 2, 4)
  def test_processes_share_the_global_batch(self, count):
    whole = _take(self.batches(), 3)
    parts = [
      _take(self.batches(rows=rows_of(i, count)), 3) for i in range(count)
    ]
    for i in range(3):
      rows = np.concatenate([part[i] for part in parts])
      np.testing.assert_array_equal(rows, whole[i])

  def test_workers_change_nothing_and_any_count_resumes_another(self):
    whole = _take(self.batches(), 9)
    worked = self.batches(workers=2)
    np.testing.assert_array_equal(_take(worked, 5), whole[:5])
    state = json.loads(json.dumps(worked.get_state()))
    worked.close()
    for batches in (self.batches(), self.batches(workers=1)):
      batches.set_state(state)
      self.assertEqual(batches.get_state(), state)
      np.testing.assert_array_equal(_take(batches, 2), whole[5:7])
    half = self.batches(rows=rows_of(1, 2))
    half.set_state(state)
    np.testing.assert_array_equal(next(half), whole[5][_B // 2 :])

  def test_workers_map_a_long_text_and_get_no_copy(self):
    tokens = np.arange(200_000, dtype=np.uint32).astype(np.uint8)
    with mock.patch.object(mapped, "_LONG", 1000):
      text = mapped.collect(np.array_split(tokens, 7))[100:-100]
    self.assertLess(
      len(pickle.dumps(pipeline._Crops(text, 7, np.arange(3)))), 1000
    )
    whole = _take(self.batches(tokens[100:-100].copy()), 3)
    np.testing.assert_array_equal(
      _take(self.batches(text, workers=1), 3), whole
    )

  def test_a_mapped_text_ends_with_its_last_user(self):
    def is_open():
      try:
        return os.path.exists(f"/proc/self/fd/{descriptor}")
      except OSError:
        return False

    with mock.patch.object(mapped, "_LONG", 10):
      text = mapped.collect([np.arange(99, dtype=np.uint16)])
    path, offset, *shape = mapped.packed(text[9:30])
    self.assertEqual((offset, shape[0]), (18, 21))
    descriptor = int(path.rpartition("/")[2])
    again = mapped.unpacked((path, offset, *shape))
    np.testing.assert_array_equal(again, np.arange(9, 30))
    self.assertTrue(is_open())
    del text
    self.assertFalse(is_open())
    np.testing.assert_array_equal(again, np.arange(9, 30))

  def test_signals_to_workers_and_the_death_of_their_parent(self):
    command = [sys.executable, __file__, "--parent"]
    with subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
      self.addCleanup(program.kill)
      self.assertLen(program.stdout.readline().split(), 2)
      self.assertEqual(program.stdout.readline(), "went on\n")
      program.kill()
      # The workers hold the other end of the pipe: it ends when they do.
      self.assertEqual(program.communicate(timeout=60)[0], "")

  def test_state_counts_batches_given_and_not_batches_loaded(self):
    batches = self.batches()
    self.assertEqual(batches.get_state(), {"next_batch": 0})
    whole = _take(batches, 6)
    self.assertEqual(batches.get_state(), {"next_batch": 6})
    batches.set_state({"next_batch": 2})  # Back, in mid-iteration.
    np.testing.assert_array_equal(_take(batches, 4), whole[2:])
    batches.set_state({"next_batch": 10**9})
    next(batches)
    self.assertEqual(batches.get_state(), {"next_batch": 10**9 + 1})

  def test_close_twice_and_go_on(self):
    batches = self.batches()
    first = next(batches)
    batches.close()
    batches.close()
    self.assertFalse((next(batches) == first).all())

  def test_a_batch_is_the_callers_to_keep(self):
    text = np.arange(250, dtype=np.uint8)
    text.flags.writeable = False
    crops = next(self.batches(text))
    crops[:] = 0
    self.assertEqual(text.sum(), sum(range(250)))

  def test_a_text_that_is_too_short(self):
    for make in (pipeline.train_batches, pipeline.eval_batches):
      tokens = np.zeros(_T - 1, np.uint8)
      kwargs = {"seed": 0, "T": _T, "batch_size": 1}
      with self.assertRaisesRegex(
        corpora.DataError, "text of 6 tokens .* config.model.T=7"
      ):
        make(tokens, **kwargs)


def rows_of(process, count):
  return np.arange(_B).reshape(count, -1)[process]


class EvalBatchesTest(parameterized.TestCase):
  @parameterized.parameters(
    (30, 16, 0, 16, 14), (32, 16, 0, 32, 0), (100, 7, 1, 21, 2)
  )
  def test_what_is_left_out_is_told(self, n, T, batches, evaluated, left_out):
    read = pipeline.eval_batches(_text(n), T=T, batch_size=3, batches=batches)
    self.assertEqual(read.split_tokens, n)
    self.assertEqual(read.evaluated_tokens, evaluated)
    self.assertEqual(read.left_out, left_out)
    line = read.describe()
    self.assertIn(f"{evaluated} of {n} characters", line)
    self.assertEqual(
      f"the last {left_out} fill no window" in line, left_out > 0
    )

  def test_characters_of_bytes(self):
    text = np.frombuffer("aé日🎉".encode() * 700 + b"ab", np.uint8)
    read = pipeline.eval_batches(text, T=10, batch_size=3)
    characters = read.sums(tokenizers.get("byte").characters_of).sum()
    self.assertEqual((characters, read.left_out), (4 * 700, 2))
    self.assertIn("7000 of 7002 bytes", read.describe("bytes").replace(",", ""))

  def windows(self, batches: pipeline.EvalBatches) -> np.ndarray:
    """The windows that are real, and only whole rows and batches of them."""
    found = []
    for tokens, real in batches:
      self.assertEqual((tokens.dtype, real.dtype), (np.uint8, np.bool_))
      self.assertEqual((tokens.shape, real.shape), ((_B, _T), (_B,)))
      found.append(tokens[real])
    self.assertLen(found, len(batches))
    return np.concatenate(found)

  @parameterized.parameters(
    *(_T, 2 * _T - 1, _B * _T, _B * _T + _T, 3 * _B * _T - 1)
  )
  def test_every_window_once_in_text_order(self, n):
    text = np.random.default_rng(0).integers(0, 256, n, np.uint8)
    batches = pipeline.eval_batches(text, T=_T, batch_size=_B)
    count = n // _T
    self.assertEqual(batches.sequences, count)
    self.assertLen(batches, -(-count // _B))
    np.testing.assert_array_equal(
      self.windows(batches), text[: count * _T].reshape(count, _T)
    )

  def test_a_part_is_random_nested_and_in_text_order(self):
    text = np.arange(5 * _B * _T + 3) // _T  # Each window is one number.
    parts = []
    for count in (1, 2, 4):
      batches = pipeline.eval_batches(
        text.astype(np.uint8), T=_T, batch_size=_B, batches=count, seed=5
      )
      self.assertEqual((len(batches), batches.sequences), (count, count * _B))
      part = self.windows(batches)
      np.testing.assert_array_equal(part, part[:, :1].repeat(_T, axis=1))
      self.assertTrue((np.diff(part[:, 0].astype(int)) > 0).all())
      parts.append(set(part[:, 0].tolist()))
    self.assertTrue(parts[0] < parts[1] < parts[2])
    self.assertGreater(max(parts[0]), 2 * _B)

  def test_more_batches_than_there_are_is_the_whole(self):
    text = _text(3 * _B * _T - 1)
    whole = pipeline.eval_batches(text, T=_T, batch_size=_B)
    part = pipeline.eval_batches(text, T=_T, batch_size=_B, batches=9)
    self.assertEqual(part.sequences, whole.sequences)
    np.testing.assert_array_equal(self.windows(part), self.windows(whole))

  def test_seeds_differ_and_repeat(self):
    text = np.arange(250, dtype=np.uint8)
    parts = [
      pipeline.eval_batches(text, T=2, batch_size=_B, batches=1, seed=seed)[0]
      for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(parts[0][0], parts[1][0])
    self.assertFalse((parts[0][0] == parts[2][0]).all())

  @parameterized.product(count=(1, 2, 4), batches=(0, 2))
  def test_processes_share_the_global_batch(self, count, batches):
    text = _text(3 * _B * _T - 20)
    kwargs = dict(T=_T, batch_size=_B, batches=batches)
    whole = pipeline.eval_batches(text, **kwargs)
    parts = [
      pipeline.eval_batches(text, rows=rows_of(i, count), **kwargs)
      for i in range(count)
    ]
    self.assertEqual({len(part) for part in parts}, {len(whole)})
    self.assertEqual({part.sequences for part in parts}, {whole.sequences})
    for i, (tokens, real) in enumerate(whole):
      both = [part[i] for part in parts]
      np.testing.assert_array_equal(
        np.concatenate([t for t, _ in both]), tokens
      )
      np.testing.assert_array_equal(np.concatenate([r for _, r in both]), real)

  def test_it_can_be_read_again(self):
    batches = pipeline.eval_batches(_text(200), T=_T, batch_size=_B)
    np.testing.assert_array_equal(self.windows(batches), self.windows(batches))


def _parent():
  """Prints its workers, signals them, reads on, and waits to be killed."""
  flags.FLAGS.mark_as_parsed()
  batches = _train(workers=2)
  _take(batches, 2)  # One of each: both are past their start.
  workers = [process.pid for process in multiprocessing.active_children()]
  print(*workers, flush=True)
  for pid in workers:
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
  _take(batches, 50)  # More than can have been loaded before.
  print("went on", flush=True)
  signal.pause()


if __name__ == "__main__":
  if sys.argv[1:] == ["--parent"]:
    _parent()
  absltest.main()
