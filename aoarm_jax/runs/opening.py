"""Open a trained run: its config, its network and its parameters."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.devices import sharding
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is open for reading.

  Attributes:
    config: the config that the run is read with.
    trained: the config that the checkpoint was trained with.
    step: training steps of the checkpoint.
    network: the network with the run's tokenizer, on the mesh of the local
      devices.
    params: the EMA if the run has one, else the parameters; on the mesh.
    text: sha256 of every split that the run read, by the split's name.
  """

  config: config_lib.Config
  trained: config_lib.Config
  step: int
  network: network_lib.Network
  params: Any
  text: dict[str, str]


def read_config(workdir: epath.Path) -> config_lib.Config:
  """Return the config of a run, as the run was last started.

  Args:
    workdir: run directory.

  Raises:
    CheckpointError: the directory has no config.json.
    ConfigError: config.json cannot be read.
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
  # Earlier versions could train on docstrings. Generation and scoring need no
  # text, so such a run can still be opened.
  logging.warning(
    "%s: config.data.corpus='docstrings': this program no longer reads "
    "docstrings. An evaluation reads the built-in novels, which this run was "
    "not trained on, unless --config.data.path= names a text",
    path,
  )
  return config.replace("data.corpus", "auto")


# Besides the model, an evaluation takes these fields from the run: the text,
# the smallest time of the ELBO, and the groups. Generation and scores follow
# the groups that the model was trained with.
_EVALUATED = (
  "data.corpus",
  "data.path",
  "train.least_time",
  "orders.groups",
  "orders.group_width",
  "orders.group_sizes",
)


def as_trained(
  config: config_lib.Config, workdir: epath.Path, overridden: Iterable[str]
) -> config_lib.Config:
  """Return the config with the model and the text of the run in `workdir`.

  All other fields keep the config's values. Among them are the sections eval
  and sample, whose defaults differ by mechanism.

  Args:
    config: the config of the command line.
    workdir: run directory. If it has no config.json, `config` is returned
      unchanged.
    overridden: paths of fields that the command line set, such as "model.T".
      They keep their values. `open_run` refuses values that do not fit.

  Raises:
    ConfigError: the run has another mechanism than the config.
  """
  if not (workdir / "config.json").exists():
    return config
  run, overridden = read_config(workdir), set(overridden)
  trained, mechanism = run.model.mechanism, config.model.mechanism
  if trained != mechanism:
    raise config_lib.ConfigError(
      f"config.model.mechanism={mechanism!r}: the run in {workdir} is of "
      f"{trained!r}: give the --config that it was trained with (experiment "
      f"{run.name!r}), or another --workdir"
    )
  for path, field, value in config_lib.leaves(run):
    path = path.removeprefix("config.")
    is_taken = field.metadata.get("binds") == "model" or path in _EVALUATED
    if is_taken and path not in overridden:
      config = config.replace(path, value)
  return config


def open_run(
  workdir: epath.Path, config: config_lib.Config, *batches: str
) -> Run:
  """Restore a checkpoint of a run onto the local devices.

  config.checkpoint.read selects the newest or the best complete checkpoint.

  Args:
    workdir: run directory.
    config: the config of the command line. Its model must be the model of the
      checkpoint. Its mesh may differ.
    *batches: the batches that the mesh must divide: "train", "eval", see
      sharding.of_run.

  Raises:
    CheckpointError: there is no complete checkpoint.
    ConfigError: the checkpoint has another model, and the message names the
      field; or the mesh does not fit the devices, the model or a batch.
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


def warn_other_text(
  text: dict[str, str], corpus: corpora.Corpus, *splits: str
) -> None:
  """Log a warning if a split is not the text that the run read.

  Args:
    text: sha256 of the run's splits, by the split's name.
    corpus: the text that is read now.
    *splits: names of the splits to compare.
  """
  for split in splits:
    recorded = text.get(split)
    if recorded is None:
      logging.info(
        "the checkpoint does not record the %s text: this text is not compared "
        "with the run's",
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
