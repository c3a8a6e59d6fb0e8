"""The backbone over a KV cache: a few slots at a time, in generation order."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import looks, parallel, rotary, transformer
from aoarm_jax.model import rows as rows_lib

_CACHE = ("batch", "heads", None, "head")
# Names of the parameters that are used in float32: those of norms and
# modulations, and the embedding of targets. All other parameters are cast to
# the compute dtype.
_FLOAT32 = ("scale", "weight", "bias", "target")


class Cache(NamedTuple):
  """Keys and values of the slots seen so far, in generation order.

  There is one array per layer, so that a loop can write into each in place.
  Heads come before slots, so that a matmul for each of B x M pairs reads the
  array without a transposition.

  Where slots have C rows, C * H takes the place of H.

  Attributes:
    k: L arrays [B, M, S, H], rotated keys of M heads, compute dtype.
    v: L arrays [B, M, S, H], values, compute dtype.
    position: int32 [B, 1, S, 1], the positions of the slots, as one array in a
      tuple. The tuple is empty where nothing asks for positions.
    tokens: int32 [B, 1, S, 1], the contents of the slots, as `position`.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  position: tuple[jax.Array, ...] = ()
  tokens: tuple[jax.Array, ...] = ()


def empty_cache(
  model: config_lib.Model, compute: config_lib.Compute, B: int, S: int
) -> Cache:
  """Return a cache of zeros for B sequences and S slots."""
  shape = (B, model.key_heads, S, model.H * model.kind.copies)
  zeros = sharding.constrain(jnp.zeros(shape, compute.dtype), *_CACHE)
  facts = (jnp.zeros((B, 1, S, 1), jnp.int32),)
  begins_as_token = model.shifted and model.kind.streams == 2
  return Cache(
    (zeros,) * model.L,
    (zeros,) * model.L,
    facts if model.look or begins_as_token else (),
    facts if begins_as_token else (),
  )


def resized(cache: Cache, S: int) -> Cache:
  """Return a cache with S slots.

  A smaller S keeps the first slots. A greater S adds empty slots.
  """

  def resize(x):
    more = max(0, S - x.shape[2])
    return jnp.pad(x[:, :, :S], ((0, 0), (0, 0), (0, more), (0, 0)))

  return jax.tree.map(resize, cache)


