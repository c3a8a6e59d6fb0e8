"""How the warpgroups of a Hopper thread block share work and memory.

Some warpgroups compute, and one more warpgroup loads what they read. Loaded
tiles pass through rings of stages in shared memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import streams as hopper_streams


class Ring(NamedTuple):
  """Stages in shared memory that one warpgroup fills and others read.

  The uses of a ring are numbered from 0 over the whole life of a thread block.
  Use i has stage i % stages, which is filled again once all readers have
  released it. So loads run ahead of the work, even into the next item.

  Attributes:
    tiles: references [stages, ...], or [stages, copies, ...] if several copies
      fill a stage of a tile, as one for each reader.
    full: barriers at which the copies arrive.
    free: barriers at which the readers arrive.
  """

  tiles: tuple[mosaic.Ref, ...]
  full: mosaic.Ref
  free: mosaic.Ref

  @property
  def stages(self) -> int:
    return self.tiles[0].shape[0]

  def load(self, use: mosaic.Index, sources: Sequence[Any]) -> None:
    """Fill the stage of a use, as soon as it is free.

    Args:
      use: number of the use.
      sources: for each of the tiles, a reference in global memory or a Tile of
        streams, or a list of these, one for each copy.
    """
    stage = lax.rem(use, self.stages)
    pl.when(use >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[stage]))
    for source, tile in zip(sources, self.tiles):
      target = tile.at[stage]
      if isinstance(source, list):
        for copy, x in enumerate(source):
          hopper_streams.load(x, target.at[copy], self.full.at[stage])
      else:
        hopper_streams.load(source, target, self.full.at[stage])

  def wait(self, use: mosaic.Index) -> list[mosaic.Ref]:
    """Wait until the stage of a use is filled; return its references."""
    stage = lax.rem(use, self.stages)
    plgpu.barrier_wait(self.full.at[stage])
    return [tile.at[stage] for tile in self.tiles]

  def release(self, use: mosaic.Index) -> None:
    """Say that one reader has finished with the stage of a use."""
    plgpu.barrier_arrive(self.free.at[lax.rem(use, self.stages)])

  def wait_until_released(self, uses: mosaic.Index) -> None:
    """Wait until all `uses` are released; a thread block may end only then."""
    wait_until_released(self.free, uses, self.stages)


def ring(*tiles: mosaic.Ref, readers: int, copies: int = 1) -> Ring:
  """Return the scratch types of a Ring.

  Args:
    *tiles: shared memory [stages, ...] or [stages, copies, ...].
    readers: warpgroups that release each use.
    copies: copies that fill a stage of a tile.
  """
  stages = tiles[0].shape[0]
  return Ring(
    tiles,
    plgpu.Barrier(num_barriers=stages, num_arrivals=len(tiles) * copies),
    plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
  )


def wait_until_released(
  free: mosaic.Ref, uses: mosaic.Index, stages: int
) -> None:
  """Wait at the barriers `free` for the releases not waited for so far."""

  def wait(i, _):
    pl.when(i >= stages)(
      lambda: plgpu.barrier_wait(free.at[lax.rem(i, stages)])
    )

  lax.fori_loop(uses, uses + stages, wait, None)


class Share(NamedTuple):
  """The items of work of one thread block, when all blocks share the work.

  Blocks take items in turn. In every other round they take them in the opposite
  order: a block that has the longest item of one round has the shortest of the
  next.

  Attributes:
    items: items of all blocks.
    blocks: thread blocks, on the axis "block" of the grid.
  """

  items: int
  blocks: int

  def rounds(self) -> jax.Array:
    """Return how many items this block has."""
    full_rounds, remainder = divmod(self.items, self.blocks)
    forward, backward = self._positions()
    position = backward if full_rounds % 2 else forward
    return full_rounds + jnp.where(position < remainder, 1, 0)

  def item(self, r: mosaic.Index) -> jax.Array:
    """Return the number of this block's item in round r."""
    forward, backward = self._positions()
    return r * self.blocks + jnp.where(lax.rem(r, 2) == 0, forward, backward)

  def _positions(self) -> tuple[jax.Array, jax.Array]:
    block = lax.axis_index("block")
    return block, self.blocks - 1 - block


def share(items: int, blocks: int) -> Share:
  """Return the Share of each of at most `blocks` thread blocks."""
  return Share(items, min(items, blocks))


# Registers of a thread in a warpgroup that computes and in the one that loads,
# by the number of warpgroups that compute. They are multiples of 8. Their
# average over the block must not exceed what a thread starts with: 168, 128 and
# 96.
REGISTERS = {2: (240, 24), 3: (160, 32), 4: (112, 32)}


def run(
  readers: int,
  rounds: mosaic.Index,
  work: Callable[[Any, Any], Any],
  fetch: Callable[[Any, Any], Any],
  streamed: Sequence[Ring],
  per_round: Sequence[tuple[Ring, int]],
  take_turn: Callable[[], None] | None = None,
) -> None:
  """Run the rounds of a thread block: `readers` warpgroups compute, one loads.

  Args:
    readers: warpgroups that compute.
    rounds: items of the block.
    work: the round of a warpgroup that computes: (round, uses of the streamed
      rings before it) -> uses after it.
    fetch: the same for the warpgroup that loads.
    streamed: the rings whose uses `work` and `fetch` count.
    per_round: rings, and how often every round uses them.
    take_turn: waits for the other one of two warpgroups that take turns. The
      second warpgroup lets the first one begin. None: they do not take turns.
  """
  warpgroup = lax.axis_index("warpgroup")
  more, fewer = REGISTERS.get(readers, (None, None))

  @pl.when(warpgroup < readers)
  def _():
    if more:
      plgpu.set_max_registers(more, action="increase")
    if take_turn:
      pl.when(warpgroup == 1)(take_turn)
    lax.fori_loop(0, rounds, work, jnp.int32(0))
    if take_turn:
      pl.when(warpgroup == 0)(take_turn)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == readers)
  def _():
    if fewer:
      plgpu.set_max_registers(fewer, action="decrease")
    uses = lax.fori_loop(0, rounds, fetch, jnp.int32(0))
    for ring in streamed:
      ring.wait_until_released(uses)
    for ring, uses_of_round in per_round:
      ring.wait_until_released(rounds * uses_of_round)
