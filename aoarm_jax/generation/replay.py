"""A page for a browser that replays how texts came about.

The page is one file without anything from outside: replay.html, with the texts
as JSON in its place for data.
"""

import codecs
import importlib.resources
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.data import tokenizers
from aoarm_jax.generation import texts as texts_lib
from aoarm_jax.runs import disk

_PLACE = "{data}"
_NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
_END = "<end>"
# A browser would show these as nothing, or would obey them: control characters,
# directions, lone halves of characters, unassigned numbers.
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def write(
  path: epath.PathLike,
  texts: Mapping[str, texts_lib.Text],
  tokenizer: tokenizers.Tokenizer,
  *,
  title: str,
  facts: Mapping[str, object] | None = None,
) -> None:
  """Write a page that replays texts side by side.

  Args:
    path: of the HTML file, local or in a bucket. The file is complete or absent
      at any moment. Missing folders are made.
    texts: label -> a generated text. A Text that was made without `steps` comes
      one token a step, in its order.
    tokenizer: of the model that generated them.
    title: of the page.
    facts: further lines, name -> value, as in {"temperature": 0.8}.

  Raises:
    OSError: the file cannot be written.
  """
  page = importlib.resources.files("aoarm_jax.generation") / "replay.html"
  before, after = page.read_text("utf-8").split(_PLACE)
  record = {
    "title": title,
    "facts": {name: str(value) for name, value in (facts or {}).items()},
    "panels": [_panel(label, text, tokenizer) for label, text in texts.items()],
  }
  disk.write_atomically(path, f"{before}{_as_script(record)}{after}")


def _as_script(record):
  """Return JSON that is safe inside an element <script>."""
  text = json.dumps(record, allow_nan=False)
  for character in "<>&":  # No "</script>" and no "<!--" in the texts.
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def _panel(
  label: str, text: texts_lib.Text, tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
  """Return one text with its cells, as values of JSON."""
  steps = list(text.steps)
  if not steps:
    steps = (np.argsort(text.order) + 1).tolist()
  ranks = np.argsort(text.order) + 1 - steps.count(0)
  token_log_p = list(text.token_log_p)
  cells = []
  for shown, is_text, first, last in _cells(text.tokens, tokenizer):
    group = slice(first, last)
    cells.append(
      {
        "text": shown,
        "isText": is_text,
        "position": first + 1,
        "steps": steps[group],
        "rank": int(ranks[group].max()),
        "logP": sum(token_log_p[group]) if token_log_p else None,
      }
    )
  return {
    "label": label,
    "logP": text.log_p,
    "calls": text.calls,
    "unit": tokenizer.unit,
    "units": tokenizer.units,
    "cells": cells,
  }


def _cells(tokens, tokenizer):
  """Yield (what is shown, whether it is the text itself, first, last).

  A cell is a token. Tokens that have a character together are one cell. The
  tokens are those from index `first` to before `last`.
  """
  first, data = 0, b""
  for i, token in enumerate(tokens):
    piece = tokenizer.to_bytes([token])
    if data and not _can_begin(data + piece):  # Those before stand alone.
      yield from _raw(tokens, tokenizer, first, i)
      first, data = i, b""
    data += piece
    if not data or not _can_begin(data):
      yield from _raw(tokens, tokenizer, first, i + 1)
    elif _is_whole(data):
      text = data.decode()
      shown = _shown(text)
      yield shown, shown == text, first, i + 1
    else:
      continue
    first, data = i + 1, b""
  yield from _raw(tokens, tokenizer, first, len(tokens))


def _raw(tokens, tokenizer, first, last):
  """Yield cells of single tokens that are no text."""
  for i in range(first, last):
    if tokenizer.has_end and tokens[i] == tokenizer.end:
      shown = _END
    else:
      data = tokenizer.to_bytes([tokens[i]])
      shown = data.decode(errors="backslashreplace") or f"#{tokens[i]}"
    yield shown, False, i, i + 1


def _can_begin(data):
  """Return whether bytes are UTF-8 as far as they go."""
  try:
    codecs.getincrementaldecoder("utf-8")().decode(data)
  except UnicodeDecodeError:
    return False
  return True


def _is_whole(data):
  """Return whether bytes, which can begin UTF-8, end with a character."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  decoder.decode(data)
  return not decoder.getstate()[0]


def _shown(text):
  """Return what is shown of a text, so that every character can be seen."""
  shown = []
  for i, character in enumerate(text):
    category = unicodedata.category(character)
    if character == "\n":
      shown.append(_NEWLINE)
    elif category in _UNSEEN:
      shown.append(character.encode("unicode_escape").decode())
    elif not i and category.startswith("M"):  # It would join the cell before.
      shown.append(f"\N{DOTTED CIRCLE}{character}")
    else:
      shown.append(character)
  return "".join(shown)
