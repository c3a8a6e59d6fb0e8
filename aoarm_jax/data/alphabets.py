"""Tokenizers that are found in a text: the state they have, and their sizes.

chars has the characters of the training split, sorted. bpe is in bpe.py. The
state of a tokenizer is a JSON document in one canonical form, so its sha256
names the tokenizer.
"""

import functools
import json
import re
from collections.abc import Iterable

import numpy as np
from etils import epath

from aoarm_jax.config import paths, reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import bpe, tokenizers

# File of the state: in a checkpoint, a run directory and a prepared folder.
FILE = "tokenizer.json"
# Values of config.data.vocabulary=0.
MOST_CHARS, LEARNED = 1024, 4096
_LARGER = 4  # Files of large vocabularies, against the JSON of this program.
_CODE_POINTS = 0x110000
_UNKNOWN = np.iinfo(np.int32).max
_STATE = {"format_version": int, "kind": str}
_ADVICE = (
  "is not in the alphabet of the training text ({V} characters): take it out, "
  "or put it into the training text and start a new run; "
  "--config.data.tokenizer=byte and bpe take any text"
)


def learn(
  data: config_lib.Data, documents: Iterable[Iterable[bytes]]
) -> tokenizers.Tokenizer:
  """Return the tokenizer chars or bpe of a training text.

  The same text gives the same tokenizer, however it is cut into chunks.

  Args:
    data: the section of the config that names the tokenizer and its size.
    documents: the documents of the training split, each in chunks of bytes,
      UTF-8, cut anywhere.

  Raises:
    TokenizerError: the text has more characters than are allowed, or too few
      for the vocabulary; or the library `tokenizers` is not installed.
  """
  if data.tokenizer == "chars":
    return _found(documents, data.vocabulary or MOST_CHARS)
  return bpe.learn(documents, data.vocabulary or LEARNED)


def of_file(data: config_lib.Data) -> tokenizers.Tokenizer:
  """Return the tokenizer of config.data.tokenizer_file.

  The file is a `tokenizer.json` of Hugging Face with a byte-level BPE, or the
  tokenizer.json of a run or of a prepared folder.

  Raises:
    TokenizerError: the file is missing, or holds no such tokenizer.
  """
  path = paths.of(data.tokenizer_file, "config.data.tokenizer_file")
  where = f"config.data.tokenizer_file={data.tokenizer_file}"
  return _of_content(_content(path, where), where)


def of_hugging_face(path: epath.Path, size: int) -> tokenizers.Tokenizer:
  """Return the tokenizer of a `tokenizer.json` beside a model.

  Args:
    path: the file.
    size: the number of ids that the model predicts, see bpe.of_hugging_face.

  Raises:
    TokenizerError: the file is missing, holds no BPE on bytes, or does not fit.
  """
  raw = _content(path, f"{path}")
  try:
    return bpe.of_hugging_face(reading.parse(raw, times=_LARGER), size)
  except tokenizers.TokenizerError:
    raise
  except ValueError as error:
    raise tokenizers.TokenizerError(f"{path}: {error}") from error


def _content(path, where):
  """Return the content of a tokenizer's file."""
  try:
    return reading.read(path, _LARGER * reading.JSON_BYTES)
  except FileNotFoundError:
    raise tokenizers.TokenizerError(f"{where}: no such file") from None
  except (OSError, ImportError) as error:
    raise tokenizers.TokenizerError(f"{where}: {error}") from error
  except reading.ReadError as error:
    raise tokenizers.TokenizerError(f"{where}: {error.reason}") from error


@functools.lru_cache(maxsize=4)
def _of_content(raw, where):
  """Return the tokenizer of a file's content."""
  try:
    tree = reading.parse(raw, times=_LARGER)
    if isinstance(tree, dict) and "kind" in tree:
      return of_state(raw, where)
    return bpe.of_hugging_face(tree)
  except tokenizers.TokenizerError:
    raise
  except ValueError as error:
    raise tokenizers.TokenizerError(f"{where}: {error}") from error


