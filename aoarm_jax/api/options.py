"""The options of calls from Python: their names, their effects, orders."""

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypedDict

import numpy as np

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate_lib

# An order: the name of a family, one permutation, or one for every text.
Order = str | Sequence[int] | Sequence[Sequence[int]] | np.ndarray


class GenerateOptions(TypedDict, total=False):
  """The options of Model.generate: fields of config.sample."""

  batch_size: int
  temperature: float
  top_k: int
  top_p: float
  order: Order
  method: str
  width: int
  steps: int
  schedule: str
  score: str
  seed: int | None


class InfillOptions(GenerateOptions, total=False):
  """The options of Model.infill: fields of config.sample."""

  blank: str


class ScoreOptions(TypedDict, total=False):
  """The options of Model.score: fields of config.score."""

  order: Order
  orders: int
  width: int
  marks: str
  batch_size: int
  seed: int


# The parameters beside these options.
NAMED = {
  GenerateOptions: ("count", "prompt", "length", "normalise"),
  InfillOptions: ("count", "normalise"),
  ScoreOptions: ("blank", "normalise"),
}


def applied(
  config: config_lib.Config,
  section: str,
  options: Mapping[str, Any],
  known: type,
  blank: str | None = None,
) -> config_lib.Config:
  """Return the validated config with the options of a section.

  Args:
    config: the config of the model.
    section: "sample" or "score".
    options: the values by name.
    known: the TypedDict of the names that there are.
    blank: config.sample.blank; None leaves it as it is.

  Raises:
    ConfigError: an option is unknown, or has an invalid value or no effect.
  """
  options = dict(options)
  if blank is not None:
    config = config.replace("sample.blank", blank)
  for name in options:
    if name not in known.__annotations__:
      raise config_lib.ConfigError(
        f"{name}: no such option; there are: "
        + ", ".join((*NAMED[known], *known.__annotations__))
      )
  if options.get("seed", 0) is None:
    del options["seed"]
  given = dict(options)
  if "order" in options and not isinstance(options["order"], str):
    # The orders are passed as call arguments, so nothing is compiled again.
    every = tuple(range(1, config.model.T + 1))
    config = config.replace("orders.given", every)
    options["order"] = "given"
  typed = getattr(config_lib.from_dict({section: options}), section)
  for name in options:
    config = config.replace(f"{section}.{name}", getattr(typed, name))
  config = config_rules.validate(config)
  for name, holds, words in effects(section, config):
    if name in given and not holds:
      raise config_lib.ConfigError(
        f"{name}={given[name]!r}: has no effect here; it counts with {words}"
      )
  return config


def effects(
  section: str, config: config_lib.Config
) -> list[tuple[str, bool, str]]:
  """Return triples (option, whether it has an effect, with what it has one).

  Args:
    section: "sample" or "score".
    config: the config with the options of a call.
  """
  if section == "score":
    is_drawn = config.score.order == "uniform"
    words = f"order='uniform' only; order is {config.score.order!r}"
    return [(name, is_drawn, words) for name in ("orders", "seed")]
  sample = config.sample
  method, in_steps = sample.method, sample.steps > 0
  # Tokens that come in steps need no width. Known tokens are groups of it.
  has_groups = config.orders.groups != "none"
  by_width = ("adaptive", "speculative")
  drawn = f"temperature above 0 only; temperature is {sample.temperature:g}"
  return [
    ("top_k", sample.temperature > 0, drawn),
    ("top_p", sample.temperature > 0, drawn),
    (
      "width",
      method in by_width
      or (method == "parallel" and (not in_steps or has_groups)),
      "method='adaptive', 'speculative' or 'parallel' (without steps, or for a "
      f"model trained with groups) only; method is {method!r}",
    ),
    (
      "schedule",
      method == "parallel" and in_steps,
      f"method='parallel' and steps above 0 only; method is {method!r}, steps "
      f"is {sample.steps}",
    ),
    (
      "score",
      method == "adaptive",
      f"method='adaptive' only; method is {method!r}",
    ),
    (
      "order",
      method not in ("ancestral", "confidence"),
      "a method that follows an order; ancestral and confidence choose their "
      "own",
    ),
  ]


def several(texts: Any, kinds: Any) -> list[Any]:
  """Return `texts` as a list; a single text becomes a list.

  Args:
    texts: what the user gave.
    kinds: the types of a text.

  Raises:
    PromptError: something in it is not a text of these kinds.
  """
  if isinstance(texts, kinds):
    texts = [texts]
  # A generated text is a tuple, but not a list of texts. A set and a dict have
  # no order that results could follow.
  single = (str, bytes, generate_lib.Text, Set, Mapping)
  if isinstance(texts, single) or not isinstance(texts, Iterable):
    wrong = [texts]
  else:
    texts = list(texts)
    wrong = [text for text in texts if not isinstance(text, kinds)]
  if wrong:
    raise prompts.PromptError(
      f"{wrong[0]!r} is no text: give a str or a list of them"
    )
  # The strings of numpy become plain ones.
  return [str(text) if isinstance(text, str) else text for text in texts]


def permutations(
  order: Any, texts: Sequence[Any], has_ends: bool
) -> list[list[int]] | None:
  """Return the permutation of every text; None for the name of a family.

  Args:
    order: the option of a call: a name, one permutation or one for each text.
    texts: the parsed texts, with tokens and a name.
    has_ends: whether an order may also have the position after a text, where
      its end stands.

  Raises:
    ConfigError: a permutation does not fit its text.
  """
  if isinstance(order, str):
    return None
  try:
    is_list_of_orders = len(order) and np.ndim(order[0]) == 1
  except TypeError:  # It is no order at all, which _permutation reports.
    is_list_of_orders = False
  orders = list(order) if is_list_of_orders else [order] * len(texts)
  if len(orders) != len(texts):
    raise config_lib.ConfigError(
      f"order: {len(orders)} orders for {len(texts)} texts; give one, or one "
      "each"
    )
  return [
    _permutation(order, text, has_ends) for order, text in zip(orders, texts)
  ]


def _permutation(order, text, has_ends):
  """Return `order` as a list of int if it is a permutation for this text."""
  n = len(text.tokens)
  try:
    positions = [operator.index(position) for position in order]
  except TypeError as error:
    raise config_lib.ConfigError(
      f"order={order!r}: must be a name or a list of positions, counted from 1"
    ) from error
  if has_ends and len(positions) == n + 1:
    n += 1
  if len(positions) != n:
    raise config_lib.ConfigError(
      f"order: has {len(positions)} positions, and {text.name} has {n} tokens; "
      "it must be a permutation of all of them, also of the known ones"
    )
  if sorted(positions) != list(range(1, n + 1)):
    wrong = next(
      (p for p in positions if not 0 < p <= n or positions.count(p) > 1), 0
    )
    raise config_lib.ConfigError(
      f"order: must be a permutation of 1..{n}, and {wrong} is not in it once"
    )
  return positions
