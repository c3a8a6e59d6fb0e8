"""A network and everything that its config determines."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import configured, documents, tokenizers
from aoarm_jax.devices import sharding
from aoarm_jax.model import adapters, transformer


class Network:
  """The network of a config: its alphabet, its mesh, its parameters' shapes.

  The Flax module is split once, when this object is made. From then on the
  state, the optimizer and checkpoints see a nested dict of arrays.

  Attributes:
    config: the config of the run.
    mesh: the mesh that holds the parameters, or None.
    tokenizer: converts text to token ids and back. It has the end of a document
      where config.data.documents asks for ends.
    layout: the sentinels, the vocabulary and the last position; see
      orders.Layout.
    axes: the logical axes of every parameter. The axis of layers has no name.
    abstract_params: a nested dict of jax.ShapeDtypeStruct, float32. With a mesh
      they have shardings.
  """

  def __init__(
    self,
    config: config_lib.Config,
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    lora: config_lib.Train | None = None,
  ):
    """Compute the shapes of the parameters; no arrays are made.

    Args:
      config: gives model, compute, data.tokenizer and mesh.smallest_shard.
      mesh: the mesh for the parameters. None means that parameters lie wherever
        they are put.
      tokenizer: None means the tokenizer that the config names. If its symbols
        come from a text, a stand-in of the same size takes its place.
      lora: the training whose adapters stand beside the weights, see
        adapters.py. None means that there are no adapters.
    """
    self.config, self.mesh, self._lora = config, mesh, lora
    self.tokenizer = configured.with_end(
      config.data, tokenizer or configured.tokenizer(config.data)
    )
    abstract = jax.eval_shape(self._create, jax.random.key(0))
    map_variables = functools.partial(
      jax.tree.map, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    self.layout = abstract.layout
    self._graphdef, self._abstract = nnx.split(abstract)
    if mesh:
      # The modules must know which of their parameters stay whole.
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
    """V, the number of symbols that can be predicted, without sentinels.

    The end of a padded document is none of them if the model is told where it
    is, by the second sentinel.
    """
    return self.tokenizer.V - self.config.gives_end

  @property
  def end(self) -> documents.End | None:
    """The end of the documents of rows that are padded; None for windows."""
    if self.config.data.documents != "pad":
      return None
    return documents.End(self.tokenizer.end, self.config.gives_end)

  @property
  def can_pick_ranks(self) -> bool:
    """True if single ranks can be computed without all the others.

    The query row of a chosen rank belongs to no slot, so slots must not be
    spread over devices. Each such row sees its own number of slots, and cudnn
    has no such mask.
    """
    if self.model.kind.masked:
      return True
    is_spread = self.mesh is not None and self.mesh.shape["sequence"] > 1
    is_cudnn = self.config.compute.attention == "cudnn"
    return self.model.kind.streams == 2 and not (is_spread or is_cudnn)

  @property
  def kept_whole(self) -> int:
    """The number of arrays of parameters that avoid short shards, uncut."""
    axes = jax.tree.leaves(self.axes, is_leaf=lambda x: isinstance(x, tuple))
    return sum("width" in names for names in axes)

  def init(self, key: jax.Array) -> Any:
    """Draw the parameters from `key`: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(self._create(key)))

  def bind(self, params: Any) -> transformer.Transformer:
    """Return the modules with these parameters; call it inside jit.

    Args:
      params: nested dict of arrays, as `abstract_params`.
    """
    state = jax.tree.map(lambda leaf: leaf, self._abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(self._graphdef, state)

  def apply(self, params: Any, slots: orders.Slots) -> jax.Array:
    """Return the logits of slots; see transformer.Transformer.__call__.

    Args:
      params: nested dict of arrays, as `abstract_params`.
      slots: int32 [B, S] each.

    Returns:
      float32 [B, R, V].
    """
    return self.bind(params)(slots)

  def put(self, params: Any) -> Any:
    """Return parameters as float32 arrays that lie where this network's lie.

    Args:
      params: nested dict of arrays, as `abstract_params`.

    Raises:
      ConfigError: names or shapes differ from those of this network.
    """
    wanted = jax.tree.leaves_with_path(self.abstract_params)
    given = jax.tree.leaves_with_path(params)
    shapes = {_names(path): leaf.shape for path, leaf in wanted}
    found = {_names(path): np.shape(leaf) for path, leaf in given}
    for name in [*shapes, *found]:
      if shapes.get(name) != found.get(name):
        raise config_lib.ConfigError(
          f"params: {'.'.join(map(str, name)) or 'a leaf'} has shape "
          f"{found.get(name)}, and the network has {shapes.get(name)}; give a "
          "nested dict as network.abstract_params (flax: nnx.to_pure_dict)"
        )
    return jax.tree.map(
      lambda leaf, x: jax.device_put(jnp.asarray(x, leaf.dtype), leaf.sharding),
      self.abstract_params,
      params,
    )

  def placed(self, tree: Any) -> Any:
    """Return the shapes of a state, or of a part of it, with their shardings.

    A leaf with the name and shape of a parameter lies where the parameter lies.
    Such leaves are the optimizer's moments and the average of the parameters.
    All other leaves are replicated.

    Args:
      tree: arrays or their shapes.
    """
    mesh = self.mesh
    assert mesh is not None, "only parameters on a mesh have shardings"
    axes = {
      _names(path): leaf_axes
      for path, leaf_axes in jax.tree.leaves_with_path(
        self.axes, is_leaf=lambda node: isinstance(node, tuple)
      )
    }

    def place(path, leaf):
      placement = sharding.replicated(mesh)
      if names := axes.get(_names(path)):
        placement = sharding.parameter(mesh, names, leaf.shape)
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    return jax.tree_util.tree_map_with_path(place, tree)

  def _create(self, key):
    made = transformer.Transformer(
      self.config.model,
      self.config.compute,
      self.vocabulary,
      self.end.token if self.end else None,
      rngs=nnx.Rngs(key),
    )
    if self._lora and self._lora.lora_rank:
      key = jax.random.fold_in(key, purposes.ADAPTERS)
      adapters.attach(made.blocks, self._lora, nnx.Rngs(key))
    return made


def _names(path):
  """Return the dict keys at the end of a path; they name a parameter."""
  keys = []
  for key in reversed(path):
    if not isinstance(key, jax.tree_util.DictKey):
      break
    keys.append(key.key)
  return tuple(reversed(keys))
