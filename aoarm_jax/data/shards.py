"""A prepared text: shards of tokens in a folder, and the index that names them.

  index.json                Written last. Without it the folder is not whole.
  tokenizer.json            State of the tokenizer, unless it is a fixed one.
  sources.tsv               The files that were read, with their sha256.
  train-00000.array_record  The shards of the splits train, valid and test.

A shard is a file of ArrayRecord. A record is a piece of a document: its token
ids, as little-endian uint8, uint16 or uint32, and one byte, which is 1 where
the document ends with the piece. So document boundaries stand in the shards.
The index has the sha256 of every shard, and of the text of every split.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.data import alphabets, mapped, tokenizers

INDEX = "index.json"
# It stands for the index until all shards are done, and lists those that are.
UNFINISHED = "unfinished.json"
FORMAT_VERSION = 1
_READ = "readahead_buffer_size:1M,max_parallelism:1"
_RECORDS = 64  # Records that are read at once.
_HASHED = 1 << 22  # Bytes that are hashed at once.
SHARD = {
  "name": str,
  "documents": reading.Count(),
  "records": reading.Count(),
  "tokens": reading.Count(),
  "bytes": reading.Count(),
  "sha256": str,
}
_SPLIT = {
  "documents": reading.Count(),
  "tokens": reading.Count(),
  "bytes": reading.Count(),
  "characters": reading.Count(),
  "sha256": str,
  "shards": [SHARD],
}
INDEX_TYPES = {
  "tokenizer": {"name": str, "V": reading.Count(), "sha256": str},
  "normalise": bool,
  "splits": {"train?": _SPLIT, "valid?": _SPLIT, "test?": _SPLIT},
}
_NAME = re.compile(r"(train|valid|test)-\d{5,9}\.array_record")


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished shard.

  Attributes:
    name: name of the file.
    documents: number of documents that end in the shard.
    records: number of records.
    tokens: number of tokens.
    bytes: size of the file.
    sha256: of the file, in hex.
  """

  name: str
  documents: int
  records: int
  tokens: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
  """A split of a prepared text.

  Attributes:
    documents: number of documents.
    tokens: number of tokens.
    bytes: number of bytes of the text, as UTF-8.
    characters: number of characters of the text.
    sha256: of the text: all documents one after the other, in hex.
    shards: the shards, in order.
  """

  documents: int
  tokens: int
  bytes: int
  characters: int
  sha256: str
  shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Index:
  """The index of a prepared text.

  Attributes:
    folder: the folder.
    tokenizer: the tokenizer of the shards.
    normalise: whether the text was brought into normal form.
    splits: the splits that there are, by their names.
  """

  folder: epath.Path
  tokenizer: tokenizers.Tokenizer
  normalise: bool
  splits: dict[str, Split]


def is_prepared(folder: epath.Path) -> bool:
  """Return whether a folder is a prepared text, finished or not."""
  return (folder / INDEX).exists() or (folder / UNFINISHED).exists()


def read_index(folder: epath.Path) -> Index:
  """Return the index of a prepared text.

  Args:
    folder: the folder, which may come from a stranger.

  Raises:
    DataError: the folder is not finished or in a bucket, or its index is
      damaged or of another version.
  """
  path = folder / INDEX
  if "://" in str(folder):
    raise tokenizers.DataError(
      f"{folder}: shards are read from this machine: copy the folder here, and "
      "name the copy with --config.data.path="
    )
  try:
    raw = reading.read(path, reading.JSON_BYTES, inside=folder)
    tree = reading.parse(raw, {"format_version": int})
    if tree["format_version"] != FORMAT_VERSION:
      raise ValueError(
        f"its format_version is {tree['format_version']}, and this program "
        f"reads {FORMAT_VERSION}; prepare the text again with this program"
      )
    reading.check(tree, INDEX_TYPES)
  except FileNotFoundError:
    raise tokenizers.DataError(
      f"{folder}: the prepared text is not finished: start the same "
      "--mode=prepare command again; what is done stays"
    ) from None
  except OSError as error:
    raise tokenizers.DataError(f"{path}: {error.strerror or error}") from error
  except reading.ReadError as error:
    raise tokenizers.DataError(str(error)) from error
  except ValueError as error:
    raise tokenizers.DataError(f"{path}: no index: {error}") from None
  splits = {}
  for name, split in tree["splits"].items():
    split = {field: split[field] for field in _SPLIT}
    shards = tuple(
      Shard(**{field: shard[field] for field in SHARD})
      for shard in split["shards"]
    )
    for shard in shards:
      if not _NAME.fullmatch(shard.name):
        raise tokenizers.DataError(
          f"{path}: {reading.shown(shard.name)} is no name of a shard"
        )
    splits[name] = Split(**split | {"shards": shards})
  tokenizer = _tokenizer(folder, tree["tokenizer"])
  return Index(folder, tokenizer, tree["normalise"], splits)


