"""Norm, attention and MLP: one pre-norm block over G streams of rows.

Keys and values always come from the content stream, index 0. The stream that
is read out is the last one. With G = 1 both are the same rows. Streams are the
leading axis, so that one stream is contiguous memory.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout

from aoarm_jax import config as config_lib
from aoarm_jax.model import rotary

# (q [B, S, N * G, H], k [B, S, N, H], v [B, S, N, H]) -> [B, S, N * G, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

INIT_SCALE = 0.02


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale=INIT_SCALE):
  return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Rows of `table` [V, D] at int32 `tokens` [...]: [..., D].

  For small vocabularies: the gradient is a one-hot matmul, because that of a
  gather is a scatter in which all tokens contend for the few rows.
  """
  return _row_major(table[tokens])


def _row_major(x):
  # Left to itself, XLA's GPU layout pass puts the batch innermost here and so
  # in the whole residual stream: a transposition around every matmul, and
  # 12% (two streams) or 3% (one) of a training step on an H200.
  order = layout.Layout(major_to_minor=tuple(range(x.ndim)))
  return layout.with_layout_constraint(x, order)


def _embed_forward(table, tokens):
  return embed(table, tokens), (tokens, table.shape[0])


def _embed_backward(residuals, gradient):
  tokens, V = residuals
  one_hot = jax.nn.one_hot(tokens, V, dtype=gradient.dtype)
  return jnp.einsum("...v,...d->vd", one_hot, gradient), None


embed.defvjp(_embed_forward, _embed_backward)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis; float32 out."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(power + 1e-6) * self.scale[...]


class Attention(nnx.Module):
  """Attention of every stream's rows over the content stream's slots."""

  def __init__(self, model: config_lib.Model, dtype, *, rngs: nnx.Rngs):
    D, N, H = model.D, model.N, model.H
    self.dtype = dtype
    self.query = normal(rngs, (D, N, H))
    self.key = normal(rngs, (D, N, H))
    self.value = normal(rngs, (D, N, H))
    self.out = normal(rngs, (N, H, D), INIT_SCALE / (2 * model.L) ** 0.5)
    self.query_norm = RMSNorm(H)
    self.key_norm = RMSNorm(H)

  def __call__(
    self,
    rows: jax.Array,
    content: jax.Array,
    query_rotation: rotary.Rotation | None,
    key_rotation: rotary.Rotation | None,
    attend: Attend,
  ) -> jax.Array:
    """Normalised rows [G, B, S, D] and content [B, S, D] -> [G, B, S, D]."""

    def cast(param):
      return param[...].astype(self.dtype)

    q = jnp.einsum("gbsd,dnh->gbsnh", rows, cast(self.query))
    k = jnp.einsum("bsd,dnh->bsnh", content, cast(self.key))
    v = jnp.einsum("bsd,dnh->bsnh", content, cast(self.value))
    q = rotary.rotate(self.query_norm(q), query_rotation).astype(self.dtype)
    k = rotary.rotate(self.key_norm(k), key_rotation).astype(self.dtype)
    # Streams are the query heads of one group: they share keys and values.
    G, B, S, N, H = q.shape
    q = jnp.moveaxis(q, 0, 3).reshape(B, S, N * G, H)
    out = attend(q, k, v).reshape(B, S, N, G, H)
    out = jnp.moveaxis(out, 3, 0)
    return jnp.einsum("gbsnh,nhd->gbsd", out, cast(self.out))


@jax.checkpoint
def _gelu(x):
  """GELU, tanh form (arXiv 1606.08415), float32 inside.

  Written with a sigmoid, since 1 + tanh(u) = 2 sigmoid(2 u) and an exponential
  is cheaper than a tanh; recomputed in the backward pass, since that is
  cheaper than to save and read its slope.
  """
  wide = x.astype(jnp.float32)
  u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
  return (wide * jax.nn.sigmoid(2 * u)).astype(x.dtype)


class MLP(nnx.Module):
  """GELU, no biases."""

  def __init__(self, model: config_lib.Model, dtype, *, rngs: nnx.Rngs):
    self.dtype = dtype
    self.up = normal(rngs, (model.D, model.F))
    self.down = normal(
      rngs, (model.F, model.D), INIT_SCALE / (2 * model.L) ** 0.5
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = jnp.einsum("gbsd,df->gbsf", x, self.up[...].astype(self.dtype))
    x = _gelu(x)
    return jnp.einsum("gbsf,fd->gbsd", x, self.down[...].astype(self.dtype))


class Block(nnx.Module):
  """Pre-norm attention and MLP; the residual stream is in compute dtype."""

  def __init__(self, model: config_lib.Model, dtype, *, rngs: nnx.Rngs):
    self.dtype = dtype
    self.attention_norm = RMSNorm(model.D)
    self.attention = Attention(model, dtype, rngs=rngs)
    self.mlp_norm = RMSNorm(model.D)
    self.mlp = MLP(model, dtype, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    query_rotation: rotary.Rotation | None,
    key_rotation: rotary.Rotation | None,
    attend: Attend,
    *,
    last: bool = False,
  ) -> jax.Array:
    """[G, B, S, D] -> [G, B, S, D], or [1, B, S, D] if `last`.

    In the last layer only the stream that is read out is computed: nothing
    reads the other's output there.
    """
    normed = self.attention_norm(x).astype(self.dtype)
    content = normed[0]
    if last:
      x, normed = x[-1:], normed[-1:]
      query_rotation = jax.tree.map(lambda r: r[-1:], query_rotation)
    x = x + self.attention(
      normed, content, query_rotation, key_rotation, attend
    )
    return x + self.mlp(self.mlp_norm(x).astype(self.dtype))
