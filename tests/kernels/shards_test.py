"""How slots are dealt out to devices that share a sequence."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import shards


class ShardsTest(parameterized.TestCase):
  def test_two_chunks_a_device_from_both_ends(self):
    slots = jnp.arange(12)[None]
    self.assertEqual(
      shards.deal(slots, 3)[0].tolist(),
      [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]],
    )

  @parameterized.product(P=(1, 2, 3, 8), rest=((), (3, 2)))
  def test_collect_is_the_inverse(self, P, rest):
    S = 6 * P
    x = jnp.arange(2 * S * np.prod(rest, dtype=int)).reshape(2, S, *rest)
    dealt = shards.deal(x, P)
    self.assertEqual(dealt.shape, (2, P, 6, *rest))
    np.testing.assert_array_equal(shards.collect(dealt), x)
    gathered = jnp.moveaxis(dealt, 1, 0)
    np.testing.assert_array_equal(shards.whole(gathered), x)

  @parameterized.parameters(1, 2, 3, 8)
  def test_where_slots_lie(self, P):
    S = 6 * P
    dealt = shards.deal(jnp.arange(S)[None], P)[0]
    for device in range(P):
      np.testing.assert_array_equal(
        shards.slots(jnp.int32(device), S // P, P), dealt[device]
      )
    for slot in range(S):
      self.assertEqual(dealt[shards.place(slot, S, P)], slot)
    device, index = shards.place(S + 1, S, P)
    self.assertEqual((device, index), (0, S // P + 1))

  def test_all_devices_have_the_same_work(self):
    """A causal row sees its slot and those before it."""
    seen = (shards.deal(jnp.arange(64)[None], 4)[0] + 1).sum(axis=1)
    self.assertEqual(set(seen.tolist()), {64 * 65 // 2 // 4})

  def test_what_can_be_dealt(self):
    self.assertTrue(shards.can(7, 1))
    self.assertTrue(shards.can(8, 2))
    self.assertFalse(shards.can(6, 2))
    self.assertFalse(shards.can(7, 2))


if __name__ == "__main__":
  absltest.main()
