"""Parse the texts of users: blanks to fill, and marked parts to score.

The text of a user is text. A character is a blank or a mark only if the user
asked for this character, or if the model's alphabet does not have it.
"""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from aoarm_jax.config import errors, exit_codes, paths, reading
from aoarm_jax.data import cleaning, files, tokenizers

# The blank and the marks where the user asks for none and the alphabet has no
# such characters.
BLANK, MARKS = "_", "[]"
# Value of config.sample.blank and config.score.marks for these characters.
AUTO = "auto"
# Bytes of --input. All lines are parsed before the first one is answered, and
# this takes up to twenty times their size.
_MOST_INPUT = 1 << 26


class PromptError(errors.UserError, ValueError):
  """A text that cannot be used: one line that says what is wrong and where."""

  exit_code = exit_codes.REFUSED


class Prompt(NamedTuple):
  """A text with blanks.

  Attributes:
    tokens: int32 [n]; arbitrary where not known.
    known: bool [n].
    name: name of the text's source, for messages.
    is_open: whether a padded document may end before position n, where the
      model draws its end. Blanks come last then. Otherwise it has n tokens.
  """

  tokens: np.ndarray
  known: np.ndarray
  name: str = "--prompt"
  is_open: bool = False


class Marked(NamedTuple):
  """A text with a part to score.

  Attributes:
    tokens: int32 [n]; arbitrary where neither known nor scored.
    known: bool [n], tokens that are given.
    scored: bool [n], tokens that are scored.
    name: name of the text's source, for messages.
    has_given_end: for padded documents: whether the end is given. Otherwise it
      is scored, given or unknown, as the last token is.
  """

  tokens: np.ndarray
  known: np.ndarray
  scored: np.ndarray
  name: str = "--text"
  has_given_end: bool = False


def parse_prompt(
  text: str,
  tokenizer: tokenizers.Tokenizer,
  blank: str,
  name: str = "--prompt",
) -> Prompt:
  """Parse a text in which every `blank` is one token to generate.

  Args:
    text: the text, as in "the qu___ of en_land".
    tokenizer: the model's tokenizer.
    blank: the character for one token to generate; see `syntax` for "auto".
    name: name of the text's source, for messages.

  Raises:
    PromptError: no character is a blank, the text has no blank, or a character
      is not in the vocabulary.
  """
  asked, (blank, _) = blank, syntax(tokenizer, blank, "")
  if not blank and asked == AUTO:
    raise PromptError(
      f"{name}: this model's alphabet has {BLANK!r}, so {BLANK!r} is text and "
      f"no blank; ask for it with --config.sample.blank={BLANK} (from Python "
      f"blank={BLANK!r}), or name a character that your text does not have"
    )
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
  """Parse a text whose marked parts are scored, given its other known tokens.

  Args:
    text: the text, as in "the [qu]ick ___". The part in marks is scored. A
      blank is unknown: neither scored nor given. In a text without marks every
      token is scored, apart from the blanks.
    tokenizer: the model's tokenizer.
    blank: the character for one unknown token; '' if no character is a blank;
      see `syntax` for "auto".
    marks: the two characters around a scored part; '' if there are no marks;
      see `syntax` for "auto".
    name: name of the text's source, for messages.

  Raises:
    PromptError: a mark has no partner, there is nothing to score, or a
      character is not in the vocabulary.
  """
  blank, marks = syntax(tokenizer, blank, marks)
  tokens, kinds = _encode(text, tokenizer, name, blank, marks)
  scored = kinds == _MARKED
  if not marks or marks[0] not in text:
    scored = kinds != _UNKNOWN
  if not scored.any():
    raise PromptError(f"{name}={text!r}: there is nothing to score")
  return Marked(tokens, (kinds != _UNKNOWN) & ~scored, scored, name)


def syntax(
  tokenizer: tokenizers.Tokenizer, blank: str, marks: str
) -> tuple[str, str]:
  """Return the characters of a text that are not text: (blank, marks).

  Args:
    tokenizer: the model's tokenizer.
    blank: config.sample.blank. "auto" is `_` if the alphabet has no `_` and
      `marks` does not use it; else no character is a blank.
    marks: config.score.marks. "auto" is `[]` if the alphabet has neither and
      `blank` is neither; else there are no marks.
  """
  if marks == AUTO:
    taken = tokenizer.knows(MARKS[0]) or tokenizer.knows(MARKS[1])
    marks = "" if taken or (blank and blank in MARKS) else MARKS
  if blank == AUTO:
    blank = "" if tokenizer.knows(BLANK) or BLANK in marks else BLANK
  return blank, marks


