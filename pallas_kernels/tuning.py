"""Tile sizes and buffer depths of the kernels, chosen by shape."""

import dataclasses
from typing import NamedTuple

# The implementations that are faster than `xla` on each platform, the fastest
# first. `fastest` has an exception for one row over a long cache.
_FASTEST = {"gpu": ("mosaic_gpu", "cudnn"), "tpu": ("mosaic_tpu",)}

# Rows and slots of a block of scores in `blockwise`, and the smallest number of
# scores of a head for which `blockwise` is chosen where no kernel serves.
BLOCK = 512
MANY_SCORES = 2048 * 2048

# The smallest number of rows for which the kernels of `rowwise` are chosen. A
# kernel of its own for fewer rows costs more than it saves.
LEAST_ROWS = 2048

LANES = 128  # Lanes of a TPU vector register; tile sizes are multiples of it.


def fastest(platform: str, T: int, S: int) -> tuple[str, ...]:
  """Return the implementations to try before `xla`, the fastest first.

  Args:
    platform: name of the JAX backend.
    T: rows.
    S: slots.
  """
  if platform == "gpu" and T == 1 and S > 1024:
    return "cudnn", "mosaic_gpu"
  return _FASTEST.get(platform, ())


def blockwise(T: int, S: int) -> tuple[int, int]:
  """Return the rows and the slots of a block of `blockwise`.

  Args:
    T: rows.
    S: slots.
  """
  return min(T, BLOCK), min(S, BLOCK)


class TpuTiles(NamedTuple):
  """How the TPU kernels divide a call into tiles.

  Attributes:
    positions: positions of the sequence in a row tile.
    rows: rows of a row tile: its positions times the query heads of a key head,
      padded to whole lanes.
    slots: slots of a key tile.
    heads: key heads that one grid step computes.
    T: positions of a sequence, padded to whole row tiles.
    S: slots of a sequence, padded to whole key tiles.
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


# A grid step costs about 0.35 us regardless of its work, says the documentation
# of Pallas. About 100,000 scores take as long, so tiles are large. Still larger
# tiles would compute more masked scores. These sizes were not tuned on a TPU.
TPU_ROWS, TPU_SLOTS = 1024, 512


def tpu_tiles(T: int, S: int, N: int, G: int) -> TpuTiles:
  """Return the tiles of a call.

  A short sequence is one tile, and several key heads share a grid step.

  Args:
    T: positions.
    S: slots.
    N: key heads.
    G: query heads of a key head.
  """
  most_positions = max(TPU_ROWS // G // LANES, 1) * LANES
  positions = min(T, most_positions)
  rows = _round_up(positions * G, LANES)
  slots = min(_round_up(S, LANES), TPU_SLOTS)
  heads = 1
  for n in range(2, N + 1):
    if N % n == 0 and n * rows * slots <= TPU_ROWS * TPU_SLOTS:
      heads = n
  return TpuTiles(
    positions=positions,
    rows=rows,
    slots=slots,
    heads=heads,
    T=_round_up(T, positions),
    S=_round_up(S, slots),
  )


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Hopper:
  """Tile sizes (in rows or slots) and depths of the Hopper kernels.

  Attributes:
    short: largest T and S for which one warpgroup computes a whole sequence of
      a key head in the forward pass; at most 128.
    fused: largest S for which one kernel computes all gradients; at most 128.
    consumers: warpgroups that compute in the forward kernel, 64 rows each.
    keys: slots of a key tile in the forward kernel.
    stages: key tiles in shared memory in the forward kernel.
    pingpong: whether the two warpgroups of the forward kernel take turns: one
      exponentiates while the other multiplies.
    fused_stages: row tiles in shared memory in the fused backward kernel.
    fused_depth: key heads in shared memory in the fused backward kernel; with
      2, the next head is loaded during the work.
    blocks: thread blocks of a kernel; one per multiprocessor.
    key_consumers: warpgroups that compute in the kernel of dk and dv, 64 slots
      each.
    key_places: sets of their key tiles in shared memory; with 2, the next set
      is loaded during the work.
    key_stages: row tiles in shared memory in the kernel of dk and dv.
    query_consumers: warpgroups that compute in the kernel of dq, 64 rows each.
    query_places: sets of their row tiles in shared memory; with 2, the next set
      is loaded during the work.
    query_keys: slots of a key tile in the kernel of dq.
    query_stages: key tiles in shared memory in the kernel of dq.
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


def hopper(T: int, S: int, H: int, blocks: int = 132) -> Hopper:
  """Return the sizes of a call.

  Args:
    T: rows.
    S: slots.
    H: size of a head, up to 128.
    blocks: multiprocessors of the GPU.
  """
  if H <= 64:
    config = Hopper(
      consumers=4,
      keys=64,
      stages=4,
      pingpong=False,
      query_keys=64 if T <= 512 else 128,
    )
  else:
    config = Hopper(
      fused_stages=2,
      fused_depth=1,
      key_places=1,
      key_stages=2,
      query_places=1,
      query_stages=2,
    )
  if T <= 64 < S:
    # With few rows the loads of keys limit the speed: keep more of them going.
    keys = 128 if H <= 64 else 64
    config = dataclasses.replace(
      config, consumers=1, keys=keys, stages=5, pingpong=False
    )
  return dataclasses.replace(config, blocks=blocks)


def hopper_splits(heads: int, S: int, config: Hopper) -> int:
  """Return into how many splits the slots are divided when rows are few.

  Splits give every thread block work. A split has at least 4 key tiles. If the
  heads alone give every block two items or more, a split has at least 16 tiles:
  merging shorter splits costs more than it gains.

  Args:
    heads: key heads of all sequences.
    S: slots.
    config: tile sizes.
  """
  tiles = -(-S // config.keys)
  least_tiles = 4 if heads < 2 * config.blocks else 16
  return min(
    max(-(-8 * config.blocks // heads), 1), max(tiles // least_tiles, 1)
  )
