"""The schema of the configuration: every field, default, unit, and range.

The files `configs/*.py` return a locked `ml_collections.ConfigDict`. The
dataclasses below define its fields, so overrides on the command line are
type-checked. All other code receives the dataclasses themselves. They are
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

from aoarm_jax.config import errors, exit_codes, mechanisms, reading

ORDER_FAMILIES = (
  "uniform",
  "left_to_right",
  "right_to_left",
  "mixture",
  "curriculum",
  "growing_blocks",
  "block",
  "shuffled_blocks",
  "given",
)
ESTIMATORS = (
  "any_order",
  "training_order",
  "left_to_right",
  "given_order",
  "ensembled",
  "context_ensembled",
  "elbo",
)
LORA_TARGETS = (
  *("attention", "query", "key", "value", "out"),
  *("mlp", "gate", "up", "down"),
)
BENCHMARK_PARTS = (
  "likelihood",
  "orders",
  "infilling",
  "generation",
  "last_word",
)


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


def _field(
  default: Any,
  doc: str,
  *,
  low: float | None = None,
  high: float | None = None,
  above: float | None = None,
  below: float | None = None,
  choices: tuple[str, ...] | None = None,
  of: type = int,
  binds: str = "",
) -> Any:
  """Return a dataclass field with its documentation, range, and binding.

  Args:
    default: the default value. Its type is the type of the field.
    doc: the meaning and the unit, for users.
    low: the least allowed value, inclusive.
    high: the greatest allowed value, inclusive.
    above: the lower bound, exclusive.
    below: the upper bound, exclusive.
    choices: the allowed values.
    of: the type of a tuple's items, for tuples without choices.
    binds: "model" if another value makes a checkpoint unusable. "run" if
      another value only prevents resuming a run. "" if the value may change at
      any time.
  """
  metadata = dict(
    doc=doc,
    low=low,
    high=high,
    above=above,
    below=below,
    choices=choices,
    of=of,
    binds=binds,
  )
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Model:
  """The backbone and its mechanism (aoarm_jax/model)."""

  mechanism: str = _field(
    "two_stream",
    "how a row learns which position it predicts",
    choices=tuple(mechanisms.MECHANISMS),
    binds="model",
  )
  sentinels: int = _field(
    1,
    "number of sentinels, which mark the ends of the window or of a padded "
    "document; 1: BOS; 2: BOS and EOS",
    low=1,
    high=2,
    binds="model",
  )
  T: int = _field(128, "number of positions to generate", low=1, binds="model")
  D: int = _field(256, "width of the model", low=2, binds="model")
  L: int = _field(10, "number of layers", low=1, binds="model")
  N: int = _field(4, "number of attention heads", low=1, binds="model")
  kv_heads: int = _field(
    0,
    "number of heads of keys and values, each of which serves as many "
    "attention heads (grouped-query attention); 0 means N",
    low=0,
    binds="model",
  )
  head_size: int = _field(
    0, "width H of an attention head; 0 means D / N", low=0, binds="model"
  )
  qk_norm: bool = _field(
    True, "norm each head of queries and keys (QK-norm)", binds="model"
  )
  mlp: str = _field(
    "gelu",
    "kind of the MLP; gelu: GELU(x U) W; swiglu: (SiLU(x G) * x U) W, whose "
    "three matrices have 1.5 times as many parameters at the same width",
    choices=("gelu", "swiglu"),
    binds="model",
  )
  mlp_width: int = _field(
    0, "hidden width F of the MLP; 0 means 4 D", low=0, binds="model"
  )
  biases: bool = _field(
    False,
    "add a bias to every matrix product of attention and MLP",
    binds="model",
  )
  norm: str = _field(
    "rms",
    "kind of the norms of rows; rms: RMSNorm; layer: LayerNorm with a bias; "
    "heads of queries and keys (qk_norm) always have RMSNorm",
    choices=("rms", "layer"),
    binds="model",
  )
  norm_epsilon: float = _field(
    1e-6,
    "number that every norm adds to the mean square, or to the variance",
    above=0.0,
    binds="model",
  )
  positions: str = _field(
    "rotary",
    "how rows learn positions; rotary: as the mechanism says, by rotations in "
    "most; learned: nothing is rotated, and a learned embedding of the "
    "position is added to the input of a row, for content rows that of their "
    "token, for query rows that of their target",
    choices=("rotary", "learned"),
    binds="model",
  )
  rope_base: float = _field(
    10000.0,
    "base of the rotary frequencies; the longest wavelength divided by 2 pi is "
    "about this many positions",
    low=1.0,
    binds="model",
  )
  rope_scaling: str = _field(
    "none",
    "how rotary frequencies are lowered for texts longer than "
    "rope_original_T; llama3: as Llama 3.1 does; yarn: as YaRN (arXiv "
    "2309.00071) does, which also multiplies the scores of attention",
    choices=("none", "llama3", "yarn"),
    binds="model",
  )
  rope_factor: float = _field(
    1.0,
    "rope_scaling only: factor by which the lowest frequencies are divided",
    low=1.0,
    binds="model",
  )
  rope_original_T: int = _field(
    0,
    "rope_scaling only: number of positions that the frequencies were made "
    "for; it must be set",
    low=0,
    binds="model",
  )
  rope_slow_turns: float = _field(
    1.0,
    "rope_scaling only: a rotary pair that turns less often than this over "
    "rope_original_T positions gets its frequency divided by the whole factor",
    above=0.0,
    binds="model",
  )
  rope_fast_turns: float = _field(
    0.0,
    "rope_scaling only: a rotary pair that turns more often than this keeps "
    "its frequency; 0 means 4 for llama3 and 32 for yarn",
    low=0.0,
    binds="model",
  )
  tied: bool = _field(
    False, "use the embedding as the head, too", binds="model"
  )
  condition_scale: float = _field(
    0.02,
    "adaLN only: initial standard deviation of the target's embedding; AO-GPT "
    "uses 0.02, with which all gates are nearly closed at the start",
    above=0.0,
    binds="run",
  )
  shifted: bool = _field(
    False,
    "a query for the token at a target position stands at the position before, "
    "as in a left-to-right model; query rows of two streams also begin as the "
    "token there, where they see it; models that were converted from "
    "left-to-right ones have it",
    binds="model",
  )
  content_sees: str = _field(
    "prefix",
    "two_stream only: the slots that content rows see; prefix: all slots up to "
    "their own; self: their own; last:8, nearest:8, random:8: their own and 8 "
    "earlier slots, which are the last ones in the order, those nearest in "
    "position, or a fixed random choice; sentinels are always seen, and query "
    "rows always see the prefix",
    binds="model",
  )

  @property
  def H(self) -> int:
    """Width of one attention head."""
    return self.head_size or self.D // self.N

  @property
  def key_heads(self) -> int:
    """Number of heads of keys and values."""
    return self.kv_heads or self.N

  @property
  def fast_turns(self) -> float:
    """Turns above which a rotary pair keeps its frequency; see rope_scaling."""
    return self.rope_fast_turns or (
      4.0 if self.rope_scaling == "llama3" else 32.0
    )

  @property
  def F(self) -> int:
    """Hidden width of the MLP."""
    return self.mlp_width or 4 * self.D

  @property
  def S(self) -> int:
    """Number of slots: the sentinels and the tokens that are content.

    The last generated token is never content, except with a masked mechanism.
    """
    return self.T + self.sentinels - (not self.kind.masked)

  @property
  def kind(self) -> mechanisms.Mechanism:
    """The pieces that the mechanism is made of."""
    kind = mechanisms.MECHANISMS[self.mechanism]
    return (
      kind.with_learned_positions() if self.positions == "learned" else kind
    )

  @property
  def look(self) -> mechanisms.Look | None:
    """The slots that content rows see; None if they see a prefix."""
    return mechanisms.look(self.content_sees)


@dataclasses.dataclass(frozen=True)
class Data:
  """The text (aoarm_jax/data)."""

  corpus: str = _field(
    "auto",
    "kind of text; auto: the built-in books without data.path, text8 if "
    "data.path is a file, folder if data.path is a folder",
    choices=("auto", "books", "text8", "folder"),
  )
  path: str = _field(
    "", "file or folder of the text; '' means the built-in text"
  )
  tokenizer: str = _field(
    "char27",
    "symbols of the text; char27: a to z and space; byte: the bytes of any "
    "text; chars: the characters of the training split; bpe: parts of words "
    "that are learned from the training split, or those of data.tokenizer_file",
    choices=("char27", "byte", "chars", "bpe"),
    binds="model",
  )
  vocabulary: int = _field(
    0,
    "bpe: number of symbols, and 0 means 4096 or the number of an existing "
    "tokenizer; chars: greatest number of characters, and 0 means 1024",
    low=0,
    high=1_000_000,
  )
  tokenizer_file: str = _field(
    "",
    "bpe and chars: file of an existing tokenizer: a tokenizer.json of Hugging "
    "Face with BPE on bytes, or the tokenizer.json of a run or of a prepared "
    "text; '' means that the symbols are found in the training split",
  )
  documents: str = _field(
    "join",
    "how documents become sequences of T tokens; join: windows of all text, "
    "without marks between documents; stream: the same, with an end token "
    "after each document; pad: one document a sequence, cut or padded to T",
    choices=("join", "stream", "pad"),
    binds="model",
  )
  lines: bool = _field(
    False,
    "whether each line of a text file is a document, for --mode=prepare and "
    "for data.documents=stream and pad; a text file is else one document",
  )
  normalise: bool = _field(
    False,
    "bring the text, prompts and texts to score into the form of text8: "
    "letters become lower case, digits become words, and all else becomes "
    "single spaces",
  )
  largest_megabytes: int = _field(
    0,
    "largest text that is read, in 10^6 bytes after unpacking; 0 means half of "
    "the memory",
    low=0,
  )
  workers: int = _field(
    0,
    "number of loader processes, and 0 means that a thread loads; for "
    "--mode=prepare the number of processes that encode, and 0 means one for "
    "each CPU",
    low=0,
  )
  text_field: str = _field(
    "text",
    "where documents are read, as by --mode=prepare: name of the text in the "
    "objects of JSON lines, and of the column in Parquet files",
  )
  held_out_share: float = _field(
    0.01,
    "where documents are read, as by --mode=prepare: share of the documents "
    "that go to the split valid, and as many to test, where no file is named "
    "after a split; the hash of a document decides",
    low=0.0,
    high=0.4,
  )


@dataclasses.dataclass(frozen=True)
class Orders:
  """The generation orders of training (aoarm_jax/orders.py)."""

  family: str = _field(
    "uniform",
    "family that generation orders are drawn from",
    choices=ORDER_FAMILIES,
    binds="run",
  )
  left_to_right_share: float = _field(
    0.1,
    "mixture only: share of left-to-right orders",
    low=0.0,
    high=1.0,
    binds="run",
  )
  curriculum_steps: int = _field(
    1000,
    "curriculum and growing_blocks only: number of steps until the orders that "
    "change are uniform",
    low=1,
    binds="run",
  )
  curriculum_start: int = _field(
    0,
    "curriculum and growing_blocks only: number of steps before that, in which "
    "all orders are left to right",
    low=0,
    binds="run",
  )
  curriculum_left_to_right_share: float = _field(
    0.0,
    "curriculum and growing_blocks only: share of orders that stay left to "
    "right, also at the end",
    low=0.0,
    high=1.0,
    binds="run",
  )
  block_width: int = _field(
    16,
    "block and shuffled_blocks only: width of a window, in positions",
    low=1,
    binds="run",
  )
  given: tuple[int, ...] = _field(
    (), "given only: the order, a permutation of 1..T", binds="run"
  )
  groups: str = _field(
    "none",
    "two_stream only: how ranks are grouped; the tokens of a group are "
    "generated together, independently of each other given earlier groups",
    choices=("none", "fixed", "random", "given"),
    binds="run",
  )
  group_width: int = _field(
    16,
    "number of ranks in a group for groups=fixed; mean number for "
    "groups=random",
    low=1,
    binds="run",
  )
  group_sizes: tuple[int, ...] = _field(
    (),
    "groups=given only: number of ranks in each group; they sum to T",
    binds="run",
  )

  @property
  def width(self) -> int:
    """Number of ranks in a group, in the mean; 1 without groups."""
    return 1 if self.groups == "none" else self.group_width

  @property
  def curriculum_end(self) -> int:
    """First step whose orders are those of the end; 0 for other families."""
    moves = self.family in ("curriculum", "growing_blocks")
    return self.curriculum_start + self.curriculum_steps if moves else 0

  @property
  def trains_left_to_right(self) -> bool:
    """True if many orders are left to right in all of the training."""
    share = {
      "left_to_right": 1.0,
      "mixture": self.left_to_right_share,
      "curriculum": self.curriculum_left_to_right_share,
      "growing_blocks": self.curriculum_left_to_right_share,
    }
    return share.get(self.family, 0.0) > 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW and its learning-rate schedule (aoarm_jax/training/optimizer.py)."""

  peak_learning_rate: float = _field(
    2e-3,
    "learning rate per step at the end of the warmup",
    above=0.0,
    binds="run",
  )
  schedule: str = _field(
    "cosine",
    "learning rate after the warmup; stable_decay: constant, then linear decay",
    choices=("cosine", "constant", "stable_decay"),
    binds="run",
  )
  warmup_steps: int = _field(
    200, "number of steps of linear warmup", low=0, binds="run"
  )
  final_share: float = _field(
    0.1,
    "cosine and stable_decay: learning rate at the end, divided by the peak; "
    "the schedule reaches it one step after the last one, so the last step has "
    "a slightly higher rate",
    low=0.0,
    high=1.0,
    binds="run",
  )
  decay_steps: int = _field(
    500,
    "stable_decay only: number of steps of the decay",
    low=1,
    binds="run",
  )
  b1: float = _field(
    0.9,
    "Adam: decay rate of the first moment",
    low=0.0,
    below=1.0,
    binds="run",
  )
  b2: float = _field(
    0.98,
    "Adam: decay rate of the second moment",
    low=0.0,
    below=1.0,
    binds="run",
  )
  eps: float = _field(1e-8, "Adam: epsilon", above=0.0, binds="run")
  weight_decay: float = _field(
    0.1,
    "decoupled weight decay, applied to matrices only",
    low=0.0,
    binds="run",
  )
  clip_norm: float = _field(
    1.0,
    "gradients are scaled down to this global norm at most",
    above=0.0,
    binds="run",
  )
  ema_decay: float = _field(
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

  steps: int = _field(2000, "number of optimizer steps", low=1, binds="run")
  batch_size: int = _field(
    512, "number of sequences per step, over all devices", low=1, binds="run"
  )
  query_fraction: float = _field(
    1.0,
    "two_stream only: share of the ranks that are predicted; they are drawn "
    "at random",
    above=0.0,
    high=1.0,
    binds="run",
  )
  start_from: str = _field(
    "",
    "run directory of another run, or an exported model, whose weights a new "
    "run begins with; the optimizer and the schedule begin anew, at step 0; '' "
    "draws new weights",
    binds="run",
  )
  start_from_ema: bool = _field(
    True,
    "start_from: take the moving average of the weights if that run has one, "
    "and not its last weights",
    binds="run",
  )
  lora_rank: int = _field(
    0,
    "rank r of the adapters that are trained in place of the weights of "
    "lora_targets (LoRA); all other arrays are frozen, apart from start/*, "
    "which the mechanism adds to the backbone; 0 trains the weights themselves",
    low=0,
    binds="run",
  )
  lora_alpha: float = _field(
    16.0,
    "lora_rank only: the product of the two arrays of an adapter is multiplied "
    "by lora_alpha / lora_rank",
    above=0.0,
    binds="run",
  )
  lora_targets: tuple[str, ...] = _field(
    ("attention", "mlp"),
    "lora_rank only: weights that get adapters; attention: query, key, value "
    "and out; mlp: gate (swiglu), up and down",
    choices=LORA_TARGETS,
    binds="run",
  )
  frozen: tuple[str, ...] = _field(
    (),
    "patterns of names of arrays that are not trained, such as embedding or "
    "blocks/mlp/*; parameters.txt of a run lists the names; a pattern behind ! "
    "exempts what it matches, and the last pattern that matches decides",
    of=str,
    binds="run",
  )
  distill: str = _field(
    "",
    "run directory or exported model of a left-to-right model with the same "
    "symbols, the teacher: wherever a row knows exactly the text before its "
    "target, the loss also has the divergence from the teacher's law; '' has "
    "no teacher",
    binds="run",
  )
  distill_weight: float = _field(
    1.0,
    "distill only: the divergence is multiplied by this and by the square of "
    "the temperature",
    above=0.0,
    binds="run",
  )
  distill_temperature: float = _field(
    1.0,
    "distill only: the logits of teacher and student are divided by it in the "
    "divergence",
    above=0.0,
    binds="run",
  )
  least_time: float = _field(
    1e-3,
    "mdlm only: t_min, the least expected share of masked tokens",
    above=0.0,
    below=1.0,
    binds="run",
  )


@dataclasses.dataclass(frozen=True)
class Match:
  """Makes this experiment as large or as long as another experiment."""

  to: str = _field(
    "",
    "the other experiment, such as two_stream or two_stream:long: a file in "
    "the folder of this one, or an experiment of this package; without a "
    "variant it has the variant of this experiment; '' matches nothing",
  )
  by: str = _field(
    "training_flops",
    "quantity that is made equal: the FLOPs of the whole training, or the "
    "number of parameters",
    choices=("training_flops", "parameters"),
  )
  change: str = _field(
    "steps",
    "field that is changed for this: train.steps, or a field of model",
    choices=("steps", "L", "D", "mlp_width"),
  )
  steps: int = _field(
    0,
    "train.steps of the other experiment; 0 means the value in its config",
    low=0,
  )


@dataclasses.dataclass(frozen=True)
class Eval:
  """Likelihoods of a split (aoarm_jax/evaluation/)."""

  # Fields that decide which checkpoint is best may not change within a run.
  split: str = _field(
    "valid",
    "split that is evaluated",
    choices=("train", "valid", "test"),
    binds="run",
  )
  estimators: tuple[str, ...] = _field(
    ("any_order", "left_to_right"),
    "likelihoods to compute; training validates with the first estimator and "
    "picks the best checkpoint by it",
    choices=ESTIMATORS,
    binds="run",
  )
  every: int = _field(
    500, "steps between validations; 0 validates at the end only", low=0
  )
  batches: int = _field(
    24,
    "number of batches to read; 0 reads every whole window of T characters of "
    "the split",
    low=0,
    binds="run",
  )
  batch_size: int = _field(
    0,
    "number of sequences per batch; 0 means train.batch_size",
    low=0,
    binds="run",
  )
  ensemble_orders: int = _field(
    8,
    "ensembled: number K of orders per sequence; context_ensembled: number of "
    "permutations per rank",
    low=1,
    binds="run",
  )
  times: int = _field(
    8,
    "elbo only: number of times (masks) drawn per sequence",
    low=1,
    binds="run",
  )
  seed: int = _field(1, "seed of the orders", low=0, binds="run")


@dataclasses.dataclass(frozen=True)
class Sample:
  """Generation (aoarm_jax/generation/texts.py)."""

  count: int = _field(4, "number of texts per prompt", low=1)
  length: int = _field(
    0,
    "number of tokens of a text without a prompt; 0: model.T, and for "
    "data.documents=pad with one sentinel, the model draws where a text ends",
    low=0,
  )
  batch_size: int = _field(
    256,
    "greatest number of texts generated at once, over all devices",
    low=1,
  )
  temperature: float = _field(
    1.0,
    "logits are divided by the temperature; 0 takes the likeliest token",
    low=0.0,
    high=1e6,
  )
  top_k: int = _field(
    0, "only the k likeliest tokens can be drawn; 0 allows all tokens", low=0
  )
  top_p: float = _field(
    1.0,
    "only the likeliest tokens with this total probability can be drawn",
    above=0.0,
    high=1.0,
  )
  order: str = _field(
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
  method: str = _field(
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
  width: int = _field(
    4,
    "parallel and adaptive: number of tokens per step; speculative: number of "
    "drafts; 0 is the width that the model was trained with: "
    "orders.group_width, or 1 without orders.groups",
    low=0,
  )
  steps: int = _field(
    0,
    "parallel, ancestral and confidence only: number of steps for all tokens; "
    "with 0, parallel goes by width, and the others take one step per position "
    "of the text, whose length is first rounded up to one of few lengths",
    low=0,
  )
  schedule: str = _field(
    "linear",
    "parallel with sample.steps only; linear: equally many tokens in each "
    "step; cosine: few tokens in the first steps",
    choices=("linear", "cosine"),
  )
  score: str = _field(
    "confidence",
    "adaptive only: the next target has the highest confidence, the lowest "
    "entropy, or the highest margin",
    choices=("confidence", "entropy", "margin"),
  )
  blank: str = _field(
    "auto",
    "character that stands for an unknown token in a text; auto: _ if the "
    "alphabet has no _, else no character; '' means no character",
  )
  every: int = _field(
    500,
    "steps of training between samples; 0 samples at the end only",
    low=0,
  )
  keep_last: int = _field(
    10, "number of newest files of samples that training keeps", low=1
  )
  seed: int = _field(0, "seed of the orders and of the drawn tokens", low=0)


@dataclasses.dataclass(frozen=True)
class Score:
  """Log-probabilities of given texts (aoarm_jax/evaluation/score.py)."""

  order: str = _field(
    "left_to_right",
    "order of the scored positions; uniform: probabilities are averaged over "
    "score.orders random orders",
    choices=("left_to_right", "right_to_left", "uniform", "given"),
  )
  orders: int = _field(
    8,
    "uniform only: number K of orders whose probabilities are averaged",
    low=1,
  )
  width: int = _field(
    1,
    "number of tokens in a group, for models trained with orders.groups; the "
    "tokens of a group are scored given earlier groups alone, as "
    "sample.method=parallel draws them; 1 is the chain rule; 0 is the width "
    "that the model was trained with: orders.group_width, or 1 without "
    "orders.groups",
    low=0,
  )
  marks: str = _field(
    "auto",
    "the two characters around the part of a text to score; auto: [] if the "
    "alphabet has no brackets, else no marks; '' means no marks",
  )
  batch_size: int = _field(
    64, "greatest number of texts scored at once, over all devices", low=1
  )
  seed: int = _field(0, "seed of the uniform orders", low=0)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A report on a trained run (aoarm_jax/benchmark)."""

  parts: tuple[str, ...] = _field(
    (), "parts of the report; () means all", choices=BENCHMARK_PARTS
  )
  text: str = _field(
    "",
    "file or folder of the text that is scored, masked and cut into windows; "
    "'' means the split eval.split of the run's text",
  )
  tokens: int = _field(
    2048,
    "likelihood: how many tokens from the start of the text are scored; of "
    "padded documents, whole ones; 0 means all",
    low=0,
  )
  stride: int = _field(
    0,
    "likelihood: tokens of a block, which are scored together behind at least "
    "T - stride tokens of context; 0 means half of T, and T means windows "
    "without context",
    low=0,
  )
  estimators: tuple[str, ...] = _field(
    (),
    "likelihoods to compute; () means all that the mechanism has",
    choices=ESTIMATORS,
  )
  orders: int = _field(
    8, "number K of uniform orders of a text, for means and ensembles", low=2
  )
  windows: int = _field(
    16,
    "orders, infilling and generation: number of windows of T tokens, or of "
    "padded documents, that are drawn from the text",
    low=2,
  )
  samples: int = _field(
    4, "infilling: number of fillings of a masked window", low=1
  )
  texts: int = _field(
    16, "generation: number of texts at each temperature", low=2
  )
  temperatures: tuple[float, ...] = _field(
    (0.5, 0.7, 0.85, 1.0, 1.2),
    "generation: temperatures, above 0",
    of=float,
  )
  scorer: str = _field(
    "",
    "generation: run directory of another run, which scores the texts; '' "
    "measures diversity alone",
  )
  last_words: str = _field(
    "",
    "last_word: file with one text a line, or JSON lines with data.text_field; "
    "'' leaves the part out",
  )
  batch_size: int = _field(
    64, "greatest number of texts at once, over all devices", low=1
  )
  seed: int = _field(0, "seed of orders, masks and texts", low=0)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the same mathematics is computed; may change between restarts."""

  dtype: str = _field(
    "bfloat16",
    "dtype of the inputs of matrix multiplications",
    choices=("bfloat16", "float32"),
  )
  attention: str = _field(
    "auto",
    "implementation in pallas_kernels for whole sequences; auto: the fastest "
    "supported implementation; attention over a cache always uses xla",
    choices=(
      "auto",
      "reference",
      "xla",
      "blockwise",
      "cudnn",
      "mosaic_gpu",
      "mosaic_tpu",
    ),
  )
  rowwise: str = _field(
    "auto",
    "implementation in pallas_kernels of norms, rotary embedding and GELU; "
    "auto: the fastest supported implementation",
    choices=("auto", "xla", "mosaic_gpu"),
  )
  scan_layers: bool = _field(
    False, "compile one layer and loop over it, instead of all layers"
  )
  remat: bool = _field(
    False, "recompute activations in the backward pass, to save memory"
  )
  loss_block: int = _field(
    0,
    "symbols of the vocabulary whose logits are in memory together in the "
    "loss; 0: all of them below 8,192 symbols, else 4,096",
    low=0,
  )
  accumulate: int = _field(1, "number of micro-batches per step", low=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Saving and choosing checkpoints (aoarm_jax/runs/checkpoint.py)."""

  every: int = _field(500, "steps between saves", low=1)
  keep_last: int = _field(
    2, "number of newest checkpoints that are kept", low=1
  )
  keep_best: int = _field(
    1, "number of best checkpoints, by validation, that are kept", low=0
  )
  read: str = _field(
    "newest",
    "checkpoint that the modes eval, sample, score, benchmark and export and "
    "train.start_from read; best: by validation",
    choices=("newest", "best"),
  )


@dataclasses.dataclass(frozen=True)
class Export:
  """A model as a folder for other tools (aoarm_jax/runs/exporting.py)."""

  weights: str = _field(
    "ema",
    "weights that --mode=export writes; ema: the moving average if the run has "
    "one, and else the last weights; last: the last weights",
    choices=("ema", "last"),
  )
  dtype: str = _field(
    "float32",
    "dtype of the weights that --mode=export writes",
    choices=("float32", "bfloat16"),
  )
  layout: str = _field(
    "aoarm_jax",
    "what --mode=export writes; aoarm_jax: a folder for load; hugging_face: a "
    "folder of Qwen3 or Llama for transformers, of a causal model with "
    "mlp=swiglu and one sentinel",
    choices=("aoarm_jax", "hugging_face"),
  )


@dataclasses.dataclass(frozen=True)
class Telemetry:
  """What a run reports (aoarm_jax/runs/telemetry.py)."""

  log_every: int = _field(50, "steps between log lines", low=1)
  patience_seconds: float = _field(
    2.0,
    "seconds of compiling or other waiting after which a line says what takes "
    "long; 0 says nothing",
    low=0.0,
  )
  tensorboard: bool = _field(
    False, "also write TensorBoard events; in --mode=train alone"
  )
  wandb: str = _field(
    "",
    "also send metrics to this project of Weights & Biases, as project or "
    "entity/project; in --mode=train alone; '' sends nothing",
  )
  profile_start: int = _field(
    -1, "first step that is profiled; -1 profiles nothing", low=-1
  )
  profile_steps: int = _field(5, "number of profiled steps", low=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Number of devices along each axis (aoarm_jax/devices/meshes.py)."""

  data: int = _field(
    0,
    "number of copies of the model, which share the batch; 0 uses all "
    "remaining devices",
    low=0,
  )
  fsdp: int = _field(
    1,
    "number of devices that share the batch and the parameters; 0 uses all "
    "remaining devices, and mesh.data is then 1 unless it is set",
    low=0,
  )
  tensor: int = _field(
    1, "number of devices that share the heads and the hidden units", low=1
  )
  sequence: int = _field(
    1,
    "number of devices that share the slots of a sequence (context "
    "parallelism)",
    low=1,
  )
  smallest_shard: int = _field(
    8,
    "shortest piece, in elements, that fsdp may cut a dimension of a "
    "parameter into; a dimension with shorter pieces stays whole",
    low=1,
  )


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes as one run (aoarm_jax/devices/distributed.py).

  Launchers set the first four fields and notice_seconds by environment
  variables, which override the config. The names are in distributed.VARIABLES.
  """

  enabled: bool = _field(False, "join other processes; this is never guessed")
  coordinator_address: str = _field(
    "",
    "host:port of process 0; '' asks Cloud TPU, Slurm or Kubernetes",
  )
  process_count: int = _field(
    0, "number of processes; 0 finds it together with the address", low=0
  )
  process_id: int = _field(
    -1,
    "number of this process, 0 to process_count - 1; -1 finds it together "
    "with the address",
    low=-1,
  )
  heartbeat_timeout_seconds: int = _field(
    100,
    "the other processes stop after a process was silent for this time",
    low=1,
  )
  initialization_timeout_seconds: int = _field(
    300, "longest wait for all processes to start", low=1
  )
  notice_seconds: int = _field(
    0,
    "seconds from SIGTERM to the kill; a save that takes longer is warned of; "
    "0 is unknown",
    low=0,
  )
  step_timeout_seconds: int = _field(
    3600,
    "a stuck process ends itself after this time without progress: a step, a "
    "batch of an evaluation, or a save; it must exceed any compilation; 0 "
    "never ends a process",
    low=0,
  )


@dataclasses.dataclass(frozen=True)
class Study:
  """A sweep over many runs and its measurements (aoarm_jax/study)."""

  sweep: str = _field(
    "",
    "the cells of the sweep, as products of values, such as "
    "mechanism=two_stream,mdlm T=128,1024 seed=0,1; a newline or ';' separates "
    "products; aoarm_jax/study/cells.py explains the keys and the order",
  )
  reference: str = _field(
    "two_stream",
    "mechanism that budgets are matched to and differences are taken from",
    choices=tuple(mechanisms.MECHANISMS),
  )
  tokens_per_step: int = _field(
    65536, "number of tokens per step, at every T", low=1
  )
  rates: tuple[float, ...] = _field(
    (1e-3, 2e-3, 4e-3, 8e-3),
    "peak learning rates that are tried for rate=tuned",
    of=float,
  )
  tune_lengths: tuple[int, ...] = _field(
    (128, 1024),
    "lengths T at which learning rates are tried; () tries them at each length",
    of=int,
  )
  tune_seeds: tuple[int, ...] = _field(
    (101, 102),
    "the two seeds on which rate=search tries learning rates; no other run "
    "uses them",
    of=int,
  )
  tune_steps: int = _field(
    4000,
    "rate=search only: number of steps of the reference mechanism in a trial",
    low=1,
  )
  check_T: int = _field(
    1024,
    "length T at which rate=checked tries another learning rate",
    low=1,
  )
  decay_share: float = _field(
    0.0,
    "share of a run's steps in which the learning rate decays linearly to "
    "zero; before, the rate is constant, and runs that differ in their number "
    "of steps only share this trunk; 0 uses the optimizer's own schedule",
    low=0.0,
    below=1.0,
  )
  keep_weights: bool = _field(
    False, "also write the last parameters of every run, in bfloat16"
  )
  temperature_low: float = _field(
    0.1, "lowest temperature of generation", above=0.0
  )
  temperature_high: float = _field(
    2.0, "highest temperature of generation", above=0.0
  )
  temperatures: int = _field(30, "number of evenly spaced temperatures", low=2)
  characters: int = _field(
    16384,
    "number of characters generated at each temperature; 0 generates nothing",
    low=0,
  )
  vocabulary_split: str = _field(
    "valid",
    "split whose words and n-grams the generated text is compared with",
    choices=("train", "valid", "test"),
  )
  ngram: int = _field(6, "number of characters of an n-gram", low=1, high=8)
  profile_sequences: int = _field(
    32,
    "number of windows whose attention is profiled; 0 profiles nothing",
    low=0,
  )
  bootstrap: int = _field(
    1000, "number of resamplings for an error band", low=2
  )
  cells: str = _field(
    "",
    "run selected cells only: those whose label has all words of one of these "
    "comma-separated groups, such as 'mdlm,decoupled_rope T=128 seed=1'",
  )
  share_index: int = _field(
    0, "index of the share of the cells that runs here", low=0
  )
  share_count: int = _field(
    1, "number of shares that the cells are divided into", low=1
  )
  limit_seconds: int = _field(
    0,
    "no cell starts if it would end after this time; 0 means no limit",
    low=0,
  )
  part: str = _field(
    "all",
    "part of the work to do: cells runs missing cells, report writes the "
    "report, all does the two in turn; measure takes measures of runs with "
    "kept weights (aoarm_jax/study/dissection.py) and writes the report; "
    "export writes these runs as models into WORKDIR/exports",
    choices=("all", "cells", "report", "measure", "export"),
  )
  measure_windows: int = _field(
    64, "part=measure only: number of windows that are measured", low=2
  )
  knockouts: str = _field(
    "",
    "part=measure only: slots that attention is barred from in all layers, as "
    "in 'own last:8'; 'none' bars none, '' takes the list of "
    "aoarm_jax/study/knockouts.py, which explains the words",
  )
  layer_knockouts: str = _field(
    "",
    "part=measure only: slots that attention is barred from in one layer "
    "alone, written like study.knockouts",
  )
  report: str = _field(
    "", "folder of the report; '' means report/ in the workdir"
  )
  also: str = _field(
    "",
    "further directories of studies, separated by commas, whose cells the "
    "report shows as well",
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of one experiment."""

  name: str = _field("experiment", "name of the experiment, for people")
  variant: str = _field("default", "name of its variant, for people")
  seed: int = _field(
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