def _tokenizer(folder, described):
  """Return the tokenizer of a prepared text."""
  name, path = described["name"], folder / alphabets.FILE
  if tokenizers.is_fixed(name):
    return tokenizers.get(name)
  try:
    state = reading.read(path, reading.JSON_BYTES, inside=folder)
  except (OSError, reading.ReadError) as error:
    raise tokenizers.DataError(
      f"{path}: the tokenizer of the shards cannot be read: {error}; restore "
      "the file, or prepare the text again"
    ) from error
  if hashlib.sha256(state).hexdigest() != described["sha256"]:
    raise tokenizers.DataError(
      f"{path}: not the tokenizer of the shards (the sha256 differs): restore "
      "the file, or prepare the text again"
    )
  return alphabets.of_state(state, str(path))


def check_asked(
  index: Index, tokenizer: tokenizers.Tokenizer, normalise: bool
) -> None:
  """Check that a prepared text is what the config asks for.

  Args:
    index: the index.
    tokenizer: the tokenizer of the model.
    normalise: config.data.normalise.

  Raises:
    DataError: it has another tokenizer or another form.
  """
  own = index.tokenizer
  if own.name != tokenizer.name:
    raise tokenizers.DataError(
      f"config.data.tokenizer={tokenizer.name!r}: the shards in {index.folder} "
      f"are of {own.name!r} ({own.V:,} symbols): set "
      f"--config.data.tokenizer={own.name}, or prepare the text with the other"
    )
  if own.sha256 != tokenizer.sha256:
    raise tokenizers.DataError(
      f"{index.folder}: the shards have another {own.name} than the run "
      f"(sha256 {own.sha256[:12]} and {tokenizer.sha256[:12]}): prepare the "
      "text with --config.data.tokenizer_file= and the tokenizer.json of the "
      "run"
    )
  if index.normalise != normalise:
    raise tokenizers.DataError(
      f"config.data.normalise={normalise}: the text in {index.folder} was "
      f"prepared with {index.normalise}: set --config.data.normalise="
      f"{str(index.normalise).lower()}"
    )


def read_split(
  index: Index, name: str, tokenizer: tokenizers.Tokenizer | None = None
) -> np.ndarray:
  """Return the tokens of a split: all documents, one after the other.

  Every shard is compared with its sha256 first.

  Args:
    index: the index.
    name: train, valid or test.
    tokenizer: the tokenizer of the index. If it has an end, that token follows
      each document. None means the tokenizer without an end.

  Returns:
    Ids [n] of the tokenizer's dtype, read-only. Long arrays are maps of a
    temporary file, see mapped.collect.

  Raises:
    DataError: the split is absent, or a shard is missing or damaged.
  """
  if name not in index.splits:
    raise tokenizers.DataError(
      f"{index.folder}: the {name} split is asked for, and the prepared text "
      f"has {', '.join(index.splits)}"
    )
  if not (tokenizer and tokenizer.has_end):
    return mapped.collect(tokens for tokens, _ in records(index, name))
  end = np.array([tokenizer.end], tokenizer.dtype)

  def with_ends():
    for tokens, is_last in records(index, name):
      yield tokens.astype(tokenizer.dtype, copy=False)
      if is_last:
        yield end

  return mapped.collect(with_ends())


