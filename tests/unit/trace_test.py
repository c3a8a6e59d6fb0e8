"""Shares of a device's time."""

import collections

import numpy as np
from absl.testing import absltest, parameterized

from aoarm_jax.devices import trace


class TraceTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 0), ([(3, 5), (0, 2)], 4), ([(0, 4), (1, 2), (3, 6), (8, 9)], 7)
  )
  def test_covered(self, intervals, length):
    self.assertEqual(trace._covered(intervals), length)

  def test_shares(self):
    """A collective of which half is hidden, one that is, and a pause."""
    network, other = [(0, 2), (3, 5), (3.5, 4)], [(1, 4), (1.5, 2)]
    self.assertEqual(trace._shares(network, other, 8), (4 / 8, 2 / 8, 3 / 8))

  def test_kernels_of_two_steps(self):
    """Two steps of a product and of two copies, one beside the product."""
    event = collections.namedtuple("event", "name start_ns duration_ns")
    step = [event("dot", 0, 60), event("copy", 50, 20), event("copy", 80, 10)]
    later = [x._replace(start_ns=x.start_ns + 100) for x in step]
    kernels, seconds = trace.of_events(step + later, times=2)
    np.testing.assert_allclose([k.seconds for k in kernels], [60e-9, 30e-9])
    self.assertEqual([k[::2] for k in kernels], [("dot", 1), ("copy", 2)])
    self.assertAlmostEqual(seconds, 80e-9)


if __name__ == "__main__":
  absltest.main()
