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
  """A trained model; every method may be called any number of times.

  It runs on all devices that are here, with compute.attention="auto", whatever
  the run was trained on and with.

  Options are the fields of config.sample (generate, infill) or config.score
  (score), with the defaults of the run; `order` may also be a permutation of
  the positions 1..n of every text, or a list of one for each text. The same
  call gives the same result, on any number of devices, but for rounding.

  Attributes:
    config: of the run.
    step: of the checkpoint.
  """

  def __init__(self, workdir: os.PathLike | str, *, read: str = "newest"):
    """See aoarm_jax.load."""
    workdir = epath.Path(workdir)
    config = opening.read_config(workdir)
    # The devices that are here, and what they can, not those of training.
    config = config.replace("checkpoint.read", read)
    config = config.replace("mesh", config_lib.Mesh())
    self.config = config_rules.validate(
      config.replace("compute.attention", "auto")
    )
    run = opening.open_run(workdir, self.config)
    self.step, self._params = run.step, run.params
    self._network = run.network
    self._sampler = generate_lib.Sampler(self.config, run.network)
    self._scorer = score_lib.Scorer(self.config, run.network)

  def generate(self, count: int = 1, **options: Any) -> list[generate_lib.Text]:
    """Draws `count` texts of T tokens.

    Args:
      count: how many; several thousand are drawn in batches.
      **options: fields of config.sample, as temperature, order or method.

    Returns:
      generate.Text each: text, tokens, order, log_p (nats), calls, accepted.

    Raises:
      ConfigError: an option that cannot be.
    """
    T = self.config.model.T
    blank = prompts.Prompt(
      np.zeros(T, np.int32), np.zeros(T, bool), "a generated text"
    )
    return self._fill([blank], count, options)[0]

  def infill(
    self, texts: str | Sequence[str], count: int = 1, **options: Any
  ) -> list[generate_lib.Text] | list[list[generate_lib.Text]]:
    """Fills the blanks of texts, `count` times each.

    Args:
      texts: one text or several, with a `_` (config.sample.blank) for every
        token to generate.
      count: texts for each prompt.
      **options: fields of config.sample, as temperature, order or method.

    Returns:
      generate.Text each; a list of lists for several prompts. log_p is that of
      the blanks.

    Raises:
      PromptError: nothing to fill, a character outside the vocabulary, or more
        tokens than T.
      ConfigError: an option that cannot be.
    """
    many = _several(texts, str)
    blank = self._with("sample", options).sample.blank
    parsed = [
      prompts.parse_prompt(text, self._network.tokenizer, blank, f"text {i}")
      for i, text in enumerate(many, 1)
    ]
    found = self._fill(parsed, count, options)
    return found[0] if isinstance(texts, str) else found

  def score(
    self,
    texts: str | generate_lib.Text | Sequence[str | generate_lib.Text],
    *,
    blank: str | None = None,
    **options: Any,
  ) -> score_lib.Score | list[score_lib.Score]:
    """Log-probabilities of texts, or of their marked parts given the rest.

    Args:
      texts: one text or several, as "the [qu]ick ___": what is in brackets is
        scored (without brackets all of it), `_` is unknown, the rest is given.
        Of a generated Text all tokens are scored, whatever they are.
      blank: the character for an unknown token, '' for none; None is
        config.sample.blank. marks='' turns brackets into text, too.
      **options: fields of config.score, as order or, for an average over K
        uniform orders, order="uniform", orders=K.

    Returns:
      score.Score each, in nats and bits.

    Raises:
      PromptError: nothing to score, marks that do not pair, a character outside
        the vocabulary, or more tokens than T.
      ConfigError: an option that cannot be.
    """
    many = _several(texts, (str, generate_lib.Text))
    config = self._with("score", options, blank)
    if "orders" in options and config.score.order != "uniform":
      raise config_lib.ConfigError(
        f"orders={options['orders']}: counts with order='uniform' only; order "
        f"is {config.score.order!r}"
      )
    parsed = [
      self._marked(text, config, f"text {i}") for i, text in enumerate(many, 1)
    ]
    given = _orders(options, [marked for _, marked in parsed])
    with jax.set_mesh(self._network.mesh):
      found = self._scorer.score(self._params, parsed, config, given)
    return found if many is texts else found[0]

  def _marked(self, text, config, name):
    """(text, prompts.Marked)."""
    if isinstance(text, generate_lib.Text):
      tokens = np.array(text.tokens, np.int32)
      everywhere = np.ones(len(tokens), bool)
      return text.text, prompts.Marked(tokens, ~everywhere, everywhere, name)
    blank, marks = config.sample.blank, config.score.marks
    return text, prompts.parse_marked(
      text, self._network.tokenizer, blank, marks, name
    )

  def _fill(self, parsed, count, options):
    config = self._with("sample", {"count": count, **options})
    given = _orders(options, parsed)
    with jax.set_mesh(self._network.mesh):
      return self._sampler.fill(self._params, parsed, config, given)

  def _with(self, section, options, blank=None):
    """The config with these options; `order` may be one or several."""
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
  """A list of them, where there is one only."""
  many = [texts] if isinstance(texts, kinds) else texts
  if isinstance(many, Sequence) and not isinstance(many, bytes):
    wrong = [text for text in many if not isinstance(text, kinds)]
  else:
    wrong = [many]
  if wrong:
    raise prompts.PromptError(
      f"{wrong[0]!r} is no text: give a str or a list of them"
    )
  return many


def _orders(options, texts):
  """A permutation for every text, where option `order` gives any; or None."""
  order = options.get("order", "")
  if isinstance(order, str):
    return None
  try:
    several = len(order) and np.ndim(order[0]) == 1
  except TypeError:  # Neither; said below.
    several = False
  each = list(order) if several else [order] * len(texts)
  if len(each) != len(texts):
    raise config_lib.ConfigError(
      f"order: {len(each)} orders for {len(texts)} texts; give one, or one each"
    )
  return [_permutation(one, text) for one, text in zip(each, texts)]


def _permutation(order, text):
  n = len(text.tokens)
  try:
    found = [operator.index(position) for position in order]
  except TypeError as error:
    raise config_lib.ConfigError(
      f"order={order!r}: must be a name or a list of positions, counted from 1"
    ) from error
  if len(found) != n:
    raise config_lib.ConfigError(
      f"order: has {len(found)} positions, and {text.name} has {n} tokens; it "
      "must be a permutation of all of them, those of known ones too"
    )
  if sorted(found) != list(range(1, n + 1)):
    wrong = next((p for p in found if not 0 < p <= n or found.count(p) > 1), 0)
    raise config_lib.ConfigError(
      f"order: must be a permutation of 1..{n}, and {wrong} is not in it once"
    )
  return found
