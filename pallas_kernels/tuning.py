"""Tile sizes and depths of our own kernels, by shape."""

import dataclasses
from typing import NamedTuple

# By platform, the implementations that beat `xla`, the fastest first; for one
# row over a long cache see `fastest`.
_FASTEST = {"gpu": ("mosaic_gpu", "cudnn"), "tpu": ("mosaic_tpu",)}

LANES = 128  # Of a TPU's vector registers: tiles are multiples of it.


def fastest(platform: str, T: int, S: int) -> tuple[str, ...]:
  """What to try for T rows over S slots, the fastest first; xla comes last."""
  if platform == "gpu" and T == 1 and S > 1024:
    return "cudnn", "mosaic_gpu"
  return _FASTEST.get(platform, ())


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


@dataclasses.dataclass(frozen=True)
class Hopper:
  """One choice for the Hopper kernels; sizes in rows or slots.

  Attributes:
    short: longest T and S for which one warpgroup takes a whole sequence of a
      key head, forward; at most 128.
    fused: longest S for which one kernel makes all gradients; at most 128.
    consumers: warpgroups that compute, 64 rows each, forward.
    keys: slots of a key tile, forward.
    stages: key tiles in shared memory, forward.
    pingpong: whether one of two warpgroups exponentiates while the other
      multiplies, forward.
    fused_stages: row tiles in shared memory there.
    fused_depth: key heads there; with 2, the next is loaded during the work.
    blocks: thread blocks there; one a multiprocessor.
    key_consumers: warpgroups that compute, 64 slots each, in the kernel of dk
      and dv.
    key_places: for these in shared memory; with 2, the next are loaded during
      the work.
    key_stages: row tiles in shared memory there.
    query_consumers: warpgroups that compute, 64 rows each, in that of dq.
    query_places: as key_places, for these.
    query_keys: slots of a key tile there.
    query_stages: key tiles in shared memory there.
  """

  short: int = 128
  fused: int = 128
  consumers: int = 2
  keys: int = 128
  stages: int = 2
  pingpong: bool = True
  fused_stages: int = 4
  fused_depth: int = 2
  blocks: int = 132
  key_consumers: int = 2
  key_places: int = 2
  key_stages: int = 3
  query_consumers: int = 2
  query_places: int = 2
  query_keys: int = 64
  query_stages: int = 3


def hopper(T: int, S: int, H: int) -> Hopper:
  """The choice for T rows, S slots and heads of H, 64 or 128."""
  if H == 64:
    choice = Hopper(
      consumers=4,
      keys=64,
      stages=4,
      pingpong=False,
      query_keys=64 if T <= 512 else 128,
    )
  else:
    choice = Hopper(
      fused_stages=2, fused_depth=1, key_places=1, key_stages=2, query_places=1
    )
  if T <= 64 < S:
    # Few rows: bound by the traffic of the keys, of which more are under way.
    keys = 128 if H == 64 else 64
    choice = dataclasses.replace(
      choice, consumers=1, keys=keys, stages=5, pingpong=False
    )
  return choice


def hopper_splits(heads: int, S: int, config: Hopper) -> int:
  """Parts of the slots for few rows: enough items, none of under 4 tiles.

  Where the heads alone are several items for every block, parts are merged for
  more than they win unless they are long: none of under 16 tiles there.

  Args:
    heads: key heads of all sequences.
    S: slots.
    config: tile sizes.
  """
  tiles = -(-S // config.keys)
  least = 4 if heads < 2 * config.blocks else 16
  return min(max(-(-8 * config.blocks // heads), 1), max(tiles // least, 1))
