"""Norm, attention and MLP: one pre-norm block over G streams of rows.

Keys and values always come from the content rows, the first S of stream 0.
Streams are the leading axis, so that one stream is contiguous memory.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout

from aoarm_jax import config as config_lib
from aoarm_jax import sharding
from aoarm_jax.model import rotary

# (q [B, R, N * G, H], k [B, S, N, H], v [B, S, N, H], visible: int32 [B, R] or
# [B, R, G], int or None) -> [B, R, N * G, H]
Attend = Callable[..., jax.Array]

INIT_SCALE = 0.02
# Logical axes of rows [G, B, R, D].
ROWS = ("streams", "batch", "slots", "width")


def normal(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  scale: float = INIT_SCALE,
) -> nnx.Param:
  """Normal numbers; `axes` are the logical ones, see sharding.py."""
  return nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)


def used(param: nnx.Param, dtype) -> jax.Array:
  """A parameter as matmuls take it: in compute dtype, gathered."""
  return sharding.gathered(param[...].astype(dtype), *param.axes)


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Rows of `table` [V, D] at int32 `tokens` [...]: [..., D].

  For small vocabularies: the gradient is a one-hot matmul, because that of a
  gather is a scatter in which all tokens contend for the few rows.
  """
  return _row_major(table[tokens])


def _pin(x):
  order = layout.Layout(major_to_minor=tuple(range(x.ndim)))
  return layout.with_layout_constraint(x, order)


