"""The sweep: lines of text -> cells, and the configuration of each.

A line is a product of values, a cell is one point of it:

  mechanism=two_stream,mdlm T=128,1024 budget=steps,flops seed=0,1

| key       | values                                           | left out     |
|-----------|--------------------------------------------------|--------------|
| mechanism | names of mechanisms.MECHANISMS                   | config.model |
| size      | width x layers x heads, as in 256x10x4           | config.model |
| T         | positions, at config.study.tokens_per_step       | config.model |
| orders    | uniform, left_to_right, block16: windows of that | uniform      |
|           | width (as wide as the text: uniform); curriculum |              |
|           | from left to right to uniform                    |              |
| budget    | steps, flops or parameters, see `resolve`        | steps        |
| rate      | peak learning rate; tuned; searched: see rates   | as config    |
| steps     | of the reference mechanism                       | config.train |
| seed      | of parameters, batches and orders                | config.seed  |
| with      | fields that differ from the config's, as in      | none         |
|           | optimizer.b2:0.95+optimizer.clip_norm:0.3; the   |              |
|           | reference run that sets a budget has no changes  |              |

Cells run line by line, and within a line as nested loops in the order in which
its keys are written, the last one fastest. A cell that a line above already has
is dropped.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from typing import Any

from aoarm_jax.config import mechanisms
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import rates
from aoarm_jax.tools import matching

BUDGETS = ("steps", "flops", "parameters")
TUNED = "tuned"
TIED = 0.01  # Bits a character between two learning rates that are as good.
_FAMILY = re.compile(r"(uniform|left_to_right|curriculum|block)(\d*)$")
_SIZE = re.compile(r"(\d+)x(\d+)x(\d+)$")
# What of config.study decides the numbers of a cell.
_MEASURED_BY = (
  "temperature_low",
  "temperature_high",
  "temperatures",
  "characters",
  "vocabulary_split",
  "ngram",
  "profile_sequences",
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the sweep; the fields are the keys of a line."""

  mechanism: str
  size: str
  T: int
  orders: str
  budget: str
  rate: str
  steps: int
  seed: int
  changes: str = ""

  @property
  def label(self) -> str:
    """For people, and for config.study.cells.

    A change has two words, such as with=model.L:18 and L=18.
    """
    words = [
      f"{self.mechanism} {self.size} T={self.T} {self.orders} equal "
      f"{self.budget} steps={self.steps} rate={self.rate} seed={self.seed}"
    ]
    if self.changes:
      words += [f"with={self.changes}", *self._changed]
    return " ".join(words)

  @property
  def _changed(self):
    """The words of the changed fields, such as L=18."""
    return [
      f"{name}={value}"
      for fields in _changes(self.changes).values()
      for name, value in fields.items()
    ]

  @property
  def name(self) -> str:
    """The mechanism and what it changes, such as "two_stream N=8"."""
    words = [self.mechanism, *(self._changed if self.changes else ())]
    if self.orders == "curriculum":
      words.append("curriculum")
    if self.budget == "parameters":
      words.append("equal parameters")
    return " ".join(words)

  @property
  def judged(self) -> "Cell":
    """The cell with the orders that it is evaluated in."""
    orders = "uniform" if self.orders == "curriculum" else self.orders
    return dataclasses.replace(self, orders=orders)

  @property
  def arm(self) -> "Cell":
    """The cell without its seed: cells of one arm differ by it alone."""
    return dataclasses.replace(self, seed=-1)


def expand(config: config_lib.Config) -> list[Cell]:
  """Return all cells of config.study.sweep, in the order in which they run.

  Raises:
    ConfigError: a line cannot be read. The message says what is wrong and how
      to mend it.
  """
  wanted: dict[Cell, None] = {}
  for line in re.split(r"[\n;]", config.study.sweep):
    if line.strip():
      wanted |= dict.fromkeys(_of_line(line.strip(), config))
  if not wanted:
    raise config_lib.ConfigError(
      "config.study.sweep has no cells: choose --config=configs/"
      "study_tradeoff.py, or write lines as in mechanism=two_stream T=128,1024"
    )
  return list(wanted)


def trials(cell: Cell, config: config_lib.Config) -> list[Cell]:
  """The cells that decide the learning rate of a cell; [] where it is given.

  One for each of config.study.rates, for its mechanism (of an ablation: what it
  changes), at the configuration's size, the length of config.study.tune_lengths
  that is nearest to its own, in uniform orders, at equal steps and seed 0: an
  arm that differs by size, length or orders alone has the same rate. They are
  cells like any other: the one with the chosen rate is the tuned one of its
  arm.
  """
  if cell.rate != TUNED:
    return []
  lengths = config.study.tune_lengths or (cell.T,)
  orders = cell.orders if cell.orders == "left_to_right" else "uniform"
  trial = dataclasses.replace(
    cell,
    mechanism=unablated(cell.mechanism),
    size=size_of(config.model),
    T=min(lengths, key=lambda T: abs(math.log(T / cell.T))),
    orders=orders,
    budget="steps",
    seed=0,
  )
  return [
    dataclasses.replace(trial, rate=f"{rate:g}") for rate in config.study.rates
  ]


