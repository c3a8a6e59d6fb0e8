"""The compiled programs of a cell: init, train, evaluate, sample, profile."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.evaluation import estimators
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.study import profiles
from aoarm_jax.training import loop as train
from aoarm_jax.training import optimizer
from aoarm_jax.training import state as train_state

_ORDERS = 103  # Sets these keys apart from training's.
# Full passes keep no cache but all scores: fewer rows at once.
_MASKED_TOKENS = 1 << 17
_LEAST_TEXTS = 8  # At each temperature, however long.


class Programs:
  """Compiled programs, each made once, in the background.

  While one cell trains, those of the next are compiled. Cells that differ by
  their seeds or learning rates alone share them.
  """

  def __init__(self, mesh: jax.sharding.Mesh, vocabulary: int):
    self._mesh, self._vocabulary = mesh, vocabulary
    self._pool = concurrent.futures.ThreadPoolExecutor(4)
    self._made = {}

  def close(self):
    self._pool.shutdown(cancel_futures=True)

  def of(self, config: config_lib.Config) -> dict:
    """Starts to compile what a cell needs: name -> future."""
    names = ["init", "train", *map(evaluate_name, config.eval.estimators)]
    if config.study.characters:
      names.append("sample")
    if config.study.profile_sequences and not config.model.kind.masked:
      names.append("profile")
    return {name: self._future(name, config) for name in names}

  def _future(self, name, config):
    # Every step is told its learning rate, so the schedule is left out.
    plain, own = config_lib.Optimizer(), config.optimizer
    schedule = dataclasses.replace(
      own,
      peak_learning_rate=plain.peak_learning_rate,
      schedule=plain.schedule,
      warmup_steps=plain.warmup_steps,
      final_share=plain.final_share,
      decay_steps=plain.decay_steps,
    )
    if name not in ("init", "train"):  # Does not depend on how it was trained.
      schedule = dataclasses.replace(plain, ema_decay=own.ema_decay)
    train = dataclasses.replace(config.train, steps=1)
    config = dataclasses.replace(
      config, seed=0, optimizer=schedule, train=train
    )
    key = name, config
    if key not in self._made:
      self._made[key] = self._pool.submit(self._compile, name, config)
    return self._made[key]

  def _compile(self, name, config):
    kind, _, estimator = name.partition(":")
    own = (estimator,) if estimator else ()
    with jax.set_mesh(self._mesh):  # That of a thread is its own.
      function, arguments, options = _PROGRAMS[kind](
        config, self._vocabulary, self._mesh, *own
      )
      return jax.jit(function, **options).lower(*arguments).compile()


def evaluate_name(estimator: str) -> str:
  """The name of the program that evaluates by an estimator."""
  return f"evaluate:{estimator}"


def _abstract(mesh, *shape, dtype=jnp.int32, batch=False):
  axes = ("batch",) if batch else ()
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.named(mesh, *axes)
  )


def _init_program(config, vocabulary, mesh):
  bind, abstract, _ = train_state.create(config, vocabulary, mesh)
  # The rate leaves no trace in a fresh state.
  chain = optimizer.make(
    config.optimizer, optax.constant_schedule(0.0), bind.axes
  )

  def init(seed):
    return train_state.init(bind, chain, seed, config.optimizer.ema_decay > 0)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return init, (_abstract(mesh),), dict(out_shardings=shardings)


def _train_program(config, vocabulary, mesh):
  bind, abstract, _ = train_state.create(config, vocabulary, mesh)
  shape = config.train.batch_size, config.model.T
  tokens = _abstract(mesh, *shape, dtype=jnp.uint8, batch=True)
  shardings = (
    jax.tree.map(lambda leaf: leaf.sharding, abstract),
    sharding.replicated(mesh),
  )
  options = dict(donate_argnums=0, out_shardings=shardings)

  def program(state, tokens, rate):
    """`train.make_step`; the call gives the learning rate of its step."""
    step = train.make_step(config, bind, vocabulary, lambda _: rate)
    return step(state, tokens)

  rate = _abstract(mesh, dtype=jnp.float32)
  return program, (abstract, tokens, rate), options


def _params(config, vocabulary, mesh):
  bind, abstract, _ = train_state.create(config, vocabulary, mesh)
  return bind, abstract.read_out_params


def _evaluate_program(config, vocabulary, mesh, estimator):
  bind, params = _params(config, vocabulary, mesh)
  estimate = functools.partial(
    estimators.estimate, estimator, bind, config, vocabulary
  )

  def program(params, seed, first_row, tokens, real):
    # The step matters to the law of a curriculum alone, which none asks for.
    step, key = jnp.int32(0), jax.random.key(seed)
    return estimate(params, key, step, first_row, tokens, real)

  B, T = config.eval_batch_size, config.model.T
  arguments = (
    params, _abstract(mesh), _abstract(mesh),
    _abstract(mesh, B, T, dtype=jnp.uint8, batch=True),
    _abstract(mesh, B, dtype=jnp.bool_, batch=True),
  )  # fmt: skip
  return program, arguments, dict(out_shardings=sharding.replicated(mesh))


def _sample_program(config, vocabulary, mesh):
  bind, params = _params(config, vocabulary, mesh)
  model, rows = config.model, rows_at_once(config)
  options = dataclasses.replace(config.orders, family=config.sample.order)

  def program(params, seed, first_row, temperature):
    """Texts of rows first_row.. of all rows: int32 [rows, T]."""
    order_key, key = jax.random.split(jax.random.key(seed))
    network, blank = bind(params), jnp.zeros((rows, model.T), jnp.int32)
    # One law a row, so that all temperatures are one batch.
    law = sampling.Sampling(temperature[:, None, None])
    order = orders.draw(order_key, rows, model.T, options, first_row=first_row)
    arguments = network, key, blank, blank > 0, order, law
    index = first_row + jnp.arange(rows)
    if model.kind.masked:
      return diffusion.generate(
        *arguments, method="sequential", steps=0, rows=index
      ).tokens
    return decode.generate(
      *arguments, prefill=model.sentinels > 1, most_known=0, rows=index
    ).tokens

  arguments = (
    params, _abstract(mesh), _abstract(mesh),
    _abstract(mesh, rows, dtype=jnp.float32),
  )  # fmt: skip
  return program, arguments, dict(out_shardings=sharding.replicated(mesh))


def _profile_program(config, vocabulary, mesh):
  bind, params = _params(config, vocabulary, mesh)

  def program(params, tokens, real):
    order = profiles.orders_of(config, _ORDERS)
    return profiles.profile(bind(params), tokens.astype(jnp.int32), order, real)

  B, T = config.study.profile_sequences, config.model.T
  arguments = (
    params, _abstract(mesh, B, T, dtype=jnp.uint8),
    _abstract(mesh, B, dtype=jnp.bool_),
  )  # fmt: skip
  return program, arguments, dict(out_shardings=sharding.replicated(mesh))


_PROGRAMS = {
  "init": _init_program,
  "train": _train_program,
  "evaluate": _evaluate_program,
  "sample": _sample_program,
  "profile": _profile_program,
}


def samples_per_temperature(config: config_lib.Config) -> int:
  return max(_LEAST_TEXTS, config.study.characters // config.model.T)


def temperatures(study: config_lib.Study) -> np.ndarray:
  """float32 [temperatures]."""
  return np.linspace(
    study.temperature_low, study.temperature_high, study.temperatures,
    dtype=np.float32,
  )  # fmt: skip


def rows_at_once(config):
  rows = config.study.temperatures * samples_per_temperature(config)
  if config.model.kind.masked:
    rows = min(rows, max(1, _MASKED_TOKENS // config.model.T))
  return rows
