"""A network layer by layer: its states, and attention barred from some slots.

`record` keeps the streams before every layer. `resume` goes on from there with
attention of some layers and streams barred from some slots. So what changes
only from one layer on is computed from that layer on.

The attention of `resume` is dense and plain: all scores of one sequence, stream
and layer are in memory at once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import inside, rotary, transformer
from aoarm_jax.model import rows as rows_lib

# A slot that a row does not see, that it sees, and that is barred from it where
# its layer and stream are knocked out.
HIDDEN, SEEN, BARRED = 0, 1, 2
# Chooses the slots that are barred, bool [R, S], from the weights of attention
# averaged over heads, float32 [R, S], the marks, int8 [R, S], and the index of
# the sequence, of the layer and of the stream, int32 [3].
Choose = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Streams = tuple[jax.Array, ...]


class Resumed(NamedTuple):
  """The result of `resume`.

  Attributes:
    logits: float32 [B, R, V].
    mass: float32 [L, G, B], the weight of attention on the slots that are
      barred, before they are barred, as a mean over rows and heads. 0 in layers
      before the first one, and for content rows of the last layer.
  """

  logits: jax.Array
  mass: jax.Array


def supports(model: config_lib.Model) -> bool:
  """Return whether a network can go on from a layer: one row for each slot."""
  return not model.kind.masked and model.kind.copies == 1


def record(network: transformer.Transformer, slots: orders.Slots) -> Streams:
  """Return the streams before every layer.

  Args:
    network: the network.
    slots: int32 [B, S] each.

  Returns:
    One array [L, B, R, D] per stream, in compute dtype.
  """
  states = inside.observe(network, slots).states
  return tuple(x[:-1].astype(network.dtype) for x in states)


def seen(network: transformer.Transformer, slots: orders.Slots) -> Streams:
  """Return the slots that the rows of every stream see: bool [B, R, S] each.

  Args:
    network: of a model that `supports` allows.
    slots: int32 [B, S] each, without groups and queries.
  """
  _, setting = network.enter(slots)
  B, S = slots.tokens.shape
  causal = jnp.tri(S, dtype=bool)[None]
  return tuple(
    jnp.broadcast_to(causal if mask is None else mask, (B, S, S))
    for mask in setting.seen
  )


def resume(
  network: transformer.Transformer,
  slots: orders.Slots,
  states: Streams,
  marks: Streams,
  active: jax.Array,
  choose: Choose | None = None,
  content_stays: bool = False,
) -> Resumed:
  """Return the logits with attention barred from slots.

  Args:
    network: of a model that `supports` allows.
    slots: int32 [B, S] each, without groups and queries.
    states: the result of `record`.
    marks: int8 [B, R, S] per stream: HIDDEN, SEEN or BARRED. Every row needs a
      slot that is seen.
    active: bool [L, G], the layers and streams that are barred from slots.
      Layers before the first one are not computed again.
    choose: chooses the slots that are barred. None means those marked BARRED.
    content_stays: whether no content row of two streams is barred from slots.
      Then content rows are those of `states`, which saves half of the work.
  """
  L, G = active.shape
  B, S = slots.tokens.shape
  _, setting = network.enter(slots)
  scale = rotary.score_scale(network.model)
  choose = choose or (lambda weights, marks, index: marks == BARRED)

  def knocked(layer, stream):
    """Return the setting of a layer, its attention and a list of masses.

    The layer asks for the attention of one stream after the other, beginning
    with `stream`.
    """
    masses: list[jax.Array] = []

    def attend(queries, k, v, visible, marks):
      del visible
      of_sequence = functools.partial(
        _attention, choose, scale, layer, stream + len(masses)
      )
      out, mass = jax.lax.map(
        of_sequence, (jnp.arange(B), queries[0], k, v, marks)
      )
      masses.append(mass)
      return (out,)

    of_layer = tuple(
      jnp.where(active[layer, g], mark, jnp.minimum(mark, SEEN))
      for g, mark in enumerate(marks)
    )
    return setting._replace(seen=of_layer), attend, masses

  pick = functools.partial(rows_lib.read_out, S=S) if content_stays else None
  begins = G - 1 if content_stays else 0

  def body(layer, carry):
    streams, mass = carry
    of_layer, attend, masses = knocked(layer, begins)
    block = network.layer(layer)
    # The content before the next layer is computed or known.
    streams = block(streams, of_layer, attend, S, pick)
    streams = (*(x[layer + 1] for x in states[:begins]), *streams)
    return streams, mass.at[layer, begins:].set(jnp.stack(masses))

  first = jnp.argmax(active.any(axis=1))
  streams = tuple(x[first] for x in states)
  streams, mass = jax.lax.fori_loop(
    first, L - 1, body, (streams, jnp.zeros((L, G, B)))
  )
  of_layer, attend, masses = knocked(L - 1, G - 1)
  last = network.layer(L - 1)
  logits = network.read_out(last, streams, of_layer, attend, S)
  return Resumed(logits, mass.at[L - 1, G - 1].set(masses[0]))


def _attention(choose, scale, layer, stream, sequence):
  """Return attention of one sequence [R, N, H], and the mass that is barred."""
  index, q, k, v, marks = sequence

  def weights_on(seen):
    (weights,) = inside.attention_weights(
      q[None], k[None], None, seen[None], scale
    )
    return weights

  is_seen = marks > HIDDEN
  weights = weights_on(is_seen)
  where = jnp.stack([index, jnp.int32(layer), jnp.int32(stream)])
  barred = choose(weights.mean(axis=0), marks, where)
  mass = jnp.mean(jnp.sum(weights, axis=-1, where=barred))
  weights = weights_on(is_seen & ~barred)
  # Several query heads may share a key head.
  v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
  out = jnp.einsum("nrs,snh->rnh", weights.astype(v.dtype), v)
  return out, mass
