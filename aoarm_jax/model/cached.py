"""The backbone over a KV cache: some slots at a time, in generation order."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parallel, transformer

_CACHE = ("batch", "heads", None, "head")
# Parameters that are used in float32, by name: of norms and modulations, and
# the embedding of targets. All others are cast to the compute dtype.
_FLOAT32 = ("scale", "weight", "bias", "target")


class Cache(NamedTuple):
  """Keys and values of the slots seen so far, in generation order.

  One array a layer, so that a loop writes into each where it lies; heads before
  slots, so that a matmul for each of B x N reads it as it lies.

  Attributes:
    k: L times [B, N, S, H], rotated keys, compute dtype.
    v: L times [B, N, S, H], values.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]


def empty_cache(
  model: config_lib.Model, compute: config_lib.Compute, B: int, S: int
) -> Cache:
  zeros = jnp.zeros((B, model.N, S, model.H), compute.dtype)
  zeros = sharding.constrain(zeros, *_CACHE)
  return Cache(k=(zeros,) * model.L, v=(zeros,) * model.L)


def resized(cache: Cache, S: int) -> Cache:
  """With S slots: the first ones, or those there are and empty ones."""

  def resize(x):
    more = max(0, S - x.shape[2])
    return jnp.pad(x[:, :, :S], ((0, 0), (0, 0), (0, more), (0, 0)))

  return jax.tree.map(resize, cache)


