"""The table of scaling, on virtual devices."""

import subprocess
import sys

import helpers
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax import scaling


@pytest.mark.once
class ScalingTest(parameterized.TestCase):
  def test_dry_run(self):
    with helpers.quick_compilation():
      out = subprocess.run(
        [sys.executable, "-m", "aoarm_jax.scaling", "--dry-run",
         "--devices=1,8", "--meshes=data,tensor", "--scaling=weak",
         "--mechanisms=decoupled_rope"],
        env=helpers.environment(),
        stdout=subprocess.PIPE, text=True, check=True, timeout=200,
      ).stdout.splitlines()  # fmt: skip
    self.assertStartsWith(out[0], "8 x cpu, jax ")
    header, _, *rows = (
      [c.strip() for c in x.split("|")[1:-1]] for x in out[1:]
    )
    one, eight, refused = (dict(zip(header, row)) for row in rows)
    for row, n in ((one, 1), (eight, 8)):
      self.assertEqual((row["devices"], row["batch"]), (str(n), str(16 * n)))
      # Random tokens: no more than a fresh model knows.
      self.assertAlmostEqual(float(row["nats/token"]), 3.3, delta=0.1)
    self.assertEqual(one["efficiency"], "100.0%")
    self.assertEqual(refused["mesh"], "tensor")
    self.assertIn("config.mesh.tensor=8: must divide config.model.N=4", out[-1])

  @parameterized.parameters(
    ([], 0), ([(3, 5), (0, 2)], 4), ([(0, 4), (1, 2), (3, 6), (8, 9)], 7)
  )
  def test_covered(self, intervals, length):
    self.assertEqual(scaling._covered(intervals), length)


if __name__ == "__main__":
  absltest.main()
