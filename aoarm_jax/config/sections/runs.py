"""The fields of what a run saves, exports and reports."""

import dataclasses

from aoarm_jax.config.sections import fields


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Saving and choosing checkpoints (aoarm_jax/runs/checkpoint.py)."""

  every: int = fields.field(500, "steps between saves", low=1)
  keep_last: int = fields.field(
    2, "number of newest checkpoints that are kept", low=1
  )
  keep_best: int = fields.field(
    1, "number of best checkpoints, by validation, that are kept", low=0
  )
  read: str = fields.field(
    "newest",
    "checkpoint that the modes eval, sample, score, benchmark and export and "
    "train.start_from read; best: by validation",
    choices=("newest", "best"),
  )


@dataclasses.dataclass(frozen=True)
class Export:
  """A model as a folder for other tools (aoarm_jax/runs/exporting.py)."""

  weights: str = fields.field(
    "ema",
    "weights that --mode=export writes; ema: the moving average if the run has "
    "one, and else the last weights; last: the last weights",
    choices=("ema", "last"),
  )
  dtype: str = fields.field(
    "float32",
    "dtype of the weights that --mode=export writes",
    choices=("float32", "bfloat16"),
  )
  layout: str = fields.field(
    "aoarm_jax",
    "what --mode=export writes; aoarm_jax: a folder for load; hugging_face: a "
    "folder of Qwen3 or Llama for transformers, of a causal model with "
    "mlp=swiglu and one sentinel",
    choices=("aoarm_jax", "hugging_face"),
  )


@dataclasses.dataclass(frozen=True)
class Telemetry:
  """The reports of a run (aoarm_jax/runs/telemetry.py)."""

  log_every: int = fields.field(50, "steps between log lines", low=1)
  patience_seconds: float = fields.field(
    2.0,
    "seconds of compiling or other waiting after which a line says what takes "
    "long; 0 says nothing",
    low=0.0,
  )
  tensorboard: bool = fields.field(
    False, "also write TensorBoard events; in --mode=train alone"
  )
  wandb: str = fields.field(
    "",
    "also send metrics to this project of Weights & Biases, as project or "
    "entity/project; in --mode=train alone; '' sends nothing",
  )
  profile_start: int = fields.field(
    -1, "first step that is profiled; -1 profiles nothing", low=-1
  )
  profile_steps: int = fields.field(5, "number of profiled steps", low=1)
