"""Corpora: where the text comes from, and its splits.

books (built in), text8 (one file), folder (a file a split). Files may be
compressed and may lie wherever etils.epath reaches. Nothing is read before it
is asked for, and nothing is added to the text: no sentinels, no padding.
"""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import lzma
import re
import string
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import zstandard
from etils import epath

from aoarm_jax.data import tokenizers

DataError = tokenizers.DataError
SPLITS = ("train", "valid", "test")
# Eleven novels, packed; README.md in it names them.
BOOKS = epath.Path(__file__).parent / "books"
TEXT8_CHARACTERS = 100_000_000
TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
_FLAG = "--config.data.path="
_FOLDER_SUFFIXES = ("", ".gz", ".xz", ".bz2", ".zst")
_CHUNK = 1 << 24  # Bounds the transient memory of a pass over a split.
_DIGITS = b"zero one two three four five six seven eight nine".split()
# For bytes.translate: letters in lower case, a space for any other byte.
_LETTERS = bytes(
  byte if chr(byte) in string.ascii_lowercase else ord(" ")
  for byte in bytes(range(256)).lower()
)


@dataclasses.dataclass(eq=False)
class Corpus:
  """A text in splits, see `load`.

  Attributes:
    name: books, text8 or folder.
    source: which text it is, for people.
    tokenizer: of the ids.
    read: (split) -> its ids, uint8 [n]; called once a split.
    note: () -> what must be known of the text, or "".
  """

  name: str
  source: str
  tokenizer: tokenizers.Tokenizer
  read: Callable[[str], np.ndarray]
  note: Callable[[], str] = lambda: ""
  _splits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  _hashes: dict[str, str] = dataclasses.field(default_factory=dict)

  def split(self, name: str) -> np.ndarray:
    """The ids of split train, valid or test: uint8 [n], not to be written to.

    Raises:
      DataError: the split is missing, empty, damaged or of other symbols.
    """
    if name not in SPLITS:
      raise DataError(f"no split {name!r}: there are {', '.join(SPLITS)}")
    if name not in self._splits:
      ids = self.read(name)
      if not len(ids):
        raise DataError(f"{self.source}: the {name} split is empty")
      self._splits[name] = ids
    return self._splits[name]

  def hash(self, name: str) -> str:
    """Hex sha256 of a split's text, as the tokenizer reads it."""
    if name not in self._hashes:
      ids, digest = self.split(name), hashlib.sha256()
      for start in range(0, len(ids), _CHUNK):
        digest.update(self.tokenizer.to_bytes(ids[start : start + _CHUNK]))
      self._hashes[name] = digest.hexdigest()
    return self._hashes[name]

  def describe(self, *splits: str) -> str:
    """One line: which text, characters in these splits (it reads them)."""
    line = self.source
    if splits:
      sizes = [f"{name} {len(self.split(name)):,}" for name in splits]
      line += f": {', '.join(sizes)} characters"
    note = self.note()
    return f"{line} ({note})" if note else line


def load(corpus: str, path: str, tokenizer: tokenizers.Tokenizer) -> Corpus:
  """The corpus that config.Data names; reads no text yet.

  Args:
    corpus: auto, books, text8 or folder.
    path: file or folder, "" for the built-in text; ~ is the home folder.
    tokenizer: of the ids.

  Raises:
    DataError: the path is missing, needless or of the wrong kind.
  """
  if corpus not in ("auto", "books", "text8", "folder"):
    raise DataError(
      f"config.data.corpus={corpus!r}: not one of auto, books, text8, folder"
    )
  if corpus == "books" and path:
    raise DataError(
      f"config.data.corpus=books is built in and takes no path: drop "
      f"config.data.path={path!r} or the corpus"
    )
  if not path:
    if corpus == "text8":
      raise DataError(
        f"text8 is not built in: get it from {TEXT8_URL} (31 MB) and give its "
        f"file, zipped or not, with {_FLAG}text8.zip"
      )
    if corpus == "folder":
      raise DataError(
        "config.data.corpus=folder: name the folder of train.txt, valid.txt "
        f"and test.txt with {_FLAG}"
      )
    return _books(tokenizer)
  return _at_path(corpus, path, tokenizer)


def normal_form(text: bytes) -> bytes:
  """Return a text in the form of text8: a to z and single spaces.

  As Matt Mahoney's wikifil.pl does, letters become lower case, every digit
  becomes a word, and every run of other bytes (so also an accented letter)
  becomes one space. No space is left at either end.
  """
  text = re.sub(rb"\d", lambda match: b" %b " % _DIGITS[int(match[0])], text)
  return b" ".join(text.translate(_LETTERS).split())


def unigram_entropy(tokens: np.ndarray, V: int) -> float:
  """Entropy of the symbols of a text: what no context can beat.

  Args:
    tokens: uint8 [n].
    V: vocabulary.

  Returns:
    Bits per character.
  """
  counts = np.zeros(V, np.int64)
  for start in range(0, len(tokens), _CHUNK):  # bincount casts to 8 bytes.
    counts += np.bincount(tokens[start : start + _CHUNK], minlength=V)
  p = counts[counts > 0] / counts.sum()
  return float(-(p * np.log2(p)).sum())


