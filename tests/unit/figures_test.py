"""Tests of figures.py: pictures of odd, few and missing values."""

import math
import os
import struct
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath
from matplotlib import axes

from aoarm_jax.runs import figures


def _train(steps, value=2.0):
  return [dict(step=s, kind="train", bits_per_char=value) for s in steps]


def _valid(step, **values):
  return dict(step=step, kind="valid", estimator="any_order") | values


_LOSS = {
  "none": [],
  "one": _train([50]),
  "step_zero": _train([0]),
  "validation_only": [_valid(10, bits_per_char=2.0)],
  "unigram": [*_train([5, 10]), _valid(10, bits_per_char=2, unigram_bits=4.1)],
  "unigram_below": [*_train([5, 9], 5.0), _valid(9, unigram_bits=4.1)],
  "not_finite": [
    *_train([1, 2], None),
    *_train([3], math.nan),
    _valid(3, bits_per_char=None, unigram_bits=None),
  ],
  "no_estimator": [dict(step=3, kind="valid", bits_per_char=2.0)],
  "many": _train(range(1, 1000)),
  "other_kind": [dict(step=1, kind="sample")],
}
_SLOTS = {
  "none": {},
  "empty": {"any_order": []},
  "one": {"any_order": [2.0]},
  "odd": {"any_order": [4.0, 2.0, 1.0, None, 0.4, math.nan, 0.3], "_b": [1, 2]},
  "not_finite": {"any_order": [None, math.inf]},
  "long": {"any_order": np.linspace(4, 0.4, 1024).tolist(), "b": [3.0, 1.0, 2]},
}
_BINS = [
  dict(low=0, high=0, bits_per_char=4.0, tokens=3),
  dict(low=1, high=1, bits_per_char=2.0, tokens=5),
  dict(low=3, high=4, bits_per_char=3.0, tokens=1),
]
_NEAR = {
  "none": {},
  "one": {"any_order": {"by_distance": _BINS, "by_recency": _BINS}},
  "empty": {"any_order": {"by_distance": _BINS[:1], "by_recency": []}},
  "two": {
    name: {"by_distance": _BINS, "by_recency": _BINS[:2]} for name in "ab"
  },
}


class FiguresTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = (
      epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
      / "plots"
      / "a.png"
    )

  def check(self, *, low=(1300, 550), high=(1500, 700)):
    data = self.path.read_bytes()
    self.assertStartsWith(data, b"\x89PNG\r\n\x1a\n")
    self.assertEqual(data[-8:-4], b"IEND")
    width, height = struct.unpack(">II", data[16:24])
    self.assertBetween(width, low[0], high[0])
    self.assertBetween(height, low[1], high[1])
    self.assertLen(list(self.path.parent.iterdir()), 1)  # no temporary file

  @parameterized.named_parameters(*_LOSS.items())
  def test_loss_curve(self, records):
    figures.loss_curve(records, self.path, title="two_stream $5")
    self.check()

  @parameterized.named_parameters(*_SLOTS.items())
  def test_slot_curve(self, curves):
    figures.slot_curve(curves, self.path, title="")
    self.check()

  @parameterized.named_parameters(*_NEAR.items())
  def test_nearness(self, reports):
    figures.nearness(reports, self.path, title="a")
    self.check()

  def test_a_picture_names_its_unit(self):
    bins = [{"low": 1, "high": 1, "bits_per_byte": 2.0, "tokens": 5}]
    reports = {"a": {"by_distance": bins, "by_recency": bins}}
    records = [
      dict(step=1, kind="train", bits_per_byte=3.0),
      # Of an earlier version, which had one name for both units.
      dict(step=2, kind="valid", estimator="elbo", bits_per_char=2.5),
    ]
    label = "matplotlib.axes.Axes.set_ylabel"
    with mock.patch(
      label, autospec=True, side_effect=axes.Axes.set_ylabel
    ) as set_label:
      for unit in ("byte", "char"):
        figures.slot_curve({"a": [1.0, 2]}, self.path, title="", unit=unit)
      figures.nearness(reports, self.path, title="", unit="byte")
      figures.loss_curve(records, self.path, title="", unit="byte")
    labels = [call.args[1] for call in set_label.call_args_list]
    self.assertEqual(labels[1], "bits per character")
    self.assertEqual({*labels[:1], *labels[2:]}, {"bits per byte"})

  def test_nearness_of_left_to_right(self):
    """What is known is always one away: two points in one place, both seen."""
    one = {"by_distance": _BINS[1:2], "by_recency": _BINS[1:2]}
    plot = "matplotlib.axes.Axes.plot"
    with mock.patch(plot, autospec=True, side_effect=axes.Axes.plot) as drawn:
      figures.nearness({"left_to_right": one}, self.path, title="a")
    self.check()
    first, second = (call.kwargs for call in drawn.call_args_list)
    self.assertEqual((first["ls"], second["ls"]), ("", ""))
    self.assertEqual(second["markerfacecolor"], "none")
    self.assertGreater(second["ms"], first["ms"])

  @parameterized.parameters(0, 1, 5)
  @pytest.mark.thorough
  def test_decode_speed(self, count):
    """Rows as a CSV file has them; more methods than colours."""
    rows = [
      dict(
        size="8m",
        T=str(T),
        B="64",
        method=f"parallel-{m}",
        best=best,
        device=f"GPU {m % 2}",
        tokens_per_second=str(1e3 * (m + 1) / T),
      )
      for m in range(count)
      for T in (1024, 128)
      for best in ("True", "False")
    ]
    figures.decode_speed(rows * 2, self.path, title="$x")
    self.check()
    one_length = [row for row in rows if row["T"] == "128"]
    with mock.patch("matplotlib.axes.Axes.annotate") as noted:
      figures.decode_speed(rows, self.path, title="")
      noted.assert_not_called()
      figures.decode_speed(one_length, self.path, title="")
    self.assertLen(noted.call_args_list, len(one_length))

  def test_no_two_methods_have_one_marker(self):
    row = dict(size="8m", T="8", B="1", best="False", device="GPU")
    rows = [row | dict(method=f"m{i}", tokens_per_second="9") for i in range(9)]
    plot = "matplotlib.axes.Axes.plot"
    with mock.patch(plot, autospec=True, side_effect=axes.Axes.plot) as drawn:
      figures.decode_speed(rows, self.path, title="")
    kinds = [call.kwargs["marker"] for call in drawn.call_args_list]
    self.assertLen(set(kinds), 9)

  def test_generation_strip(self):
    panels = {"one": ("$a b", [3, 1, 2, 4]), "two": ("^c_d", [1, 2, 3, 4])}
    figures.generation_strip(panels, self.path, title="_$", frames=3)
    self.check(low=(150, 200), high=(400, 600))

  @parameterized.parameters((1, 3), (9, 2), (50, 7))
  def test_running_mean_keeps_lines_straight(self, size, width):
    line = 3.0 - 0.5 * np.arange(size)
    np.testing.assert_allclose(figures._running_mean(line, width), line)

  @pytest.mark.thorough
  def test_matplotlib_is_imported_where_a_picture_is_drawn(self):
    code = (
      "import sys; from aoarm_jax.runs import figures; "
      "assert 'matplotlib' not in sys.modules; "
      f"figures.loss_curve([], {os.fspath(self.path)!r}, title=''); "
      "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
  absltest.main()
