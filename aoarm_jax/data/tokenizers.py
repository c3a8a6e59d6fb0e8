"""Text to token ids and back: one byte is one token.

char27 is the alphabet of text8: id 0 is the space, 1..26 are a..z. byte takes
any text, as UTF-8. Sentinels (BOS, EOS) are no business of a tokenizer: their
ids start at V.
"""

import dataclasses
import functools

import numpy as np

from aoarm_jax.config import errors


class DataError(errors.UserError, ValueError):
  """A text that is missing or wrong."""


class TokenizerError(DataError):
  """A text, or ids, outside a tokenizer's vocabulary."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary of bytes.

  Attributes:
    name: its name in the config.
    symbols: the byte of each id, in order of ids.
  """

  name: str
  symbols: bytes

  @property
  def V(self) -> int:
    """Vocabulary, without sentinels."""
    return len(self.symbols)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Token ids of a text.

    Args:
      text: a string, or its bytes.

    Returns:
      uint8 [n], n bytes; may be read-only.

    Raises:
      TokenizerError: naming the first wrong character and its offset.
    """
    data = self._bytes(text) if isinstance(text, str) else text
    if self.V == 256:
      return np.frombuffer(data, np.uint8)
    ids = np.frombuffer(data.translate(_table(self.symbols)), np.uint8)
    if len(ids) and ids.max() >= self.V:
      offset = int((ids >= self.V).argmax())
      raise TokenizerError(self._complaint(text[offset], offset))
    return ids

  def to_bytes(self, ids) -> bytes:
    """Inverse of `encode`, as bytes.

    Args:
      ids: integers [n] below V.

    Raises:
      TokenizerError: naming the first wrong id and its offset.
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= self.V):
      offset = int(((ids < 0) | (ids >= self.V)).argmax())
      raise TokenizerError(
        f"{self.name}: id {ids[offset]} at offset {offset} is not below "
        f"V={self.V}"
      )
    return np.frombuffer(self.symbols, np.uint8)[ids.astype(np.intp)].tobytes()

  def decode(self, ids) -> str:
    """Inverse of `encode`; bytes that are no UTF-8 become U+FFFD."""
    return self.to_bytes(ids).decode("utf-8", errors="replace")

  def _bytes(self, text: str) -> bytes:
    if self.V < 256:
      # One byte a character, so that offsets count characters.
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
      found = f"byte 0x{symbol:02x} ({chr(symbol)!a})"
    else:
      found = f"character {symbol!r}"
    return (
      f"{self.name}: {found} at offset {offset} is not a-z or space: "
      "lower-case the text and spell out the rest; only a model trained with "
      "--config.data.tokenizer=byte takes any text"
    )


@functools.cache
def _table(symbols: bytes) -> bytes:
  """For bytes.translate: the id of each byte, 255 for a wrong one."""
  table = np.full(256, 255, np.uint8)
  table[np.frombuffer(symbols, np.uint8)] = np.arange(len(symbols))
  return table.tobytes()


_TOKENIZERS = {
  "char27": Tokenizer("char27", b" abcdefghijklmnopqrstuvwxyz"),
  "byte": Tokenizer("byte", bytes(range(256))),
}


def get(name: str) -> Tokenizer:
  """The tokenizer of that name, see config.Data.tokenizer.

  Raises:
    TokenizerError: there is none.
  """
  if name not in _TOKENIZERS:
    raise TokenizerError(
      f"config.data.tokenizer={name!r}: not one of {', '.join(_TOKENIZERS)}"
    )
  return _TOKENIZERS[name]