class Cached:
  """A network that predicts from a cache; made inside jit, before any loop.

  Parameters are cast and cut into layers once: XLA would do it in every step.
  """

  def __init__(self, network: transformer.Transformer):
    self.model, self.compute = network.model, network.compute
    self.layout = network.layout

    def cast(path, param):
      names = {getattr(key, "name", getattr(key, "key", "")) for key in path}
      return param if names & {*_FLOAT32} else param.astype(network.dtype)

    self._network = jax.tree_util.tree_map_with_path(cast, network)
    self._layers = [self._network.layer(i) for i in range(self.model.L)]

  def empty_cache(self, B: int, S: int) -> Cache:
    return empty_cache(self.model, self.compute, B, S)

  def prefill(self, slots: orders.Slots, cache: Cache) -> Cache:
    """Fills the cache from slot 0 on; predicts nothing.

    Args:
      slots: int32 [B, R] each: the slots 0 .. R - 1.
      cache: of at least R slots.
    """
    B = len(slots.tokens)
    if self.model.kind.streams == 2:
      none = jnp.zeros((B, 0), jnp.int32)
      slots = slots._replace(queries=orders.Queries(none, none))
    R = slots.tokens.shape[1]
    at = jnp.broadcast_to(jnp.arange(R)[None], (B, R))
    return self._cached(slots, cache, at, None)[1]

  def extend(
    self, slots: orders.Slots, cache: Cache, start: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Appends slots to a cache and predicts at each of them.

    Args:
      slots: int32 [B, R] each: the slots start .. start + R - 1.
      cache: of S slots, of which the first `start` are filled.
      start: int32 [B].

    Returns:
      float32 [B, R, V] logits, equal to the network's on all slots (at
      `slots.queries` where they are given, [B, Q, V]), and the cache with slots
      up to start + R - 1 filled.
    """
    R = slots.tokens.shape[1]
    at = start[:, None] + jnp.arange(R)
    seen = at + 1
    if slots.queries is not None:
      seen = jnp.concatenate([seen, slots.queries.visible], axis=1)
    return self._cached(slots, cache, at, seen)

  def predict(
    self,
    slots: orders.Slots,
    cache: Cache,
    start: jax.Array,
    count: jax.Array,
    targets: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Appends slots to a cache and predicts several targets from all of them.

    The targets are independent of each other: each is predicted as if it came
    next. Two streams add a query row for each. A single stream predicts at its
    last slot, whose target is the first one; for the others it adds copies of
    that slot, which see the slots before it and themselves, and are not kept.

    Args:
      slots: int32 [B, R] each: the slots from `start` on.
      cache: of S slots, of which the first `start` are filled.
      start: int32 [B].
      count: int32 [B], 1 to R: how many of the slots are real. The cache holds
        junk after them, which nothing sees and later slots replace.
      targets: int32 [B, Q] positions; the first is the target of the last real
        slot.

    Returns:
      float32 [B, Q, V] logits and the cache.
    """
    B, R = slots.tokens.shape
    Q = targets.shape[1]
    at = start[:, None] + jnp.arange(R)
    filled = (start + count)[:, None]
    if self.model.kind.streams == 2:
      queries = orders.Queries(targets, jnp.broadcast_to(filled, (B, Q)))
      return self.extend(slots._replace(queries=queries), cache, start)
    last = (count - 1)[:, None]

    def with_copies(x):
      copies = jnp.take_along_axis(x, last, axis=1)
      return jnp.concatenate([x, jnp.repeat(copies, Q - 1, axis=1)], axis=1)

    targets = jnp.concatenate([slots.target_position, targets[:, 1:]], axis=1)
    rows = orders.Slots(
      with_copies(slots.tokens), with_copies(slots.position), targets
    )
    seen = jnp.concatenate(
      [at + 1, jnp.repeat(filled - 1, Q - 1, axis=1)], axis=1
    )
    logits, cache = self._cached(rows, cache, at, seen)
    first = jnp.take_along_axis(logits, last[..., None], axis=1)
    return jnp.concatenate([first, logits[:, R:]], axis=1), cache

  def _cached(self, slots, cache, at, seen):
    """Rows [B, W] over a cache, into which the first of them are written.

    Args:
      slots: more than `at` has are copies: they see themselves, and stay out.
      cache: see `extend`.
      at: int32 [B, R], where the first R slots are written.
      seen: int32, how many leading slots of the cache every row sees: [B, W],
        or [B, R] and then those of slots.queries. None: the rows are the slots
        from 0 on, and causal, which faster attention knows.
    """
    streams, setting = self._network.enter(slots)
    R, W = at.shape[1], slots.tokens.shape[1]
    keys, values = list(cache.k), list(cache.v)

    def attend_in(layer):
      def attend(q, k, v, visible):
        del visible  # That of a whole sequence.
        keys[layer] = _written(keys[layer], k[:, :R], at)
        values[layer] = _written(values[layer], v[:, :R], at)
        if seen is None:
          name = self.compute.attention
          return parallel.attention(
            q, k, v, None, implementation=None if name == "auto" else name
          )
        # The last layer has the rows that are read out, which are the last.
        mine = seen[:, -q.shape[1] :]
        attention = functools.partial(
          parallel.attention,
          q,
          jnp.moveaxis(keys[layer], 1, 2),
          jnp.moveaxis(values[layer], 1, 2),
          mine,
          # Reads the cache as it lies; kernels would have it copied every step.
          implementation="xla",
        )
        if W == R:
          return attention()
        return _with_self(*attention(return_lse=True), q, k, v, R)

      return attend

    *first, last = range(self.model.L)
    for layer in first:
      streams = self._layers[layer](streams, setting, attend_in(layer), W)
    logits = self._network.read_out(
      self._layers[last], streams, setting, attend_in(last), W
    )
    return logits, Cache(tuple(keys), tuple(values))


def _written(cache, new, at):
  """`new` [B, R, N, H] written into a layer's cache at the slots at [B, R]."""
  rows = jnp.arange(len(at))[:, None]
  # Slots beyond the last one are dropped.
  cache = cache.at[rows, :, at].set(new, unique_indices=True)
  return sharding.constrain(cache, *_CACHE)


def _with_self(out, lse, q, k, v, R):
  """Lets the rows from R on see their own slot too, which is not in the cache.

  Args:
    out, lse: [B, W, N, H] and [B, W, N], of the slots in the cache.
    q, k, v: [B, W, N, H] of the rows.
    R: rows before.
  """
  f32 = jnp.float32
  score = (
    jnp.sum(q[:, R:].astype(f32) * k[:, R:], axis=-1) * q.shape[-1] ** -0.5
  )
  # Of a row that sees nothing else, all.
  share = jax.nn.sigmoid(score - lse[:, R:])[..., None]
  own = out[:, R:] + share * (v[:, R:].astype(f32) - out[:, R:])
  return jnp.concatenate([out[:, :R], own.astype(out.dtype)], axis=1)
