"""Read files of text: unpack them by their content, and refuse other files."""

import bz2
import codecs
import functools
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import zstandard
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.data import tokenizers

_CHUNK = 1 << 24  # Bytes. Bounds the transient memory of a pass over a text.
_ZSTD_BYTES = 512
# Bytes that text hardly has: control characters other than tab, line ends, form
# feeds and escapes. A few may be stray; more of them are numbers.
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r\x1b"})
_MOST_CONTROLS = 0.01
_FEW_CONTROLS = 4  # As many may be stray in a text of any length.
# The first bytes of files that are no text, for messages.
_KINDS = {
  b"\x1f\x8b": "gzip data",
  b"BZh": "bzip2 data",
  b"\xfd7zXZ\0": "xz data",
  b"\x28\xb5\x2f\xfd": "zstd data",
  b"PK": "a zip archive",
  b"7z\xbc\xaf\x27\x1c": "a 7z archive",
  b"Rar!": "a rar archive",
  b"\x04\x22\x4d\x18": "lz4 data",
  b"\x1f\x9d": "data of compress",
  b"\x93NUMPY": "an array of numpy",
  b"PAR1": "a parquet file",
  b"SQLite format 3\0": "an SQLite database",
  b"\x89PNG": "a picture",
  b"\xff\xd8\xff": "a picture",
  b"%PDF-": "a PDF document",
  b"\xff\xfe\0\0": "UTF-32 text",
  b"\0\0\xfe\xff": "UTF-32 text",
  b"\xff\xfe": "UTF-16 text",
  b"\xfe\xff": "UTF-16 text",
}


def read(path: epath.Path) -> bytes:
  """Return all bytes of a text file; see `chunks`."""
  return b"".join(chunks(path))


def chunks(path: epath.Path, largest: int = 0) -> Iterator[bytes]:
  """Yield the bytes of a text file, unpacked if it is packed.

  A packed file is recognised by its first bytes, whatever its name is. Only a
  part of the text is in memory at a time.

  Args:
    path: the file: text, or one text as gzip, xz, bzip2, zstd or zip.
    largest: greatest number of unpacked bytes; 0 means half of the memory.

  Raises:
    DataError: the file is no regular file, is too large, cannot be read, is
      damaged, or is not text. The message has the offset of the first byte
      that is not text.
  """
  largest = largest or memory_bytes() // 2
  unpack, checked, size = None, _Check(), 0
  try:
    with reading.open_file(path) as file:
      head = file.read(8)
      file.seek(0)
      by_content = (u for sign, u in _PACKED.items() if head.startswith(sign))
      unpack = next(by_content, None) or _BY_SUFFIX.get(path.suffix.lower())
      if not unpack:
        # The size of a plain text is known before the text is read.
        size = path.stat().length
        _check_size(path, size, largest)
      size, waiting = 0, b""
      for chunk in _joined((unpack or _pieces)(file)):
        size += len(chunk)
        _check_size(path, size, largest)
        if reason := checked.add(chunk):
          break
        # A short text is given away only after all its checks.
        if waiting:
          yield waiting
        waiting = chunk
      else:
        reason = checked.end()
        if not reason:
          yield waiting
  except reading.ReadError as error:
    raise tokenizers.DataError(str(error)) from error
  except _SeveralFilesError as error:
    raise tokenizers.DataError(f"{path}: {error}") from None
  except (
    *(OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
    # zipfile raises the last two for an unknown method and a missing password.
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError),
  ) as error:
    packed = " (truncated or damaged?)" if unpack else ""
    raise tokenizers.DataError(
      f"{path}: cannot be read{packed}: {error}"
    ) from error
  if reason:
    inside = "what is packed in it " if unpack else ""
    raise tokenizers.DataError(f"{path}: {inside}is not text: {reason}")


def memory_bytes() -> int:
  """Return the memory of this machine, or of the container if that has less."""
  pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    with open("/sys/fs/cgroup/memory.max") as file:
      return min(pages, int(file.read()))
  except (OSError, ValueError):  # There is no limit.
    return pages


def _check_size(path, size, largest):
  """Raise DataError where a text is larger than allowed."""
  if size > largest:
    raise tokenizers.DataError(
      f"{path}: the text has more than {largest:,} bytes; cut it, or allow "
      "more with --config.data.largest_megabytes="
    )


def not_text(data: bytes) -> str:
  """Return why bytes are not a text, or "" if they are one.

  A text is UTF-8 without zero bytes and with few control characters. It may
  begin and end within a character, as a part of a longer text does.

  Args:
    data: the bytes.

  Returns:
    The first byte that is not text with its offset, and what the bytes may be.
  """
  check = _Check()
  for start in range(0, len(data), _CHUNK):
    if reason := check.add(data[start : start + _CHUNK]):
      return reason
  return check.end()


