"""Where a model lies that a user names: a folder, this package, or a hub.

huggingface_hub is an extra. It is imported in this module only.
"""

import os
import pathlib
import re
import types
from typing import Any

from etils import epath

from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import exported, manifest, patience, text

# Models that come with the package, a folder each.
MODELS = pathlib.Path(__file__).resolve().parents[1] / "models"
HUB = "hf:"
_NAME = re.compile(r"\w[\w.-]*")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Errors of huggingface_hub -> their meaning; every release has further ones.
_MEANINGS = {
  "RepositoryNotFoundError": "there is no such model, or it is private: log in "
  "with `hf auth login`",
  "GatedRepoError": "its owner must give you access first: log in with `hf "
  "auth login`",
  "RevisionNotFoundError": "the model has no such revision",
  "LocalEntryNotFoundError": "the hub cannot be reached, and the model is not "
  "in the cache",
  "LocalTokenNotFoundError": "nobody is logged in: log in with `hf auth login`",
}


class HubError(manifest.CheckpointError):
  """A model that cannot be downloaded from a hub, or uploaded."""


def find(source: os.PathLike | str, name: str = "workdir") -> epath.Path:
  """Return the folder of a run or of an exported model.

  Args:
    source: a folder, here or in a bucket; "hf:owner/name" or
      "hf:owner/name@revision" for a model of the Hugging Face hub, which is
      downloaded; or the name of a model of this package. A folder of that name
      goes first.
    name: the argument, flag or field that it was given for, for messages.

  Raises:
    ConfigError: `source` is no such place.
    CheckpointError: the name is neither a folder here nor a packaged model.
    HubError: the download failed.
  """
  if isinstance(source, str) and source.startswith(HUB):
    return _downloaded(source, name)
  path = paths.reached(paths.of(source, name), name)
  is_name = isinstance(source, str) and _NAME.fullmatch(source)
  if not is_name or path.exists():
    return path
  if (MODELS / str(source) / exported.CONFIG).exists():
    return epath.Path(MODELS / str(source))
  raise manifest.CheckpointError(
    f"{name}={source}: there is no such folder here, and this package has no "
    f"model of this name (it has {', '.join(packaged()) or 'none'}): name the "
    "directory of a run, or the folder of an exported model"
  )


def packaged() -> list[str]:
  """Return the names of the models that come with the package, sorted."""
  return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def push(
  folder: os.PathLike | str,
  repository: str,
  *,
  private: bool = True,
  message: str = "",
) -> str:
  """Upload an exported model to the Hugging Face hub; see aoarm_jax.push."""
  library = _library("push")
  _check_repository(repository, "repository")
  path = paths.of(folder, "folder")
  if not exported.is_export(path) and (path / "checkpoints").is_dir():
    raise manifest.CheckpointError(
      f"{path}: is a run: export it first, and push the exported folder"
    )
  source = exported.Exported(path)
  source.tokenizer(source.saved)
  source.arrays()  # A damaged file is not uploaded.
  step = source.saved.step

  def upload() -> str:
    hub = library.HfApi()
    url = hub.create_repo(repository, private=private, exist_ok=True)
    hub.upload_folder(
      repo_id=repository,
      folder_path=os.fspath(path),
      allow_patterns=[*exported.FILES],
      commit_message=message or f"aoarm_jax: a model of {step:,} steps",
    )
    return str(url)

  with patience.waiting(f"uploading {path}"):
    return _of_hub(upload, f"{HUB}{repository}", "uploaded")


def _downloaded(source: str, name: str) -> epath.Path:
  """Return the folder in the hub's cache that holds a model."""
  library = _library(source)
  repository, _, revision = source.removeprefix(HUB).partition("@")
  _check_repository(repository, name)

  def download() -> str:
    return str(
      library.snapshot_download(
        repository,
        revision=revision or None,
        allow_patterns=[*exported.FILES],
      )
    )

  with patience.waiting(f"downloading {source}"):
    return epath.Path(_of_hub(download, source, "downloaded"))


def _check_repository(repository: str, name: str) -> None:
  """Raise ConfigError unless a text is the name of a model of the hub."""
  if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
    raise config_lib.ConfigError(
      f"{name}={repository!r}: a model of the hub has the form owner/name"
    )


def _library(what: str) -> types.ModuleType:
  """Return huggingface_hub."""
  try:
    import huggingface_hub  # An extra that is not always installed.
  except ImportError as error:
    raise config_lib.ConfigError(
      f"{what}: huggingface_hub is not installed; pip install 'aoarm_jax[hub]'"
    ) from error
  return huggingface_hub


def _of_hub(call: Any, source: str, done: str) -> str:
  """Return what a call of the hub returns; its errors become one line."""
  try:
    result: str = call()
  except Exception as error:  # Each release raises other errors.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    meanings = [_MEANINGS[kind] for kind in kinds if kind in _MEANINGS]
    why = meanings[0] if meanings else text.first_line(error).rstrip(".")
    raise HubError(f"{source}: cannot be {done}: {why}") from error
  return result
