"""The documents of a text: read once to check and count, then by splits."""

import array
import collections
import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, cleaning, shards, sources, tokenizers

SPLITS = ("train", "valid", "test")
# Function (what is done, bytes of text that are done, bytes in all or 0).
Progress = Callable[[str, int, int], None]
_LONGEST = 5  # Documents in a report.
_COLUMNS = ("file", "split", "bytes", "documents", "bytes of text", "sha256")


class Scan(NamedTuple):
  """The content of the files.

  Attributes:
    table: content of sources.tsv.
    documents: number of documents that are not empty.
    bytes: number of bytes of their text.
    empty: number of empty documents.
    first_empty: name of the first one.
    duplicates: number of documents that repeat an earlier one.
    longest: (bytes, name) of the longest documents.
    hashes: the hash, below 2^64, of every document that is a file and not
      empty, by its name.
    alone: whether the text is one text file, which is split by bytes.
  """

  table: str
  documents: int
  bytes: int
  empty: int
  first_empty: str
  duplicates: int
  longest: list[tuple[int, str]]
  hashes: dict[str, int]
  alone: bool


class _Text(NamedTuple):
  """A document after cleaning.

  Attributes:
    name: see sources.Document.
    source: its file.
    chunks: its text, cut anywhere.
    is_file: see sources.Document.
  """

  name: str
  source: sources.Source
  chunks: Iterator[bytes]
  is_file: bool


class Documents:
  """The documents that a config names.

  Attributes:
    known: the tokenizer of the config. Where its symbols are found in the
      text, it is that of bytes.
    scan: what the files hold.
  """

  def __init__(self, data: config_lib.Data, progress: Progress) -> None:
    """Read all documents once.

    Args:
      data: the section of the config.
      progress: called now and then.

    Raises:
      DataError: a file is wrong, or there is no text.
    """
    self._data, self._progress = data, progress
    if tokenizers.is_fixed(data.tokenizer):
      self.known = tokenizers.get(data.tokenizer)
    elif data.tokenizer_file:
      self.known = alphabets.of_file(data)
    else:
      self.known = tokenizers.get("byte")
    self._sources = sources.find(paths.of(data.path, "config.data.path"))
    self.scan = self._scanned()
    if not self.scan.documents:
      raise tokenizers.DataError(
        f"config.data.path={data.path}: there is no text: every document is "
        f"empty ({self.scan.empty:,} in all)"
      )

  def splits(
    self, between_characters: bool
  ) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """Yield (split, name, chunks) of all documents that are not empty.

    The chunks of a document must be read before the next document.

    Args:
      between_characters: whether a text that is split by bytes is cut between
        characters only.
    """
    for text in self._texts():
      if self.scan.alone:
        rest, total = _Rest(text.chunks, between_characters), self.scan.bytes
        bounds = (total * 90 // 100, total * 95 // 100, total)
        for split, end in zip(SPLITS, bounds):
          yield split, f"{text.name}, the {split} part", rest.until(end)
        continue
      chunks: Iterable[bytes] = text.chunks
      short = self.scan.hashes.get(text.name)
      if not text.is_file:
        chunks = [*chunks]
        short = _short_hash(b"".join(chunks)) if any(chunks) else None
      if short is not None:
        split = text.source.split or self._by_hash(short)
        yield split, text.name, iter(chunks)

  def whole(self) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield (name, chunks) of all documents that are not empty, in order.

    The chunks of a document must be read before the next document.
    """
    for text in self._texts():
      if text.is_file and text.name in self.scan.hashes:
        yield text.name, text.chunks
      elif not text.is_file and any(chunks := [*text.chunks]):
        yield text.name, iter(chunks)

  def training(self) -> Iterator[Iterator[bytes]]:
    """Yield the documents of the training split, each in chunks."""
    done = 0

    def counted(chunks):
      nonlocal done
      for chunk in chunks:
        done += len(chunk)
        self._progress("finding the symbols", done, self.scan.bytes)
        yield chunk

    for split, _, chunks in self.splits(True):
      if split == "train":
        yield counted(chunks)

  def _by_hash(self, short):
    """Return the split of a document by its hash, below 2^64."""
    held_out = int(self._data.held_out_share * 2**64)
    if short < held_out:
      return "valid"
    return "test" if short < 2 * held_out else "train"

  def _texts(self):
    """Yield all documents, cleaned."""
    normalise = self._data.normalise
    for source in self._sources:
      for document in sources.documents(
        source, self._data.text_field, self._data.lines
      ):
        chunks = document.chunks
        if document.is_file:
          chunks = cleaning.cleaned(chunks, self.known, normalise)
        elif normalise:
          chunks = cleaning.in_normal_form(chunks)
        yield _Text(document.name, source, chunks, document.is_file)

  def _scanned(self):
    """Read all documents, and return what the files hold."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    hashes, of_file = array.array("Q"), {}
    longest: list[tuple[int, int, str]] = []
    total = files = empty = 0
    first_empty = ""
    for text in self._texts():
      hasher, size = hashlib.sha256(), 0
      for chunk in text.chunks:
        hasher.update(chunk)
        size += len(chunk)
        self._progress("reading", total + size, 0)
      total += size
      files += text.is_file
      if not size:
        empty, first_empty = empty + 1, first_empty or text.name
        continue
      short = int.from_bytes(hasher.digest()[:8], "big")
      hashes.append(short)
      if text.is_file:
        of_file[text.name] = short
      count = counts[text.source.name]
      count[0] += 1
      count[1] += size
      # The first of equally long documents are named.
      entry = (size, -len(hashes), text.name)
      if len(longest) < _LONGEST:
        heapq.heappush(longest, entry)
      else:
        heapq.heappushpop(longest, entry)
    unique = len(np.unique(np.frombuffer(hashes, np.uint64))) if hashes else 0
    return Scan(
      table=self._table(counts),
      documents=len(hashes),
      bytes=total,
      empty=empty,
      first_empty=first_empty,
      duplicates=len(hashes) - unique,
      longest=[(size, name) for size, _, name in sorted(longest)[::-1]],
      hashes=of_file,
      alone=len(self._sources) == files == 1 and not self._sources[0].split,
    )

  def _table(self, counts):
    """Return the content of sources.tsv."""
    lines = ["\t".join(_COLUMNS)]
    for source in self._sources:
      documents, size = counts.get(source.name, (0, 0))
      row = (
        source.name.encode("unicode_escape").decode(),
        source.split or "-",
        source.path.stat().length,
        documents,
        size,
        shards.digest(source.path),
      )
      lines.append("\t".join(map(str, row)))
    return "\n".join(lines) + "\n"


class _Rest:
  """A text in chunks that is read in parts."""

  def __init__(self, chunks, between_characters):
    self._chunks, self._done, self._rest = chunks, 0, b""
    self._between_characters = between_characters

  def until(self, end):
    """Yield the text from where the last part ended to offset `end`.

    The part goes on to the start of a character if that is asked for.
    """
    while chunk := self._rest or next(self._chunks, b""):
      size = end - self._done
      if size < len(chunk):
        while self._between_characters and 0 <= size < len(chunk):
          if chunk[size] & 0xC0 != 0x80:
            break
          size += 1
      size = max(size, 0)
      self._rest, taken = chunk[size:], chunk[:size]
      self._done += len(taken)
      if taken:
        yield taken
      if self._rest:
        return


def _short_hash(text):
  """Return the hash of a text, below 2^64."""
  return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