def unablated(mechanism: str) -> str:
  """The mechanism of which an ablation changes one thing; else itself."""
  return mechanisms.MECHANISMS[mechanism].changes_one_thing_of or mechanism


def with_trials(
  cells: list[Cell],
  config: config_lib.Config,
  outcome: rates.Outcome = lambda cell: None,
) -> list[Cell]:
  """Returns these cells, each after the trials that decide its learning rate.

  Args:
    cells: of `expand`.
    config: of the study.
    outcome: what trials gave, see rates.Outcome; a search for a rate names its
      next trials only when the first ones are done.
  """
  wanted: dict[Cell, None] = {}
  for cell in cells:
    if rates.parse(cell.rate):
      needed, _ = rates.plan(cell, config, outcome)
    else:
      needed = trials(cell, config)
    wanted |= dict.fromkeys([*needed, cell])
  return list(wanted)


def size_of(model: config_lib.Model) -> str:
  """As a line writes it."""
  return f"{model.D}x{model.L}x{model.N}"


def _of_line(line, config):
  model = config.model
  values = {
    "mechanism": [model.mechanism],
    "size": [size_of(model)],
    "T": [str(model.T)],
    "orders": ["uniform"],
    "budget": ["steps"],
    "rate": [f"{config.optimizer.peak_learning_rate:g}"],
    "steps": [str(config.train.steps)],
    "seed": [str(config.seed)],
    "with": [""],
  }
  written = {}
  for part in line.split():
    key, _, value = part.partition("=")
    if key not in values or not value:
      raise _error(
        line, f"{part!r} is not key=values; keys: {', '.join(values)}"
      )
    if key in written:
      raise _error(line, f"{key} is there twice")
    written[key] = value.split(",")
  keys = [*(k for k in values if k not in written), *written]
  for point in itertools.product(*(({**values, **written})[k] for k in keys)):
    yield _cell(line, dict(zip(keys, point)))


def _cell(line, point):
  name = point["mechanism"]
  checks = (
    ("mechanism", name in mechanisms.MECHANISMS),
    ("size", _SIZE.match(point["size"])),
    ("orders", _FAMILY.match(point["orders"])),
    ("budget", point["budget"] in BUDGETS),
    ("rate", point["rate"] == TUNED or _is_rate(point["rate"])),
    ("with", not point["with"] or _changes(point["with"])),
    *((key, point[key].isdecimal()) for key in ("T", "steps", "seed")),
  )
  for key, good in checks:
    if not good:
      raise _error(line, f"{key}={point[key]} cannot be; see study/cells.py")
  family = _FAMILY.match(point["orders"])
  assert family is not None
  width = family[2]
  if mechanisms.MECHANISMS[name].left_to_right:
    point["orders"] = "left_to_right"
  elif width and int(width) >= int(point["T"]):
    point["orders"] = "uniform"
  if _is_number(point["rate"]):
    point["rate"] = f"{float(point['rate']):g}"
  numbers = {key: int(point[key]) for key in ("T", "steps", "seed")}
  changes = point.pop("with")
  return Cell(**{**point, **numbers}, changes=changes)


def _is_number(text):
  try:
    return float(text) > 0
  except ValueError:
    return False


def _is_rate(text):
  try:
    return rates.parse(text) is not None or _is_number(text)
  except ValueError:
    return False


def _changes(text):
  """Return the changes that section.field:value+... writes.

  Returns:
    {section: {field: value}}; {} if the text cannot be read.
  """
  changes: dict[str, dict[str, Any]] = {}
  for part in text.split("+"):
    path, _, value = part.partition(":")
    section, _, name = path.partition(".")
    kinds = {
      f"{s}.{n}": type(v)
      for s, n, v in (
        (*leaf[0].split(".")[1:], leaf[2])
        for leaf in config_lib.leaves(config_lib.Config())
        if leaf[0].count(".") == 2
      )
    }
    kind = kinds.get(path)
    if kind not in (int, float, str):
      return {}
    try:
      changes.setdefault(section, {})[name] = kind(value)
    except ValueError:
      return {}
  return changes


def _error(line, what):
  return config_lib.ConfigError(f"config.study.sweep: {line!r}: {what}")


