"""What tools/generation_speed.py measures: one cell of its table at a time."""

import concurrent.futures
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import hlo
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import steps as decode_steps
from aoarm_jax.model import cost
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import opening, telemetry, text
from aoarm_jax.tools import table

# The masked diffusion model that the others are compared with. The method of
# generation that is timed with this model has the same name.
MASKED = next(
  name for name, kind in mechanisms.MECHANISMS.items() if kind.masked
)
_BEST = (256, 1024, 4096)  # Batches tried for the best one, which is named 0.


@dataclasses.dataclass(frozen=True)
class Cell:
  """One line of the table; B is 0 for the best batch."""

  size: str
  model: config_lib.Model
  B: int
  method: str

  def __str__(self):
    B = self.B or "best"
    return f"{self.size} T{self.model.T} B{B} {self.method}"

  @property
  def width(self) -> int:
    """Tokens a step, or drafts a round."""
    number = self.method.rpartition("-")[2]
    return int(number) if number.isdigit() else 1


@dataclasses.dataclass(frozen=True)
class Result:
  """What was measured of a cell.

  Attributes:
    size, T, B, method: the cell.
    tokens_per_second: of all sequences together.
    step_ms: of one step; of speculative, a round.
    floor_ms: of the same: the bytes or FLOPs that it cannot do without; None
      where the bandwidth is not known.
    launches: kernels a step; 0 where the program does not tell.
    tokens_per_step: of one sequence.
    timed: which part of the texts.
    best: whether B is the best batch that was tried.
  """

  size: str
  T: int
  B: int
  method: str
  tokens_per_second: float
  step_ms: float
  floor_ms: float | None
  launches: int
  tokens_per_step: float
  timed: str
  best: bool = False

  def __str__(self):
    floor, floors = "-", "-"
    if self.floor_ms is not None:
      floor = f"{self.floor_ms:.4f}"
      floors = f"{self.step_ms / self.floor_ms:.1f}"
    return _line(
      self.size,
      f"{self.T}",
      f"{self.B}",
      self.method,
      f"{self.tokens_per_second:,.0f}",
      f"{self.step_ms:.3f}",
      floor,
      floors,
      f"{self.launches or '-'}",
      f"{self.tokens_per_step:.2f}",
      self.timed,
    )


# Title of each column of the table -> side on which its cells stand, and width.
_COLUMNS = {
  "size": ("<", 10),
  "T": (">", 5),
  "B": (">", 5),
  "method": ("<", 14),
  "tokens/s": (">", 11),
  "step ms": (">", 9),
  "floor ms": (">", 8),
  "floors": (">", 6),
  "launches": (">", 8),
  "tok/step": (">", 8),
  "timed": ("<", 0),
}


def _line(*cells: str) -> str:
  sides, widths = zip(*_COLUMNS.values())
  return text.padded(cells, widths, sides)


def header() -> str:
  """Returns the titles of the lines that results are printed as."""
  return _line(*_COLUMNS)


class Options(NamedTuple):
  """How to measure.

  Attributes:
    steps: timed of a cell.
    whole: whether to time whole texts instead.
    bandwidth: bytes/s, for the floor; None for no floor.
    flops: FLOP/s, for the floor; None leaves FLOPs out of the floor.
    attention: of uncached and mdlm passes.
  """

  steps: int = 128
  whole: bool = False
  bandwidth: float | None = None
  flops: float | None = None
  attention: str = "auto"


class _Timing(NamedTuple):
  """Of one program: median seconds, what it returned, kernels a step."""

  seconds: float
  out: Any
  launches: int


class _Job(NamedTuple):
  """What a cell needs.

  Attributes:
    params: () -> the parameters that the programs take.
    programs: functions () -> a compiled program (params, key) -> any result.
    results: list of _Timing, one per program -> list of Result.
  """

  params: Callable
  programs: list[Callable]
  results: Callable


