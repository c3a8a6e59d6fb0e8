"""The compiled programs of a cell: init, train, evaluate, sample, profile."""

import concurrent.futures
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding, stopping
from aoarm_jax.evaluation import estimators
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.study import profiles
from aoarm_jax.training import program as program_lib
from aoarm_jax.training import state as train_state

# Full passes keep no cache but all scores: fewer rows at once.
_MASKED_TOKENS = 1 << 17
_LEAST_TEXTS = 8  # At each temperature, however long.


class Programs:
  """Compiled programs, each made once, in the background.

  While one cell trains, those of the next are compiled. Cells that differ by
  their seeds or learning rates alone share them.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh = mesh
    self._pool = concurrent.futures.ThreadPoolExecutor(
      4, thread_name_prefix=stopping.COMPILES
    )
    self._made: dict[
      tuple[str, config_lib.Config], concurrent.futures.Future
    ] = {}

  def __enter__(self) -> "Programs":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    """Drop the compilations that have not started, and wait for the others.

    After an error nobody waits. A compilation takes minutes and cannot be
    interrupted; see stopping.leave_compilations.
    """
    self._pool.shutdown(wait=kind is None, cancel_futures=True)

  def of(self, config: config_lib.Config) -> dict:
    """Starts to compile what a cell needs: name -> future."""
    names = ["init", "train", *map(evaluate_name, config.eval.estimators)]
    if config.study.characters:
      names.append("sample")
    if config.study.profile_sequences and profiles.supports(config.model):
      names.append("profile")
    return {name: self._future(name, config) for name in names}

  def network(self, config: config_lib.Config) -> network_lib.Network:
    """The network of a cell."""
    return network_lib.Network(config, self._mesh)

  def abstract_state(self, config: config_lib.Config) -> train_state.TrainState:
    """Return the shapes of a cell's training state, with shardings."""
    return program_lib.make(config, mesh=self._mesh).abstract

  def _future(self, name, config):
    # Every step is told its learning rate, so the schedule is left out. The
    # other programs do not depend on how the parameters were trained.
    default = config_lib.Optimizer()
    told = ("peak_learning_rate", "schedule", "warmup_steps", "final_share")
    for field in (*told, "decay_steps"):
      value = getattr(default, field)
      config = config.replace(f"optimizer.{field}", value)
    if name not in ("init", "train"):
      decay = config.optimizer.ema_decay
      config = config.replace("optimizer", default)
      config = config.replace("optimizer.ema_decay", decay)
    config = config.replace("train.steps", 1).replace("seed", 0)
    key = name, config
    if key not in self._made:
      self._made[key] = self._pool.submit(compiled, name, config, self._mesh)
    return self._made[key]


def compiled(
  name: str, config: config_lib.Config, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
  """Compile one program of a cell.

  Args:
    name: "init", "train", "sample", "profile" or an `evaluate_name`.
    config: the cell's config. Its schedule of learning rates is not used.
    mesh: the mesh of the cell.
  """
  kind, _, estimator = name.partition(":")
  own = (estimator,) if estimator else ()
  with jax.set_mesh(mesh):  # That of a thread is its own.
    function, arguments = _PROGRAMS[kind](
      program_lib.make(config, mesh=mesh, told_rate=True), *own
    )
    return function.lower(*arguments).compile()


def evaluate_name(estimator: str) -> str:
  """The name of the program that evaluates by an estimator."""
  return f"evaluate:{estimator}"


def _abstract(mesh, *shape, dtype=jnp.int32, batch=False):
  axes = ("batch",) if batch else ()
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.named(mesh, *axes)
  )


def _init_program(program):
  return program.init, (_abstract(program.network.mesh),)


def _train_program(program):
  rate = _abstract(program.network.mesh, dtype=jnp.float32)
  return program.step, (program.abstract, program.tokens, rate)


def _jitted(network, function):
  return jax.jit(function, out_shardings=sharding.replicated(network.mesh))


def _evaluate_program(program, estimator):
  network, mesh = program.network, program.network.mesh
  config = network.config
  estimate = functools.partial(estimators.estimate, estimator, config, network)

  def evaluate(params, seed, first_row, tokens, real):
    # The step matters to the law of a curriculum alone, which none asks for.
    step, key = jnp.int32(0), jax.random.key(seed)
    return estimate(params, key, step, first_row, tokens, real)

  B, T = config.eval_batch_size, config.model.T
  return _jitted(network, evaluate), (
    network.abstract_params,
    _abstract(mesh),
    _abstract(mesh),
    _abstract(mesh, B, T, dtype=jnp.uint8, batch=True),
    _abstract(mesh, B, dtype=jnp.bool_, batch=True),
  )


def _sample_program(program):
  network, mesh = program.network, program.network.mesh
  config = network.config
  model, rows = config.model, rows_at_once(config)
  options = config.replace("orders.family", config.sample.order).orders

  def sample(params, seed, first_row, temperature):
    """Texts of rows first_row.. of all rows: int32 [rows, T]."""
    key = jax.random.fold_in(jax.random.key(seed), purposes.STUDY_TEXTS)
    order_key, key = jax.random.split(key)
    blank = jnp.zeros((rows, model.T), jnp.int32)
    # One law a row, so that all temperatures are one batch.
    law = sampling.Sampling(temperature[:, None, None])
    order = orders.draw(order_key, rows, model.T, options, first_row=first_row)
    arguments = network, params, key, blank, blank > 0, order, law
    index = first_row + jnp.arange(rows)
    if model.kind.masked:
      return diffusion.generate(
        *arguments, plan=plan_lib.Plan(), rows=index
      ).tokens
    return decode.generate(
      *arguments, prefill=model.sentinels > 1, most_known=0, rows=index
    ).tokens

  return _jitted(network, sample), (
    network.abstract_params,
    _abstract(mesh),
    _abstract(mesh),
    _abstract(mesh, rows, dtype=jnp.float32),
  )


def _profile_program(program):
  network, mesh = program.network, program.network.mesh
  config = network.config

  def profile(params, tokens, real):
    order = profiles.orders_of(config, config.study.profile_sequences)
    return profiles.profile(
      network.bind(params), tokens.astype(jnp.int32), order, real
    )

  B, T = config.study.profile_sequences, config.model.T
  return _jitted(network, profile), (
    network.abstract_params,
    _abstract(mesh, B, T, dtype=jnp.uint8),
    _abstract(mesh, B, dtype=jnp.bool_),
  )


_PROGRAMS: dict[str, Callable[..., tuple[jax.stages.Wrapped, tuple]]] = {
  "init": _init_program,
  "train": _train_program,
  "evaluate": _evaluate_program,
  "sample": _sample_program,
  "profile": _profile_program,
}


def samples_per_temperature(config: config_lib.Config) -> int:
  """Return how many texts are generated at each temperature."""
  return max(_LEAST_TEXTS, config.study.characters // config.model.T)


def temperatures(study: config_lib.Study) -> np.ndarray:
  """Return the temperatures of generation, float32 [temperatures]."""
  return np.linspace(
    study.temperature_low,
    study.temperature_high,
    study.temperatures,
    dtype=np.float32,
  )


def rows_at_once(config: config_lib.Config) -> int:
  """Return how many texts one call of the sampling program generates."""
  rows = config.study.temperatures * samples_per_temperature(config)
  if config.model.kind.masked:
    rows = min(rows, max(1, _MASKED_TOKENS // config.model.T))
  return rows