@functools.cache
def resolve(
  cell: Cell, config: config_lib.Config, rate: float
) -> config_lib.Config:
  """The configuration that a cell is trained and measured with.

  Budgets, against config.study.reference at `cell.steps` steps: `steps` as many
  steps, and so as much text; `flops` as many steps as give the same FLOPs of
  training; `parameters` as many steps, and an MLP as wide as gives the same
  number of parameters.

  Args:
    cell: of `expand`.
    config: of the study.
    rate: peak learning rate.

  Raises:
    ConfigError: values that cannot be together.
  """
  if config.study.tokens_per_step < cell.T:
    raise config_lib.ConfigError(
      f"config.study.tokens_per_step={config.study.tokens_per_step}: no "
      f"sequence of T={cell.T} is in a step"
    )
  plain = _plain(cell, config)
  is_reference = cell.mechanism == config.study.reference and not cell.changes
  if cell.budget != "steps" and not is_reference:
    other = dataclasses.replace(
      cell, mechanism=config.study.reference, changes=""
    )
    try:
      value = _matched(
        plain.replace("study", config_lib.Study()),
        _plain(other, config).replace("study", config_lib.Study()),
        cell.budget,
      )
    except config_lib.ConfigError as error:
      why = str(error).partition(": ")[2]
      raise config_lib.ConfigError(
        f"config.study.sweep: {cell.label}: {why}"
      ) from None
    if cell.budget == "flops":
      plain = _with(plain, train=dict(steps=value))
    elif value != plain.model.F:
      plain = _with(plain, model=dict(mlp_width=value))
  plain = plain.replace("optimizer.peak_learning_rate", rate)
  plain = plain.replace("seed", cell.seed)
  if share := config.study.decay_share:
    decay = max(1, round(share * plain.train.steps))
    plain = _with(
      plain,
      optimizer=dict(
        schedule="stable_decay", decay_steps=decay, final_share=0.0
      ),
    )
  return config_rules.validate(plain)


def _plain(cell, config):
  """At equal steps, whatever the cell's budget; without rate and seed."""
  size, orders_match = _SIZE.match(cell.size), _FAMILY.match(cell.orders)
  judged = _FAMILY.match(cell.judged.orders)
  # `expand` refuses a line whose size or orders do not match.
  assert size, cell.label
  assert orders_match, cell.label
  assert judged, cell.label
  D, L, N = map(int, size.groups())
  family, width = orders_match.groups()
  kind = mechanisms.MECHANISMS[cell.mechanism]
  asked = judged[1]
  if kind.left_to_right:
    estimator = "left_to_right"
  elif kind.masked:
    estimator = "elbo"
  else:
    estimator = "any_order" if asked == "uniform" else "training_order"
  # A full pass's attention is not a fused one: its maps are not all kept.
  remat = config.compute.remat or (kind.masked and cell.T > 1024)
  batch = config.study.tokens_per_step // cell.T
  orders = dict(family=family)
  if width:
    orders["block_width"] = int(width)
  # A curve over budgets asks for the other likelihood of any order as well.
  both = config.study.decay_share > 0 and estimator == "any_order"
  plain = _with(
    config,
    model=dict(mechanism=cell.mechanism, T=cell.T, D=D, L=L, N=N),
    orders=orders,
    train=dict(batch_size=batch, steps=cell.steps),
    eval=dict(
      estimators=(estimator, "left_to_right") if both else (estimator,)
    ),
    sample=dict(order=asked, method="sequential"),
    compute=dict(remat=remat),
  )
  if not cell.changes:
    return plain
  # Whatever a change makes of the batch, evaluation stays the same.
  if not plain.eval.batch_size:
    plain = _with(plain, eval=dict(batch_size=batch))
  return _with(plain, **_changes(cell.changes))


def _with(config, **sections):
  """The config with other values of some fields of some sections."""
  for section, fields in sections.items():
    for name, value in fields.items():
      config = config.replace(f"{section}.{name}", value)
  return config


@functools.cache
def _matched(config, other, budget):
  by, change = ("training_flops", "steps")
  if budget == "parameters":
    by, change = ("parameters", "mlp_width")
  wanted = config_lib.Match(other.model.mechanism, by, change)
  matched = matching.match(config.replace("match", wanted), other)
  return getattr(matched.train if change == "steps" else matched.model, change)


def folder_name(cell: Cell, resolved: config_lib.Config) -> str:
  """The folder of a cell's files: what it is, and a digest of all that counts.

  Cells whose configurations agree in all that decides their numbers share it:
  the reference mechanism has one for all three budgets.
  """
  # What has its default is left out, so that a new field of the schema does not
  # make old cells strangers.
  counts = {
    name: _not_default(getattr(resolved, name))
    for name in ("model", "orders", "optimizer", "train", "eval")
  }
  counts["order"] = resolved.sample.order
  counts["seed"] = resolved.seed
  counts["tokenizer"] = resolved.data.tokenizer
  counts["dtype"] = resolved.compute.dtype
  counts["study"] = {k: getattr(resolved.study, k) for k in _MEASURED_BY}
  digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
  parts = (
    cell.mechanism,
    size_of(resolved.model),
    f"T{cell.T}",
    cell.orders,
    f"F{resolved.model.F}",
    f"steps{resolved.train.steps}",
    f"rate{resolved.optimizer.peak_learning_rate:g}",
    f"seed{cell.seed}",
    digest.hexdigest()[:8],
  )
  return "-".join(parts)


def trunk_name(cell: Cell, resolved: config_lib.Config) -> str:
  """The folder of the trunk of a cell: what is common to all its budgets."""
  common = _with(
    resolved,
    train=dict(steps=1),
    optimizer=dict(decay_steps=1),
  )
  return folder_name(cell, common).replace("-steps1-", "-")


def _not_default(section):
  default = type(section)()
  return {
    field.name: getattr(section, field.name)
    for field in dataclasses.fields(section)
    if getattr(section, field.name) != getattr(default, field.name)
  }
