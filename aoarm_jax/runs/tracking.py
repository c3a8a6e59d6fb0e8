"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases.

Both are extras that a config must ask for. Each takes the numbers of a record
under the names "<kind>/<estimator>/<metric>".
"""

import dataclasses
import importlib.util
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import disk, metrics, text

# The library and the extra of every field that asks for one.
_LIBRARIES = {
  "tensorboard": ("tensorboardX", "tensorboard"),
  "wandb": ("wandb", "wandb"),
}
_ID_FILE = "wandb.txt"
_LONGEST_ID = 128


def check(telemetry: config_lib.Telemetry) -> None:
  """Check that the libraries which a config asks for are installed.

  Raises:
    ConfigError: one is not; names the extra that has it.
  """
  for field, (library, extra) in _LIBRARIES.items():
    value = getattr(telemetry, field)
    if value and not _is_installed(library):
      raise config_lib.ConfigError(
        f"config.telemetry.{field}={value}: {library} is not installed; pip "
        f"install 'aoarm_jax[{extra}]'"
      )


def _is_installed(library):
  """Return whether a library is here, and not just a folder of its name."""
  spec = importlib.util.find_spec(library)
  return spec is not None and spec.origin is not None


def start(
  config: config_lib.Config, workdir: epath.Path, start_step: int
) -> list[metrics.Tracker]:
  """Open the trackers that a config asks for; the primary process calls this.

  Args:
    config: the config of the run.
    workdir: run directory.
    start_step: the step from which the run resumes; 0 begins a new record.

  Raises:
    ConfigError: a library is missing, or Weights & Biases refuses the run.
  """
  check(config.telemetry)
  trackers: list[metrics.Tracker] = []
  if config.telemetry.tensorboard:
    trackers.append(_TensorBoard(workdir, start_step))
  if config.telemetry.wandb:
    trackers.append(_WandB(config, workdir, start_step))
  return trackers


class _TensorBoard:
  """Event files in tensorboard/ of the run directory."""

  def __init__(self, workdir: epath.Path, start_step: int) -> None:
    import tensorboardX  # An extra that is not always installed.

    self._events = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"),
      purge_step=start_step + 1 if start_step else 0,
    )

  def write(self, record: Mapping[str, Any]) -> None:
    for name, value in scalars(record).items():
      self._events.add_scalar(name, value, record["step"])

  def close(self, failed: bool = False) -> None:
    del failed  # TensorBoard shows no such thing.
    self._events.close()


class _WandB:
  """A run of Weights & Biases, which a resumed run continues.

  Steps that a killed run has sent already are sent again. Weights & Biases
  keeps the first values of a step.
  """

  def __init__(
    self, config: config_lib.Config, workdir: epath.Path, start_step: int
  ) -> None:
    import wandb  # An extra that is not always installed.

    wanted = config.telemetry.wandb
    entity, _, project = wanted.rpartition("/")
    try:
      self._run = wandb.init(
        project=project,
        entity=entity or None,
        id=_id(workdir, start_step),
        resume="allow",
        name=workdir.name,
        dir=str(workdir) if "://" not in str(workdir) else None,
        config=dataclasses.asdict(config),
        settings=wandb.Settings(silent=True, console="off"),
      )
    except Exception as error:  # Each release raises other errors.
      raise config_lib.ConfigError(
        f"config.telemetry.wandb={wanted}: Weights & Biases cannot start: "
        f"{text.first_line(error).rstrip('.')}; log in with `wandb login`, set "
        "WANDB_MODE=offline, or leave the field out"
      ) from error
    place = self._run.dir if self._run.offline else self._run.url
    logging.info("Weights & Biases: %s", place)
    self._is_lost = False

  def write(self, record: Mapping[str, Any]) -> None:
    self._attempt(self._run.log, scalars(record), step=record["step"])

  def close(self, failed: bool = False) -> None:
    self._attempt(self._run.finish, exit_code=int(failed))

  def _attempt(
    self, send: Callable[..., object], *args: Any, **kwargs: Any
  ) -> None:
    """Send something; a run goes on where the service is lost."""
    if self._is_lost:
      return
    try:
      send(*args, **kwargs)
    except Exception as error:  # Each release raises other errors.
      self._is_lost = True
      logging.warning(
        "Weights & Biases takes no more metrics: %s; metrics.jsonl has them "
        "all, and the run goes on",
        text.first_line(error),
      )


def _id(workdir: epath.Path, start_step: int) -> str:
  """Return the name that the run has at Weights & Biases."""
  path = workdir / _ID_FILE
  if start_step and path.exists():
    return reading.read(path, _LONGEST_ID, inside=workdir).decode().strip()
  name = uuid.uuid4().hex[:8]
  disk.write_atomically(path, name + "\n")
  return name


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
  """Return the numbers of a record of metrics.jsonl, by their full names."""
  prefix = "/".join(
    record[name] for name in ("kind", "estimator") if name in record
  )
  return {
    f"{prefix}/{name}": value
    for name, value in record.items()
    if name != "step" and isinstance(value, (int, float))
  }
