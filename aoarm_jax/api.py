"""The Python interface: a trained model that generates, infills and scores."""

import dataclasses
import operator
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate_lib
from aoarm_jax.runs import opening


class Model:
  """A trained model. Every method may be called any number of times.

  The model runs on all local devices with compute.attention="auto". The devices
  and the attention of training do not matter.

  The options of `generate` and `infill` are the fields of config.sample. The
  options of `score` are the fields of config.score. Their defaults are the
  values of the run. Only a call says which characters are blanks and marks: by
  default `_` and `[ ]`, if the model's alphabet does not have them, and else
  none. The option `order` may also be a permutation of the
  positions 1..n of every text, or a list with one permutation per text. The
  same call gives the same result on any number of devices, up to rounding.

  Attributes:
    config: the config of the run, with the mesh and the attention used here.
    step: training steps of the checkpoint.
  """

  def __init__(
    self, workdir: os.PathLike | str, *, read: str = "newest"
  ) -> None:
    """Load a checkpoint. See aoarm_jax.load for the arguments and errors."""
    workdir = epath.Path(workdir)
    config = opening.read_config(workdir)
    # The mesh and the attention must fit the devices here, and not those of
    # training.
    config = config.replace("checkpoint.read", read)
    config = config.replace("mesh", config_lib.Mesh())
    # A character of the alphabet is text unless a call asks for a blank or for
    # marks. Earlier runs saved `_` and `[]` without being asked.
    config = config.replace("sample.blank", prompts.AUTO)
    config = config.replace("score.marks", prompts.AUTO)
    self.config = config_rules.validate(
      config.replace("compute.attention", "auto")
    )
    run = opening.open_run(workdir, self.config)
    self.step, self._params = run.step, run.params
    self._network = run.network
    self._sampler = generate_lib.Sampler(self.config, run.network)
    self._scorer = score_lib.Scorer(self.config, run.network)

  def generate(self, count: int = 1, **options: Any) -> list[generate_lib.Text]:
    """Draw `count` texts of T tokens.

    Args:
      count: number of texts. Many texts are drawn in several batches.
      **options: fields of config.sample, such as temperature, order or method.

    Returns:
      A list of texts.Text: text, tokens, order, log_p (nats), calls, accepted.

    Raises:
      ConfigError: an option is unknown or has an invalid value.
    """
    T = self.config.model.T
    blank = prompts.Prompt(
      np.zeros(T, np.int32), np.zeros(T, bool), "a generated text"
    )
    return self._fill([blank], count, options)[0]

  def infill(
    self,
    texts: str | Sequence[str],
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Any,
  ) -> list[generate_lib.Text] | list[list[generate_lib.Text]]:
    """Fill the blanks of texts, `count` times each.

    Args:
      texts: one text or a sequence of texts, with a `_` for every token to
        generate. If the model's alphabet has `_`, as that of bytes has, name
        the character with the option blank, as in blank="_".
      count: number of results for each text.
      normalise: whether the texts are first brought into the form of text8: a
        to z and single spaces. None takes the run's config.data.normalise.
      **options: fields of config.sample, such as temperature, order or method.

    Returns:
      A list of texts.Text; for a sequence of texts, a list of such lists. log_p
      is the log-probability of the blanks.

    Raises:
      PromptError: a text has no blank, a character outside the vocabulary, or
        more than T tokens.
      ConfigError: an option is unknown or has an invalid value.
    """
    several = _several(texts, str)
    blank = self._with("sample", options).sample.blank

    def parse(text, name):
      prompt = prompts.parse_prompt(text, self._network.tokenizer, blank, name)
      generate_lib.check(prompt, self.config.model)
      return prompt

    lines = self._lines(several, normalise, blank, "")
    parsed = prompts.check_lines(lines, parse)
    filled = self._fill(parsed, count, options)
    return filled[0] if isinstance(texts, str) else filled

  def score(
    self,
    texts: str | generate_lib.Text | Sequence[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Any,
  ) -> score_lib.Score | list[score_lib.Score]:
    """Return log-probabilities of texts, or of their marked parts.

    Args:
      texts: one text or a sequence of texts, as in "the [qu]ick ___". The part
        in brackets is scored, and the other known tokens are given. Without
        brackets all known tokens are scored. `_` is an unknown token. If the
        model's alphabet has these characters, as that of bytes has, they are
        text unless blank="_" and marks="[]" ask for them. In a generated
        texts.Text all tokens are scored.
      blank: the character for an unknown token; '' means that no character is.
        None takes `_` if the alphabet does not have it, and else none.
      normalise: whether the texts are first brought into the form of text8: a
        to z and single spaces. Positions are then those of this form, which is
        the text of the Score. None takes the run's config.data.normalise.
      **options: fields of config.score. For example, order="uniform" with
        orders=K averages over K uniform orders. marks names the two characters
        around the scored part; '' means that there are no marks.

    Returns:
      A score.Score, in nats and bits; for a sequence of texts, a list of them.

    Raises:
      PromptError: there is nothing to score, a mark has no partner, a
        character is outside the vocabulary, or a text has more than T tokens.
      ConfigError: an option is unknown or has an invalid value.
    """
    several = _several(texts, (str, generate_lib.Text))
    config = self._with("score", options, blank)
    if "orders" in options and config.score.order != "uniform":
      raise config_lib.ConfigError(
        f"orders={options['orders']}: counts with order='uniform' only; order "
        f"is {config.score.order!r}"
      )

    def parse(text, name):
      parsed_text, marked = self._marked(text, config, name)
      score_lib.check(marked, config.model)
      return parsed_text, marked

    lines = self._lines(
      several, normalise, config.sample.blank, config.score.marks
    )
    parsed = prompts.check_lines(lines, parse)
    given = _orders(options, [marked for _, marked in parsed])
    with jax.set_mesh(self._network.mesh):
      scores = self._scorer.score(self._params, parsed, config, given)
    return scores if several is texts else scores[0]

  def _lines(self, texts, normalise, blank, marks):
    """Return pairs of a name for messages and the text, in its normal form."""
    lines = [(f"text {i}", text) for i, text in enumerate(texts, 1)]
    if normalise is None:
      normalise = self.config.data.normalise
    if not normalise:
      return lines

    def normal(line):
      if isinstance(line[1], generate_lib.Text):
        return line
      tokenizer = self._network.tokenizer
      return prompts.normalised([line], tokenizer, blank, marks)[0]

    return [normal(line) for line in lines]

  def _marked(self, text, config, name):
    """Return (text, prompts.Marked) of a text or of a generated Text."""
    if isinstance(text, generate_lib.Text):
      tokens = np.array(text.tokens, np.int32)
      everywhere = np.ones(len(tokens), bool)
      return text.text, prompts.Marked(tokens, ~everywhere, everywhere, name)
    blank, marks = config.sample.blank, config.score.marks
    return text, prompts.parse_marked(
      text, self._network.tokenizer, blank, marks, name
    )

  def _fill(self, parsed, count, options):
    """Return `count` texts for each of the parsed prompts."""
    config = self._with("sample", {"count": count, **options})
    given = _orders(options, parsed)
    with jax.set_mesh(self._network.mesh):
      return self._sampler.fill(self._params, parsed, config, given)

  def _with(self, section, options, blank=None):
    """Return the validated config with the options of a section."""
    config, options = self.config, dict(options)
    if blank is not None:
      config = config.replace("sample.blank", blank)
    fields = [f.name for f in dataclasses.fields(getattr(config, section))]
    for name in options:
      if name not in fields:
        raise config_lib.ConfigError(
          f"{name}: no such option; there are: {', '.join(fields)}"
        )
    if "order" in options and not isinstance(options["order"], str):
      # The orders are passed as call arguments, so nothing is compiled again.
      every = tuple(range(1, config.model.T + 1))
      config = config.replace("orders.given", every)
      options["order"] = "given"
    typed = getattr(config_lib.from_dict({section: options}), section)
    for name in options:
      config = config.replace(f"{section}.{name}", getattr(typed, name))
    return config_rules.validate(config)


def _several(texts, kinds):
  """Return `texts` as a sequence; a single text becomes a list.

  Raises:
    PromptError: something in it is not a text of these kinds.
  """
  several = [texts] if isinstance(texts, kinds) else texts
  if isinstance(several, Sequence) and not isinstance(several, bytes):
    wrong = [text for text in several if not isinstance(text, kinds)]
  else:
    wrong = [several]
  if wrong:
    raise prompts.PromptError(
      f"{wrong[0]!r} is no text: give a str or a list of them"
    )
  return several


def _orders(options, texts):
  """Return the permutation of every text from the option `order`.

  Returns None if the option is absent or is the name of a family.

  Raises:
    ConfigError: a permutation does not fit its text.
  """
  order = options.get("order", "")
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
  return [_permutation(order, text) for order, text in zip(orders, texts)]


def _permutation(order, text):
  """Return `order` as a list of int if it is a permutation for this text."""
  n = len(text.tokens)
  try:
    positions = [operator.index(position) for position in order]
  except TypeError as error:
    raise config_lib.ConfigError(
      f"order={order!r}: must be a name or a list of positions, counted from 1"
    ) from error
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
