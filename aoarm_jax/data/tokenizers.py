"""Conversion of text to token ids and back.

The tokenizers char27 and byte are fixed: one byte is one token. char27 has the
alphabet of text8: id 0 is the space, and 1..26 are a..z. byte takes any text,
as UTF-8. The alphabets of chars (alphabets.py) and bpe (bpe.py) come from a
text, and their state is a small JSON document. A tokenizer knows no sentinels
(BOS, EOS); their ids start at V. With `with_end` the last id, V - 1, is the end
of a document.
"""

import codecs
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aoarm_jax.config import errors

# Stands for the end of a document in a text for people.
END = "\N{SYMBOL FOR END OF TRANSMISSION}"
# Characters in a piece of a long text. A piece is encoded at once.
PIECE = 1 << 18
# A piece is cut at the last good place within so many characters of its end.
_REACHES = (1 << 8, 1 << 12, 1 << 17)


class DataError(errors.UserError, ValueError):
  """A text is missing or wrong."""


class TokenizerError(DataError):
  """A text has symbols, or ids are numbers, outside the vocabulary."""


class UnknownSymbolError(Exception):
  """A codec does not know a symbol.

  Attributes:
    offset: offset of the first such symbol, in bytes.
  """

  def __init__(self, offset: int) -> None:
    """Note the offset."""
    super().__init__(offset)
    self.offset = offset


