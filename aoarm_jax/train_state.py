"""The training state: one pytree of arrays, abstract and real."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from aoarm_jax import config as config_lib
from aoarm_jax import optimizer, sharding
from aoarm_jax.model import transformer


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


class Bind:
  """The pure function (params) -> network, made once per run.

  Splits the NNX module at creation; from then on state, optimizer and
  checkpoints see a nested dict of arrays.
  """

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    vocabulary: int,
    mesh: jax.sharding.Mesh | None = None,
    smallest_shard: int = 1,
  ):
    """Nothing is computed yet.

    Args:
      model: the network.
      compute: how it is computed.
      vocabulary: symbols.
      mesh: that its parameters are to lie on, if on any.
      smallest_shard: see sharding.parameter_axes.
    """
    self.mesh = mesh

    def create(key):
      return transformer.Transformer(
        model, compute, vocabulary, rngs=nnx.Rngs(key)
      )

    self._create = create
    abstract = jax.eval_shape(create, jax.random.key(0))
    map_variables = functools.partial(
      jax.tree.map, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    self._graphdef, self._abstract = nnx.split(abstract)
    if mesh:
      # The modules are to know which of their parameters are not cut.
      self._abstract = map_variables(
        lambda variable: variable.replace(
          axes=sharding.parameter_axes(
            mesh, variable.axes, variable.shape, smallest_shard
          )
        ),
        self._abstract,
      )
    self.abstract_params = nnx.to_pure_dict(self._abstract)
    # Logical axes of every parameter; layers are not named.
    self.axes = nnx.to_pure_dict(
      map_variables(lambda variable: variable.axes, self._abstract)
    )

  @property
  def kept_whole(self) -> int:
    """How many parameters are not cut, since their pieces would be short."""
    axes = jax.tree.leaves(self.axes, is_leaf=lambda x: isinstance(x, tuple))
    return sum("width" in names for names in axes)

  def init(self, key: jax.Array):
    """Parameters drawn from `key`: nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(self._create(key)))

  def __call__(self, params) -> transformer.Transformer:
    """The network with these parameters; call it inside jit."""
    state = jax.tree.map(lambda leaf: leaf, self._abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(self._graphdef, state)


def init(
  bind: Bind,
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
  bind = Bind(
    config.model, config.compute, vocabulary, mesh, config.mesh.smallest_shard
  )
  schedule = optimizer.schedule(config.optimizer, config.train.steps)
  chain = optimizer.make(config.optimizer, schedule, bind.axes)
  make = functools.partial(
    init, bind, chain, config.seed, config.optimizer.ema_decay > 0
  )
  abstract = abstract_on(bind, jax.eval_shape(make))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return bind, abstract, jax.jit(make, out_shardings=shardings)


def abstract_on(bind: Bind, tree):
  """ShapeDtypeStructs of a state, or a part of one, with their shardings.

  A leaf that has a parameter's name and shape lies where the parameter does:
  its moments in the optimizer, its average. All others are replicated.

  Args:
    bind: knows the parameters and the mesh.
    tree: of arrays or their shapes.
  """
  axes = {
    _names(path): leaf_axes
    for path, leaf_axes in jax.tree.leaves_with_path(
      bind.axes, is_leaf=lambda node: isinstance(node, tuple)
    )
  }

  def place(path, leaf):
    where = sharding.replicated(bind.mesh)
    if names := axes.get(_names(path)):
      where = sharding.parameter(bind.mesh, names, leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  return jax.tree_util.tree_map_with_path(place, tree)


def _names(path):
  """The dict keys at the end of a path: those of a parameter."""
  keys = []
  for key in reversed(path):
    if not isinstance(key, jax.tree_util.DictKey):
      break
    keys.append(key.key)
  return tuple(reversed(keys))
