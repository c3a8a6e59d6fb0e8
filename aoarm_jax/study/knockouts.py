"""Knock-outs: attention of a trained network is barred from chosen slots.

The rise in bits says how much the network relies on what it reads there. A
knock-out is written as

  own                   a row's own slot, which holds the token that was
                        generated last before the target
  last:k                the k slots before the own slot
  own+last:k            both of these
  nearest:k             the k visible slots that stand nearest in position: to
                        the target of query rows and of a single stream, to the
                        own position of content rows
  random:k              k slots before the own slot, by a hash of the two slots
  equal_mass:last:k     in each layer, random slots that carry as much attention
                        as last:k does there
  equal_mass:nearest:k  the same for nearest:k

A row with fewer slots loses all of these. Sentinels are never barred. The own
slot of a content row is never among the nearest. The random slots of equal_mass
are before the own slot and none of those that they are compared with; their
mass is that of the mean over heads. The last slot is taken if half of its mass
still fits.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import objective, orders
from aoarm_jax.config import mechanisms, purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import looks, transformer
from aoarm_jax.study import layerwise, profiles

_FORM = re.compile(
  r"own|(own\+)?last:([1-9]\d{0,4})|random:[1-9]\d{0,4}|"
  r"(equal_mass:)?(last|nearest):[1-9]\d{0,4}"
)


# The default knock-outs, in all layers and in one layer alone.
_EVERYWHERE = (
  "own last:1 last:8 last:32 own+last:8 nearest:1 nearest:8 nearest:32 "
  "random:8 random:32 equal_mass:last:8 equal_mass:nearest:8"
)
_BY_LAYER = "own last:8 nearest:8 equal_mass:nearest:8"


class Knockout(NamedTuple):
  """The slots that are barred.

  Attributes:
    kind: "last", "nearest" or "random".
    most: k, the greatest number of slots beside the own slot.
    own: whether the own slot is barred too, with "last".
    equal_mass: whether random slots of equal mass are barred instead.
  """

  kind: str
  most: int
  own: bool = False
  equal_mass: bool = False


def wanted(study: config_lib.Study) -> tuple[list[str], list[str]]:
  """Return the knock-outs in all layers, and those in one layer alone.

  Args:
    study: the section of the config. "" means the defaults, and "none" none.

  Raises:
    ConfigError: a knock-out cannot be read.
  """

  def listed(text, default):
    words = [] if text == "none" else (text or default).split()
    for word in words:
      parse(word)
    return words

  return (
    listed(study.knockouts, _EVERYWHERE),
    listed(study.layer_knockouts, _BY_LAYER),
  )


def parse(text: str) -> Knockout:
  """Return the Knockout that a text names.

  Args:
    text: as in the docstring of this module.

  Raises:
    ConfigError: no knock-out is written like that.
  """
  if not _FORM.fullmatch(text):
    raise config_lib.ConfigError(
      f"config.study.knockouts: {text!r} is none of them: write own, last:k, "
      "own+last:k, nearest:k, random:k, equal_mass:last:k or "
      "equal_mass:nearest:k with a whole number k"
    )
  if text == "own":
    return Knockout("last", 0, own=True)
  *words, kind, count = text.replace("+", ":").split(":")
  return Knockout(kind, int(count), "own" in words, "equal_mass" in words)


def marks(
  network: transformer.Transformer, slots: orders.Slots, knockout: Knockout
) -> layerwise.Streams:
  """Return the marks of `layerwise.resume`: int8 [B, S, S] per stream.

  Args:
    network: of a model that `layerwise.supports` allows.
    slots: int32 [B, S] each.
    knockout: the slots that are barred. With equal_mass, these are the slots
      whose mass is matched.
  """
  model = network.model
  index = jnp.arange(slots.tokens.shape[1])[None]
  keys = looks.Places(index, slots.position)

  def barred(stream):
    is_content = stream == "content"
    place = slots.position if is_content else slots.target_position
    takes_own = knockout.own or (knockout.kind == "nearest" and not is_content)
    look = mechanisms.Look(knockout.kind, knockout.most + knockout.own)
    # A row of the next slot has the own slot among its earlier ones.
    rows = looks.Places(index + takes_own, place)
    return looks.chosen(look, model.sentinels, rows, keys)

  visible = layerwise.seen(network, slots)
  return tuple(
    jnp.where(
      barred(stream) & is_seen, layerwise.BARRED, is_seen.astype(jnp.int8)
    ).astype(jnp.int8)
    for stream, is_seen in zip(profiles.streams(model.kind), visible)
  )


def random_of_equal_mass(
  sentinels: int, first_row: jax.Array
) -> layerwise.Choose:
  """Return what chooses random slots with the mass of those that are marked.

  Args:
    sentinels: s, the number of sentinels.
    first_row: int32 [], the index of row 0 of the batch among all sequences.
  """
  base = jax.random.fold_in(jax.random.key(0), purposes.STUDY_KNOCKOUTS)

  def choose(weights, marks, index):
    S = len(weights)
    row, slot = jnp.arange(S)[:, None], jnp.arange(S)[None]
    may = (marks == layerwise.SEEN) & (slot >= sentinels) & (slot < row)
    mass = jnp.sum(weights, axis=-1, where=marks == layerwise.BARRED)
    key = base
    for number in index.at[0].add(first_row):
      key = jax.random.fold_in(key, number)
    return taken(jnp.where(may, weights, 0.0), mass, key)

  return choose


def taken(weights: jax.Array, mass: jax.Array, key: jax.Array) -> jax.Array:
  """Return random slots that together have about a given mass: bool [R, S].

  One random cycle of the slots is drawn. Each row takes slots along it, from a
  random start on, for as long as half of a slot's weight still fits.

  Args:
    weights: float32 [R, S]; slots of weight 0 are never taken.
    mass: float32 [R], the mass that is wanted.
    key: typed PRNG key.
  """
  R, S = weights.shape
  cycle_key, start_key = jax.random.split(key)
  cycle = jax.random.permutation(cycle_key, S)
  start = jax.random.randint(start_key, (R, 1), 0, S)
  along = weights[:, cycle]
  before = jnp.cumsum(along, axis=1) - along
  wrapped = jnp.where(
    jnp.arange(S) < start, along.sum(axis=1, keepdims=True), 0.0
  )
  before += wrapped - jnp.take_along_axis(before, start, axis=1)
  wanted = mass[:, None]
  fits = (along > 0) & (wanted > 0) & (before + along / 2 <= wanted)
  return fits[:, jnp.argsort(cycle)]


def nats(
  network: transformer.Transformer,
  tokens: jax.Array,
  order: jax.Array,
  states: layerwise.Streams,
  marked: layerwise.Streams,
  active: jax.Array,
  first_row: jax.Array,
  equal_mass: bool = False,
  content_stays: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Return the nats of sequences with attention barred from slots.

  Args:
    network: of a model that `layerwise.supports` allows.
    tokens: int32 [B, T].
    order: int32 [B, T].
    states: of `layerwise.record`, of the same sequences.
    marked: the result of `marks`.
    active: bool [L, G], the layers and streams in which slots are barred.
    first_row: int32 [], the index of row 0 among all sequences.
    equal_mass: whether random slots of equal mass are barred instead of those
      that are marked.
    content_stays: see `layerwise.resume`.

  Returns:
    float32 [B, T] nats by rank, and the mass on the barred slots, float32 [L,
    G, B]; see layerwise.Resumed.
  """
  masses: list[jax.Array] = []
  choose = None
  if equal_mass:
    choose = random_of_equal_mass(network.model.sentinels, first_row)

  def apply(slots):
    resumed = layerwise.resume(
      network,
      slots,
      states,
      marked,
      active,
      choose,
      content_stays,
    )
    masses.append(resumed.mass)
    return resumed.logits

  by_rank = objective.order_nll(apply, network.layout, tokens, order)
  return by_rank, masses[0]
