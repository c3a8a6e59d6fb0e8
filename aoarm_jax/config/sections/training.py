"""Training: the optimizer, the run, and what it is matched to."""

import dataclasses

from aoarm_jax.config.sections import fields

LORA_TARGETS = (
  *("attention", "query", "key", "value", "out"),
  *("mlp", "gate", "up", "down"),
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW and its learning-rate schedule (aoarm_jax/training/optimizer.py)."""

  peak_learning_rate: float = fields.field(
    2e-3,
    "learning rate per step at the end of the warmup",
    above=0.0,
    binds="run",
  )
  schedule: str = fields.field(
    "cosine",
    "learning rate after the warmup; stable_decay: constant, then linear decay",
    choices=("cosine", "constant", "stable_decay"),
    binds="run",
  )
  warmup_steps: int = fields.field(
    200, "number of steps of linear warmup", low=0, binds="run"
  )
  final_share: float = fields.field(
    0.1,
    "cosine and stable_decay: learning rate at the end, divided by the peak; "
    "the schedule reaches it one step after the last one, so the last step has "
    "a slightly higher rate",
    low=0.0,
    high=1.0,
    binds="run",
  )
  decay_steps: int = fields.field(
    500,
    "stable_decay only: number of steps of the decay",
    low=1,
    binds="run",
  )
  b1: float = fields.field(
    0.9,
    "Adam: decay rate of the first moment",
    low=0.0,
    below=1.0,
    binds="run",
  )
  b2: float = fields.field(
    0.98,
    "Adam: decay rate of the second moment",
    low=0.0,
    below=1.0,
    binds="run",
  )
  eps: float = fields.field(1e-8, "Adam: epsilon", above=0.0, binds="run")
  weight_decay: float = fields.field(
    0.1,
    "decoupled weight decay, applied to matrices only",
    low=0.0,
    binds="run",
  )
  clip_norm: float = fields.field(
    1.0,
    "gradients are scaled down to this global norm at most",
    above=0.0,
    binds="run",
  )
  ema_decay: float = fields.field(
    0.0,
    "decay rate per step of the exponential moving average (EMA) of the "
    "parameters; 0 keeps no EMA",
    low=0.0,
    below=1.0,
    binds="run",
  )


@dataclasses.dataclass(frozen=True)
class Train:
  """Training (aoarm_jax/training/loop.py)."""

  steps: int = fields.field(
    2000, "number of optimizer steps", low=1, binds="run"
  )
  batch_size: int = fields.field(
    512, "number of sequences per step, over all devices", low=1, binds="run"
  )
  query_fraction: float = fields.field(
    1.0,
    "two_stream only: share of the ranks that are predicted; they are drawn "
    "at random",
    above=0.0,
    high=1.0,
    binds="run",
  )
  start_from: str = fields.field(
    "",
    "run directory of another run, or an exported model, whose weights a new "
    "run begins with; the optimizer and the schedule begin anew, at step 0; '' "
    "draws new weights",
    binds="run",
  )
  start_from_ema: bool = fields.field(
    True,
    "start_from: take the moving average of the weights if that run has one, "
    "and not its last weights",
    binds="run",
  )
  lora_rank: int = fields.field(
    0,
    "rank r of the adapters that are trained in place of the weights of "
    "lora_targets (LoRA); all other arrays are frozen, apart from start/*, "
    "which the mechanism adds to the backbone; 0 trains the weights themselves",
    low=0,
    binds="run",
  )
  lora_alpha: float = fields.field(
    16.0,
    "lora_rank only: the product of the two arrays of an adapter is multiplied "
    "by lora_alpha / lora_rank",
    above=0.0,
    binds="run",
  )
  lora_targets: tuple[str, ...] = fields.field(
    ("attention", "mlp"),
    "lora_rank only: weights that get adapters; attention: query, key, value "
    "and out; mlp: gate (swiglu), up and down",
    choices=LORA_TARGETS,
    binds="run",
  )
  frozen: tuple[str, ...] = fields.field(
    (),
    "patterns of names of arrays that are not trained, such as embedding or "
    "blocks/mlp/*; parameters.txt of a run lists the names; a pattern behind ! "
    "exempts what it matches, and the last pattern that matches decides",
    of=str,
    binds="run",
  )
  distill: str = fields.field(
    "",
    "run directory or exported model of a left-to-right model with the same "
    "symbols, the teacher: wherever a row knows exactly the text before its "
    "target, the loss also has the divergence from the teacher's law; '' has "
    "no teacher",
    binds="run",
  )
  distill_weight: float = fields.field(
    1.0,
    "distill only: the divergence is multiplied by this and by the square of "
    "the temperature",
    above=0.0,
    binds="run",
  )
  distill_temperature: float = fields.field(
    1.0,
    "distill only: the logits of teacher and student are divided by it in the "
    "divergence",
    above=0.0,
    binds="run",
  )
  least_time: float = fields.field(
    1e-3,
    "mdlm only: t_min, the least expected share of masked tokens",
    above=0.0,
    below=1.0,
    binds="run",
  )


@dataclasses.dataclass(frozen=True)
class Match:
  """Makes this experiment as large or as long as another experiment."""

  to: str = fields.field(
    "",
    "the other experiment, such as two_stream or two_stream:long: a file in "
    "the folder of this one, or an experiment of this package; without a "
    "variant it has the variant of this experiment; '' matches nothing",
  )
  by: str = fields.field(
    "training_flops",
    "quantity that is made equal: the FLOPs of the whole training, or the "
    "number of parameters",
    choices=("training_flops", "parameters"),
  )
  change: str = fields.field(
    "steps",
    "field that is changed for this: train.steps, or a field of model",
    choices=("steps", "L", "D", "mlp_width"),
  )
  steps: int = fields.field(
    0,
    "train.steps of the other experiment; 0 means the value in its config",
    low=0,
  )
