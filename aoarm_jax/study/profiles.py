"""Attention profiles: what rows attend to, by distance of two kinds.

semantic    |p - c|: positions between a key's content and the position p that
            the row is about: its target t or, for content rows of two streams,
            its own content.
structural  i - j: slots between the row and the key, that is, how many steps
            ago the key's token was generated.

Sentinels and the row's own slot draw attention for reasons of their own: their
mass is reported apart and counts in no distance. (The own slot holds the token
that was generated last before the target. A query row, which has no content,
sees that token there alone.) The mass at each distance is divided by what the
rest of the row's mass would put there, if it were spread evenly over the keys
that count. So a row that attends to sentinels is not taken for a distant one.

One index sums a profile up. With w the attention and k the rank of a key among
those of a row (1 the nearest; equally near keys share the better rank),

  locality = 1 - sum(w log k) / sum(m mean(log k)),

sums over rows; m is the mass of a row on the keys that count, the mean is over
these keys. 1: all goes to the nearest key; 0: as far as uniform attention
goes; below 0: farther. A third index, structural_with_own, is the structural
one with the own slot among the keys that count, as the most recent of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from aoarm_jax import orders
from aoarm_jax.config import mechanisms, purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import inside, rotary, transformer

KINDS = ("semantic", "structural")
INDICES = (*KINDS, "structural_with_own")


class Sums(NamedTuple):
  """Of attention weights, over rows; leading axes are [N, G] here.

  Attributes:
    mass: float32 [..., 2, K], by kind and bin of distance.
    even: float32 [..., 2, K], what each row's mass on the keys that count would
      give, spread evenly over these keys.
    spread: float32 [..., 3], sum of w log k, by INDICES.
    even_spread: float32 [..., 3], sum of m mean(log k), by INDICES.
    own: float32 [...], mass on the row's own slot.
    sentinels: float32 [...], mass on sentinels.
    rows: float32 [...], how many.
  """

  mass: jax.Array
  even: jax.Array
  spread: jax.Array
  even_spread: jax.Array
  own: jax.Array
  sentinels: jax.Array
  rows: jax.Array


def bin_edges(T: int) -> np.ndarray:
  """The highest distances of the bins: 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
  powers = 2 ** np.arange(1, (max(T, 2) - 1).bit_length() + 1)
  return np.unique(np.concatenate([[1], powers, powers * 3 // 2]))


def streams(kind: mechanisms.Mechanism) -> tuple[str, ...]:
  """The names of a mechanism's streams."""
  return ("content", "query") if kind.streams == 2 else ("only",)


def summarise(
  w: jax.Array, place: jax.Array, position: jax.Array, sentinels: int
) -> Sums:
  """Sums over the rows of one sequence.

  Args:
    w: float32 [N, G, R, S], weights of causal attention, R = S.
    place: int32 [G, R], p: the position that each row is about.
    position: int32 [S], c, by slot.
    sentinels: s; slots before it are left out of all distances.

  Returns:
    Sums [N, G].
  """
  R, S = w.shape[2:]
  row, slot = jnp.arange(R)[:, None], jnp.arange(S)[None]
  counts = (slot >= sentinels) & (slot < row)
  edges = jnp.asarray(bin_edges(S + 1))
  near = jnp.abs(place[:, :, None] - position)  # [G, R, S]
  ago = jnp.broadcast_to(row - slot, near.shape)
  # Of the slots before a row's own, none that counts is between it and these.
  with_own = counts | ((slot >= sentinels) & (slot == row))
  ranks = (_rank(near, counts), ago, ago + 1)
  rank = jnp.stack([x.astype(jnp.float32) for x in ranks], axis=1)
  # One mask [R, S] for each index: the keys that count in it.
  counted = jnp.stack([counts, counts, with_own])
  log_rank = jnp.where(counted, jnp.log(jnp.maximum(rank, 1)), 0.0)
  # Bins hold distances up to their edge. [G, 2, R, S]
  bins = jnp.searchsorted(edges, jnp.stack([near, ago], axis=1))

  def of_bin(k):
    in_bin = ((bins == k) & counts).astype(jnp.float32)
    even = jnp.einsum("ngr,gdr->ngd", m[..., 0, :] / size[0], in_bin.sum(-1))
    return jnp.einsum("ngrs,gdrs->ngd", w, in_bin), even

  size = jnp.maximum(counted.sum(-1), 1)  # [3, R]
  m = jnp.einsum("ngrs,drs->ngdr", w, counted.astype(jnp.float32))
  mass, even = jax.lax.map(of_bin, jnp.arange(len(edges)))
  mean = log_rank.sum(-1) / size  # [G, 3, R]
  return Sums(
    mass=jnp.moveaxis(mass, 0, -1),
    even=jnp.moveaxis(even, 0, -1),
    spread=jnp.einsum("ngrs,gdrs->ngd", w, log_rank),
    even_spread=jnp.einsum("ngdr,gdr->ngd", m, mean),
    own=jnp.trace(w, axis1=2, axis2=3),
    sentinels=w[..., :sentinels].sum((2, 3)),
    rows=jnp.full(w.shape[:2], R, jnp.float32),
  )


def _rank(near, counts):
  """1 + how many keys of the row that count are nearer: float32 [G, R, S]."""
  size = near.shape[-1] + 2
  near = jnp.minimum(near, size - 1)

  def of_row(near, counts):
    here = jnp.zeros(size).at[near].add(counts.astype(jnp.float32))
    nearer = jnp.cumsum(here) - here
    return 1 + nearer[near]

  return jax.vmap(jax.vmap(of_row), (0, None))(near, counts)


def supports(model: config_lib.Model) -> bool:
  """Return whether attention can be profiled: one causal row for each slot."""
  kind = model.kind
  return not kind.masked and kind.copies == 1 and model.look is None


def profile(
  network: transformer.Transformer,
  tokens: jax.Array,
  order: jax.Array,
  real: jax.Array,
) -> tuple[Sums, Sums]:
  """Sums over the rows of all real sequences.

  One sequence's map of one layer is in memory at a time.

  Args:
    network: of a model that `supports` allows.
    tokens: int [B, T].
    order: int32 [B, T].
    real: bool [B]; a sequence that is not fills the batch and counts nowhere.

  Returns:
    Sums [L - 1, N, G] of the layers before the last, and Sums [N, 1] of the
    last layer: of two streams its query rows.
  """
  model = network.model
  if not supports(model):
    raise ValueError(
      f"{model.mechanism}, content_sees={model.content_sees}: no profile where "
      "a slot has no causal row of its own"
    )
  slots = orders.to_slots(tokens, order, network.layout)
  places = jnp.stack([slots.position, slots.target_position])  # [2, B, S]
  scale = rotary.score_scale(model)

  def look(q, k, v, visible):
    del v, visible
    B, _, heads, _ = q.shape
    G = heads // model.N
    place = places if G == 2 else places[1:]

    def of_sequence(sequence):
      q, k, place, position = sequence
      (w,) = inside.attention_weights(q[None], k[None], None, None, scale)
      w = w.reshape(model.N, G, *w.shape[1:])
      return summarise(w, place, position, model.sentinels)

    sums = jax.lax.map(
      of_sequence, (q, k, jnp.moveaxis(place, 1, 0), slots.position)
    )

    def total(x):
      return x.sum(axis=0, where=real.reshape(B, *[1] * (x.ndim - 1)))

    return jax.tree.map(total, sums)

  return observe(network, slots, look)


def observe(
  network: transformer.Transformer,
  slots: orders.Slots,
  look: Callable[..., Any],
) -> tuple[Any, Any]:
  """What `look` makes of the attention of every layer.

  Args:
    network: the network.
    slots: int32 [B, S] each.
    look: (q, k, v, visible) -> pytree of arrays, with q [B, R, N * G, H] of all
      G streams; see attention.Attend.

  Returns:
    The pytree of the layers before the last, stacked on a leading axis, and
    that of the last one, whose queries are of the rows that are read out.
  """
  S, before = slots.tokens.shape[1], network.model.L - 1
  last: list[Any] = []
  scale = rotary.score_scale(network.model)
  entered, setting = network.enter(slots)

  def attend_into(seen):
    def attend(queries, k, v, visible):
      B, R, _, H = queries[0].shape
      q = jnp.stack(queries, axis=3).reshape(B, R, -1, H)
      seen.append(look(q, k, v, visible))
      return pallas_kernels.any_order_attention(
        queries, k, v, visible, scale=scale
      )

    return attend

  def body(x, block):
    seen: list[Any] = []
    return block(x, setting, attend_into(seen), S), seen[0]

  left, earlier = jax.lax.scan(
    body, entered, jax.tree.map(lambda p: p[:before], network.blocks)
  )
  network.read_out(network.layer(before), left, setting, attend_into(last), S)
  return earlier, last[0]


def to_arrays(
  earlier: Sums, last: Sums, kind: mechanisms.Mechanism
) -> dict[str, np.ndarray]:
  """The Sums of all layers by stream, for an npz file.

  Returns:
    "<stream>/<field>" -> [layers, N, ...]; content of two streams has L - 1.
  """
  names = streams(kind)
  arrays = {}
  for g, name in enumerate(names):
    for field in Sums._fields:
      x = np.asarray(getattr(earlier, field))[:, :, g]
      if g == len(names) - 1:
        x = np.concatenate([x, np.asarray(getattr(last, field))[None, :, 0]])
      arrays[f"{name}/{field}"] = x
  return arrays


def locality(arrays: dict[str, np.ndarray], stream: str) -> np.ndarray:
  """The indices: [layers, N, 3], by INDICES; nan where nothing counts."""
  spread = arrays[f"{stream}/spread"]
  even = arrays[f"{stream}/even_spread"]
  return np.where(even > 0, 1 - spread / np.maximum(even, 1e-30), np.nan)


def is_current(arrays: dict[str, np.ndarray]) -> bool:
  """Return whether a profile has these sums; older ones have others."""
  return any(name.endswith("/even") for name in arrays)


def shares(arrays: dict[str, np.ndarray], stream: str) -> dict[str, np.ndarray]:
  """Mass per row on the own slot and on sentinels: [layers, N] each."""
  rows = arrays[f"{stream}/rows"]
  return {
    name: arrays[f"{stream}/{name}"] / rows for name in ("own", "sentinels")
  }


def rows(
  arrays: dict[str, np.ndarray], names: tuple[str, ...]
) -> list[dict[str, Any]]:
  """Return one row per stream, layer and head: its indices and its masses.

  Args:
    arrays: the profile of one run, see `to_arrays`.
    names: the streams.
  """
  found = []
  for stream in names:
    index, masses = locality(arrays, stream), shares(arrays, stream)
    for layer, head in np.ndindex(index.shape[:2]):
      row = {"stream": stream, "layer": layer + 1, "head": head + 1}
      values = index[layer, head].tolist()
      row |= dict(zip(INDICES, (x if np.isfinite(x) else "" for x in values)))
      row |= {f"mass_{n}": float(x[layer, head]) for n, x in masses.items()}
      found.append(row)
  return found


def orders_of(config: config_lib.Config, windows: int) -> jax.Array:
  """Returns the orders of so many windows, the same for every run.

  They are of the family of generated texts: int32 [windows, T].
  """
  return orders.draw(
    jax.random.fold_in(jax.random.key(0), purposes.STUDY_ATTENTION),
    windows,
    config.model.T,
    config.replace("orders.family", config.sample.order).orders,
  )