def _row_major(x):
  # Left to itself, XLA's GPU layout pass puts the batch innermost here and so
  # in the whole residual stream: a transposition around every matmul, and
  # 12% (two streams) or 3% (one) of a training step on an H200.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or mesh.size == 1 or x.ndim != 3:
    return _pin(x)
  # On each device alone: jax 0.10 would gather the whole batch for it.
  spec = sharding.spec(mesh, x.shape, *ROWS[1:])
  return jax.shard_map(_pin, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _embed_forward(table, tokens):
  return embed(table, tokens), (tokens, table.shape[0])


def _embed_backward(residuals, gradient):
  tokens, V = residuals
  one_hot = jax.nn.one_hot(tokens, V, dtype=gradient.dtype)
  return jnp.einsum("...v,...d->vd", one_hot, gradient), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def look_up(table: jax.Array, position: jax.Array) -> jax.Array:
  """Rows of `table` [P, D] at `position` int32 [B, S]: [B, S, D].

  Positions must differ within a sequence, as those of slots do. Then the
  gradient is a gather and a sum over B instead of a contended scatter, and no
  one-hot matmul, which would cost P / D of a square layer.
  """
  # Rows in one piece: XLA's GPU layout pass puts positions innermost, so that
  # the numbers of a row lie far apart, which no cache hides where P is large.
  return _pin(table)[position]


def _look_up_forward(table, position):
  return look_up(table, position), (position, table.shape[0])


def _look_up_backward(residuals, gradient):
  position, P = residuals
  B, S = position.shape
  slot = jnp.full((B, P), S, jnp.int32)
  slot = slot.at[jnp.arange(B)[:, None], position].set(
    jnp.arange(S, dtype=jnp.int32), unique_indices=True
  )
  by_position = jnp.take_along_axis(
    gradient, slot[..., None], axis=1, mode="fill", fill_value=0
  )
  total = by_position.sum(0, dtype=jnp.float32)
  return _pin(total.astype(gradient.dtype)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis; float32 out."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones(width), axes=("vector",))

  def __call__(self, x: jax.Array) -> jax.Array:
    return _normalised(x, self.scale[...])


# Recomputed in the backward pass: over unrolled layers the compiler sees for
# itself that x is enough, but a loop would save all float32 values for it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _normalised(x, scale):
  x = x.astype(jnp.float32)
  power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(power + 1e-6) * scale


class Setting(NamedTuple):
  """What the layers of one pass share.

  Attributes:
    query_rotation: of [G, B, R] rows, or None.
    key_rotation: of [B, S] slots, or None.
    condition: [P, C], one vector a position, or None.
    target: int32 [G, B, R], which of these conditions each row, or None.
    visible: int32 [G, B, R], an int or None; see rows.Rows.
  """

  query_rotation: rotary.Rotation | None
  key_rotation: rotary.Rotation | None
  condition: jax.Array | None
  target: jax.Array | None
  visible: jax.Array | int | None

  def read_out(self, pick: Callable[[jax.Array], jax.Array]) -> "Setting":
    """The setting of the rows that `pick` picks."""
    rotation, target, visible = jax.tree.map(
      lambda x: pick(x) if isinstance(x, jax.Array) else x,
      (self.query_rotation, self.target, self.visible),
    )
    return self._replace(
      query_rotation=rotation, target=target, visible=visible
    )


class Modulation(nnx.Module):
  """adaLN (arXiv 2212.09748): vectors that depend on the row's target."""

  def __init__(self, C: int, count: int, D: int, *, rngs: nnx.Rngs):
    self.weight = normal(rngs, (C, count, D), ("condition", None, "embed"))
    self.bias = nnx.Param(jnp.zeros((count, D)), axes=(None, "vector"))

  def __call__(self, setting: Setting, dtype) -> list[jax.Array]:
    """`count` arrays [G, B, R, D].

    A target is one of few positions, so the projection is done once for each
    position and looked up; but where there are fewer rows, for each row.
    """
    weight = used(self.weight, jnp.float32)
    if setting.target.size < len(setting.condition):
      condition = setting.condition[setting.target]
      rows = jnp.einsum("gbrc,cmd->mgbrd", condition, weight)
      bias = self.bias[...][:, None, None, None]
      return list((rows + bias).astype(dtype))
    tables = jnp.einsum("pc,cmd->mpd", setting.condition, weight)
    tables = (tables + self.bias[...][:, None]).astype(dtype)
    at = jax.vmap(look_up, in_axes=(None, 0))
    return [at(table, setting.target) for table in tables]


class Attention(nnx.Module):
  """Attention of every stream's rows over the content of the slots."""

  def __init__(self, model: config_lib.Model, dtype, *, rngs: nnx.Rngs):
    D, N, H = model.D, model.N, model.H
    self.dtype = dtype
    into = ("embed", "heads", "head")
    self.query = normal(rngs, (D, N, H), into)
    self.key = normal(rngs, (D, N, H), into)
    self.value = normal(rngs, (D, N, H), into)
    self.out = normal(
      rngs,
      (N, H, D),
      ("heads", "head", "embed"),
      INIT_SCALE / (2 * model.L) ** 0.5,
    )
    self.query_norm = RMSNorm(H)
    self.key_norm = RMSNorm(H)

  def __call__(
    self,
    rows: jax.Array,
    content: jax.Array,
    setting: Setting,
    attend: Attend,
  ) -> jax.Array:
    """Normalised rows [G, B, R, D] and content [B, S, D] -> [G, B, R, D]."""
    q, k, v = (
      used(param, self.dtype) for param in (self.query, self.key, self.value)
    )
    q = jnp.einsum("gbrd,dnh->gbrnh", rows, q)
    k = jnp.einsum("bsd,dnh->bsnh", content, k)
    v = jnp.einsum("bsd,dnh->bsnh", content, v)
    q = rotary.rotate(self.query_norm(q), setting.query_rotation)
    k = rotary.rotate(self.key_norm(k), setting.key_rotation)
    q, k = q.astype(self.dtype), k.astype(self.dtype)
    # Streams are the query heads of one group: they share keys and values.
    G, B, R, N, H = q.shape
    q = jnp.moveaxis(q, 0, 3).reshape(B, R, N * G, H)
    visible = setting.visible
    if isinstance(visible, jax.Array):
      visible = visible[0] if G == 1 else jnp.moveaxis(visible, 0, 2)
    out = attend(q, k, v, visible).reshape(B, R, N, G, H)
    out = jnp.moveaxis(out, 3, 0)
    return jnp.einsum("gbrnh,nhd->gbrd", out, used(self.out, self.dtype))


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
    self.up = normal(rngs, (model.D, model.F), ("embed", "hidden"))
    self.down = normal(
      rngs,
      (model.F, model.D),
      ("hidden", "embed"),
      INIT_SCALE / (2 * model.L) ** 0.5,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    x = jnp.einsum("gbrd,df->gbrf", x, used(self.up, self.dtype))
    x = _gelu(sharding.constrain(x, *ROWS[:3], "hidden"))
    return jnp.einsum("gbrf,fd->gbrd", x, used(self.down, self.dtype))


class Block(nnx.Module):
  """Pre-norm attention and MLP; the residual stream is in compute dtype."""

  def __init__(self, model: config_lib.Model, dtype, *, rngs: nnx.Rngs):
    self.dtype = dtype
    self.attention_norm = RMSNorm(model.D)
    self.attention = Attention(model, dtype, rngs=rngs)
    self.mlp_norm = RMSNorm(model.D)
    self.mlp = MLP(model, dtype, rngs=rngs)
    if model.kind.condition:
      self.modulation = Modulation(model.kind.condition, 6, model.D, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    setting: Setting,
    attend: Attend,
    S: int,
    read_out: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """[G, B, R, D] -> [G, B, R, D].

    Args:
      x: the rows; the first S of stream 0 are the content of the slots.
      setting: what the layers share.
      attend: the attention.
      S: slots.
      read_out: in the last layer, picks the rows that are read out, of x and
        of everything [G, B, R, ...]: nothing reads the others' output there.
    """
    m = None  # Shift, scale, gate of attention; shift, scale, gate of the MLP.
    if setting.condition is not None:
      m = self.modulation(setting, self.dtype)
    normed = shifted(self.attention_norm(x), m, 0).astype(self.dtype)
    content = normed[0, :, :S]
    if read_out:
      x, normed, m = jax.tree.map(read_out, (x, normed, m))
      setting = setting.read_out(read_out)
    out = self.attention(normed, content, setting, attend)
    x = x + (out if m is None else m[2] * out)
    normed = shifted(self.mlp_norm(x), m, 3).astype(self.dtype)
    out = self.mlp(normed)
    x = x + (out if m is None else m[5] * out)
    return sharding.constrain(x, *ROWS)


def shifted(x: jax.Array, m: list[jax.Array] | None, first: int) -> jax.Array:
  """x * (1 + scale) + shift, float32; m[first] is the shift, then the scale."""
  return x if m is None else x * (1 + m[first + 1]) + m[first]
