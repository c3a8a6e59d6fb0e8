"""Norm, attention and MLP: one pre-norm block over G streams of rows.

Keys and values always come from the content rows, which are the first S rows of
stream 0. Streams meet in attention alone. They share parameters unless the
mechanism has untied streams.

Each stream is an array of its own. The keys of the next layer need content
alone. So they can be on their way to other devices while the queries are still
in the MLP of this layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parallel, vocabulary
from pallas_kernels import rowwise, tuning

# The attention of a layer. It takes the queries of each stream [B, R, N, H], k
# [B, S, N, H], v [B, S, N, H], and visible: int32 [B, R] or [B, R, G] for G
# streams, an int, or None. For one stream whose rows see no prefix it also
# takes seen: bool [B or 1, R, S]. It returns a tuple of outputs, like the
# queries.
Attend = Callable[..., tuple[jax.Array, ...]]
# Picks the rows that are read out, from a tuple with one entry per stream. The
# result is a tuple of one entry; see rows.read_out.
Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]

INIT_SCALE = 0.02
ROWS = parallel.ROWS


def normal(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  scale: float = INIT_SCALE,
) -> nnx.Param:
  """Return a parameter of normal random numbers.

  Args:
    rngs: gives the key.
    shape: the shape of the parameter.
    axes: its logical axes, see devices/sharding.py.
    scale: the standard deviation.
  """
  # Without a type, the switch JAX_ENABLE_X64 would make it float64.
  values = jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(scale * values, axes=axes)


def used(param: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Return a parameter for a matmul: in compute dtype, whole along fsdp."""
  return sharding.gathered(param[...].astype(dtype), *param.axes)


def _matmuls(equation, streams, param, dtype):
  weight = param[...].astype(dtype)
  return parallel.matmuls(equation, streams, weight, param.axes)


