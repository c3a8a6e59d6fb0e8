"""The benchmark of decoding: every method runs, and what it prints adds up."""

import contextlib
import csv
import io
import os
import pathlib
import tempfile
from unittest import mock

import helpers
import pytest
from absl.testing import absltest

from aoarm_jax import decode_benchmark, decode_timing

_PROGRAM = """
HloModule x

%fused (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %n = f32[] negate(%p)
}

%called (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %a = f32[] fusion(%p), kind=kLoop, calls=%fused
  ROOT %b = f32[] custom-call(%a), custom_call_target="gemm"
}

%body (p: (f32[], s32[])) -> (f32[], s32[]) {
  %p = (f32[], s32[]) parameter(0)
  %x = f32[] get-tuple-element(%p), index=0
  %y = (f32[], /*index=1*/f32[]) fusion(%x), kind=kInput, calls=%fused
  %z = f32[] call(%x), to_apply=%called
  %c = f32[] copy(%z)
  ROOT %t = (f32[], s32[]) tuple(%c, %x)
}

%cond (p: (f32[], s32[])) -> pred[] {
  ROOT %p = pred[] constant(true)
}

ENTRY %main (p: (f32[], s32[])) -> (f32[], s32[]) {
  %p = (f32[], s32[]) parameter(0)
  ROOT %w = (f32[], s32[]) while(%p), condition=%cond, body=%body
}
"""


@pytest.mark.once
class BenchmarkTest(absltest.TestCase):
  def test_every_method(self):
    self.enter_context(helpers.quick_compilation())
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    sizes = {"8m": dict(D=8, L=1, N=2)}
    out = io.StringIO()
    with (
      mock.patch.object(decode_benchmark, "_SIZES", sizes),
      contextlib.redirect_stdout(out),
    ):
      decode_benchmark.main(
        ["--T", "8", "--batches", "2", "--steps", "4", "--sizes", "8m",
         "--out", str(folder / "x.csv"), "--methods", "sequential",
         "speculative-2", "adaptive", "uncached", "mdlm"]
      )  # fmt: skip
      decode_benchmark.main(["--plot", str(folder / "x.csv")])
    self.assertEqual(sorted(os.listdir(folder)), ["x.csv", "x.png"])
    with open(folder / "x.csv") as file:
      rows = list(csv.DictReader(file))
    self.assertEqual(
      [(row["method"], row["timed"]) for row in rows],
      [
        ("sequential", "4 tokens"),
        ("speculative-2", "whole"),
        ("adaptive", "whole"),
        ("uncached", "at 2 lengths"),
        ("mdlm T", "4 steps"),
        ("mdlm T/4", "4 steps"),
      ],
    )
    for row in rows:
      T, seconds = int(row["T"]), float(row["step_ms"]) / 1e3
      steps = T / float(row["tokens_per_step"])
      self.assertAlmostEqual(
        float(row["tokens_per_second"]) * seconds * steps / (2 * T), 1.0
      )
      self.assertGreater(float(row["floor_ms"]), 0.0)

  def test_launches_of_a_loop(self):
    """A fusion, a copy, and two in what is called."""
    self.assertEqual(decode_timing.launches(_PROGRAM), 4)
    self.assertEqual(decode_timing.launches("HloModule x"), 0)

  def test_what_cannot_be(self):
    for arguments, message in (
      (["--only", "typo"], "no cell has a name with 'typo'"),
      (["--workdir", "/absent"], "/absent/config.json: no such file"),
    ):
      with (
        self.assertRaises(SystemExit) as caught,
        contextlib.redirect_stdout(io.StringIO()),
      ):
        decode_benchmark.main(arguments)
      self.assertIn(message, str(caught.exception))


if __name__ == "__main__":
  absltest.main()
