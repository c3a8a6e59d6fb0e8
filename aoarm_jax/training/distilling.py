"""The teacher of a run: config.train.distill.

The state of the run holds the weights of the teacher, and teacher.json its
config. So the run resumes without the teacher's run.
"""

from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import disk, identity, opening, patience, places

_FIELD = "config.train.distill"
_FILE = "teacher.json"


def network(
  config: config_lib.Config,
  student: network_lib.Network,
  tokenizer: tokenizers.Tokenizer,
  workdir: epath.Path,
) -> network_lib.Network:
  """Return the network of the teacher, on the mesh of the student.

  Args:
    config: the config of the run.
    student: the network of the run, on its mesh.
    tokenizer: the tokenizer of the run, without an end of documents.
    workdir: run directory. If the run has begun there, the config of the
      teacher is read from teacher.json.

  Raises:
    ConfigError: the teacher does not fit the run. The message says why.
    CheckpointError: the teacher is no run.
  """
  mesh = student.mesh
  assert mesh is not None  # Training always has a mesh.
  source = f"{_FIELD}={config.train.distill}"
  if (workdir / _FILE).exists():
    text = (workdir / _FILE).read_text()
    teacher = config_lib.from_json(text)
  else:
    teacher = opening.read_config(places.find(config.train.distill, _FIELD))
  teacher = config_lib.Config(
    model=teacher.model, data=teacher.data, compute=config.compute
  )
  _check(teacher, config, source)
  try:
    meshes.check(mesh, teacher)
  except config_lib.ConfigError as error:
    raise config_lib.ConfigError(f"{source}: on its mesh: {error}") from error
  made = network_lib.Network(teacher, mesh, tokenizer)
  if made.vocabulary != student.vocabulary:
    raise config_lib.ConfigError(
      f"{source}: predicts {made.vocabulary} symbols, and this run "
      f"{student.vocabulary}: config.data.documents and config.model.sentinels "
      "decide whether the end of a document is a symbol; give both the same"
    )
  return made


def _check(teacher, config, source):
  """Raise ConfigError if a teacher cannot teach a run."""
  if not teacher.model.kind.left_to_right:
    raise config_lib.ConfigError(
      f"{source}: is of the mechanism {teacher.model.mechanism}; name a run of "
      "a left-to-right mechanism, such as causal"
    )
  if teacher.model.T < config.model.T:
    raise config_lib.ConfigError(
      f"{source}: reads {teacher.model.T} tokens at most; config.model.T="
      f"{config.model.T} must not exceed that"
    )
  if teacher.data.tokenizer != config.data.tokenizer:
    raise config_lib.ConfigError(
      f"{source}: has config.data.tokenizer={teacher.data.tokenizer!r}, and "
      f"this run {config.data.tokenizer!r}; both must have the same symbols"
    )


def describe(teacher: network_lib.Network, workdir: epath.Path) -> None:
  """Write teacher.json into a run directory.

  Raises:
    OSError: the file cannot be written.
  """
  text = config_lib.to_json(teacher.config)
  disk.write_atomically(workdir / _FILE, text + "\n")


def read(
  teacher: network_lib.Network,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
) -> Any:
  """Read the weights of the teacher: its moving average if it has one.

  Args:
    teacher: its network.
    config: the config of the run. config.checkpoint.read chooses the
      checkpoint.
    tokenizer: the tokenizer of the run, without an end of documents.

  Returns:
    Nested dict of float32 arrays, on the mesh.

  Raises:
    ConfigError: the teacher has other symbols.
    CheckpointError: there is no checkpoint, or it cannot be read.
  """
  source = places.find(config.train.distill, _FIELD)
  with opening.stored(source) as checkpoints:
    saved = opening.chosen(
      checkpoints, config, source, f"name a trained run with --{_FIELD}"
    )
    identity.check_same_model(saved, teacher.config, source)
    identity.check_same_symbols(saved, config, tokenizer.sha256, _FIELD, source)
    part = opening.part_of(saved, source)
    with patience.waiting(f"reading the teacher of step {saved.step:,}"):
      weights = opening.weights(checkpoints, saved, part, teacher, tokenizer)
  logging.info("teacher: step %s of %s", f"{saved.step:,}", source)
  return jax.block_until_ready(weights)
