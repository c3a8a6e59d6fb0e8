"""The training state: one pytree of arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import adapters
from aoarm_jax.model import network as network_lib
from aoarm_jax.training import optimizer


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "step",
    "params",
    "opt_state",
    "ema",
    "key",
    "frozen",
    "teacher",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that the next step depends on, apart from the batch.

  Attributes:
    step: int32 [], optimizer steps taken.
    params: nested dict of float32 arrays: those that are trained.
    opt_state: the state of optax.
    ema: moving average of the parameters, a nested dict like `params`; {} if
      the run keeps no EMA.
    key: typed PRNG key []. The orders of step n are drawn from
      fold_in(key, n).
    frozen: nested dict of float32 arrays: the parameters that are not trained;
      {} if all are. See model/adapters.py.
    teacher: the parameters of the teacher; {} if there is none.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  key: jax.Array
  frozen: Any = dataclasses.field(default_factory=dict)
  teacher: Any = dataclasses.field(default_factory=dict)

  @property
  def read_out_params(self) -> Any:
    """The trained arrays to evaluate with: the EMA if there is one."""
    return self.ema or self.params


def init(network: network_lib.Network, seed: jax.Array | int) -> TrainState:
  """Draw a fresh state. Call it under jit with out_shardings.

  Args:
    network: the network, with the run's config and its adapters.
    seed: int32 [], at least 0.
  """
  options, train = network.config.optimizer, network.config.train
  init_key, step_key = jax.random.split(jax.random.key(seed))
  params, frozen = adapters.split(network.init(init_key), train)
  # A fresh optimizer state is the same for every schedule, so a constant rate
  # serves here.
  axes, _ = adapters.split(network.axes, train)
  chain = optimizer.make(options, optax.constant_schedule(0.0), axes)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=chain.init(params),
    ema=jax.tree.map(jnp.copy, params) if options.ema_decay > 0 else {},
    key=step_key,
    frozen=frozen,
  )


def with_weights(
  state: TrainState, weights: Any, train: config_lib.Train
) -> TrainState:
  """Return a fresh state with the weights of another run, also as its EMA.

  Args:
    state: the state that `init` made. Its adapters stay.
    weights: nested dict of arrays, the parameters of a network without
      adapters.
    train: says which arrays are frozen.
  """
  whole = adapters.joined(state.params, state.frozen)
  params, frozen = adapters.split(adapters.joined(whole, weights), train)
  ema = jax.tree.map(jnp.copy, params) if state.ema else state.ema
  return dataclasses.replace(state, params=params, frozen=frozen, ema=ema)