def of_state(state: bytes, where: str) -> tokenizers.Tokenizer:
  """Return the tokenizer of a state.

  Args:
    state: the JSON document, which may come from a stranger.
    where: name of its place, for messages.

  Raises:
    TokenizerError: this is no state of a tokenizer, or a later version.
  """
  try:
    tree = reading.parse(state, _STATE)
    if tree["format_version"] != bpe.FORMAT_VERSION:
      raise ValueError(
        f"its format_version is {tree['format_version']}, and this program "
        f"reads {bpe.FORMAT_VERSION}; use the release that wrote it"
      )
    if tree["kind"] == "chars":
      reading.check(tree, {"symbols": str})
      made = _chars(tree["symbols"])
    elif tree["kind"] == "bpe":
      made = bpe.of_document(tree)
    else:
      raise ValueError(f"its kind is {reading.shown(tree['kind'])}")
  except ValueError as error:
    raise tokenizers.TokenizerError(f"{where}: no tokenizer: {error}") from None
  if made.state != state:
    raise tokenizers.TokenizerError(
      f"{where}: no tokenizer in its canonical form; take the file as this "
      "program wrote it"
    )
  return made


def _found(documents, most):
  """Return the tokenizer of all characters of a text."""
  seen = np.zeros(_CODE_POINTS, bool)
  # Any codec that may be cut anywhere makes pieces of whole characters.
  for chunks in documents:
    for piece in _chars("").pieces(chunks):
      seen[_code_points(piece)] = True
  symbols = "".join(map(chr, np.flatnonzero(seen)))
  if len(symbols) > most:
    raise tokenizers.TokenizerError(
      f"chars: the training text has {len(symbols):,} different characters, "
      f"more than {most:,}: allow more with --config.data.vocabulary="
      f"{len(symbols)}, or take --config.data.tokenizer=bpe"
    )
  return _chars(symbols)


def _chars(symbols):
  """Return the tokenizer whose tokens are these characters, sorted."""
  codes = _code_points(symbols.encode("utf-8", "surrogatepass"))
  if (np.diff(codes.astype(np.int64)) <= 0).any():
    raise ValueError("its characters are not sorted")
  if len(codes) and ((codes >= 0xD800) & (codes < 0xE000)).any():
    raise ValueError("it has half a character (a surrogate)")

  def encode(text):
    try:
      found = _code_points(text)
    except UnicodeDecodeError as error:
      raise tokenizers.UnknownSymbolError(error.start) from None
    table = _lookup(symbols)
    ids = table[found]
    if (ids == _UNKNOWN).any():
      first = int((ids == _UNKNOWN).argmax())
      before = text.decode()[:first].encode()
      raise tokenizers.UnknownSymbolError(len(before))
    return ids

  document = {
    "format_version": bpe.FORMAT_VERSION,
    "kind": "chars",
    "symbols": symbols,
  }
  return tokenizers.Tokenizer(
    "chars",
    tuple(symbol.encode() for symbol in symbols),
    tokenizers.Codec(
      "char",
      encode,
      lambda: re.compile(""),
      _ADVICE.format(V=len(symbols)),
    ),
    json.dumps(document, sort_keys=True).encode(),
  )


@functools.lru_cache(maxsize=4)
def _lookup(symbols):
  """Return the id of every code point: int32 [0x110000]."""
  table = np.full(_CODE_POINTS, _UNKNOWN, np.int32)
  table[_code_points(symbols.encode())] = np.arange(len(symbols))
  return table


def _code_points(text):
  """Return the code points of UTF-8 bytes: uint32 [n]."""
  wide = text.decode("utf-8", "surrogatepass").encode(
    "utf-32-le", "surrogatepass"
  )
  return np.frombuffer(wide, "<u4")
