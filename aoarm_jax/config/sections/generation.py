"""Generated texts."""

import dataclasses

from aoarm_jax.config.sections import fields


@dataclasses.dataclass(frozen=True)
class Sample:
  """Generation (aoarm_jax/generation/texts.py)."""

  count: int = fields.field(4, "number of texts per prompt", low=1)
  length: int = fields.field(
    0,
    "number of tokens of a text without a prompt; 0: model.T, and for "
    "data.documents=pad with one sentinel, the model draws where a text ends",
    low=0,
  )
  batch_size: int = fields.field(
    256,
    "greatest number of texts generated at once, over all devices",
    low=1,
  )
  temperature: float = fields.field(
    1.0,
    "logits are divided by the temperature; 0 takes the likeliest token",
    low=0.0,
    high=1e6,
  )
  top_k: int = fields.field(
    0, "only the k likeliest tokens can be drawn; 0 allows all tokens", low=0
  )
  top_p: float = fields.field(
    1.0,
    "only the likeliest tokens with this total probability can be drawn",
    above=0.0,
    high=1.0,
  )
  order: str = fields.field(
    "uniform",
    "order in which the blanks are filled",
    choices=(
      "uniform",
      "left_to_right",
      "right_to_left",
      "block",
      "shuffled_blocks",
      "given",
    ),
  )
  method: str = fields.field(
    "sequential",
    "how tokens are drawn; sequential and speculative are exact; parallel is "
    "exact for a model trained with orders.groups, whose groups it draws, and "
    "else not; adaptive (decode.py) is not exact; ancestral and confidence "
    "(diffusion.py), for mdlm only, are not exact",
    choices=(
      "sequential",
      "speculative",
      "parallel",
      "adaptive",
      "ancestral",
      "confidence",
    ),
  )
  width: int = fields.field(
    4,
    "parallel and adaptive: number of tokens per step; speculative: number of "
    "drafts; 0 is the width that the model was trained with: "
    "orders.group_width, or 1 without orders.groups",
    low=0,
  )
  steps: int = fields.field(
    0,
    "parallel, ancestral and confidence only: number of steps for all tokens; "
    "with 0, parallel goes by width, and the others take one step per position "
    "of the text, whose length is first rounded up to one of few lengths",
    low=0,
  )
  schedule: str = fields.field(
    "linear",
    "parallel with sample.steps only; linear: equally many tokens in each "
    "step; cosine: few tokens in the first steps",
    choices=("linear", "cosine"),
  )
  score: str = fields.field(
    "confidence",
    "adaptive only: the next target has the highest confidence, the lowest "
    "entropy, or the highest margin",
    choices=("confidence", "entropy", "margin"),
  )
  blank: str = fields.field(
    "auto",
    "character that stands for an unknown token in a text; auto: _ if the "
    "alphabet has no _, else no character; '' means no character",
  )
  every: int = fields.field(
    500,
    "steps of training between samples; 0 samples at the end only",
    low=0,
  )
  keep_last: int = fields.field(
    10, "number of newest files of samples that training keeps", low=1
  )
  seed: int = fields.field(
    0, "seed of the orders and of the drawn tokens", low=0
  )
