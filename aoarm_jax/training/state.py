"""The training state: one pytree of arrays, abstract and real."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.training import optimizer


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state", "ema", "key"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that the next step depends on, but the batch.

  Attributes:
    step: int32 [], optimizer steps taken.
    params: nested dict of float32 arrays.
    opt_state: optax state.
    ema: like params, or {} without an EMA.
    key: typed PRNG key; step n's orders come from fold_in(key, n).
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  key: jax.Array

  @property
  def read_out_params(self):
    """What is evaluated and sampled: the EMA where there is one."""
    return self.ema or self.params


def init(
  bind: network_lib.Bind,
  chain: optax.GradientTransformation,
  seed: int,
  ema: bool,
) -> TrainState:
  """A fresh state. Call it under jit with out_shardings."""
  init_key, step_key = jax.random.split(jax.random.key(seed))
  params = bind.init(init_key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=chain.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema else {},
    key=step_key,
  )


def create(config: config_lib.Config, vocabulary: int, mesh: jax.sharding.Mesh):
  """The pieces of a run.

  Returns:
    (bind, abstract state with shardings, jitted () -> TrainState).
  """
  bind = network_lib.Bind(
    config.model, config.compute, vocabulary, mesh, config.mesh.smallest_shard
  )
  schedule = optimizer.schedule(config.optimizer, config.train.steps)
  chain = optimizer.make(config.optimizer, schedule, bind.axes)
  make = functools.partial(
    init, bind, chain, config.seed, config.optimizer.ema_decay > 0
  )
  abstract = network_lib.abstract_on(bind, jax.eval_shape(make))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return bind, abstract, jax.jit(make, out_shardings=shardings)
