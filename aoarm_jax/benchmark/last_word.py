"""The last word of texts, as in LAMBADA (arXiv 1606.06031).

left_to_right  the text before the word is given, and nothing after it
blank          what follows the word is given too, so the model knows where the
               word ends; a mark is put there where nothing follows

A text is right if the likeliest tokens, drawn one after the other, are those of
the word. The number of its tokens is given.
"""

import functools
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.data import cleaning, sources, tokenizers
from aoarm_jax.generation import prompts
from aoarm_jax.runs import canvas

_LAST = re.compile(rb"^(.*\s)(\w[^\s]*?)([^\w\s]*\s*)$", re.DOTALL)
# The mark after a word that ends its text: the first that the tokenizer knows.
_MARKS = (".", "\n", " ")


class _Cloze(NamedTuple):
  """A text with its last word.

  Attributes:
    before: ids of the text before the word.
    word: ids of the word.
    after: ids of what follows the word.
    is_cut: whether the start of the text is left out.
  """

  before: np.ndarray
  word: np.ndarray
  after: np.ndarray
  is_cut: bool


def units(session: session_lib.Session) -> list[results_lib.Unit] | str:
  """Return a unit for each way to give the text, or why there are none."""
  path = session.options.last_words
  if not path:
    return "config.benchmark.last_words names no file"
  clozes, facts = _read(session, path)
  settings = {"texts": facts, "T": session.T}
  ways = {"left_to_right": settings}
  if not session.kind.left_to_right:
    ways["blank"] = settings | {
      "orders": session.options.orders,
      "seed": session.options.seed,
    }
  return [
    results_lib.Unit(
      f"last_word/{way}",
      settings,
      functools.partial(_measure, session, clozes, way == "blank"),
    )
    for way, settings in ways.items()
  ]


def _read(session, path):
  """Return the texts of a file and what identifies them.

  Raises:
    DataError: the file is missing or wrong, a symbol is unknown, or no text
      has a word before its last one.
  """
  field = "config.benchmark.last_words"
  place = session_lib.check_exists(path, field)
  data = session.config.data
  clozes, digest, too_short = [], hashlib.sha256(), 0
  source = sources.Source(place, place.name, "")
  for document in sources.documents(source, data.text_field, True):
    text = b"".join(document.chunks)
    if data.normalise:
      text = cleaning.normal_form(text)
    digest.update(text + b"\n")
    match = _LAST.match(text)
    cloze = None
    if match:
      try:
        cloze = _cloze(session, *match.groups())
      except tokenizers.TokenizerError as error:
        raise tokenizers.DataError(
          f"{field}={path}: {document.name}: {error}"
        ) from error
    if cloze is None:
      too_short += bool(text)
      continue
    clozes.append(cloze)
  if not clozes:
    raise tokenizers.DataError(
      f"{field}={path}: no text has a last word that fits; give one text of "
      "several words a line, or JSON lines"
    )
  facts = {
    "source": path,
    "sha256": digest.hexdigest(),
    "texts": len(clozes),
    "texts_cut_at_the_start": sum(cloze.is_cut for cloze in clozes),
    "texts_without_a_last_word": too_short,
    "normalise": data.normalise,
  }
  return clozes, facts


def _cloze(session, before, word, after):
  """Return a text cut to at most T tokens; None if its word does not fit."""
  tokenizer = session.tokenizer
  after = after.rstrip()
  if not after:
    mark = next(filter(tokenizer.knows, _MARKS), "")
    after = mark.encode()
  # Tokens with a space begin with it. So the space belongs to the word there.
  head, space = before.rstrip(), before[len(before.rstrip()) :]
  whole = tokenizer.encode(head + space + word)
  first = tokenizer.encode(head)
  if not np.array_equal(whole[: len(first)], first):
    first = tokenizer.encode(before)
    whole = np.concatenate([first, tokenizer.encode(word)])
  tail = tokenizer.encode(after)
  # Leading tokens of the word that are only space are given.
  start = len(first)
  while (
    start < len(whole)
    and not tokenizer.to_bytes(whole[start : start + 1]).strip()
  ):
    start += 1
  # A padded document has a token more, see Session.unfinished.
  most = session.T - session.network.layout.predicts_end
  room = most - (len(whole) - start) - len(tail)
  if room < 1 or start == len(whole):
    return None
  cut = max(0, start - room)
  return _Cloze(
    whole[cut:start].astype(np.int32),
    whole[start:].astype(np.int32),
    tail.astype(np.int32),
    cut > 0,
  )


