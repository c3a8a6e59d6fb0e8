"""Norm, attention and MLP: one pre-norm block over G streams of rows.

Keys and values always come from the content rows, the first S of stream 0.
Streams share parameters and meet in attention alone; else every one is an array
of its own, so that the next layer's keys, which need content alone, can be on
their way to other devices while the queries are still in this layer's MLP.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parallel, rotary

# (q [B, R, N * G, H], k [B, S, N, H], v [B, S, N, H], visible: int32 [B, R] or
# [B, R, G], int or None) -> [B, R, N * G, H]
Attend = Callable[..., jax.Array]

INIT_SCALE = 0.02
# Logical axes of rows [B, R, D].
ROWS = ("batch", "slots", "width")


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


def _matmuls(equation, streams, param, dtype):
  weight = param[...].astype(dtype)
  return parallel.matmuls(equation, streams, weight, param.axes)


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
  mesh = sharding.spread()
  if not mesh or x.ndim != 3:
    return _pin(x)
  # On each device alone: jax 0.10 would gather the whole batch for it.
  spec = sharding.spec(mesh, x.shape, *ROWS)
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
    query_rotation: a stream's each, of [B, R] rows, or None.
    key_rotation: of [B, S] slots, or None.
    condition: [P, C], one vector a position, or None.
    target: a stream's each, int32 [B, R], which of these conditions each row,
      or None.
    visible: a stream's each, int32 [B, R], an int or None; see rows.Rows.
  """

  query_rotation: tuple[rotary.Rotation | None, ...]
  key_rotation: rotary.Rotation | None
  condition: jax.Array | None
  target: tuple[jax.Array | None, ...]
  visible: tuple[jax.Array | int | None, ...]

  def read_out(self, pick: Callable[[tuple], tuple]) -> "Setting":
    """The setting of the rows that `pick` picks."""
    return self._replace(
      query_rotation=pick(self.query_rotation),
      target=pick(self.target),
      visible=pick(self.visible),
    )


class Modulation(nnx.Module):
  """adaLN (arXiv 2212.09748): vectors that depend on the row's target."""

  def __init__(self, C: int, count: int, D: int, *, rngs: nnx.Rngs):
    self.weight = normal(rngs, (C, count, D), ("condition", None, "embed"))
    self.bias = nnx.Param(jnp.zeros((count, D)), axes=(None, "vector"))

  def __call__(
    self, condition: jax.Array, target: jax.Array, dtype
  ) -> list[jax.Array]:
    """`count` arrays [B, R, D].

    A target is one of few positions, so the projection is done once for each
    position and looked up; but where there are fewer rows, for each row.

    Args:
      condition: [P, C], one vector a position.
      target: int32 [B, R], a position each.
      dtype: of the result.
    """
    weight = used(self.weight, jnp.float32)
    if target.size < len(condition):
      rows = jnp.einsum("brc,cmd->mbrd", condition[target], weight)
      bias = self.bias[...][:, None, None]
      return list((rows + bias).astype(dtype))
    tables = jnp.einsum("pc,cmd->mpd", condition, weight)
    tables = (tables + self.bias[...][:, None]).astype(dtype)
    return [look_up(table, target) for table in tables]


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
    streams: Sequence[jax.Array],
    content: jax.Array,
    setting: Setting,
    attend: Attend,
  ) -> list[jax.Array]:
    """Normalised streams [B, R, D], content [B, S, D] -> streams [B, R, D]."""
    k, v = (
      jnp.einsum("bsd,dnh->bsnh", content, used(param, self.dtype))
      for param in (self.key, self.value)
    )
    k = rotary.rotate(self.key_norm(k), setting.key_rotation)
    q = _matmuls("brd,dnh->brnh", streams, self.query, self.dtype)
    q = [
      rotary.rotate(self.query_norm(x), rotation).astype(self.dtype)
      for x, rotation in zip(q, setting.query_rotation)
    ]
    # Streams are the query heads of one group: they share keys and values.
    B, R, N, H = q[0].shape
    q = jnp.stack(q, axis=3).reshape(B, R, -1, H)
    visible = setting.visible[0]
    if isinstance(visible, jax.Array) and len(streams) > 1:
      visible = jnp.stack(setting.visible, axis=2)
    x = attend(q, k.astype(self.dtype), v, visible).reshape(B, R, N, -1, H)
    x = [x[:, :, :, g] for g in range(len(streams))]
    return _matmuls("brnh,nhd->brd", x, self.out, self.dtype)


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

  def __call__(self, streams: Sequence[jax.Array]) -> list[jax.Array]:
    streams = _matmuls("brd,df->brf", streams, self.up, self.dtype)
    streams = [
      _gelu(sharding.constrain(x, *ROWS[:2], "hidden")) for x in streams
    ]
    return _matmuls("brf,fd->brd", streams, self.down, self.dtype)


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
    streams: Sequence[jax.Array],
    setting: Setting,
    attend: Attend,
    S: int,
    read_out: Callable[[tuple], tuple] | None = None,
  ) -> tuple[jax.Array, ...]:
    """G streams [B, R, D] -> G streams [B, R, D].

    Args:
      streams: of rows; the first S of stream 0 are the content of the slots.
      setting: what the layers share.
      attend: the attention.
      S: slots.
      read_out: in the last layer, picks the rows that are read out, of streams
        of [B, R, ...]: nothing reads the others' output there.
    """
    # Shift, scale, gate of attention; shift, scale, gate of the MLP.
    modulations = tuple(
      None if target is None
      else self.modulation(setting.condition, target, self.dtype)
      for target in setting.target
    )  # fmt: skip
    normed = self._normed(self.attention_norm, streams, modulations, 0)
    content = normed[0][:, :S]
    if read_out:
      streams, normed = read_out(streams), read_out(normed)
      modulations = read_out(modulations)
      setting = setting.read_out(read_out)
    updates = self.attention(normed, content, setting, attend)
    streams = _updated(streams, updates, modulations, 2)
    updates = self.mlp(self._normed(self.mlp_norm, streams, modulations, 3))
    streams = _updated(streams, updates, modulations, 5)
    return tuple(sharding.constrain(x, *ROWS) for x in streams)

  def _normed(self, norm, streams, modulations, first):
    return tuple(
      shifted(norm(x), m, first).astype(self.dtype)
      for x, m in zip(streams, modulations)
    )


def _updated(streams, updates, modulations, gate):
  return [
    x + (update if m is None else m[gate] * update)
    for x, update, m in zip(streams, updates, modulations)
  ]


def shifted(x: jax.Array, m: list[jax.Array] | None, first: int) -> jax.Array:
  """x * (1 + scale) + shift, float32; m[first] is the shift, then the scale."""
  return x if m is None else x * (1 + m[first + 1]) + m[first]
