"""Corpora: sources of text, each in three splits.

There are four kinds: books (built in), text8 (one file), folder (one file per
split), and prepared (a folder that --mode=prepare wrote, see shards.py). Files
may be packed (files.py), and may lie wherever etils.epath reaches. Text is read
only when a split is asked for. Nothing is added to the text: there are no
sentinels and no padding. With config.data.documents=stream or pad, an end token
follows each document, and documents are found as --mode=prepare finds them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import (
  alphabets,
  cleaning,
  documents,
  files,
  mapped,
  shards,
  tokenizers,
)

DataError = tokenizers.DataError
SPLITS = ("train", "valid", "test")
# Eleven novels, compressed. README.md in this folder names them.
BOOKS = epath.Path(__file__).parent / "books"
TEXT8_CHARACTERS = 100_000_000
TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
_FLAG = "--config.data.path="
# Names of splits in other projects.
_OTHER_NAMES = {"valid": ("val", "validation"), "train": ("training",)}
_FOLDER_SUFFIXES = ("", ".gz", ".xz", ".bz2", ".zst")
_CHUNK = 1 << 24  # Bytes. Bounds the transient memory of a pass over a split.


@dataclasses.dataclass(eq=False)
class Corpus:
  """A text in splits; `load` makes it.

  Attributes:
    name: books, text8, folder or prepared.
    source: a description of the text, for people.
    tokenizer: the tokenizer of the ids.
    read: a function from the name of a split to its ids, [n] of the
      tokenizer's dtype. It is called once per split.
    note: a function that returns what a reader must know about the text, or "".
  """

  name: str
  source: str
  tokenizer: tokenizers.Tokenizer
  read: Callable[[str], np.ndarray]
  note: Callable[[], str] = lambda: ""
  _splits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  _hashes: dict[str, str] = dataclasses.field(default_factory=dict)

  def split(self, name: str) -> np.ndarray:
    """Return the ids of a split, [n]; they must not be written to.

    Args:
      name: train, valid or test.

    Raises:
      DataError: the split is missing, empty or damaged, or has symbols that the
        tokenizer does not know.
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
    """Return the sha256 of a split's text as read by the tokenizer, in hex.

    Where documents have ends, it covers their places, too.
    """
    if name not in self._hashes:
      ids, digest = self.split(name), hashlib.sha256()
      for start in range(0, len(ids), _CHUNK):
        digest.update(self.tokenizer.to_bytes(ids[start : start + _CHUNK]))
      if self.tokenizer.has_end:
        # The same text in other documents is another text.
        ends = documents.ends(ids, self.tokenizer.end)
        digest.update(ends.astype("<i8").tobytes())
      self._hashes[name] = digest.hexdigest()
    return self._hashes[name]

  def describe(self, *splits: str) -> str:
    """Return one line about the text; this reads the named splits.

    Args:
      *splits: the splits whose number of tokens is given.
    """
    line = self.source
    if splits:
      sizes = [f"{name} {len(self.split(name)):,}" for name in splits]
      line += f": {', '.join(sizes)} {self.tokenizer.units}"
    note = self.note()
    return f"{line} ({note})" if note else line


