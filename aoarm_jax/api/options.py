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


# The methods of Model that take such options, with their other parameters.
CALLS = {
  "generate": (GenerateOptions, ("count", "prompt", "length", "normalise")),
  "generate_stream": (GenerateOptions, ("prompt", "length", "normalise")),
  "infill": (InfillOptions, ("count", "normalise")),
  "infill_stream": (InfillOptions, ("normalise",)),
  "score": (ScoreOptions, ("blank", "normalise", "stride")),
}


def applied(
  config: config_lib.Config,
  call: str,
  options: Mapping[str, Any],
  blank: str | None = None,
) -> config_lib.Config:
  """Return the validated config with the options of a section.

  Args:
    config: the config of the model.
    call: a name of CALLS.
    options: the values by name.
    blank: config.sample.blank; None leaves it as it is.

  Raises:
    ConfigError: an option is unknown, or has an invalid value or no effect.
  """
  section = "score" if call == "score" else "sample"
  known, others = CALLS[call]
  options = dict(options)
  if blank is not None:
    config = config.replace("sample.blank", blank)
  for name in options:
    if name not in known.__annotations__:
      raise config_lib.ConfigError(
        f"{name}: no such option; there are: "
        + ", ".join((*others, *known.__annotations__))
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


def followed(
  model: config_lib.Model, order: Any, texts: Sequence[Any], has_ends: bool
) -> list[Any]:
  """Return the order in which each text is read: a name or a permutation.

  Args:
    model: the model.
    order: "left_to_right", "right_to_left", or see `permutations`.
    texts: the parsed texts, with tokens and a name.
    has_ends: see `permutations`.

  Raises:
    ConfigError: an order is of no such name, does not fit its text, or is one
      that the mechanism does not know.
  """
  names = ("left_to_right", "right_to_left")
  if isinstance(order, str) and order not in names:
    raise config_lib.ConfigError(
      f"order={order!r}: must be {' or '.join(map(repr, names))}, or a list of "
      "positions, counted from 1"
    )
  orders: list[Any] = permutations(order, texts, has_ends) or [order] * len(
    texts
  )
  for text, one in zip(texts, orders):
    is_natural = one == names[0] or list(one) == sorted(one)
    if model.kind.left_to_right and not is_natural:
      raise config_lib.ConfigError(
        f"order: mechanism {model.mechanism} reads from left to right only, "
        f"and the order of {text.name} is another one"
      )
  return orders


def known_tokens(
  model: config_lib.Model, known: Any, texts: Sequence[Any]
) -> int:
  """Return how many tokens of every order one pass knows.

  Args:
    model: the model.
    known: the option of the call.
    texts: the texts, with tokens.

  Raises:
    ConfigError: a masked mechanism needs it, and others do not know it.
  """
  if not model.kind.masked:
    if known is not None:
      raise config_lib.ConfigError(
        f"known={known!r}: has no effect here; a single pass of mechanism "
        f"{model.mechanism} predicts all tokens"
      )
    return 0
  most = min((len(text.tokens) for text in texts), default=0)
  if known is None:
    raise config_lib.ConfigError(
      f"known: mechanism {model.mechanism} takes a pass for every token; say "
      f"how many tokens of the order are known in it, 0 to {most}"
    )
  if not 0 <= config_rules.whole_number("known", known) <= most:
    raise config_lib.ConfigError(
      f"known={known}: must be 0 to {most}, the number of tokens"
    )
  return known


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
