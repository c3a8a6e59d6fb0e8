"""Texts as users give them to calls from Python, and what is read from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate_lib
from aoarm_jax.model import network as network_lib


def is_normal(config: config_lib.Config, normalise: Any) -> bool:
  """Return whether a call brings its texts into normal form.

  Args:
    config: the config of the model.
    normalise: the option of the call.

  Raises:
    ConfigError: the option is no bool and not None.
  """
  if normalise is not None and not isinstance(normalise, bool | np.bool_):
    raise config_lib.ConfigError(
      f"normalise={normalise!r}: must be True, False, or None for "
      "config.data.normalise of the run"
    )
  return config.data.normalise if normalise is None else bool(normalise)


def lines(
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  texts: Sequence[Any],
  normalise: Any,
  marks: str,
) -> list[tuple[str, Any]]:
  """Return pairs of a name for messages and the text, in its normal form.

  Args:
    config: the config with the options of the call.
    tokenizer: the model's tokenizer.
    texts: strings and generated texts. The latter stay as they are.
    normalise: the option of the call.
    marks: config.score.marks; '' if the texts are prompts.

  Raises:
    PromptError: nothing is left of a text.
    ConfigError: `normalise` is wrong.
  """
  named = [(f"text {i}", text) for i, text in enumerate(texts, 1)]
  if not is_normal(config, normalise):
    return named

  def normal(text, name):
    if isinstance(text, generate_lib.Text):
      return name, text
    blank = config.sample.blank
    return prompts.normalised([(name, text)], tokenizer, blank, marks)[0]

  return prompts.check_lines(named, normal)


def marked(
  config: config_lib.Config,
  network: network_lib.Network,
  text: Any,
  name: str,
) -> tuple[str, prompts.Marked]:
  """Return the words and the tokens of a text, or of a generated Text.

  Args:
    config: the config with the options of the call.
    network: the network of the model.
    text: a str, or a texts.Text, in which all tokens are scored.
    name: the name of the text, for messages.

  Raises:
    PromptError: see prompts.parse_marked.
  """
  if isinstance(text, generate_lib.Text):
    return text.text, whole(network, text.tokens, name)
  blank, marks = config.sample.blank, config.score.marks
  return text, prompts.parse_marked(text, network.tokenizer, blank, marks, name)


def whole(
  network: network_lib.Network, ids: Sequence[int] | np.ndarray, name: str
) -> prompts.Marked:
  """Return token ids as a text in which all tokens are scored.

  Args:
    network: the network of the model.
    ids: int [n]. The last one may be the end of a padded document.
    name: the name of the text, for messages.
  """
  tokens = np.array(ids, np.int32)
  end = network.layout.end_token
  # An end that was drawn is scored with the tokens. Any other was given.
  is_drawn = end is not None and tokens[-1:].tolist() == [end]
  tokens = tokens[: len(tokens) - is_drawn]
  everywhere = np.ones(len(tokens), bool)
  return prompts.Marked(tokens, ~everywhere, everywhere, name, not is_drawn)


def start(
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  prompt: Any,
  length: Any,
  normalise: Any,
) -> prompts.Prompt:
  """Return the start of a generated text with the blanks after it.

  Args:
    config: the config of the model.
    tokenizer: the model's tokenizer.
    prompt: the text that the result starts with.
    length: the number of tokens of the result; None: see Model.generate.
    normalise: the option of the call.

  Raises:
    PromptError: see Model.generate.
    ConfigError: `length` or `normalise` is wrong.
  """
  if not isinstance(prompt, str):
    raise prompts.PromptError(f"prompt={prompt!r} is no text: give a str")
  if is_normal(config, normalise):
    prompt = prompts.normalised_start(prompt, "prompt")
  try:
    given = tokenizer.encode(prompt)
  except tokenizers.TokenizerError as error:
    fills = f"; infill fills every {prompts.BLANK!r}"
    raise prompts.PromptError(
      f"prompt: {error}{fills * (prompts.BLANK in prompt)}"
    ) from error
  T = config.model.T
  given_length = config.sample.length or None
  if length is not None:
    given_length = config_rules.whole_number("length", length)
  n = T if given_length is None else given_length
  if not 1 <= n <= T:
    raise config_lib.ConfigError(
      f"length={n}: must be at least 1 and at most {T} (config.model.T)"
    )
  if len(given) >= n:
    raise prompts.PromptError(
      f"prompt has {len(given)} tokens, and the text has {n}: give a shorter "
      f"prompt or a greater length (at most {T}, config.model.T)"
    )
  tokens = np.zeros(n, np.int32)
  tokens[: len(given)] = given
  known = np.arange(n) < len(given)
  return prompts.Prompt(tokens, known, "a generated text", given_length is None)
