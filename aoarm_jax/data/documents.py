"""Documents with an end token after each: found in files, and cut into rows.

A split is one array of tokens, in which the end token follows each document.
config.data.documents=stream reads windows of the array. With pad a row is the
first T tokens of one document with its end, and the end token fills the row up.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import files, mapped, scanning, tokenizers

_CHUNK = 1 << 24  # Tokens that are compared at once.


class End(NamedTuple):
  """The end of a padded document.

  Attributes:
    token: the id of the end token.
    is_given: whether the model is told where the end is. Then the end token is
      not predicted and not counted.
  """

  token: int
  is_given: bool


class Found:
  """The documents of files, as --mode=prepare finds them, in memory."""

  def __init__(
    self, data: config_lib.Data, tokenizer: tokenizers.Tokenizer
  ) -> None:
    """Read nothing yet.

    Args:
      data: the section of the config. Its path is a file or a folder.
      tokenizer: the tokenizer of the ids.
    """
    self._data, self._tokenizer = data, tokenizer

  def split(self, name: str) -> np.ndarray:
    """Return the tokens of a split with its ends: [n] of the dtype.

    Args:
      name: train, valid or test.

    Raises:
      DataError: a file is wrong, there are too few documents, or the text is
        too large.
    """
    data = self._data
    count, tokens = self._splits.pop(name)
    if not count:
      raise tokenizers.DataError(
        f"config.data.path={data.path}: no document is in {name}: name files "
        "after the splits, or raise --config.data.held_out_share"
      )
    if count == 1 and name == "train":
      raise tokenizers.DataError(
        f"config.data.documents={data.documents}: needs many documents, and "
        f"{data.path} has one for training: --config.data.lines=true makes "
        "each line of a text file a document"
      )
    return mapped.collect(tokens)

  def whole(self) -> np.ndarray:
    """Return the tokens of all documents, whatever their split: [n].

    An end follows each document if the tokenizer has one.

    Raises:
      DataError: a file is wrong, or the text is too large.
    """
    tokens: list[np.ndarray] = []
    for name, text in self._read.whole():
      tokens += self._encoded(name, text)
    return mapped.collect(tokens)

  def training(self) -> Iterator[Iterator[bytes]]:
    """Yield the documents of the training split, each in chunks of bytes."""
    return self._read.training()

  def note(self) -> str:
    """Return how many documents there are, and how many are left out."""
    scan = self._read.scan
    note = f"{scan.documents:,} documents in all"
    if scan.empty:
      note += (
        f", and {scan.empty:,} empty ones are left out, the first is "
        f"{scan.first_empty}"
      )
    return note

  @functools.cached_property
  def _read(self):
    """The documents of the files, after the first pass over them."""
    data = self._data
    read = scanning.Documents(data, lambda *_: None)
    largest = data.largest_megabytes * 10**6 or files.memory_bytes() // 2
    if read.scan.bytes > largest:
      raise tokenizers.DataError(
        f"config.data.path={data.path}: the documents have {read.scan.bytes:,} "
        f"bytes, more than {largest:,}: --mode=prepare takes texts of any size"
      )
    return read

  @functools.cached_property
  def _splits(self):
    """The number of documents and the chunks of tokens of every split."""
    chunks: dict[str, list[np.ndarray]] = {s: [] for s in scanning.SPLITS}
    counts = dict.fromkeys(scanning.SPLITS, 0)
    between_characters = self._tokenizer.codec is not None
    for split, name, text in self._read.splits(between_characters):
      chunks[split] += self._encoded(name, text)
      counts[split] += 1
    return {split: (counts[split], chunks[split]) for split in chunks}

  def _encoded(self, name, text):
    """Return the chunks of tokens of a document, and its end if there is one.

    Args:
      name: the document's name, for messages.
      text: its bytes, in chunks.
    """
    tokenizer = self._tokenizer
    try:
      tokens = [*tokenizer.encode_chunks(text)]
    except tokenizers.TokenizerError as error:
      path = self._data.path
      raise tokenizers.DataError(f"{path}, {name}: {error}") from error
    if tokenizer.has_end:
      tokens.append(np.array([tokenizer.end], tokenizer.dtype))
    return tokens


def ends(tokens: np.ndarray, end: int) -> np.ndarray:
  """Return the places of the end token, ascending: int64 [documents].

  Args:
    tokens: unsigned integers [n].
    end: the id of the end token.
  """
  places = [
    start + np.flatnonzero(tokens[start : start + _CHUNK] == end)
    for start in range(0, len(tokens), _CHUNK)
  ]
  return np.concatenate([np.zeros(0, np.int64), *places])


class Rows:
  """Maps the numbers of documents to rows of T tokens.

  Attributes:
    T: the length of a row.
    rows: int [r], the rows of a global batch that are read here.
    lengths: int64 [documents], the number of tokens of each row that count: of
      the document, and of its end unless that is given.
    split_tokens: the number of such tokens before documents are cut.
  """

  def __init__(
    self, tokens: np.ndarray, end: End, T: int, rows: np.ndarray
  ) -> None:
    """Find the documents.

    Args:
      tokens: unsigned integers [n], with an end token after each document.
      end: the end.
      T: the length of a row.
      rows: int [r], the rows of a global batch that are read here.

    Raises:
      DataError: there is no document.
    """
    self._tokens, self._end, self.T, self.rows = tokens, end, T, rows
    places = ends(tokens, end.token)
    if not len(places):
      raise tokenizers.DataError("the text has no document that ends")
    self._starts = np.concatenate([[0], places[:-1] + 1])
    self._ends = places
    counted = places - self._starts + (not end.is_given)
    self.lengths = np.minimum(counted, T)
    self._cut = int((counted > T).sum())
    self.split_tokens = int(counted.sum())

  def __getstate__(self) -> Any:
    # A loader process maps the file of a long text and gets no copy.
    return self.__dict__ | {"_tokens": mapped.packed(self._tokens)}

  def __setstate__(self, state: Any) -> None:
    self.__dict__.update(state, _tokens=mapped.unpacked(state["_tokens"]))

  def __call__(self, numbers: np.ndarray) -> np.ndarray:
    """Return this process's rows of a global batch: [r, T].

    Args:
      numbers: int64 [batch_size], the documents.
    """
    return self.of(numbers[self.rows])

  def of(self, numbers: np.ndarray) -> np.ndarray:
    """Return the rows of documents [r]: [r, T]. Padding is the end token."""
    at = self._starts[numbers][:, None] + np.arange(self.T)
    # At and after its end, a document has end tokens.
    return self._tokens[np.minimum(at, self._ends[numbers][:, None])]

  def cut(self) -> str:
    """Return how many documents do not fit, as the end of a line; or ""."""
    if not self._cut:
      return ""
    with_end = "" if self._end.is_given else " with their end"
    return (
      f"; longer{with_end} than config.model.T={self.T}, and cut: {self._cut:,}"
    )
