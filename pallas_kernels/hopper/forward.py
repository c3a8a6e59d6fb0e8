"""Forward kernels for Hopper: attention in which rows see leading slots.

`masks` says what a unit is. In a thread block, each of C warpgroups (the
consumers) computes a unit, and one more warpgroup loads the tiles of keys and
values that all of them share.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.hopper import masks as hopper_masks
from pallas_kernels.hopper import mosaic, pipeline
from pallas_kernels.hopper import short as hopper_short
from pallas_kernels.hopper import softmax as hopper_softmax
from pallas_kernels.hopper import streams as hopper_streams

ROWS = hopper_masks.ROWS


def forward(
  q: hopper_streams.Streams,
  k: jax.Array,
  v: jax.Array,
  visible: hopper_masks.Visible | None,
  scale: float,
  config: tuning.Hopper,
  return_out_error: bool = False,
  splits: int = 1,
) -> tuple[Any, ...]:
  """Return (out, lse) of attention, and out_error if it is asked for.

  Args:
    q: [B, T, Nq, H], see `streams`; T a multiple of 8.
    k: [B, S, N, H], S a multiple of 8, at least 64; or dealt out to devices as
      masks.key_tile says.
    v: like k.
    visible: None for causal.
    scale: factor of the scores.
    config: tile sizes.
    return_out_error: whether to return out_error: the exact output minus `out`,
      which is the rounding error of `out`.
    splits: into how many splits the slots are divided, for few rows and many
      slots. Every split is attended to separately.

  Returns:
    out [B * splits, T, Nq, H], see `streams`; lse float32 [B * splits, Nq, T
    rounded up to 64] in base 2, +inf for a row that sees no slot; out_error,
    like out.
  """
  B, T, Nq, H = hopper_streams.shape(q)
  dtype = k.dtype
  S, N = hopper_masks.key_sizes(q, k)
  G = Nq // N
  units = pl.cdiv(T, ROWS) * G
  factor = scale / hopper_softmax.LN2
  is_plain = splits == 1 and not return_out_error
  if max(T, S) <= config.short and units <= 4 and is_plain:
    return hopper_short.forward(q, k, v, visible, factor)
  out = hopper_streams.like(q, B * splits)
  lse = jax.ShapeDtypeStruct(
    (B * splits, Nq, pl.cdiv(T, ROWS) * ROWS), jnp.float32
  )
  C, stages = config.consumers, config.stages
  share = pipeline.share(
    hopper_masks.Block.items(B, T, N, G, C, splits), config.blocks
  )
  row_tiles = [mosaic.tiles((1, C, ROWS, H), dtype)]
  if visible is not None:
    row_tiles.append(plgpu.SMEM((1, C, ROWS), jnp.int32))
  key_tiles = mosaic.tiles((stages, config.keys, H), dtype)
  return mosaic.kernel(
    functools.partial(
      _long, factor=factor, config=config, share=share, splits=splits
    ),
    out_type=(out, lse, out) if return_out_error else (out, lse),
    grid=(share.blocks,),
    grid_names=("block",),
    kernel_name="attention_forward",
    num_threads=C + 1,
    thread_name="warpgroup",
    scratch_types=[
      pipeline.ring(*row_tiles, readers=C, copies=C),
      pipeline.ring(key_tiles, readers=C),
      pipeline.ring(key_tiles, readers=C),
      mosaic.tiles((C, ROWS, H), dtype),
      plgpu.SMEM((C, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=C),
    ],
  )(q, k, v, *(visible or ()))


def _long(q, k, v, *refs, factor, config, share, splits):
  """The kernel of sequences of any length."""
  *arrays, rows, keys, values, out_smem, lse_smem, turn = refs
  visible = None
  if len(arrays) > 3:
    visible, arrays = hopper_masks.Visible(*arrays[:3]), arrays[3:]
  out, lse, *out_error = arrays
  thread_block = _ThreadBlock(
    q=q,
    k=k,
    v=v,
    visible=visible,
    out=out,
    lse=lse,
    out_error=out_error[0] if out_error else None,
    rows=rows,
    keys=keys,
    values=values,
    out_smem=out_smem,
    lse_smem=lse_smem,
    turn=turn,
    factor=factor,
    config=config,
    share=share,
    splits=splits,
    warpgroup=lax.axis_index("warpgroup"),
  )
  pipeline.run(
    config.consumers,
    share.rounds(),
    thread_block.work,
    thread_block.fetch,
    [keys, values],
    [(rows, 1)],
    thread_block.take_turn,
  )


class _Round(NamedTuple):
  """What a consumer knows of its unit in one round.

  Attributes:
    queries: [64, H] in registers.
    visible: int32 [64] in registers; None for causal.
    start: first row of the unit.
    first: first key tile.
    uses: uses of the key rings before this round.
  """

  queries: jax.Array
  visible: jax.Array | None
  start: jax.Array
  first: mosaic.Index
  uses: jax.Array


class _Carry(NamedTuple):
  """Running results of a unit (online softmax, arXiv 1805.02867).

  Attributes:
    accumulator: float32 [64, H], sum of the weighted values.
    row_max: float32 [64], largest scaled score so far, base 2.
    row_sum: float32 [64], sum of the weights relative to row_max.
  """

  accumulator: jax.Array
  row_max: jax.Array
  row_sum: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _ThreadBlock:
  """The code of a thread block, and all that it refers to.

  Attributes:
    q, k, v, visible, out, lse, out_error: references in global memory.
    rows: ring of query tiles and `visible`, used once a round.
    keys: ring of key tiles.
    values: ring of value tiles.
    out_smem: output tiles on their way to global memory, one per consumer.
    lse_smem: log-sum-exps on their way to global memory.
    turn: barrier of two consumers that take turns.
    factor: factor of the scores as exponents of 2.
    config: tile sizes.
    share: the items of the thread block.
    splits: splits of the slots.
    warpgroup: index of the warpgroup that runs the code.
  """

  q: hopper_streams.Streams
  k: mosaic.Ref
  v: mosaic.Ref
  visible: hopper_masks.Visible | None
  out: hopper_streams.Streams
  lse: mosaic.Ref
  out_error: hopper_streams.Streams | None
  rows: pipeline.Ring
  keys: pipeline.Ring
  values: pipeline.Ring
  out_smem: mosaic.Ref
  lse_smem: mosaic.Ref
  turn: mosaic.Ref
  factor: float
  config: tuning.Hopper
  share: pipeline.Share
  splits: int
  warpgroup: jax.Array

  @property
  def takes_turns(self) -> bool:
    return self.config.pingpong and self.config.consumers == 2

  def plan(
    self, r: mosaic.Index
  ) -> tuple[hopper_masks.Block, mosaic.Index, jax.Array]:
    """Return the Block of a round, its first key tile, and their number."""
    _, T, Nq, _ = hopper_streams.shape(self.q)
    S, N = hopper_masks.key_sizes(self.q, self.k)
    tiles = pl.cdiv(pl.cdiv(S, self.config.keys), self.splits)
    block = hopper_masks.Block(
      self.share.item(r),
      T,
      N,
      Nq // N,
      self.config.consumers,
      self.visible,
      self.splits,
    )
    first = block.split * tiles
    # A consumer ends its last turn when the other one begins the next item, so
    # every item must have a turn.
    least_steps = 1 if self.takes_turns else 0
    end = pl.cdiv(block.most(), self.config.keys)
    return block, first, jnp.clip(end - first, least_steps, tiles)

  def take_turn(self) -> None:
    """Let the other consumer go on, and wait until it does the same."""
    if self.takes_turns:
      plgpu.barrier_arrive(self.turn)
      plgpu.barrier_wait(self.turn)

  def work(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Compute the consumer's unit of round r."""
    block, first, steps = self.plan(r)
    unit = block.unit(self.warpgroup)
    q_tile, *visible_tile = (x.at[self.warpgroup] for x in self.rows.wait(r))
    visible = None
    if self.visible:
      visible = mosaic.load(visible_tile[0], mosaic.ROW_LAYOUT)
    queries = mosaic.load(q_tile, mosaic.TILE_LAYOUT)
    # These were ordinary loads; the next write to the tile is by TMA.
    plgpu.commit_smem()
    self.rows.release(r)
    this_round = _Round(queries, visible, unit.start, first, uses)
    H, size = self.v.shape[-1], self.config.keys
    carry = _Carry(
      mosaic.full((ROWS, H), 0, mosaic.TILE_LAYOUT),
      mosaic.full((ROWS,), -jnp.inf, mosaic.ROW_LAYOUT),
      mosaic.full((ROWS,), 0, mosaic.ROW_LAYOUT),
    )
    # The first key tiles are visible to all rows and need no mask.
    unmasked = jnp.where(unit.exists, unit.least // size, 0) - first
    unmasked = jnp.clip(unmasked, 0, steps)
    end = jnp.clip(pl.cdiv(unit.most, size) - first, 0, steps)
    for low, high, is_masked in ((0, unmasked, False), (unmasked, end, True)):
      step = functools.partial(
        self.step, this_round=this_round, is_masked=is_masked
      )
      carry = lax.fori_loop(low, high, step, carry)
    lax.fori_loop(end, steps, functools.partial(self.skip, uses=uses), None)
    b = block.b * self.splits + block.split
    rows = pl.ds(unit.start, ROWS)
    pl.when(unit.exists)(lambda: self.store(carry, b, rows, block.n, unit.g))
    return uses + steps

  def step(
    self,
    i: mosaic.Index,
    carry: _Carry,
    *,
    this_round: _Round,
    is_masked: bool,
  ) -> _Carry:
    """Attend to the i-th key tile of the round."""
    queries, visible, start, first, uses = this_round
    accumulator, row_max, row_sum = carry
    size = self.config.keys
    (k_tile,) = self.keys.wait(uses + i)
    score = hopper_softmax.scores(queries, k_tile, size, self.take_turn)
    self.keys.release(uses + i)
    shape = score.shape
    if is_masked:
      mask = hopper_masks.mask(visible, start, (first + i) * size, shape)
      score = jnp.where(mask, score, -jnp.inf)
    row_max_before = row_max
    row_max = jnp.maximum(row_max, score.max(axis=1) * self.factor)
    finite_max = row_max
    if is_masked:
      # A row that has seen no slot so far has no maximum.
      finite_max = jnp.where(row_max == -jnp.inf, 0.0, row_max)
    decay = jnp.exp2(row_max_before - finite_max)
    weight = jnp.exp2(
      score * self.factor - mosaic.along_rows(finite_max, shape)
    )
    accumulator *= mosaic.along_rows(decay, accumulator.shape)
    row_sum = row_sum * decay + weight.sum(axis=1)
    weight = weight.astype(self.v.dtype)
    # This keeps the compiler from moving the sums behind the wait.
    accumulator, row_sum, row_max, weight = lax.optimization_barrier(
      (accumulator, row_sum, row_max, weight)
    )
    if self.takes_turns:
      plgpu.barrier_arrive(self.turn)
    (v_tile,) = self.values.wait(uses + i)
    if self.takes_turns:
      plgpu.barrier_wait(self.turn)
    (accumulator,) = mosaic.accumulate(
      (accumulator,), lambda result: mosaic.wgmma(result, weight, v_tile)
    )
    self.values.release(uses + i)
    return _Carry(accumulator, row_max, row_sum)

  def skip(self, i: mosaic.Index, _: None, *, uses: jax.Array) -> None:
    """Pass over a key tile that only the other consumers see."""
    for ring in (self.keys, self.values):
      ring.wait(uses + i)
      ring.release(uses + i)
    self.take_turn()
    self.take_turn()

  def store(
    self,
    carry: _Carry,
    b: mosaic.Index,
    rows: Any,
    n: mosaic.Index,
    g: mosaic.Index,
  ) -> None:
    """Write the results of a unit to global memory."""
    G = hopper_streams.shape(self.q)[2] // self.k.shape[2]
    out_tile = self.out_smem.at[self.warpgroup]
    lse_tile = self.lse_smem.at[self.warpgroup]
    # The copies of the round before must have left these tiles.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    exact = hopper_softmax.finish(
      carry.accumulator, carry.row_max, carry.row_sum, out_tile, lse_tile
    )
    plgpu.commit_smem()
    target = hopper_streams.tile(self.out, b, rows, n, g, G)
    hopper_streams.store(out_tile, target)
    mosaic.copy_out(lse_tile, self.lse.at[b, n * G + g, rows])
    if self.out_error is not None:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      rounded = exact.astype(self.v.dtype).astype(jnp.float32)
      out_tile[...] = (exact - rounded).astype(self.v.dtype)
      plgpu.commit_smem()
      target = hopper_streams.tile(self.out_error, b, rows, n, g, G)
      hopper_streams.store(out_tile, target)

  def fetch(self, r: mosaic.Index, uses: jax.Array) -> jax.Array:
    """Load the queries, keys and values of round r."""
    block, first, steps = self.plan(r)
    block.load(self.rows, r, (self.q,))
    B, size = self.q[0].shape[0], self.config.keys

    def load_tiles(i, _):
      where = B, block.b, (first + i) * size, size, block.n
      for ring, source in ((self.keys, self.k), (self.values, self.v)):
        ring.load(uses + i, [hopper_masks.key_tile(source, *where)])

    lax.fori_loop(0, steps, load_tiles, None)
    return uses + steps
