"""The table of scaling, on virtual devices."""

import contextlib
import io
import subprocess
import sys
from unittest import mock

import helpers
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.tools import scaling


@pytest.mark.thorough
class ScalingTest(parameterized.TestCase):
  def test_dry_run(self):
    with helpers.quick_compilation():
      out = subprocess.run(
        [
          sys.executable,
          "-m",
          "aoarm_jax.tools.scaling",
          "--dry-run",
          "--devices=1,8",
          "--meshes=data,tensor",
          "--scaling=weak",
          "--mechanisms=decoupled_rope",
        ],
        env=helpers.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=200,
      ).stdout.splitlines()
    self.assertStartsWith(out[0], "8 x cpu, jax ")
    # The table is in one piece.
    start = next(i for i, line in enumerate(out) if line[0] == "|")
    self.assertIn("compiling 3 training steps", out[:start])
    # The one that is refused has ended, too.
    self.assertRegex(
      "\n".join(out[:start]), r"(?m)^3 of 3 programs compiled, \d+ s$"
    )
    header, _, *rows = (
      [c.strip() for c in x.split("|")[1:-1]] for x in out[start:]
    )
    one, eight, refused = (dict(zip(header, row)) for row in rows)
    for row, n in ((one, 1), (eight, 8)):
      self.assertEqual((row["devices"], row["batch"]), (str(n), str(16 * n)))
      # Random tokens: no more than a fresh model knows.
      self.assertAlmostEqual(float(row["nats/token"]), 3.3, delta=0.1)
      self.assertEqual(row["efficiency"], "-")  # Devices of one processor.
    self.assertEqual(refused["mesh"], "tensor")
    self.assertIn("config.mesh.tensor=8: must divide config.model.N=4", out[-1])

  def test_dry_run_is_small_unless_told(self):
    """What is asked for is taken; nothing else of a dry run is large."""
    dry = scaling.parse(["--dry-run"])
    self.assertEqual((dry.models, dry.lengths), (["tiny"], [32]))
    told = scaling.parse(["--dry-run", "--lengths=64", "--devices=2"])
    self.assertEqual((told.devices, told.lengths), ([2], [64]))
    self.assertEqual(told.models, ["tiny"])
    self.assertIsNone(scaling.parse([]).devices)

  def test_equal_rows_are_measured_once(self):
    """Of one device weak and strong scaling are the same."""
    found = {name: 1.0 for name in scaling._COLUMNS[7:] if name != "efficiency"}
    with (
      mock.patch.object(scaling, "compile_step") as compile_step,
      mock.patch.object(scaling, "measure", return_value=found) as measure,
      contextlib.redirect_stdout(io.StringIO()) as out,
    ):
      code = scaling.main(["--devices=1", "--models=tiny", "--lengths=32,64"])
    self.assertEqual(code, 0)
    self.assertEqual(compile_step.call_count, 4)
    self.assertEqual(measure.call_count, 4)
    rows = [r for r in out.getvalue().splitlines() if "| tiny |" in r]
    self.assertLen(rows, 8)
    self.assertEqual({row.split("|")[-3].strip() for row in rows}, {"100.0%"})

  def test_weak_rows_have_as_much_a_device(self):
    """Also where T does not divide the tokens, or is longer than they."""
    flags = scaling.parse(["--dry-run", "--tokens=512"])
    for T, rows in ((60, 8), (1024, 1)):
      for devices in (1, 2, 4):
        config = scaling.configuration(
          flags, "weak", "tiny", "two_stream", T, "data", devices
        )
        self.assertEqual(config.train.batch_size, devices * rows)

  def test_rows_that_fail(self):
    """The others go on; that none is left is an error."""
    found = {name: 1.0 for name in scaling._COLUMNS[7:] if name != "efficiency"}

    def compiled(config, devices):
      if config.model.T in refused:
        raise config_lib.ConfigError("config: refused")
      return mock.Mock()

    arguments = ["--devices=1", "--models=tiny", "--lengths=32,64"]
    for refused, code in (([32], 0), ([32, 64], 1)):
      with (
        mock.patch.object(scaling, "compile_step", compiled),
        mock.patch.object(scaling, "measure", return_value=found),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
      ):
        self.assertEqual(scaling.main(arguments), code)
      self.assertEqual(
        out.getvalue().count("config: refused"), 4 * len(refused)
      )
      self.assertEqual("no row could be" in err.getvalue(), code == 1)

  @parameterized.parameters(
    ("--devices=0", "--devices: '0': must be a whole number of at least 1"),
    ("--devices=1,x", "--devices: 'x': must be a whole number"),
    ("--devices=3,999", "--devices=999: there are "),
    ("--meshes=data_fsdp", "--meshes=data_fsdp: it takes 4 devices"),
    ("--mechanisms=foo", "--mechanisms: 'foo' is not one of two_stream, "),
    ("--lengths=0", "--lengths: '0': must be"),
    ("--steps=0", "--steps: '0': must be"),
    ("--attention=foo", "--attention: invalid choice: 'foo'"),
    ("--json=/", "--json: '/': name a file, not a folder"),
  )
  def test_what_cannot_be(self, argument, message):
    """One line, and no table."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        code = scaling.main(["--devices=3", argument])
      except SystemExit as stop:
        code = stop.code
    self.assertEqual(code, 2)
    self.assertLen(err.getvalue().splitlines(), 1)
    self.assertIn(message, err.getvalue())
    self.assertNotIn("|", out.getvalue())


if __name__ == "__main__":
  absltest.main()
