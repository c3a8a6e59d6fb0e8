"""A trained model, as programs in Python use it."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, Unpack, overload

import jax
import numpy as np

from aoarm_jax.api import calls
from aoarm_jax.api import options as options_lib
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes, switches
from aoarm_jax.evaluation import inside
from aoarm_jax.evaluation import log_prob as log_prob_lib
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts, streaming
from aoarm_jax.generation import texts as generate_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import opening, patience, places

# One text or several: strings, generated texts, or token ids [n].
Texts = str | generate_lib.Text | Iterable[Any]


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
    workdir: the run directory; None for a model that `of` made.
    network: the network of the model, with its mesh; see network.Network.
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
    folder = places.find(workdir)
    config = self._prepare(opening.config_here(folder, read, step), progress)
    seconds = config.telemetry.patience_seconds if progress else 0
    with patience.on_stderr(seconds), switches.fixed_types():
      run = opening.open_run(folder, config, step=step)
    self._start(run.network, run.params, run.step, folder)

  @classmethod
  def of(
    cls,
    config: config_lib.Config,
    params: Any = None,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    seed: int = 0,
    progress: bool = True,
  ) -> "Model":
    """Return a model of parameters in memory, such as those of your own loop.

    Args:
      config: the config of the model. Its mesh and attention do not matter.
      params: nested dict of arrays, as network.abstract_params. None draws
        fresh parameters.
      tokenizer: None means the one that config.data.tokenizer names.
      seed: seed of fresh parameters.
      progress: see aoarm_jax.load.

    Raises:
      ConfigError: the config or the parameters are wrong.
    """
    model = cls.__new__(cls)
    config = model._prepare(opening.for_these_devices(config), progress)
    with switches.fixed_types():
      mesh = meshes.of_run(config)
      network = network_lib.Network(config, mesh, tokenizer)
      if params is None:
        params = jax.jit(network.init)(jax.random.key(seed))
    model._start(network, params, 0, None)
    return model

  def _prepare(self, config, progress):
    """Set the config of the calls, and return it."""
    switches.check_not_forked()
    switches.keep_compilations()
    # A character of the alphabet is text unless a call asks for a blank or for
    # marks. Earlier runs saved `_` and `[]` without being asked.
    config = config.replace("sample.blank", prompts.AUTO)
    config = config.replace("score.marks", prompts.AUTO)
    self.config, self._progress = config_rules.validate(config), progress
    return self.config

  def _start(self, network, params, step, workdir):
    """Set what the calls need."""
    self.network, self.step, self.workdir = network, step, workdir
    self.params = params
    self._programs = calls.Programs.of(self.config, network)

  @property
  def _calls(self):
    """The calls of the model as it is now."""
    return calls.Calls(
      self.config, self.network, self._params, self._programs, self._progress
    )

  @property
  def params(self) -> Any:
    """The parameters: a nested dict of float32 arrays.

    All later calls use what is assigned here, such as the parameters after a
    step of your own training. It needs the same names and shapes.
    """
    return self._params

  @params.setter
  def params(self, params: Any) -> None:
    with switches.fixed_types():
      self._params = self.network.put(params)

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of the run, which converts text to token ids and back."""
    return self.network.tokenizer

  @property
  def head(self) -> np.ndarray:
    """The weights of the head, float32 [D, V]; see HiddenStates.read_out."""
    return self._calls.head()

  def __repr__(self) -> str:
    """Return the run, the step and the size of the model in one line."""
    count = run_dir.parameter_count(self.network.abstract_params)
    model = self.config.model
    place = repr(os.fspath(self.workdir)) if self.workdir else "in memory"
    return (
      f"<aoarm_jax.Model {place}: step {self.step:,}, "
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
    parsed = self._calls.start(prompt, length, normalise)
    return self._calls.fill("generate", [parsed], count, options)[0]

  def generate_stream(
    self,
    *,
    prompt: str = "",
    length: int | None = None,
    normalise: bool | None = None,
    **options: Unpack[options_lib.GenerateOptions],
  ) -> Iterator[streaming.Token]:
    """Draw one text, and yield its tokens as they come.

    With the same seed and options the tokens are those of `generate`, whose
    text is the first one. Options and texts are checked at once, and the first
    token is drawn when it is asked for.

    Args:
      prompt: see `generate`.
      length: see `generate`.
      normalise: see `generate`.
      **options: see `generate`.

    Yields:
      streaming.Token: rank, position, token, log_p (nats), text so far, seed.

    Raises:
      PromptError, ConfigError: see `generate`.
    """
    parsed = self._calls.start(prompt, length, normalise)
    return self._calls.stream("generate_stream", parsed, options)

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
    parsed = self._calls.blanks("infill", texts, normalise, options)
    filled = self._calls.fill("infill", parsed, count, options)
    return filled[0] if isinstance(texts, str) else filled

  def infill_stream(
    self,
    text: str,
    *,
    normalise: bool | None = None,
    **options: Unpack[options_lib.InfillOptions],
  ) -> Iterator[streaming.Token]:
    """Fill the blanks of one text, and yield the tokens as they come.

    With the same seed and options the tokens are those of `infill`.

    Args:
      text: one text, see `infill`.
      normalise: see `infill`.
      **options: see `infill`.

    Yields:
      streaming.Token: see `generate_stream`.

    Raises:
      PromptError, ConfigError: see `infill`.
    """
    if not isinstance(text, str):
      raise prompts.PromptError(f"{text!r} is no text: give one str")
    name = "infill_stream"
    (parsed,) = self._calls.blanks(name, text, normalise, options)
    return self._calls.stream(name, parsed, options)

  @overload
  def score(  # type: ignore[overload-overlap]
    self,
    texts: str | generate_lib.Text,
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    stride: int | None = None,
    **options: Unpack[options_lib.ScoreOptions],
  ) -> score_lib.Score: ...

  @overload
  def score(
    self,
    texts: Iterable[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    stride: int | None = None,
    **options: Unpack[options_lib.ScoreOptions],
  ) -> list[score_lib.Score]: ...

  def score(
    self,
    texts: str | generate_lib.Text | Iterable[str | generate_lib.Text],
    *,
    blank: str | None = None,
    normalise: bool | None = None,
    stride: int | None = None,
    **options: Unpack[options_lib.ScoreOptions],
  ) -> score_lib.Score | list[score_lib.Score]:
    """Return log-probabilities of texts, or of their marked parts.

    A text of fewer than T tokens is scored as the start of a text of T tokens,
    and for a model of padded documents as a whole document; see score.Score. A
    text of more than T tokens is cut into blocks. Every token is scored once,
    in its block, behind at least T - stride tokens of context. The order is
    that within each block, and log_p is the sum over blocks.

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
      stride: number of tokens of a block, 1 to T, for texts of more than T
        tokens. None means T // 2. Such texts take no marks and no blanks.
      **options: fields of config.score. For example, order="uniform" with
        orders=K averages over K uniform orders. marks names the two characters
        around the scored part; '' means that there are no marks.

    Returns:
      A score.Score, in nats and bits; for several texts, a list of them.

    Raises:
      PromptError: there is nothing to score, a mark has no partner, a
        character is outside the vocabulary, or a text of more than T tokens
        has marks or blanks.
      ConfigError: an option is unknown, has an invalid value or no effect.
    """
    scores = self._calls.score(texts, blank, normalise, stride, options)
    is_one = isinstance(texts, str | generate_lib.Text)
    return scores[0] if is_one else scores

  def logits(
    self,
    texts: Texts,
    *,
    order: options_lib.Order = "left_to_right",
    normalise: bool | None = None,
  ) -> np.ndarray | list[np.ndarray]:
    """Return the logits of every token given the tokens before it in an order.

    With l the logits of a text, log_softmax(l)[p - 1] is the law of the token
    at position p. At the text's own tokens these are the token_log_p of `score`
    in the same order. A masked mechanism takes one pass for each token.

    Args:
      texts: one text or several. A text is a str, a texts.Text or integer token
        ids [n]. All characters are text, also `_` and brackets.
      order: "left_to_right", "right_to_left", a permutation of the positions
        1..n, or a list with one permutation per text.
      normalise: see `score`.

    Returns:
      float32 [n, V] by position, or a list of such arrays. V is the number of
      tokens that can be predicted. If the model predicts the end of documents,
      a text of n < T tokens has one more row, for its end, and the logit of the
      end is -1e9 where the text cannot end.

    Raises:
      PromptError: a text is empty, has more than T tokens, or a character or an
        id outside the vocabulary.
      ConfigError: an order is wrong.
    """
    return self._calls.read("logits", texts, order, normalise)

  def hidden_states(
    self,
    texts: Texts,
    *,
    order: options_lib.Order = "left_to_right",
    known: int | None = None,
    normalise: bool | None = None,
  ) -> inside.HiddenStates | list[inside.HiddenStates]:
    """Return the states of all rows of texts, layer by layer.

    Args:
      texts: see `logits`.
      order: see `logits`.
      known: for a masked mechanism, and for it alone: how many tokens of the
        order are known in this pass. The other ones are MASK.
      normalise: see `score`.

    Returns:
      An inside.HiddenStates, which says what each row is; for several texts, a
      list of them.

    Raises:
      PromptError, ConfigError: see `logits`; or `known` is wrong.
    """
    return self._calls.read("hidden_states", texts, order, normalise, known)

  def attention(
    self,
    texts: Texts,
    *,
    order: options_lib.Order = "left_to_right",
    known: int | None = None,
    normalise: bool | None = None,
  ) -> inside.Attention | list[inside.Attention]:
    """Return the attention weights of all rows of texts, by layer and head.

    The arrays of a text of n tokens need about 4 L N n^2 bytes per stream.

    Args:
      texts: see `logits`.
      order: see `logits`.
      known: see `hidden_states`.
      normalise: see `score`.

    Returns:
      An inside.Attention, which says what each row is; for several texts, a
      list of them.

    Raises:
      PromptError, ConfigError: see `hidden_states`.
    """
    return self._calls.read("attention", texts, order, normalise, known)

  def log_prob(
    self,
    params: Any,
    tokens: jax.typing.ArrayLike,
    order: jax.typing.ArrayLike,
  ) -> log_prob_lib.LogProb:
    """Return log p(tokens | order) as a differentiable function of `params`.

    This is for training of your own, such as policy gradients: it may be inside
    jax.jit, jax.grad and jax.vjp (reverse mode). The result is exact for
    every mechanism, by the chain rule, and equals the scores in this order. A
    masked mechanism (mdlm) takes one pass per token, with time and memory to
    match; its cheap bound is objective.training_nll. A text that `generate`
    drew at temperature 1 by an exact method has its log_p here.

    A text of n < T tokens is the start of a text of T tokens. The tokens of a
    prompt count like all others: put them first in the order, and sum by_token
    over the other ones. In a padded document all positions after the first end
    token count nothing. On several devices, call it under
    jax.set_mesh(model.network.mesh).

    Args:
      params: the parameters, as the attribute `params`.
      tokens: int [B, n], n <= T.
      order: int [B, n], permutations of 1..n; or [n], one for all rows.

    Returns:
      A log_prob.LogProb: total [B] and by_token [B, n], by position, in nats.

    Raises:
      ConfigError: shapes, types or values are wrong. Values are checked
        outside of jit only.
    """
    return log_prob_lib.log_prob(self.network, params, tokens, order)
