"""Tests of runs/patience.py: lines that say what takes long."""

import time
from unittest import mock

from absl.testing import absltest

from aoarm_jax.runs import patience


class WaitingTest(absltest.TestCase):
  def lines(self, seconds, work):
    lines = []
    with patience.of_call(seconds, lines.append), patience.waiting("x"):
      time.sleep(work)
    return lines

  def test_only_a_long_wait_is_said(self):
    self.assertEqual(self.lines(0.02, 0.2), ["x: 0s so far"])
    self.assertEqual(self.lines(30.0, 0.05), [])

  def test_zero_says_nothing(self):
    self.assertEqual(self.lines(0.0, 0.05), [])

  def test_it_goes_on_saying_so(self):
    with mock.patch.object(patience, "_SECONDS_BETWEEN_WAITS", 0.02):
      self.assertGreater(len(self.lines(0.01, 0.2)), 1)

  def test_an_error_ends_the_lines(self):
    lines = []
    with (
      self.assertRaises(KeyError),
      patience.of_call(0.05, lines.append),
      patience.waiting("x"),
    ):
      raise KeyError
    time.sleep(0.1)
    self.assertEqual(lines, [])


class CallTest(absltest.TestCase):
  def test_a_long_call_of_short_waits_is_said(self):
    """Each wait alone is shorter than the patience."""
    lines = []
    with (
      mock.patch.object(patience, "_SECONDS_BETWEEN_WAITS", 0.3),
      patience.of_call(0.2, lines.append),
    ):
      for _ in range(60):
        with patience.waiting("generating 3 texts"):
          time.sleep(0.02)
    self.assertBetween(len(lines), 2, 8)
    for line in lines:
      self.assertRegex(line, r"^generating 3 texts, batch \d+: \d+s so far$")

  def test_a_call_of_counted_batches_says_the_time_left(self):
    """From the third batch on, since the first one also compiles."""
    lines = []
    with (
      mock.patch.object(patience, "_SECONDS_BETWEEN_WAITS", 0.02),
      patience.of_call(0.01, lines.append),
    ):
      for _ in patience.counted(range(4)):
        with patience.waiting("scoring"):
          time.sleep(0.1)
      with patience.waiting("reading"):
        time.sleep(0.1)
    words = {line.split(":")[0] for line in lines}
    batches = {f"scoring, batch {i} of 4" for i in range(1, 5)}
    self.assertEqual(words, batches | {"reading"})
    for line in lines:
      has_time = "batch 3" in line or "batch 4" in line
      self.assertRegex(line, r"so far(, ETA \d+s)?$")
      self.assertEqual("ETA" in line, has_time, line)

  def test_a_short_call_is_silent(self):
    lines = []
    with patience.of_call(5.0, lines.append):
      for _ in range(3):
        with patience.waiting("generating"):
          pass
    self.assertEmpty(lines)


if __name__ == "__main__":
  absltest.main()
