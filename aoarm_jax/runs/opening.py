"""Opening a run that was trained before: its config, network and parameters."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is open for reading.

  Attributes:
    config: what it is read with.
    trained: the config that the checkpoint was trained with.
    step: of the checkpoint.
    network: with the run's tokenizer, on the mesh of the devices here.
    params: the EMA where the run kept one, else the parameters; on the mesh.
    text: sha256 of the splits that the run read, by split.
  """

  config: config_lib.Config
  trained: config_lib.Config
  step: int
  network: network_lib.Network
  params: Any
  text: dict[str, str]


def read_config(workdir: epath.Path) -> config_lib.Config:
  """Returns the configuration of a run, as it was last started.

  Raises:
    CheckpointError: there is no run.
    ConfigError: its config.json cannot be read.
  """
  path = workdir / "config.json"
  try:
    config = config_lib.from_json(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise checkpoint.CheckpointError(
      f"{path}: no such file; {workdir} is not the directory of a run"
    ) from None
  except ValueError as error:
    raise config_lib.ConfigError(f"{path}: {error}") from error
  if config.data.corpus != "docstrings":
    return config
  # Earlier versions trained on docstrings. Generation and scoring need no text.
  logging.warning(
    "%s: config.data.corpus='docstrings': this program no longer reads "
    "docstrings. An evaluation reads the built-in novels, which this run was "
    "not trained on, unless --config.data.path= names a text",
    path,
  )
  return config.replace("data.corpus", "auto")


# An evaluation takes these from the run beside its model: the text and the law.
_EVALUATED = ("data.corpus", "data.path", "train.least_time")


def as_trained(
  config: config_lib.Config, workdir: epath.Path, overridden: Iterable[str]
) -> config_lib.Config:
  """Returns the config with the model and the text of the run in `workdir`.

  How to evaluate and to sample stays the config's, and differs by mechanism.

  Args:
    config: of the command line.
    workdir: of the run; without a config.json `config` is returned as it is.
    overridden: paths as "model.T" that the command line set, which stay; if
      they do not fit, `open_run` says so.

  Raises:
    ConfigError: the run is of another mechanism than the config.
  """
  if not (workdir / "config.json").exists():
    return config
  run, kept = read_config(workdir), set(overridden)
  was, mechanism = run.model.mechanism, config.model.mechanism
  if was != mechanism:
    raise config_lib.ConfigError(
      f"config.model.mechanism={mechanism!r}: the run in {workdir} is of "
      f"{was!r}: give the --config that it was trained with (experiment "
      f"{run.name!r}), or another --workdir"
    )
  for path, field, value in config_lib.leaves(run):
    path = path.removeprefix("config.")
    taken = field.metadata.get("binds") == "model" or path in _EVALUATED
    if taken and path not in kept:
      config = config.replace(path, value)
  return config


def open_run(
  workdir: epath.Path, config: config_lib.Config, *batches: str
) -> Run:
  """Restores the newest, or best, whole checkpoint onto the devices here.

  Args:
    workdir: of the run.
    config: of the command line; its model must be the checkpoint's, its mesh
      may be any.
    *batches: what the mesh must divide, see sharding.of_run.

  Raises:
    CheckpointError: there is no (whole) checkpoint.
    ConfigError: the checkpoint is of another model; names the field.
  """
  checkpoints = checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  )
  mesh = sharding.of_run(config, *batches)
  best = config.checkpoint.read == "best"
  saved = checkpoints.best() if best else checkpoints.newest()
  if saved is None:
    raise checkpoint.CheckpointError(
      f"no checkpoint{' with a validation' * best} in "
      f"{workdir / 'checkpoints'}: train first, or name the run with --workdir"
    )
  trained = config_lib.from_json(saved.config_json)
  for path, old, new in config_rules.differences(trained, config, ("model",)):
    raise config_lib.ConfigError(
      f"{path}={new!r}: the checkpoint in {workdir} has {old!r}; it is of "
      "another model: set the field to its value, or name another --workdir"
    )
  network = network_lib.Network(config, mesh)
  field = "ema" if trained.optimizer.ema_decay > 0 else "params"
  with jax.set_mesh(mesh):
    params = checkpoints.restore(saved, {field: network.abstract_params})[field]
  logging.info(
    "restored step %s of %s%s",
    f"{saved.step:,}",
    workdir,
    " (EMA)" if field == "ema" else "",
  )
  return Run(
    config, trained, saved.step, network, params, saved.data_state["text"]
  )


def warn_other_text(text: dict[str, str], corpus, *splits: str) -> None:
  """Warns where a text is not the one that the run read.

  Args:
    text: sha256 by split, of the run.
    corpus: corpora.Corpus, of now.
    *splits: that are read.
  """
  for split in splits:
    recorded = text.get(split)
    if recorded is None:
      logging.info(
        "the checkpoint knows no %s text: whether this one is its run's is not "
        "checked",
        split,
      )
    elif recorded != corpus.hash(split):
      logging.warning(
        "the %s text is not the checkpoint's (sha256 %s now, %s then): numbers "
        "cannot be compared with that run's",
        split,
        corpus.hash(split)[:12],
        recorded[:12],
      )
