"""The documents of text files, JSON lines and Parquet files.

The kind of a file is found by its content, and a packed file is unpacked, see
files.py. A text file is one document, or each of its lines is one. A line of
JSON lines and a row of a Parquet file are a document each.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.data import files, tokenizers

# Names of the splits, as files and folders have them.
_SPLITS = {
  "train": "train",
  "training": "train",
  "valid": "valid",
  "val": "valid",
  "validation": "valid",
  "test": "test",
}
_ABOUT = re.compile(r"(readme|licen[cs]e)\b", re.IGNORECASE)
_NUMBER = re.compile(r"([-_.]?\d+(-of-\d+)?)?$")
_ANY_SIZE = 1 << 62
_ROWS = 256  # Rows of a Parquet file that are read at once.
_PARQUET = b"PAR1"
_SHOWN = 8  # Names in a message.


class Source(NamedTuple):
  """A file that holds documents.

  Attributes:
    path: the file.
    name: its name below the folder that the user gave.
    split: train, valid or test, if the file is named after a split, else "".
  """

  path: epath.Path
  name: str
  split: str


class Document(NamedTuple):
  """A document.

  Attributes:
    name: the file and the line, for people.
    chunks: its text, UTF-8, cut anywhere. It can be read once, before the next
      document.
    is_file: whether the document is a whole text file.
  """

  name: str
  chunks: Iterator[bytes]
  is_file: bool


def find(path: epath.Path) -> list[Source]:
  """Return the files below a path, sorted by their names.

  A file is named after a split if its name, or the folder that it lies in,
  begins so: train.txt, valid-00001.parquet, test/a.txt. If there are such
  files, all others are left out. Hidden files are always left out.

  Args:
    path: a file or a folder.

  Raises:
    DataError: there are no files.
  """
  where = f"config.data.path={path}"
  try:
    if not path.exists():
      raise tokenizers.DataError(f"{where}: no such file or folder")
    if not path.is_dir():
      return [Source(path, path.name, "")]
    names = sorted(_names(path))
  except (ImportError, OSError) as error:
    raise tokenizers.DataError(f"{where}: {error}") from error
  if not names:
    raise tokenizers.DataError(f"{where}: the folder has no files")
  found = [Source(path / name, name, _split(name)) for name in names]
  named = [source for source in found if source.split]
  others = [source.name for source in found if not source.split]
  # Nobody misses a file that describes the text.
  others = [name for name in others if not _ABOUT.match(name)]
  if named and others:
    logging.warning(
      "%s: left out, because other files are named after a split and these "
      "are not: %s%s",
      path,
      ", ".join(others[:_SHOWN]),
      ", ..." * (len(others) > _SHOWN),
    )
  return named or found


def _names(folder, prefix=""):
  """Yield the names of all files below a folder, without hidden ones."""
  for path in folder.iterdir():
    if path.name.startswith("."):
      continue
    if path.is_dir():
      yield from _names(path, f"{prefix}{path.name}/")
    else:
      yield prefix + path.name


def _split(name):
  """Return the split that a file is named after, or ""."""
  first = name.split("/")[0].split(".")[0].lower()
  return _SPLITS.get(_NUMBER.sub("", first), "")


def documents(
  source: Source, field: str, lines: bool = False
) -> Iterator[Document]:
  """Yield the documents of a file, in order.

  Args:
    source: the file.
    field: name of the text in JSON lines and Parquet files.
    lines: whether each line of a text file is a document.

  Raises:
    DataError: the file cannot be read, is not text, or has no such field; or a
      library is missing. The message names the file and the line.
  """
  if _is_parquet(source.path):
    yield from _of_parquet(source, field)
    return
  chunks = files.chunks(source.path, _ANY_SIZE)
  first = next(chunks, b"")
  start = first.removeprefix(b"\xef\xbb\xbf")
  if start.lstrip()[:1] == b"{":
    objects = _not_empty(_lines(_chained(start, chunks)))
    number, line = next(objects)
    if isinstance(_parsed(line), dict):
      yield from _of_lines(source, field, _counted(number, line, objects))
      return
    chunks = files.chunks(source.path, _ANY_SIZE)
    first = next(chunks, b"")
  _check_name(source)
  if lines:
    start = first.removeprefix(b"\xef\xbb\xbf")
    for number, line in _lines(_chained(start, chunks)):
      text = line.removesuffix(b"\r") if line.strip() else b""
      yield Document(f"{source.name}, line {number}", iter([text]), False)
    return
  yield Document(source.name, _chained(first, chunks), True)


def _check_name(source):
  """Raise DataError for a text file whose name says that it is JSON."""
  suffixes = source.path.name.lower().split(".")[1:]
  for suffix in ("jsonl", "ndjson", "json"):
    if suffix in suffixes:
      raise tokenizers.DataError(
        f"{source.path}: is no JSON lines (one object a line), although it is "
        f"named .{suffix}: write one object a line, or name it .txt if it is "
        "plain text"
      )


def _is_parquet(path):
  """Return whether a file begins as Parquet files do."""
  try:
    with reading.open_file(path) as file:
      return file.read(len(_PARQUET)) == _PARQUET
  except (OSError, reading.ReadError) as error:
    raise tokenizers.DataError(f"{path}: cannot be read: {error}") from error


def _chained(first, chunks):
  """Yield a first chunk and then the others."""
  yield first
  yield from chunks


def _counted(number, line, lines):
  """Yield a first numbered line and then the others."""
  yield number, line
  yield from lines


def _lines(chunks):
  """Yield (number from 1, line) of all lines; a last line may lack its end."""
  waiting: list[bytes] = []
  number = 0
  for chunk in chunks:
    *whole, last = chunk.split(b"\n")
    for line in whole:
      number += 1
      line = b"".join([*waiting, line])
      waiting = []
      yield number, line
    waiting.append(last)
  if line := b"".join(waiting):
    yield number + 1, line


def _not_empty(lines):
  """Yield the numbered lines that hold more than white space."""
  return ((number, line) for number, line in lines if line.strip())


def _parsed(line):
  """Return the JSON value of a line, or None if it is no JSON."""
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def _of_lines(source, field, lines):
  """Yield the documents of JSON lines."""
  for number, line in lines:
    name = f"{source.name}, line {number}"
    value = _parsed(line)
    if not isinstance(value, dict):
      raise tokenizers.DataError(
        f"{source.path}, line {number}: is no JSON object: mend the line, or "
        "delete it"
      )
    if field not in value:
      raise _no_field(f"{source.path}, line {number}", field, value)
    yield _document(source, name, value[field], field)


def _document(source, name, text, field):
  """Return the document of a value of a field."""
  where = f"{source.path}{name.removeprefix(source.name)}"
  if text is None:
    text = ""
  if not isinstance(text, str):
    raise tokenizers.DataError(
      f"{where}: {field} is {reading.shown(text)}, and a text is wanted: name "
      "another field with --config.data.text_field="
    )
  try:
    data = text.encode()
  except UnicodeEncodeError as error:
    raise tokenizers.DataError(
      f"{where}: character {error.start} of {field} is half a character "
      f"({text[error.start]!a}), which no UTF-8 has: mend the line"
    ) from None
  return Document(name, iter([data]), False)


def _no_field(where, field, names):
  """Return the error for an object without the field of the text."""
  names = [reading.shown_name(str(name)) for name in names]
  return tokenizers.DataError(
    f"{where}: has no field {field!r}; it has: {', '.join(names[:_SHOWN])}"
    f"{', ...' * (len(names) > _SHOWN)}: name the field of the text with "
    "--config.data.text_field="
  )


def _of_parquet(source, field):
  """Yield the documents of a Parquet file."""
  parquet = _parquet(source.path)
  try:
    with reading.open_file(source.path) as file:
      table = parquet.ParquetFile(file)
      if field not in table.schema_arrow.names:
        raise _no_field(source.path, field, table.schema_arrow.names)
      number = 0
      for batch in table.iter_batches(_ROWS, columns=[field]):
        for text in batch.column(0).to_pylist():
          number += 1
          name = f"{source.name}, row {number}"
          yield _document(source, name, text, field)
  except (OSError, ValueError, reading.ReadError) as error:
    if isinstance(error, tokenizers.DataError):
      raise
    line = str(error).splitlines()[0]
    raise tokenizers.DataError(
      f"{source.path}: a Parquet file that cannot be read (truncated or "
      f"damaged?): {line}"
    ) from error


def _parquet(path):
  """Return the library for Parquet.

  Raises:
    DataError: it is not installed.
  """
  try:
    import pyarrow.parquet  # An extra that is not always installed.
  except ImportError:
    raise tokenizers.DataError(
      f"{path}: is a Parquet file, and the library pyarrow is not installed; "
      "pip install 'aoarm_jax[parquet]'"
    ) from None
  return pyarrow.parquet