def _measure(session, clozes, is_blank):
  """Return the log-probability and the correctness of every last word."""
  texts, known = [], []
  for cloze in clozes:
    after = cloze.after if is_blank else cloze.after[:0]
    parts = cloze.before, cloze.word, after
    texts.append(np.concatenate(parts))
    kinds = np.repeat([True, False, True], [len(part) for part in parts])
    known.append(kinds)
  marked = [
    prompts.Marked(text, given, ~given, "a last word", True)
    if is_blank
    else session.unfinished(text, given, "a last word")
    for text, given in zip(texts, known)
  ]
  # The likeliest tokens are drawn from left to right either way.
  filled = session.fill(
    [
      prompts.Prompt(text, given, "a last word", not is_blank)
      for text, given in zip(texts, known)
    ],
    count=1,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    order="left_to_right",
    method="sequential",
    steps=0,
  )
  hits = [
    int(np.array_equal(np.array(drawn.tokens)[: len(text)], text))
    for (drawn,), text in zip(filled, texts)
  ]
  forward = session.score(marked, "left_to_right")
  result = {
    "texts": len(clozes),
    "tokens": [len(cloze.word) for cloze in clozes],
    "is_right": hits,
    "nats": [-score.log_p for score in forward],
    "is_bound": session.kind.masked,
  }
  if is_blank:
    uniform = session.score(marked, "uniform")
    result["ensembled_nats"] = [-score.log_p for score in uniform]
  return result


def rows(results: Mapping[str, Any]) -> list[results_lib.Row]:
  """Return the rows of the table.

  Args:
    results: "left_to_right" and "blank" -> the result of the unit.
  """
  table = []
  for way, result in results.items():
    subject = "as a blank" if way == "blank" else way
    make = functools.partial(results_lib.Row, "last_word", subject)
    count = result["texts"]
    value, error = results_lib.mean_and_error(result["is_right"])
    note = "likeliest tokens, from left to right"
    table.append(make("accuracy", value, error, "share", count, note))
    for name, note in (
      ("nats", "exact, the word from left to right"),
      ("ensembled_nats", "exact for the mixture of K orders of the word"),
    ):
      if name not in result:
        continue
      if result["is_bound"]:
        note = "of these orders; the diffusion itself has only a bound"
      mean, error = results_lib.mean_and_error(result[name])
      measure = "perplexity" + ", ensembled" * (name != "nats")
      perplexity = math.exp(mean)
      error = None if error is None else perplexity * error
      table.append(make(measure, perplexity, error, "per word", count, note))
      ratio, error = results_lib.ratio_and_error(result[name], result["tokens"])
      error = None if error is None else math.exp(ratio) * error
      table.append(
        make(measure, math.exp(ratio), error, "per token", count, note)
      )
  return table


def draw(results: Mapping[str, Any], path: epath.Path, title: str) -> None:
  """Draw the share of last words that have at most so many bits.

  Args:
    results: "left_to_right" and "blank" -> the result of the unit.
    path: of the PNG file.
    title: of the picture.
  """
  with canvas.draw([path], inches=(8, 4.4)) as (_, grid):
    axes = grid[0, 0]
    axes.set_title(title, parse_math=False)
    for i, (way, result) in enumerate(results.items()):
      bits = np.sort(np.array(result["nats"])) / math.log(2)
      share = np.arange(1, len(bits) + 1) / len(bits)
      accuracy = np.mean(result["is_right"])
      label = f"{way.replace('_', ' ')}: accuracy {accuracy:.3f}"
      axes.step(
        np.append(0, bits),
        np.append(0, share),
        where="post",
        color=canvas.COLOURS[i],
        label=label,
      )
    axes.set_xlabel("bits of the last word")
    axes.set_ylabel("share of the texts with at most so many")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
