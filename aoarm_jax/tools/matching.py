"""Fair comparisons: equal parameters, or equal FLOPs of training."""

import difflib
import functools
import runpy
from collections.abc import Callable, Iterable

from absl import logging
from etils import epath

from aoarm_jax.config import experiments, mechanisms
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import cost
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import text

# Fused attention needs heads whose width is a multiple of 8. The width of the
# MLP is kept a multiple of 8 too.
_MULTIPLE = 8
_LARGEST = 1 << 26  # The most steps, layers, or multiples of 8 that are tried.
_TOLERANCE = 0.1  # A match that is further off, relatively, is refused.


# A search asks for the same configs again and again.
@functools.lru_cache(maxsize=128)
def parameters(config: config_lib.Config) -> int:
  """Returns how many numbers are trained."""
  network = network_lib.Network(config)
  return run_dir.parameter_count(network.abstract_params)


def symbol_parameters(config: config_lib.Config) -> int:
  """Returns how many of the parameters are the embedding and the head."""
  params = network_lib.Network(config).abstract_params
  symbols = {name: params.get(name, {}) for name in ("embedding", "head")}
  return run_dir.parameter_count(symbols)


def training_flops(config: config_lib.Config) -> float:
  """Returns the FLOPs of all steps, see cost.training_flops_per_token."""
  tokens = config.model.T * config.train.batch_size * config.train.steps
  return cost.training_flops_per_token(config) * tokens


_MEASURES: dict[str, Callable[[config_lib.Config], float]] = {
  "parameters": parameters,
  "training_flops": training_flops,
}


def match(
  config: config_lib.Config, other: config_lib.Config
) -> config_lib.Config:
  """Changes one field until a config has the parameters or FLOPs of another.

  Args:
    config: to be changed. Its match.change names the field, and its match.by
      the measure that becomes equal.
    other: the config whose measure is the target.

  Returns:
    The config with the value that comes nearest: a whole number of steps or
    layers, or a width of heads or of the MLP that is a multiple of 8.

  Raises:
    ConfigError: no value comes within 10%.
  """
  by, change = config.match.by, config.match.change
  measure = _MEASURES[by]
  target = measure(other)
  unit = {"D": _MULTIPLE * config.model.N, "mlp_width": _MULTIPLE}.get(
    change, 1
  )

  def with_value(count):
    return config.replace(f"{_section(change)}.{change}", count * unit)

  def size(count):
    return measure(with_value(count))

  # Bisection: low stays below the target, unless 1 is too large already.
  low, high = 1, 2
  while size(high) < target and high < _LARGEST:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if size(middle) < target else (low, middle)
  count = min((low, high), key=lambda count: abs(size(count) - target))
  share = size(count) / target
  if abs(share - 1) > _TOLERANCE:
    raise config_lib.ConfigError(
      f"config.match.change={change!r}: no {change} gives "
      f"{config.model.mechanism} the {by} of {config.match.to}; the nearest "
      f"has {share:.2f} of them"
    )
  return with_value(count)


def _section(change):
  return "train" if change == "steps" else "model"


def _changed(config):
  """Returns the value that was matched, for people."""
  change = config.match.change
  return f"{getattr(getattr(config, _section(change)), change):,}"


