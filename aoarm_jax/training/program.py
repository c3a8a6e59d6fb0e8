"""The training program of a run: its network, its state and its jitted step.

The program is put together here only. The loop, the study, the compiler for
TPU slices and the scaling tool all call `make`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aoarm_jax import lengths, objective
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes, sharding
from aoarm_jax.model import adapters, distilled
from aoarm_jax.model import network as network_lib
from aoarm_jax.training import optimizer
from aoarm_jax.training import state as train_state


class Program(NamedTuple):
  """Everything that training needs, for one config and one mesh.

  Attributes:
    network: the network of the run, on the run's mesh. It has no adapters.
    abstract: train_state.TrainState of jax.ShapeDtypeStruct, with shardings.
    tokens: jax.ShapeDtypeStruct of a global batch, [B, T] of the tokenizer's
      dtype: uint8, uint16 or uint32.
    init: jitted function (seed int32 []) -> TrainState.
    step: jitted function (state, tokens) -> (state, sums), see `make_step`. It
      donates the state. If the program was made with told_rate=True, `step`
      takes the learning rate (float32 []) as a third argument.
    teacher: the network of the teacher, or None.
    read: function (trained, frozen) -> the parameters of `network`, see
      adapters.reader.
  """

  network: network_lib.Network
  abstract: train_state.TrainState
  tokens: jax.ShapeDtypeStruct
  init: jax.stages.Wrapped
  step: jax.stages.Wrapped
  read: Callable[[Any, Any], Any]
  teacher: network_lib.Network | None = None

  def read_out(self, state: train_state.TrainState) -> Any:
    """Return the parameters of `network` to evaluate and sample with."""
    return self.read(state.read_out_params, state.frozen)


def make(
  config: config_lib.Config,
  *batches: str,
  mesh: jax.sharding.Mesh | None = None,
  devices: Sequence[jax.Device] | None = None,
  told_rate: bool = False,
  tokenizer: tokenizers.Tokenizer | None = None,
  open_teacher: Callable[[network_lib.Network], network_lib.Network]
  | None = None,
) -> Program:
  """Put the program of a run together; compile nothing.

  Args:
    config: the run's config.
    *batches: the batches that the mesh must divide: "train", "eval", see
      meshes.of_run.
    mesh: the mesh. None builds the config's mesh over `devices`.
    devices: the devices of that mesh. None takes all devices.
    told_rate: if True, every call of `step` gives the learning rate, and the
      config's schedule is not used. Then runs of all schedules share the
      program.
    tokenizer: the tokenizer of the run. None takes what the config names, see
      network.Network.
    open_teacher: returns the network of the teacher that config.train.distill
      names, given the network of the run.

  Raises:
    ConfigError: the mesh does not divide the model or the batch, or
      config.train.frozen does not fit the model, or there is no teacher.
  """
  mesh = meshes.of_run(config, *batches, mesh=mesh, devices=devices)
  network = network_lib.Network(config, mesh, tokenizer)
  trained = network
  if config.train.lora_rank:
    trained = network_lib.Network(config, mesh, tokenizer, config.train)
  adapters.check(trained.abstract_params, config.train)
  teacher = None
  if config.train.distill:
    if open_teacher is None:
      raise config_lib.ConfigError(
        f"config.train.distill={config.train.distill!r}: only --mode=train has "
        "a teacher; leave the field out"
      )
    teacher = open_teacher(network)
  init = functools.partial(train_state.init, trained)
  fresh = trained.placed(jax.eval_shape(init, 0))
  abstract = dataclasses.replace(
    fresh, teacher=teacher.abstract_params if teacher else {}
  )
  shardings = _shardings(abstract)
  shape = config.train.batch_size, config.model.T

  def at_rate(state, tokens, rate):
    rated = make_step(trained, lambda _: rate, teacher)
    return rated(state, tokens)

  return Program(
    network=network,
    abstract=abstract,
    tokens=jax.ShapeDtypeStruct(
      shape,
      network.tokenizer.dtype,
      sharding=sharding.named(mesh, "batch"),
    ),
    init=jax.jit(init, out_shardings=_shardings(fresh)),
    step=jax.jit(
      at_rate if told_rate else make_step(trained, None, teacher),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    ),
    read=adapters.reader(network.axes, config.train),
    teacher=teacher,
  )


def _shardings(abstract):
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def make_step(
  network: network_lib.Network,
  learning_rate: optax.Schedule | None = None,
  teacher: network_lib.Network | None = None,
) -> Callable[
  [train_state.TrainState, jax.Array],
  tuple[train_state.TrainState, dict[str, jax.Array]],
]:
  """Return the pure training step of a network.

  Args:
    network: the network, with the run's config and its adapters.
    learning_rate: function from the step to the rate. None takes the schedule
      of the config.
    teacher: the network of the teacher, whose parameters the state has.

  Returns:
    A function (state, tokens [B, T]) -> (state, sums). The sums are
    float32 scalars: nats (summed over the batch), tokens (the number of them
    that are not padding), gradient_norm, update_norm and learning_rate. With a
    teacher there are two more: divergence (nats, summed over the batch) and
    matched (the number of tokens that it is a sum of).
  """
  config = network.config
  schedule = learning_rate or optimizer.schedule(
    config.optimizer, config.train.steps
  )
  axes, _ = adapters.split(network.axes, config.train)
  chain = optimizer.make(config.optimizer, schedule, axes)
  accumulate = config.compute.accumulate
  # Gradients get the shardings of the parameters. Without this the compiler
  # would choose shardings of its own.
  pin = functools.partial(sharding.constrain_parameters, axes=axes)

  def loss(params, frozen, teacher_params, tokens, draws):
    """Return the loss of a batch, and the sums that it is made of."""
    apply = network.bind(adapters.joined(params, frozen))
    if teacher is None:
      nats = objective.training_nll(apply, network.layout, tokens, draws).sum()
      return nats, {"nats": nats}
    temperature = config.train.distill_temperature
    pair: Any = distilled.Distilled(
      apply, teacher.bind(teacher_params), tokens, temperature
    )
    terms: Any = objective.training_nll(pair, network.layout, tokens, draws)
    sums = {name: x.sum() for name, x in terms._asdict().items()}
    weight = config.train.distill_weight * temperature**2
    return sums["nats"] + weight * sums["divergence"], sums

  def gradient(params, fixed, *batch):
    """Return the sums and the gradient of the loss, over all micro-batches."""

    def of_micro_batch(*batch):
      grads, sums = jax.grad(loss, has_aux=True)(params, *fixed, *batch)
      return sums, pin(grads)

    if accumulate == 1:
      return of_micro_batch(*batch)

    # A micro-batch takes every `accumulate`-th row. So every device keeps its
    # own rows in every micro-batch.
    def split(x):
      return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total, micro_batch):
      return jax.tree.map(jnp.add, total, of_micro_batch(*micro_batch)), None

    batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batches)
    shapes, _ = jax.eval_shape(of_micro_batch, *first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zero = (zero, pin(jax.tree.map(jnp.zeros_like, params)))
    return jax.lax.scan(add, zero, batches)[0]

  def step(
    state: train_state.TrainState, tokens: jax.Array
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    B, T = tokens.shape
    tokens = tokens.astype(jnp.int32)
    length = lengths.real(tokens, network.layout)
    count = tokens.size if length is None else length.sum()
    draws = objective.draw(
      jax.random.fold_in(state.key, state.step),
      B,
      T,
      config.orders,
      config.train,
      config.model.kind,
      state.step,
      length,
    )
    # Each device draws for its own rows.
    draws = jax.tree.map(lambda x: sharding.constrain(x, "batch"), draws)
    fixed = state.frozen, state.teacher
    of_loss, grads = gradient(state.params, fixed, tokens, draws)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = chain.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.optimizer.ema_decay > 0:
      ema = optimizer.update_ema(
        ema, params, state.step, config.optimizer.ema_decay
      )
    sums = {
      **of_loss,
      "tokens": jnp.float32(count),
      "gradient_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
      "learning_rate": jnp.float32(schedule(state.step)),
    }
    return dataclasses.replace(
      state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema
    ), sums

  return step
