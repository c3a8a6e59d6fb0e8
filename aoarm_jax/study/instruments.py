"""The programs that measure trained networks of one config, see dissection."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.model import network as network_lib
from aoarm_jax.study import knockouts, layerwise, probes, profiles

_MOST_TOKENS = 1 << 13  # Of a batch.
_FIT = 3  # Windows on which probes are fitted, for each on which they are held.


class Windows(NamedTuple):
  """Windows of text, with their orders.

  Attributes:
    tokens: int32 [n, T].
    order: int32 [n, T].
  """

  tokens: np.ndarray
  order: np.ndarray

  def batches(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (index of the first window, tokens, order) of equal batches."""
    n, T = self.tokens.shape
    most = max(1, _MOST_TOKENS // T)
    size = next(size for size in range(min(n, most), 0, -1) if n % size == 0)
    for first in range(0, n, size):
      batch = slice(first, first + size)
      yield first, self.tokens[batch], self.order[batch]


class Instruments:
  """Measures any number of networks of one config, each program made once."""

  def __init__(self, config: config_lib.Config):
    """Compile nothing yet.

    Args:
      config: of a cell, with the options of the study.
    """
    self.config = config
    self.network = network_lib.Network(config)
    self.streams = profiles.streams(config.model.kind)
    self.read = probes.probes(len(self.streams), config.model.T)
    self._record = jax.jit(self._recorded)
    self._marks = jax.jit(self._marked, static_argnames="knockout")
    # One program serves all knock-outs of a kind, all layers and all streams.
    static = ("equal_mass", "content_stays")
    self._nats = jax.jit(self._knocked, static_argnames=static)
    self._sums, self._hits = jax.jit(self._summed), jax.jit(self._hit)
    self._profile = jax.jit(self._profiled)

  def _recorded(self, params, tokens, order):
    slots = orders.to_slots(tokens, order, self.network.layout)
    return layerwise.record(self.network.bind(params), slots)

  def _marked(self, params, tokens, order, *, knockout):
    slots = orders.to_slots(tokens, order, self.network.layout)
    return knockouts.marks(self.network.bind(params), slots, knockout)

  def _knocked(self, params, *arguments, **options):
    return knockouts.nats(self.network.bind(params), *arguments, **options)

  def _summed(self, params, tokens, order):
    return probes.sums(self.network.bind(params), tokens, order, self.read)

  def _hit(self, params, tokens, order, maps):
    bound = self.network.bind(params)
    return probes.hits(bound, tokens, order, self.read, maps)

  def _profiled(self, params, tokens, order):
    real = jnp.ones(len(tokens), bool)
    return profiles.profile(self.network.bind(params), tokens, order, real)

  def measures(self, params: Any, fit: Windows, held: Windows) -> dict:
    """Return what measures.json holds of a network, without its options.

    Args:
      params: of the network.
      fit: the windows on which probes are fitted.
      held: the windows on which everything is measured.
    """
    bits, rises = self._knockouts(params, held)
    return {
      "bits": bits,
      "knockouts": rises,
      "probes": self._probes(params, fit, held),
      "locality": self._locality(params, held),
    }

  def _knockouts(self, params, held):
    """Return the bits of every window, and a row for every knock-out."""
    plans, T = list(_plans(self.config, self.streams)), self.config.model.T
    intact: list[np.ndarray] = []
    rows: list[list[tuple[np.ndarray, ...]]] = [[] for _ in plans]
    nothing = np.zeros((self.config.model.L, len(self.streams)), bool)
    for first, tokens, order in held.batches():
      states = self._record(params, tokens, order)
      one = functools.partial(
        self._one, params, np.int32(first), tokens, order, states
      )
      before, _ = one(nothing, "own")
      intact.append(before)
      for row, plan in zip(rows, plans):
        nats, mass = one(plan.active, plan.text)
        row.append((nats - before, mass[plan.active].mean(axis=0)))
      logging.info("  knock-outs of %d windows", first + len(tokens))
    found = []
    for plan, row in zip(plans, rows):
      rise, mass = (np.concatenate(x) for x in zip(*row))
      found.append(
        {
          "knockout": plan.text,
          "stream": plan.stream,
          "layer": plan.layer,
          "rise_bits": _listed(_bits(rise)),
          "late_bits": _listed(_bits(rise[:, T // 2 :])),
          "mass": _listed(mass),
        }
      )
    return _listed(_bits(np.concatenate(intact))), found

  def _one(self, params, first, tokens, order, states, active, text):
    """Return nats [B, T] and masses [L, G, B] of a knock-out of a batch."""
    knockout = knockouts.parse(text)
    marked = self._marks(params, tokens, order, knockout=knockout)
    only_queries = active.any() and not active[:, :-1].any()
    return jax.device_get(
      self._nats(
        params,
        tokens,
        order,
        states,
        marked,
        active,
        first,
        equal_mass=knockout.equal_mass,
        content_stays=bool(only_queries and len(self.streams) > 1),
      )
    )

  def _probes(self, params, fit, held):
    """Return a row for every probe and state."""
    maps = probes.fit(self._total(self._sums, params, fit))
    parts = [
      jax.device_get(self._hits(params, tokens, order, maps))
      for _, tokens, order in held.batches()
    ]
    right, seen = (np.concatenate(x, axis=-1) for x in zip(*parts))
    logging.info("  probes of %d windows", right.shape[-1])
    return [
      probe._asdict()
      | {"layer": m, "right": _listed(right[p, m]), "seen": _listed(seen[p])}
      for p, probe in enumerate(self.read)
      for m in range(right.shape[1])
      if seen[p].min() > 0
    ]

  def _locality(self, params, held):
    """Return a row for every stream, layer and head, if there is a profile."""
    if not profiles.supports(self.config.model):
      return []
    earlier, last = self._total(self._profile, params, held)
    logging.info("  locality of %d windows", len(held.tokens))
    arrays = profiles.to_arrays(earlier, last, self.config.model.kind)
    return profiles.rows(arrays, self.streams)

  def _total(self, program, params, text):
    """Return the sums of a program over all batches, in float64."""
    parts = (
      jax.device_get(program(params, tokens, order))
      for _, tokens, order in text.batches()
    )
    return functools.reduce(
      lambda total, part: jax.tree.map(np.add, total, part),
      (jax.tree.map(np.float64, part) for part in parts),
    )


class _Plan(NamedTuple):
  """One knock-out: of `text`, in the layers and streams of `active` [L, G]."""

  text: str
  stream: str
  layer: str
  active: np.ndarray


def _plans(config, streams):
  """Yield every knock-out that the options ask for."""
  L, G = config.model.L, len(streams)
  everywhere, by_layer = knockouts.wanted(config.study)
  every = [(name, [g]) for g, name in enumerate(streams)]
  if G > 1:
    every.append(("all", list(range(G))))
  for text in everywhere:
    for name, members in every:
      active = np.zeros((L, G), bool)
      active[:, members] = True
      # Nothing reads the content of the last layer.
      active[-1, : G - 1] = False
      yield _Plan(text, name, "all", active)
  for text in by_layer:
    for g, name in enumerate(streams):
      for layer in range(L - (g < G - 1)):
        active = np.zeros((L, G), bool)
        active[layer, g] = True
        yield _Plan(text, name, str(layer + 1), active)


def _bits(nats):
  """Return the mean bits of every window, from nats by rank [n, T]."""
  return nats.mean(axis=1, dtype=np.float64) / math.log(2)


def _listed(x):
  return [round(float(value), 6) for value in x]


def windows(
  config: config_lib.Config, tokens: np.ndarray
) -> tuple[Windows, Windows]:
  """Return the windows on which probes are fitted, and those of all measures.

  They are spread over the text, and have orders of the family of generated
  texts. Cells of one length have the same windows and orders.

  Args:
    config: of a cell, with the options of the study.
    tokens: unsigned integers [n], the split.
  """
  count = (1 + _FIT) * config.study.measure_windows
  batches = pipeline.eval_batches(
    tokens,
    T=config.model.T,
    batch_size=count,
    batches=1,
    seed=config.eval.seed,
  )
  text, real = batches[0]
  if real.sum() < count:
    raise corpora.DataError(
      f"config.study.measure_windows={config.study.measure_windows}: {count} "
      f"windows of T={config.model.T} are needed, since probes are fitted on "
      f"others, and the split {config.eval.split} has {real.sum()}; take "
      f"at most {real.sum() // (1 + _FIT)}"
    )
  order = np.asarray(profiles.orders_of(config, count))
  is_held = np.arange(count) % (1 + _FIT) == 0
  text = text.astype(np.int32)
  fit, held = (Windows(text[x], order[x]) for x in (~is_held, is_held))
  return fit, held
