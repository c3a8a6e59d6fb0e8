"""Open a trained run: its config, its network and its parameters.

An exported model (exported.py) is opened like a run with a single checkpoint.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import paths
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes
from aoarm_jax.model import adapters
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import (
  agreement,
  alphabet,
  checkpoint,
  exported,
  identity,
  patience,
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is open for reading.

  Attributes:
    config: the config that the run is read with.
    trained: the config that the checkpoint was trained with.
    saved: the checkpoint, apart from its arrays.
    network: the network with the run's tokenizer, on the mesh of the local
      devices.
    params: the EMA if the run has one, else the parameters; on the mesh.
    part: the part of the training state that they are: "ema" or "params".
  """

  config: config_lib.Config
  trained: config_lib.Config
  saved: checkpoint.Saved
  network: network_lib.Network
  params: Any
  part: str

  @property
  def step(self) -> int:
    """Training steps of the checkpoint."""
    return self.saved.step


# Both are read in the same way.
Stored = checkpoint.Checkpoints | exported.Exported


@contextlib.contextmanager
def stored(workdir: epath.Path) -> Iterator[Stored]:
  """Yield the checkpoints of a run, or an exported model in their place.

  Args:
    workdir: run directory, or the folder of an exported model.

  Raises:
    CheckpointError: config.json of an exported model is damaged.
  """
  if exported.is_export(workdir):
    yield exported.Exported(workdir)
    return
  with checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  ) as checkpoints:
    yield checkpoints


def config_here(
  workdir: epath.Path, read: str, step: int | None
) -> config_lib.Config:
  """Return the config of a run for reading it on the devices here.

  The mesh and the attention must fit the devices here, and not those of
  training.

  Args:
    workdir: run directory, or the folder of an exported model.
    read: "newest" or "best", the checkpoint to read.
    step: training steps of the checkpoint to read, in place of `read`.

  Raises:
    CheckpointError, ConfigError: see `read_config`; or a value is wrong.
  """
  config = read_config(workdir)
  if step is not None:
    config_rules.whole_number("step", step)
    if read != "newest":
      raise config_lib.ConfigError(
        f"step={step}: does not go with read={read!r}; give one of the two"
      )
  return for_these_devices(config.replace("checkpoint.read", read))


def read_config(workdir: epath.PathLike) -> config_lib.Config:
  """Return the config of a run, as the run was last started.

  Args:
    workdir: run directory.

  Raises:
    CheckpointError: the directory has no config.json, or that of an exported
      model is damaged.
    ConfigError: config.json cannot be read.
  """
  workdir = paths.of(workdir, "workdir")
  tree, path = exported.read_json(workdir), workdir / exported.CONFIG
  if exported.is_record(tree):
    return exported.Exported(workdir).config
  try:
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
      is_foreign = isinstance(tree, dict) and "architectures" in tree
      hint = "; a model of Hugging Face becomes a run by aoarm_jax.convert"
      raise ValueError(
        "is the config.json neither of a run nor of an exported model of "
        f"aoarm_jax{hint * is_foreign}"
      )
    config = config_lib.from_dict(tree)
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


def for_these_devices(config: config_lib.Config) -> config_lib.Config:
  """Return the config of a run, to be read on the devices of this process.

  The mesh and the attention fit these devices, and not those of training.

  Args:
    config: the config that `read_config` returned.
  """
  config = config.replace("mesh", config_lib.Mesh())
  return config.replace("compute.attention", "auto")


# Besides the model, an evaluation takes these fields from the run: the text,
# its documents, its form, the smallest time of the ELBO, and the groups.
# Generation and scores follow the groups that the model was trained with.
_EVALUATED = (
  "data.corpus",
  "data.path",
  "data.lines",
  "data.text_field",
  "data.held_out_share",
  "data.normalise",
  "train.least_time",
  "orders.groups",
  "orders.group_width",
  "orders.group_sizes",
)


def as_trained(
  config: config_lib.Config, workdir: epath.PathLike, overridden: Iterable[str]
) -> config_lib.Config:
  """Return the config with the model and the text of the run in `workdir`.

  All other fields keep the config's values. Among them are the sections eval
  and sample, whose defaults differ by mechanism.

  Args:
    config: the config of the command line.
    workdir: run directory. If it has no config.json, `config` is returned
      unchanged. An exported model does not say where its text lies, so the text
      of `config` is kept.
    overridden: paths of fields that the command line set, such as "model.T".
      They keep their values. `open_run` refuses values that do not fit.

  Raises:
    ConfigError: the run has another mechanism than the config.
  """
  workdir = paths.of(workdir, "workdir")
  if not (workdir / "config.json").exists():
    return config
  run, kept = read_config(workdir), set(overridden)
  if exported.is_export(workdir):  # It does not say where the text lies.
    kept |= {"data.corpus", *exported.PLACES}
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
    if is_taken and path not in kept:
      config = config.replace(path, value)
  return config