def _at_path(corpus, path, tokenizer) -> Corpus:
  where = epath.Path(path).expanduser()
  try:
    exists, is_folder = where.exists(), where.is_dir()
  except (ImportError, OSError) as error:  # gs:// without its client, say.
    raise DataError(f"config.data.path={path}: {error}") from error
  if not exists:
    raise DataError(f"config.data.path={path}: no such file or folder")
  if corpus == "text8" and is_folder:
    raise DataError(
      f"config.data.path={path}: is a folder, and text8 is one file; name the "
      "file, or set --config.data.corpus=folder"
    )
  if corpus == "folder" and not is_folder:
    raise DataError(
      f"config.data.path={path}: is a file; name its folder, or set "
      "--config.data.corpus=text8 to have it split"
    )
  if is_folder:
    read = functools.partial(_read_folder, where, tokenizer)
    return Corpus("folder", f"folder {path}", tokenizer, read)
  text = _Text8(where, tokenizer)
  return Corpus("text8", f"text8 {path}", tokenizer, text.split, text.note)


def _books(tokenizer) -> Corpus:
  def read(split):
    text = _read(BOOKS / f"{split}.txt.xz")
    return tokenizer.encode(text if tokenizer.V == 256 else normal_form(text))

  return Corpus(
    name="books",
    source="built-in text, eleven English novels",
    tokenizer=tokenizer,
    read=read,
    note=lambda: "small: compare its numbers with each other only",
  )


def _read_folder(folder, tokenizer, split) -> np.ndarray:
  names = [f"{split}.txt{suffix}" for suffix in _FOLDER_SUFFIXES]
  found = [name for name in names if (folder / name).exists()]
  if not found:
    raise DataError(
      f"{folder}: the {split} split is asked for, and there is no {split}.txt "
      f"(nor one with {', '.join(_FOLDER_SUFFIXES[1:])})"
    )
  if len(found) > 1:
    raise DataError(
      f"{folder}: both {' and '.join(found)}: which is the {split} split? "
      "Remove one"
    )
  return _encode(folder / found[0], tokenizer)


class _Text8:
  """One file, split as text8 always is.

  At 100,000,000 characters: 90, 5 and 5 million. A shorter file is split by
  the same shares; of a longer one the rest is not used, so that a text8 with
  something behind it is still text8.
  """

  def __init__(self, path: epath.Path, tokenizer: tokenizers.Tokenizer):
    self._path, self._tokenizer = path, tokenizer

  @functools.cached_property
  def _ids(self) -> np.ndarray:
    ids = _encode(self._path, self._tokenizer)
    if len(ids) < 20:
      raise DataError(
        f"{self._path}: {len(ids)} characters are too few for splits of 90, 5 "
        "and 5%"
      )
    return ids

  def split(self, name: str) -> np.ndarray:
    used = min(len(self._ids), TEXT8_CHARACTERS)
    bounds = (0, used * 90 // 100, used * 95 // 100, used)
    i = SPLITS.index(name)
    return self._ids[bounds[i] : bounds[i + 1]]

  def note(self) -> str:
    n = len(self._ids)
    if n == TEXT8_CHARACTERS:
      return ""
    if n > TEXT8_CHARACTERS:
      return f"only the first {TEXT8_CHARACTERS:,} of {n:,} are used"
    return (
      f"{n:,} in all, shorter than text8's {TEXT8_CHARACTERS:,}: split "
      "90/5/5%, not comparable with published text8 results"
    )


def _encode(path: epath.Path, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
  try:
    return tokenizer.encode(_read(path))
  except tokenizers.TokenizerError as error:
    raise DataError(f"{path}: {error}") from error


def _read(path: epath.Path) -> bytes:
  """A file's bytes, unpacked by its suffix.

  Raises:
    DataError: it cannot be read, or is damaged.
  """
  try:
    with path.open("rb") as file:
      unpack = _UNPACKERS.get(path.suffix)
      return unpack(file) if unpack else file.read()
  except (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
    # zipfile: an unknown method; a password.
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError),
  ) as error:
    packed = " (truncated or damaged?)" if path.suffix in _UNPACKERS else ""
    raise DataError(f"{path}: cannot be read{packed}: {error}") from error


def _unzip(file) -> bytes:
  with zipfile.ZipFile(file) as archive:
    names = [n for n in archive.namelist() if not n.endswith("/")]
    if len(names) != 1:
      raise zipfile.BadZipFile(f"it holds {len(names)} files instead of one")
    return archive.read(names[0])


def _unzstd(file) -> bytes:
  """All frames; zstandard's own reader takes a truncated one for whole."""
  data, parts = file.read(), []
  while data:
    frame = zstandard.ZstdDecompressor().decompressobj()
    parts.append(frame.decompress(data))
    if not frame.eof:
      raise EOFError("the file ends within a frame")
    data = frame.unused_data
  return b"".join(parts)


def _unpack(open_packed, file) -> bytes:
  with open_packed(file) as unpacked:
    return unpacked.read()


_UNPACKERS = {
  ".gz": functools.partial(_unpack, gzip.open),
  ".xz": functools.partial(_unpack, lzma.open),
  ".bz2": functools.partial(_unpack, bz2.open),
  ".zst": _unzstd,
  ".zip": _unzip,
}
