"""Rules that a config must satisfy, and the changes that a run survives."""

import math
import operator
from collections.abc import Iterator
from typing import Any

from aoarm_jax.config import backbone, mechanisms
from aoarm_jax.config import schema as config_lib

# The mechanisms that config.model.positions=learned can be combined with.
_LEARNED = ", ".join(
  name for name, kind in mechanisms.MECHANISMS.items() if kind.has_one_position
)


def validate(config: config_lib.Config) -> config_lib.Config:
  """Return the config if every value is valid, alone and with the others.

  Args:
    config: the config to check.

  Returns:
    The same object.

  Raises:
    ConfigError: a value is not valid. The message names the field, the value,
      and how to mend it.
  """
  if config.data.corpus == "docstrings":
    raise config_lib.ConfigError(
      "config.data.corpus='docstrings': this program no longer reads "
      "docstrings: take the built-in novels with --config.data.corpus=books, "
      "or name a text with --config.data.path="
    )
  for path, field, value in config_lib.leaves(config):
    _check_range(path, field.metadata, value)
  for path, holds, fix in _relations(config):
    if not holds:
      section, _, name = path.partition(".")
      value = getattr(getattr(config, section), name)
      raise config_lib.ConfigError(f"config.{path}={value!r}: {fix}")
  return config


def whole_number(name: str, value: Any) -> int:
  """Return `value` as an int; raise ConfigError if it is none."""
  try:
    return operator.index(value)
  except TypeError as error:
    raise config_lib.ConfigError(
      f"{name}={value!r}: must be a whole number"
    ) from error


def _check_range(path, metadata, value):
  """Raise ConfigError unless a value lies in its range and its choices."""
  bounds = (
    (metadata.get("low"), lambda x, bound: x >= bound, "at least"),
    (metadata.get("high"), lambda x, bound: x <= bound, "at most"),
    (metadata.get("above"), lambda x, bound: x > bound, "above"),
    (metadata.get("below"), lambda x, bound: x < bound, "below"),
    # Devices hold whole numbers as int32.
    (2**31 - 1 if type(value) is int else None, lambda x, b: x <= b, "at most"),
  )
  choices = metadata.get("choices")
  if isinstance(value, float) and not math.isfinite(value):
    raise config_lib.ConfigError(f"{path}={value!r}: must be finite")
  for bound, holds, words in bounds:
    if bound is not None and not holds(value, bound):
      raise config_lib.ConfigError(
        f"{path}={value!r}: must be {words} {bound} ({metadata.get('doc')})"
      )
  for item in value if isinstance(value, tuple) else (value,):
    if choices and item not in choices:
      is_list = isinstance(value, tuple) and "," in str(item)
      lists = "; write several as \"('a','b')\"" if is_list else ""
      raise config_lib.ConfigError(
        f"{path}={value!r}: {item!r} is not one of {', '.join(choices)}{lists}"
      )
    item_type = metadata.get("of", int)
    is_plain = isinstance(value, tuple) and not choices
    kinds = (float, int) if item_type is float else (item_type,)
    if is_plain and type(item) not in kinds:
      kind = {int: "a whole number", float: "a number", str: "a text"}[
        item_type
      ]
      raise config_lib.ConfigError(f"{path}={value!r}: {item!r} is not {kind}")


def _relations(config):
  """Return the rules between fields as (path, whether it holds, the fix)."""
  return [
    *_of_the_mechanism(config),
    *backbone.rules(config),
    *_of_orders(config),
    *_of_training(config),
    *_of_a_study(config.study),
    *_of_texts(config),
    *_of_a_benchmark(config),
    *_of_symbols(config.data),
  ]


def refused_by_mechanism(config: config_lib.Config) -> list[str]:
  """Return the paths of fields whose values the mechanism does not allow.

  Args:
    config: the config to check.

  Returns:
    Paths such as "train.query_fraction", each once.
  """
  refused = (path for path, holds, _ in _of_the_mechanism(config) if not holds)
  return list(dict.fromkeys(refused))


