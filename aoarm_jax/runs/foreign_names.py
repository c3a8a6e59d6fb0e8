"""The names and shapes of the arrays of Hugging Face, and their parameters.

Here a matrix is [inputs, outputs], heads have an axis, and layers are stacked.
In transformers each layer has arrays of its own. A matrix of Llama and Qwen3 is
[outputs, inputs]. One of GPT-2 is [inputs, outputs] (Conv1D), and queries, keys
and values lie side by side in one array.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aoarm_jax.config import gpt2, hugging_face

EMBEDDING, POSITIONS, _HEAD = "embedding", "start.added", "head"
# The input of query rows that do not see the token before their target. It has
# no array of its own: they begin as BOS, after which the source predicts
# without a context.
QUERY_START = "start.query_start"


class Place(NamedTuple):
  """Where a parameter lies in the folder.

  Attributes:
    name: the name of the array; arrays of layers stand behind Layout.layer.
    inputs: the number of leading axes, without that of layers, which are
      inputs of a matrix. 0 for a vector.
    inputs_first: whether the matrix is [inputs, outputs] in the folder.
    part: the index of the parameter among those that share the array, side by
      side along its outputs.
    parts: the number of parameters that share the array.
  """

  name: str
  inputs: int = 0
  inputs_first: bool = False
  part: int = 0
  parts: int = 1

  def groups(self, shape: Sequence[int]) -> list[range]:
    """Return the axes of the parameter that make each axis of the array.

    Args:
      shape: the shape of the parameter, without the axis of layers.
    """
    outputs = range(self.inputs, len(shape))
    if not self.inputs:
      return [outputs]
    both = [outputs, range(self.inputs)]
    return both[::-1] if self.inputs_first else both

  def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the array.

    Args:
      shape: see `groups`.
    """
    return tuple(
      math.prod(shape[axis] for axis in group)
      * (self.parts if group.start == self.inputs else 1)
      for group in self.groups(shape)
    )


class Layout(NamedTuple):
  """The arrays of an architecture.

  Attributes:
    layer: what stands before the names of the arrays of a layer.
    places: the place of every parameter.
    prefix: what stands before all names but that of the head. In some folders
      it is left out.
    others: how the names of arrays end that are no parameters, such as masks.
  """

  layer: str
  places: Mapping[str, Place]
  prefix: str
  others: tuple[str, ...]

  def names(self, name: str, L: int) -> list[str]:
    """Return the arrays that a parameter is made of, one for each layer.

    Args:
      name: the parameter.
      L: the number of layers.
    """
    place = self.places[name]
    if not is_of_layers(name):
      return [place.name]
    return [self.layer.format(i) + place.name for i in range(L)]


_LLAMA = Layout(
  "model.layers.{}.",
  {
    EMBEDDING: Place("model.embed_tokens.weight"),
    "norm.scale": Place("model.norm.weight"),
    _HEAD: Place("lm_head.weight", 1),
    "blocks.attention_norm.scale": Place("input_layernorm.weight"),
    "blocks.attention.query": Place("self_attn.q_proj.weight", 1),
    "blocks.attention.key": Place("self_attn.k_proj.weight", 1),
    "blocks.attention.value": Place("self_attn.v_proj.weight", 1),
    "blocks.attention.out": Place("self_attn.o_proj.weight", 2),
    "blocks.attention.query_norm.scale": Place("self_attn.q_norm.weight"),
    "blocks.attention.key_norm.scale": Place("self_attn.k_norm.weight"),
    "blocks.mlp_norm.scale": Place("post_attention_layernorm.weight"),
    "blocks.mlp.gate": Place("mlp.gate_proj.weight", 1),
    "blocks.mlp.up": Place("mlp.up_proj.weight", 1),
    "blocks.mlp.down": Place("mlp.down_proj.weight", 1),
  },
  "",
  # A tied head repeats the embedding, and frequencies are computed.
  ("lm_head.weight", "rotary_emb.inv_freq"),
)