def normalised(
  lines: Sequence[tuple[str, str]],
  tokenizer: tokenizers.Tokenizer,
  blank: str,
  marks: str,
) -> list[tuple[str, str]]:
  """Return texts in the form of text8, with their blanks and marks.

  The form is that of cleaning.normal_form. A blank counts as a letter. A mark
  counts as nothing, so spaces on its two sides become one.

  Args:
    lines: pairs (name, text).
    tokenizer: the model's tokenizer.
    blank: config.sample.blank.
    marks: config.score.marks; '' if the texts are prompts.

  Returns:
    Pairs (name, text). The name of a text that changed says that offsets are
    those of the normal form.

  Raises:
    PromptError: nothing is left of a text.
  """
  blank, marks = syntax(tokenizer, blank, marks)

  def normal(text, name):
    form = _normal_form(text, blank, marks)
    if text and not form.strip(f"{marks} "):
      raise _nothing_left(name, text)
    return (name if form == text else f"{name} (in normal form)"), form

  return check_lines(lines, normal)


def normalised_start(text: str, name: str) -> str:
  """Return the start of a longer text in the form of text8.

  Its last word may go on, and a space after it stays.

  Args:
    text: the text. It has no blanks and no marks.
    name: name of the text, for messages.

  Raises:
    PromptError: nothing is left of the text.
  """
  # The text goes on with a letter, which is not part of it.
  form = cleaning.normal_form(f"{text}a".encode("utf-8", "replace"))[:-1]
  if text and not form:
    raise _nothing_left(name, text)
  return form.decode()


def _nothing_left(name, text):
  """Return the error for a text whose normal form is empty."""
  return PromptError(
    f"{name}={text!r}: has no letter from a to z and no digit, so nothing is "
    "left of it in normal form (config.data.normalise)"
  )


def _normal_form(text, blank, marks):
  """Return one text in normal form."""
  pieces: list[str | None] = []  # None is a space.
  last: str | None = None  # The last piece that is no mark.
  is_apart = False  # Whether a space must come before the next letter.
  for character in text:
    if character in marks:
      pieces.append(character)
      continue
    for piece in _pieces(character, blank):
      if piece == _APART:
        is_apart = True
        continue
      # The space beside a digit's word is where the user's space is: behind the
      # mark in "[2] x".
      if piece and last and is_apart:
        pieces.append(None)
      is_apart = False
      if piece or last:
        pieces.append(piece)
        last = piece
  if pieces and last is None:
    at = max((i for i, piece in enumerate(pieces) if piece is None), default=-1)
    del pieces[at : at + 1]
  return "".join(" " if piece is None else piece for piece in pieces)


# Around the word of a digit: a space, unless there is a space anyway.
_APART = ""


def _pieces(character, blank):
  """Return what becomes of a character in normal form; None is a space."""
  if character == blank:
    return [character]
  form = cleaning.normal_form(character.encode("utf-8", "replace")).decode()
  if len(form) > 1:  # The word of a digit.
    return [_APART, form, _APART]
  return [form or None]


def note_text(
  lines: Sequence[tuple[str, str]],
  tokenizer: tokenizers.Tokenizer,
  blank: str,
  marks: str,
) -> None:
  """Log where a text has `_` or brackets that are read as text.

  Args:
    lines: pairs (name, text).
    tokenizer: the model's tokenizer.
    blank: config.sample.blank.
    marks: config.score.marks.
  """
  as_text = BLANK * (blank == AUTO) + MARKS * (marks == AUTO)
  as_text = "".join(c for c in as_text if tokenizer.knows(c))
  name = next((n for n, text in lines if set(text) & set(as_text)), None)
  if name is not None:
    logging.info(
      "%s: %s are text, because the alphabet has them; "
      "--config.score.marks='[]' and --config.sample.blank=_ read them as "
      "marks and as a blank",
      name,
      " ".join(as_text),
    )


_PLAIN, _MARKED, _UNKNOWN = range(3)


def _encode(text, tokenizer, name, blank, marks):
  """Return (tokens int32 [n], kinds int32 [n]): _PLAIN, _MARKED or _UNKNOWN."""
  pieces: list[np.ndarray] = []
  kinds: list[np.ndarray] = []
  opened = 0  # Place of the open mark, counted from 1; 0 if no mark is open.
  at = 0
  parts = _split(text, blank, marks)
  # A wrong character is told before a wrong mark.
  encoded = _encoded(parts, tokenizer, name, blank + marks)
  for piece, ids in zip(parts, encoded):
    at += len(piece)
    if marks and piece in (marks[0], marks[1]):
      if (piece == marks[0]) == bool(opened):
        raise PromptError(
          f"{name}: {piece!r} at offset {at - 1} has no partner; marks are "
          f"{marks[0]!r} and {marks[1]!r}, and do not nest"
        )
      opened = 0 if opened else at
      continue
    kind = _MARKED if opened else _PLAIN
    if blank and piece[0] == blank:
      kind = _UNKNOWN
    pieces.append(ids.astype(np.int32))
    kinds.append(np.full(len(pieces[-1]), kind, np.int32))
  if opened:
    raise PromptError(
      f"{name}: {marks[0]!r} at offset {opened - 1} has no partner {marks[1]!r}"
    )
  nothing = np.zeros(0, np.int32)
  return np.concatenate([nothing, *pieces]), np.concatenate([nothing, *kinds])


