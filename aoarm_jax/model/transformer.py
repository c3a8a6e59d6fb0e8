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
from aoarm_jax.model import layers, mechanisms, rotary


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
  """Embedding, mechanism, L blocks, norm, head.

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
    # Two rows more than the vocabulary: BOS and EOS, which are never predicted.
    self.embedding = layers.normal(rngs, (vocabulary + 2, model.D))
    self.mechanism = mechanisms.MECHANISMS[model.mechanism](model, rngs=rngs)
    self.blocks = jax.vmap(
      lambda key: layers.Block(model, self.dtype, rngs=nnx.Rngs(key))
    )(jax.random.split(rngs.params(), model.L))
    self.norm = layers.RMSNorm(model.D)
    self.head = layers.normal(rngs, (model.D, vocabulary))

  def __call__(self, slots: orders.Slots) -> jax.Array:
    """Every slot sees itself and those before it.

    Args:
      slots: int32 [B, S] each.

    Returns:
      float32 [B, S, V] logits of the token at each slot's target position.
    """
    chex.assert_equal_shape(slots)
    x, rotations = self._start(slots)
    name = self.compute.attention
    attend = functools.partial(
      pallas_kernels.any_order_attention,
      implementation=None if name == "auto" else name,
    )

    def body(x, block):
      return block(x, *rotations, attend), None

    if self.compute.remat:
      body = jax.checkpoint(body, prevent_cse=not self.compute.scan_layers)
    L = self.model.L
    x, _ = jax.lax.scan(
      body,
      x,
      jax.tree.map(lambda p: p[: L - 1], self.blocks),
      unroll=1 if self.compute.scan_layers else max(L - 1, 1),
    )
    return self._read_out(self._layer(L - 1)(x, *rotations, attend, last=True))

  def extend(
    self, slots: orders.Slots, cache: Cache, start: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Appends slots to a cache and predicts at each of them.

    Args:
      slots: int32 [B, R] each: the slots start .. start + R - 1.
      cache: of S slots, of which the first `start` are filled.
      start: int32 [B].

    Returns:
      float32 [B, R, V] logits, equal to those of `__call__` on all slots, and
      the cache with slots up to start + R - 1 filled.
    """
    B, R = slots.tokens.shape
    x, rotations = self._start(slots)
    at = start[:, None] + jnp.arange(R)
    rows = jnp.arange(B)[:, None]
    keys, values = cache

    for layer in range(self.model.L):

      def attend(q, k, v, layer=layer):
        nonlocal keys, values
        keys = keys.at[layer, rows, at].set(k)
        values = values.at[layer, rows, at].set(v)
        return pallas_kernels.any_order_attention(
          q, keys[layer], values[layer], at + 1
        )

      x = self._layer(layer)(
        x, *rotations, attend, last=layer == self.model.L - 1
      )
    return self._read_out(x), Cache(keys, values)

  def _start(self, slots):
    content = layers.embed(self.embedding[...].astype(self.dtype), slots.tokens)
    rows = self.mechanism(content, slots)
    rotation = functools.partial(
      rotary.rotation, H=self.model.H, base=self.model.rope_base
    )
    x = sharding.constrain(rows.x, "streams", "batch", "slots", "embed")
    return x, (
      None if rows.query_position is None else rotation(rows.query_position),
      None if rows.key_position is None else rotation(rows.key_position),
    )

  def _layer(self, index):
    return jax.tree.map(lambda p: p[index], self.blocks)

  def _read_out(self, x):
    x = self.norm(x[0]).astype(self.dtype)
    logits = jnp.einsum(
      "bsd,dv->bsv",
      x,
      self.head[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return sharding.constrain(logits, "batch", "slots", "vocabulary")


def training_flops_per_token(model: config_lib.Model, vocabulary: int) -> float:
  """Matmul FLOPs of forward and backward (3 x forward), per target.

  Counts what the model needs: causal attention over the visible slots only,
  no recomputation, no one-hot embedding.
  """
  D, F, L, S = model.D, model.F, model.L, model.S
  streams = mechanisms.MECHANISMS[model.mechanism].streams
  row_layers = streams * (L - 1) + 1  # The last layer: read-out rows only.
  key_value = 2 * 2 * D * D * L
  row = 2 * (2 * D * D + 2 * D * F) + 4 * D * (S + 1) / 2
  return 3 * (key_value + row * row_layers + 2 * D * vocabulary) * S / model.T
