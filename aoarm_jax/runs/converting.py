"""Make a run of a left-to-right model of Hugging Face: --mode=convert.

The run has one checkpoint, of step 0, and no optimizer. A `causal` run has the
logits of the source. A run of `two_stream` or `decoupled_rope` has them from
left to right, because it has config.model.shifted.
"""

import functools
import json
import os
import runpy
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import experiments, hugging_face, paths
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets
from aoarm_jax.devices import distributed, meshes, switches
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import (
  checkpoint,
  disk,
  exported,
  identity,
  patience,
)
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import hugging_face as arrays_lib

EXPERIMENT = "adapt.py"
_FACTS = "converted.json"
# The most positions of aoarm_jax.convert where none are asked for.
_USUAL_T = 1024
_FILE = '''"""Trains further what was converted from {source}.

  python -m aoarm_jax.main --config={path} --workdir=...
"""

import pathlib

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    {name!r},
    variant,
    {{"default": {{}}}},
    train={train} | {{"start_from": str(pathlib.Path(__file__).parent)}},
{sections}  )
'''


def of_folder(
  folder: os.PathLike | str,
  workdir: os.PathLike | str,
  *,
  mechanism: str,
  T: int | None,
  sentinels: int,
  progress: bool,
) -> str:
  """Convert a folder on the devices here; see aoarm_jax.convert."""
  switches.check_not_forked()
  place = paths.reached(paths.of(folder, "folder"), "folder")
  target = paths.reached(paths.of(workdir, "workdir"), "workdir")
  _check_mechanism("mechanism", mechanism)
  source = arrays_lib.read_config(place)
  get_config = runpy.run_path(f"{experiments.folder() / mechanism}.py")
  config = config_lib.from_config_dict(get_config["get_config"]())
  if T is None:
    T = min(_USUAL_T, source.positions)
  T = config_rules.whole_number("T", T)
  config = config.replace("model.T", T)
  sentinels = config_rules.whole_number("sentinels", sentinels)
  config = config.replace("model.sentinels", sentinels)
  seconds = config.telemetry.patience_seconds if progress else 0
  argv = ["aoarm_jax.convert", os.fspath(folder), os.fspath(workdir)]
  with patience.on_stderr(seconds), switches.fixed_types():
    convert(config, place, target, argv, flag="workdir")
  return os.fspath(target)


def convert(
  config: config_lib.Config,
  folder: epath.Path,
  workdir: epath.Path,
  argv: Sequence[str],
  overridden: Iterable[str] = (),
  *,
  flag: str = "--workdir",
) -> None:
  """Make a run of a model of Hugging Face: --mode=convert.

  Every device reads its own pieces of the arrays, one parameter at a time. So
  the memory holds the parameters in float32, spread over the mesh, and pieces
  of one more parameter.

  Args:
    config: gives the mechanism, T and all that no source decides. The folder
      gives the backbone and the tokenizer.
    folder: the folder of the model.
    workdir: run directory, which holds no run yet.
    argv: the command line, which is written to the run directory.
    overridden: paths of fields that the command line set, such as "model.D".
    flag: how the user named the run directory, for messages.

  Raises:
    CheckpointError: the folder is damaged, or the backbone has no such model.
    DataError: tokenizer.json is missing, or does not fit the model.
    ConfigError: the config does not fit the model, or `workdir` holds a run.
    OSError: the run cannot be written.
  """
  run_dir.check_workdir(workdir, flag)
  if "://" in str(folder):
    raise config_lib.ConfigError(
      f"{folder}: models of Hugging Face are read from a folder of this "
      "machine; copy it here"
    )
  if distributed.process_0_says(functools.partial(_is_taken, workdir)):
    raise config_lib.ConfigError(
      f"{flag}={workdir}: holds a model already; name another folder, as in "
      f"{flag}={identity.another(workdir)}"
    )
  source = arrays_lib.read_config(folder)
  config = config_rules.validate(_fitted(config, source, {*overridden}))
  tokenizer = alphabets.of_hugging_face(
    folder / alphabets.FILE, source.vocabulary
  )
  mesh = meshes.of_run(config)
  network = network_lib.Network(config, mesh, tokenizer)
  shapes = exported.names(network.abstract_params)
  with (
    arrays_lib.Arrays(folder, source, shapes) as arrays,
    jax.set_mesh(mesh),
    patience.waiting(f"reading {folder}"),
  ):
    leaves = [arrays.leaf(name, leaf) for name, leaf in shapes.items()]
  structure = jax.tree.structure(network.abstract_params)
  params = jax.tree.unflatten(structure, leaves)
  _write(config, folder, source, workdir, argv, network, params)
  logging.info(
    "converted: %s (%s) to %s, %s parameters, T=%s: %s; to train it further: "
    "--config=%s",
    folder,
    source.architecture,
    config.model.mechanism,
    f"{run_dir.parameter_count(params):,}",
    f"{config.model.T:,}",
    workdir,
    workdir / EXPERIMENT,
  )


