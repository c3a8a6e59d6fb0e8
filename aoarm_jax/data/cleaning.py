"""Forms of a text: the normal form of text8, and text files without marks."""

import codecs
import re
import string
from collections.abc import Iterator

from aoarm_jax.data import tokenizers

_DIGITS = b"zero one two three four five six seven eight nine".split()
# A table for bytes.translate. Letters become lower case, and every other byte
# becomes a space.
_LETTERS = bytes(
  byte if chr(byte) in string.ascii_lowercase else ord(" ")
  for byte in bytes(range(256)).lower()
)


def cleaned(
  chunks: Iterator[bytes], tokenizer: tokenizers.Tokenizer, normalise: bool
) -> Iterator[bytes]:
  """Yield the text of a text file.

  A byte order mark is no part of a text. Editors end a file with a line end,
  even where the text has no lines. So this line end is left out where the
  tokenizer has none.

  Args:
    chunks: the bytes of the file, cut anywhere.
    tokenizer: the tokenizer of the text.
    normalise: whether the text is brought into normal form.
  """
  chunks = _without_mark(chunks)
  if normalise:
    return in_normal_form(chunks)
  return chunks if tokenizer.knows("\n") else _without_line_end(chunks)


def normal_form(text: bytes) -> bytes:
  """Return a text in the form of text8: a to z and single spaces.

  The rules are those of Matt Mahoney's wikifil.pl. Letters become lower case,
  and every digit becomes a word. Every run of other bytes becomes one space. An
  accented letter is such a run too. No space is left at either end.
  """
  text = re.sub(rb"\d", lambda match: b" %b " % _DIGITS[int(match[0])], text)
  return b" ".join(text.translate(_LETTERS).split())


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
  """Yield the chunks without a byte order mark, which is no part of a text."""
  yield next(chunks, b"").removeprefix(codecs.BOM_UTF8)
  yield from chunks


def _without_line_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
  """Yield the chunks without a line end after the last line."""
  last = b""
  for chunk in chunks:
    text = last + chunk
    yield text[:-2]
    last = text[-2:]
  yield last.removesuffix(b"\n").removesuffix(b"\r")


def in_normal_form(chunks: Iterator[bytes]) -> Iterator[bytes]:
  """Yield the chunks of the normal form of a text."""
  is_first, former = True, b""  # The last byte of the chunk before.
  for chunk in chunks:
    if words := normal_form(chunk):
      # A word may go on from one chunk to the next.
      is_one_word = former.isalpha() and chunk[:1].isalpha()
      yield words if is_first or is_one_word else b" " + words
      is_first = False
    former = chunk[-1:] or former