def open_run(
  workdir: epath.PathLike,
  config: config_lib.Config,
  *batches: str,
  step: int | None = None,
  last: bool = False,
) -> Run:
  """Restore a checkpoint of a run onto the local devices.

  Without a step, config.checkpoint.read selects the newest or the best complete
  checkpoint.

  Args:
    workdir: run directory.
    config: the config of the command line. Its model must be the model of the
      checkpoint. Its mesh may differ.
    *batches: the batches that the mesh must divide: "train", "eval", see
      meshes.of_run.
    step: training steps of the checkpoint to read.
    last: whether to read the last parameters even if the run has an EMA.

  Raises:
    CheckpointError: there is no complete checkpoint, or none of this step, or
      an exported model does not have the last parameters.
    ConfigError: the checkpoint has another model, and the message names the
      field; or the mesh does not fit the devices, the model or a batch.
    DataError: config.data asks for another tokenizer than the checkpoint's.
  """
  workdir = paths.of(workdir, "workdir")
  mesh = meshes.of_run(config, *batches)
  with stored(workdir) as checkpoints:
    return _opened(workdir, config, mesh, checkpoints, step, last)


def chosen(
  checkpoints: Stored,
  config: config_lib.Config,
  workdir: epath.Path,
  advice: str,
) -> checkpoint.Saved:
  """Return the checkpoint that config.checkpoint.read chooses.

  Args:
    checkpoints: of a run.
    config: the config of the command line.
    workdir: directory of the run.
    advice: how to mend it if there is none, for the message.

  Raises:
    CheckpointError: there is none.
    ConfigError: the processes see different checkpoints.
  """
  best = config.checkpoint.read == "best"
  saved = checkpoints.best() if best else checkpoints.newest()
  if saved is None:
    raise checkpoint.CheckpointError(
      f"no checkpoint{' with a validation' * best} in "
      f"{workdir / 'checkpoints'}: {advice}"
    )
  agreement.check_checkpoint(checkpoints, saved)
  return saved


def part_of(
  saved: checkpoint.Saved, workdir: epath.Path, last: bool = False
) -> str:
  """Return the part of a checkpoint that holds the weights.

  Args:
    saved: the checkpoint.
    workdir: its run directory, for messages.
    last: whether the last parameters are wanted even if there is an EMA.

  Returns:
    "ema" or "params".

  Raises:
    CheckpointError: an exported model does not have the last parameters.
  """
  if last and "params" not in saved.parts:
    raise checkpoint.CheckpointError(
      f"{workdir}: holds the moving average of the weights only, "
      "and the last weights are asked for: take them from the run"
    )
  return "params" if last or "ema" not in saved.parts else "ema"


def weights(
  checkpoints: Stored,
  saved: checkpoint.Saved,
  part: str,
  network: network_lib.Network,
  tokenizer: tokenizers.Tokenizer,
) -> Any:
  """Read the weights of a checkpoint, with its adapters merged.

  Args:
    checkpoints: of the run, or an exported model.
    saved: the checkpoint.
    part: "ema" or "params", see `part_of`.
    network: the network that takes the weights, on its mesh, which is set.
    tokenizer: its tokenizer, without an end of documents.

  Returns:
    Nested dict of float32 arrays, as network.abstract_params.

  Raises:
    CheckpointError: the arrays cannot be read, or are not those of `network`.
  """
  if "frozen" not in saved.parts:
    return checkpoints.restore(saved, {part: network.abstract_params})[part]
  train = identity.config_of(saved).train
  adapted = network_lib.Network(network.config, network.mesh, tokenizer, train)
  trained, frozen = adapters.split(adapted.abstract_params, train)
  state = checkpoints.restore(saved, {part: trained, "frozen": frozen})
  return adapters.reader(network.axes, train)(state[part], state["frozen"])


def _opened(workdir, config, mesh, checkpoints, step, last):
  """Return the Run of a checkpoint, see `open_run`."""
  steps = checkpoints.steps()
  if step is not None and steps:
    if step not in steps:
      raise checkpoint.CheckpointError(
        f"no checkpoint of step {step} in {checkpoints.directory}; steps "
        f"there: {', '.join(map(str, steps))}"
      )
    saved = checkpoints.at(step)
    agreement.check_checkpoint(checkpoints, saved)
  else:
    saved = chosen(
      checkpoints,
      config,
      workdir,
      "train first, or name the run with --workdir",
    )
  trained = identity.config_of(saved)
  identity.check_same_model(saved, config, workdir)
  tokenizer = alphabet.of_state(checkpoints.tokenizer(saved), config, workdir)
  network = network_lib.Network(config, mesh, tokenizer)
  field = part_of(saved, workdir, last)
  with (
    jax.set_mesh(mesh),
    patience.waiting(f"reading checkpoint step {saved.step:,}"),
  ):
    params = weights(checkpoints, saved, field, network, tokenizer)
  logging.info(
    "restored step %s of %s%s",
    f"{saved.step:,}",
    workdir,
    " (EMA)" if field == "ema" else "",
  )
  return Run(config, trained, saved, network, params, field)