def _is_taken(workdir):
  """Return whether a run directory holds a model."""
  return exported.is_export(workdir) or (workdir / "checkpoints").exists()


def _check_mechanism(name, mechanism):
  """Raise ConfigError unless weights can be converted to a mechanism."""
  if mechanism not in hugging_face.MECHANISMS:
    raise config_lib.ConfigError(
      f"{name}={mechanism!r}: left-to-right models are converted to "
      f"{', '.join(hugging_face.MECHANISMS)}"
    )


def _fitted(config, source, overridden):
  """Return the config with the backbone and the tokenizer of a source."""
  _check_mechanism("config.model.mechanism", config.model.mechanism)
  shifted = not config.model.kind.left_to_right
  fields = source.fields | {"shifted": shifted}
  for name, value in fields.items():
    asked = getattr(config.model, name)
    if f"model.{name}" in overridden and asked != value:
      raise config_lib.ConfigError(
        f"config.model.{name}={asked!r}: the source decides it, and has "
        f"{value!r}; leave it out"
      )
    config = config.replace(f"model.{name}", value)
  if source.positions < config.model.T:
    raise config_lib.ConfigError(
      f"config.model.T={config.model.T}: the source was made for "
      f"{source.positions:,} positions (max_position_embeddings); take at most "
      "that many"
    )
  if config.data.documents != "join":
    raise config_lib.ConfigError(
      f"config.data.documents={config.data.documents!r}: the end of a document "
      "would be one more symbol than the source has; take join"
    )
  for name, value in (
    ("data.tokenizer", "bpe"),
    ("data.vocabulary", 0),
    ("data.tokenizer_file", ""),
    ("train.start_from", ""),
  ):
    config = config.replace(name, value)
  return config


def _write(config, folder, source, workdir, argv, network, params):
  """Write the run directory; the checkpoint comes last."""
  config_json = config_lib.to_json(config)
  tokenizer = network.tokenizer
  if jax.process_index() == 0:
    run_dir.describe_run(
      workdir, config_json=config_json, argv=argv, params=params
    )
    disk.write_atomically(workdir / checkpoint.TOKENIZER, tokenizer.state)
    facts = {
      "from": os.fspath(folder),
      "architecture": source.architecture,
      "bos": source.bos,
      "eos": source.eos,
    }
    disk.write_atomically(workdir / _FACTS, json.dumps(facts) + "\n")
    disk.write_atomically(
      workdir / EXPERIMENT, _experiment(config, folder.name, workdir)
    )
  with checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  ) as checkpoints:
    checkpoints.save(
      0,
      {"params": params},
      data_state=identity.record({}, tokenizer.sha256),
      config_json=config_json,
      tokenizer=tokenizer.state,
    )


def _experiment(config, source, workdir):
  """Return an experiment file whose runs begin with the converted weights."""
  sections: dict[str, dict[str, Any]] = {"train": {}}
  before = config_lib.leaves(config_lib.Config())
  for (path, _, value), (_, _, usual) in zip(config_lib.leaves(config), before):
    _, section, *field = path.split(".")
    if field and value != usual:
      sections.setdefault(section, {})[field[0]] = value
  train = sections.pop("train")
  lines = [f"    {name}={fields!r},\n" for name, fields in sections.items()]
  return _FILE.format(
    source=source,
    path=workdir / EXPERIMENT,
    name=workdir.name,
    train=train,
    sections="".join(lines),
  )
