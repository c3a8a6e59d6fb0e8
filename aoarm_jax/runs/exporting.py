"""Write a model as a folder that other tools read: --mode=export.

exported.py says what the folder holds, and reads it.
"""

import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from safetensors import numpy as safetensors_numpy

from aoarm_jax.config import paths, reading
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import neighbours, switches
from aoarm_jax.runs import (
  card,
  disk,
  exported,
  foreign_layout,
  metrics,
  opening,
  patience,
  places,
)
from aoarm_jax.runs import directory as run_dir

# The sections of a config that an exported model is used with. The others say
# how and where the run was computed.
_SECTIONS = (
  *("model", "data", "orders", "optimizer", "train"),
  *("eval", "sample", "score", "compute"),
)
_REPORT_BYTES = 1 << 24
# The types of a report of --mode=eval and of a validation, see reading.check.
_ESTIMATE = {
  "estimator": str,
  "unit": str,
  "bits_per_token": float,
  "bits_per_byte?": (float, None),
  "bits_per_char?": (float, None),
  "standard_error_bits?": (float, None),
  "tokens": reading.Count(),
}
_REPORT = {
  "step": reading.Count(),
  "split": str,
  "sha256": str,
  "estimates": [_ESTIMATE],
}


class Model(NamedTuple):
  """What is written into the folder of an exported model.

  Attributes:
    params: the weights, a nested dict of arrays.
    part: "ema" for the moving average, "params" for the last weights.
    config: the config of the training.
    vocabulary: V.
    tokenizer: the state of the tokenizer; b"" if the config fixes it.
    training: what config.json says of the training, see exported.py.
    evaluations: what config.json says of the quality, see exported.py.
  """

  params: Any
  part: str
  config: config_lib.Config
  vocabulary: int
  tokenizer: bytes
  training: dict[str, Any]
  evaluations: list[dict[str, Any]]


def of_workdir(
  workdir: os.PathLike | str,
  folder: os.PathLike | str,
  *,
  dtype: str,
  weights: str,
  layout: str,
  read: str,
  step: int | None,
  progress: bool,
) -> str:
  """Export a run on the devices here; see aoarm_jax.export."""
  switches.check_not_forked()
  source = places.find(workdir)
  config = opening.config_here(source, read, step)
  config = config.replace("export", config_lib.Export(weights, dtype, layout))
  config_rules.validate(config)
  seconds = config.telemetry.patience_seconds if progress else 0
  with patience.on_stderr(seconds), switches.fixed_types():
    target = paths.of(folder, "folder")
    export(config, source, target, flag="folder", step=step)
  return os.fspath(target)


def export(
  config: config_lib.Config,
  workdir: epath.Path,
  folder: epath.Path,
  *,
  flag: str = "--out",
  step: int | None = None,
) -> None:
  """Export a checkpoint of a run: --mode=export.

  The folder appears at once, when all its files are whole.

  Args:
    config: its sections export, checkpoint and mesh are read.
    workdir: run directory, or the folder of an exported model.
    folder: the folder to be made. It may stand there empty.
    flag: how the user named the folder, for messages.
    step: training steps of the checkpoint, in place of checkpoint.read.

  Raises:
    CheckpointError, ConfigError: see opening.open_run; or the folder is not
      empty, or there are several processes.
    OSError: the folder cannot be written.
  """
  if neighbours.several():
    raise config_lib.ConfigError(
      "config.distributed.enabled=True: an export runs in a single process"
    )
  _check_place(folder, flag)  # Said before the checkpoint is read.
  is_foreign = config.export.layout == "hugging_face"
  if is_foreign:
    foreign_layout.check(config.model)
  run = opening.open_run(
    workdir, config, step=step, last=config.export.weights == "last"
  )
  if is_foreign:
    files = foreign_layout.files(run.network, run.params, config.export.dtype)
    _write(folder, files, flag)
    logging.info(
      "exported: step %s of %s for transformers: %s",
      f"{run.step:,}",
      workdir,
      folder,
    )
    return
  model = Model(
    params=run.params,
    part=run.part,
    config=opening.read_config(workdir),
    vocabulary=run.network.vocabulary,
    tokenizer=run.network.tokenizer.state,
    **_history(run, workdir),
  )
  write(folder, model, config.export.dtype, flag=flag)
  logging.info("exported: step %s of %s: %s", f"{run.step:,}", workdir, folder)


def write(
  folder: epath.Path,
  model: Model,
  dtype: str,
  *,
  flag: str = "--out",
  others: Mapping[str, bytes] | None = None,
) -> None:
  """Write the folder of an exported model; it appears at once, and whole.

  Args:
    folder: the folder to be made. It may stand there empty.
    model: what is written.
    dtype: of the weights, "float32" or "bfloat16".
    flag: how the user named the folder, for messages.
    others: further files for people, by name. No code reads them.

  Raises:
    ConfigError: the folder is not empty, or cannot be made.
    OSError: the folder cannot be written.
  """
  _check_place(folder, flag)
  number = np.dtype(jax.numpy.dtype(dtype))
  arrays = {
    name: np.ascontiguousarray(jax.device_get(leaf)).astype(number)
    for name, leaf in exported.names(model.params).items()
  }
  files = {
    exported.WEIGHTS: safetensors_numpy.save(arrays, {"format": "np"}),
  }
  if model.tokenizer:
    files[exported.TOKENIZER] = model.tokenizer
  record = _record(model, files, dtype)
  files |= others or {}
  files[exported.CARD] = card.text(record).encode()
  # The last file, since a folder without it is no exported model.
  files[exported.CONFIG] = (json.dumps(record, indent=2) + "\n").encode()
  _write(folder, files, flag)
  logging.info(
    "%s: %s, %s parameters in %s, %.1f MB",
    folder,
    "EMA" if model.part == "ema" else "last weights",
    f"{record['weights']['parameters']:,}",
    dtype,
    sum(map(len, files.values())) / 1e6,
  )


