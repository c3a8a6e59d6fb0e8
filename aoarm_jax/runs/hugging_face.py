"""The arrays of a Hugging Face folder of Llama or Qwen3: names and slices.

The folder has model.safetensors, or several such files and
model.safetensors.index.json, which says what lies in which file. A matrix of
transformers is [outputs, inputs], and layers have arrays of their own. Here a
matrix is [inputs, outputs], heads have an axis, and layers are stacked.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from etils import epath

from aoarm_jax.config import hugging_face, reading
from aoarm_jax.runs import exported, manifest, text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_COPY = "copy or download the folder again"
_LAYER = "model.layers.{}."
_DTYPES = ("F32", "F16", "BF16")
_EMBEDDING = "embedding"
# Rows of the embedding that are read at once.
_ROWS = 1 << 12
# The input of query rows that do not see the token before their target. They
# begin as BOS, after which the source predicts without a context.
_QUERY_START = "start.query_start"


class Place(NamedTuple):
  """Where a parameter lies in the folder.

  Attributes:
    name: the name of the array; arrays of layers stand behind _LAYER.
    inputs: the number of leading axes, without that of layers, which are
      inputs of a matrix. 0 for a vector.
  """

  name: str
  inputs: int


PLACES = {
  _EMBEDDING: Place("model.embed_tokens.weight", 0),
  "norm.scale": Place("model.norm.weight", 0),
  "head": Place("lm_head.weight", 1),
  "blocks.attention_norm.scale": Place("input_layernorm.weight", 0),
  "blocks.attention.query": Place("self_attn.q_proj.weight", 1),
  "blocks.attention.key": Place("self_attn.k_proj.weight", 1),
  "blocks.attention.value": Place("self_attn.v_proj.weight", 1),
  "blocks.attention.out": Place("self_attn.o_proj.weight", 2),
  "blocks.attention.query_norm.scale": Place("self_attn.q_norm.weight", 0),
  "blocks.attention.key_norm.scale": Place("self_attn.k_norm.weight", 0),
  "blocks.mlp_norm.scale": Place("post_attention_layernorm.weight", 0),
  "blocks.mlp.gate": Place("mlp.gate_proj.weight", 1),
  "blocks.mlp.up": Place("mlp.up_proj.weight", 1),
  "blocks.mlp.down": Place("mlp.down_proj.weight", 1),
}


def read_json(path: epath.Path, times: int = 1) -> Any:
  """Return the JSON value of a file of the folder.

  Raises:
    CheckpointError: the file is missing, or is no JSON.
  """
  try:
    data = reading.read(
      path, times * reading.JSON_BYTES, exported.within(path.parent)
    )
    return reading.parse(data, times=times)
  except (FileNotFoundError, NotADirectoryError):
    why = "no such file; name the folder of a model of Hugging Face"
  except OSError as error:
    why = error.strerror or text.first_line(error)
  except reading.ReadError as error:
    why = error.reason
  except ValueError as error:
    why = str(error)
  raise manifest.CheckpointError(f"{path}: {why}")


def read_config(folder: epath.Path) -> hugging_face.Source:
  """Return what config.json of a folder describes.

  Raises:
    CheckpointError: the file is missing, or the backbone has no such model.
  """
  path = folder / exported.CONFIG
  try:
    return hugging_face.read(read_json(path))
  except ValueError as error:
    raise manifest.CheckpointError(f"{path}: {error}") from error


class Arrays:
  """The arrays of a folder, of which slices are read.

  Attributes:
    folder: the folder.
    source: what its config.json describes.
  """

  def __init__(
    self, folder: epath.Path, source: hugging_face.Source, model_names: Any
  ) -> None:
    """Open all files; compare names and shapes with the model's.

    Args:
      folder: the folder.
      source: what its config.json describes.
      model_names: {name: jax.ShapeDtypeStruct} of the parameters of the model.

    Raises:
      CheckpointError: a file or an array is missing, damaged or foreign.
    """
    self.folder, self.source = folder, source
    self._stack = contextlib.ExitStack()
    self._slices: dict[str, Any] = {}
    try:
      for path in _files(folder):
        self._open(path)
      self._check(model_names)
    except BaseException:
      self._stack.close()
      raise

  def __enter__(self) -> "Arrays":
    return self

  def __exit__(self, *error: object) -> None:
    self._slices.clear()
    self._stack.close()

  def _open(self, path):
    """Open a file and note its arrays."""
    try:
      with reading.open_file(path, exported.within(self.folder)) as file:
        is_pointer = file.read(len(exported.LFS)) == exported.LFS
      if is_pointer:
        raise manifest.CheckpointError(
          f"{path}: a pointer of Git LFS and not the file; run git lfs pull"
        )
      arrays = self._stack.enter_context(
        safetensors.safe_open(path, framework="numpy")
      )
      names = arrays.keys()
      self._slices |= {name: arrays.get_slice(name) for name in names}
    except reading.ReadError as error:
      raise manifest.CheckpointError(str(error)) from error
    except OSError as error:
      why = error.strerror or text.first_line(error)
      raise manifest.CheckpointError(f"{path}: {why}: {_COPY}") from error
    except safetensors.SafetensorError as error:
      raise manifest.CheckpointError(
        f"{path}: no whole safetensors file: {text.first_line(error)}: {_COPY}"
      ) from error

  def _check(self, model_names):
    """Raise CheckpointError unless the arrays are those of the model."""
    wanted = dict(_wanted(model_names, self.source.vocabulary))
    where = f"{self.folder}: array"
    for name, shape in wanted.items():
      found = self._slices.get(name)
      if found is None:
        raise manifest.CheckpointError(
          f"{where} {name} is missing, and config.json asks for it: {_COPY}"
        )
      if tuple(found.get_shape()) != shape:
        raise manifest.CheckpointError(
          f"{where} {name} is {found.get_shape()}, and config.json asks for "
          f"{list(shape)}: {_COPY}"
        )
      if found.get_dtype() not in _DTYPES:
        raise manifest.CheckpointError(
          f"{where} {name} has dtype {found.get_dtype()}, and "
          f"{', '.join(_DTYPES)} are read"
        )
    for name in self._slices:
      # A tied head repeats the embedding, and frequencies are computed.
      is_known = name in wanted or name.endswith("rotary_emb.inv_freq")
      if not is_known and name != PLACES["head"].name:
        raise manifest.CheckpointError(
          f"{where} {reading.shown_name(name)} belongs to no part of the "
          "backbone, which has no biases and no adapters"
        )

  def leaf(self, name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Return a parameter, of which each device reads its piece.

    Args:
      name: its name in the tree of parameters, joined by dots.
      abstract: its shape, with a sharding.

    Returns:
      A float32 array.
    """
    return jax.make_array_from_callback(
      abstract.shape,
      abstract.sharding,
      lambda index: self.piece(name, abstract.shape, index or ()),
    )

  def piece(
    self, name: str, shape: tuple[int, ...], index: tuple[slice, ...]
  ) -> np.ndarray:
    """Return a piece of a parameter, float32, reading no more than the piece.

    Args:
      name: the parameter.
      shape: its shape.
      index: one slice per axis.
    """
    bounds = [slice(*cut.indices(size)) for cut, size in zip(index, shape)]
    if name == _QUERY_START:
      table, bos = self._slices[PLACES[_EMBEDDING].name], self.source.bos
      return table[bos : bos + 1, bounds[0]][0].astype(np.float32)
    place = PLACES[name]
    if name == _EMBEDDING:
      return self._embedding(place.name, *bounds)
    if not name.startswith("blocks."):
      return self._one(place.name, place.inputs, shape, bounds)
    piece = np.empty([cut.stop - cut.start for cut in bounds], np.float32)
    for row, layer in enumerate(range(bounds[0].start, bounds[0].stop)):
      piece[row] = self._one(
        _LAYER.format(layer) + place.name, place.inputs, shape[1:], bounds[1:]
      )
    return piece

  def _one(self, name, inputs, shape, bounds):
    """Return a piece of one array, with the axes of the parameter."""
    array = self._slices[name]
    if not inputs:
      return array[bounds[0]].astype(np.float32)
    row_shape, rows = _flat(shape[inputs:], bounds[inputs:])
    column_shape, columns = _flat(shape[:inputs], bounds[:inputs])
    piece = array[rows, columns].astype(np.float32)
    piece = piece.reshape(*row_shape, *column_shape)
    count = len(row_shape)
    # The axes behind the first ones are whole in the file.
    cuts = [slice(None), *bounds[inputs + 1 :]]
    cuts += [slice(None), *bounds[1:inputs]]
    axes = (*range(count, piece.ndim), *range(count))
    return piece[tuple(cuts)].transpose(axes)

  def _embedding(self, name, rows, columns):
    """Return rows of the embedding; BOS and EOS are tokens of the source."""
    array, V = self._slices[name], self.source.vocabulary
    shape = rows.stop - rows.start, columns.stop - columns.start
    piece = np.empty(shape, np.float32)
    for first in range(rows.start, min(rows.stop, V), _ROWS):
      last = min(first + _ROWS, rows.stop, V)
      here = slice(first - rows.start, last - rows.start)
      piece[here] = array[first:last, columns]
    for row, token in ((V, self.source.bos), (V + 1, self.source.eos)):
      if rows.start <= row < rows.stop:
        piece[row - rows.start] = array[token : token + 1, columns][0]
    return piece


