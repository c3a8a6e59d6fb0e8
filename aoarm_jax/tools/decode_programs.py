"""The programs that generation_speed times, and what their times mean.

Each public function takes a cell, its network, its parameters (or their shapes)
and the options. It returns programs (params, key) -> any result, and a function
from their timings to a list of results.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import steps as decode_steps
from aoarm_jax.model import cost
from aoarm_jax.model import network as network_lib
from aoarm_jax.tools import decode_cells


class Options(NamedTuple):
  """How to measure.

  Attributes:
    steps: how many steps of a cell are timed.
    whole: whether whole texts are timed instead.
    bandwidth: bytes/s of the device's memory, for the floor. None: no floor.
    flops: FLOP/s of the device, for the floor. None: of bytes only.
    attention: config.compute.attention of passes without a cache.
  """

  steps: int = 128
  whole: bool = False
  bandwidth: float | None = None
  flops: float | None = None
  attention: str = "auto"


# Functions (params, key) -> any result, and a function from the timings of the
# compiled programs to a list of results.
_Programs = tuple[
  list[Callable[[Any, jax.Array], Any]],
  Callable[[Any], list[decode_cells.Result]],
]


def cached(
  cell: decode_cells.Cell,
  network: network_lib.Network,
  params: Any,
  options: Options,
) -> _Programs:
  """Generation from a cache, by decode.generate."""
  model, B, T = cell.model, cell.B, cell.model.T
  law = sampling.make_law()
  method = cell.method.partition("-")[0]
  most = {"adaptive": 8}.get(method, options.steps)
  blanks = T if options.whole else min(T, most * cell.width)
  in_rounds = method == "speculative"
  # The timed steps lie where the cache has its average length. Speculative
  # rounds always go on to the end of the text.
  first = T - blanks
  if not in_rounds:
    first = min(first, max(0, T * 5 // 8 - blanks))
  plan = plan_lib.Plan(method, cell.width)

  def generate(params, key):
    order = orders.draw(key, B, T, config_lib.Orders())
    # Nothing is prefilled: reading an empty cache takes as long.
    known = jnp.argsort(order, axis=1) < first
    return decode.generate(
      network,
      params,
      key,
      jnp.zeros((B, T), jnp.int32),
      known,
      order,
      law,
      plan=plan,
      prefill=False,
      most_known=first,
      most_blanks=blanks,
    )

  dtype = network.config.compute.dtype
  slots = B * model.S / 2
  moved = slots * cost.cache_bytes_per_token(model, dtype)
  moved += _weight_bytes(params, dtype)

  def results(timings):
    (timing,) = timings
    steps, passes, scale = -(-blanks // cell.width), 1.0, T / blanks
    if in_rounds:
      steps, passes = max(1, int(timing.out.calls.max()) // 2), 2.0
    if method == "adaptive":  # A step takes more passes early in the text.
      passes = _adaptive_passes(T, 0, T)
      scale *= passes / _adaptive_passes(T, first, blanks)
    return [
      _result(
        options,
        cell,
        cell.method,
        timing.seconds * scale,
        steps * T / blanks,
        passes,
        moved,
        launches=timing.launches,
        timed="whole" if blanks == T else f"{blanks} tokens",
      )
    ]

  return [generate], results


def uncached(
  cell: decode_cells.Cell,
  network: network_lib.Network,
  params: Any,
  options: Options,
) -> _Programs:
  """Generation without a cache: each step computes its visible rows again.

  Steps are timed at two lengths, the nodes of Gauss-Legendre quadrature. If
  the time is a cubic in the length, their mean is exactly the mean over all
  lengths. With two streams, two programs are timed and the faster counts: one
  query row behind the content rows, or a query row for every slot. The second
  is more work, but its mask is one that faster attention supports.
  """
  B, T, steps = cell.B, cell.model.T, 4
  law = sampling.make_law()
  two = cell.model.kind.streams == 2

  def program(n, one_query):
    def generate(params, key):
      order = orders.draw(key, B, T + 1, config_lib.Orders()) - 1
      target = order[:, 1 : n + 1]
      queries = orders.Queries(target[:, -1:], jnp.full((B, 1), n, jnp.int32))
      slots = orders.Slots(
        jnp.zeros((B, n), jnp.int32),
        order[:, :n],
        target,
        queries=queries if one_query else None,
      )

      def step(i, tokens):
        logits = network.apply(params, slots._replace(tokens=tokens))[:, -1]
        log_p = sampling.log_law(logits, law)
        drawn = sampling.draw(jax.random.fold_in(key, i), log_p)
        return tokens.at[:, 0].set(drawn)

      return jax.lax.fori_loop(0, steps, step, slots.tokens)

    return generate

  kinds = (True, False) if two else (False,)
  programs = [
    program(max(1, round(share * T)), one_query)
    for share in (0.5 - 0.75**0.5 / 3, 0.5 + 0.75**0.5 / 3)
    for one_query in kinds
  ]
  dtype = network.config.compute.dtype
  half = dataclasses.replace(cell.model, T=max(1, T // 2))
  train = config_lib.Train(batch_size=B, query_fraction=1e-9 if two else 1.0)
  flops = cost.forward_flops(
    dataclasses.replace(network.config, model=half, train=train)
  )
  moved = _weight_bytes(params, dtype)

  def results(timings):
    half = len(kinds)
    lengths = timings[:half], timings[half:]
    best = [min(t.seconds for t in of_length) for of_length in lengths]
    return [
      _result(
        options,
        cell,
        cell.method,
        statistics.mean(best) / steps * T,
        T,
        1,
        moved,
        flops,
        launches=timings[half].launches,
        timed="at 2 lengths",
      )
    ]

  return programs, results


def masked(
  cell: decode_cells.Cell,
  network: network_lib.Network,
  params: Any,
  options: Options,
) -> _Programs:
  """Masked diffusion, by diffusion.generate: all steps cost the same."""
  B, T = cell.B, cell.model.T
  law = sampling.make_law()
  steps = min(T, 4)

  def generate(params, key):
    order = orders.draw(key, B, T, config_lib.Orders())
    return diffusion.generate(
      network,
      params,
      key,
      jnp.zeros((B, T), jnp.int32),
      jnp.zeros((B, T), bool),
      order,
      law,
      plan=plan_lib.Plan("ancestral", steps=steps),
    ).tokens

  config = network.config.replace("train", config_lib.Train(batch_size=B))
  flops = cost.forward_flops(config)
  moved = _weight_bytes(params, config.compute.dtype)

  def results(timings):
    (timing,) = timings
    return [
      _result(
        options,
        cell,
        name,
        timing.seconds / steps * count,
        count,
        1,
        moved,
        flops,
        launches=timing.launches,
        timed=f"{steps} steps",
      )
      for name, count in (
        (f"{decode_cells.MASKED} T", T),
        (f"{decode_cells.MASKED} T/4", max(1, T // 4)),
      )
    ]

  return [generate], results


def _result(
  options, cell, method, seconds, steps, passes, moved, flops=0.0, **more
):
  """Returns the Result of a whole text.

  Args:
    options: how to measure.
    cell: that was timed.
    method: as the table shows it.
    seconds: that the whole text takes.
    steps: of the whole text.
    passes: through the network, per step.
    moved: bytes that a pass must read.
    flops: FLOPs that a pass must compute.
    **more: other fields of Result.
  """
  bandwidth, floor_ms = options.bandwidth, None
  if bandwidth:
    floor = max(moved / bandwidth, flops / (options.flops or math.inf))
    floor_ms = 1e3 * passes * floor
  return decode_cells.Result(
    size=cell.size,
    T=cell.model.T,
    B=cell.B,
    method=method,
    tokens_per_second=cell.B * cell.model.T / seconds,
    step_ms=1e3 * seconds / steps,
    floor_ms=floor_ms,
    tokens_per_step=cell.model.T / steps,
    **more,
  )


def _adaptive_passes(T: int, first: int, blanks: int) -> float:
  """Returns the mean number of passes per step of adaptive generation.

  A step has one pass for the draw, and one for each chunk of remaining targets.

  Args:
    T: length of a text.
    first: the step from which steps count.
    blanks: how many steps count.
  """
  chunk = min(decode_steps.CHUNK, T)
  left = [-(-T // chunk) - i // chunk for i in range(first, first + blanks)]
  return 1 + sum(left) / blanks


def _weight_bytes(params, dtype):
  return jnp.dtype(dtype).itemsize * sum(
    x.size for x in jax.tree.leaves(params)
  )
