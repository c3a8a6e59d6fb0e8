"""Texts as users write them: blanks to fill, and marked parts to score."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import errors
from aoarm_jax.data import tokenizers


class PromptError(errors.UserError, ValueError):
  """A text that cannot be: one line that names what and where."""

  exit_code = 2


class Prompt(NamedTuple):
  """A text with blanks.

  Attributes:
    tokens: int32 [n]; anything where not known.
    known: bool [n].
    name: of where it stands, for messages.
  """

  tokens: np.ndarray
  known: np.ndarray
  name: str = "--prompt"


class Marked(NamedTuple):
  """A text of which a part is to be scored.

  Attributes:
    tokens: int32 [n]; anything where neither known nor scored.
    known: bool [n], what is given.
    scored: bool [n].
    name: of where it stands, for messages.
  """

  tokens: np.ndarray
  known: np.ndarray
  scored: np.ndarray
  name: str = "--text"


def parse_prompt(
  text: str,
  tokenizer: tokenizers.Tokenizer,
  blank: str,
  name: str = "--prompt",
) -> Prompt:
  """Reads a text in which every `blank` is one token to generate.

  Raises:
    PromptError: no blank in it, none that is named, or a character that is not
      in the vocabulary.
  """
  if not blank:
    raise PromptError(
      "config.sample.blank='': name the character of a token to generate"
    )
  if blank not in text:
    raise PromptError(
      f"{name}={text!r} has no blank {blank!r}: there is nothing to generate"
    )
  tokens, kinds = _encode(text, tokenizer, name, blank, "")
  return Prompt(tokens, kinds != _UNKNOWN, name)


def parse_marked(
  text: str,
  tokenizer: tokenizers.Tokenizer,
  blank: str,
  marks: str,
  name: str = "--text",
) -> Marked:
  """Reads a text whose marked parts are to be scored, given the rest of it.

  Args:
    text: as in "the [qu]ick ___", where ___ is unknown: neither scored nor
      given. Without a mark all of it is scored, but for what is unknown.
    tokenizer: the model's.
    blank: the character for one unknown token; '' for none.
    marks: the two characters around a scored part; '' for none.
    name: of where the text stands.

  Raises:
    PromptError: marks that do not pair, nothing to score, or a character that
      is not in the vocabulary.
  """
  tokens, kinds = _encode(text, tokenizer, name, blank, marks)
  scored = kinds == _MARKED
  if not marks or marks[0] not in text:
    scored = kinds != _UNKNOWN
  if not scored.any():
    raise PromptError(f"{name}={text!r}: there is nothing to score")
  return Marked(tokens, (kinds != _UNKNOWN) & ~scored, scored, name)


_PLAIN, _MARKED, _UNKNOWN = range(3)


def _encode(text, tokenizer, name, blank, marks):
  """(tokens int32 [n], what each is [n])."""
  # Blanks and marks are read as some known symbol, and all of the text first,
  # so that a complaint counts from its start.
  filler = tokenizer.decode([0])
  special = {ord(character): filler for character in blank + marks}
  try:
    tokenizer.encode(text.translate(special))
  except tokenizers.TokenizerError as error:
    raise PromptError(f"{name}: {error}") from error
  tokens, kinds, opened = [], [], 0
  for at, character in enumerate(text, 1):
    if marks and character in marks:
      if (character == marks[0]) == bool(opened):
        raise PromptError(
          f"{name}: {character!r} at offset {at - 1} has no partner; marks are "
          f"{marks[0]!r} and {marks[1]!r}, and do not nest"
        )
      opened = 0 if opened else at
      continue
    if character == blank:
      character, kind = filler, _UNKNOWN
    else:
      kind = _MARKED if opened else _PLAIN
    found = tokenizer.encode(character).tolist()
    tokens += found
    kinds += [kind] * len(found)
  if opened:
    raise PromptError(
      f"{name}: {marks[0]!r} at offset {opened - 1} has no partner {marks[1]!r}"
    )
  return np.array(tokens, np.int32), np.array(kinds, np.int32)


def read_lines(path: str) -> list[tuple[str, str]]:
  """(name, text) of every line of a file; '-' is standard input.

  Lines end with a line feed, or that and a carriage return before it; empty
  ones are left out, with a warning unless they are at the end.

  Raises:
    PromptError: no such file, not UTF-8, or nothing in it.
  """
  name = "standard input" if path == "-" else path
  try:
    if path == "-":
      data = sys.stdin.buffer.read()
    else:
      data = epath.Path(path).read_bytes()
    # A byte order mark, as some editors write it, is no text.
    lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
  except UnicodeDecodeError as error:
    raise PromptError(f"{name}: byte {error.start} is no UTF-8") from error
  except IsADirectoryError as error:
    raise PromptError(f"--input={path}: is a folder, not a file") from error
  except (FileNotFoundError, NotADirectoryError) as error:
    raise PromptError(f"--input={path}: no such file") from error
  while lines and not lines[-1]:
    lines.pop()
  if not lines:
    raise PromptError(f"{name} is empty: one text a line is wanted")
  if empty := lines.count(""):
    logging.warning(
      "%s: empty lines left out: %d, the first is line %d",
      name, empty, lines.index("") + 1,
    )  # fmt: skip
  return [
    (f"{name}, line {i}", line) for i, line in enumerate(lines, 1) if line
  ]


def within(order: Sequence[int], T: int) -> list[int]:
  """A permutation of 1..T from one of 1..n: less what is beyond, or more."""
  inside = [position for position in order if position <= T]
  return inside + list(range(len(inside) + 1, T + 1))


def padded_length(n: int, T: int) -> int:
  """The next power of two, at least 16, at most T: so few shapes compile."""
  return min(T, max(16, 1 << (n - 1).bit_length()))