def load(
  corpus: str,
  path: str,
  tokenizer: tokenizers.Tokenizer,
  normalise: bool = False,
  largest_megabytes: int = 0,
) -> Corpus:
  """Return the corpus that config.Data names; no text is read yet.

  Args:
    corpus: auto, books, text8 or folder.
    path: a file or a folder. "" means the built-in text, and ~ is the home
      folder.
    tokenizer: the tokenizer of the ids.
    normalise: whether the text is brought into normal form, see `normal_form`.
      The tokenizer char27 always reads the built-in text so.
    largest_megabytes: the largest text that is read; 0 means half of the
      memory.

  Raises:
    DataError: the path is missing, not needed, or of the wrong kind.
    ConfigError: the path is an address that cannot be read, see paths.of.
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
    return _books(tokenizer, normalise)
  largest = largest_megabytes * 10**6
  return _at_path(corpus, path, tokenizer, normalise, largest)


def of_config(data: config_lib.Data, tokenizer: tokenizers.Tokenizer) -> Corpus:
  """Return the corpus of a config.

  Args:
    data: the section of the config.
    tokenizer: the tokenizer of the ids. It has an end if config.data.documents
      is stream or pad.

  Raises:
    DataError, ConfigError: see `load`.
  """
  corpus = load(
    data.corpus, data.path, tokenizer, data.normalise, data.largest_megabytes
  )
  if data.documents == "join":
    return corpus
  if corpus.name == "prepared":
    return dataclasses.replace(corpus, _hashes={})
  found = documents.Found(_located(data, tokenizer), tokenizer)
  return Corpus(
    corpus.name,
    f"documents of {corpus.source}",
    tokenizer,
    found.split,
    found.note,
  )


def _located(data, tokenizer):
  """Return config.data with the place and the form of the built-in text."""
  if data.path:
    return data
  is_normal = data.normalise or not tokenizer.knows("\n")
  return dataclasses.replace(data, path=str(BOOKS), normalise=is_normal)


def learn(data: config_lib.Data) -> tokenizers.Tokenizer:
  """Return the tokenizer that config.data asks for, found in its text.

  Args:
    data: the section of the config. Its tokenizer is chars or bpe.

  Raises:
    DataError: see `load`, Corpus.split and alphabets.learn.
  """
  byte = tokenizers.get("byte")
  if data.documents != "join":
    found = documents.Found(_located(data, byte), byte)
    return alphabets.learn(data, found.training())
  corpus = of_config(data, byte)
  ids = corpus.split("train")
  chunks = (
    ids[start : start + _CHUNK].tobytes()
    for start in range(0, len(ids), _CHUNK)
  )
  return alphabets.learn(data, [chunks])


def unigram_entropy(tokens: np.ndarray, V: int) -> float:
  """Return the entropy of single symbols: the best loss without context.

  Args:
    tokens: unsigned integers [n]. Those of V and above are left out: they are
      the ends of documents, where these are not predicted.
    V: size of the vocabulary.

  Returns:
    Bits per token.
  """
  counts = np.zeros(V, np.int64)
  # bincount casts tokens to 8 bytes each, so it gets one chunk at a time.
  for start in range(0, len(tokens), _CHUNK):
    chunk = tokens[start : start + _CHUNK]
    counts += np.bincount(chunk, minlength=V)[:V]
  p = counts[counts > 0] / counts.sum()
  return float(-(p * np.log2(p)).sum())


def _at_path(
  corpus: str,
  path: str,
  tokenizer: tokenizers.Tokenizer,
  normalise: bool,
  largest: int,
) -> Corpus:
  """Return the corpus of a file or folder: auto, text8 or folder."""
  location = paths.of(path, "config.data.path")
  try:
    exists, is_folder = location.exists(), location.is_dir()
  except (ImportError, OSError) as error:  # For example, gs:// has no client.
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
  form = " in normal form" if normalise else ""
  if is_folder and shards.is_prepared(location):
    return _prepared(location, path, tokenizer, normalise)
  if is_folder:
    read = functools.partial(
      _read_folder, location, tokenizer, normalise, largest
    )
    return Corpus("folder", f"folder {path}{form}", tokenizer, read)
  text = _Text8(location, tokenizer, normalise, largest)
  return Corpus(
    "text8", f"text8 {path}{form}", tokenizer, text.split, text.note
  )


def _prepared(
  location: epath.Path,
  path: str,
  tokenizer: tokenizers.Tokenizer,
  normalise: bool,
) -> Corpus:
  index = shards.read_index(location)
  shards.check_asked(index, tokenizer, normalise)
  counts = [f"{s.documents:,} in {name}" for name, s in index.splits.items()]
  return Corpus(
    "prepared",
    f"prepared text {path} (documents: {', '.join(counts)})",
    tokenizer,
    functools.partial(shards.read_split, index, tokenizer=tokenizer),
    _hashes={name: split.sha256 for name, split in index.splits.items()},
  )


def _books(tokenizer: tokenizers.Tokenizer, normalise: bool) -> Corpus:
  def read(split: str) -> np.ndarray:
    text = files.read(BOOKS / f"{split}.txt.xz")
    if normalise or not tokenizer.knows("\n"):
      text = cleaning.normal_form(text)
    return tokenizer.encode(text)

  return Corpus(
    name="books",
    source="built-in text, eleven English novels",
    tokenizer=tokenizer,
    read=read,
    note=lambda: "small: compare its numbers with each other only",
  )


def _read_folder(
  folder: epath.Path,
  tokenizer: tokenizers.Tokenizer,
  normalise: bool,
  largest: int,
  split: str,
) -> np.ndarray:
  candidates = [f"{split}.txt{suffix}" for suffix in _FOLDER_SUFFIXES]
  names = [name for name in candidates if (folder / name).exists()]
  if not names:
    # Other names of a split, in any case of letters.
    stems = (split, *_OTHER_NAMES.get(split, ()))
    also = {f"{s}.txt{suffix}" for s in stems for suffix in _FOLDER_SUFFIXES}
    present = sorted(path.name for path in folder.iterdir())
    names = [name for name in present if name.lower() in also]
    if len(names) == 1:
      logging.info("%s: the %s split is %s", folder, split, names[0])
  if not names:
    raise DataError(
      f"{folder}: the {split} split is asked for, and there is no {split}.txt "
      f"(nor one with {', '.join(_FOLDER_SUFFIXES[1:])}); the folder has: "
      f"{', '.join(present[:8]) or 'nothing'}{', ...' * (len(present) > 8)}"
    )
  if len(names) > 1:
    raise DataError(
      f"{folder}: both {' and '.join(names)}: which is the {split} split? "
      "Remove one"
    )
  return _encode(folder / names[0], tokenizer, normalise, largest)


class _Text8:
  """One file, split by the shares that are customary for text8.

  A file of 100,000,000 bytes gives 90, 5 and 5 million. A shorter file is split
  by the same shares. In a longer file only the first 100,000,000 bytes are
  used, so text8 with something appended is still text8. The splits are the same
  for all tokenizers: where a token has several bytes, the bytes are split.
  """

  def __init__(
    self,
    path: epath.Path,
    tokenizer: tokenizers.Tokenizer,
    normalise: bool,
    largest: int,
  ):
    self._path, self._tokenizer = path, tokenizer
    self._normalise, self._largest = normalise, largest
    self._coder = tokenizers.get("byte") if tokenizer.codec else tokenizer

  @functools.cached_property
  def _ids(self) -> np.ndarray:
    ids = _encode(
      self._path, self._tokenizer, self._normalise, self._largest, self._coder
    )
    if len(ids) < 20:
      raise DataError(
        f"{self._path}: {len(ids)} {self._coder.units}"
        f"{' in normal form' * self._normalise} are too few for splits of 90, "
        "5 and 5%"
      )
    return ids

  def split(self, name: str) -> np.ndarray:
    used = min(len(self._ids), TEXT8_CHARACTERS)
    bounds = (0, used * 90 // 100, used * 95 // 100, used)
    i = SPLITS.index(name)
    if not self._tokenizer.codec:
      return self._ids[bounds[i] : bounds[i + 1]]
    start, end = (_character_start(self._ids, at) for at in bounds[i : i + 2])
    chunks = (
      self._ids[first : min(first + _CHUNK, end)].tobytes()
      for first in range(start, end, _CHUNK)
    )
    try:
      return mapped.collect(self._tokenizer.encode_chunks(chunks, start))
    except tokenizers.TokenizerError as error:
      raise DataError(f"{self._path}, the {name} split: {error}") from error

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


def _character_start(text, at):
  """Return the start of the first UTF-8 character from an offset on."""
  while at < len(text) and text[at] & 0xC0 == 0x80:
    at += 1
  return at


def _encode(
  path: epath.Path,
  tokenizer: tokenizers.Tokenizer,
  normalise: bool,
  largest: int,
  coder: tokenizers.Tokenizer | None = None,
) -> np.ndarray:
  """Return the ids of a text file.

  Args:
    path: the file.
    tokenizer: the tokenizer of the text.
    normalise: see `load`.
    largest: greatest number of bytes; see files.chunks.
    coder: the tokenizer of the ids; None means `tokenizer`.
  """
  chunks = files.chunks(path, largest)
  chunks = cleaning.cleaned(chunks, tokenizer, normalise)
  try:
    return mapped.collect((coder or tokenizer).encode_chunks(chunks))
  except tokenizers.TokenizerError as error:
    raise DataError(f"{path}: {error}") from error
