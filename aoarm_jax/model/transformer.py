"""The one backbone: slots in generation order -> logits at every slot."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from aoarm_jax import config as config_lib
from aoarm_jax import orders, sharding
from aoarm_jax.model import layers, rotary
from aoarm_jax.model import rows as rows_lib


class Cache(NamedTuple):
  """Keys and values of the slots seen so far, in generation order.

  Attributes:
    k: [L, B, S, N, H] rotated keys, compute dtype.
    v: [L, B, S, N, H] values.
  """

  k: jax.Array
  v: jax.Array


def empty_cache(
  model: config_lib.Model, compute: config_lib.Compute, B: int, S: int
) -> Cache:
  zeros = jnp.zeros((model.L, B, S, model.N, model.H), compute.dtype)
  return Cache(k=zeros, v=zeros)


class Transformer(nnx.Module):
  """Embedding, rows of the mechanism, L blocks, norm, head.

  Pre-norm RMSNorm, RMSNorm on queries and keys, rotary pairs, GELU MLP, no
  biases, untied head. Parameters, norms, softmax and logits are float32,
  matmul inputs and the residual stream `compute.dtype`.
  """

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    vocabulary: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.model, self.compute, self.vocabulary = model, compute, vocabulary
    self.dtype = jnp.dtype(compute.dtype)
    # More than the vocabulary: BOS, EOS and MASK, which are never predicted.
    symbols = vocabulary + (3 if model.kind.masked else 2)
    self.embedding = layers.normal(rngs, (symbols, model.D))
    self.start = rows_lib.Start(model, rngs=rngs)
    self.blocks = jax.vmap(
      lambda key: layers.Block(model, self.dtype, rngs=nnx.Rngs(key))
    )(jax.random.split(rngs.params(), model.L))
    self.norm = layers.RMSNorm(model.D)
    if model.kind.condition:
      self.modulation = layers.Modulation(
        model.kind.condition, 2, model.D, rngs=rngs
      )
    self.head = layers.normal(rngs, (model.D, vocabulary))

  def __call__(self, slots: orders.Slots) -> jax.Array:
    """Logits of every slot that predicts, from all slots at once.

    Args:
      slots: int32 [B, S] each; what a row sees is `slots.visible`, or itself
        and the slots before it, or all slots if the mechanism is masked.

    Returns:
      float32 [B, R, V] logits of the token at each slot's target position; at
      `slots.queries` where they are given, else at all slots: R = S.
    """
    chex.assert_equal_shape(slots[:3])
    S = slots.tokens.shape[1]
    x, setting = self._start(slots)
    name = self.compute.attention

    def attend(q, k, v, visible):
      return pallas_kernels.any_order_attention(
        q, k, v, visible, implementation=None if name == "auto" else name
      )

    def body(x, block):
      return block(x, setting, attend, S), None

    if self.compute.remat:
      body = jax.checkpoint(body, prevent_cse=not self.compute.scan_layers)
    L = self.model.L
    x, _ = jax.lax.scan(
      body,
      x,
      jax.tree.map(lambda p: p[: L - 1], self.blocks),
      unroll=1 if self.compute.scan_layers else max(L - 1, 1),
    )
    return self._read_out(L - 1, x, setting, attend, S)

  def extend(
    self, slots: orders.Slots, cache: Cache, start: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Appends slots to a cache and predicts at each of them.

    Args:
      slots: int32 [B, R] each: the slots start .. start + R - 1.
      cache: of S slots, of which the first `start` are filled.
      start: int32 [B].

    Returns:
      float32 [B, R, V] logits, equal to those of `__call__` on all slots (at
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
        or [B, R] and then those of slots.queries.
    """
    x, setting = self._start(slots)
    R, W = at.shape[1], slots.tokens.shape[1]
    rows = jnp.arange(len(at))[:, None]
    keys, values = cache

    def attend_in(layer):
      def attend(q, k, v, visible):
        del visible  # That of a whole sequence.
        nonlocal keys, values
        keys = keys.at[layer, rows, at].set(k[:, :R])
        values = values.at[layer, rows, at].set(v[:, :R])
        # The last layer has the rows that are read out, which are the last.
        mine = seen[:, -q.shape[1] :]
        attention = functools.partial(
          pallas_kernels.any_order_attention,
          q, keys[layer], values[layer], mine,
        )  # fmt: skip
        if W == R:
          return attention()
        return _with_self(*attention(return_lse=True), q, k, v, R)

      return attend

    last = self.model.L - 1
    for layer in range(last):
      x = self._layer(layer)(x, setting, attend_in(layer), W)
    logits = self._read_out(last, x, setting, attend_in(last), W)
    return logits, Cache(keys, values)

  def _start(self, slots):
    content = layers.embed(self.embedding[...].astype(self.dtype), slots.tokens)
    rows = self.start(content, slots)
    rotation = functools.partial(
      rotary.rotation, H=self.model.H, base=self.model.rope_base
    )
    x = sharding.constrain(rows.x, "streams", "batch", "slots", "embed")
    query, key, condition = rows.query_position, rows.key_position, None
    if rows.target is not None:
      condition = jax.nn.silu(self.start.target[...])
    return x, layers.Setting(
      query_rotation=None if query is None else rotation(query),
      key_rotation=None if key is None else rotation(key[..., None]),
      condition=condition,
      target=rows.target,
      visible=rows.visible,
    )

  def _layer(self, index):
    return jax.tree.map(lambda p: p[index], self.blocks)

  def _read_out(self, last, x, setting, attend, S):
    """The last layer, norm and head, of the rows that are read out."""
    pick = functools.partial(rows_lib.read_out, S=S)
    x = self._layer(last)(x, setting, attend, S, pick)
    m = None
    if setting.condition is not None:
      m = self.modulation(setting.read_out(pick), self.dtype)
    x = layers.shifted(self.norm(x), m, 0)[0].astype(self.dtype)
    logits = jnp.einsum(
      "brd,dv->brv",
      x,
      self.head[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return sharding.constrain(logits, "batch", "slots", "vocabulary")


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
