"""Tile sizes, by shape."""

from typing import NamedTuple

LANES = 128  # Of a TPU's vector registers: tiles are multiples of it.


class TpuTiles(NamedTuple):
  """How the TPU kernel divides a call.

  Attributes:
    positions: of the T in a row tile.
    rows: of a row tile: the positions times the query heads of a key head,
      padded to whole lanes.
    slots: of a key tile.
    heads: key heads that one grid step computes.
    T: padded to whole row tiles.
    S: padded to whole key tiles.
  """

  positions: int
  rows: int
  slots: int
  heads: int
  T: int
  S: int

  @property
  def row_tiles(self) -> int:
    return self.T // self.positions

  @property
  def key_tiles(self) -> int:
    return self.S // self.slots


# A grid step costs about 0.35 us whatever it does (the Pallas documentation's
# figure), as much as 100,000 scores; larger tiles compute more masked scores.
# Not tuned on a TPU: none was at hand.
TPU_ROWS, TPU_SLOTS = 1024, 512


def tpu_tiles(T: int, S: int, N: int, group: int) -> TpuTiles:
  """The tiles for T positions, S slots, N key heads, `group` rows a position.

  Short sequences are one tile, and several heads share a grid step.
  """
  most = max(TPU_ROWS // group // LANES, 1) * LANES
  positions = min(T, most)
  rows = _round_up(positions * group, LANES)
  slots = min(_round_up(S, LANES), TPU_SLOTS)
  heads = max(
    n for n in range(1, N + 1)
    if N % n == 0 and (n == 1 or n * rows * slots <= TPU_ROWS * TPU_SLOTS)
  )  # fmt: skip
  return TpuTiles(
    positions, rows, slots, heads, _round_up(T, positions), _round_up(S, slots)
  )


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