def _of_the_mechanism(config):
  """Return the rules that follow from the table of mechanisms."""
  m, kind = config.model, config.model.kind
  own = mechanisms.MECHANISMS[m.mechanism]
  estimators = set(config.eval.estimators)
  one_way = f"mechanism {m.mechanism} generates left to right only"
  two_streams = kind.streams == 2
  no_streams = f"need two streams, which {m.mechanism} has not"
  return [
    *(
      (path, not kind.left_to_right or order == "left_to_right", one_way)
      for path, order in (
        ("orders.family", config.orders.family),
        ("sample.order", config.sample.order),
        ("score.order", config.score.order),
      )
    ),
    ("eval.estimators", estimators, "name at least one estimator"),
    (
      "eval.estimators",
      estimators <= set(kind.estimators),
      f"mechanism {m.mechanism} has the likelihoods: "
      + ", ".join(kind.estimators),
    ),
    (
      "sample.method",
      config.sample.method in kind.methods,
      f"mechanism {m.mechanism} generates by: {', '.join(kind.methods)}",
    ),
    (
      "orders.groups",
      two_streams or config.orders.groups == "none",
      f"groups {no_streams}",
    ),
    (
      "model.content_sees",
      _is_look(m.content_sees),
      "must be prefix, self, or last:k, nearest:k or random:k with a whole "
      "number k of at least 1, such as last:8",
    ),
    (
      "model.content_sees",
      two_streams or m.content_sees == "prefix",
      f"content rows {no_streams}; take prefix",
    ),
    (
      "model.content_sees",
      config.orders.groups == "none" or m.content_sees == "prefix",
      f"with config.orders.groups={config.orders.groups} content rows see to "
      "the end of their group; take prefix",
    ),
    (
      "model.shifted",
      "target" in own.query or not m.shifted,
      f"mechanism {m.mechanism} rotates no query by its target; leave it out",
    ),
    (
      "model.positions",
      m.positions == "rotary" or own.has_one_position,
      f"mechanism {m.mechanism} "
      + (
        "tells a row its target by rotation, and learned positions rotate "
        f"nothing; leave the field out, or take one of {_LEARNED}"
        if own.query
        else "learns its positions anyway; leave the field out"
      ),
    ),
    (
      "score.width",
      config.score.width <= 1 or config.orders.groups != "none",
      "needs a model that was trained with groups; it must be 0 or 1 with "
      "config.orders.groups=none",
    ),
    (
      "model.sentinels",
      not kind.masked or m.sentinels == 2 or config.data.documents != "pad",
      f"mechanism {m.mechanism} sees all positions of a padded document, and "
      "so its length: with config.data.documents=pad take 2 sentinels, which "
      "tell the end to the model",
    ),
    (
      "train.query_fraction",
      two_streams or config.train.query_fraction == 1,
      f"query rows {no_streams}",
    ),
    *(
      (
        f"model.{name}",
        kind.query or backbone.has_default(m, name),
        f"mechanism {m.mechanism} with config.model.positions={m.positions} "
        "rotates nothing; leave it out",
      )
      for name in backbone.SCALING
    ),
  ]


def _is_look(text):
  """Return whether config.model.content_sees can be `text`."""
  try:
    mechanisms.look(text)
  except ValueError:
    return False
  return True


def _of_orders(config):
  """Return the rules for orders and groups."""
  o, T = config.orders, config.model.T
  needs_given = (
    "given" in (o.family, config.sample.order, config.score.order)
    or "given_order" in config.eval.estimators + config.benchmark.estimators
  )
  # The lengths are compared first: T may be a stranger's, and huge.
  is_permutation = len(o.given) == T and (
    sorted(o.given) == list(range(1, T + 1))
  )
  return [
    (
      "orders.given",
      is_permutation or not (needs_given or o.given),
      f"must be a permutation of 1..{T} (config.model.T)",
    ),
    (
      "orders.group_sizes",
      o.groups != "given"
      or (sum(o.group_sizes) == T and min(o.group_sizes) > 0),
      f"must be positive numbers that sum to config.model.T={T}",
    ),
    (
      "orders.block_width",
      "block" not in o.family or o.block_width <= T,
      f"must be at most config.model.T={T}",
    ),
  ]


def _of_training(config):
  """Return the rules for training, the optimizer and the computation."""
  t, optimizer, compute = config.train, config.optimizer, config.compute
  return [
    (
      "compute.accumulate",
      t.batch_size % compute.accumulate == 0,
      f"must divide config.train.batch_size={t.batch_size}",
    ),
    (
      "train.start_from",
      not t.start_from or not config.study.sweep,
      "the runs of a study begin with new weights; leave the field out",
    ),
    *(
      (
        f"train.{name}",
        not getattr(t, name) or not config.study.sweep,
        "the runs of a study train all weights, without a teacher; leave the "
        "field out",
      )
      for name in ("lora_rank", "frozen", "distill")
    ),
    (
      "train.lora_targets",
      t.lora_targets or not t.lora_rank,
      "name at least one, such as attention",
    ),
    (
      "train.lora_targets",
      "gate" not in t.lora_targets or config.model.mlp == "swiglu",
      "config.model.mlp=gelu has no gate; take mlp, which is up and down here",
    ),
    (
      "train.distill",
      not t.distill or not config.model.kind.masked,
      f"mechanism {config.model.mechanism} has no order of known tokens to "
      "compare with a teacher's; leave the field out",
    ),
    (
      "mesh.sequence",
      not t.distill or config.mesh.sequence == 1,
      "must be 1 with config.train.distill",
    ),
    (
      "match.change",
      config.match.by != "parameters" or config.match.change != "steps",
      "steps change no parameters: choose L, D or mlp_width",
    ),
    (
      "optimizer.decay_steps",
      optimizer.schedule != "stable_decay"
      or optimizer.warmup_steps + optimizer.decay_steps <= t.steps,
      f"with config.optimizer.warmup_steps={optimizer.warmup_steps} it must "
      f"fit into config.train.steps={t.steps}",
    ),
    (
      "compute.dtype",
      compute.attention != "cudnn" or compute.dtype == "bfloat16",
      "config.compute.attention=cudnn computes in bfloat16 only",
    ),
  ]


