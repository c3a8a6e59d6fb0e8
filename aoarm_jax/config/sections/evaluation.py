"""Likelihoods: of a split, and of given texts."""

import dataclasses

from aoarm_jax.config.sections import fields

ESTIMATORS = (
  "any_order",
  "training_order",
  "left_to_right",
  "given_order",
  "ensembled",
  "context_ensembled",
  "elbo",
)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Likelihoods of a split (aoarm_jax/evaluation/)."""

  # Fields that decide which checkpoint is best may not change within a run.
  split: str = fields.field(
    "valid",
    "split that is evaluated",
    choices=("train", "valid", "test"),
    binds="run",
  )
  estimators: tuple[str, ...] = fields.field(
    ("any_order", "left_to_right"),
    "likelihoods to compute; training validates with the first estimator and "
    "picks the best checkpoint by it",
    choices=ESTIMATORS,
    binds="run",
  )
  every: int = fields.field(
    500, "steps between validations; 0 validates at the end only", low=0
  )
  batches: int = fields.field(
    24,
    "number of batches to read; 0 reads every whole window of T characters of "
    "the split",
    low=0,
    binds="run",
  )
  batch_size: int = fields.field(
    0,
    "number of sequences per batch; 0 means train.batch_size",
    low=0,
    binds="run",
  )
  ensemble_orders: int = fields.field(
    8,
    "ensembled: number K of orders per sequence; context_ensembled: number of "
    "permutations per rank",
    low=1,
    binds="run",
  )
  times: int = fields.field(
    8,
    "elbo only: number of times (masks) drawn per sequence",
    low=1,
    binds="run",
  )
  seed: int = fields.field(1, "seed of the orders", low=0, binds="run")


@dataclasses.dataclass(frozen=True)
class Score:
  """Log-probabilities of given texts (aoarm_jax/evaluation/score.py)."""

  order: str = fields.field(
    "left_to_right",
    "order of the scored positions; uniform: probabilities are averaged over "
    "score.orders random orders",
    choices=("left_to_right", "right_to_left", "uniform", "given"),
  )
  orders: int = fields.field(
    8,
    "uniform only: number K of orders whose probabilities are averaged",
    low=1,
  )
  width: int = fields.field(
    1,
    "number of tokens in a group, for models trained with orders.groups; the "
    "tokens of a group are scored given earlier groups alone, as "
    "sample.method=parallel draws them; 1 is the chain rule; 0 is the width "
    "that the model was trained with: orders.group_width, or 1 without "
    "orders.groups",
    low=0,
  )
  marks: str = fields.field(
    "auto",
    "the two characters around the part of a text to score; auto: [] if the "
    "alphabet has no brackets, else no marks; '' means no marks",
  )
  batch_size: int = fields.field(
    64, "greatest number of texts scored at once, over all devices", low=1
  )
  seed: int = fields.field(0, "seed of the uniform orders", low=0)