class Cached:
  """A network that predicts from a cache; make it inside jit, before loops.

  Parameters are cast and split into layers once, and the weights of queries,
  keys and values are merged. Otherwise XLA would do so in every step of a loop.

  All rows of a pass are one stream: with two streams, the query rows come after
  the content rows. Untied streams stay apart, and the attention joins them.
  """

  def __init__(self, network: transformer.Transformer):
    self.model, self.compute = network.model, network.compute
    self.layout = network.layout

    def cast(path: Any, param: Any) -> Any:
      names = {getattr(key, "name", getattr(key, "key", "")) for key in path}
      return param if names & {*_FLOAT32} else param.astype(network.dtype)

    self._network = jax.tree_util.tree_map_with_path(cast, network)
    self._layers = [self._network.layer(i) for i in range(self.model.L)]
    for layer in self._layers:
      if not layer.untied:
        layer.attention.merge()

  def empty_cache(self, B: int, S: int) -> Cache:
    """Return a cache of zeros for B sequences and S slots."""
    return empty_cache(self.model, self.compute, B, S)

  def prefill(self, slots: orders.Slots, cache: Cache) -> Cache:
    """Return the cache filled from slot 0 on; nothing is predicted.

    Args:
      slots: int32 [B, R] each: the slots 0 .. R - 1. With two streams
        `slots.visible` may say what the content rows see.
      cache: has at least R slots.
    """
    B = len(slots.tokens)
    if self.model.kind.streams == 2:
      no_positions = jnp.zeros((B, 0), jnp.int32)
      slots = slots._replace(queries=orders.Queries(no_positions, no_positions))
    R = slots.tokens.shape[1]
    slot_index = jnp.broadcast_to(jnp.arange(R)[None], (B, R))
    return self._cached(slots, cache, slot_index, None)[1]

  def extend(
    self, slots: orders.Slots, cache: Cache, start: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Append slots to a cache, and predict at each of them.

    Args:
      slots: int32 [B, R] each: the slots start .. start + R - 1. With two
        streams `slots.visible` may say what the content rows see. It counts
        from slot 0 and does not exceed start + R.
      cache: has S slots. The first `start` slots are filled.
      start: int32 [B].

    Returns:
      The logits, float32 [B, R, V], and the cache with the slots up to start +
      R - 1 filled. The logits equal those that the network computes from all
      slots at once. If `slots.queries` are given, the logits are theirs, [B, Q,
      V].
    """
    R = slots.tokens.shape[1]
    slot_index = start[:, None] + jnp.arange(R)
    visible = query_visible = slot_index + 1
    if slots.visible is not None:
      visible, query_visible = slots.visible[..., 0], slots.visible[..., -1]
    if self.model.kind.streams == 2 and slots.queries is None:
      queries = orders.Queries(slots.target_position, query_visible)
      slots = slots._replace(queries=queries)
    if slots.queries is not None:
      visible = jnp.concatenate([visible, slots.queries.visible], axis=1)
    return self._cached(slots, cache, slot_index, visible)

  def predict(
    self,
    slots: orders.Slots,
    cache: Cache,
    start: jax.Array,
    count: jax.Array,
    targets: jax.Array,
    *,
    as_group: bool = False,
  ) -> tuple[jax.Array, Cache]:
    """Append slots to a cache, and predict several targets from all of them.

    The targets are independent of each other. Each target is predicted as if it
    came next. With two streams, each target has a query row. A single stream
    predicts the first target at its last slot. For each other target it adds a
    copy of that slot. A copy sees the slots before the last slot and itself,
    and it does not enter the cache.

    Args:
      slots: int32 [B, R] each: the slots from `start` on.
      cache: has S slots. The first `start` slots are filled.
      start: int32 [B].
      count: int32 [B], 1 to R, the number of real slots. After them the cache
        holds junk, which nothing sees and later slots replace.
      targets: int32 [B, Q], positions. The first is the target of the last real
        slot.
      as_group: for two streams: the real slots are one group of
        orders.to_slots, so that each of their content rows sees all of them.

    Returns:
      The logits, float32 [B, Q, V], and the cache.
    """
    B, R = slots.tokens.shape
    Q = targets.shape[1]
    slot_index = start[:, None] + jnp.arange(R)
    filled = (start + count)[:, None]
    if self.model.kind.streams == 2:
      queries = orders.Queries(targets, jnp.broadcast_to(filled, (B, Q)))
      slots = slots._replace(queries=queries)
      if as_group:
        seen = jnp.broadcast_to(filled[..., None], (B, R, 2))
        slots = slots._replace(visible=seen)
      return self.extend(slots, cache, start)
    last = (count - 1)[:, None]

    def with_copies(x):
      copies = jnp.take_along_axis(x, last, axis=1)
      return jnp.concatenate([x, jnp.repeat(copies, Q - 1, axis=1)], axis=1)

    targets = jnp.concatenate([slots.target_position, targets[:, 1:]], axis=1)
    rows = orders.Slots(
      with_copies(slots.tokens), with_copies(slots.position), targets
    )
    visible = jnp.concatenate(
      [slot_index + 1, jnp.repeat(filled - 1, Q - 1, axis=1)], axis=1
    )
    logits, cache = self._cached(rows, cache, slot_index, visible)
    first = jnp.take_along_axis(logits, last[..., None], axis=1)
    return jnp.concatenate([first, logits[:, R:]], axis=1), cache

  def _cached(
    self,
    slots: orders.Slots,
    cache: Cache,
    slot_index: jax.Array,
    visible: jax.Array | None,
  ) -> tuple[jax.Array, Cache]:
    """Return logits of slots over a cache, and the cache with these slots.

    Args:
      slots: int32 [B, W] each. Slots after the first R are copies. They see
        themselves, and they are not written into the cache.
      cache: see `extend`.
      slot_index: int32 [B, R], the places in the cache of the first R slots.
      visible: int32, the number of leading slots of the cache that every row
        sees. It is [B, W], or [B, R] followed by that of slots.queries. None
        means that the rows are the slots from 0 on, which see what
        slots.visible says. Faster attention can be used for them.
    """
    R, W = slot_index.shape[1], slots.tokens.shape[1]
    rows_per_slot, has_copies = self.model.kind.copies, W > R
    asking = slots if slots.queries is None else slots.queries
    # If one row predicts, it would be alone in the last layer. There XLA
    # replaces a product with one row by products of elements, rounded to the
    # compute dtype, and their sum. The logits of a single text would then
    # differ from those of the same text in a batch. So another row stays with
    # it: with two streams its content row, else a copy of it. Untied streams
    # stay apart, so there a single text is rounded differently.
    is_lone = asking.target_position.size == rows_per_slot == 1
    is_lone = is_lone and visible is not None
    if is_lone and slots.queries is None:
      twice = functools.partial(jnp.repeat, repeats=2, axis=1)
      slots, visible = jax.tree.map(twice, (slots, visible))
      W = slots.tokens.shape[1]
    position, tokens = (
      tuple(_written(x, new[:, :R, None, None], slot_index) for x in before)
      for before, new in (
        (cache.position, slots.position),
        (cache.tokens, slots.tokens),
      )
    )
    contents = None
    if tokens:
      places = jnp.arange(tokens[0].shape[2])[None]
      contents = rows_lib.Contents(
        tokens[0][:, 0, :, 0], position[0][:, 0, :, 0], places
      )
    streams, setting = self._network.enter(slots, contents=contents)
    look = self.model.look
    if look and visible is not None:
      seen = self._seen(look, slots, slot_index, visible, *position)
      setting = setting._replace(seen=seen)
    if visible is not None:
      visible = jnp.repeat(rows_per_slot * visible, rows_per_slot, axis=1)
    R, W = R * rows_per_slot, W * rows_per_slot
    setting = setting.of_few(W, self.model.N // self.model.key_heads)
    scale = rotary.score_scale(self.model)
    keys, values = list(cache.k), list(cache.v)

    def attend_in(layer):
      def attend(queries, k, v, sequence_visible, seen=None):
        for all_layers, new in ((keys, k), (values, v)):
          new = _packed(new[:, :R], rows_per_slot)
          all_layers[layer] = _written(all_layers[layer], new, slot_index)
        if not queries[0].size:  # Nothing is predicted.
          return tuple(queries)
        if visible is None:
          # The rows are whole sequences, so the cache need not be read.
          name = self.compute.attention
          is_causal = slots.visible is None and rows_per_slot == 1
          return parallel.attention(
            queries,
            k,
            v,
            None if is_causal else sequence_visible,
            seen,
            implementation=None if name == "auto" else name,
            scale=scale,
          )
        if len(queries) > 1:  # Untied streams with as many rows each.
          row_visible = jnp.stack([visible[:, :R], visible[:, R:]], axis=2)
        else:
          # The last layer has only the rows that are read out, and these are
          # the last rows.
          row_visible = visible[:, -queries[0].shape[1] :]
        attention = functools.partial(
          parallel.attention,
          queries,
          _unpacked(keys[layer], rows_per_slot),
          _unpacked(values[layer], rows_per_slot),
          row_visible,
          seen,
          # xla reads the cache in place. Kernels would need a copy per step.
          implementation="xla",
          scale=scale,
        )
        if not has_copies:
          return attention()
        (q,), ((out,), (lse,)) = queries, attention(return_lse=True)
        return (_with_self(out, lse, q, k, v, R, scale),)

      return attend

    *first, last = range(self.model.L)
    for layer in first:
      streams = self._layers[layer](streams, setting, attend_in(layer), W)
    logits = self._network.read_out(
      self._layers[last],
      streams,
      setting,
      attend_in(last),
      streams[0].shape[1] if is_lone else W,
    )
    cache = Cache(tuple(keys), tuple(values), position, tokens)
    return logits[:, -1:] if is_lone else logits, cache

  def _seen(self, look, slots, slot_index, visible, position):
    """Return which slots of the cache each row sees, see setting.Setting.

    Args:
      look: what content rows see.
      slots: see `_cached`.
      slot_index: see `_cached`.
      visible: int32 [B, R + Q], of content rows and then of query rows.
      position: int32 [B, 1, S, 1], the positions of the slots of the cache.
    """
    S, R = position.shape[2], slot_index.shape[1]
    every = jnp.arange(S)[None]
    content = looks.seen(
      look,
      self.model.sentinels,
      looks.Places(slot_index, slots.position[:, :R]),
      looks.Places(every, position[:, 0, :, 0]),
    )
    if self.model.kind.untied:
      return content, None
    queries = every[:, None] < visible[:, R:, None]
    return (jnp.concatenate([content, queries], axis=1),)


def _packed(new, rows_per_slot):
  """Return rows [B, R, M, H] by slots of C rows: [B, R / C, M, C * H]."""
  if rows_per_slot == 1:
    return new
  B, R, M, H = new.shape
  new = new.reshape(B, R // rows_per_slot, rows_per_slot, M, H)
  return jnp.swapaxes(new, 2, 3).reshape(B, -1, M, rows_per_slot * H)


def _unpacked(cache, rows_per_slot):
  """Return a layer's cache by rows: [B, S * C, M, H], for C rows per slot."""
  B, M, _, width = cache.shape
  if rows_per_slot > 1:
    cache = cache.reshape(B, M, -1, width // rows_per_slot)
  return jnp.moveaxis(cache, 1, 2)


def _written(cache, new, slot_index):
  """Return a layer's cache with `new` [B, R, M, H] at slot_index [B, R]."""
  if slot_index.size == 1:
    # A slice is one write, without a look at what was there. The start is
    # moved into the cache if it lies behind: only a text that has ended has
    # such a slot, and nothing reads its cache any more.
    start = (0, 0, slot_index[0, 0], 0)
    new = jnp.moveaxis(new, 1, 2)
    cache = jax.lax.dynamic_update_slice(cache, new, start)
  else:
    rows = jnp.arange(len(slot_index))[:, None]
    # JAX drops writes to slots beyond the last slot.
    cache = cache.at[rows, :, slot_index].set(new, unique_indices=True)
  return sharding.constrain(cache, *_CACHE)


def _with_self(out, lse, q, k, v, R, scale):
  """Return attention in which the rows from R on also see their own slot.

  The slots of these rows are not in the cache.

  Args:
    out, lse: [B, W, N, H] and [B, W, N], the attention over the cache.
    q: [B, W, N, H] of the rows.
    k, v: [B, W, M, H] of the rows.
    R: the number of rows before them.
    scale: factor of the scores.
  """
  f32 = jnp.float32
  if (group := q.shape[2] // k.shape[2]) > 1:
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
  score = jnp.sum(q[:, R:].astype(f32) * k[:, R:], axis=-1) * scale
  # The share of a row's own slot. It is 1 if the row sees nothing else, because
  # lse is then -inf.
  share = jax.nn.sigmoid(score - lse[:, R:])[..., None]
  with_self = out[:, R:] + share * (v[:, R:].astype(f32) - out[:, R:])
  return jnp.concatenate([out[:, :R], with_self.astype(out.dtype)], axis=1)
