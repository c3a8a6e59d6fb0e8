"""Write shards of tokens; shards.py says what they hold."""

import contextlib
import errno
import os
import sys

import numpy as np
from etils import epath

from aoarm_jax.data import shards, tokenizers

# Uncompressed, so that the bytes depend on no library for compression.
_OPTIONS = "group_size:16,uncompressed,max_parallelism:1"
# Errors whose words the library's messages have.
_ERRORS = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS),
  *(errno.ENOENT, errno.EPERM),
)


def to_record(ids: np.ndarray, is_last: bool) -> bytes:
  """Return the record of a piece.

  Args:
    ids: token ids [n] of the tokenizer's dtype.
    is_last: whether the document ends with the piece.
  """
  if sys.byteorder == "big":
    ids = ids.astype(shards.on_disk(ids.dtype))
  return ids.tobytes() + (b"\1" if is_last else b"\0")


class Writer:
  """Writes one shard. The file is whole or absent at any moment."""

  def __init__(self, folder: epath.Path, name: str) -> None:
    """Open a temporary file.

    Args:
      folder: the folder, local.
      name: name of the shard.

    Raises:
      OSError: the file cannot be written; names the shard.
    """
    self.name, self._path = name, folder / name
    self._temporary = folder / f".{name}.{os.getpid()}.tmp"
    self.records = self.documents = self.tokens = 0
    module = shards.library(self._path)
    with self._naming():
      self._writer = module.ArrayRecordWriter(str(self._temporary), _OPTIONS)

  def abandon(self) -> None:
    """Delete the temporary file."""
    with contextlib.suppress(RuntimeError):
      self._writer.close()
    with contextlib.suppress(OSError):
      self._temporary.unlink(missing_ok=True)

  def write(self, record: bytes, tokens: int) -> None:
    """Write a record; see `to_record`.

    Args:
      record: the record.
      tokens: number of its tokens.

    Raises:
      OSError: the disk is full, for example.
    """
    with self._naming():
      self._writer.write(record)
      # The library only notes a failure of a record in the background.
      if not self._writer.ok():
        self._writer.close()
    self.records += 1
    self.documents += record[-1]
    self.tokens += tokens

  def finish(self) -> shards.Shard:
    """Complete the file, give it its name, and return its entry.

    Raises:
      OSError: the disk is full, for example.
    """
    with self._naming():
      self._writer.close()
      with open(self._temporary, "rb+") as file:
        os.fsync(file.fileno())
      with shards.opened(self._temporary) as reader:
        if reader.num_records() != self.records:
          raise RuntimeError("not all records were written")
      sha256 = shards.digest(self._temporary)
      size = self._temporary.stat().length
      os.replace(self._temporary, self._path)
    return shards.Shard(
      self.name, self.documents, self.records, self.tokens, size, sha256
    )

  @contextlib.contextmanager
  def _naming(self):
    """Turn errors of the library into those of the system, with the name."""
    try:
      yield
    except (RuntimeError, ValueError, tokenizers.DataError) as error:
      # The library's text begins with that of the system.
      number = next(
        (n for n in _ERRORS if os.strerror(n) in str(error)), errno.EIO
      )
      raise OSError(number, os.strerror(number), str(self._path)) from error
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from error