class Benchmark:
  """Times cells of one mechanism, or of one run."""

  def __init__(self, options: Options, run: opening.Run | None):
    self._options, self._run = options, run
    self._law = sampling.make_law()
    self._jobs: dict[Cell, _Job] = {}
    self._programs: dict[tuple[Cell, int], concurrent.futures.Future] = {}

  def compile(self, cells: Iterable[Cell]) -> None:
    """Compiles side by side all that these cells need, before any is timed.

    Args:
      cells: the cells that `measure` will be asked for.
    """
    jobs = {}
    for cell in cells:
      for B in (cell.B,) if cell.B else _BEST:
        sized = dataclasses.replace(cell, B=B)
        jobs[sized] = self._start(sized)
    self._jobs |= jobs
    self._programs |= table.compile_all(
      {
        (cell, i): program
        for cell, job in jobs.items()
        for i, program in enumerate(job.programs)
      }
    )

  def measure(self, cell: Cell) -> list[Result]:
    """Returns the results of a cell, or of the best batch where its B is 0.

    There is one result; masked diffusion has two, for two numbers of steps.
    """
    return self._of_batch(cell) if cell.B else self._best(cell)

  def _of_batch(self, cell):
    if cell not in self._jobs:  # The best batch, which was measured before.
      self.compile([cell])
    # Nothing holds a program longer than it is needed.
    job = self._jobs.pop(cell)
    futures = [self._programs.pop((cell, i)) for i in range(len(job.programs))]
    programs = [future.result() for future in futures]
    params = job.params()
    return job.results([_time(p, params, _key()) for p in programs])

  def _start(self, cell):
    """Begins to compile; only shapes are needed for that."""
    mechanism = cell.model.mechanism
    if cell.method == MASKED and not cell.model.kind.masked:
      mechanism = MASKED
    model = dataclasses.replace(cell.model, mechanism=mechanism)
    if self._run is not None and model == cell.model:
      network, abstract = self._run.network, self._run.params
      params = lambda: self._run.params  # noqa: E731
    else:
      compute = config_lib.Compute(attention=self._options.attention)
      network = _network(config_lib.Config(model=model, compute=compute))
      abstract = network.abstract_params
      params = functools.partial(_fresh, network)
    make = {"uncached": self._uncached, MASKED: self._masked}
    programs, results = make.get(cell.method, self._cached)(
      cell, network, abstract
    )
    compiled = [
      functools.partial(_compile, program, abstract) for program in programs
    ]
    return _Job(params, compiled, results)

  def _result(
    self, cell, method, seconds, steps, passes, moved, flops=0.0, **more
  ):
    """Of a whole text that takes `seconds` in so many steps.

    Args:
      moved, flops: bytes and FLOPs that a pass cannot do without.
    """
    bandwidth, floor_ms = self._options.bandwidth, None
    if bandwidth:
      floor = max(moved / bandwidth, flops / (self._options.flops or math.inf))
      floor_ms = 1e3 * passes * floor
    return Result(
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

  # Each returns its programs, and results() of their times.

  def _cached(self, cell, network, params):
    """By decode.generate."""
    model, B, T = cell.model, cell.B, cell.model.T
    method = cell.method.partition("-")[0]
    most = {"adaptive": 8}.get(method, self._options.steps)
    blanks = T if self._options.whole else min(T, most * cell.width)
    in_rounds = method == "speculative"
    # Where the cache is as long as on average; but rounds go on to the end.
    first = T - blanks
    if not in_rounds:
      first = min(first, max(0, T * 5 // 8 - blanks))
    plan = plan_lib.Plan(method, cell.width)

    def generate(params, key):
      order = orders.draw(key, B, T, config_lib.Orders())
      # The cache of what counts as known is empty, which takes as long.
      known = jnp.argsort(order, axis=1) < first
      return decode.generate(
        network, params, key, jnp.zeros((B, T), jnp.int32), known, order,
        self._law, plan=plan, prefill=False, most_known=first,
        most_blanks=blanks,
      )  # fmt: skip

    dtype = network.config.compute.dtype
    slots = B * model.S / 2
    moved = slots * cost.cache_bytes_per_token(model, dtype)
    moved += _weight_bytes(params, dtype)

    def results(timings):
      (timing,) = timings
      steps, passes, scale = -(-blanks // cell.width), 1.0, T / blanks
      if in_rounds:
        steps, passes = max(1, int(timing.out.calls.max()) // 2), 2.0
      if method == "adaptive":  # Fewer passes are timed than there are early.
        passes = _adaptive_passes(T, 0, T)
        scale *= passes / _adaptive_passes(T, first, blanks)
      return [self._result(
        cell, cell.method, timing.seconds * scale, steps * T / blanks,
        passes, moved, launches=timing.launches,
        timed="whole" if blanks == T else f"{blanks} tokens",
      )]  # fmt: skip

    return [generate], results

  def _uncached(self, cell, network, params):
    """At two lengths, Gauss's, which give the mean of a cubic exactly.

    Two streams: one query row behind the content rows, or a query row for
    every slot, which is more work and a mask that faster attention knows.
    """
    B, T, steps = cell.B, cell.model.T, 4
    two = cell.model.kind.streams == 2

    def program(n, one_query):
      def generate(params, key):
        order = orders.draw(key, B, T + 1, config_lib.Orders()) - 1
        target = order[:, 1 : n + 1]
        queries = orders.Queries(target[:, -1:], jnp.full((B, 1), n, jnp.int32))
        slots = orders.Slots(
          jnp.zeros((B, n), jnp.int32), order[:, :n], target,
          queries=queries if one_query else None,
        )  # fmt: skip

        def step(i, tokens):
          logits = network.apply(params, slots._replace(tokens=tokens))[:, -1]
          log_p = sampling.log_law(logits, self._law)
          drawn = jax.random.categorical(jax.random.fold_in(key, i), log_p)
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
      best = [min(x.seconds for x in of_length) for of_length in lengths]
      return [self._result(
        cell, cell.method, statistics.mean(best) / steps * T, T, 1, moved,
        flops, launches=timings[half].launches, timed="at 2 lengths",
      )]  # fmt: skip

    return programs, results

  def _masked(self, cell, network, params):
    """By diffusion.generate, whose steps all cost the same."""
    B, T = cell.B, cell.model.T
    steps = min(T, 4)

    def generate(params, key):
      order = orders.draw(key, B, T, config_lib.Orders())
      return diffusion.generate(
        network, params, key, jnp.zeros((B, T), jnp.int32),
        jnp.zeros((B, T), bool), order, self._law,
        plan=plan_lib.Plan("ancestral", steps=steps),
      ).tokens  # fmt: skip

    config = network.config.replace("train", config_lib.Train(batch_size=B))
    flops = cost.forward_flops(config)
    moved = _weight_bytes(params, config.compute.dtype)

    def results(timings):
      (timing,) = timings
      return [
        self._result(
          cell, name, timing.seconds / steps * count, count, 1, moved, flops,
          launches=timing.launches, timed=f"{steps} steps",
        )
        for name, count in (
          (f"{MASKED} T", T),
          (f"{MASKED} T/4", max(1, T // 4)),
        )
      ]  # fmt: skip

    return [generate], results

  def _best(self, cell):
    """Grows the batch until memory runs out or speed stops improving."""
    best = []
    for B in _BEST:
      try:
        results = self._of_batch(dataclasses.replace(cell, B=B))
      except jax.errors.JaxRuntimeError as error:
        if not (best and telemetry.is_out_of_memory(error)):
          raise
        break
      speed = results[0].tokens_per_second
      if best and speed < 1.05 * best[0].tokens_per_second:
        break
      best = results
    return [dataclasses.replace(result, best=True) for result in best]


def _adaptive_passes(T: int, first: int, blanks: int) -> float:
  """Passes a step, on average from `first`: the draw, and all that is left."""
  chunk = min(decode_steps.CHUNK, T)
  left = [-(-T // chunk) - i // chunk for i in range(first, first + blanks)]
  return 1 + sum(left) / blanks


def _weight_bytes(params, dtype):
  return jnp.dtype(dtype).itemsize * sum(
    x.size for x in jax.tree.leaves(params)
  )


def _key():
  return jax.random.key(0)


@functools.cache
def _network(config):
  return network_lib.Network(config)


@functools.lru_cache(maxsize=1)
def _fresh(network):
  """Parameters; those of the last cell, where the model is the same."""
  return jax.jit(network.init)(_key())


def _compile(program, params):
  return jax.jit(program).lower(params, _key()).compile()


def _time(compiled, *arguments) -> _Timing:
  out = jax.block_until_ready(compiled(*arguments))
  times: list[float] = []
  while len(times) < 3 or (sum(times) < 0.3 and len(times) < 20):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    times.append(time.perf_counter() - start)
    if times[0] > 5:
      break
  return _Timing(
    statistics.median(times), out, hlo.launches(compiled.as_text())
  )
