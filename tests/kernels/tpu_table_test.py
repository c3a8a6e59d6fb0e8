"""The table's counts against numbers found by hand."""

from absl.testing import absltest, parameterized

from pallas_kernels.tpu import table as tpu_table


class TpuTableTest(parameterized.TestCase):
  def test_one_tile(self):
    """T = 128, H = 64: every array passes once."""
    forward, backward = tpu_table.ours(128, 64)
    rows, slots, line = 64 * 256 * 2, 64 * 128 * 2, 256 * 4
    for count in (forward, backward):
      self.assertEqual((count.steps, count.scores), (1, 256 * 128))
    # visible, q, k, v; out, the largest score and the sum.
    moved = line + rows + 2 * slots + rows + 2 * line
    self.assertEqual(forward.moved, moved)
    scratch = 2 * line + 64 * 256 * 4
    # Two buffers a block, and scratch lines are as long as they look.
    self.assertEqual(forward.vmem, 2 * moved + scratch)
    # visible, q, k, v, d_out and three lines; dq, dk, dv.
    moved = line + rows + 2 * slots + rows + 3 * line + rows + 2 * slots
    self.assertEqual(backward.moved, moved)

  def test_causal_tiles(self):
    """T = 1024 in tiles of 512: three of four, and keys are read again."""
    forward, backward = tpu_table.ours(1024, 128)
    self.assertEqual((forward.steps, backward.steps), (3, 3))
    self.assertEqual(forward.scores, 3 * 1024 * 512)
    rows, slots, line = 128 * 1024 * 2, 128 * 512 * 2, 1024 * 4
    # Row tiles: visible, q, out, two lines, and what rounding took from out;
    # key tiles 0, 0, 1, of which the second is there already.
    self.assertEqual(forward.moved, 2 * (3 * rows + 3 * line) + 2 * 2 * slots)

  @parameterized.parameters(False, True)
  def test_splash(self, fused):
    """Every stream's tiles, in all steps of a square grid."""
    forward, backward = tpu_table.splash_attention(1024, 64, fused=fused)
    passes = 1 if fused else 2
    self.assertEqual((forward.steps, backward.steps), (8, 8 * passes))
    self.assertEqual(forward.scores, 2 * 3 * 512 * 512)
    self.assertEqual(backward.scores, 2 * 3 * 512 * 512 * passes)


if __name__ == "__main__":
  absltest.main()