def resolve(
  config: config_lib.Config,
  config_file: str,
  overridden: Iterable[str] = (),
) -> config_lib.Config:
  """Matches a config to the experiment that config.match.to names.

  The other experiment takes the values that the command line set. It keeps its
  mechanism, and its own values of fields that its mechanism does not allow to
  be set so. The log names its sizes.

  Args:
    config: to be changed. It stays as it is where match.to is "".
    config_file: path of the config's file. The other experiment's file lies in
      the same folder, or is one of this package.
    overridden: paths of the fields that the command line set, such as
      "model.D". Their values are those of `config`.

  Raises:
    ConfigError: there is no such file or variant, the other experiment cannot
      have these values, or there is no match; see `match`.
  """
  wanted = config.match
  if not wanted.to:
    return config
  name, colon, variant = wanted.to.partition(":")
  path = epath.Path(config_file.partition(":")[0]).parent / f"{name}.py"
  if not path.exists() and name in experiments.names():
    path = epath.Path(experiments.folder() / f"{name}.py")
  if not path.exists():
    near = difflib.get_close_matches(
      epath.Path(name).stem, experiments.names(), 1
    )
    hint = f"; did you mean {near[0]}{colon}{variant}?" if near else ""
    raise config_lib.ConfigError(
      f"config.match.to={wanted.to!r}: there is no {path}: name a file in the "
      "folder of this experiment, without .py, or an experiment of this "
      f"package{hint}"
    )
  get_config = runpy.run_path(str(path))["get_config"]
  other = config_lib.from_config_dict(get_config(variant or config.variant))
  other = _with_overrides(other, config, overridden)
  if wanted.steps:
    other = other.replace("train.steps", wanted.steps)
  try:
    config_rules.validate(other)
  except config_lib.ConfigError as error:
    raise config_lib.ConfigError(
      f"config.match.to={wanted.to!r}: with the values of this command it "
      f"cannot be: {error}"
    ) from None
  matched = match(config, other)
  measure = _MEASURES[wanted.by]
  logging.info(
    "match: %s=%s has %.4f of the %s of %s (%s)",
    wanted.change,
    _changed(matched),
    measure(matched) / measure(other),
    wanted.by.replace("_", " "),
    wanted.to,
    _sizes(other),
  )
  return matched


# The command line sets these for its own experiment alone.
_OWN = ("name", "variant", "model.mechanism")


def _with_overrides(other, config, overridden):
  """Returns the other config with this config's values of some fields."""
  kept = other
  for path in overridden:
    if path not in _OWN and not path.startswith("match."):
      section, _, field = path.partition(".")
      value = getattr(config, section)
      other = other.replace(path, getattr(value, field) if field else value)
  for path in config_rules.refused_by_mechanism(other):
    section, _, field = path.partition(".")
    value = getattr(getattr(kept, section), field)
    other = other.replace(path, value)
    logging.info(
      "match: %s keeps config.%s=%r: its mechanism does not allow the value of "
      "this command",
      kept.name,
      path,
      value,
    )
  return other


def _sizes(config):
  """Returns the sizes that decide what a training costs, for people."""
  model, train = config.model, config.train
  sizes = {name: getattr(model, name) for name in ("T", "D", "L", "N", "F")}
  sizes |= {"batch_size": train.batch_size, "steps": train.steps}
  if train.query_fraction < 1:
    sizes["query_fraction"] = train.query_fraction
  return ", ".join(f"{name}={value:,}" for name, value in sizes.items())


def table(config: config_lib.Config) -> str:
  """Returns a table of what every mechanism costs at this config's sizes.

  Parameters of symbols are those of the embedding and the head, which grow with
  the vocabulary. The last columns say which L or mlp_width gives a mechanism as
  many parameters as the config's mechanism has, and which number of steps as
  many FLOPs.
  """
  header = (
    "mechanism",
    "parameters",
    "of symbols",
    "forward",
    "training",
    "cache",
    "L",
    "mlp_width",
    "steps",
  )
  units = (
    "",
    "",
    "",
    "MFLOP/token",
    "MFLOP/token",
    "bytes/token",
    "equal parameters",
    "equal parameters",
    "equal FLOPs",
  )
  rows = [header, units]
  for name in mechanisms.MECHANISMS:
    own = config.replace("model.mechanism", name)
    if own.model.kind.streams == 1:
      # With one stream, every row predicts.
      own = own.replace("train.query_fraction", 1.0)
    tokens = own.train.batch_size * own.model.T
    every = own.replace("train.query_fraction", 1.0)
    forward = cost.forward_flops(every) / tokens
    training = cost.training_flops_per_token(own)
    rows.append(
      (
        name,
        f"{parameters(own):,}",
        f"{symbol_parameters(own):,}",
        f"{forward / 1e6:.2f}",
        f"{training / 1e6:.2f}",
        f"{cost.cache_bytes_per_token(own.model, own.compute.dtype):,}",
        *(
          _matched(own, config, by, change)
          for by, change in (
            ("parameters", "L"),
            ("parameters", "mlp_width"),
            ("training_flops", "steps"),
          )
        ),
      )
    )
  return text.aligned(rows, "<" + ">" * len(units[1:])).rstrip("\n")


def _matched(own, config, by, change):
  wanted = config_lib.Match(config.model.mechanism, by, change)
  try:
    return _changed(match(own.replace("match", wanted), config))
  except config_lib.ConfigError:
    return "-"  # No value comes within the tolerance.
