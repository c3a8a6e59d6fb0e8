"""The schema of the configuration: its sections, and how they are read.

The modules of `sections/` hold every field, with default, unit, and range. The
files `configs/*.py` return a locked `ml_collections.ConfigDict`. The
dataclasses of the sections define its fields, so overrides on the command line
are type-checked. All other code receives the dataclasses themselves. They are
frozen and hashable, so they can be static arguments of `jax.jit`.

Dimension letters used across the project:

  B batch            T targets (positions to generate)   S slots (keys)
  N heads            H head dim                          D model width
  F hidden width     V vocabulary                        L layers
  G streams          s sentinels         R rows: slots, and queries apart
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from aoarm_jax.config import errors, exit_codes, reading
from aoarm_jax.config.sections import (
  benchmark,
  data,
  devices,
  evaluation,
  fields,
  generation,
  model,
  orders,
  runs,
  study,
  training,
)

# All other code takes the sections and their choices from here.
Model = model.Model
Data = data.Data
Orders = orders.Orders
Optimizer = training.Optimizer
Train = training.Train
Match = training.Match
Eval = evaluation.Eval
Sample = generation.Sample
Score = evaluation.Score
Benchmark = benchmark.Benchmark
Compute = devices.Compute
Checkpoint = runs.Checkpoint
Export = runs.Export
Telemetry = runs.Telemetry
Mesh = devices.Mesh
Distributed = devices.Distributed
Study = study.Study
ORDER_FAMILIES = orders.ORDER_FAMILIES
ESTIMATORS = evaluation.ESTIMATORS
BENCHMARK_PARTS = benchmark.BENCHMARK_PARTS

# The types of fields, for people.
KINDS: dict[type, str] = {
  bool: "true or false (bool)",
  int: "a whole number (int)",
  float: "a number (float)",
  str: "a text (str)",
  tuple: "a tuple",
}


class ConfigError(errors.UserError, ValueError):
  """A value that the config refuses.

  The message is one line. It names the field, the value, and how to mend it.
  """

  exit_code = exit_codes.REFUSED


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of one experiment."""

  name: str = fields.field("experiment", "name of the experiment, for people")
  variant: str = fields.field("default", "name of its variant, for people")
  seed: int = fields.field(
    0, "seed of the parameters, batches and orders", low=0, binds="run"
  )
  model: Model = Model()
  data: Data = Data()
  orders: Orders = Orders()
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  match: Match = Match()
  eval: Eval = Eval()
  sample: Sample = Sample()
  score: Score = Score()
  benchmark: Benchmark = Benchmark()
  compute: Compute = Compute()
  checkpoint: Checkpoint = Checkpoint()
  export: Export = Export()
  telemetry: Telemetry = Telemetry()
  mesh: Mesh = Mesh()
  distributed: Distributed = Distributed()
  study: Study = Study()

  def replace(self, path: str, value: Any) -> "Config":
    """Return the config with a new value for one field or section.

    Args:
      path: a field, such as "train.steps" or "seed", or a section, such as
        "orders".
      value: the new value, of the field's type. rules.validate checks its
        range.
    """
    name, _, field = path.partition(".")
    if field:
      value = dataclasses.replace(getattr(self, name), **{field: value})
    return dataclasses.replace(self, **{name: value})

  @property
  def gives_end(self) -> bool:
    """True if the model is told where a padded document ends.

    The end is then no symbol that can be predicted.
    """
    return self.data.documents == "pad" and self.model.sentinels == 2

  @property
  def eval_batch_size(self) -> int:
    """Number of sequences per batch of an evaluation."""
    return self.eval.batch_size or self.train.batch_size


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
  """Return the config as a locked ConfigDict, for command-line overrides."""
  return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(config_dict: ml_collections.ConfigDict) -> Config:
  """Return the frozen config of a ConfigDict; rules.validate checks values."""
  return from_dict(config_dict.to_dict())


def from_dict(tree: dict[str, Any]) -> Config:
  """Return the config of a nested dict; absent fields take their defaults.

  Args:
    tree: the values by section and field.

  Raises:
    ConfigError: a field is unknown, or a value has the wrong type.
  """
  return _build(Config, tree, "config")


def to_json(config: Config) -> str:
  """Return the config as indented JSON with every field."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
  """Return the config that `to_json` wrote; see `from_dict`.

  Args:
    text: the JSON text, which may come from a stranger.

  Raises:
    ConfigError: the text is no JSON, or see `from_dict`.
  """
  try:
    tree = reading.parse(text)
  except ValueError as error:
    raise ConfigError(f"config: {error}") from error
  return from_dict(tree)


def no_such_field(
  path: str, name: str, section: type[Any] | Any
) -> ConfigError:
  """Return the error for a field that a section does not have.

  Args:
    path: the path of the section, such as "config.model".
    name: the unknown field.
    section: the dataclass of the section.
  """
  fields = [
    # The letters of the dimensions say little to a new user.
    f.name if len(f.name) > 1 else f"{f.name} ({f.metadata['doc']})"
    for f in dataclasses.fields(section)
  ]
  return ConfigError(
    f"{path}.{reading.shown_name(name)}: no such field; {path} has: "
    f"{', '.join(fields)} "
    "(--mode=config explains all fields)"
  )


def _build(cls, tree, path):
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if not isinstance(tree, dict):
    raise ConfigError(
      f"{path}={reading.shown(tree)}: a section; it has: {', '.join(fields)}"
    )
  for name in tree:
    if name not in fields:
      raise no_such_field(path, name, cls)
  values = {}
  for name, value in tree.items():
    kind = type(fields[name].default)
    if dataclasses.is_dataclass(kind):
      values[name] = _build(kind, value, f"{path}.{name}")
    else:
      values[name] = _cast(kind, value, f"{path}.{name}")
  return cls(**values)


def _cast(kind, value, path):
  if isinstance(value, np.generic):
    value = value.item()
  if kind is tuple and isinstance(value, (list, tuple)):
    return tuple(value)
  if kind is float and type(value) is int and abs(value) < 2**63:
    return float(value)
  if type(value) is not kind:
    raise ConfigError(f"{path}={reading.shown(value)}: must be {KINDS[kind]}")
  return value


def leaves(
  config: Any, path: str = "config"
) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
  """Yield (path, dataclass field, value) for every field that is no section.

  Args:
    config: a Config or one of its sections.
    path: the path of `config`, such as "config.model".
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from leaves(value, f"{path}.{field.name}")
    else:
      yield f"{path}.{field.name}", field, value
