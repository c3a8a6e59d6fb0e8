"""Conversion of text to token ids and back: one byte is one token.

The tokenizer char27 has the alphabet of text8: id 0 is the space, and 1..26 are
a..z. The tokenizer byte takes any text, as UTF-8. A tokenizer knows no
sentinels (BOS, EOS); their ids start at V.
"""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from aoarm_jax.config import errors


class DataError(errors.UserError, ValueError):
  """A text is missing or wrong."""


class TokenizerError(DataError):
  """A text has symbols, or ids are numbers, outside the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary of bytes.

  Attributes:
    name: the name in the config.
    symbols: the bytes of the vocabulary; the index of a byte is its id.
  """

  name: str
  symbols: bytes

  @property
  def V(self) -> int:
    """Size of the vocabulary, without sentinels."""
    return len(self.symbols)

  @property
  def unit(self) -> str:
    """Name of a token: "byte" if every byte is one, else "char"."""
    return "byte" if self.V == 256 else "char"

  @property
  def units(self) -> str:
    """The plural for people: "bytes" or "characters"."""
    return "bytes" if self.unit == "byte" else "characters"

  def encode(self, text: str | bytes, before: int = 0) -> np.ndarray:
    """Return the token ids of a text.

    Args:
      text: a string, or its bytes.
      before: offset of the text in a longer text, for messages.

    Returns:
      uint8 [n], one id per byte. The array may be read-only.

    Raises:
      TokenizerError: a character is not in the vocabulary. The message names
        the first such character and its offset.
    """
    data = self._bytes(text) if isinstance(text, str) else text
    if self.V == 256:
      return np.frombuffer(data, np.uint8)
    ids = np.frombuffer(data.translate(_table(self.symbols)), np.uint8)
    if len(ids) and ids.max() >= self.V:
      offset = int((ids >= self.V).argmax())
      raise TokenizerError(self._complaint(text[offset], before + offset))
    return ids

  def knows(self, character: str) -> bool:
    """Return whether the vocabulary has all bytes of a character."""
    return set(character.encode("utf-8", "replace")) <= set(self.symbols)

  def to_bytes(self, ids: npt.ArrayLike) -> bytes:
    """Return the text of token ids, as bytes.

    Args:
      ids: integers [n] below V.

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
    return np.frombuffer(self.symbols, np.uint8)[ids.astype(np.intp)].tobytes()

  def decode(self, ids: npt.ArrayLike) -> str:
    """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
    return self.to_bytes(ids).decode("utf-8", errors="replace")

  def _bytes(self, text: str) -> bytes:
    if self.V < 256:
      # ASCII has one byte per character, so offsets count characters.
      return text.encode("ascii", errors="replace")
    try:
      return text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise TokenizerError(
        f"{self.name}: character {text[error.start]!r} at offset "
        f"{error.start} cannot be written as UTF-8"
      ) from error

  def _complaint(self, symbol: str | int, offset: int) -> str:
    if isinstance(symbol, int):
      described = f"byte 0x{symbol:02x} ({chr(symbol)!a})"
    else:
      described = f"character {symbol!r}"
    return (
      f"{self.name}: {described} at offset {offset} is not a-z or space: "
      "--config.data.normalise=true (from Python normalise=True) brings any "
      "text into this form; only a model trained with "
      "--config.data.tokenizer=byte takes text as it is"
    )


@functools.cache
def _table(symbols: bytes) -> bytes:
  """Return a table for bytes.translate: each byte's id, 255 if it has none."""
  table = np.full(256, 255, np.uint8)
  table[np.frombuffer(symbols, np.uint8)] = np.arange(len(symbols))
  return table.tobytes()


_TOKENIZERS = {
  "char27": Tokenizer("char27", b" abcdefghijklmnopqrstuvwxyz"),
  "byte": Tokenizer("byte", bytes(range(256))),
}


def get(name: str) -> Tokenizer:
  """Return the tokenizer with a name of config.Data.tokenizer.

  Raises:
    TokenizerError: no tokenizer has this name.
  """
  if name not in _TOKENIZERS:
    raise TokenizerError(
      f"config.data.tokenizer={name!r}: not one of {', '.join(_TOKENIZERS)}"
    )
  return _TOKENIZERS[name]
