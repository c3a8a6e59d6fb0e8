"""The command line of the kernels' benchmark; it measures on a GPU alone."""

import contextlib
import io
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from pallas_kernels.benchmarks import attention as benchmark


class BenchmarkTest(parameterized.TestCase):
  @parameterized.parameters(
    (("--only", "["), r"--only: '\[': unterminated character set"),
    (("--only", "zzz"), "--only: no row of: .*causal"),
    (("--skip", "cuda"), "--skip: invalid choice: 'cuda'"),
    (("--rounds", "0"), "--rounds: '0': at least 1"),
    (("--set", "keys"), "--set: 'keys': give name=number, of: short"),
    (("--set", "foo=3"), "--set: 'foo=3': give name=number"),
  )
  def test_what_cannot_be_is_one_line(self, arguments, message):
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), self.assertRaises(SystemExit) as e:
      benchmark.main(arguments)
    self.assertEqual(e.exception.code, 2)
    self.assertRegex(shown.getvalue(), f"^python -m .*: error: .*{message}")
    self.assertEqual(shown.getvalue().count("\n"), 1)

  @parameterized.parameters("--quick", "--sweep", "--rounds=1")
  def test_a_machine_without_a_gpu_is_refused(self, argument):
    """Before any work: the rows are too large for a CPU."""
    if jax.default_backend() == "gpu":
      self.skipTest("for machines without a GPU")
    with (
      mock.patch.object(benchmark, "_arrays", side_effect=AssertionError),
      self.assertRaises(SystemExit) as stop,
    ):
      benchmark.main([argument])
    self.assertRegex(stop.exception.code, "error: it needs an NVIDIA GPU")
    self.assertLen(stop.exception.code.splitlines(), 1)

  def test_a_device_that_is_not_here_is_one_line(self):
    with (
      mock.patch.object(jax, "devices", side_effect=AssertionError),
      self.assertRaisesRegex(SystemExit, "error: it .*JAX finds no device"),
    ):
      benchmark.main([])

  def test_rows_columns_and_settings(self):
    """Both passes of a row that trains; what is left of backward."""
    shown = io.StringIO()
    found = [
      {"cudnn": (2.0, 0.0), "ours": (1.0, 0.0)},
      {"cudnn": (6.0, 0.0), "ours": (3.0, 0.0)},
    ]
    arguments = [
      "--only",
      "^causal 512x128x8x64$",
      "--skip",
      "xla",
      "blockwise",
      "--set",
      "stages=3",
      "pingpong=0",
    ]
    with (
      contextlib.redirect_stdout(shown),
      mock.patch.object(benchmark, "measure", side_effect=found) as measure,
      mock.patch.object(benchmark.timing, "gpu"),
    ):
      benchmark.main(arguments)
    candidates = measure.call_args_list[0].args[1]
    self.assertEqual(list(candidates), ["cudnn", "cudnn x2", "ours"])
    config = candidates["ours"].keywords["config"]
    self.assertEqual((config.stages, config.pingpong), (3, False))
    self.assertIn("backward alone 2.000 ms", shown.getvalue())
    self.assertIn("2.00 of cudnn's speed", shown.getvalue())


if __name__ == "__main__":
  absltest.main()
