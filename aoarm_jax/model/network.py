"""Parameters as a tree of arrays, and the network that they make."""

import functools

import jax
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import transformer


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