def _record(model, files, dtype):
  """Return the values of config.json.

  Args:
    model: the Model.
    files: the content of the other files that have checksums, by name.
    dtype: name of the dtype of the weights.
  """
  record = {
    "format": exported.FORMAT,
    "format_version": exported.FORMAT_VERSION,
    "written_by": f"aoarm_jax {_version()}",
    "config": _without_places(model.config),
    "vocabulary": model.vocabulary,
    "weights": {
      "part": model.part,
      "dtype": dtype,
      "parameters": run_dir.parameter_count(model.params),
    },
    "training": model.training,
    "evaluations": model.evaluations,
    "files": {
      name: {"bytes": len(data), "sha256": exported.sha256(data)}
      for name, data in files.items()
    },
  }
  return record | {"sha256": exported.checksum(record)}


def _history(run, workdir):
  """Return what is known about the training and the quality of the weights."""
  if exported.is_export(workdir):
    record = exported.Exported(workdir).record
    return {name: record[name] for name in ("training", "evaluations")}
  trained, text = run.trained, run.saved.data_state.get("text", {})
  model, step = trained.model, run.step
  usual = "ema" if trained.optimizer.ema_decay > 0 else "params"
  return {
    "training": {
      "step": step,
      "tokens": step * trained.train.batch_size * model.T,
      "corpus": trained.data.corpus,
      "path": last_part(trained.data.path),
      "started_from": last_part(trained.train.start_from),
      "checkpoint": run.saved.digest,
      "text": text,
      "switches": run.saved.data_state.get("switches", {}),
    },
    # Evaluations read the moving average if there is one.
    "evaluations": [
      *_evaluated(workdir, step),
      *_validated(workdir, step, trained.eval.split, text),
    ]
    if run.part == usual
    else [],
  }


def _evaluated(workdir, step):
  """Yield the newest estimates of --mode=eval for a checkpoint."""
  newest = {}
  for path in sorted((workdir / "evaluations").glob(f"step_{step:08d}_*.json")):
    try:
      data = reading.read(path, _REPORT_BYTES, inside=workdir)
      report = reading.parse(data, _REPORT)
    except (OSError, ValueError) as error:
      logging.warning("%s is left out of the export: %s", path, error)
      continue
    for estimate in report["estimates"]:
      row = _row("evaluation", report["split"], report["sha256"], estimate)
      newest[row["split"], row["estimator"]] = row
  yield from newest.values()


def _validated(workdir, step, split, text):
  """Yield the validation of training at a checkpoint."""
  for record in metrics.read(workdir):
    if (record["step"], record["kind"]) != (step, "valid"):
      continue
    try:
      reading.check(record, _ESTIMATE)
    except ValueError:  # Earlier versions wrote other records.
      continue
    yield _row("validation", split, text.get(split, ""), record)


def _row(source, split, sha256, estimate):
  """Return an estimate as it stands in config.json."""
  values = {
    name: estimate[name]
    for name in (key.removesuffix("?") for key in _ESTIMATE)
    if estimate.get(name) is not None
  }
  return {"source": source, "split": split, "sha256": sha256} | values


def _without_places(config):
  """Return the sections of a config as a dict, without names of places."""
  for path in exported.PLACES:
    config = config.replace(path, "")
  tree = dataclasses.asdict(config)
  return {name: tree[name] for name in ("name", "variant", "seed", *_SECTIONS)}


def last_part(path: str) -> str:
  """Return the name of a file or a folder, without the folders above."""
  return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _version():
  """Return the version of this package, as pip knows it."""
  try:
    return importlib.metadata.version("aoarm_jax")
  except importlib.metadata.PackageNotFoundError:
    return "(not installed)"


def _check_place(folder, flag):
  """Raise ConfigError unless a folder may be made at this place."""
  run_dir.check_workdir(folder, flag)
  paths.reached(folder, flag)
  if folder.exists() and any(folder.iterdir()):
    raise config_lib.ConfigError(
      f"{flag}={folder}: the folder is not empty; name a new one"
    )


def _write(folder, files, flag):
  """Write all files of a folder, so that it is whole or absent.

  A bucket has no folders that could be renamed. There config.json is written
  last.
  """
  if "://" in str(folder):
    for name, data in files.items():
      disk.write_atomically(folder / name, data)
    return
  folder = epath.Path(os.path.abspath(folder))
  temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed.
  try:
    for name, data in files.items():
      disk.write_atomically(temporary / name, data)
    if folder.exists():
      folder.rmdir()
    os.rename(temporary, folder)
  except OSError as error:
    shutil.rmtree(temporary, ignore_errors=True)
    raise OSError(error.errno, error.strerror, os.fspath(folder)) from error
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
