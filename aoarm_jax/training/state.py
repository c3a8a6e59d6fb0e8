"""The training state: one pytree of arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aoarm_jax.model import network as network_lib
from aoarm_jax.training import optimizer


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state", "ema", "key"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that the next step depends on, apart from the batch.

  Attributes:
    step: int32 [], optimizer steps taken.
    params: nested dict of float32 arrays.
    opt_state: the state of optax.
    ema: moving average of the parameters, a nested dict like `params`; {} if
      the run keeps no EMA.
    key: typed PRNG key []. The orders of step n are drawn from
      fold_in(key, n).
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  key: jax.Array

  @property
  def read_out_params(self) -> Any:
    """The parameters to evaluate and sample with: the EMA if there is one."""
    return self.ema or self.params


def init(network: network_lib.Network, seed: jax.Array | int) -> TrainState:
  """Draw a fresh state. Call it under jit with out_shardings.

  Args:
    network: the network, with the run's config.
    seed: int32 [], at least 0.
  """
  options = network.config.optimizer
  init_key, step_key = jax.random.split(jax.random.key(seed))
  params = network.init(init_key)
  # A fresh optimizer state is the same for every schedule, so a constant rate
  # serves here.
  chain = optimizer.make(options, optax.constant_schedule(0.0), network.axes)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=chain.init(params),
    ema=jax.tree.map(jnp.copy, params) if options.ema_decay > 0 else {},
    key=step_key,
  )
