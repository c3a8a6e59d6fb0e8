"""A trained model, as programs in Python use it."""

import contextlib
import os
import secrets
from collections.abc import Iterable
from typing import Unpack, overload

import jax

from aoarm_jax.api import given
from aoarm_jax.api import options as options_lib
from aoarm_jax.config import rules as config_rules
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import switches
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import opening, places, telemetry


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
    **options: Unpack[options_lib.GenerateOptions],
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
    parsed = given.start(self.config, self.tokenizer, prompt, length, normalise)
    return self._fill([parsed], count, options, options_lib.GenerateOptions)[0]

  # A str is an iterable of str too, so the two signatures overlap.
  @overload
  def infill(  # type: ignore[overload-overlap]
    self,
    texts: str,
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Unpack[options_lib.InfillOptions],
  ) -> list[generate_lib.Text]: ...

  @overload
  def infill(
    self,
    texts: Iterable[str],
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Unpack[options_lib.InfillOptions],
  ) -> list[list[generate_lib.Text]]: ...

  def infill(
    self,
    texts: str | Iterable[str],
    count: int = 1,
    *,
    normalise: bool | None = None,
    **options: Unpack[options_lib.InfillOptions],
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
    several = options_lib.several(texts, str)
    parsed = self._blanks(several, normalise, options)
    filled = self._fill(parsed, count, options, options_lib.InfillOptions)
    return filled[0] if isinstance(texts, str) else filled

  @overload
  def score(  # type: ignore[overload-overlap]
    self,
    texts: str | generate_lib.Text,
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Unpack[options_lib.ScoreOptions],
  ) -> score_lib.Score: ...

  @overload
  def score(
    self,
    texts: Iterable[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Unpack[options_lib.ScoreOptions],
  ) -> list[score_lib.Score]: ...

  def score(
    self,
    texts: str | generate_lib.Text | Iterable[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    **options: Unpack[options_lib.ScoreOptions],
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
    several = options_lib.several(texts, kinds)
    config = options_lib.applied(
      self.config, "score", options, options_lib.ScoreOptions, blank
    )

    def parse(text: str, name: str) -> tuple[str, prompts.Marked]:
      parsed_text, marked = given.marked(config, self._network, text, name)
      score_lib.check(marked, config.model)
      return parsed_text, marked

    marks = config.score.marks
    lines = given.lines(config, self.tokenizer, several, normalise, marks)
    parsed = prompts.check_lines(lines, parse)
    orders = self._orders(options, [marked for _, marked in parsed])
    with self._ready():
      scores = self._scorer.score(self._params, parsed, config, orders)
    return scores[0] if isinstance(texts, kinds) else scores

  def _patience(self):
    """Return the context in which long waits are written on stderr."""
    seconds = self.config.telemetry.patience_seconds if self._progress else 0
    return telemetry.patience_on_stderr(seconds)

  @contextlib.contextmanager
  def _ready(self):
    """Set the mesh and the types of the model, and tell of long waits."""
    mesh = self._network.mesh
    with switches.fixed_types(), jax.set_mesh(mesh), self._patience():
      yield

  def _blanks(self, texts, normalise, options):
    """Return the parsed texts of `infill`."""
    known = options_lib.InfillOptions
    config = options_lib.applied(self.config, "sample", options, known)

    def parse(text: str, name: str) -> prompts.Prompt:
      blank = config.sample.blank
      prompt = prompts.parse_prompt(text, self.tokenizer, blank, name)
      generate_lib.check(prompt, config.model)
      return prompt

    lines = given.lines(config, self.tokenizer, texts, normalise, "")
    return prompts.check_lines(lines, parse)

  def _fill(self, parsed, count, options, known):
    """Return `count` texts for each of the parsed prompts."""
    switches.check_not_forked()
    options = dict(options)
    if options.get("seed") is None:
      # Seeds are int32 on devices.
      options["seed"] = secrets.randbits(31)
    count = config_rules.whole_number("count", count)
    config = options_lib.applied(self.config, "sample", options, known)
    config = config_rules.validate(config.replace("sample.count", count))
    orders = self._orders(options, parsed)
    with self._ready():
      return self._sampler.fill(self._params, parsed, config, orders)

  def _orders(self, options, texts):
    """Return the permutations of texts; None for the name of a family."""
    order, has_ends = options.get("order", ""), self._network.end is not None
    return options_lib.permutations(order, texts, has_ends)