def _of_a_study(study):
  """Return the rules for a study."""
  return [
    (
      "study.share_index",
      study.share_index < study.share_count,
      f"must be below config.study.share_count={study.share_count}",
    ),
    (
      "study.temperature_low",
      study.temperature_low < study.temperature_high,
      f"must be below config.study.temperature_high={study.temperature_high}",
    ),
    (
      "study.rates",
      study.rates and all(0 < rate < math.inf for rate in study.rates),
      "name at least one learning rate; all above 0",
    ),
    (
      "study.tune_lengths",
      all(T > 0 for T in study.tune_lengths),
      "must be lengths of at least 1",
    ),
    (
      "study.tune_seeds",
      len(set(study.tune_seeds)) == len(study.tune_seeds) == 2,
      "must be two different seeds",
    ),
  ]


def _of_a_benchmark(config):
  """Return the rules for a benchmark."""
  b, m = config.benchmark, config.model
  return [
    (
      "benchmark.stride",
      b.stride <= m.T,
      f"must be at most config.model.T={m.T}",
    ),
    (
      "benchmark.estimators",
      set(b.estimators) <= set(m.kind.estimators),
      f"mechanism {m.mechanism} has the likelihoods: "
      + ", ".join(m.kind.estimators),
    ),
    (
      "benchmark.temperatures",
      b.temperatures and all(0 < t < math.inf for t in b.temperatures),
      "name at least one temperature; all above 0",
    ),
  ]


def _of_symbols(data):
  """Return the rules for the tokenizer."""
  found = data.tokenizer in ("bpe", "chars")
  fix = f"has no effect with config.data.tokenizer={data.tokenizer}; leave it "
  fix += "out, or take the tokenizer bpe or chars"
  return [
    ("data.vocabulary", found or not data.vocabulary, fix),
    ("data.tokenizer_file", found or not data.tokenizer_file, fix),
    (
      "data.vocabulary",
      data.tokenizer != "bpe" or not 0 < data.vocabulary < 256,
      "bpe has a symbol for each of the 256 bytes; take 256 or more, or 0",
    ),
  ]


def _of_texts(config):
  """Return the rules for generated and scored texts."""
  sample, marks = config.sample, config.score.marks
  in_steps = ("parallel", "ancestral", "confidence")
  return [
    (
      "data.tokenizer",
      config.data.tokenizer == "char27" or not config.study.sweep,
      "a study reports bits per character, so its tokens must be characters: "
      "take char27",
    ),
    (
      "data.documents",
      config.data.documents == "join" or not config.study.sweep,
      "a study reads windows of characters without ends: take join",
    ),
    (
      "sample.steps",
      not sample.steps or sample.method in in_steps,
      f"is for {', '.join(in_steps[:2])} and {in_steps[2]}; must be 0 with "
      f"config.sample.method={sample.method}",
    ),
    (
      "sample.length",
      sample.length <= config.model.T,
      f"must be at most config.model.T={config.model.T}",
    ),
    (
      "sample.blank",
      len(sample.blank) <= 1 or sample.blank == "auto",
      "must be one character, '' for none, or auto",
    ),
    (
      "score.marks",
      marks in ("", "auto")
      or len(marks) == len({*marks, sample.blank}) - 1 == 2,
      "must be two characters that differ from each other and from "
      f"config.sample.blank={sample.blank!r}, or '', or auto",
    ),
  ]


def differences(
  saved: config_lib.Config, wanted: config_lib.Config, binds: tuple[str, ...]
) -> Iterator[tuple[str, Any, Any]]:
  """Yield (path, saved value, wanted value) of bound fields that differ.

  Args:
    saved: the config of the checkpoint.
    wanted: the config of the command line.
    binds: the bindings to compare. ("model",) covers the use of the parameters.
      ("model", "run") covers resuming the run.
  """
  for (path, field, old), (_, _, new) in zip(
    config_lib.leaves(saved), config_lib.leaves(wanted)
  ):
    if field.metadata.get("binds", "") in binds and old != new:
      yield path, old, new


def schedule_steps_error(
  saved: config_lib.Config, wanted: config_lib.Config, step: int
) -> str:
  """Return why train.steps may not change at `step`, or "" if it may.

  The steps already taken must have had the learning rates that `wanted` gives
  them. Otherwise the result is not one run.

  Args:
    saved: the config of the checkpoint.
    wanted: the config of the command line.
    step: the step of the checkpoint.
  """
  old, new, opt = saved.train.steps, wanted.train.steps, wanted.optimizer
  if old == new or opt.schedule == "constant":
    return ""
  if opt.schedule == "cosine":
    return (
      f"the cosine schedule was laid out for {old} steps; start a new run, or "
      "train with --config.optimizer.schedule=stable_decay, which can be "
      "prolonged before its decay starts"
    )
  decay_start = min(old, new) - opt.decay_steps
  if step > decay_start:
    return (
      f"the checkpoint at step {step} lies in the decay, which starts at step "
      f"{decay_start}; resume from an earlier checkpoint"
    )
  return ""
