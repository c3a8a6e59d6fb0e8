"""The table of scaling, on virtual devices."""

import subprocess
import sys

import helpers
from absl.testing import absltest, parameterized

from aoarm_jax import scaling


class ScalingTest(parameterized.TestCase):
  def test_dry_run(self):
    with helpers.quick_compilation():
      out = subprocess.run(
        [sys.executable, "-m", "aoarm_jax.scaling", "--dry-run",
         "--devices=1,2", "--meshes=data,sequence", "--scaling=weak",
         "--mechanisms=decoupled_rope,mdlm"],
        env=helpers.environment(),
        stdout=subprocess.PIPE, text=True, check=True, timeout=200,
      ).stdout.splitlines()  # fmt: skip
    self.assertStartsWith(out[0], "8 x cpu, jax ")
    header, _, *rows = (
      [c.strip() for c in x.split("|")[1:-1]] for x in out[1:]
    )
    rows = [dict(zip(header, row)) for row in rows]
    self.assertEqual(
      [(r["mechanism"], r["mesh"], r["devices"], r["batch"]) for r in rows],
      [
        (mechanism, mesh, n, batch)
        for mechanism in ("decoupled_rope", "mdlm")
        for mesh, n, batch in (
          ("data", "1", "16"), ("data", "2", "32"), ("sequence", "2", "32")
        )
      ],
    )  # fmt: skip
    self.assertEqual(rows[0]["efficiency"], "100.0%")
    # The same batch and orders.
    self.assertEqual(rows[1]["nats/token"], rows[2]["nats/token"])
    self.assertIn("must divide the 33 slots of config.model.T=32", out[-1])

  @parameterized.parameters(
    ([], 0), ([(3, 5), (0, 2)], 4), ([(0, 4), (1, 2), (3, 6), (8, 9)], 7)
  )
  def test_covered(self, intervals, length):
    self.assertEqual(scaling._covered(intervals), length)


if __name__ == "__main__":
  absltest.main()
