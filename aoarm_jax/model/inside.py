"""The states and the attention weights of all rows of one pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.model import parallel, rotary, transformer
from aoarm_jax.model import rows as rows_lib


class Inside(NamedTuple):
  """What one pass of the network computes on its way to the logits.

  All arrays are float32. A mechanism with several rows per slot has R = S *
  copies rows, and all of them are keys. Otherwise R = S.

  Attributes:
    states: one [L + 1, B, R, D] per stream: the rows before the first layer,
      and after every layer. Nothing reads the content rows of two streams after
      the last layer; they are here for completeness.
    weights: one [L, B, N, R, R] per stream: attention of rows over keys. None
      if they were not asked for.
    read_out: [B, S, D], the normed rows whose product with the head gives the
      logits of every slot.
  """

  states: tuple[jax.Array, ...]
  weights: tuple[jax.Array, ...] | None
  read_out: jax.Array


def observe(
  network: transformer.Transformer,
  slots: orders.Slots,
  with_weights: bool = False,
) -> Inside:
  """Run the network over all slots, and keep what it computes.

  Args:
    network: the network.
    slots: int32 [B, S] each, without groups and queries of their own.
    with_weights: whether the weights of attention are kept. They are computed
      densely, so they need memory for all pairs of rows, heads and layers.
  """
  streams, setting = network.enter(slots)
  S = streams[0].shape[1]
  name, scale = network.compute.attention, rotary.score_scale(network.model)

  def attend_into(kept: list[jax.Array]) -> Callable[..., Any]:
    def attend(queries, k, v, visible, seen=None):
      if with_weights:
        kept.extend(
          attention_weights(q, k, _of_stream(visible, g), seen, scale)
          for g, q in enumerate(queries)
        )
      return parallel.attention(
        queries,
        k,
        v,
        visible,
        seen,
        scale=scale,
        implementation=None if name == "auto" else name,
      )

    return attend

  def body(streams, block):
    kept: list[jax.Array] = []
    after = block(streams, setting, attend_into(kept), S)
    return after, (after, tuple(kept))

  last, (after, weights) = jax.lax.scan(body, streams, network.blocks)
  states = tuple(
    jnp.concatenate([x[None], layers]).astype(jnp.float32)
    for x, layers in zip(streams, after)
  )
  (x,) = rows_lib.read_out(last, S)
  read_out = network.normed_rows(x, setting, S).astype(jnp.float32)
  return Inside(states, weights if with_weights else None, read_out)


def _of_stream(visible, stream):
  """Return the visible slots of one stream: an int, None or int32 [B, R]."""
  is_array = isinstance(visible, jax.Array) and visible.ndim == 3
  return visible[..., stream] if is_array else visible


def attention_weights(
  q: jax.Array,
  k: jax.Array,
  visible: jax.Array | int | None,
  seen: jax.Array | None,
  scale: float,
) -> jax.Array:
  """Return the weights of attention, written out: float32 [B, N, R, S].

  Args:
    q: [B, R, N, H].
    k: [B, S, M, H]; N is a multiple of M.
    visible: int32 [B, R], the number of leading slots that each row sees. An
      int holds for all rows, and None means causal.
    seen: bool [B or 1, R, S], the slots that each row sees, in place of
      `visible`; or None.
    scale: factor of the scores.
  """
  R, S = q.shape[1], k.shape[1]
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores = scale * jnp.einsum(
    "brnh,bsnh->bnrs", q, k, preferred_element_type=jnp.float32
  )
  if seen is None:
    if visible is None:
      visible = jnp.arange(1, R + 1)[None]
    limit = jnp.reshape(
      jnp.asarray(visible), (-1, R if jnp.ndim(visible) else 1)
    )
    seen = jnp.arange(S)[None, None] < limit[..., None]
  return jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
