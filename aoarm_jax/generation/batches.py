"""Texts are drawn in batches of equal shape, by one program for each shape."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.generation import (
  decode,
  diffusion,
  prompts,
  shapes,
  streaming,
)
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import patience

_LEAST_ROWS = 4


class Row(NamedTuple):
  """A text to draw.

  Attributes:
    tokens: int32 [m], with a known end token where that tells the length.
    known: bool [m].
    n: number of tokens of the text: m, or m - 1 with a known end token.
    order: the permutation for config.sample.order="given".
    is_open: see prompts.Prompt. Only where the model predicts the end.
    number: its number, which its draws depend on.
  """

  tokens: np.ndarray
  known: np.ndarray
  n: int
  order: Sequence[int]
  is_open: bool
  number: int


class Batches:
  """Draws rows. A program is compiled once for every shape and method."""

  def __init__(
    self, config: config_lib.Config, network: network_lib.Network
  ) -> None:
    """Compile nothing yet.

    Args:
      config: its sections orders and model are read.
      network: the network that generates; with a mesh.
    """
    assert network.mesh is not None
    self._config, self._network = config, network
    self._mesh = network.mesh
    self._jitted = jax.jit(
      self._draw,
      static_argnames=("plan", "prefill", "most_known"),
      out_shardings=sharding.replicated(network.mesh),
    )
    # The orders have a small program of their own. So the large one is the same
    # for all of them.
    self._draw_orders = jax.jit(
      self._orders_of,
      static_argnames="family",
      out_shardings=sharding.named(network.mesh, "batch"),
    )
    self._stepper = streaming.Stepper(network)
    self._compiled: set[Any] = set()

  def draw(
    self,
    params: Any,
    rows: Mapping[int, Row],
    config: config_lib.Config,
    is_stopped: Callable[[], object],
    purpose: int,
  ) -> dict[int, sampling.Generation]:
    """Draw rows that are all open or all closed.

    Args:
      params: the network's parameters, on the mesh.
      rows: the rows by number.
      config: its section sample counts.
      is_stopped: called before every batch. A true result ends the call.
      purpose: of the random numbers, see config/purposes.py.

    Returns:
      {number: what was drawn}, as numpy arrays of one row: [T] and []. If the
      call was stopped, the rows of the batches before.
    """
    batches = []
    for (T, prefill), numbers in self._by_shape(rows).items():
      B = self._batch_size(config, len(numbers))
      for start in range(0, len(numbers), B):
        batches.append((T, prefill, B, numbers[start : start + B]))
    drawn: dict[int, sampling.Generation] = {}
    for T, prefill, B, numbers in patience.counted(batches):
      if is_stopped():
        break
      batch = {i: rows[i] for i in numbers}
      results = self._batch(params, batch, config, T, prefill, B, purpose)
      drawn |= zip(batch, results)
    return drawn

  def steps(
    self, params: Any, row: Row, config: config_lib.Config
  ) -> Iterator[streaming.Decided]:
    """Yield the steps in which `draw` decides the tokens of one row.

    Args:
      params: the network's parameters, on the mesh.
      row: the row, with its number.
      config: its section sample counts.
    """
    ((T, prefill),) = self._by_shape({0: row})
    B = self._batch_size(config, 1)
    key, law, _, by_row, order, plan = self._inputs(
      {0: row}, config, T, B, purposes.GENERATION
    )
    if config.sample.order != "given":
      order = self._draw_orders(
        key, order, by_row[-1], family=config.sample.order
      )
    _, draw_key = jax.random.split(key)
    yield from self._stepper.steps(
      params, draw_key, law, (*by_row, order), plan=plan, prefill=prefill
    )

  def _by_shape(self, rows):
    """Return the numbers of rows by (padded length, whether to prefill)."""
    model = self._config.model
    by_shape: dict[tuple[int, bool], list[int]] = {}
    for number, row in rows.items():
      T = shapes.length(len(row.tokens), model.T)
      # A masked mechanism has no cache to fill, and one program for all.
      prefill = bool(row.known.any()) or model.sentinels > 1
      prefill = prefill and not model.kind.masked
      by_shape.setdefault((T, prefill), []).append(number)
    return by_shape

  def _batch_size(self, config, count):
    """Return the number of rows of a batch, for `count` texts."""
    # A step from the cache reads all weights, so that a few rows take hardly
    # longer than one row. A full pass of a masked mechanism does.
    least = 1 if self._config.model.kind.masked else _LEAST_ROWS
    return sharding.batch_size(
      self._mesh, config.sample.batch_size, count, least
    )

  def _batch(self, params, rows, config, T, prefill, B, purpose):
    """Return the results of rows, drawn in one batch of B."""
    sample, known = config.sample, any(row.known.any() for row in rows.values())
    key, law, most_blanks, by_row, order, plan = self._inputs(
      rows, config, T, B, purpose
    )
    most_known = T if prefill and known else 0
    program = B, T, plan, prefill, most_known, law.top_k is None
    texts_here = shapes.describe(len(rows), T)
    what = f"generating {texts_here}"
    if program not in self._compiled:
      what = f"compiling the generation of {texts_here}"
    with patience.waiting(what):
      if sample.order != "given":
        order = self._draw_orders(key, order, by_row[-1], family=sample.order)
      drawn = self._jitted(
        params,
        key,
        law,
        most_blanks,
        *by_row,
        order,
        plan=plan,
        prefill=prefill,
        most_known=most_known,
      )
    self._compiled.add(program)
    with patience.waiting(f"generating {texts_here}"):
      drawn = jax.device_get(drawn)
    by_row = zip(*drawn)  # The batch may have more rows than these.
    return [sampling.Generation(*result) for _, result in zip(rows, by_row)]

  def _inputs(self, rows, config, T, B, purpose):
    """Return (key, law, most_blanks, arrays by row, orders, plan) of a batch.

    The arrays are tokens, known, length and index. The orders are those that
    are given; `_draw_orders` makes the others.
    """
    sample = config.sample
    tokens, known = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    length, index = np.ones(B, np.int32), np.zeros(B, np.int32)
    order = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    for b, row in enumerate(rows.values()):
      n = len(row.tokens)
      tokens[b, :n], known[b, :n] = row.tokens, row.known
      length[b], index[b] = n, row.number
      if sample.order == "given":
        order[b] = prompts.within(row.order, T)
    key = jax.random.fold_in(jax.random.key(sample.seed), purpose)
    law = sampling.make_law(sample.temperature, sample.top_k, sample.top_p)
    most_blanks = np.int32((length - known.sum(axis=1)).max())
    everywhere = sharding.put(self._mesh, (key, law, most_blanks))
    by_row = tokens, known, length, index, order
    *by_row, order = sharding.put_rows(self._mesh, by_row)
    is_open = next(iter(rows.values())).is_open
    plan = plan_lib.Plan.of(sample, self._config.orders)
    return *everywhere, by_row, order, plan._replace(is_open=is_open)

  def _draw(
    self,
    params,
    key,
    law,
    most_blanks,
    tokens,
    known,
    length,
    index,
    order,
    *,
    plan,
    prefill,
    most_known,
  ):
    """Generate a batch.

    Arguments after the star are static. See decode.generate for the others.
    """
    _, draw_key = jax.random.split(key)
    if self._network.layout.masked:
      return diffusion.generate(
        self._network,
        params,
        draw_key,
        tokens,
        known,
        order,
        law,
        plan=plan,
        rows=index,
        length=length,
      )
    return decode.generate(
      self._network,
      params,
      draw_key,
      tokens,
      known,
      order,
      law,
      plan=plan,
      prefill=prefill,
      most_known=most_known,
      most_blanks=most_blanks,
      rows=index,
      length=length,
    )

  def _orders_of(self, key, order, index, *, family):
    """Return orders of a family, with the shape of `order`, int32 [B, T]."""
    order_key, _ = jax.random.split(key)
    options = self._config.replace("orders.family", family).orders
    B, T = order.shape
    return orders.draw(order_key, B, T, options, rows=index)
