"""Work lists against every score of small masks."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.tpu import tiles

_ROWS, _SLOTS = 3, 4  # Of a tile.


def _pairs(work):
  """{(sequence, row tile, key tile): flags}, in the order of the visits."""
  columns = (np.asarray(c)[: int(work.visits)].tolist() for c in work[:4])
  sequences, rows, keys, flags = columns
  return dict(zip(zip(sequences, rows, keys), flags))


def _brute(seen, key_major):
  """What `_pairs` must be for a mask [B, T, S], tile by tile."""
  B, T, S = seen.shape
  found = {}
  shape = B, -(-T // _ROWS), -(-S // _SLOTS)
  for b, i, j in np.ndindex(shape):
    tile = seen[b, i * _ROWS : (i + 1) * _ROWS, j * _SLOTS : (j + 1) * _SLOTS]
    # A tile that sticks out is never all visible.
    whole = tile.shape[1] == _SLOTS and tile.all()
    if tile.any():
      found[b, i, j] = tiles.ALL if whole else tiles.SOME
  outer = 2 if key_major else 1
  for b, i, j in np.ndindex(shape):
    alone = not any(x[0] == b and x[outer] == (b, i, j)[outer] for x in found)
    if alone:
      found[b, i, j] = 0
  inner = 3 - outer
  order = sorted(found, key=lambda x: (x[0], x[outer], x[inner]))
  for bits, key in (
    ((tiles.FIRST, tiles.LAST), lambda x: (x[0], x[outer])),
    ((tiles.OPENS, tiles.CLOSES), lambda x: x[0]),
  ):
    first, last = bits
    for before, own, after in zip([None, *order], order, [*order[1:], None]):
      found[own] += first * (before is None or key(before) != key(own))
      found[own] += last * (after is None or key(after) != key(own))
  return {x: found[x] for x in order}


class TilesTest(parameterized.TestCase):
  @parameterized.product(
    T=(1, 3, 7, 12), S=(1, 4, 9, 12), key_major=(False, True)
  )
  def test_causal(self, T, S, key_major):
    work = tiles.causal_worklist(
      range(T), S, _ROWS, _SLOTS, key_major=key_major
    )
    i, j = np.ogrid[:T, :S]
    want = _brute((j < np.minimum(i + 1, S))[None], key_major)
    self.assertEqual(list(_pairs(work).items()), list(want.items()))
    self.assertLen(work.flags, work.visits)

  def test_causal_from_a_later_row(self):
    """Rows of a second half see the slots of the first too."""
    work = tiles.causal_worklist(
      range(6, 12), 12, _ROWS, _SLOTS, key_major=True
    )
    i, j = np.ogrid[6:12, :12]
    want = _brute((j <= i)[None], True)
    self.assertEqual(list(_pairs(work).items()), list(want.items()))

  @parameterized.product(
    seed=(0, 1, 2), key_major=(False, True), rank=(0, 1, 2)
  )
  def test_visible(self, seed, key_major, rank):
    """No ranks, ranks at random, and ranks in random runs."""
    generator = np.random.default_rng(seed)
    B, T, S = 3, 9, 12
    visible = np.sort(generator.integers(0, S + 1, (B, T)), axis=1)
    visible[seed % B, : T // 2] = 0
    key_rank = np.tile(np.arange(S), (B, 1))
    if rank == 1:
      key_rank = generator.permuted(key_rank, axis=1)
    elif rank == 2:
      runs = generator.permutation(S // _SLOTS)
      key_rank = key_rank.reshape(B, -1, _SLOTS)[:, runs].reshape(B, S)
    work = jax.jit(_worklist, static_argnums=(2, 3))(
      visible.astype(np.int32), key_rank.astype(np.int32), key_major, rank > 0
    )
    seen = key_rank[:, None] < visible[..., None]
    want = _brute(seen, key_major)
    self.assertEqual(list(_pairs(work).items()), list(want.items()))
    kinds = {flags & (tiles.SOME | tiles.ALL) for flags in want.values()}
    self.assertIn(tiles.SOME, kinds)
    if rank != 1:
      self.assertIn(tiles.ALL, kinds)


def _worklist(visible, key_rank, key_major, ranked):
  B, T = visible.shape
  return tiles.worklist(
    tiles.row_bounds(visible.reshape(B, T // _ROWS, _ROWS)),
    tiles.key_bounds(
      jnp.asarray(key_rank) if ranked else None, key_rank.shape[1], _SLOTS
    ),
    key_major=key_major,
  )


if __name__ == "__main__":
  absltest.main()