def _conv(
  module: str, name: str, array: str, inputs: int, part: int = 0, parts: int = 1
) -> dict[str, Place]:
  """Return the places of a weight of GPT-2 and of its bias."""
  weight = Place(f"{array}.weight", inputs, True, part, parts)
  bias = Place(f"{array}.bias", part=part, parts=parts)
  return {f"{module}.{name}": weight, f"{module}.biases.{name}": bias}


def _layer_norm(name: str, array: str) -> dict[str, Place]:
  """Return the places of the scale and the bias of a LayerNorm."""
  return {
    f"{name}.scale": Place(f"{array}.weight"),
    f"{name}.bias": Place(f"{array}.bias"),
  }


_GPT2 = Layout(
  "h.{}.",
  {
    EMBEDDING: Place("wte.weight"),
    POSITIONS: Place("wpe.weight"),
    _HEAD: Place("lm_head.weight", 1),
    **_layer_norm("norm", "ln_f"),
    **_layer_norm("blocks.attention_norm", "ln_1"),
    **_layer_norm("blocks.mlp_norm", "ln_2"),
    **_conv("blocks.attention", "query", "attn.c_attn", 1, 0, 3),
    **_conv("blocks.attention", "key", "attn.c_attn", 1, 1, 3),
    **_conv("blocks.attention", "value", "attn.c_attn", 1, 2, 3),
    **_conv("blocks.attention", "out", "attn.c_proj", 2),
    **_conv("blocks.mlp", "up", "mlp.c_fc", 1),
    **_conv("blocks.mlp", "down", "mlp.c_proj", 1),
  },
  "transformer.",
  ("lm_head.weight", ".attn.bias", ".attn.masked_bias"),
)


def layout(architecture: str) -> Layout:
  """Return the layout of an architecture of transformers."""
  return _GPT2 if architecture in gpt2.MODEL_TYPES else _LLAMA


def is_of_layers(name: str) -> bool:
  """Return whether the first axis of a parameter is that of the layers."""
  return name.startswith("blocks.")


def wanted(
  source: hugging_face.Source, parameters: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yield the names and shapes of the arrays that a model is made of.

  Args:
    source: the model of the folder.
    parameters: the shapes of the parameters by their names.
  """
  of_source = layout(source.architecture)
  rows = {EMBEDDING: source.vocabulary, POSITIONS: source.positions}
  for name, leaf in parameters.items():
    if name == QUERY_START:
      continue
    shape = of_source.places[name].shape(leaf.shape[is_of_layers(name) :])
    if name in rows:
      shape = (rows[name], leaf.shape[-1])
    for array in of_source.names(name, leaf.shape[0]):
      yield array, shape


def of_params(
  architecture: str,
  params: Mapping[str, np.ndarray],
  vocabulary: int,
  tokens: Sequence[int],
) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the names and the arrays of transformers for parameters.

  Args:
    architecture: the class in transformers.
    params: {name: array} of a `causal` model, on the host.
    vocabulary: V, the number of symbols that the model predicts.
    tokens: rows of the embedding that follow its first V rows, such as BOS.
      The head has rows of zeros for them.
  """
  of_target = layout(architecture)
  packed: dict[str, list[Any]] = {}
  for name, leaf in params.items():
    place = of_target.places[name]
    if name == EMBEDDING:
      leaf = np.concatenate([leaf[:vocabulary], leaf[[*tokens]]])
    if name == POSITIONS:  # No row has the positions T and T + 1.
      leaf = leaf[0, :-2]
    arrays = leaf if is_of_layers(name) else leaf[None]
    for key, array in zip(of_target.names(name, len(arrays)), arrays):
      if name not in (EMBEDDING, POSITIONS):
        groups = place.groups(array.shape)
        sizes = [math.prod(array.shape[axis] for axis in g) for g in groups]
        order = [axis for group in groups for axis in group]
        array = array.transpose(order).reshape(sizes)
      if name == _HEAD:
        array = np.pad(array, ((0, len(tokens)), (0, 0)))
      parts = packed.setdefault(key, [None] * place.parts)
      parts[place.part] = array
  head = of_target.places[_HEAD].name
  for key, parts in packed.items():
    prefix = "" if key == head else of_target.prefix
    yield prefix + key, np.concatenate(parts, axis=-1)
