"""The arrays of a Hugging Face folder, of which slices are read.

The folder has model.safetensors, or several such files and
model.safetensors.index.json, which says what lies in which file.
foreign_names.py says which array holds which parameter.
"""

import contextlib
import math
from typing import Any

import jax
import numpy as np
import safetensors
from etils import epath

from aoarm_jax.config import hugging_face, reading
from aoarm_jax.runs import exported, foreign_names, manifest, text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_COPY = "copy or download the folder again"
_DTYPES = ("F32", "F16", "BF16")
# Rows of a table that are read at once.
_ROWS = 1 << 12


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
    layout: the names and shapes of its arrays.
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
    self.layout = foreign_names.layout(source.architecture)
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
      self._slices |= {
        name.removeprefix(self.layout.prefix): arrays.get_slice(name)
        for name in names
      }
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
    wanted = dict(foreign_names.wanted(self.source, model_names))
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
      if name not in wanted and not name.endswith(self.layout.others):
        raise manifest.CheckpointError(
          f"{where} {reading.shown_name(name)} belongs to no part of the "
          "backbone that config.json describes"
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
    if name == foreign_names.QUERY_START:
      bos = slice(self.source.bos, self.source.bos + 1)
      return self._table(foreign_names.EMBEDDING, bos, *bounds)[0]
    if name == foreign_names.EMBEDDING:
      return self._table(name, *bounds)
    if name == foreign_names.POSITIONS:
      return self._table(name, *bounds[1:])[None]
    place = self.layout.places[name]
    names = self.layout.names(name, shape[0])
    if not foreign_names.is_of_layers(name):
      return _read(self._slices[names[0]], place, shape, bounds)
    piece = np.empty([cut.stop - cut.start for cut in bounds], np.float32)
    for row, array in enumerate(names[bounds[0]]):
      piece[row] = _read(self._slices[array], place, shape[1:], bounds[1:])
    return piece

  def _table(self, name, rows, columns):
    """Return rows of the embedding of tokens or of positions.

    Behind the rows of the source, BOS and EOS are tokens of the source, and
    positions are its last one.
    """
    array = self._slices[self.layout.places[name].name]
    count = array.get_shape()[0]
    others = (self.source.bos, self.source.eos)
    if name == foreign_names.POSITIONS:
      others = (count - 1, count - 1)
    shape = rows.stop - rows.start, columns.stop - columns.start
    piece = np.empty(shape, np.float32)
    for first in range(rows.start, min(rows.stop, count), _ROWS):
      last = min(first + _ROWS, rows.stop, count)
      here = slice(first - rows.start, last - rows.start)
      piece[here] = array[first:last, columns]
    for row, other in enumerate(others, start=count):
      if rows.start <= row < rows.stop:
        piece[row - rows.start] = array[other : other + 1, columns][0]
    return piece


def _read(array, place, shape, bounds):
  """Return a piece of a parameter, without the axis of layers, float32.

  Args:
    array: the slices of its array.
    place: where the parameter lies in the array.
    shape: the shape of the parameter.
    bounds: one slice per axis.
  """
  groups = place.groups(shape)
  sizes, cuts = [], []
  for group in groups:
    # An axis of the array is cut along the first of its axes alone.
    first, *inner = [shape[axis] for axis in group]
    unit, begin = math.prod(inner), bounds[group.start]
    before = place.part * first if group.start == place.inputs else 0
    cuts.append(
      slice(*(unit * (before + end) for end in (begin.start, begin.stop)))
    )
    sizes += [begin.stop - begin.start, *inner]
  piece = array[tuple(cuts)].astype(np.float32).reshape(sizes)
  starts = {group.start for group in groups}
  order = [axis for group in groups for axis in group]
  rest = [slice(None) if axis in starts else bounds[axis] for axis in order]
  return piece[tuple(rest)].transpose(np.argsort(order))


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