class Codec(NamedTuple):
  """How a tokenizer encodes whose tokens have several bytes.

  Attributes:
    unit: name of a token: "char" or "token".
    encode: returns the ids of a text, integers [n]; raises UnknownSymbolError.
      The text is UTF-8 and begins and ends between characters.
    cuts: returns the pattern of the places where a text may be cut, so that
      its parts have the tokens of the whole. "" matches between any two
      characters. None: a text is never cut.
    advice: the end of a message about an unknown symbol.
  """

  unit: str
  encode: Callable[[bytes], np.ndarray]
  cuts: Callable[[], re.Pattern[str] | None]
  advice: str


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary.

  Attributes:
    name: the name in the config.
    symbols: the bytes of every token, by id. The alphabet of a tokenizer
      without a codec is a bytes object: each of its bytes is a token.
    codec: how a text is encoded. None: one byte is one token.
    state: the JSON document that alphabets.of_state makes the tokenizer from;
      b"" for a fixed tokenizer.
    has_end: whether the last id, V - 1, is the end of a document. It is a token
      without text, and no text is encoded to it.
  """

  name: str
  symbols: bytes | tuple[bytes, ...] = dataclasses.field(repr=False)
  codec: Codec | None = dataclasses.field(
    default=None, repr=False, compare=False
  )
  state: bytes = dataclasses.field(default=b"", repr=False)
  has_end: bool = False

  @property
  def V(self) -> int:
    """Size of the vocabulary, without sentinels."""
    return len(self.symbols) + self.has_end

  @property
  def end(self) -> int:
    """The id of the end of a document, if there is such a token."""
    assert self.has_end
    return len(self.symbols)

  @property
  def unit(self) -> str:
    """Name of a token: "byte", "char" or "token"."""
    if self.has_end:  # A token is a character, for example, or an end.
      return "token"
    if self.codec:
      return self.codec.unit
    return "byte" if self.V == 256 else "char"

  @property
  def units(self) -> str:
    """The plural for people: "bytes", "characters" or "tokens"."""
    return {"byte": "bytes", "char": "characters", "token": "tokens"}[self.unit]

  @property
  def dtype(self) -> np.dtype:
    """The smallest unsigned dtype that holds all ids."""
    return dtype_of(self.V)

  @functools.cached_property
  def sha256(self) -> str:
    """The sha256 of the state in hex; "" for a fixed tokenizer."""
    return hashlib.sha256(self.state).hexdigest() if self.state else ""

  @functools.cached_property
  def bytes_of(self) -> np.ndarray:
    """Number of UTF-8 bytes of every token: int64 [V]."""
    sizes = [len(symbol) for symbol in self._each]
    return np.array(sizes + [0] * self.has_end, np.int64)

  @functools.cached_property
  def characters_of(self) -> np.ndarray:
    """Number of UTF-8 characters that begin in every token: int64 [V]."""
    # Bytes 10xxxxxx go on with a character.
    counts = [sum(b & 0xC0 != 0x80 for b in symbol) for symbol in self._each]
    return np.array(counts + [0] * self.has_end, np.int64)

  def encode(self, text: str | bytes, before: int = 0) -> np.ndarray:
    """Return the token ids of a text.

    Args:
      text: a string, or its bytes.
      before: offset of the text in a longer text, for messages.

    Returns:
      Ids [n] of `dtype`. The array may be read-only.

    Raises:
      TokenizerError: a character is not in the vocabulary. The message names
        the first such character and its offset: in characters for a string,
        and in bytes for bytes.
    """
    data = self._bytes(text, before) if isinstance(text, str) else text
    if not self.codec:
      ids_of_bytes = self._encode_bytes(data, text, before)
      return ids_of_bytes.astype(self.dtype, copy=False)
    ids = [np.zeros(0, self.dtype)]
    offset = 0
    for piece in self.pieces([data]):
      try:
        ids.append(self.codec.encode(piece).astype(self.dtype))
      except UnknownSymbolError as error:
        offset += error.offset
        character = _character(data, offset)
        if isinstance(text, str):
          offset = len(data[:offset].decode(errors="replace"))
        raise TokenizerError(
          f"{self.name}: character {character!r} at offset {before + offset} "
          f"{self.codec.advice}"
        ) from None
      offset += len(piece)
    return np.concatenate(ids)

  def encode_chunks(
    self, chunks: Iterable[bytes], before: int = 0
  ) -> Iterator[np.ndarray]:
    """Yield the ids of a text that comes in chunks, cut anywhere.

    Args:
      chunks: the bytes of the text.
      before: offset of the text in a longer text, for messages.

    Raises:
      TokenizerError: see `encode`.
    """
    for piece in self.pieces(chunks) if self.codec else chunks:
      yield self.encode(piece, before)
      before += len(piece)

  def pieces(
    self, chunks: Iterable[bytes], size: int | None = None
  ) -> Iterator[bytes]:
    """Yield the same text in pieces whose tokens are those of the whole text.

    The pieces do not depend on how the text was cut into chunks.

    Args:
      chunks: the bytes of the text, cut anywhere.
      size: number of characters of a piece, or of bytes where a byte is a
        token. A piece is longer where the text has no place to be cut. None
        means PIECE.
    """
    size = size or PIECE
    if not self.codec:
      yield from _of_size(chunks, size)
      return
    cuts, waiting = self.codec.cuts(), ""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for chunk in chunks:
      waiting += decoder.decode(chunk)
      start = 0
      # A cut may look at the two characters behind it.
      while len(waiting) - start > size + 1:
        if not (end := _cut(waiting, start, start + size, cuts)):
          break
        yield waiting[start:end].encode("utf-8", "surrogateescape")
        start = end
      waiting = waiting[start:]
    waiting += decoder.decode(b"", True)
    if waiting:
      yield waiting.encode("utf-8", "surrogateescape")

  def knows(self, character: str) -> bool:
    """Return whether the vocabulary can write a character."""
    data = character.encode("utf-8", "replace")
    return data in self._known or {*map(_byte, data)} <= self._known

  def to_bytes(self, ids: npt.ArrayLike) -> bytes:
    """Return the text of token ids, as bytes.

    Args:
      ids: integers [n] below V. Ends of documents have no text.

    Raises:
      TokenizerError: an id is out of range. The message names the first such id
        and its offset.
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= self.V):
      offset = int(((ids < 0) | (ids >= self.V)).argmax())
      raise TokenizerError(
        f"{self.name}: id {ids[offset]} at offset {offset} is not below "
        f"V={self.V}"
      )
    with_text = ids[ids != self.end] if self.has_end else ids
    if isinstance(self.symbols, bytes):
      table = np.frombuffer(self.symbols, np.uint8)
      return table[with_text.astype(np.intp)].tobytes()
    return b"".join(map(self.symbols.__getitem__, with_text.tolist()))

  def decode(self, ids: npt.ArrayLike) -> str:
    """Return the text of token ids, for people.

    Bytes that are not UTF-8 become U+FFFD. The end of a document becomes END.

    Args:
      ids: integers [n] below V.
    """
    parts = [np.asarray(ids)]
    if self.has_end:
      parts = np.split(parts[0], np.flatnonzero(parts[0] == self.end))
    return END.join(
      self.to_bytes(part).decode("utf-8", errors="replace") for part in parts
    )

  @property
  def _each(self):
    """The bytes of every token, by id."""
    if isinstance(self.symbols, bytes):
      return [*map(_byte, self.symbols)]
    return self.symbols

  @functools.cached_property
  def _known(self):
    """The bytes of all tokens, as a set."""
    return frozenset(self._each)

  def _encode_bytes(self, data, text, before):
    """Return the ids of bytes that are one token each."""
    count = len(self.symbols)
    if count == 256:
      return np.frombuffer(data, np.uint8)
    ids = np.frombuffer(data.translate(_table(self.symbols)), np.uint8)
    if len(ids) and ids.max() >= count:
      offset = int((ids >= count).argmax())
      raise TokenizerError(self._complaint(text[offset], before + offset))
    return ids

  def _bytes(self, text: str, before: int) -> bytes:
    if not self.codec and len(self.symbols) < 256:
      # ASCII has one byte per character, so offsets count characters.
      return text.encode("ascii", errors="replace")
    try:
      return text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise TokenizerError(
        f"{self.name}: character {text[error.start]!r} at offset "
        f"{before + error.start} cannot be written as UTF-8"
      ) from error

  def _complaint(self, symbol: str | int, offset: int) -> str:
    if isinstance(symbol, int):
      described = f"byte 0x{symbol:02x} ({chr(symbol)!a})"
    else:
      described = f"character {symbol!r}"
    return (
      f"{self.name}: {described} at offset {offset} is not a-z or space: "
      "--config.data.normalise=true (from Python normalise=True) brings any "
      "text into this form; only a model trained with another "
      "--config.data.tokenizer, such as byte, takes text as it is"
    )


