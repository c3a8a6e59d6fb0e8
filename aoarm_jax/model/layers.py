"""Norm, attention and MLP: one pre-norm block over G streams of rows.

Keys and values always come from the content rows, which are the first S rows of
stream 0. Streams meet in attention alone. They share parameters unless the
mechanism has untied streams.

Each stream is an array of its own. The keys of the next layer need content
alone. So they can be on their way to other devices while the queries are still
in the MLP of this layer.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import attention as attention_lib
from aoarm_jax.model import mlp as mlp_lib
from aoarm_jax.model import parallel, parameters
from aoarm_jax.model import setting as setting_lib


class Modulation(nnx.Module):
  """adaLN (arXiv 2212.09748): vectors that depend on the target of a row."""

  def __init__(self, C: int, count: int, D: int, *, rngs: nnx.Rngs):
    self.weight = parameters.normal(
      rngs, (C, count, D), ("condition", None, "embed")
    )
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
    weight = parameters.used(self.weight, jnp.float32)
    if target.size < len(condition):
      rows = jnp.einsum("brc,cmd->mbrd", condition[target], weight)
      bias = self.bias[...][:, None, None]
      return list((rows + bias).astype(dtype))
    tables = jnp.einsum("pc,cmd->mpd", condition, weight)
    tables = (tables + self.bias[...][:, None]).astype(dtype)
    return [parameters.look_up(table, target) for table in tables]


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
    self.attention_norm = parameters.norm_of_rows(model)
    self.attention = attention_lib.Attention(
      model, compute, rngs=rngs, has_keys=has_keys
    )
    self.mlp_norm = parameters.norm_of_rows(model)
    self.mlp = mlp_lib.MLP(model, compute, rngs=rngs)
    self.untied = model.kind.untied and has_keys
    if self.untied:
      self.of_queries = Block(model, compute, rngs=rngs, has_keys=False)
    if model.kind.condition:
      self.modulation = Modulation(model.kind.condition, 6, model.D, rngs=rngs)

  def __call__(
    self,
    streams: tuple[jax.Array, ...],
    setting: setting_lib.Setting,
    attend: attention_lib.Attend,
    S: int,
    read_out: setting_lib.Pick | None = None,
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
      sharding.constrain(x + update, *parallel.ROWS)
      for x, update in zip(streams, updates)
    )

  def _owners(self, streams: tuple[jax.Array, ...]) -> list["Block"]:
    """Return the block that has the weights of each stream."""
    return [self, self.of_queries] if self.untied else [self] * len(streams)

  def _modulations(self, setting: setting_lib.Setting) -> tuple[Any, ...]:
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
  norm: parameters.RMSNorm,
  x: jax.Array,
  update: jax.Array | None,
  m: list[jax.Array] | None,
  first: int,
  implementation: str,
) -> tuple[jax.Array, jax.Array]:
  """Return y = x + update, and its normed and modulated rows, like x.

  Args:
    norm: the norm. Only RMSNorm has a kernel.
    x: [B, R, D].
    update: like x. None means y = x.
    m: the modulation, or None.
    first: m[first] is the shift, and m[first + 1] is the scale.
    implementation: compute.rowwise.
  """
  if m is None and not isinstance(norm, parameters.LayerNorm):
    return parallel.rms_norm(
      x, norm.scale[...], update, norm.epsilon, implementation
    )
  y = x if update is None else x + update
  rows = norm(y)
  if m is not None:
    rows = rows * (1 + m[first + 1]) + m[first]
  return y, rows.astype(y.dtype)


def _gated(updates, modulations, gate):
  """Return the updates, times the gate of the modulation where there is one."""
  return [
    update if m is None else m[gate] * update
    for update, m in zip(updates, modulations)
  ]
