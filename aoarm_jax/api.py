"""The Python interface: a trained model that generates, infills and scores."""

import operator
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TypedDict, Unpack, overload

import jax
import numpy as np

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import switches
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import opening, places, telemetry

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
_NAMED = {
  GenerateOptions: ("count", "prompt", "length", "normalise"),
  InfillOptions: ("count", "normalise"),
  ScoreOptions: ("blank", "normalise"),
}


class Model:
  """A trained model. Every method may be called any number of times.

  The model runs on all local devices with compute.attention="auto". The devices
  and the attention of training do not matter.

  The options of `generate` and `infill` are fields of config.sample. The
  options of `score` are fields of config.score. Their defaults are the values
  of the run, except for `seed`: without one, every call of `generate` and
  `infill` takes a fresh seed. The seed is in the texts that come back. Only a
  call says which characters are blanks and marks: by default `_` and `[ ]`, if
  the model's alphabet does not have them, and else none. The option `order` may
  also be a permutation of the positions 1..n of every text, or a list with one
  permutation per text. An option that has no effect is refused. The same call
  with the same seed gives the same result on any number of devices, up to
  rounding.

  Attributes:
    config: the config of the run, with the mesh and the attention used here.
    step: training steps of the checkpoint.
    workdir: the run directory.
  """

  def __init__(
    self,
    workdir: os.PathLike | str,
    *,
    read: str = "newest",
    step: int | None = None,
    progress: bool = True,
  ) -> None:
    """Load a checkpoint. See aoarm_jax.load for the arguments and errors."""
    switches.check_not_forked()
    switches.keep_compilations()
    self.workdir = places.find(workdir)
    config = opening.config_here(self.workdir, read, step)
    # A character of the alphabet is text unless a call asks for a blank or for
    # marks. Earlier runs saved `_` and `[]` without being asked.
    config = config.replace("sample.blank", prompts.AUTO)
    config = config.replace("score.marks", prompts.AUTO)
    self.config = config_rules.validate(config)
    self._progress = progress
    with self._patience(), switches.fixed_types():
      run = opening.open_run(self.workdir, self.config, step=step)
    self.step, self._params = run.step, run.params
    self._network = run.network
    self._sampler = generate_lib.Sampler(self.config, run.network)
    self._scorer = score_lib.Scorer(self.config, run.network)

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of the run, which converts text to token ids and back."""
    return self._network.tokenizer

  def __repr__(self) -> str:
    """Return the run, the step and the size of the model in one line."""
    count = run_dir.parameter_count(self._network.abstract_params)
    model = self.config.model
    return (
      f"<aoarm_jax.Model {os.fspath(self.workdir)!r}: step {self.step:,}, "
      f"{model.mechanism}, {count:,} parameters, T={model.T}, tokenizer "
      f"{self.config.data.tokenizer}>"
    )

  def generate(
    self,
    count: int = 1,
    *,
    prompt: str = "",
    length: int | None = None,
    normalise: bool | None = None,
    **options: Unpack[GenerateOptions],
  ) -> list[generate_lib.Text]:
    """Draw `count` texts, or continue a text `count` times.

    Args:
      count: number of texts. Many texts are drawn in several batches.
      prompt: the text that every result starts with. All its characters stand
        for themselves. `infill` fills blanks anywhere.
      length: number of tokens of every result, with those of the prompt. None
        means config.sample.length or T, config.model.T. A shorter text is drawn
        as the start of a text of T tokens: the model does not know that it ends
        there. A model of padded documents (config.data.documents=pad) knows the
        length. Without one, it draws where a text ends, if it predicts that.
      normalise: whether the prompt is first brought into the form of text8: a
        to z and single spaces. Its last word may go on, unless a space or
        another mark follows it. None takes the run's config.data.normalise.
      **options: fields of config.sample, such as temperature, order or method.
        Without a seed, every call draws other texts.

    Returns:
      A list of texts.Text: text, tokens, order, log_p (nats), calls, accepted,
      seed.

    Raises:
      PromptError: the prompt has a character outside the vocabulary, or leaves
        no token to generate.
      ConfigError: an option is unknown, has an invalid value or no effect, or
        `length` is above T.
    """
    if not isinstance(prompt, str):
      raise prompts.PromptError(f"prompt={prompt!r} is no text: give a str")
    if self._is_normal(normalise):
      prompt = prompts.normalised_start(prompt, "prompt")
    try:
      given = self._network.tokenizer.encode(prompt)
    except tokenizers.TokenizerError as error:
      fills = f"; infill fills every {prompts.BLANK!r}"
      raise prompts.PromptError(
        f"prompt: {error}{fills * (prompts.BLANK in prompt)}"
      ) from error
    T = self.config.model.T
    given_length = self.config.sample.length or None
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
    parsed = [
      prompts.Prompt(tokens, known, "a generated text", given_length is None)
    ]
    return self._fill(parsed, count, options, GenerateOptions)[0]

  # A str is an iterable of str too, so the two signatures overlap.
  @overload
  def infill(  # type: ignore[overload-overlap]
    self,
    texts: str,
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Unpack[InfillOptions],
  ) -> list[generate_lib.Text]: ...

  @overload
  def infill(
    self,
    texts: Iterable[str],
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Unpack[InfillOptions],
  ) -> list[list[generate_lib.Text]]: ...

  def infill(
    self,
    texts: str | Iterable[str],
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Unpack[InfillOptions],
  ) -> list[generate_lib.Text] | list[list[generate_lib.Text]]:
    """Fill the blanks of texts, `count` times each.

    Args:
      texts: one text or several (a list, an array of strings, a generator),
        with a `_` for every token to generate. If the model's alphabet has `_`,
        as that of bytes has, name the character with the option blank, as in
        blank="_". To continue a text, `generate` takes a prompt.
      count: number of results for each text.
      normalise: whether the texts are first brought into the form of text8: a
        to z and single spaces. The results have this form. None takes the run's
        config.data.normalise.
      **options: fields of config.sample, such as temperature, order or method.
        Without a seed, every call draws other texts.

    Returns:
      A list of texts.Text; for several texts, a list of such lists. log_p is
      the log-probability of the blanks.

    Raises:
      PromptError: a text has no blank, a character outside the vocabulary, or
        more than T tokens.
      ConfigError: an option is unknown, has an invalid value or no effect.
    """
    several = _several(texts, str)
    blank = self._with("sample", options, InfillOptions).sample.blank

    def parse(text: str, name: str) -> prompts.Prompt:
      prompt = prompts.parse_prompt(text, self._network.tokenizer, blank, name)
      generate_lib.check(prompt, self.config.model)
      return prompt

    lines = self._lines(several, normalise, blank, "")
    parsed = prompts.check_lines(lines, parse)
    filled = self._fill(parsed, count, options, InfillOptions)
    return filled[0] if isinstance(texts, str) else filled

  @overload
  def score(  # type: ignore[overload-overlap]
    self,
    texts: str | generate_lib.Text,
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Unpack[ScoreOptions],
  ) -> score_lib.Score: ...

  @overload
  def score(
    self,
    texts: Iterable[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Unpack[ScoreOptions],
  ) -> list[score_lib.Score]: ...

  def score(
    self,
    texts: str | generate_lib.Text | Iterable[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Unpack[ScoreOptions],
  ) -> score_lib.Score | list[score_lib.Score]:
    """Return log-probabilities of texts, or of their marked parts.

    A text of fewer than T tokens is scored as the start of a text of T tokens,
    and for a model of padded documents as a whole document; see score.Score.

    Args:
      texts: one text or several (a list, an array of strings, a generator), as
        in "the [qu]ick ___". The part in brackets is scored, and the other
        known tokens are given. Without brackets all known tokens are scored.
        `_` is an unknown token. If the model's alphabet has these characters,
        as that of bytes has, they are text unless blank="_" and marks="[]" ask
        for them. In a generated texts.Text all tokens are scored.
      blank: the character for an unknown token; '' means that no character is.
        None takes `_` if the alphabet does not have it, and else none.
      normalise: whether the texts are first brought into the form of text8: a
        to z and single spaces. Positions are then those of this form, which is
        the text of the Score. None takes the run's config.data.normalise.
      **options: fields of config.score. For example, order="uniform" with
        orders=K averages over K uniform orders. marks names the two characters
        around the scored part; '' means that there are no marks.

    Returns:
      A score.Score, in nats and bits; for several texts, a list of them.

    Raises:
      PromptError: there is nothing to score, a mark has no partner, a
        character is outside the vocabulary, or a text has more than T tokens.
      ConfigError: an option is unknown, has an invalid value or no effect.
    """
    switches.check_not_forked()
    kinds = (str, generate_lib.Text)
    several = _several(texts, kinds)
    config = self._with("score", options, ScoreOptions, blank)

    def parse(text: str, name: str) -> tuple[str, prompts.Marked]:
      parsed_text, marked = self._marked(text, config, name)
      score_lib.check(marked, config.model)
      return parsed_text, marked

    lines = self._lines(
      several, normalise, config.sample.blank, config.score.marks
    )
    parsed = prompts.check_lines(lines, parse)
    given = self._orders(options, [marked for _, marked in parsed])
    with (
      switches.fixed_types(),
      jax.set_mesh(self._network.mesh),
      self._patience(),
    ):
      scores = self._scorer.score(self._params, parsed, config, given)
    return scores[0] if isinstance(texts, kinds) else scores

  def _patience(self):
    """Return the context in which long waits are written on stderr."""
    seconds = self.config.telemetry.patience_seconds if self._progress else 0
    return telemetry.patience_on_stderr(seconds)

  def _is_normal(self, normalise):
    """Return whether a call brings its texts into normal form."""
    if normalise is not None and not isinstance(normalise, bool | np.bool_):
      raise config_lib.ConfigError(
        f"normalise={normalise!r}: must be True, False, or None for "
        "config.data.normalise of the run"
      )
    return self.config.data.normalise if normalise is None else bool(normalise)

  def _lines(self, texts, normalise, blank, marks):
    """Return pairs of a name for messages and the text, in its normal form."""
    lines = [(f"text {i}", text) for i, text in enumerate(texts, 1)]
    if not self._is_normal(normalise):
      return lines

    def normal(text, name):
      if isinstance(text, generate_lib.Text):
        return name, text
      tokenizer = self._network.tokenizer
      return prompts.normalised([(name, text)], tokenizer, blank, marks)[0]

    return prompts.check_lines(lines, normal)

  def _marked(self, text, config, name):
    """Return (text, prompts.Marked) of a text or of a generated Text."""
    if isinstance(text, generate_lib.Text):
      tokens = np.array(text.tokens, np.int32)
      end = self._network.layout.end_token
      # An end that was drawn is scored with the tokens. Any other was given.
      is_drawn = end is not None and tokens[-1:].tolist() == [end]
      tokens = tokens[: len(tokens) - is_drawn]
      everywhere = np.ones(len(tokens), bool)
      return text.text, prompts.Marked(
        tokens, ~everywhere, everywhere, name, not is_drawn
      )
    blank, marks = config.sample.blank, config.score.marks
    return text, prompts.parse_marked(
      text, self._network.tokenizer, blank, marks, name
    )

  def _fill(self, parsed, count, options, known):
    """Return `count` texts for each of the parsed prompts."""
    switches.check_not_forked()
    options = dict(options)
    if options.get("seed") is None:
      # Seeds are int32 on devices.
      options["seed"] = secrets.randbits(31)
    count = config_rules.whole_number("count", count)
    config = self._with("sample", options, known)
    config = config_rules.validate(config.replace("sample.count", count))
    given = self._orders(options, parsed)
    with (
      switches.fixed_types(),
      jax.set_mesh(self._network.mesh),
      self._patience(),
    ):
      return self._sampler.fill(self._params, parsed, config, given)

  def _orders(self, options, texts):
    """Return the permutations of texts, see `_orders`."""
    return _orders(options, texts, self._network.end is not None)

  def _with(self, section, options, known, blank=None):
    """Return the validated config with the options of a section.

    Args:
      section: "sample" or "score".
      options: the values by name.
      known: the TypedDict of the names that there are.
      blank: config.sample.blank; None leaves it as it is.
    """
    config, options = self.config, dict(options)
    if blank is not None:
      config = config.replace("sample.blank", blank)
    for name in options:
      if name not in known.__annotations__:
        raise config_lib.ConfigError(
          f"{name}: no such option; there are: "
          + ", ".join((*_NAMED[known], *known.__annotations__))
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
    for name, holds, words in _effects(section, config):
      if name in given and not holds:
        raise config_lib.ConfigError(
          f"{name}={given[name]!r}: has no effect here; it counts with {words}"
        )
    return config


def _effects(section, config):
  """Return (option, whether it has an effect, with what it has one)."""
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


def _several(texts, kinds):
  """Return `texts` as a list; a single text becomes a list.

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


def _orders(options, texts, has_ends):
  """Return the permutation of every text from the option `order`.

  Returns None if the option is absent or is the name of a family.

  Args:
    options: the options of a call.
    texts: the parsed texts.
    has_ends: whether an order may also have the position after a text, where
      its end stands.

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