def with_end(tokenizer: Tokenizer) -> Tokenizer:
  """Return a tokenizer with one more token: the end of a document.

  Args:
    tokenizer: a tokenizer, with such a token or without.
  """
  return dataclasses.replace(tokenizer, has_end=True)


def dtype_of(V: int) -> np.dtype:
  """Return the smallest unsigned dtype that holds the ids 0..V - 1."""
  return np.min_scalar_type(max(V - 1, 0))


def _of_size(chunks, size):
  """Yield the same bytes in pieces of `size` bytes; the last may be shorter."""
  waiting = b""
  for chunk in chunks:
    waiting += chunk
    whole = len(waiting) - len(waiting) % size
    for start in range(0, whole, size):
      yield waiting[start : start + size]
    waiting = waiting[whole:]
  if waiting:
    yield waiting


def _cut(text, start, last, cuts):
  """Return where a piece ends; 0 if there is no place in the text.

  Args:
    text: a text of at least last + 2 characters.
    start: start of the piece.
    last: greatest end of the piece, if it can be cut before.
    cuts: see Codec.cuts.
  """
  if cuts is None:
    return 0
  if not cuts.pattern:
    return last
  for reach in _REACHES:
    places = cuts.finditer(text, max(start + 1, last - reach), last + 2)
    if ends := [place.start() for place in places if place.start() <= last]:
      return ends[-1]
  place = cuts.search(text, last)
  return place.start() if place else 0


def _character(data, offset):
  """Return the character of UTF-8 bytes at an offset."""
  return data[offset : offset + 4].decode("utf-8", "replace")[:1]


def _byte(value):
  return bytes([value])


@functools.cache
def _table(symbols: bytes) -> bytes:
  """Return a table for bytes.translate: each byte's id, 255 if it has none."""
  table = np.full(256, 255, np.uint8)
  table[np.frombuffer(symbols, np.uint8)] = np.arange(len(symbols))
  return table.tobytes()


_FIXED = {
  "char27": Tokenizer("char27", b" abcdefghijklmnopqrstuvwxyz"),
  "byte": Tokenizer("byte", bytes(range(256))),
}


def is_fixed(name: str) -> bool:
  """Return whether a tokenizer needs no text and no file."""
  return name in _FIXED


def get(name: str) -> Tokenizer:
  """Return a fixed tokenizer by its name.

  Raises:
    TokenizerError: no fixed tokenizer has this name.
  """
  if name not in _FIXED:
    raise TokenizerError(
      f"config.data.tokenizer={name!r}: not one of {', '.join(_FIXED)}, which "
      "need no text"
    )
  return _FIXED[name]
