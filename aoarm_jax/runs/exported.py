"""Read a model that --mode=export wrote: weights, config, tokenizer.

The folder of an exported model holds:

  config.json         Format version, config, training, checksums of the files.
  model.safetensors   The weights, named as in the tree of parameters.
  tokenizer.json      State of the tokenizer, unless the config fixes it.
  README.md           A card for people. No code reads it.

The folder may come from a stranger. So the types, the sizes and the sha256 of
everything are compared before it is used.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from aoarm_jax.config import errors, reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import manifest, text

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, CARD = "tokenizer.json", "README.md"
FILES = (CONFIG, WEIGHTS, TOKENIZER, CARD)
FORMAT, FORMAT_VERSION = "aoarm_jax export", 1
# The dtypes of weights, by their names in a safetensors file.
DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": jnp.dtype("bfloat16")}
PARTS = ("ema", "params")  # Parts of a training state that are weights.

# Fields that name places on the machine of the run. They are left out.
PLACES = (
  "data.path",
  "data.tokenizer_file",
  "train.start_from",
  "train.distill",
)

_CONFIG_BYTES = 1 << 20  # A config has some 10 kB.
_HEADER_BYTES = 1 << 20  # The names of arrays have some kB.
_COPY = "copy or download the folder again"
LFS = b"version https://git-lfs"
# The types of config.json, see reading.check.
_RECORD = {
  "format": str,
  "format_version": int,
  "written_by": str,
  "config": dict,
  "vocabulary": reading.Count(),
  "weights": {"part": str, "dtype": str, "parameters": reading.Count()},
  "training": {
    "step": reading.Count(),
    "tokens": reading.Count(),
    "corpus": str,
    "path": str,
    "started_from": str,
    "checkpoint": str,
    "text": reading.Each(str),
    "switches": reading.Each((str, bool, int)),
  },
  "evaluations": [
    {
      "source": str,
      "split": str,
      "estimator": str,
      "unit": str,
      "bits_per_token": float,
      "bits_per_byte?": float,
      "bits_per_char?": float,
      "standard_error_bits?": (float, None),
      "tokens": reading.Count(),
      "sha256": str,
    }
  ],
  "files": reading.Each({"bytes": reading.Count(), "sha256": str}),
  "sha256": str,
}


def is_export(folder: epath.Path) -> bool:
  """Return whether config.json in a folder says that it is an export."""
  try:
    return is_record(read_json(folder))
  except (errors.UserError, ImportError):  # Whoever reads it says why.
    return False


def read_json(folder: epath.Path) -> Any:
  """Return the value of config.json of a run or of an exported model.

  Args:
    folder: the run directory, or the folder of the exported model.

  Raises:
    CheckpointError: there is no such file.
    ConfigError: it cannot be read, or is no JSON.
  """
  path = folder / CONFIG
  try:
    return reading.parse(reading.read(path, _CONFIG_BYTES, within(folder)))
  except (FileNotFoundError, NotADirectoryError):
    raise manifest.CheckpointError(
      f"{path}: no such file; {folder} is neither the directory of a run nor "
      "an exported model"
    ) from None
  except OSError as error:
    why = error.strerror or text.first_line(error)
    raise config_lib.ConfigError(f"{path}: {why}") from error
  except reading.ReadError as error:
    raise config_lib.ConfigError(str(error)) from error
  except ValueError as error:
    raise config_lib.ConfigError(f"{path}: {error}") from error


def is_record(tree: Any) -> bool:
  """Return whether the value of a config.json is that of an export."""
  return isinstance(tree, dict) and tree.get("format") == FORMAT


def names(params: Any) -> dict[str, Any]:
  """Return {name: leaf} of a nested dict, in the order of its leaves.

  A name has the keys from the root, joined by dots, as in
  "blocks.attention.query". Names are part of the format.
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree.leaves_with_path(params)
  }


def sha256(data: bytes) -> str:
  """Return the sha256 of a file's content, in hex."""
  return hashlib.sha256(data).hexdigest()


def checksum(record: dict[str, Any]) -> str:
  """Return the sha256 of all values of a config.json but its sha256."""
  values = {k: v for k, v in record.items() if k != "sha256"}
  return sha256(json.dumps(values, sort_keys=True).encode())


def within(folder: epath.Path) -> epath.Path:
  """Return the folder that the files must lie in after links are followed.

  The cache of huggingface_hub has the files in blobs/, beside snapshots/.
  """
  return folder.parents[1] if folder.parent.name == "snapshots" else folder


