"""A network and all that follows from its config; parameters as plain trees."""

import functools
from typing import Any

import jax
from flax import nnx

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import sharding
from aoarm_jax.model import transformer


class Network:
  """The network of a config: its alphabet, its mesh and its parameters' shapes.

  The Flax module is split once, where this object is made. From then on state,
  optimizer and checkpoints see a nested dict of arrays.

  Attributes:
    config: of the run.
    mesh: the mesh that the parameters lie on, or None.
    tokenizer: text to token ids and back.
    layout: sentinels, vocabulary and last position, see orders.Layout.
    axes: logical axes of every parameter; the axis of layers has no name.
    abstract_params: nested dict of jax.ShapeDtypeStruct, float32; with
      shardings where there is a mesh.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
  ):
    """Computes shapes only.

    Args:
      config: its model, compute, data.tokenizer and mesh.smallest_shard.
      mesh: the mesh for the parameters; None: they lie wherever they are put.
      tokenizer: None: the one that the config names.
    """
    self.config, self.mesh = config, mesh
    self.tokenizer = tokenizer or tokenizers.get(config.data.tokenizer)
    abstract = jax.eval_shape(self._create, jax.random.key(0))
    map_variables = functools.partial(
      jax.tree.map, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    self.layout = abstract.layout
    self._graphdef, self._abstract = nnx.split(abstract)
    if mesh:
      # The modules must know which of their parameters are not cut.
      self._abstract = map_variables(
        lambda variable: variable.replace(
          axes=sharding.parameter_axes(
            mesh, variable.axes, variable.shape, config.mesh.smallest_shard
          )
        ),
        self._abstract,
      )
    self.axes = nnx.to_pure_dict(
      map_variables(lambda variable: variable.axes, self._abstract)
    )
    self.abstract_params = nnx.to_pure_dict(self._abstract)
    if mesh:
      self.abstract_params = self.placed(self.abstract_params)

  @property
  def model(self) -> config_lib.Model:
    """The model's section of the config."""
    return self.config.model

  @property
  def vocabulary(self) -> int:
    """V: symbols that can be predicted; sentinels are not among them."""
    return self.tokenizer.V

  @property
  def kept_whole(self) -> int:
    """Number of parameters that are not cut, as their shards would be short."""
    axes = jax.tree.leaves(self.axes, is_leaf=lambda x: isinstance(x, tuple))
    return sum("width" in names for names in axes)

  def init(self, key: jax.Array) -> Any:
    """Draws parameters from `key`: nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(self._create(key)))

  def bind(self, params: Any) -> transformer.Transformer:
    """Returns the modules with these parameters. Call it inside jit."""
    state = jax.tree.map(lambda leaf: leaf, self._abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(self._graphdef, state)

  def apply(self, params: Any, slots: orders.Slots) -> jax.Array:
    """Returns the logits of slots, see transformer.Transformer.__call__.

    Args:
      params: nested dict of arrays, as `abstract_params`.
      slots: int32 [B, S] each.

    Returns:
      float32 [B, R, V].
    """
    return self.bind(params)(slots)

  def placed(self, tree: Any) -> Any:
    """Returns the shapes of a state, or a part of one, with their shardings.

    A leaf with the name and shape of a parameter lies where the parameter does:
    its moments in the optimizer and its average. All others are replicated.

    Args:
      tree: of arrays or their shapes.
    """
    axes = {
      _names(path): leaf_axes
      for path, leaf_axes in jax.tree.leaves_with_path(
        self.axes, is_leaf=lambda node: isinstance(node, tuple)
      )
    }

    def place(path, leaf):
      where = sharding.replicated(self.mesh)
      if names := axes.get(_names(path)):
        where = sharding.parameter(self.mesh, names, leaf.shape)
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, tree)

  def _create(self, key):
    return transformer.Transformer(
      self.config.model,
      self.config.compute,
      self.vocabulary,
      rngs=nnx.Rngs(key),
    )


def _names(path):
  """The dict keys at the end of a path, which name a parameter."""
  keys = []
  for key in reversed(path):
    if not isinstance(key, jax.tree_util.DictKey):
      break
    keys.append(key.key)
  return tuple(reversed(keys))