def _encoded(parts, tokenizer, name, special):
  """Return the ids of parts of a text; a blank or a mark has the id 0."""
  ids, at = [], 0
  try:
    for part in parts:
      if part[0] in special:
        ids.append(np.zeros(len(part), np.int32))
      else:
        ids.append(tokenizer.encode(part, at))
      at += len(part)
  except tokenizers.TokenizerError as error:
    raise PromptError(f"{name}: {error}") from error
  return ids


def _split(text, blank, marks):
  """Return the marks, the rows of blanks and the text between them, in order.

  A text without any is one piece, so that a long line takes no long time.
  """
  special = [re.escape(x) for x in marks] + [f"{re.escape(blank)}+"] * bool(
    blank
  )
  pieces = re.split(f"({'|'.join(special)})", text) if special else [text]
  return [piece for piece in pieces if piece]


def read_lines(path: str) -> list[tuple[str, str]]:
  """Read the lines of a UTF-8 file.

  Lines end with a line feed, or with a carriage return and a line feed. Empty
  lines are left out. A warning names them, except at the end of the file.

  Args:
    path: the file; '-' is standard input.

  Returns:
    Pairs (name, text): the name is the file and line number, for messages.

  Raises:
    PromptError: the file does not exist, is a folder or a device, is too long,
      is not UTF-8, or has no text.
    ConfigError: the path is an address that cannot be read, see paths.of.
  """
  name = "standard input" if path == "-" else path
  try:
    if path == "-":
      data = sys.stdin.buffer.read(_MOST_INPUT + 1)
    else:
      place = paths.of(path, "--input")
      with reading.open_file(place, allows_pipes=True) as file:
        data = file.read(_MOST_INPUT + 1)
    if len(data) > _MOST_INPUT:
      raise PromptError(
        f"{name}: more than {_MOST_INPUT:,} bytes; cut it into several files"
      )
    if reason := files.not_text(data):
      raise PromptError(f"{name}: is not text: {reason}")
    # Some editors write a byte order mark, which is not part of the text.
    lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
  except UnicodeDecodeError as error:
    raise PromptError(f"{name}: byte {error.start} is no UTF-8") from error
  except reading.ReadError as error:
    raise PromptError(f"--input={path}: {error.reason}") from error
  except (FileNotFoundError, NotADirectoryError) as error:
    raise PromptError(f"--input={path}: no such file") from error
  while lines and not lines[-1]:
    lines.pop()
  if not lines:
    raise PromptError(f"{name} is empty: one text a line is wanted")
  if empty := lines.count(""):
    logging.warning(
      "%s: empty lines left out: %d, the first is line %d",
      name,
      empty,
      lines.index("") + 1,
    )
  return [
    (f"{name}, line {i}", line) for i, line in enumerate(lines, 1) if line
  ]


def check_lines(
  lines: Sequence[tuple[str, Any]], parse: Callable[[Any, str], Any]
) -> list[Any]:
  """Parse or check all lines, before anything is computed for one of them.

  Args:
    lines: pairs of a name and a text, parsed or not.
    parse: function (text, name) that returns the parsed text, or raises
      PromptError.

  Returns:
    The results of `parse`.

  Raises:
    PromptError: lines are wrong. The message is that of the first wrong line,
      and says how many others are wrong and which is the next.
  """
  parsed, wrong = [], []
  for name, text in lines:
    try:
      parsed.append(parse(text, name))
    except PromptError as error:
      wrong.append((name, error))
  if not wrong:
    return parsed
  (_, first), others = wrong[0], wrong[1:]
  if not others:
    raise first
  number = "1 other is" if len(others) == 1 else f"{len(others)} others are"
  raise PromptError(
    f"{first} ({number} wrong too; the next is {others[0][0]})"
  ) from first


def within(order: Sequence[int], T: int) -> list[int]:
  """Return a permutation of 1..T that starts as a permutation of 1..n does.

  Args:
    order: permutation of 1..n. If n > T, positions beyond T are left out. If
      n < T, the positions n + 1..T follow.
    T: number of positions wanted.
  """
  inside = [position for position in order if position <= T]
  return inside + list(range(len(inside) + 1, T + 1))
