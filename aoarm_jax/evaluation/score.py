"""Log-probabilities of given texts or of parts of them: --mode=score.

The score is log p(scored | known) in one order of the scored positions. Known
tokens come first, by position. Unknown tokens do not come at all. The chain
rule gives the exact value. It takes one pass of the network for each text. A
masked mechanism takes one pass for every scored token. Averaged over K uniform
orders, the score is log mean_k p(scored | known, sigma_k).

With score.width above 1, p is the likelihood of groups of that many tokens. The
tokens of a group are independent given the groups before them. The known tokens
are groups of the same width. With 0, the width is that of training.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import sharding, stopping
from aoarm_jax.evaluation import estimators
from aoarm_jax.generation import prompts, shapes
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import agreement, alphabet, opening, patience

# The texts of a file are scored in parts of this many, and each part is printed
# before the next one is scored.
_AT_ONCE = 1024


class Score(NamedTuple):
  """The log-probability of a part of a text, given the known part.

  A text of n < T tokens (config.model.T) is scored as the first n positions of
  a text of T tokens. Nothing tells the model that the text ends at n. With two
  sentinels the end even stays at position T + 1. So `log_p` is not the
  log-probability of a text of exactly n tokens.

  With config.data.documents=pad a text is a whole document. With one sentinel
  its end is a token at position n + 1, which is scored if the last token is
  scored, and given if the last token is given. With two sentinels the end is
  always given. So log_p is that of a text of exactly n tokens. A text of T
  tokens has no place for its end.

  A text of more than T tokens is scored block by block, see blocks.py.

  Attributes:
    text: the text, as it was given. With data.normalise it is the text in
      normal form, and positions are those of this form.
    log_p: nats, log p(scored | known). Over several orders, the log of the mean
      of p.
    bits: -log_p / ln 2.
    positions: positions of the scored tokens, within 1..n, ascending, and n + 1
      for a scored end. A token is a character, a byte, or a part of a word: see
      `unit`.
    token_log_p: nats of each scored token, in the order of `positions`, given
      the tokens (or groups) before it in the order. Over several orders, the
      mean over them, so that the sum is not log_p.
    token_bits: -token_log_p / ln 2, bits of each scored token.
    order: the scored positions in the order that was followed; None if there
      were several orders.
    order_log_p: nats, log p(scored | known) in each of the orders; of a text of
      more than T tokens, the sum over its blocks.
    unit: name of a token: "char", "byte" or "token".
    bytes: number of UTF-8 bytes of the scored tokens.
    bits_per_byte: bits / bytes; None if the scored tokens have no bytes.
    bits_per_char: bits / number of characters that begin in the scored tokens;
      None if there are none.
  """

  text: str
  log_p: float
  bits: float
  positions: list[int]
  token_log_p: list[float]
  token_bits: list[float]
  order: list[int] | None
  order_log_p: list[float]
  unit: str
  bytes: int
  bits_per_byte: float | None
  bits_per_char: float | None


class Scorer:
  """Scores texts. A program is compiled once for every shape of a batch."""

  def __init__(
    self, config: config_lib.Config, network: network_lib.Network
  ) -> None:
    """Compile nothing yet.

    Args:
      config: its sections score, orders, model and compute.attention are read.
      network: the network that gives the probabilities; with a mesh.
    """
    assert network.mesh is not None
    self._config, self._network = config, network
    self._mesh = network.mesh
    self._jitted = jax.jit(
      self._nats,
      static_argnames=("count", "most"),
      out_shardings=sharding.replicated(network.mesh),
    )
    self._compiled: set[Any] = set()

  def score(
    self,
    params: Any,
    texts: Sequence[tuple[str, prompts.Marked]],
    config: config_lib.Config | None = None,
    given: Sequence[Sequence[int]] | None = None,
    is_stopped: Callable[[], object] = lambda: False,
  ) -> list[Score]:
    """Score every text in the orders that config.score names.

    Texts of about the same length are scored in the same orders, drawn from the
    seed. So their scores can be compared, and the average over orders is a
    probability law of texts too.

    Args:
      params: the network's parameters, on the mesh.
      texts: pairs of the text as it is written and the parsed text, of n <= T
        tokens each.
      config: if given, its sections score and orders.given replace those of
        the Scorer's config.
      given: for config.score.order="given", a permutation of 1..n for every
        text. None takes config.orders.given for all texts.
      is_stopped: called before every batch. A true result ends the call.

    Returns:
      One Score per text. If the call was stopped, the texts of the batches
      before have a Score.

    Raises:
      PromptError: this model cannot score one of the texts.
    """
    config = config or self._config
    model = config.model
    by_length: dict[int, list[int]] = {}
    for i, (_, text) in enumerate(texts):
      check(text, model)
      T = shapes.length(len(self._with_end(text)[0]), model.T)
      by_length.setdefault(T, []).append(i)
    scores: dict[int, Score] = {}
    if given is None:
      given = [config.orders.given] * len(texts)
    batches = []
    for T, rows in by_length.items():
      B = sharding.batch_size(self._mesh, config.score.batch_size, len(rows))
      for first in range(0, len(rows), B):
        batches.append((T, rows[first : first + B], B))
    for batch in patience.counted(batches):
      if is_stopped():
        break
      scores |= self._batch(params, texts, config, given, *batch)
    return [scores[i] for i in sorted(scores)]

  def _batch(self, params, texts, config, given, T, rows, B):
    """Return {index: Score} of the texts at indices `rows`: one batch of B."""
    options = config.score
    tokens = np.zeros((B, T), np.int32)
    kinds = np.full((B, T), _UNKNOWN, np.int32)
    # Rows that only fill the batch score their first token. Rows of texts are
    # overwritten below.
    kinds[:, 0] = _SCORED
    order = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    for b, row in enumerate(rows):
      row_tokens, row_kinds = self._with_end(texts[row][1])
      n = len(row_tokens)
      tokens[b, :n], kinds[b, :n] = row_tokens, row_kinds
      if options.order == "given":
        order[b] = prompts.within(given[row], T)
    if options.order == "right_to_left":
      order = order[:, ::-1]
    counts = (kinds == _SCORED).sum(axis=1)
    key = jax.random.fold_in(jax.random.key(options.seed), purposes.SCORING)
    count = options.orders if options.order == "uniform" else 0
    most = self._most_ranks(int(counts.max()), T)
    width = None
    group = options.width or config.orders.width
    if group > 1:
      width = sharding.put(self._mesh, np.int32(group))
    program = B, T, count, most, width is None
    texts_here = shapes.describe(len(rows), T)
    what = f"scoring {texts_here}"
    if program not in self._compiled:
      what = f"compiling the score of {texts_here}"
    with patience.waiting(what):
      out = self._jitted(
        params,
        sharding.put(self._mesh, key),
        *sharding.put_rows(self._mesh, (tokens, kinds, order)),
        width,
        count=count,
        most=most,
      )
    self._compiled.add(program)
    with patience.waiting(f"scoring {texts_here}"):
      nats, order = jax.device_get(out)
    return {
      row: _score(
        texts[row][0],
        texts[row][1],
        nats[:, b, :n],
        order[:, b, :n],
        self._network.tokenizer,
      )
      for b, (row, n) in enumerate(zip(rows, counts))
    }

  def _with_end(self, text):
    """Return the tokens and the kinds of a text, with the end of a document.

    The end stands in the tokens wherever it tells the length. A given end is of
    the kind _KNOWN where it is a position, and not where it is a sentinel.
    """
    layout, n = self._network.layout, len(text.tokens)
    kinds = np.where(
      text.known, _KNOWN, np.where(text.scored, _SCORED, _UNKNOWN)
    )
    if layout.end_token is None or n == self._network.model.T:
      return text.tokens, kinds
    end = kinds[-1] if n else _SCORED
    if text.has_given_end:
      one_way = self._network.model.kind.left_to_right
      end = _UNKNOWN if one_way else _KNOWN
    if not layout.predicts_end:
      end = _UNKNOWN
    elif end == _UNKNOWN:
      return text.tokens, kinds
    return np.append(text.tokens, layout.end_token), np.append(kinds, end)

  def _most_ranks(self, count, T):
    """Return the number of ranks to compute for `count` scored tokens.

    A masked mechanism takes a pass for each rank, so several numbers repay
    their compilation. All others take one pass, for a few ranks or for all.
    """
    if self._network.layout.masked:
      return shapes.length(count, T)
    return T if count > 16 else min(16, T)

  def _nats(self, params, key, tokens, kinds, given, width, *, count, most):
    """Return nats and positions of R ranks, from each row's first scored rank.

    Args:
      params: the network's parameters.
      key: typed PRNG key of the uniform orders.
      tokens: int32 [B, T].
      kinds: int32 [B, T], by position: _KNOWN, _SCORED or _UNKNOWN.
      given: int32 [B, T], the orders if count is 0.
      width: int32 [], the number of ranks in a group; None is the chain rule.
      count: number of uniform orders K; 0 takes `given`, and K is 1; static.
      most: number of ranks R; static.

    Returns:
      (nats float32 [K, B, R], positions int32 [K, B, R]).
    """
    B, T = tokens.shape
    options = self._config.replace("orders.family", "uniform").orders
    first = (kinds == _KNOWN).sum(axis=1)[:, None]
    ranks = jnp.minimum(first + jnp.arange(most), T - 1)
    nll = functools.partial(
      estimators.nll_of_ranks, self._network, params, tokens, ranks
    )

    def of_order(k):
      order = given
      if count:
        order = orders.draw(jax.random.fold_in(key, k), 1, T, options)
        order = jnp.broadcast_to(order, (B, T))
      order = orders.by_class(order, kinds)
      positions = jnp.take_along_axis(order, ranks, axis=1)
      groups = None
      if width is not None:
        kinds_by_rank = jnp.take_along_axis(kinds, order - 1, axis=1)
        groups = orders.equal_groups(kinds_by_rank, width)
      return nll(order, groups), positions

    return jax.lax.map(of_order, jnp.arange(max(count, 1)))


_KNOWN, _SCORED, _UNKNOWN = range(3)


def _score(text, marked, nats, order, tokenizer):
  """Return the Score of a text from nats [K, n] at positions [K, n]."""
  log_p = -nats.astype(np.float64).sum(axis=1)
  largest = log_p.max()
  total = float(largest + np.log(np.exp(log_p - largest).mean()))
  by_position = np.take_along_axis(nats, np.argsort(order, axis=1), axis=1)
  return of_tokens(
    text,
    marked.tokens[marked.scored],
    tokenizer,
    log_p=total,
    positions=sorted(order[0].tolist()),
    token_log_p=-by_position.astype(np.float64).mean(axis=0),
    order=order[0].tolist() if len(order) == 1 else None,
    order_log_p=log_p,
  )


def of_tokens(
  text: str,
  tokens: np.ndarray,
  tokenizer: tokenizers.Tokenizer,
  *,
  log_p: float,
  positions: list[int],
  token_log_p: np.ndarray,
  order: list[int] | None,
  order_log_p: np.ndarray,
) -> Score:
  """Return a Score in all its units.

  Args:
    text: the text.
    tokens: int [m], the scored tokens that the text has.
    tokenizer: gives their sizes.
    log_p: see Score.
    positions: see Score.
    token_log_p: float64 [n], see Score.
    order: see Score.
    order_log_p: float64 [K], see Score.
  """
  size = int(tokenizer.bytes_of[tokens].sum())
  characters = int(tokenizer.characters_of[tokens].sum())
  bits = -log_p / math.log(2)
  return Score(
    text=text,
    log_p=log_p,
    bits=bits,
    positions=positions,
    token_log_p=token_log_p.tolist(),
    token_bits=(-token_log_p / math.log(2)).tolist(),
    order=order,
    order_log_p=order_log_p.tolist(),
    unit=tokenizer.unit,
    bytes=size,
    bits_per_byte=bits / size if size else None,
    bits_per_char=bits / characters if characters else None,
  )


def check(text: prompts.Marked, model: config_lib.Model) -> None:
  """Raise PromptError if the model cannot score the parsed text."""
  n = len(text.tokens)
  if n > model.T:
    raise prompts.PromptError(
      f"{text.name} has {n} tokens; the model knows at most {model.T} "
      "(config.model.T)"
    )
  kinds = np.where(text.known, _KNOWN, np.where(text.scored, 1, _UNKNOWN))
  if model.kind.left_to_right and (np.diff(kinds) < 0).any():
    raise prompts.PromptError(
      f"{text.name}: mechanism {model.mechanism} generates left to right only: "
      "what is given must come first, then what is scored, then what is unknown"
    )


def score(
  config: config_lib.Config,
  workdir: epath.Path,
  text: str = "",
  input_file: str = "",
) -> None:
  """Print the Score of every text as a line of JSON: --mode=score.

  Args:
    config: the config; its section score says how.
    workdir: run directory.
    text: one text. If it is empty, the texts come from `input_file`.
    input_file: file with one text per line; '-' is standard input.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    PromptError: this model cannot score one of the texts.
    Stopped: SIGTERM came. The scores so far are printed.
  """
  tokenizer = alphabet.of_run(config, workdir)
  lines = [("--text", text)] if text else prompts.read_lines(input_file)
  agreement.check_lines(lines)
  if config.data.normalise:
    lines = prompts.normalised(
      lines, tokenizer, config.sample.blank, config.score.marks
    )

  def parse(line, name):
    marked = prompts.parse_marked(
      line, tokenizer, config.sample.blank, config.score.marks, name
    )
    return line, marked

  # All lines are checked before the first one is scored: here for symbols and
  # marks, and below, when the run's model is known, for length and order.
  texts = prompts.check_lines(lines, parse)
  if config.orders.groups != "none" and config.score.width == 1:
    logging.info(
      "config.score.width=1: scores follow the chain rule, and this model was "
      "trained with groups; --config.score.width=0 scores groups"
    )
  prompts.note_text(lines, tokenizer, config.sample.blank, config.score.marks)
  run = opening.open_run(workdir, config)
  prompts.check_lines(
    [(marked.name, marked) for _, marked in texts],
    lambda marked, _: check(marked, run.network.model),
  )
  done = 0
  with jax.set_mesh(run.network.mesh), stopping.Signals("batch") as signals:
    scorer = Scorer(config, run.network)
    # Each part is printed at once, so that a later failure loses nothing of it.
    for start in range(0, len(texts), _AT_ONCE):
      part = texts[start : start + _AT_ONCE]
      scores = scorer.score(run.params, part, is_stopped=signals.poll)
      done += len(scores)
      if jax.process_index() == 0:
        for text_score in scores:
          print(json.dumps(text_score._asdict()))
        sys.stdout.flush()
      signals.raise_if_stopped(f"{done} of {len(texts)} texts")
