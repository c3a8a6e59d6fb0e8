"""What an earlier run left: its config and its parameters."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import checkpoint


@dataclasses.dataclass(frozen=True)
class Restored:
  """What reading a run needs.

  Attributes:
    saved: the checkpoint's record.
    bind: params -> network.
    params: the EMA where the run kept one, else the parameters; on the mesh.
    tokenizer: the model's.
  """

  saved: checkpoint.Saved
  bind: network_lib.Bind
  params: Any
  tokenizer: tokenizers.Tokenizer


def read_config(workdir: epath.Path) -> config_lib.Config:
  """The configuration of a run, as it was last started.

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
  # Runs of earlier versions: their models need no text to generate and score.
  logging.warning(
    "%s: config.data.corpus='docstrings': this program no longer reads "
    "docstrings. An evaluation reads the built-in novels, which this run was "
    "not trained on, unless --config.data.path= names a text", path,
  )  # fmt: skip
  data = dataclasses.replace(config.data, corpus="auto")
  return dataclasses.replace(config, data=data)


# What an evaluation takes from the run beside its model: the text and the law.
_EVALUATED = ("data.corpus", "data.path", "train.least_time")


def as_trained(
  config: config_lib.Config, workdir: epath.Path, overridden: Iterable[str]
) -> config_lib.Config:
  """The config, but of the model and the text that the run in `workdir` has.

  How to evaluate and to sample stays the config's, and differs by mechanism.

  Args:
    config: of the command line.
    workdir: of the run; without a config.json `config` is returned as it is.
    overridden: paths as "model.T" that the command line set, which stay; if
      they do not fit, `restore` says so.

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
    section, _, name = path.partition(".")
    taken = field.metadata.get("binds") == "model" or path in _EVALUATED
    if taken and path not in kept:
      part = dataclasses.replace(getattr(config, section), **{name: value})
      config = dataclasses.replace(config, **{section: part})
  return config


def check_trained(config: config_lib.Config, workdir: epath.Path) -> None:
  """Raises CheckpointError where there is no checkpoint; reads none of any."""
  if not _checkpoints(workdir).steps():
    raise _no_checkpoint(config, workdir)


def _checkpoints(workdir):
  return checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  )


def _no_checkpoint(config, workdir):
  validated = " with a validation" * (config.checkpoint.read == "best")
  return checkpoint.CheckpointError(
    f"no checkpoint{validated} in {workdir / 'checkpoints'}: train first, or "
    "name the run with --workdir"
  )


def restore(
  config: config_lib.Config, workdir: epath.Path, mesh: jax.sharding.Mesh
) -> Restored:
  """Restores the newest, or best, whole checkpoint onto any mesh.

  Args:
    config: of the command line; its model must be the checkpoint's.
    workdir: of the run.
    mesh: any number of devices.

  Raises:
    CheckpointError: there is no (whole) checkpoint.
    ConfigError: the checkpoint is of another model; names the field.
  """
  checkpoints = _checkpoints(workdir)
  best = config.checkpoint.read == "best"
  saved = checkpoints.best() if best else checkpoints.newest()
  if saved is None:
    raise _no_checkpoint(config, workdir)
  before = config_lib.from_json(saved.config_json)
  for path, old, new in config_rules.differences(before, config, ("model",)):
    raise config_lib.ConfigError(
      f"{path}={new!r}: the checkpoint in {workdir} has {old!r}; it is of "
      "another model: set the field to its value, or name another --workdir"
    )
  tokenizer = tokenizers.get(config.data.tokenizer)
  bind = network_lib.Bind(
    config.model,
    config.compute,
    tokenizer.V,
    mesh,
    config.mesh.smallest_shard,
  )
  field = "ema" if before.optimizer.ema_decay > 0 else "params"
  abstract = network_lib.abstract_on(bind, bind.abstract_params)
  params = checkpoints.restore(saved, {field: abstract})[field]
  logging.info(
    "restored step %s of %s%s",
    f"{saved.step:,}", workdir, " (EMA)" if field == "ema" else "",
  )  # fmt: skip
  return Restored(saved, bind, params, tokenizer)


def warn_other_text(saved: checkpoint.Saved, corpus, *splits: str) -> None:
  """Says so where a text is not the one that the checkpoint knows."""
  for split in splits:
    recorded = saved.data_state["text"].get(split)
    if recorded is None:
      logging.info(
        "the checkpoint knows no %s text: whether this one is its run's is not "
        "checked", split,
      )  # fmt: skip
    elif recorded != corpus.hash(split):
      logging.warning(
        "the %s text is not the checkpoint's (sha256 %s now, %s then): numbers "
        "cannot be compared with that run's",
        split, corpus.hash(split)[:12], recorded[:12],
      )  # fmt: skip
