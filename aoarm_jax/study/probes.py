"""Linear probes: which visible characters can be read from a cached state.

A state is a row of content, or of the only stream, before the first layer or
after a layer. A probe is a linear map of the normed state to the characters, by
ridge regression on some windows. Its accuracy is measured on other windows. One
probe reads one character:

  recency r     the token of the slot r before the own slot; 0 is the own slot
  position d    the token that stands d positions from the own content
  target d      the token that stands d positions from the target; for a single
                stream alone, whose rows also make predictions

Only rows that see this slot count. Before the first layer a state knows the own
token alone, so its accuracy is what the own token tells about its neighbours.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax import orders
from aoarm_jax.model import inside, transformer

_RECENCIES = (*range(17), 24, 32, 64)
_DISTANCES = (1, 2, 3, 4, 6, 8, 16)
# The ridge as a share of the mean square of a feature.
_RIDGE = 1e-3


class Probe(NamedTuple):
  """The character that a probe reads.

  Attributes:
    by: "recency", "position" or "target".
    offset: slots before the own slot, or positions after the place.
  """

  by: str
  offset: int


class Sums(NamedTuple):
  """The sums over rows that a ridge regression needs; see `fit`.

  Attributes:
    gram: float32 [P, M, D + 1, D + 1] for P probes and M states of a row.
    cross: float32 [P, M, D + 1, V].
  """

  gram: jax.Array
  cross: jax.Array


def probes(streams: int, T: int) -> list[Probe]:
  """Return the probes of a mechanism.

  Args:
    streams: 1 or 2.
    T: positions of a window.
  """
  signed = [sign * d for d in _DISTANCES for sign in (-1, 1)]
  places = ["position"] + ["target"] * (streams == 1)
  return [
    *(Probe("recency", r) for r in _RECENCIES if r < T - 1),
    *(Probe(by, d) for by in places for d in signed if abs(d) < T),
  ]


def wanted(
  slots: orders.Slots, probe: Probe, sentinels: int
) -> tuple[jax.Array, jax.Array]:
  """Return the tokens that a probe reads, and whether the rows see them.

  Args:
    slots: int32 [B, S] each, in the order of generation.
    probe: what is read.
    sentinels: s; a sentinel is never read.

  Returns:
    int32 [B, S] and bool [B, S].
  """
  S = slots.tokens.shape[1]
  index = jnp.arange(S)[None]
  if probe.by == "recency":
    found = jnp.broadcast_to(index - probe.offset, slots.tokens.shape)
  else:
    at = slots.position if probe.by == "position" else slots.target_position
    by_position = jax.vmap(
      lambda position: jnp.full(2 * S, S).at[position].set(jnp.arange(S))
    )(jnp.where(index < sentinels, 2 * S, slots.position))
    place = at + probe.offset
    # A negative index would count from the end.
    place = jnp.where(place < 0, 2 * S - 1, place)
    found = jnp.take_along_axis(by_position, place, axis=1, mode="clip")
  is_row = index >= sentinels
  is_seen = (found >= sentinels) & (found <= index) & is_row
  token = jnp.take_along_axis(slots.tokens, jnp.clip(found, 0, S - 1), axis=1)
  return jnp.where(is_seen, token, 0), is_seen


def states(network: transformer.Transformer, slots: orders.Slots) -> jax.Array:
  """Return the states of content or of the only stream: float32 [M, B, S, D].

  They are divided by their root mean square, as every layer does with what it
  reads. M is L for two streams, whose last layer has no content, else L + 1.

  Args:
    network: of a model that `layerwise.supports` allows.
    slots: int32 [B, S] each.
  """
  streams = inside.observe(network, slots).states
  content = streams[0] if len(streams) == 1 else streams[0][:-1]
  return content * jax.lax.rsqrt(
    jnp.mean(content**2, axis=-1, keepdims=True) + network.model.norm_epsilon
  )


def _features(x):
  """Return states [..., D] with a constant feature: [..., D + 1]."""
  return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1)


def _over_probes(
  function: Callable[..., Any],
  targets: tuple[jax.Array, ...],
  x: jax.Array,
  *others: jax.Array,
) -> Any:
  """Return function(features, token, is_seen, *of the probe and state).

  Args:
    function: of features [B, S, D + 1], token [B, S] and is_seen [B, S].
    targets: (token, is_seen), [P, B, S] each.
    x: [M, B, S, D].
    *others: arrays [P, M, ...].

  Returns:
    [P, M, ...]. The features of one state are in memory at a time.
  """

  def of_state(state):
    x, *own = state
    features = _features(x)
    return jax.lax.map(lambda t: function(features, *t), (*targets, *own))

  by_state = (jnp.moveaxis(other, 1, 0) for other in others)
  result = jax.lax.map(of_state, (x, *by_state))
  return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), result)


def _targets(slots, read, sentinels):
  found = [wanted(slots, probe, sentinels) for probe in read]
  return tuple(map(jnp.stack, zip(*found)))


def sums(
  network: transformer.Transformer,
  tokens: jax.Array,
  order: jax.Array,
  read: Sequence[Probe],
) -> Sums:
  """Return the sums over the rows of some windows.

  Args:
    network: of a model that `layerwise.supports` allows.
    tokens: int32 [B, T].
    order: int32 [B, T].
    read: the probes.
  """
  slots = orders.to_slots(tokens, order, network.layout)
  V = network.vocabulary

  def of_probe(features, token, is_seen):
    rows = features * is_seen[..., None]
    return Sums(
      jnp.einsum("bsd,bse->de", rows, features),
      jnp.einsum("bsd,bsv->dv", rows, jax.nn.one_hot(token, V)),
    )

  targets = _targets(slots, read, network.model.sentinels)
  return _over_probes(of_probe, targets, states(network, slots))


def fit(total: Sums) -> np.ndarray:
  """Return the linear maps by ridge regression: float32 [P, M, D + 1, V].

  Args:
    total: sums over all windows of the fit, in float64 where there are many.
  """
  gram, cross = (np.asarray(x, np.float64) for x in total)
  size = gram.shape[-1]
  mean = np.trace(gram, axis1=-2, axis2=-1) / size
  ridge = np.maximum(_RIDGE * mean, 1e-9)[..., None, None] * np.eye(size)
  return np.linalg.solve(gram + ridge, cross).astype(np.float32)


def hits(
  network: transformer.Transformer,
  tokens: jax.Array,
  order: jax.Array,
  read: Sequence[Probe],
  maps: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return how many characters the probes read right in every window.

  Args:
    network: of a model that `layerwise.supports` allows.
    tokens: int32 [B, T].
    order: int32 [B, T].
    read: the probes.
    maps: float32 [P, M, D + 1, V], of `fit`.

  Returns:
    The right ones, float32 [P, M, B], and all that are seen, float32 [P, B].
  """
  slots = orders.to_slots(tokens, order, network.layout)
  targets = _targets(slots, read, network.model.sentinels)

  def of_probe(features, token, is_seen, linear):
    guess = jnp.argmax(features @ linear, axis=-1)
    return jnp.sum((guess == token) & is_seen, axis=1, dtype=jnp.float32)

  right = _over_probes(of_probe, targets, states(network, slots), maps)
  return right, targets[1].sum(axis=2, dtype=jnp.float32)