def records(index: Index, name: str) -> Iterator[tuple[np.ndarray, bool]]:
  """Yield (tokens, whether their document ends) of the records of a split.

  Args:
    index: the index.
    name: a split that there is.

  Raises:
    DataError: a shard is missing or damaged.
  """
  tokenizer = index.tokenizer
  for shard in index.splits[name].shards:
    check_shard(index.folder, shard)
    path = index.folder / shard.name
    with opened(path) as reader:
      for first in range(0, shard.records, _RECORDS):
        try:
          records = reader.read(first, min(first + _RECORDS, shard.records))
        except (RuntimeError, IndexError, ValueError) as error:
          raise _damaged(path, str(error)) from error
        for record in records:
          tokens = np.frombuffer(record[:-1], on_disk(tokenizer.dtype))
          tokens = tokens.astype(tokenizer.dtype, copy=False)
          if len(tokens) and tokens.max() >= tokenizer.V:
            raise _damaged(path, "it has ids outside the vocabulary")
          yield tokens, record[-1:] == b"\1"


def library(path: epath.Path) -> Any:
  """Return the library that reads and writes shards.

  Args:
    path: a shard, for the message.

  Raises:
    DataError: there is no such library for this system.
  """
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise tokenizers.DataError(
      f"{path}: shards need the package array_record: {error}"
    ) from None
  return array_record_module


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[Any]:
  """Open a shard for reading.

  Args:
    path: the file.

  Raises:
    DataError: the file is no shard.
  """
  module = library(path)
  try:
    reader = module.ArrayRecordReader(str(path), _READ)
  except RuntimeError as error:
    raise _damaged(path, str(error)) from error
  try:
    yield reader
  finally:
    with contextlib.suppress(RuntimeError):
      reader.close()


def check_shard(folder: epath.Path, shard: Shard) -> None:
  """Compare a shard with the index.

  Raises:
    DataError: it is missing, or its size or its sha256 differs.
  """
  path = folder / shard.name
  try:
    size = path.stat().length
    if size != shard.bytes:
      raise _damaged(path, f"it has {size:,} bytes, and not {shard.bytes:,}")
    if digest(path, folder) != shard.sha256:
      raise _damaged(path, "its sha256 differs")
  except FileNotFoundError:
    raise _damaged(path, "it is missing") from None
  except OSError as error:
    raise _damaged(path, error.strerror or str(error)) from error
  except reading.ReadError as error:
    raise _damaged(path, error.reason) from error


def digest(path: epath.Path, inside: epath.Path | None = None) -> str:
  """Return the sha256 of a file in hex.

  Args:
    path: the file.
    inside: see reading.open_file.

  Raises:
    ReadError, OSError: see reading.open_file.
  """
  hasher = hashlib.sha256()
  with reading.open_file(path, inside) as file:
    while chunk := file.read(_HASHED):
      hasher.update(chunk)
  return hasher.hexdigest()


def _damaged(path, why):
  """Return the error for a shard that is not as it was written."""
  return tokenizers.DataError(
    f"{path}: a damaged shard: {why}; start the same --mode=prepare command "
    "again, which makes only this shard anew"
  )


def on_disk(dtype: np.dtype) -> np.dtype:
  """Return the dtype of ids in a record: little-endian."""
  return dtype.newbyteorder("<")


def index_json(
  tokenizer: tokenizers.Tokenizer,
  normalise: bool,
  splits: dict[str, Split],
  plan: str,
  report: dict[str, Any],
) -> str:
  """Return the content of the index.

  Args:
    tokenizer: the tokenizer of the shards.
    normalise: whether the text was brought into normal form.
    splits: the splits by their names.
    plan: sha256 of all that the shards depend on.
    report: further JSON values, for people.
  """
  tree = {
    "format_version": FORMAT_VERSION,
    "tokenizer": {
      "name": tokenizer.name,
      "V": tokenizer.V,
      "sha256": tokenizer.sha256,
    },
    "normalise": normalise,
    "plan": plan,
    "splits": {name: dataclasses.asdict(s) for name, s in splits.items()},
    "report": report,
  }
  return json.dumps(tree, indent=1) + "\n"
