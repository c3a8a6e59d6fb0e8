"""The files in configs/: where they are, their builder, and their variants."""

import difflib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from aoarm_jax.config import paths
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
# The dense models of Qwen3 (arXiv 2505.09388) share these fields.
_QWEN3 = {
  "model.T": 1024,
  "model.head_size": 128,
  "model.kv_heads": 8,
  "model.mlp": "swiglu",
  "model.rope_base": 1e6,
  "data.tokenizer": "bpe",
  "data.vocabulary": 151_936,
  "train.batch_size": 128,
  "train.steps": 10_000,
  "optimizer.peak_learning_rate": 1e-4,
  "optimizer.warmup_steps": 500,
  "eval.every": 1000,
  "sample.every": 1000,
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
  # 524 million tokens.
  "bpe": {
    "model.T": 256,
    "data.tokenizer": "bpe",
    "data.vocabulary": 4096,
    "train.batch_size": 256,
    "train.steps": 8000,
    "optimizer.peak_learning_rate": 4e-3,
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
  # GPT-2's small model and the size of its vocabulary: 32,768 tokens a step.
  "124m": {
    "model.T": 1024,
    "model.D": 768,
    "model.L": 12,
    "model.N": 12,
    "model.tied": True,
    "data.tokenizer": "bpe",
    "data.vocabulary": 50_257,
    "train.batch_size": 32,
    "train.steps": 100_000,
    "optimizer.peak_learning_rate": 6e-4,
    "optimizer.warmup_steps": 2000,
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
  "qwen3-0.6b": _QWEN3
  | {
    "model.D": 1024,
    "model.L": 28,
    "model.N": 16,
    "model.mlp_width": 3072,
    "model.tied": True,
  },
  "qwen3-1.7b": _QWEN3
  | {
    "model.D": 2048,
    "model.L": 28,
    "model.N": 16,
    "model.mlp_width": 6144,
    "model.tied": True,
  },
  "qwen3-8b": _QWEN3
  | {
    "model.D": 4096,
    "model.L": 36,
    "model.N": 32,
    "model.mlp_width": 12_288,
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


def folder() -> pathlib.Path:
  """Return the folder of the experiments that come with this package.

  A wheel has them in aoarm_jax/configs, and a checkout in configs/ beside
  aoarm_jax/.
  """
  package = pathlib.Path(__file__).resolve().parents[1]
  inside = package / "configs"
  return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
  """Return the names of the experiments that come with this package."""
  return sorted(path.stem for path in folder().glob("*.py"))


def find(text: str) -> str:
  """Return the path of an experiment's file, with the variant behind it.

  Args:
    text: an experiment as a user names it. A name without a folder and without
      .py, as in "two_stream:tiny", is an experiment of this package. So is
      "configs/two_stream.py:tiny" where the current folder has no such file.
      Any other text is a path and is returned as it is.

  Raises:
    ConfigError: this package has no experiment of that name, or the text is an
      address.
  """
  if address := paths.scheme(text):
    raise config_lib.ConfigError(
      f"--config={text}: an experiment's file is not read from {address}...: "
      "copy it to this machine and name the copy, or name an experiment of "
      "this package, as in --config=two_stream:tiny"
    )
  path, colon, variant = text.partition(":")
  if re.fullmatch(r"\w+", path):
    if path not in names():
      near = difflib.get_close_matches(path, names(), 1)
      hint = (
        f"did you mean {near[0]}?"
        if near
        else "there are: " + ", ".join(names())
      )
      raise config_lib.ConfigError(
        f"--config={text}: there is no experiment {path!r}; {hint} (A file of "
        f"your own has a path, as in --config=./{path}.py)"
      )
    return f"{folder() / path}.py{colon}{variant}"
  name = re.fullmatch(r"configs/(\w+)\.py", path)
  if name and name[1] in names() and not os.path.exists(path):
    return f"{folder() / name[1]}.py{colon}{variant}"
  return text


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