def _flat(shape, bounds):
  """Return the shape of a piece, whole behind its first axis, and its slice."""
  inner = math.prod(shape[1:])
  first = bounds[0]
  count = first.stop - first.start
  cut = slice(first.start * inner, first.stop * inner)
  return (count, *shape[1:]), cut


def _files(folder):
  """Return the paths of the files that hold the arrays."""
  index = folder / INDEX
  if not index.exists():
    if (folder / WEIGHTS).exists():
      return [folder / WEIGHTS]
    raise manifest.CheckpointError(
      f"{folder}: has neither {WEIGHTS} nor {INDEX}: convert files of another "
      "kind to safetensors first"
    )
  tree = read_json(index)
  try:
    reading.check(tree, {"weight_map": reading.Each(str)})
  except ValueError as error:
    raise manifest.CheckpointError(f"{index}: {error}") from error
  names = sorted({*tree["weight_map"].values()})
  for name in names:
    if epath.Path(name).name != name:
      raise manifest.CheckpointError(
        f"{index}: {reading.shown(name)} is no name of a file"
      )
    if not (folder / name).exists():
      raise manifest.CheckpointError(
        f"{folder / name}: missing, and {INDEX} names it: {_COPY}"
      )
  return [folder / name for name in names]


def _wanted(
  model_names: Mapping[str, jax.ShapeDtypeStruct], vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yield the names and shapes of the arrays that a model is made of."""
  for name, leaf in model_names.items():
    if name == _QUERY_START:
      continue
    place = PLACES[name]
    if name == _EMBEDDING:
      yield place.name, (vocabulary, leaf.shape[1])
      continue
    is_layer = name.startswith("blocks.")
    shape = leaf.shape[is_layer:]
    if place.inputs:
      outputs = math.prod(shape[place.inputs :])
      shape = (outputs, math.prod(shape[: place.inputs]))
    for layer in range(leaf.shape[0] if is_layer else 1):
      yield _LAYER.format(layer) * is_layer + place.name, shape


def of_params(
  params: Mapping[str, np.ndarray], vocabulary: int, tokens: Sequence[int]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the names and the arrays of transformers for parameters.

  Args:
    params: {name: array} of a `causal` model, on the host.
    vocabulary: V, the number of symbols that the model predicts.
    tokens: rows of the embedding that follow its first V rows, such as BOS.
      The head has rows of zeros for them.
  """
  for name, leaf in params.items():
    place = PLACES[name]
    if name == _EMBEDDING:
      yield place.name, np.concatenate([leaf[:vocabulary], leaf[[*tokens]]])
      continue
    is_layer = name.startswith("blocks.")
    for layer, array in enumerate(leaf if is_layer else leaf[None]):
      if place.inputs:
        inputs = math.prod(array.shape[: place.inputs])
        array = array.reshape(inputs, -1).T
      if name == "head":
        array = np.pad(array, ((0, len(tokens)), (0, 0)))
      yield _LAYER.format(layer) * is_layer + place.name, array