@jax.custom_vjp
def look_up(table: jax.Array, position: jax.Array) -> jax.Array:
  """Return the rows of `table` [P, D] at `position`: [B, S, D].

  Positions must differ within a sequence, as those of slots do. Then the
  gradient is a gather and a sum over B. It needs no contended scatter. It also
  needs no one-hot matmul, which would cost P / D of a square layer.

  Args:
    table: [P, D].
    position: int32 [B, S].
  """
  # The table is pinned so that each row is contiguous. XLA's GPU layout pass
  # would put positions innermost. The numbers of a row would then lie far
  # apart, and with a large P no cache hides this.
  return vocabulary.pin(table)[position]


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
  return vocabulary.pin(total.astype(gradient.dtype)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class RMSNorm(nnx.Module):
  """The scale of x / rms(x) * scale, a norm over the last axis."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=("vector",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the normed rows, float32."""
    return rowwise.normalised(x, self.scale[...])


class Setting(NamedTuple):
  """The values that all layers of one pass share.

  Attributes:
    query_rotation: one per stream: the rotation of [B, R] rows, or None.
    key_rotation: the rotation of [B, S] slots, or None.
    condition: [P, C], one vector per position, or None.
    target: one per stream: int32 [B, R], the position whose condition each row
      takes, or None.
    visible: one per stream: int32 [B, R], an int or None; see rows.Rows.
    seen: one per stream: bool [B or 1, R, S] or None; see rows.Rows.
    rotations: the cosines and the signed sines that turn the queries and the
      keys of all rows, float32 [B, R, 2, 1, H] each, or None; see `of_few`.
  """

  query_rotation: tuple[rowwise.Rotation | None, ...]
  key_rotation: rowwise.Rotation | None
  condition: jax.Array | None
  target: tuple[jax.Array | None, ...]
  visible: tuple[jax.Array | int | None, ...]
  seen: tuple[jax.Array | None, ...]
  rotations: tuple[jax.Array, jax.Array] | None = None

  def of_few(self, S: int) -> "Setting":
    """Return the setting of few rows, for layers with merged weights.

    Args:
      S: the number of content rows. The one stream may have more rows.
    """
    query, key = self.query_rotation[0], self.key_rotation
    if len(self.query_rotation) > 1 or query is None or key is None:
      return self

    def both(of_query, of_key):
      # Rows that are not slots have no keys, so any rotation will do.
      of_key = jnp.concatenate([of_key, of_query[:, S:]], axis=1)
      return jnp.stack([of_query, of_key], axis=2)

    cos, sin = both(query.cos, key.cos), both(query.sin, key.sin)
    cos, sin = jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
    H = 2 * cos.shape[-1]
    shape = (*cos.shape[:-2], H)
    return self._replace(rotations=(cos.reshape(shape), sin.reshape(shape)))

  def read_out(self, pick: Pick) -> "Setting":
    """Return the setting of the rows that `pick` picks."""
    return self._replace(
      query_rotation=pick(self.query_rotation),
      target=pick(self.target),
      visible=pick(self.visible),
      seen=pick(self.seen),
    )


class Modulation(nnx.Module):
  """adaLN (arXiv 2212.09748): vectors that depend on the target of a row."""

  def __init__(self, C: int, count: int, D: int, *, rngs: nnx.Rngs):
    self.weight = normal(rngs, (C, count, D), ("condition", None, "embed"))
    self.bias = nnx.Param(
      jnp.zeros((count, D), jnp.float32), axes=(None, "vector")
    )

  def __call__(
    self,
    condition: jax.Array,
    target: jax.Array,
    dtype: jax.typing.DTypeLike,
  ) -> list[jax.Array]:
    """Return `count` arrays [B, R, D].

    There are few possible targets. So the projection is computed once per
    position and looked up. If there are fewer rows than positions, it is
    computed once per row.

    Args:
      condition: [P, C], one vector per position.
      target: int32 [B, R], the position of each row.
      dtype: the dtype of the result.
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

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    *,
    rngs: nnx.Rngs,
    has_keys: bool = True,
  ):
    """Make the parameters; without `has_keys`, no keys and values."""
    D, N, H = model.D, model.N, model.H
    self.dtype, self.rowwise = jnp.dtype(compute.dtype), compute.rowwise
    into = ("embed", "heads", "head")
    self.query = normal(rngs, (D, N, H), into)
    if has_keys:
      self.key = normal(rngs, (D, N, H), into)
      self.value = normal(rngs, (D, N, H), into)
    self.out = normal(
      rngs,
      (N, H, D),
      ("heads", "head", "embed"),
      INIT_SCALE / (2 * model.L) ** 0.5,
    )
    self.query_norm = RMSNorm(H)
    if has_keys:
      self.key_norm = RMSNorm(H)
    # The weights of queries, keys and values as one, see `merge`.
    self.merged: nnx.Param | None = None
    self.merged_scale: nnx.Param | None = None

  def merge(self) -> None:
    """Make one array of the weights of queries, keys and values.

    From then on few rows have one product with all of them. Do it once for many
    calls: for few rows, to merge the weights costs more than it saves.
    """
    weights = self.query, self.key, self.value
    stacked = jnp.stack([weight[...] for weight in weights], axis=1)
    axes = self.query.axes
    merged = nnx.Param(
      stacked.astype(self.dtype), axes=(axes[0], None, *axes[1:])
    )
    self.merged = nnx.data(merged)
    scales = self.query_norm.scale[...], self.key_norm.scale[...]
    scale = nnx.Param(jnp.stack(scales)[:, None], axes=(None, None, "vector"))
    self.merged_scale = nnx.data(scale)

  def __call__(
    self,
    streams: Sequence[jax.Array],
    rows: jax.Array,
    S: int,
    setting: Setting,
    attend: Attend,
    untied: Sequence["Attention"] = (),
  ) -> list[jax.Array]:
    """Return the update of every stream, [B, R, D] each.

    Args:
      streams: [B, R, D] each, normalised.
      rows: all normalised rows of stream 0. The first S are the content.
      S: the number of content rows.
      setting: the setting that the layers share.
      attend: the attention.
      untied: the modules that have the weights of queries and outputs of each
        stream. If it is empty, they are in this module.
    """
    B, R, D = rows.shape
    few = self.merged is not None and B * R < tuning.LEAST_ROWS
    content = rows if R == S else rows[:, :S]
    if untied:
      k, v = self._keys(content, setting)
      queries = [
        own.queries(x, rotation)
        for own, x, rotation in zip(untied, streams, setting.query_rotation)
      ]
    elif few and len(streams) == 1 and self.rowwise != "mosaic_gpu":
      queries, k, v = self._few_heads(rows, S, streams[0].shape[1], setting)
    else:
      queries, k, v = self._heads(streams, content, setting)
    outputs = _attended(attend, queries, k, v, setting)
    if untied:
      return [own.output(x) for own, x in zip(untied, outputs)]
    if few and not sharding.spread():
      # Otherwise XLA may choose an order of heads for which it transposes the
      # weights, in every step.
      out = self.out[...].astype(self.dtype).reshape(-1, D)
      return [x.reshape(*x.shape[:2], -1) @ out for x in outputs]
    return _matmuls("brnh,nhd->brd", outputs, self.out, self.dtype)

  def queries(
    self, x: jax.Array, rotation: rowwise.Rotation | None
  ) -> jax.Array:
    """Return the queries of one stream's normalised rows: [B, R, N, H]."""
    part = rowwise.Part(self.query_norm.scale[...], rotation)
    return self._project(x, (self.query,), (part,))[0]

  def output(self, x: jax.Array) -> jax.Array:
    """Return the update that attention [B, R, N, H] gives: [B, R, D]."""
    return _matmuls("brnh,nhd->brd", [x], self.out, self.dtype)[0]

  def _keys(self, content, setting):
    """Return the keys and values of content rows, [B, S, N, H] each."""
    key = rowwise.Part(self.key_norm.scale[...], setting.key_rotation)
    return self._project(content, (self.key, self.value), (key, None))

  def _few_heads(self, rows, S, Q, setting):
    """Return queries of the last Q rows, and keys and values of the first S.

    All rows have all three: with few rows, launches cost more than products.
    The norms of queries and keys are computed together for the same reason.
    """
    assert self.merged is not None
    assert self.merged_scale is not None
    (packed,) = parallel.matmuls(
      "brd,dcnh->brcnh", [rows], self.merged[...], self.merged.axes
    )
    qk = rowwise.normalised(packed[:, :, :2], self.merged_scale[...])
    if setting.rotations is not None:
      cos, sin = setting.rotations
      # To swap the halves is one step of a loop over elements. To split and
      # concatenate them would be several kernels.
      halves = qk.reshape(*qk.shape[:-1], 2, qk.shape[-1] // 2)
      qk = qk * cos + halves[..., ::-1, :].reshape(qk.shape) * sin
    qk = qk.astype(self.dtype)
    first = rows.shape[1] - Q
    return [qk[:, first:, 0]], qk[:, :S, 1], packed[:, :S, 2]

  def _heads(self, streams, content, setting):
    """Return the queries of every stream, keys and values, [B, R, N, H] each.

    Content rows that also ask have one matmul for queries, keys and values.
    """
    query, *others = (
      rowwise.Part(self.query_norm.scale[...], rotation)
      for rotation in setting.query_rotation
    )
    key = rowwise.Part(self.key_norm.scale[...], setting.key_rotation)
    asks = streams[0] is content
    # A mesh sums the gradients of the query weights over streams first.
    if asks and (len(streams) == 1 or not sharding.spread()):
      first, k, v = self._project(
        content, (self.query, self.key, self.value), (query, key, None)
      )
      queries = [
        self._project(x, (self.query,), (part,))[0]
        for x, part in zip(streams[1:], others)
      ]
      return [first, *queries], k, v
    k, v = self._keys(content, setting)
    products = _matmuls("brd,dnh->brnh", streams, self.query, self.dtype)
    queries = [
      self._split(x[:, :, None], (part,))[0]
      for x, part in zip(products, (query, *others))
    ]
    return queries, k, v

  def _project(self, rows, weights, parts):
    """Return the product of rows with each weight, normed and rotated."""
    B, R, _ = rows.shape
    if len(weights) > 1 and B * R < tuning.LEAST_ROWS:
      # To stack the weights would cost more than it saves.
      return [
        self._project(rows, (weight,), (part,))[0]
        for weight, part in zip(weights, parts)
      ]
    merged = jnp.stack(
      [weight[...].astype(self.dtype) for weight in weights], axis=1
    )
    if not sharding.spread():
      return parallel.project_heads(rows, merged, parts, self.rowwise)
    axes = weights[0].axes
    (packed,) = parallel.matmuls(
      "brd,dcnh->brcnh", [rows], merged, (axes[0], None, *axes[1:])
    )
    return self._split(packed, parts)

  def _split(self, packed, parts):
    return parallel.split_heads(packed, parts, self.rowwise)


def _attended(
  attend: Attend,
  queries: Sequence[jax.Array],
  k: jax.Array,
  v: jax.Array,
  setting: Setting,
) -> tuple[jax.Array, ...]:
  """Return what the rows of every stream see: [B, R, N, H] each."""
  visible = setting.visible[0]
  if any(seen is not None for seen in setting.seen):
    return tuple(
      attend([q], k, v, of_stream, seen)[0]
      for q, of_stream, seen in zip(queries, setting.visible, setting.seen)
    )
  if not isinstance(visible, jax.Array) or len(queries) == 1:
    return attend(queries, k, v, visible)
  # If one stream has an array, all streams have arrays.
  arrays = cast(tuple[jax.Array, ...], setting.visible)
  if len({x.shape for x in arrays}) == 1:
    return attend(queries, k, v, jnp.stack(arrays, axis=2))
  # Streams that differ in their number of rows are joined for one call.
  (out,) = attend(
    [jnp.concatenate(queries, axis=1)], k, v, jnp.concatenate(arrays, axis=1)
  )
  content = queries[0].shape[1]
  return out[:, :content], out[:, content:]


class MLP(nnx.Module):
  """Two matmuls with a GELU between them, without biases."""

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    *,
    rngs: nnx.Rngs,
  ):
    self.dtype, self.rowwise = jnp.dtype(compute.dtype), compute.rowwise
    self.up = normal(rngs, (model.D, model.F), ("embed", "hidden"))
    self.down = normal(
      rngs,
      (model.F, model.D),
      ("hidden", "embed"),
      INIT_SCALE / (2 * model.L) ** 0.5,
    )

  def __call__(self, streams: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the update of every normalised stream, [B, R, D] each."""
    if not sharding.spread():
      up, down = (used(x, self.dtype) for x in (self.up, self.down))
      return [parallel.mlp(x, up, down, self.rowwise) for x in streams]
    hidden = _matmuls("brd,df->brf", streams, self.up, self.dtype)
    hidden = [
      parallel.gelu(sharding.constrain(x, *ROWS[:2], "hidden"), self.rowwise)
      for x in hidden
    ]
    return _matmuls("brf,fd->brd", hidden, self.down, self.dtype)


class Block(nnx.Module):
  """Pre-norm attention and MLP; the residual stream is in compute dtype."""

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    *,
    rngs: nnx.Rngs,
    has_keys: bool = True,
  ):
    """Make the parameters.

    Args:
      model: the model's section of the config.
      compute: gives the dtype and the implementations.
      rngs: gives the keys of the parameters.
      has_keys: whether the block makes keys and values. The block of untied
        query rows makes none.
    """
    self.dtype, self.rowwise = jnp.dtype(compute.dtype), compute.rowwise
    self.attention_norm = RMSNorm(model.D)
    self.attention = Attention(model, compute, rngs=rngs, has_keys=has_keys)
    self.mlp_norm = RMSNorm(model.D)
    self.mlp = MLP(model, compute, rngs=rngs)
    self.untied = model.kind.untied and has_keys
    if self.untied:
      self.of_queries = Block(model, compute, rngs=rngs, has_keys=False)
    if model.kind.condition:
      self.modulation = Modulation(model.kind.condition, 6, model.D, rngs=rngs)

  def __call__(
    self,
    streams: tuple[jax.Array, ...],
    setting: Setting,
    attend: Attend,
    S: int,
    read_out: Pick | None = None,
  ) -> tuple[jax.Array, ...]:
    """Return the streams after this layer, [B, R, D] each.

    Args:
      streams: [B, R, D] each. The first S rows of stream 0 are the content of
        the slots.
      setting: the setting that the layers share.
      attend: the attention.
      S: the number of content rows.
      read_out: picks the rows that are read out; for the last layer. Nothing
        reads the output of the other rows there, so it is not computed.
    """
    modulations = self._modulations(setting)
    owners = self._owners(streams)
    streams, normed = self._normed(
      [own.attention_norm for own in owners],
      streams,
      (None,) * len(streams),
      modulations,
      0,
    )
    rows = normed[0]
    if read_out:
      streams, normed = read_out(streams), read_out(normed)
      modulations = read_out(modulations)
      setting = setting.read_out(read_out)
      owners = owners[-1:]
    untied = [own.attention for own in owners] if self.untied else []
    updates = self.attention(normed, rows, S, setting, attend, untied)
    updates = _gated(updates, modulations, 2)
    streams, normed = self._normed(
      [own.mlp_norm for own in owners], streams, updates, modulations, 3
    )
    if self.untied:
      updates = [own.mlp([x])[0] for own, x in zip(owners, normed)]
    else:
      updates = self.mlp(normed)
    updates = _gated(updates, modulations, 5)
    return tuple(
      sharding.constrain(x + update, *ROWS)
      for x, update in zip(streams, updates)
    )

  def _owners(self, streams: tuple[jax.Array, ...]) -> list["Block"]:
    """Return the block that has the weights of each stream."""
    return [self, self.of_queries] if self.untied else [self] * len(streams)

  def _modulations(self, setting: Setting) -> tuple[Any, ...]:
    """Return the modulation of every stream, or None for each.

    A modulation has six arrays [B, R, D]: shift, scale and gate of the
    attention, then shift, scale and gate of the MLP.
    """
    return tuple(
      None
      if target is None
      else self.modulation(
        cast(jax.Array, setting.condition), target, self.dtype
      )
      for target in setting.target
    )

  def _normed(self, norms, streams, updates, modulations, first):
    """Return the updated streams and their normed rows: two tuples."""
    pairs = [
      normed(*given, first, self.rowwise)
      for given in zip(norms, streams, updates, modulations)
    ]
    return tuple(zip(*pairs))


def normed(
  norm: RMSNorm,
  x: jax.Array,
  update: jax.Array | None,
  m: list[jax.Array] | None,
  first: int,
  implementation: str,
) -> tuple[jax.Array, jax.Array]:
  """Return y = x + update, and its normed and modulated rows, like x.

  Args:
    norm: has the scale.
    x: [B, R, D].
    update: like x. None means y = x.
    m: the modulation, or None.
    first: m[first] is the shift, and m[first + 1] is the scale.
    implementation: compute.rowwise.
  """
  if m is None:
    return parallel.rms_norm(x, norm.scale[...], update, implementation)
  y = x if update is None else x + update
  shifted = norm(y) * (1 + m[first + 1]) + m[first]
  return y, shifted.astype(y.dtype)


def _gated(updates, modulations, gate):
  """Return the updates, times the gate of the modulation where there is one."""
  return [
    update if m is None else m[gate] * update
    for update, m in zip(updates, modulations)
  ]
