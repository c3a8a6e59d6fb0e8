"""Begin a run with the weights of another run: config.train.start_from."""

import json
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import backbone
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import disk, identity, opening, patience, places

_FIELD = "config.train.start_from"
# Fields of a model that may differ from those of the other run. Some of them
# decide shapes with some mechanisms, so the shapes are compared, too.
_MAY_DIFFER = (
  "config.model.T",
  "config.model.rope_base",
  *(f"config.model.{name}" for name in backbone.SCALING),
  "config.model.sentinels",
  "config.data.documents",
)
_FILE = "start.json"


class Weights(NamedTuple):
  """Weights that a new run begins with.

  Attributes:
    params: nested dict of float32 arrays, on the mesh of the new run.
    source: the run directory that they come from.
    step: steps of its checkpoint.
    part: "ema" or "params", the part of its state that they are.
  """

  params: Any
  source: epath.Path
  step: int
  part: str

  def describe(self, workdir: epath.Path) -> None:
    """Write start.json into a run directory.

    Raises:
      OSError: the file cannot be written.
    """
    facts = {"from": str(self.source), "step": self.step, "weights": self.part}
    disk.write_atomically(workdir / _FILE, json.dumps(facts) + "\n")


def read(
  network: network_lib.Network,
  tokenizer: tokenizers.Tokenizer,
  workdir: epath.Path,
) -> Weights:
  """Read the weights that config.train.start_from names.

  config.checkpoint.read chooses the checkpoint.

  Args:
    network: the network of the new run, on its mesh.
    tokenizer: the tokenizer of the new run, without an end of documents.
    workdir: run directory of the new run.

  Raises:
    ConfigError: it is the new run itself, or its model or its tokenizer does
      not fit. The message names the field.
    CheckpointError: there is no checkpoint, or it cannot be read.
  """
  config = network.config
  source = places.find(config.train.start_from, _FIELD)
  if _same_folder(source, workdir):
    raise config_lib.ConfigError(
      f"{_FIELD}={source}: is the --workdir of this run itself; name another "
      f"--workdir, as in --workdir={identity.another(workdir)}"
    )
  with opening.stored(source) as checkpoints:
    saved = opening.chosen(
      checkpoints, config, source, f"name a trained run with --{_FIELD}"
    )
    trained = identity.config_of(saved)
    _check(saved, trained, network, tokenizer, source)
    part = opening.part_of(saved, source, last=not config.train.start_from_ema)
    with patience.waiting(f"reading checkpoint step {saved.step:,}"):
      params = opening.weights(checkpoints, saved, part, network, tokenizer)
  logging.info(
    "start: %s of step %s of %s; the optimizer and the schedule begin anew",
    "the EMA" if part == "ema" else "the parameters",
    f"{saved.step:,}",
    source,
  )
  return Weights(params, source, saved.step, part)


def _same_folder(first, second):
  return (
    first.exists() and second.exists() and first.resolve() == second.resolve()
  )


def _check(saved, trained, network, tokenizer, source):
  """Raise ConfigError if the weights of a checkpoint do not fit a network.

  Args:
    saved: the checkpoint.
    trained: its config.
    network: the network of the new run.
    tokenizer: the tokenizer of the new run, without an end of documents.
    source: the run directory of the checkpoint.
  """
  config, run = network.config, f"{_FIELD}={source}"
  fields = list(config_rules.differences(trained, config, ("model",)))
  for path, then, now in fields:
    if path not in _MAY_DIFFER:
      raise config_lib.ConfigError(
        f"{path}={now!r}: {run} has {then!r}; set the field to its value, or "
        "start without its weights"
      )
  identity.check_same_symbols(saved, config, tokenizer.sha256, _FIELD, source)
  there = network_lib.Network(trained, None, tokenizer).abstract_params
  shapes = zip(
    jax.tree.leaves_with_path(network.abstract_params),
    jax.tree.leaves(there),
    strict=True,
  )
  for (place, here), other in shapes:
    if here.shape != other.shape:
      name = jax.tree_util.keystr(place, simple=True, separator="/")
      changed = " and ".join(f"{field}={now!r}" for field, _, now in fields)
      values = " and ".join(repr(then) for _, then, _ in fields)
      raise config_lib.ConfigError(
        f"{changed}: {run} has {values}, and with the mechanism "
        f"{trained.model.mechanism} shapes of parameters depend on it ({name}: "
        f"{here.shape} here, {other.shape} there); set it back, or start "
        "without these weights"
      )
  for field, then, now in fields:
    logging.info("start: %s=%r, and %r in %s", field, now, then, source)