class _Check:
  """The check of `not_text`, for a text that comes in chunks."""

  def __init__(self) -> None:
    self._decoder = codecs.getincrementaldecoder("utf-8")()
    self._size = self._controls = 0
    self._kind, self._control = "", (-1, 0)  # Offset and byte.

  def add(self, chunk: bytes) -> str:
    """Return why the text is none up to here, or "".

    Args:
      chunk: the next bytes. The first chunk must be as long as it can.
    """
    start = 0
    if not self._size:
      if chunk[257:262] == b"ustar":
        return "it is a tar archive; unpack it, and name the text in it"
      known = (kind for sign, kind in _KINDS.items() if chunk.startswith(sign))
      self._kind = next(known, "")
      if self._kind == "a PDF document":
        return f"it is {self._kind}; give a file of UTF-8 text"
      # The first bytes may be the end of a character, which has four at most.
      start = next((i for i, b in enumerate(chunk[:3]) if b & 0xC0 != 0x80), 3)
    pending = self._decoder.getstate()[0]
    zero, wrong = chunk.find(b"\0"), None
    try:
      self._decoder.decode(chunk[start:])
    except UnicodeDecodeError as error:
      wrong = start - len(pending) + error.start
    if wrong is not None and not 0 <= zero < wrong:
      byte = chunk[wrong] if wrong >= 0 else pending[wrong]
      return self._reason(self._size + wrong, byte, "is no UTF-8")
    if zero >= 0:
      return self._reason(self._size + zero, 0, "is of binary data")
    controls = len(chunk) - len(chunk.translate(None, _CONTROLS))
    if controls and not self._controls:
      found = map(chunk.find, map(_byte, _CONTROLS))
      first = min(at for at in found if at >= 0)
      self._control = self._size + first, chunk[first]
    self._controls += controls
    self._size += len(chunk)
    return ""

  def end(self) -> str:
    """Return why the whole text is none, or ""."""
    if self._controls <= max(_FEW_CONTROLS, _MOST_CONTROLS * self._size):
      return ""
    return self._reason(*self._control, "is one of many control characters")

  def _reason(self, offset, byte, what):
    kind = f"it is {self._kind}; " if self._kind else ""
    return (
      f"{kind}byte 0x{byte:02x} at offset {offset} {what}; give a file of "
      "UTF-8 text"
    )


def _byte(value):
  return bytes([value])


class _SeveralFilesError(Exception):
  """An archive that holds no text, or several files."""


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
  """Yield the same bytes in chunks of _CHUNK bytes or a little more."""
  waiting, size = [], 0
  for piece in pieces:
    waiting.append(piece)
    size += len(piece)
    if size >= _CHUNK:
      yield b"".join(waiting)
      waiting, size = [], 0
  if size:
    yield b"".join(waiting)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
  while piece := file.read(_CHUNK):
    yield piece


def _unzip(file: IO[bytes]) -> Iterator[bytes]:
  with zipfile.ZipFile(file) as archive:
    names = [n for n in archive.namelist() if not n.endswith("/")]
    if len(names) != 1:
      raise _SeveralFilesError(
        f"is no text but a zip archive of {len(names)} files (as documents of "
        "word processors are): unpack it, and name the text in it"
      )
    with archive.open(names[0]) as unpacked:
      yield from _pieces(unpacked)


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
  """Yield the decompressed bytes of all frames.

  zstandard's own reader accepts a truncated frame as a whole one, so the end of
  every frame is checked here.

  Raises:
    EOFError: the last frame is truncated.
  """
  frame = None
  # Few bytes at a time: four of them may unpack to 128 kB.
  while data := file.read(_ZSTD_BYTES):
    while data:
      if frame is None or frame.eof:
        frame = zstandard.ZstdDecompressor().decompressobj()
      yield frame.decompress(data)
      data = frame.unused_data
  if frame is not None and not frame.eof:
    raise EOFError("the file ends within a frame")


def _unpack(
  open_packed: Callable[..., Any], file: IO[bytes]
) -> Iterator[bytes]:
  with open_packed(file) as unpacked:
    yield from _pieces(unpacked)


_BY_SUFFIX: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
  ".gz": functools.partial(_unpack, gzip.open),
  ".xz": functools.partial(_unpack, lzma.open),
  ".bz2": functools.partial(_unpack, bz2.open),
  ".zst": _unzstd,
  ".zip": _unzip,
}
# By the first bytes. A bzip2 file has the size of its blocks in between, and an
# empty one has no block. A text may begin with PK.
_PACKED: dict[bytes, Callable[[IO[bytes]], Iterator[bytes]]] = {
  b"\x1f\x8b": _BY_SUFFIX[".gz"],
  b"\xfd7zXZ\0": _BY_SUFFIX[".xz"],
  b"\x28\xb5\x2f\xfd": _BY_SUFFIX[".zst"],
  b"PK\x03\x04": _BY_SUFFIX[".zip"],
  b"PK\x05\x06": _BY_SUFFIX[".zip"],
} | {
  b"BZh%d%b" % (n, block): _BY_SUFFIX[".bz2"]
  for n in range(1, 10)
  for block in (b"1AY&", b"\x17rE8")
}
