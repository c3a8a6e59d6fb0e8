"""Shares of a device's time."""

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


if __name__ == "__main__":
  absltest.main()