class Exported:
  """An exported model, read as the checkpoints of a run with a single step.

  The methods are those of checkpoint.Checkpoints that read.

  Attributes:
    directory: the folder.
    record: the values of its config.json.
  """

  def __init__(self, folder: epath.Path) -> None:
    """Read config.json.

    Raises:
      CheckpointError: it is missing, changed, foreign or of a later version.
      ConfigError: see `read_json`.
    """
    self.directory = folder
    tree = read_json(folder)
    try:
      self.record: dict[str, Any] = _checked(tree)
    except ValueError as error:
      raise manifest.CheckpointError(f"{folder / CONFIG}: {error}") from error

  @property
  def config(self) -> config_lib.Config:
    """The config of the run, without places of its machine.

    Raises:
      CheckpointError: this version of the program cannot read it.
    """
    try:
      return config_lib.from_dict(self.record["config"])
    except config_lib.ConfigError as error:
      raise manifest.CheckpointError(
        f"{self.directory / CONFIG}: {error}; it was written by "
        f"{self.record['written_by']}, so use that version or a later one"
      ) from error

  @property
  def saved(self) -> manifest.Saved:
    """The checkpoint that was exported, apart from its arrays."""
    training = self.record["training"]
    symbols = self.record["files"].get(TOKENIZER, {}).get("sha256", "")
    return manifest.Saved(
      training["step"],
      config_lib.to_json(self.config),
      {
        "text": training["text"],
        "switches": training["switches"],
        "tokenizer": symbols,
      },
      None,
      frozenset([self.record["weights"]["part"]]),
      training["checkpoint"],
    )

  def steps(self) -> list[int]:
    """Return the only step."""
    return [self.record["training"]["step"]]

  def files(self, step: int) -> dict[str, Any]:
    """Return the sizes and checksums of the files beside config.json."""
    del step
    files: dict[str, Any] = self.record["files"]
    return files

  def newest(self) -> manifest.Saved:
    """Return the checkpoint that was exported."""
    return self.saved

  def best(self) -> manifest.Saved:
    """Raise ConfigError: there is nothing to choose from."""
    raise config_lib.ConfigError(
      f"config.checkpoint.read='best': {self.directory} is an exported model, "
      "which has a single checkpoint; leave the field out"
    )

  def at(self, step: int) -> manifest.Saved:
    """Return the checkpoint that was exported."""
    del step
    return self.saved

  def tokenizer(self, saved: manifest.Saved) -> bytes:
    """Return the state of the tokenizer; b"" if the config fixes it.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    wanted = saved.data_state["tokenizer"]
    return self._content(TOKENIZER, reading.JSON_BYTES) if wanted else b""

  def restore(self, saved: manifest.Saved, abstract_state: Any) -> Any:
    """Read the weights.

    Args:
      saved: what `newest` returned.
      abstract_state: {part: nested dict of jax.ShapeDtypeStruct}, see
        checkpoint.Checkpoints.restore.

    Returns:
      {part: nested dict of float32 jax.Array}, with the shardings of
      `abstract_state`.

    Raises:
      CheckpointError: the file is missing or damaged, or has other arrays.
    """
    del saved
    ((part, abstract),) = abstract_state.items()
    wanted = names(abstract)
    arrays = self.arrays(sum(leaf.size for leaf in wanted.values()))
    for name in [*wanted, *arrays]:
      have, want = _shape(arrays.get(name)), _shape(wanted.get(name))
      if have != want:
        raise manifest.CheckpointError(
          f"{self.directory / WEIGHTS}: array {reading.shown_name(name)} is "
          f"{have}, and the model of {CONFIG} has {want}: {_COPY}"
        )
    leaves = [_placed(arrays[name], leaf) for name, leaf in wanted.items()]
    return {part: jax.tree.unflatten(jax.tree.structure(abstract), leaves)}

  def arrays(self, parameters: int | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of model.safetensors by their names, verified.

    Args:
      parameters: how many numbers the model has. None takes the number of
        config.json.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    count = parameters or self.record["weights"]["parameters"]
    data = self._content(WEIGHTS, 4 * count + _HEADER_BYTES)
    path = self.directory / WEIGHTS
    try:
      views = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
      raise manifest.CheckpointError(
        f"{path}: no safetensors file: {text.first_line(error)}: {_COPY}"
      ) from error
    arrays = {}
    for name, view in views:
      if view["dtype"] not in DTYPES:
        raise manifest.CheckpointError(
          f"{path}: array {reading.shown_name(name)} has dtype "
          f"{view['dtype']}, and exports have {' or '.join(DTYPES)}"
        )
      flat = np.frombuffer(view["data"], DTYPES[view["dtype"]])
      arrays[name] = flat.reshape(view["shape"])
    return arrays

  def _content(self, name, most):
    """Return a file's content after comparing it with config.json."""
    path, wanted = self.directory / name, self.record["files"].get(name)
    if wanted is None:
      raise manifest.CheckpointError(
        f"{self.directory / CONFIG}: has no checksum of {name}: {_COPY}"
      )
    try:
      # Sizes are compared before contents are read.
      size = path.stat().length
      data = reading.read(path, min(size, most), inside=within(self.directory))
    except FileNotFoundError:
      problem = "missing"
    except OSError as error:
      problem = error.strerror or text.first_line(error)
    except reading.ReadError as error:
      problem = error.reason
    else:
      if data.startswith(LFS):
        problem = "a pointer of Git LFS and not the file; run git lfs pull"
      elif size != wanted["bytes"]:
        problem = f"has {size:,} bytes, and not {wanted['bytes']:,}"
      elif sha256(data) != wanted["sha256"]:
        problem = "is not what was exported (the sha256 differs)"
      else:
        return data
    raise manifest.CheckpointError(f"{path}: {problem}: {_COPY}")


def _checked(tree):
  """Return the values of a config.json; raise ValueError if they are wrong."""
  if not is_record(tree):
    raise ValueError("is not the config.json of an exported model")
  reading.check(tree, {"format_version": int})
  if tree["format_version"] != FORMAT_VERSION:
    raise ValueError(
      f"has format version {tree['format_version']}, and this program reads "
      f"version {FORMAT_VERSION}: install a later version of aoarm_jax"
    )
  reading.check(tree, _RECORD)
  if checksum(tree) != tree["sha256"]:
    raise ValueError(
      "is not what was exported (its sha256 differs): take back the change, "
      f"or {_COPY}"
    )
  if tree["weights"]["part"] not in PARTS:
    raise ValueError(f"weights.part is not one of {', '.join(PARTS)}")
  return tree


def _shape(leaf):
  """Return a shape for messages."""
  return "absent" if leaf is None else f"[{','.join(map(str, leaf.shape))}]"


def _placed(array, abstract):
  """Return an array as float32 with the sharding of its abstract leaf."""
  values = array.astype(np.float32)
  if abstract.sharding is None:
    return jnp.asarray(values)
  return jax.make_array_from_callback(
    abstract.shape, abstract.sharding, lambda index: values[index]
  )
