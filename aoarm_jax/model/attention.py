"""Attention of the rows of G streams over the content of the slots."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parallel, parameters
from aoarm_jax.model import setting as setting_lib
from pallas_kernels import rowwise, tuning

# The attention of a layer. It takes the queries of each stream [B, R, N, H], k
# [B, S, M, H], v [B, S, M, H], and visible: int32 [B, R] or [B, R, G] for G
# streams, an int, or None. For one stream whose rows see no prefix it also
# takes seen: bool [B or 1, R, S]. It returns a tuple of outputs, like the
# queries.
Attend = Callable[..., tuple[jax.Array, ...]]


class Attention(nnx.Module):
  """Attention of every stream's rows over the content of the slots.

  Each of M heads of keys and values serves N / M heads of queries.
  """

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    *,
    rngs: nnx.Rngs,
    has_keys: bool = True,
  ):
    """Make the parameters; without `has_keys`, no keys and values."""
    D, N, M, H = model.D, model.N, model.key_heads, model.H
    self.dtype, self.rowwise = jnp.dtype(compute.dtype), compute.rowwise
    self.epsilon, self.group = model.norm_epsilon, N // M
    into = ("embed", "heads", "head")
    self.query = parameters.normal(rngs, (D, N, H), into)
    if has_keys:
      self.key = parameters.normal(rngs, (D, M, H), into)
      self.value = parameters.normal(rngs, (D, M, H), into)
    self.out = parameters.normal(
      rngs,
      (N, H, D),
      ("heads", "head", "embed"),
      parameters.scale_of_updates(model),
    )
    if model.qk_norm:
      self.query_norm = parameters.RMSNorm(H, model.norm_epsilon)
    if model.qk_norm and has_keys:
      self.key_norm = parameters.RMSNorm(H, model.norm_epsilon)
    self.has_norms = model.qk_norm
    shapes = {"query": (N, H), "out": (D,)}
    if has_keys:
      shapes |= {"key": (M, H), "value": (M, H)}
    self.biases = nnx.data(parameters.biases(model, shapes))
    # The adapters.Adapter of weights that have one, by the weight's name.
    self.adapters: dict[str, Any] = nnx.data({})
    # The weights of queries, keys and values as one, see `merge`.
    self.merged: nnx.Param | None = None
    self.merged_bias: nnx.Param | None = None
    self.merged_scale: nnx.Param | None = None

  def merge(self) -> None:
    """Make one array of the weights of queries, keys and values.

    From then on few rows have one product with all of them. Do it once for many
    calls: for few rows, to merge the weights costs more than it saves.
    """
    axes = self.query.axes
    axes = (axes[0], None, *axes[1:])
    self.merged = self._stacked(self.query, self.key, self.value, axes)
    if b := self.biases:
      axes = (None, None, "vector")
      self.merged_bias = self._stacked(b["query"], b["key"], b["value"], axes)
    if self.has_norms:
      scales = [self.query_norm.scale[...]] * self.group
      scales.append(self.key_norm.scale[...])
      scale = nnx.Param(jnp.stack(scales)[:, None], axes=(None, None, "vector"))
      self.merged_scale = nnx.data(scale)

  def _stacked(self, query, key, value, axes):
    """Return one array [..., C, M, H] of arrays [..., N or M, H]."""
    *before, M, H = key.shape
    queries = query[...].reshape(*before, M, self.group, H)
    parts = [*jnp.moveaxis(queries, -2, 0), key[...], value[...]]
    stacked = jnp.stack(parts, axis=-3).astype(self.dtype)
    return nnx.data(nnx.Param(stacked, axes=axes))

  def __call__(
    self,
    streams: Sequence[jax.Array],
    rows: jax.Array,
    S: int,
    setting: setting_lib.Setting,
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
      updates = [x.reshape(*x.shape[:2], -1) @ out for x in outputs]
      return parameters.biased(updates, self.biases.get("out"))
    return self._product("brnh,nhd->brd", outputs, "out")

  def queries(
    self, x: jax.Array, rotation: rowwise.Rotation | None
  ) -> jax.Array:
    """Return the queries of one stream's normalised rows: [B, R, N, H]."""
    part = self._query_part(rotation)
    return self._project(x, ("query",), (part,))[0]

  def output(self, x: jax.Array) -> jax.Array:
    """Return the update that attention [B, R, N, H] gives: [B, R, D]."""
    return self._product("brnh,nhd->brd", [x], "out")[0]

  def _product(self, equation, streams, name):
    """Return the product of every stream with a weight, adapter and bias."""
    weight, adapter = getattr(self, name), self.adapters.get(name)
    bias = self.biases.get(name)
    return parameters.matmuls(
      equation, streams, weight, self.dtype, adapter, bias
    )

  def _query_part(self, rotation):
    """Return the norm and the rotation of queries."""
    scale = self.query_norm.scale[...] if self.has_norms else None
    return rowwise.Part(scale, rotation)

  def _key_part(self, rotation):
    """Return the norm and the rotation of keys."""
    scale = self.key_norm.scale[...] if self.has_norms else None
    return rowwise.Part(scale, rotation)

  def _keys(self, content, setting):
    """Return the keys and values of content rows, [B, S, M, H] each."""
    key = self._key_part(setting.key_rotation)
    return self._project(content, ("key", "value"), (key, None))

  def _few_heads(self, rows, S, Q, setting):
    """Return queries of the last Q rows, and keys and values of the first S.

    All rows have all three: with few rows, launches cost more than products.
    The norms of queries and keys are computed together for the same reason.
    """
    assert self.merged is not None
    group = self.group
    (packed,) = parallel.matmuls(
      "brd,dcnh->brcnh", [rows], self.merged[...], self.merged.axes
    )
    if self.merged_bias is not None:
      packed += self.merged_bias[...]
    qk = packed[:, :, : group + 1]
    if self.merged_scale is not None:
      qk = rowwise.normalised(qk, self.merged_scale[...], self.epsilon)
    if setting.rotations is not None:
      cos, sin = setting.rotations
      # To swap the halves is one step of a loop over elements. To split and
      # concatenate them would be several kernels.
      halves = qk.reshape(*qk.shape[:-1], 2, qk.shape[-1] // 2)
      qk = qk * cos + halves[..., ::-1, :].reshape(qk.shape) * sin
    qk = qk.astype(self.dtype)
    query = qk[:, rows.shape[1] - Q :, :group]
    # Query head m * group + g reads key head m.
    query = jnp.moveaxis(query, 2, 3).reshape(*query.shape[:2], -1, qk.shape[4])
    return [query], qk[:, :S, group], packed[:, :S, group + 1]

  def _heads(self, streams, content, setting):
    """Return the queries of every stream, keys and values, [B, R, N, H] each.

    Content rows that also ask have one matmul for queries, keys and values if
    these have equal numbers of heads.
    """
    query, *others = map(self._query_part, setting.query_rotation)
    asks = streams[0] is content and self.group == 1
    # A mesh sums the gradients of the query weights over streams first.
    if asks and (len(streams) == 1 or not sharding.spread()):
      key = self._key_part(setting.key_rotation)
      first, k, v = self._project(
        content, ("query", "key", "value"), (query, key, None)
      )
      queries = [
        self._project(x, ("query",), (part,))[0]
        for x, part in zip(streams[1:], others)
      ]
      return [first, *queries], k, v
    k, v = self._keys(content, setting)
    products = self._product("brd,dnh->brnh", streams, "query")
    queries = [
      self._split(x[:, :, None], (part,))[0]
      for x, part in zip(products, (query, *others))
    ]
    return queries, k, v

  def _project(self, rows, names, parts):
    """Return the product of rows with each weight, normed and rotated."""
    B, R, _ = rows.shape
    are_apart = self.adapters or self.biases
    if len(names) > 1 and (are_apart or B * R < tuning.LEAST_ROWS):
      # For few rows, to stack the weights would cost more than it saves.
      return [
        self._project(rows, (name,), (part,))[0]
        for name, part in zip(names, parts)
      ]
    if are_apart:
      (product,) = self._product("brd,dnh->brnh", [rows], *names)
      return self._split(product[:, :, None], parts)
    weights = [getattr(self, name) for name in names]
    merged = jnp.stack(
      [weight[...].astype(self.dtype) for weight in weights], axis=1
    )
    if not sharding.spread():
      return parallel.project_heads(
        rows, merged, parts, self.epsilon, self.rowwise
      )
    axes = weights[0].axes
    (packed,) = parallel.matmuls(
      "brd,dcnh->brcnh", [rows], merged, (axes[0], None, *axes[1:])
    )
    return self._split(packed, parts)

  def _split(self, packed, parts):
    return parallel.split_heads(packed, parts, self.epsilon, self.rowwise)


def _attended(
  attend: Attend,
  queries: Sequence[jax.Array],
  k: jax.Array,
  v: jax.Array,
  setting: setting_lib.Setting,
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
