"""The builder of the files in configs/, and the variants of an experiment."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from aoarm_jax.config import schema as config_lib

_LARGE = {
  "model.T": 1024,
  "data.corpus": "text8",
  "optimizer.warmup_steps": 2000,
  "eval.every": 5000,
  "sample.every": 5000,
  "checkpoint.every": 1000,
  "compute.scan_layers": True,
  "compute.remat": True,
  "mesh.fsdp": 0,
}
# The fields that each variant changes, for every mechanism alike. An experiment
# file may change further fields.
VARIANTS: dict[str, dict[str, Any]] = {
  "default": {},
  "long": {
    "model.T": 1024,
    "train.batch_size": 64,
  },
  "base": {
    "model.T": 256,
    "model.D": 768,
    "model.L": 12,
    "model.N": 12,
    "data.corpus": "text8",
    "train.batch_size": 512,
    "train.steps": 200_000,
    "optimizer.peak_learning_rate": 5e-4,
    "optimizer.warmup_steps": 2000,
    "optimizer.ema_decay": 0.9999,
    "eval.every": 5000,
    "sample.every": 5000,
    "checkpoint.every": 2500,
  },
  "1b": _LARGE
  | {
    "model.D": 2048,
    "model.L": 20,
    "model.N": 16,
    "train.batch_size": 512,
    "train.steps": 50_000,
    "optimizer.peak_learning_rate": 3e-4,
  },
  "7b": _LARGE
  | {
    "model.D": 4096,
    "model.L": 32,
    "model.N": 32,
    "train.batch_size": 1024,
    "train.steps": 100_000,
    "optimizer.peak_learning_rate": 2e-4,
  },
  "tiny": {
    "model.T": 64,
    "model.D": 64,
    "model.L": 3,
    "model.N": 2,
    "train.batch_size": 32,
    "train.steps": 2400,
    "optimizer.warmup_steps": 100,
    "optimizer.peak_learning_rate": 6e-3,
    "eval.every": 300,
    "eval.batches": 32,
    "sample.every": 600,
    "checkpoint.every": 300,
    "compute.dtype": "float32",
  },
}


def experiment(
  name: str,
  variant: str,
  variants: Mapping[str, Mapping[str, Any]] = VARIANTS,
  **changes: Mapping[str, Any],
) -> ml_collections.ConfigDict:
  """Return the locked ConfigDict of an experiment file.

  Args:
    name: the name of the experiment, usually that of its file.
    variant: a key of `variants`. "" selects the default variant.
    variants: the changes of each variant: {name: {"section.field": value}}.
    **changes: changes by section, as section=dict(field=value). They are
      applied after the changes of the variant.

  Returns:
    A locked ConfigDict with every field of the schema.

  Raises:
    ConfigError: the variant is unknown.
  """
  variant = variant or "default"
  if variant not in variants:
    raise config_lib.ConfigError(
      f"configs/{name}.py has no variant {variant!r}; it has: "
      + ", ".join(variants)
    )
  config = config_lib.to_config_dict(
    config_lib.Config(name=name, variant=variant)
  )
  with config.ignore_type():
    for path, value in variants[variant].items():
      section, field = path.split(".")
      config[section][field] = value
    for section, fields in changes.items():
      config[section].update(fields)
  return config
