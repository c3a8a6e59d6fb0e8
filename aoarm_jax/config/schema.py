"""The whole configuration schema, once: defaults, units, ranges, bindings.

`configs/*.py` return a locked `ml_collections.ConfigDict` built from the
dataclasses below, so overrides on the command line are type-checked. All code
receives the frozen (hashable, hence jit-static) dataclasses instead.

Dimension letters used across the project:

  B batch            T targets (positions to generate)   S slots (keys)
  N heads            H head dim                          D model width
  F hidden width     V vocabulary                        L layers
  G streams          s sentinels         R rows: slots, and queries apart
"""

import dataclasses
import json
from typing import Any

import ml_collections
import numpy as np

from aoarm_jax.config import errors, mechanisms

ORDER_FAMILIES = (
  "uniform",
  "left_to_right",
  "right_to_left",
  "mixture",
  "curriculum",
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


class ConfigError(errors.UserError, ValueError):
  """A value that cannot be: one line that names field, value and fix."""

  exit_code = 2


def _field(
  default,
  doc,
  *,
  low=None,
  high=None,
  above=None,
  below=None,
  choices=None,
  of=int,
  binds="",
):
  """A field with its unit or meaning, its range, and what it binds.

  Args:
    default: the default value; its type is the field's type.
    doc: meaning and unit.
    low: least value allowed, inclusive.
    high: greatest value allowed, inclusive.
    above: lower bound, exclusive.
    below: upper bound, exclusive.
    choices: the values allowed.
    of: type of a tuple's items, where there are no choices.
    binds: "model" if a checkpoint is unusable under another value, "run" if
      only resuming is, "" if the value may change at any time.
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
    "1: BOS; 2: BOS and EOS (window boundaries)",
    low=1,
    high=2,
    binds="model",
  )
  T: int = _field(128, "positions to generate", low=1, binds="model")
  D: int = _field(256, "model width", low=2, binds="model")
  L: int = _field(10, "layers", low=1, binds="model")
  N: int = _field(4, "attention heads", low=1, binds="model")
  mlp_width: int = _field(
    0, "hidden width F of the MLP; 0: 4 D", low=0, binds="model"
  )
  rope_base: float = _field(
    10000.0,
    "longest rotary wavelength / 2 pi, positions",
    low=1.0,
    binds="model",
  )
  condition_scale: float = _field(
    0.02,
    "adaLN: standard deviation of the target's embedding at the start; with "
    "AO-GPT's, 0.02, all gates are nearly closed",
    above=0.0,
    binds="run",
  )

  @property
  def H(self) -> int:
    """Head dim."""
    return self.D // self.N

  @property
  def F(self) -> int:
    """Hidden width of the MLP."""
    return self.mlp_width or 4 * self.D

  @property
  def S(self) -> int:
    """Slots: sentinels and all tokens, or all but the last generated one."""
    return self.T + self.sentinels - (not self.kind.masked)

  @property
  def kind(self) -> mechanisms.Mechanism:
    """What the mechanism is made of."""
    return mechanisms.MECHANISMS[self.mechanism]


@dataclasses.dataclass(frozen=True)
class Data:
  """The text (aoarm_jax/data)."""

  corpus: str = _field(
    "auto",
    "auto: books, which are built in, without a path, text8 for a file, folder "
    "for a folder",
    choices=("auto", "books", "text8", "folder"),
  )
  path: str = _field("", "file or folder of the text; '' is the built-in text")
  tokenizer: str = _field(
    "char27", "symbols of the text", choices=("char27", "byte"), binds="model"
  )
  workers: int = _field(0, "loader processes; 0 loads in threads", low=0)


@dataclasses.dataclass(frozen=True)
class Orders:
  """The generation orders of training (aoarm_jax/orders.py)."""

  family: str = _field(
    "uniform", "order family", choices=ORDER_FAMILIES, binds="run"
  )
  left_to_right_share: float = _field(
    0.1,
    "mixture: share of left-to-right orders",
    low=0.0,
    high=1.0,
    binds="run",
  )
  curriculum_steps: int = _field(
    1000, "curriculum: steps until all orders are uniform", low=1, binds="run"
  )
  block_width: int = _field(
    16, "block, shuffled_blocks: window width, positions", low=1, binds="run"
  )
  given: tuple = _field(
    (), "given: the order, a permutation of 1..T", binds="run"
  )
  groups: str = _field(
    "none",
    "two_stream: ranks generated together, independent given those before",
    choices=("none", "fixed", "random", "given"),
    binds="run",
  )
  group_width: int = _field(
    16, "fixed: ranks a group; random: their mean", low=1, binds="run"
  )
  group_sizes: tuple = _field(
    (), "given: ranks of each group, T in all", binds="run"
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with a schedule (aoarm_jax/training/optimizer.py)."""

  peak_learning_rate: float = _field(
    2e-3, "after warmup, per step", above=0.0, binds="run"
  )
  schedule: str = _field(
    "cosine",
    "after warmup; stable_decay: constant, then linear decay",
    choices=("cosine", "constant", "stable_decay"),
    binds="run",
  )
  warmup_steps: int = _field(200, "linear warmup, steps", low=0, binds="run")
  final_share: float = _field(
    0.1, "last learning rate / peak", low=0.0, high=1.0, binds="run"
  )
  decay_steps: int = _field(
    500, "stable_decay: length of the decay, steps", low=1, binds="run"
  )
  b1: float = _field(0.9, "Adam, first moment", low=0.0, below=1.0, binds="run")
  b2: float = _field(
    0.98, "Adam, second moment", low=0.0, below=1.0, binds="run"
  )
  eps: float = _field(1e-8, "Adam, epsilon", above=0.0, binds="run")
  weight_decay: float = _field(
    0.1, "decoupled, matrices only", low=0.0, binds="run"
  )
  clip_norm: float = _field(
    1.0, "global gradient norm at most", above=0.0, binds="run"
  )
  ema_decay: float = _field(
    0.0,
    "of the parameters, per step; 0 keeps no EMA",
    low=0.0,
    below=1.0,
    binds="run",
  )


@dataclasses.dataclass(frozen=True)
class Train:
  """The main job (aoarm_jax/training/loop.py)."""

  steps: int = _field(2000, "optimizer steps", low=1, binds="run")
  batch_size: int = _field(
    512, "sequences a step, over all devices", low=1, binds="run"
  )
  query_fraction: float = _field(
    1.0,
    "two_stream: share of the ranks, drawn at random, that are predicted",
    above=0.0,
    high=1.0,
    binds="run",
  )
  least_time: float = _field(
    1e-3,
    "mdlm: t_min, the least expected share of masked tokens",
    above=0.0,
    below=1.0,
    binds="run",
  )


@dataclasses.dataclass(frozen=True)
class Match:
  """Makes this experiment as large or as long as another one."""

  to: str = _field(
    "",
    "name of a config file beside this one, as in two_stream or "
    "two_stream:long; without a variant the same one; '': nothing is matched",
  )
  by: str = _field(
    "training_flops",
    "what is to be equal: FLOPs of the whole training, or parameters",
    choices=("training_flops", "parameters"),
  )
  change: str = _field(
    "steps",
    "what is changed: train.steps, or a field of model",
    choices=("steps", "L", "D", "mlp_width"),
  )
  steps: int = _field(
    0, "train.steps of the other one; 0: as its config says", low=0
  )


@dataclasses.dataclass(frozen=True)
class Eval:
  """Likelihoods of a split (aoarm_jax/evaluation/)."""

  # What decides which checkpoint is best may not change within a run.
  split: str = _field(
    "valid", "split read", choices=("train", "valid", "test"), binds="run"
  )
  estimators: tuple = _field(
    ("any_order", "left_to_right"),
    "the first one is training's validation and picks the best checkpoint",
    choices=ESTIMATORS,
    binds="run",
  )
  every: int = _field(500, "steps between validations; 0: at the end", low=0)
  batches: int = _field(
    24, "batches read; 0: the whole split", low=0, binds="run"
  )
  batch_size: int = _field(
    0, "sequences a batch; 0: train.batch_size", low=0, binds="run"
  )
  ensemble_orders: int = _field(
    8,
    "ensembled: orders K a sequence; context_ensembled: permutations a rank",
    low=1,
    binds="run",
  )
  times: int = _field(
    8, "elbo: times (masks) drawn a sequence", low=1, binds="run"
  )
  seed: int = _field(1, "of the orders drawn", low=0, binds="run")


@dataclasses.dataclass(frozen=True)
class Sample:
  """Generation (aoarm_jax/generation/texts.py)."""

  count: int = _field(4, "texts, for each prompt", low=1)
  batch_size: int = _field(
    256, "texts at once, at most, over all devices", low=1
  )
  temperature: float = _field(
    1.0, "logits / temperature; 0: argmax", low=0.0, high=1e6
  )
  top_k: int = _field(0, "keep the k likeliest tokens; 0: all", low=0)
  top_p: float = _field(
    1.0,
    "keep the likeliest tokens of this total probability",
    above=0.0,
    high=1.0,
  )
  order: str = _field(
    "uniform",
    "order of the blanks",
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
    "sequential, speculative: exact; parallel, adaptive (decode.py) and, of "
    "mdlm, ancestral, confidence (diffusion.py): not",
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
    4, "parallel, adaptive: tokens a step; speculative: drafts", low=1
  )
  steps: int = _field(
    0,
    "parallel, ancestral, confidence: steps for all tokens; 0: by width, or as "
    "many as the text, lengthened to one of few lengths, has positions",
    low=0,
  )
  schedule: str = _field(
    "linear",
    "parallel in steps: as many tokens in each, or few at first",
    choices=("linear", "cosine"),
  )
  score: str = _field(
    "confidence",
    "adaptive: what is highest, lowest or highest at the next target",
    choices=("confidence", "entropy", "margin"),
  )
  blank: str = _field(
    "_", "the character of an unknown token in a text; '': none, to score all"
  )
  every: int = _field(
    500, "steps between samples in training; 0: at the end", low=0
  )
  seed: int = _field(0, "of orders and draws", low=0)


@dataclasses.dataclass(frozen=True)
class Score:
  """Log-probabilities of given texts (aoarm_jax/evaluation/score.py)."""

  order: str = _field(
    "left_to_right",
    "order of the scored positions; uniform: averaged over `orders` of them",
    choices=("left_to_right", "right_to_left", "uniform", "given"),
  )
  orders: int = _field(
    8, "uniform: orders K whose probabilities are averaged", low=1
  )
  marks: str = _field(
    "[]", "the two characters around a part to score; '': none"
  )
  batch_size: int = _field(
    64, "texts at once, at most, over all devices", low=1
  )
  seed: int = _field(0, "of uniform orders", low=0)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the same mathematics is run; may change between restarts."""

  dtype: str = _field(
    "bfloat16", "of matmul inputs", choices=("bfloat16", "float32")
  )
  attention: str = _field(
    "auto",
    "implementation in pallas_kernels for whole sequences; auto: the fastest "
    "that is supported. A cache is read by xla, whatever is asked for",
    choices=(
      "auto",
      "reference",
      "xla",
      "cudnn",
      "mosaic_gpu",
      "mosaic_tpu",
    ),
  )
  scan_layers: bool = _field(False, "one compiled layer, looped over")
  remat: bool = _field(False, "recompute activations in the backward pass")
  accumulate: int = _field(1, "micro-batches a step", low=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What is kept (aoarm_jax/runs/checkpoint.py)."""

  every: int = _field(500, "steps between saves", low=1)
  keep_last: int = _field(2, "newest checkpoints kept", low=1)
  keep_best: int = _field(1, "best checkpoints kept, by validation", low=0)
  read: str = _field(
    "newest",
    "eval, sample: which checkpoint is read; best: by validation",
    choices=("newest", "best"),
  )


@dataclasses.dataclass(frozen=True)
class Telemetry:
  """What is reported (aoarm_jax/runs/telemetry.py)."""

  log_every: int = _field(50, "steps between log lines", low=1)
  tensorboard: bool = _field(False, "also write TensorBoard events")
  profile_start: int = _field(-1, "first step profiled; -1: none", low=-1)
  profile_steps: int = _field(5, "steps profiled", low=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices by axis (aoarm_jax/devices/sharding.py)."""

  data: int = _field(
    0, "copies of the model, along the batch; 0: all that are left", low=0
  )
  fsdp: int = _field(
    1,
    "devices along the batch that share the parameters; 0: all that are left, "
    "and data is 1 unless given",
    low=0,
  )
  tensor: int = _field(1, "devices along heads and hidden units", low=1)
  sequence: int = _field(1, "devices along slots (context parallel)", low=1)
  smallest_shard: int = _field(
    8,
    "elements: a parameter's dimension is not cut into shorter pieces along "
    "fsdp, but kept whole",
    low=1,
  )


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes as one run (aoarm_jax/devices/distributed.py).

  Launchers set the first four by the environment, which goes before: see
  distributed.VARIABLES.
  """

  enabled: bool = _field(False, "join other processes; never guessed")
  coordinator_address: str = _field(
    "", "host:port of process 0; '': Cloud TPU, Slurm or Kubernetes tell"
  )
  process_count: int = _field(0, "0: found with the address", low=0)
  process_id: int = _field(
    -1, "0 to process_count - 1; -1: found with the address", low=-1
  )
  heartbeat_timeout_seconds: int = _field(
    100, "silence of a process after which the others stop", low=1
  )
  initialization_timeout_seconds: int = _field(
    300, "wait for all processes to start", low=1
  )
  step_timeout_seconds: int = _field(
    3600,
    "without a step, a batch of an evaluation or a save done, after which a "
    "stuck process ends itself; longer than any compilation; 0: never",
    low=0,
  )


@dataclasses.dataclass(frozen=True)
class Study:
  """A sweep over many runs, and what is measured of each (aoarm_jax/study)."""

  sweep: str = _field(
    "",
    "products of values, one a line (or after ';'): mechanism=two_stream,mdlm "
    "T=128,1024 seed=0,1; keys and cell order: aoarm_jax/study/cells.py",
  )
  reference: str = _field(
    "two_stream",
    "mechanism that budgets are matched to and differences taken from",
    choices=tuple(mechanisms.MECHANISMS),
  )
  tokens_per_step: int = _field(65536, "tokens a step, at any T", low=1)
  rates: tuple = _field(
    (1e-3, 2e-3, 4e-3, 8e-3),
    "peak learning rates tried where rate=tuned",
    of=float,
  )
  tune_lengths: tuple = _field(
    (128, 1024), "lengths at which they are tried; (): at each one", of=int
  )
  tune_seeds: tuple = _field(
    (101, 102),
    "two seeds on which rate=search tries rates, and nothing else is run",
    of=int,
  )
  tune_steps: int = _field(
    4000, "steps of the reference mechanism in a trial of rate=search", low=1
  )
  check_T: int = _field(
    1024, "length at which rate=checked tries another rate", low=1
  )
  decay_share: float = _field(
    0.0,
    "share of a run's steps that decays the rate to zero, linearly; before it "
    "the rate is constant, and runs that differ by their steps alone share "
    "this trunk; 0: the optimizer's own schedule",
    low=0.0,
    below=1.0,
  )
  keep_weights: bool = _field(
    False, "also write the last parameters of every run, in bfloat16"
  )
  temperature_low: float = _field(0.1, "least temperature", above=0.0)
  temperature_high: float = _field(2.0, "greatest temperature", above=0.0)
  temperatures: int = _field(30, "evenly spaced temperatures", low=2)
  characters: int = _field(
    16384, "characters generated at each temperature; 0: none", low=0
  )
  vocabulary_split: str = _field(
    "valid",
    "split whose words and n-grams generated text is held against",
    choices=("train", "valid", "test"),
  )
  ngram: int = _field(6, "characters of an n-gram", low=1, high=8)
  profile_sequences: int = _field(
    32, "windows whose attention is profiled; 0: none", low=0
  )
  bootstrap: int = _field(1000, "resamplings behind a band", low=2)
  cells: str = _field(
    "",
    "only the cells whose label has all words of one of these: "
    "'mdlm,decoupled_rope T=128 seed=1'",
  )
  share_index: int = _field(0, "which share of the cells is run here", low=0)
  share_count: int = _field(1, "shares of the cells", low=1)
  limit_seconds: int = _field(
    0, "no cell is begun that would end later; 0: no limit", low=0
  )
  part: str = _field(
    "all",
    "what is done: missing cells and then the report, or one of them",
    choices=("all", "cells", "report"),
  )
  report: str = _field("", "folder of the report; '': report/ in the workdir")


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment."""

  name: str = "experiment"
  variant: str = "default"
  seed: int = _field(0, "of parameters, batches and orders", low=0, binds="run")
  model: Model = Model()
  data: Data = Data()
  orders: Orders = Orders()
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  match: Match = Match()
  eval: Eval = Eval()
  sample: Sample = Sample()
  score: Score = Score()
  compute: Compute = Compute()
  checkpoint: Checkpoint = Checkpoint()
  telemetry: Telemetry = Telemetry()
  mesh: Mesh = Mesh()
  distributed: Distributed = Distributed()
  study: Study = Study()

  def replace(self, path: str, value: Any) -> "Config":
    """Returns the config with another value of one field.

    Args:
      path: as in "train.steps" or "seed", or a whole section, as in "orders".
      value: of the field's type; whether it can be, config_rules.validate says.
    """
    name, _, rest = path.partition(".")
    if rest:
      value = dataclasses.replace(getattr(self, name), **{rest: value})
    return dataclasses.replace(self, **{name: value})

  @property
  def eval_batch_size(self) -> int:
    return self.eval.batch_size or self.train.batch_size


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
  """The schema as a locked ConfigDict, for overrides on the command line."""
  return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(config_dict: ml_collections.ConfigDict) -> Config:
  """The frozen dataclasses; config_rules.validate checks their values."""
  return from_dict(config_dict.to_dict())


def from_dict(tree: dict[str, Any]) -> Config:
  """Nested dict to Config; absent fields take their defaults.

  Raises:
    ConfigError: an unknown field or a value of the wrong type.
  """
  return _build(Config, tree, "config")


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
  """Inverse of `to_json`; see `from_dict`."""
  return from_dict(json.loads(text))


def _build(cls, tree, path):
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in tree:
    if name not in fields:
      raise ConfigError(
        f"{path}.{name}: no such field; {path} has: {', '.join(fields)}"
      )
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
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise ConfigError(
      f"{path}={value!r}: a {type(value).__name__} where a {kind.__name__} "
      "belongs"
    )
  return value


def leaves(config, path="config"):
  """Yields (path, dataclass field, value) of every leaf of the schema."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from leaves(value, f"{path}.{field.name}")
    else:
      yield f"{path}.{field.name}", field, value
