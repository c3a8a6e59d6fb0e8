"""Times generation: one cell of the table of generation_speed at a time."""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import hlo
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import opening, telemetry
from aoarm_jax.tools import decode_cells, decode_programs, table

_BEST = (256, 1024, 4096)  # Batches tried for the best one, which is named 0.


class _Timing(NamedTuple):
  """The timing of one program.

  Attributes:
    seconds: median of its calls.
    out: what a call returned.
    launches: kernels per step, see hlo.launches.
  """

  seconds: float
  out: Any
  launches: int


class _Job(NamedTuple):
  """What a cell needs.

  Attributes:
    params: () -> the parameters that the programs take.
    programs: functions () -> a compiled program (params, key) -> any result.
    results: list of _Timing, one per program -> list of decode_cells.Result.
  """

  params: Callable
  programs: Sequence[Callable]
  results: Callable


class Benchmark:
  """Times cells of one mechanism, or of one run."""

  def __init__(self, options: decode_programs.Options, run: opening.Run | None):
    self._options, self._run = options, run
    self._jobs: dict[decode_cells.Cell, _Job] = {}
    self._programs: dict[
      tuple[decode_cells.Cell, int], concurrent.futures.Future
    ] = {}

  def compile(self, cells: Iterable[decode_cells.Cell]) -> None:
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

  def measure(self, cell: decode_cells.Cell) -> list[decode_cells.Result]:
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
    """Returns the _Job of a cell; computes shapes only."""
    mechanism = cell.model.mechanism
    if cell.method == decode_cells.MASKED and not cell.model.kind.masked:
      mechanism = decode_cells.MASKED
    model = dataclasses.replace(cell.model, mechanism=mechanism)
    if self._run is not None and model == cell.model:
      network, abstract = self._run.network, self._run.params
      params = lambda: self._run.params  # noqa: E731
    else:
      # A run's alphabet and dtype hold for the model beside the run, too.
      config = self._run.config if self._run else config_lib.Config()
      config = config.replace("compute.attention", self._options.attention)
      network = _network(config.replace("model", model))
      abstract = network.abstract_params
      params = functools.partial(_fresh, network)
    make = {
      "uncached": decode_programs.uncached,
      decode_cells.MASKED: decode_programs.masked,
    }
    programs, results = make.get(cell.method, decode_programs.cached)(
      cell, network, abstract, self._options
    )
    compiled = [
      functools.partial(_compile, program, abstract) for program in programs
    ]
    return _Job(params, compiled, results)

  def _best(self, cell):
    """Grows the batch until memory runs out or speed stops improving."""
    best: list[decode_cells.Result] = []
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


def _key():
  return jax.random.key(0)


@functools.cache
def _network(config):
  return network_lib.Network(config)


@functools.lru_cache(maxsize=1)
def _fresh(network):
  """Returns new parameters, or the last ones where the network is the same."""
  return jax.jit(network.init)(_key())


def _compile(program, params):
  return jax.jit(program).lower(params, _key()).compile()


def _time(compiled: jax.stages.Compiled, *arguments: Any) -> _Timing:
  out = jax.block_until_ready(compiled(*arguments))
  times: list[float] = []
  while len(times) < 3 or (sum(times) < 0.3 and len(times) < 20):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    times.append(time.perf_counter() - start)
    if times[0] > 5:
      break
  text = compiled.as_text()
  assert text is not None
  return _Timing(statistics.median(times), out, hlo.launches(text))
