"""Answers to the requests of an evaluation harness, such as lm-eval.

The requests are plain texts. This module needs no harness; lm_eval.py passes
the requests of lm-eval on. Texts longer than T are scored as the benchmark
scores them: in blocks, each behind the tokens before it, see
pipeline.StridedBatches.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import cleaning
from aoarm_jax.devices import stopping, switches
from aoarm_jax.generation import prompts
from aoarm_jax.runs import opening, places

# Harnesses give the limit on drawn tokens under these names. The first name
# that is given counts.
_LIMITS = (
  *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
)
_LAW = ("do_sample", "temperature", "top_k", "top_p")
_MOST = 256  # The limit that lm-eval has by default.


class _Window(NamedTuple):
  """Tokens of a text, of which the last ones are scored.

  Attributes:
    request: index of the request.
    tokens: int32 [n], n <= T.
    known: bool [n], the tokens that are given.
    is_document: whether they are a whole text.
  """

  request: int
  tokens: np.ndarray
  known: np.ndarray
  is_document: bool


class _Draft:
  """A text that is drawn in parts.

  Attributes:
    tokens: list of ids: the context, and what is drawn.
    first: number of tokens of the context.
    most: the greatest number of tokens to draw.
    until: strings that end the text.
    law: fields of config.sample: temperature, top_k, top_p.
    answer: the text, when it is complete; None before.
  """

  def __init__(self, tokens, options):
    self.tokens, self.first = tokens.tolist(), len(tokens)
    self.most, self.until, self.law = _read(options)
    self.answer = None if self.most else ""

  def take(self, drawn, end, tokenizer):
    """Add tokens, and end the text where it is complete."""
    ends = drawn.index(end) if end in drawn else len(drawn)
    self.tokens += drawn[:ends]
    text = tokenizer.decode(self.tokens[self.first :])
    places = [text.find(stop) for stop in self.until if stop in text]
    left = self.most - (len(self.tokens) - self.first)
    if places or ends < len(drawn) or left <= 0:
      self.answer = text[: min(places, default=None)]


class Harness:
  """A run that answers requests.

  The log-probability of a continuation is that of its tokens given those of the
  context. They are scored from left to right, or in another order. Answers do
  not depend on the batch size.
  """

  def __init__(
    self, session: session_lib.Session, normalise: bool | None = None
  ) -> None:
    """Take an open run.

    Args:
      session: the run. config.score.order is the order of scored tokens, and
        config.benchmark has the seed, the orders, the stride and the batch
        size.
      normalise: whether texts are first brought into the form of text8. None
        takes config.data.normalise.
    """
    config = session.config
    self._session, self._tokenizer = session, session.tokenizer
    self._is_normal = config.data.normalise if normalise is None else normalise
    self.T = session.T

  def loglikelihood(
    self, pairs: Sequence[tuple[str, str]]
  ) -> list[tuple[float, bool]]:
    """Return log p(continuation | context), and whether it is the likeliest.

    The text may go on after the continuation. If it does not fit into T tokens,
    the oldest tokens of the context are left out.

    Args:
      pairs: (context, continuation). A context may be empty.

    Returns:
      Pairs of nats, and whether the likeliest tokens, drawn one by one from
      left to right, are those of the continuation.

    Raises:
      TokenizerError: a character is not in the vocabulary.
    """
    windows = []
    for i, (context, continuation) in enumerate(pairs):
      tokens, first = self._encoded(context, continuation)
      windows += self._windows(i, tokens, first, False)
    is_likeliest = [True] * len(pairs)
    with self._ready():
      log_p = self._log_p(windows, len(pairs))
      filled = self._fill(windows, temperature=0.0, top_k=0, top_p=1.0)
    for window, drawn in zip(windows, filled):
      # A text that ends early is another one.
      same = np.array_equal(drawn[: len(window.tokens)], window.tokens)
      is_likeliest[window.request] &= bool(same)
    return [*zip(log_p, is_likeliest)]

  def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
    """Return log p of whole texts of any length, in nats.

    For a text of at most T tokens this is the log_p of Model.score. Every token
    counts once.

    Args:
      texts: the texts.

    Raises:
      TokenizerError: a character is not in the vocabulary.
    """
    windows = []
    for i, text in enumerate(texts):
      tokens, first = self._encoded("", text)
      windows += self._windows(i, tokens, first, True)
    with self._ready():
      return self._log_p(windows, len(texts))

  def generate_until(
    self, requests: Sequence[tuple[str, Mapping[str, Any]]]
  ) -> list[str]:
    """Return what follows each context, from left to right.

    A text is drawn in parts of half of T tokens. Where it does not fit into T
    tokens, the oldest ones are forgotten.

    Args:
      requests: pairs of a context and its options: until (a string or a list of
        strings, at the first of which the text ends), max_gen_toks,
        do_sample, temperature, top_k and top_p. Without do_sample and without a
        temperature, the likeliest token is taken.

    Returns:
      The texts without their contexts, cut before the string that ended them.

    Raises:
      TokenizerError: a character is not in the vocabulary.
      ConfigError: an option is unknown or wrong.
    """
    drafts = []
    for context, options in requests:
      if self._is_normal:
        context = prompts.normalised_start(context, "a context")
      drafts.append(_Draft(self._tokenizer.encode(context), options))
    seed, T = self._session.options.seed, self.T
    end = self._tokenizer.end if self._tokenizer.has_end else None
    with self._ready():
      while open_drafts := [d for d in drafts if d.answer is None]:
        for law in {tuple(d.law.items()): d.law for d in open_drafts}.values():
          group = [d for d in open_drafts if d.law == law]
          windows = []
          for i, draft in enumerate(group):
            left = draft.most + draft.first - len(draft.tokens)
            count = min(max(1, T // 2), left)
            given = draft.tokens[max(0, len(draft.tokens) + count - T) :]
            tokens = np.array(given + [0] * count, np.int32)
            known = np.arange(len(tokens)) < len(given)
            windows.append(_Window(i, tokens, known, False))
          # Another seed for every part: the positions may be the same.
          drawn = self._fill(windows, seed=seed, **law)
          for draft, window, tokens in zip(group, windows, drawn):
            first = int(window.known.sum())
            draft.take(tokens[first:], end, self._tokenizer)
        seed += 1
    return [draft.answer or "" for draft in drafts]

  @contextlib.contextmanager
  def _ready(self) -> Iterator[None]:
    """Yield where programs can run."""
    switches.check_not_forked()
    mesh = self._session.network.mesh
    with switches.fixed_types(), jax.set_mesh(mesh):
      yield

  def _encoded(self, context, continuation):
    """Return the tokens of both, and the number of those that are given.

    The tokens are those of the whole text if one begins with the continuation,
    or with the space before it. Else the two are encoded one by one.
    """
    if self._is_normal:
      whole = (context + continuation).encode("utf-8", "replace")
      whole = cleaning.normal_form(whole).decode()
      start = prompts.normalised_start(context, "a context")
      # The tokens before the continuation may change with it, as spaces do.
      pairs = enumerate(zip(start, whole))
      same = next((i for i, (a, b) in pairs if a != b), len(start))
      context, continuation = whole[:same], whole[same:]
    encode = self._tokenizer.encode
    whole = encode(context + continuation)
    for given in (context, context.rstrip()):
      first = encode(given)
      if np.array_equal(whole[: len(first)], first):
        return whole, len(first)
    first = encode(context)
    return np.concatenate([first, encode(continuation)]), len(first)

  def _windows(self, request, tokens, first, is_document):
    """Return the windows of a text whose tokens from `first` on are scored."""
    n, T = len(tokens), self.T
    stride = self._session.stride(T) if n > T else T
    windows = []
    for start in range(first, n, stride):
      last = min(start + stride, n)
      begin = max(0, last - T)
      known = np.arange(begin, last) < start
      part = tokens[begin:last].astype(np.int32)
      windows.append(_Window(request, part, known, is_document and n <= T))
    return windows

  def _log_p(self, windows, count):
    """Return the sums over the windows of each of `count` requests."""
    marked = [
      prompts.Marked(window.tokens, window.known, ~window.known, "a text")
      if window.is_document
      else self._session.unfinished(window.tokens, window.known, "a text")
      for window in windows
    ]
    log_p = [0.0] * count
    scores = self._session.score(marked, self._session.config.score.order)
    for window, score in zip(windows, scores):
      log_p[window.request] += score.log_p
    return log_p

  def _fill(self, windows, **sample):
    """Return the tokens of every window, drawn from left to right."""
    filled = self._session.fill(
      [
        prompts.Prompt(window.tokens, window.known, "a text", True)
        for window in windows
      ],
      **dict(count=1, order="left_to_right", method="sequential", steps=0),
      **sample,
    )
    return [list(drawn.tokens) for (drawn,) in filled]


def of_run(
  workdir: os.PathLike | str,
  *,
  order: str = "left_to_right",
  orders: int = 8,
  seed: int = 0,
  stride: int = 0,
  batch_size: int = 64,
  normalise: bool | None = None,
  read: str = "newest",
  step: int | None = None,
) -> Harness:
  """Return the Harness of a run or of an exported model.

  Args:
    workdir: all that aoarm_jax.load takes.
    order: the order of the scored tokens: left_to_right, right_to_left, or
      uniform, which averages the probability over random orders.
    orders: uniform only: the number of orders.
    seed: of random orders and of drawn texts.
    stride: tokens of a block of a text that is longer than T; 0 means half of
      T.
    batch_size: the greatest number of texts at once.
    normalise: see Harness.
    read: see aoarm_jax.load.
    step: see aoarm_jax.load.

  Raises:
    CheckpointError, ConfigError: see aoarm_jax.load; or an option is wrong.
  """
  if order == "given":
    raise config_lib.ConfigError(
      "order='given': texts of many lengths have no order in common; give "
      "left_to_right, right_to_left or uniform"
    )
  switches.check_not_forked()
  switches.keep_compilations()
  place = places.find(workdir)
  config = opening.config_here(place, read, step)
  config = config.replace("score.order", order)
  for name, value in (
    ("orders", orders),
    ("seed", seed),
    ("stride", stride),
    ("batch_size", batch_size),
  ):
    number = config_rules.whole_number(name, value)
    config = config.replace(f"benchmark.{name}", number)
  config = config_rules.validate(config)
  with switches.fixed_types():
    run = opening.open_run(place, config, step=step)
  if config.model.kind.masked:
    logging.warning(
      "mechanism %s: log-likelihoods are those of the chain rule, one pass for "
      "every token, and exact for its order; the diffusion itself has only a "
      "bound",
      config.model.mechanism,
    )
  signals = stopping.Signals("batch", ())
  return Harness(session_lib.Session(config, run, signals), normalise)


def _read(options):
  """Return (most tokens, strings that end a text, the law of a draw).

  Raises:
    ConfigError: an option is unknown or wrong.
  """
  options = dict(options)
  until = options.pop("until", None) or []
  until = [until] if isinstance(until, str) else list(until)
  limits = [options.pop(name, None) for name in _LIMITS]
  most = next((limit for limit in limits if limit is not None), _MOST)
  for name in options:
    if name not in _LAW:
      raise config_lib.ConfigError(
        f"generate_until: {name}={options[name]!r}: no such option; there are: "
        + ", ".join(("until", *_LIMITS, *_LAW))
      )
  is_drawn = options.get("do_sample", options.get("temperature", 0.0) > 0)
  law = {
    "temperature": float(options.get("temperature", 1.0)) if is_drawn else 0.0,
    "top_k": int(options.get("top_k") or 0) if is_drawn else 0,
    "top_p": float(options.get("top_p", 1.0)) if is_drawn else 1.0,
  }
  most = config_rules.whole_number("max_gen_toks", most)
  return max(0, most), [stop for stop in until if stop], law
