"""Which configs can be, and which changes a run survives."""

import math

from aoarm_jax.config import schema as config_lib


def validate(config: config_lib.Config) -> config_lib.Config:
  """Returns the config if every value can be, alone and together.

  Raises:
    ConfigError: naming the field, its value and the fix.
  """
  if config.data.corpus == "docstrings":
    raise config_lib.ConfigError(
      "config.data.corpus='docstrings': this program no longer reads "
      "docstrings: take the built-in novels with --config.data.corpus=books, "
      "or name a text with --config.data.path="
    )
  for path, field, value in config_lib.leaves(config):
    _check_range(path, field.metadata, value)
  for path, value, good, fix in _relations(config):
    if not good:
      raise config_lib.ConfigError(f"{path}={value!r}: {fix}")
  return config


def _check_range(path, metadata, value):
  bounds = (
    (metadata.get("low"), lambda x, bound: x >= bound, "at least"),
    (metadata.get("high"), lambda x, bound: x <= bound, "at most"),
    (metadata.get("above"), lambda x, bound: x > bound, "above"),
    (metadata.get("below"), lambda x, bound: x < bound, "below"),
    # Whole numbers are int32 on the device.
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
      raise config_lib.ConfigError(
        f"{path}={value!r}: {item!r} is not one of {', '.join(choices)}"
      )
    of = metadata.get("of", int)
    if isinstance(value, tuple) and not choices and type(item) not in (of, int):
      kind = {int: "a whole number", float: "a number"}[of]
      raise config_lib.ConfigError(f"{path}={value!r}: {item!r} is not {kind}")


def _relations(config):
  """Yields (path, value, holds, fix) of conditions between fields."""
  m, o, t = config.model, config.orders, config.train
  yield (
    "config.model.N", m.N, m.D % m.N == 0 and (m.D // m.N) % 2 == 0,
    f"must divide config.model.D={m.D} into heads of even width (rotary pairs)",
  )  # fmt: skip
  one_way = m.kind.left_to_right
  yield (
    "config.orders.family", o.family,
    not one_way or o.family == "left_to_right",
    f"mechanism {m.mechanism} generates left to right only",
  )  # fmt: skip
  yield (
    "config.sample.order", config.sample.order,
    not one_way or config.sample.order == "left_to_right",
    f"mechanism {m.mechanism} generates left to right only",
  )  # fmt: skip
  yield (
    "config.score.order", config.score.order,
    not one_way or config.score.order == "left_to_right",
    f"mechanism {m.mechanism} generates left to right only",
  )  # fmt: skip
  yield (
    "config.eval.estimators", config.eval.estimators,
    len(config.eval.estimators) > 0, "name at least one estimator",
  )  # fmt: skip
  yield (
    "config.eval.estimators", config.eval.estimators,
    not one_way or set(config.eval.estimators) <= {"left_to_right"},
    f"mechanism {m.mechanism} has a left_to_right likelihood only",
  )  # fmt: skip
  needs_given = (
    o.family == "given"
    or "given" in (config.sample.order, config.score.order)
    or "given_order" in config.eval.estimators
  )
  yield (
    "config.orders.given", o.given,
    sorted(o.given) == list(range(1, m.T + 1)) if (needs_given or o.given)
    else True,
    f"must be a permutation of 1..{m.T} (config.model.T)",
  )  # fmt: skip
  yield (
    "config.eval.estimators", config.eval.estimators,
    m.kind.masked or "elbo" not in config.eval.estimators,
    f"elbo is an estimator of masked mechanisms; {m.mechanism} is not masked",
  )  # fmt: skip
  yield (
    "config.eval.estimators", config.eval.estimators,
    not m.kind.masked or "context_ensembled" not in config.eval.estimators,
    f"mechanism {m.mechanism} does not know the order of its context",
  )  # fmt: skip
  methods = (
    ("sequential", "ancestral", "confidence") if m.kind.masked
    else ("sequential", "parallel", "speculative") if one_way
    else ("sequential", "parallel", "speculative", "adaptive")
  )  # fmt: skip
  yield (
    "config.sample.method", config.sample.method,
    config.sample.method in methods,
    f"mechanism {m.mechanism} generates by: {', '.join(methods)}",
  )  # fmt: skip
  yield (
    "config.sample.steps", config.sample.steps,
    not config.sample.steps
    or config.sample.method in ("parallel", "ancestral", "confidence"),
    "is for parallel, ancestral and confidence; must be 0 with "
    f"config.sample.method={config.sample.method}",
  )  # fmt: skip
  two = m.kind.streams == 2
  yield (
    "config.orders.groups", o.groups, two or o.groups == "none",
    f"groups need two streams, which {m.mechanism} has not",
  )  # fmt: skip
  yield (
    "config.orders.group_sizes", o.group_sizes,
    o.groups != "given" or (sum(o.group_sizes) == m.T
                            and min(o.group_sizes) > 0),
    f"must be positive numbers that sum to config.model.T={m.T}",
  )  # fmt: skip
  yield (
    "config.train.query_fraction", t.query_fraction,
    two or t.query_fraction == 1,
    f"query rows need two streams, which {m.mechanism} has not",
  )  # fmt: skip
  yield (
    "config.orders.block_width", o.block_width,
    "block" not in o.family or o.block_width <= m.T,
    f"must be at most config.model.T={m.T}",
  )  # fmt: skip
  yield (
    "config.compute.accumulate", config.compute.accumulate,
    t.batch_size % config.compute.accumulate == 0,
    f"must divide config.train.batch_size={t.batch_size}",
  )  # fmt: skip
  yield (
    "config.match.change", config.match.change,
    config.match.by != "parameters" or config.match.change != "steps",
    "steps change no parameters: choose L, D or mlp_width",
  )  # fmt: skip
  opt = config.optimizer
  yield (
    "config.optimizer.decay_steps", opt.decay_steps,
    opt.schedule != "stable_decay"
    or opt.warmup_steps + opt.decay_steps <= t.steps,
    f"with config.optimizer.warmup_steps={opt.warmup_steps} it must fit into "
    f"config.train.steps={t.steps}",
  )  # fmt: skip
  yield (
    "config.compute.dtype", config.compute.dtype,
    config.compute.attention != "cudnn" or config.compute.dtype == "bfloat16",
    "config.compute.attention=cudnn computes in bfloat16 only",
  )  # fmt: skip
  study = config.study
  yield (
    "config.study.share_index", study.share_index,
    study.share_index < study.share_count,
    f"must be below config.study.share_count={study.share_count}",
  )  # fmt: skip
  yield (
    "config.study.temperature_low", study.temperature_low,
    study.temperature_low < study.temperature_high,
    f"must be below config.study.temperature_high={study.temperature_high}",
  )  # fmt: skip
  yield (
    "config.study.rates", study.rates,
    len(study.rates) > 0 and all(0 < x < math.inf for x in study.rates),
    "name at least one learning rate; all above 0",
  )  # fmt: skip
  yield (
    "config.study.tune_lengths", study.tune_lengths,
    all(T > 0 for T in study.tune_lengths), "must be lengths of at least 1",
  )  # fmt: skip
  yield (
    "config.study.tune_seeds", study.tune_seeds,
    len(set(study.tune_seeds)) == 2, "must be two different seeds",
  )  # fmt: skip
  yield (
    "config.sample.blank", config.sample.blank, len(config.sample.blank) <= 1,
    "must be one character, or '' for none",
  )  # fmt: skip
  marks = config.score.marks
  yield (
    "config.score.marks", marks,
    not marks or (len(marks) == len({*marks, config.sample.blank}) - 1 == 2),
    "must be two characters that differ from each other and from "
    f"config.sample.blank={config.sample.blank!r}, or ''",
  )  # fmt: skip


def differences(
  saved: config_lib.Config, wanted: config_lib.Config, binds: tuple[str, ...]
):
  """Yields (path, saved value, wanted value) of bound fields that differ.

  Args:
    saved: the checkpoint's config.
    wanted: the command line's config.
    binds: ("model",) to use the parameters; ("model", "run") to resume.
  """
  for (path, field, old), (_, _, new) in zip(
    config_lib.leaves(saved), config_lib.leaves(wanted)
  ):
    if field.metadata.get("binds", "") in binds and old != new:
      yield path, old, new


def schedule_steps_error(
  saved: config_lib.Config, wanted: config_lib.Config, step: int
) -> str:
  """Why train.steps may not change from `saved` to `wanted` at `step`, or "".

  The learning rate of the steps already taken must be what `wanted` would have
  given them, or the run is no longer one run.
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
