"""Texts as users give them to calls from Python, and what is read from them."""

import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
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
    texts: strings, generated texts or tokens. Only strings are changed.
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
    if not isinstance(text, str):
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


def contents(
  config: config_lib.Config,
  network: network_lib.Network,
  texts: Any,
  normalise: Any,
) -> tuple[list[prompts.Marked], bool]:
  """Return the tokens of texts in which every character is text.

  Args:
    config: the config of the model.
    network: the network of the model.
    texts: one text or several, each a str, a texts.Text or integer token ids.
    normalise: the option of the call. It concerns strings alone.

  Returns:
    The texts, and whether there is a single one, and no list.

  Raises:
    PromptError: a text is empty, too long or outside the vocabulary.
    ConfigError: `normalise` is wrong.
  """
  is_one = isinstance(texts, str | generate_lib.Text) or _are_ids(texts)
  if is_one:
    texts = [texts]
  if isinstance(texts, bytes | Set | Mapping) or not isinstance(
    texts, Iterable
  ):
    raise _no_text(texts)

  def parse(text, name):
    ids: Any
    if isinstance(text, str):
      try:
        ids = network.tokenizer.encode(text)
      except tokenizers.TokenizerError as error:
        raise prompts.PromptError(f"{name}: {error}") from error
    elif isinstance(text, generate_lib.Text):
      ids = text.tokens
    elif _are_ids(text):
      ids = np.asarray(text)
    else:
      raise _no_text(text)
    return _checked(network, whole(network, ids, name))

  named = lines(config, network.tokenizer, list(texts), normalise, "")
  return prompts.check_lines(named, parse), is_one


def _are_ids(text):
  """Return whether something is a row of integers."""
  if isinstance(text, np.ndarray | jax.Array):
    return text.ndim == 1 and np.issubdtype(text.dtype, np.integer)
  is_list = isinstance(text, list | tuple) and len(text) > 0
  return is_list and all(isinstance(x, numbers.Integral) for x in text)


def _no_text(text):
  """Return the error for what is neither text nor tokens."""
  return prompts.PromptError(
    f"{text!r} is no text: give a str, token ids or a list of them"
  )


def _checked(network, text):
  """Return a text if the network knows all its tokens."""
  n, T, V = len(text.tokens), network.model.T, network.vocabulary
  if not n:
    raise prompts.PromptError(f"{text.name} is empty: give at least one token")
  if n > T:
    raise prompts.PromptError(
      f"{text.name} has {n} tokens; the model knows at most {T} "
      "(config.model.T)"
    )
  wrong = text.tokens[(text.tokens < 0) | (text.tokens >= V)]
  if len(wrong):
    raise prompts.PromptError(
      f"{text.name}: {wrong[0]} is no token id; ids are 0 to {V - 1}"
    )
  return text


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
