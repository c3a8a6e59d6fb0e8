"""Read files of text: unpack them by their content, and refuse other files."""

import bz2
import codecs
import functools
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any

import zstandard
from etils import epath

from aoarm_jax.data import tokenizers

_CHUNK = 1 << 24  # Bytes. Bounds the transient memory of a pass over a text.
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
  """Return the bytes of a text file, unpacked if it is packed.

  A packed file is recognised by its first bytes, whatever its name is.

  Args:
    path: the file: text, or one text as gzip, xz, bzip2, zstd or zip.

  Raises:
    DataError: the file cannot be read, is damaged, or is not text. The message
      has the offset of the first byte that is not text.
  """
  suffix = path.suffix.lower()
  unpack = None
  try:
    with path.open("rb") as file:
      # A pipe can be read once only.
      whole = file if file.seekable() else io.BytesIO(file.read())
      head = whole.read(8)
      whole.seek(0)
      by_content = (u for sign, u in _PACKED.items() if head.startswith(sign))
      unpack = next(by_content, None) or _BY_SUFFIX.get(suffix)
      data = unpack(whole) if unpack else whole.read()
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
  if reason := not_text(data):
    inside = "what is packed in it " if unpack else ""
    raise tokenizers.DataError(f"{path}: {inside}is not text: {reason}")
  return data


def not_text(data: bytes) -> str:
  """Return why bytes are not a text, or "" if they are one.

  A text is UTF-8 without zero bytes and with few control characters. It may
  begin and end within a character, as a part of a longer text does.

  Args:
    data: the bytes.

  Returns:
    The first byte that is not text with its offset, and what the bytes may be.
  """
  if data[257:262] == b"ustar":
    return "it is a tar archive; unpack it, and name the text in it"
  known = (kind for sign, kind in _KINDS.items() if data.startswith(sign))
  kind = next(known, "")
  if kind == "a PDF document":
    return f"it is {kind}; give a file of UTF-8 text"
  wrong = _first_wrong(data), data.find(b"\0")
  offset = min((at for at in wrong if at >= 0), default=-1)
  reason = "is no UTF-8" if offset == wrong[0] else "is of binary data"
  if offset < 0:
    offset, reason = _first_control(data), "is one of many control characters"
  if offset < 0:
    return ""
  kind = f"it is {kind}; " if kind else ""
  return (
    f"{kind}byte 0x{data[offset]:02x} at offset {offset} {reason}; give a file "
    "of UTF-8 text"
  )


def _first_wrong(data):
  """Return the offset of the first byte that is no UTF-8, or -1."""
  # The first bytes may be the end of a character, which has four at most.
  start = next((i for i, b in enumerate(data[:3]) if b & 0xC0 != 0x80), 3)
  decoder = codecs.getincrementaldecoder("utf-8")()
  while start < len(data):
    pending = len(decoder.getstate()[0])
    try:
      decoder.decode(data[start : start + _CHUNK])
    except UnicodeDecodeError as error:
      return start - pending + error.start
    start += _CHUNK
  return -1


def _first_control(data):
  """Return the offset of the first of many control characters, or -1."""
  controls = 0
  for start in range(0, len(data), _CHUNK):
    chunk = data[start : start + _CHUNK]
    controls += len(chunk) - len(chunk.translate(None, _CONTROLS))
  if controls <= max(_FEW_CONTROLS, _MOST_CONTROLS * len(data)):
    return -1
  return min(at for at in map(data.find, map(_byte, _CONTROLS)) if at >= 0)


def _byte(value):
  return bytes([value])


class _SeveralFilesError(Exception):
  """An archive that holds no text, or several files."""


def _unzip(file: IO[bytes]) -> bytes:
  with zipfile.ZipFile(file) as archive:
    names = [n for n in archive.namelist() if not n.endswith("/")]
    if len(names) != 1:
      raise _SeveralFilesError(
        f"is no text but a zip archive of {len(names)} files (as documents of "
        "word processors are): unpack it, and name the text in it"
      )
    return archive.read(names[0])


def _unzstd(file: IO[bytes]) -> bytes:
  """Return the decompressed bytes of all frames.

  zstandard's own reader accepts a truncated frame as a whole one, so the end of
  every frame is checked here.

  Raises:
    EOFError: the last frame is truncated.
  """
  data, frames = file.read(), []
  while data:
    frame = zstandard.ZstdDecompressor().decompressobj()
    frames.append(frame.decompress(data))
    if not frame.eof:
      raise EOFError("the file ends within a frame")
    data = frame.unused_data
  return b"".join(frames)


def _unpack(open_packed: Callable[..., Any], file: IO[bytes]) -> bytes:
  with open_packed(file) as unpacked:
    return unpacked.read()


_BY_SUFFIX: dict[str, Callable[[IO[bytes]], bytes]] = {
  ".gz": functools.partial(_unpack, gzip.open),
  ".xz": functools.partial(_unpack, lzma.open),
  ".bz2": functools.partial(_unpack, bz2.open),
  ".zst": _unzstd,
  ".zip": _unzip,
}
# By the first bytes. A bzip2 file has the size of its blocks in between, and a
# text may begin with PK.
_PACKED: dict[bytes, Callable[[IO[bytes]], bytes]] = {
  b"\x1f\x8b": _BY_SUFFIX[".gz"],
  b"\xfd7zXZ\0": _BY_SUFFIX[".xz"],
  b"\x28\xb5\x2f\xfd": _BY_SUFFIX[".zst"],
  b"PK\x03\x04": _BY_SUFFIX[".zip"],
  b"PK\x05\x06": _BY_SUFFIX[".zip"],
} | {b"BZh%d1AY&" % n: _BY_SUFFIX[".bz2"] for n in range(1, 10)}
