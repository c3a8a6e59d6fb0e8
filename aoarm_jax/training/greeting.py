"""The log says what a run is before its first step."""

import functools

import jax
from absl import logging

from aoarm_jax import orders
from aoarm_jax.devices import meshes
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.training import program as program_lib


def greet(program: program_lib.Program) -> None:
  """Log the size of the model, the devices, the orders, and what looks odd.

  Args:
    program: the program of the run, on its mesh.
  """
  _say_sizes(program.network)
  if program.abstract.frozen:
    _say_what_is_trained(program)
  _warn_of_length(program.network.config)
  _say_orders(program.network)


def _say_sizes(network):
  """Log the number of parameters, the devices, and how they share arrays."""
  c, mesh = network.config, network.mesh
  devices = mesh.devices.flatten()
  idle = jax.device_count() - len(devices)
  logging.info(
    "model: %s, %s parameters; %d x %s%s%s",
    c.model.mechanism,
    f"{run_dir.parameter_count(network.abstract_params):,}",
    len(devices),
    devices[0].device_kind,
    f" ({meshes.describe(mesh)})" * (len(devices) > 1),
    f", {idle} more are idle (config.mesh)" * (idle > 0),
  )
  if uncut := network.kept_whole:
    logging.info(
      "%d of %d arrays of parameters stay whole along fsdp: pieces would be "
      "shorter than config.mesh.smallest_shard=%d",
      uncut,
      len(jax.tree.leaves(network.abstract_params)),
      c.mesh.smallest_shard,
    )
  if devices[0].platform == "cpu" and c.variant != "tiny":
    logging.info(
      "no accelerator found: ':tiny' is the size for a CPU "
      "(--config=configs/%s.py:tiny); see the ETA below",
      c.name,
    )


def _say_what_is_trained(program):
  """Log which parameters are trained, where some are frozen."""
  trained = program.abstract.params
  logging.info(
    "trained: %s parameters (%d arrays); all others are frozen (config.train)",
    f"{run_dir.parameter_count(trained):,}",
    len(jax.tree.leaves(trained)),
  )
  if not program.network.config.train.start_from:
    logging.warning(
      "config.train.start_from='': frozen arrays keep the random numbers "
      "that they begin with; name the run whose weights they should have"
    )


def _warn_of_length(config):
  """Warn of a warmup or a curriculum that the run is too short for."""
  c = config
  if c.optimizer.warmup_steps >= c.train.steps:
    logging.warning(
      "config.optimizer.warmup_steps=%d: the run ends after %d steps, before "
      "the learning rate reaches its peak",
      c.optimizer.warmup_steps,
      c.train.steps,
    )
  if c.orders.curriculum_end > c.train.steps:
    logging.warning(
      "config.orders.curriculum_steps=%d: the run ends after %d steps, and "
      "the curriculum would end at step %d",
      c.orders.curriculum_steps,
      c.train.steps,
      c.orders.curriculum_end,
    )


def _say_orders(network):
  """Log the family of orders, and whether it trains lengths of texts."""
  c = network.config
  if network.layout.predicts_end and not c.orders.trains_left_to_right:
    logging.info(
      "lengths of texts are drawn from left to right, and config.orders."
      "family=%s hardly trains this order: texts will be too short; mixture "
      "trains both",
      c.orders.family,
    )
  logging.info(
    "orders: %s, alignment of structure with semantics %+.3f",
    c.orders.family,
    _mean_alignment(c),
  )


@functools.partial(jax.jit, static_argnums=0)
def _mean_alignment(config):
  """Return the mean alignment (float32 []) of 16 orders at the last step.

  The result is 0 if T < 3, where no alignment is defined.
  """
  draws = orders.draw(
    jax.random.key(0),
    16,
    config.model.T,
    config.orders,
    step=config.train.steps,
  )
  return orders.alignment(draws).mean() if config.model.T > 2 else 0.0
