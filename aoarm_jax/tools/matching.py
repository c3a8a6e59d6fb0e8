"""Fair comparisons: equal parameters, or equal FLOPs of training."""

import dataclasses
import runpy

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import cost
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import text

# Head dims stay multiples of 8, which fused attention wants; so does F.
_MULTIPLE = 8
_LARGEST = 1 << 26  # Steps, layers, widths in units.
_EQUAL = 0.1  # What is off by more is not called equal.


def parameters(model: config_lib.Model, vocabulary: int) -> int:
  """How many numbers are trained."""
  bind = network_lib.Bind(model, config_lib.Compute(), vocabulary)
  return sum(leaf.size for leaf in jax.tree.leaves(bind.abstract_params))


def training_flops(config: config_lib.Config, vocabulary: int) -> float:
  """Of all steps: see cost.training_flops_per_token."""
  per_token = cost.training_flops_per_token(
    config.model,
    vocabulary,
    config.train.batch_size,
    config.train.query_fraction,
  )
  tokens = config.model.T * config.train.batch_size * config.train.steps
  return per_token * tokens


_MEASURES = {
  "parameters": lambda config, V: parameters(config.model, V),
  "training_flops": training_flops,
}


def match(
  config: config_lib.Config, other: config_lib.Config, vocabulary: int
) -> config_lib.Config:
  """Changes config.match.change until config.match.by equals that of `other`.

  Args:
    config: to be changed.
    other: what it is to be as large or as long as.
    vocabulary: V.

  Returns:
    The config with the nearest value: a whole number of steps or layers, heads
    whose width is a multiple of 8, an MLP width that is.

  Raises:
    ConfigError: no value comes within 10%.
  """
  by, change = config.match.by, config.match.change
  measure = _MEASURES[by]
  target = measure(other, vocabulary)
  unit = {"D": _MULTIPLE * config.model.N, "mlp_width": _MULTIPLE}.get(
    change, 1
  )

  def with_value(count):
    part = dataclasses.replace(
      getattr(config, _section(change)), **{change: count * unit}
    )
    return dataclasses.replace(config, **{_section(change): part})

  def size(count):
    return measure(with_value(count), vocabulary)

  # The largest count below the target; one of it and the next is the nearest.
  low, high = 1, 2
  while size(high) < target and high < _LARGEST:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if size(middle) < target else (low, middle)
  count = min((low, high), key=lambda count: abs(size(count) - target))
  share = size(count) / target
  if abs(share - 1) > _EQUAL:
    raise config_lib.ConfigError(
      f"config.match.change={change!r}: no {change} gives "
      f"{config.model.mechanism} the {by} of {config.match.to}; the nearest "
      f"has {share:.2f} of them"
    )
  return with_value(count)


def _section(change):
  return "train" if change == "steps" else "model"


def _changed(config):
  """The value that was matched, readable."""
  change = config.match.change
  return f"{getattr(getattr(config, _section(change)), change):,}"


def resolve(
  config: config_lib.Config, config_file: str, vocabulary: int
) -> config_lib.Config:
  """The config, matched to the experiment that config.match.to names.

  Args:
    config: nothing is changed where match.to is "".
    config_file: path of its own file; the other's lies beside it.
    vocabulary: V.

  Raises:
    ConfigError: there is no such file or variant, or no match; see `match`.
  """
  wanted = config.match
  if not wanted.to:
    return config
  name, _, variant = wanted.to.partition(":")
  path = epath.Path(config_file.partition(":")[0]).parent / f"{name}.py"
  if not path.exists():
    raise config_lib.ConfigError(
      f"config.match.to={wanted.to!r}: there is no {path}"
    )
  get_config = runpy.run_path(str(path))["get_config"]
  other = config_lib.from_config_dict(get_config(variant or config.variant))
  if wanted.steps:
    train = dataclasses.replace(other.train, steps=wanted.steps)
    other = dataclasses.replace(other, train=train)
  matched = match(config, other, vocabulary)
  measure = _MEASURES[wanted.by]
  logging.info(
    "match: %s=%s has %.4f of the %s of %s",
    wanted.change,
    _changed(matched),
    measure(matched, vocabulary) / measure(other, vocabulary),
    wanted.by.replace("_", " "),
    wanted.to,
  )
  return matched


def table(config: config_lib.Config, vocabulary: int) -> str:
  """What every mechanism costs at this config's sizes, as aligned text.

  The last columns say which one change gives a mechanism the parameters (L,
  mlp_width) or the training FLOPs (steps) of the config's own.
  """
  header = (
    "mechanism", "parameters", "forward", "training", "cache",
    "L", "mlp_width", "steps",
  )  # fmt: skip
  units = (
    "", "", "MFLOP/token", "MFLOP/token", "bytes/token",
    "equal parameters", "equal parameters", "equal FLOPs",
  )  # fmt: skip
  rows = [header, units]
  for name in mechanisms.MECHANISMS:
    own = dataclasses.replace(
      config, model=dataclasses.replace(config.model, mechanism=name)
    )
    if own.model.kind.streams == 1:
      # Every row of a lone stream predicts.
      train = dataclasses.replace(own.train, query_fraction=1.0)
      own = dataclasses.replace(own, train=train)
    B, T = own.train.batch_size, own.model.T
    forward = cost.forward_flops(own.model, vocabulary, B) / (B * T)
    training = cost.training_flops_per_token(
      own.model, vocabulary, B, own.train.query_fraction
    )
    rows.append(
      (
        name,
        f"{parameters(own.model, vocabulary):,}",
        f"{forward / 1e6:.2f}",
        f"{training / 1e6:.2f}",
        f"{cost.cache_bytes_per_token(own.model, own.compute.dtype):,}",
        *(
          _matched(own, config, vocabulary, by, change)
          for by, change in (
            ("parameters", "L"),
            ("parameters", "mlp_width"),
            ("training_flops", "steps"),
          )
        ),
      )
    )
  return text.aligned(rows, "<" + ">" * len(units[1:])).rstrip("\n")


def _matched(own, config, vocabulary, by, change):
  own = dataclasses.replace(
    own, match=config_lib.Match(config.model.mechanism, by, change)
  )
  try:
    return _changed(match(own, config, vocabulary))
  except config_lib.ConfigError:
    return "-"  # No value comes near.
