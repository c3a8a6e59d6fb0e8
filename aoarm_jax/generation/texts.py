"""Texts from a checkpoint: filled prompts.

The methods are in decode.py and diffusion.py. Their docstrings say which
methods are exact.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.generation import batches, prompts, streaming
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import disk


class Text(NamedTuple):
  """One generated text.

  A text of fewer than T tokens (config.model.T) is generated as the start of a
  text of T tokens. With two sentinels the model expects the end at position
  T + 1, and not after the text. With config.data.documents=pad a text is a
  whole document, which the model knows to end after it.

  Attributes:
    text: the readable text. Bytes that are not UTF-8 appear as U+FFFD.
    tokens: the token ids. Unlike `text` they lose nothing, so api.Model.score
      reads the ids of a Text. The last token is the end of a document if the
      model has drawn that.
    order: the positions 1..n of `tokens` in the order of generation. The known
      positions of the prompt come first.
    log_p: nats, log-probability of the generated tokens. Each token counts
      under the law that decided it, temperature and cuts included. If the
      length was drawn first, it is that of the text given its length.
    calls: passes of the network until the text was complete. Known tokens (or
      two sentinels) take one pass, and every step takes one. A round of
      speculative takes two. A step of adaptive takes one more for every 64
      targets that it scores. Passes for longer texts of the same batch do not
      count.
    accepted: number of generated tokens that were drafts and were kept
      (speculative). The first draft of every round counts too, although it
      cannot be rejected. So `accepted` is at least the number of rounds, and
      its share of the generated tokens is no rate of acceptance.
    seed: config.sample.seed of the call. The same call with this seed draws
      the same text again.
    steps: for each of `tokens`, the number of the step that decided it, counted
      from 1. Several tokens may come in one step. 0 for a known token.
    token_log_p: nats, for each of `tokens`, the share that it has in log_p. 0
      for a known token.
  """

  text: str
  tokens: list[int]
  order: list[int]
  log_p: float
  calls: int
  accepted: int = 0
  seed: int = 0
  steps: Sequence[int] = ()
  token_log_p: Sequence[float] = ()


class Sampler:
  """Fills prompts, and decides where texts without a given length end."""

  def __init__(
    self, config: config_lib.Config, network: network_lib.Network
  ) -> None:
    """Compile nothing yet.

    Args:
      config: its sections sample, orders and model are read.
      network: the network that generates; with a mesh.
    """
    self._config, self._network = config, network
    self._batches = batches.Batches(config, network)

  def sample(
    self,
    params: Any,
    prompt: prompts.Prompt | None = None,
    is_stopped: Callable[[], object] = lambda: False,
  ) -> list[Text]:
    """Draw config.sample.count texts for one prompt, see `fill`.

    Args:
      params: the network's parameters, on the mesh.
      prompt: the prompt. None generates config.sample.length tokens.
      is_stopped: see `fill`.
    """
    if prompt is None:
      length = self._config.sample.length
      n = length or self._config.model.T
      prompt = prompts.Prompt(
        np.zeros(n, np.int32), np.zeros(n, bool), is_open=not length
      )
    return self.fill(params, [prompt], is_stopped=is_stopped)[0]

  def fill(
    self,
    params: Any,
    texts: Sequence[prompts.Prompt],
    config: config_lib.Config | None = None,
    given: Sequence[Sequence[int]] | None = None,
    first: int = 0,
    is_stopped: Callable[[], object] = lambda: False,
  ) -> list[list[Text]]:
    """Draw config.sample.count texts for every prompt.

    The j-th text of prompt i depends on the seed, on the prompt and on the
    number (first + i) * count + j. It does not depend on
    config.sample.batch_size, the devices or the other prompts.

    Padded documents are told how long they are. If the model predicts their
    end and a prompt is open, texts end where the model draws the end, from left
    to right. For any other order, such a text is drawn first, and only its
    length is kept: the law is p(length) p(text | length, order).

    Args:
      params: the network's parameters, on the mesh.
      texts: the prompts, of n <= T tokens each. Positions 1..n are generated,
        and nothing beyond.
      config: if given, its sections sample and orders.given replace those of
        the Sampler's config.
      given: for config.sample.order="given", a permutation of 1..n for every
        prompt. None takes config.orders.given for all prompts.
      first: number of the first prompt.
      is_stopped: called before every batch. A true result ends the call.

    Returns:
      One list of texts per prompt. If the call was stopped, the lists hold the
      texts of the batches before.

    Raises:
      PromptError: this model cannot fill one of the prompts.
    """
    config = config or self._config
    count = config.sample.count
    if given is None:
      given = [config.orders.given] * len(texts)
    rows: dict[int, batches.Row] = {}
    for i, (prompt, order) in enumerate(zip(texts, given)):
      check(prompt, self._config.model)
      row = self._row(prompt, order)
      for number in range(i * count, (i + 1) * count):
        rows[number] = row._replace(number=first * count + number)
    drawn = self._drawn(params, rows, config, is_stopped)
    every = [range(i * count, (i + 1) * count) for i in range(len(texts))]
    return [[drawn[row] for row in rows if row in drawn] for rows in every]

  def stream(
    self,
    params: Any,
    prompt: prompts.Prompt,
    config: config_lib.Config,
    order: Sequence[int] | None = None,
  ) -> Iterator[streaming.Token]:
    """Yield the tokens of the first text that `fill` draws for a prompt.

    If an open text has another order than left to right, its length is drawn
    before the first token comes.

    Args:
      params: the network's parameters, on the mesh.
      prompt: the prompt.
      config: its sections sample and orders.given count.
      order: for config.sample.order="given", a permutation of 1..n. None takes
        config.orders.given.

    Raises:
      PromptError: this model cannot fill the prompt.
    """
    check(prompt, self._config.model)
    sample = config.sample
    row = self._row(prompt, config.orders.given if order is None else order)
    one_way = sample.order == "left_to_right" and sample.method != "adaptive"
    if row.is_open and not one_way:
      texts, again = self._with_ends(params, {0: row}, config)
      if not again:
        # Nothing but the end was left to draw, if anything.
        last = texts[0]
        n = len(last.tokens)
        if n > row.known.sum():
          found = n - 1, n, last.tokens[-1], last.log_p, last.text, sample.seed
          yield streaming.Token(*found)
        return
      row = again[0]
    steps = self._batches.steps(params, row, config)
    end = self._network.layout.end_token
    tokenizer = self._network.tokenizer
    yield from streaming.tokens(steps, tokenizer, row.n, end, sample.seed)

  def _row(self, prompt, order):
    """Return the Row of a prompt; its number is 0."""
    n, T = len(prompt.tokens), self._config.model.T
    is_told = self._network.layout.predicts_end and not prompt.is_open
    is_open = self._network.layout.predicts_end and prompt.is_open
    tokens, known = prompt.tokens, prompt.known
    # A known end token tells the length. From left to right alone it cannot be
    # known, and a text of T tokens has no place for it.
    if is_told and n < T and not self._config.model.kind.left_to_right:
      tokens = np.append(tokens, self._network.layout.end_token)
      known = np.append(known, True)
    return batches.Row(tokens, known, n, order, is_open, 0)

  def _drawn(self, params, rows, config, is_stopped):
    """Return {number: Text} of rows by their numbers."""
    closed = {i: row for i, row in rows.items() if not row.is_open}
    drawn = self._in_batches(params, closed, config, is_stopped)
    rows = {i: row for i, row in rows.items() if row.is_open}
    if not rows:
      return drawn
    method, order = config.sample.method, config.sample.order
    if order == "left_to_right" and method != "adaptive":
      return drawn | self._in_batches(params, rows, config, is_stopped)
    texts, again = self._with_ends(params, rows, config, is_stopped)
    drawn |= {i: text for i, text in texts.items() if i not in again}
    found = self._in_batches(params, again, config, is_stopped)
    for i, text in found.items():
      drawn[i] = text._replace(calls=text.calls + texts[i].calls)
    return drawn

  def _with_ends(self, params, rows, config, is_stopped=lambda: False):
    """Draw open rows from left to right, for their lengths alone.

    Returns:
      {number: Text}, and {number: Row} of the texts in which more than the end
      was drawn. These rows are closed, and are to be drawn again.
    """
    method = config.sample.method
    exact = method if method == "speculative" else "sequential"
    texts = self._in_batches(
      params,
      rows,
      config.replace("sample.order", "left_to_right").replace(
        "sample.method", exact
      ),
      is_stopped,
      purposes.LENGTHS,
    )
    again = {}
    for i, text in texts.items():
      n = len(text.tokens)
      n -= text.tokens[-1:] == [self._network.layout.end_token]
      row = rows[i]
      if row.known[:n].all():  # Nothing but the end was left to draw.
        continue
      prompt = prompts.Prompt(row.tokens[:n], row.known[:n])
      again[i] = self._row(prompt, row.order)._replace(number=row.number)
    return texts, again

  def _in_batches(
    self, params, rows, config, is_stopped, purpose=purposes.GENERATION
  ):
    """Return {number: Text} of rows that are all open or all closed."""
    drawn = self._batches.draw(params, rows, config, is_stopped, purpose)
    return {
      number: self._text(rows[number], config.sample.seed, result)
      for number, result in drawn.items()
    }

  def _text(self, row, seed, result):
    """Return the Text of a row from the Generation of it alone."""
    n = count = row.n
    if row.is_open:
      ends = np.flatnonzero(result.tokens[:n] == self._network.layout.end_token)
      if len(ends):
        n, count = ends[0], ends[0] + 1
    return Text(
      self._network.tokenizer.decode(result.tokens[:n]),
      result.tokens[:count].tolist(),
      result.order[result.order <= count].tolist(),
      float(result.log_p),
      int(result.calls),
      int(result.accepted),
      seed,
      _numbered(result.steps[:count]),
      result.token_log_p[:count].tolist(),
    )


def _numbered(steps):
  """Return the numbers of law.Generation.steps without gaps, known as 0."""
  numbers = np.unique(steps[steps >= 0])
  return np.searchsorted(numbers, steps, "right").tolist()


def check(prompt: prompts.Prompt, model: config_lib.Model) -> None:
  """Raise PromptError if the model cannot fill the prompt."""
  if len(prompt.tokens) > model.T:
    raise prompts.PromptError(
      f"{prompt.name} has {len(prompt.tokens)} tokens; the model generates at "
      f"most {model.T} (config.model.T)"
    )
  blanks = np.flatnonzero(~prompt.known)
  if model.kind.left_to_right and prompt.known[blanks[0] :].any():
    raise prompts.PromptError(
      f"{prompt.name}: the blank at position {blanks[0] + 1} stands before "
      f"known text, but mechanism {model.mechanism} generates left to right "
      "only"
    )


def write(
  path: epath.Path, texts: Sequence[Text], step: int, **facts: Any
) -> None:
  """Write texts as JSON lines. The file is complete or absent at any moment.

  Args:
    path: the file; its folder is made if absent.
    texts: the texts, one per line.
    step: training steps of the parameters that generated them.
    **facts: further JSON values for every line.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (
    json.dumps({"step": step, **facts, **text._asdict()}) for text in texts
  )
  disk.write_atomically(path, "".join(line + "\n" for line in lines))
