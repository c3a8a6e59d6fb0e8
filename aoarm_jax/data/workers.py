"""Processes that read and encode text beside the main process.

This module imports little, because every such process imports it.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aoarm_jax.data import alphabets, tokenizers

# A process encodes so many bytes or pieces at once, at least.
_BATCH_BYTES, _BATCH_PIECES = 1 << 18, 1 << 12
_BATCHES_AHEAD = 3  # Batches per process that wait.
# The main module that a spawned process imports, see _without_main.
_MAIN = ("__spec__", "__file__")
_tokenizer: tokenizers.Tokenizer | None = None  # Of a process that encodes.


class Piece(NamedTuple):
  """A piece of a document that is encoded at once; see Tokenizer.pieces.

  Attributes:
    split: name of the split.
    shard: name of the shard.
    is_last: whether the document ends with the piece.
    name: name of the document, for messages.
    before: offset of the piece in the document, in bytes.
    text: the piece.
  """

  split: str
  shard: str
  is_last: bool
  name: str
  before: int
  text: bytes


def tie_to_parent() -> None:
  """Tie the life of this process to its parent, and to nothing else."""
  # Launchers and terminals signal the whole process group. The workers must
  # survive this, because the parent needs them until it has saved.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  # Without this, a worker whose parent was killed would wait for ever.
  parent: Any = multiprocessing.parent_process()
  parent.join()
  os._exit(1)


def _start(name, state):
  """Make this process ready to encode; it is a process of its own.

  Args:
    name: name of the tokenizer.
    state: its state; b"" for a fixed tokenizer.
  """
  global _tokenizer
  tie_to_parent()
  # Processes share the work, so that threads would only contend.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  _tokenizer = (
    alphabets.of_state(state, name) if state else tokenizers.get(name)
  )


def encode(
  tokenizer: tokenizers.Tokenizer, pieces: Sequence[Piece]
) -> list[np.ndarray]:
  """Return the ids of pieces.

  Args:
    tokenizer: the tokenizer.
    pieces: the pieces.

  Raises:
    DataError: the tokenizer does not know a symbol. The message names the
      document.
  """
  encoded = []
  for piece in pieces:
    try:
      encoded.append(tokenizer.encode(piece.text, piece.before))
    except tokenizers.TokenizerError as error:
      raise tokenizers.DataError(f"{piece.name}: {error}") from None
  return encoded


def _encode_here(pieces):
  """Return the ids of pieces, in a process that `_start` has made ready."""
  assert _tokenizer is not None
  return encode(_tokenizer, pieces)


def encoded(
  tokenizer: tokenizers.Tokenizer, pieces: Iterable[Piece], count: int
) -> Generator[tuple[Piece, np.ndarray], None, None]:
  """Yield the pieces with their ids, in order.

  Args:
    tokenizer: the tokenizer.
    pieces: the pieces.
    count: number of processes that encode; 1 is this process.

  Raises:
    DataError: a text has a symbol that the tokenizer does not know, or a
      process was killed.
  """
  batches = _batches(pieces)
  if count == 1:
    for batch in batches:
      yield from zip(batch, encode(tokenizer, batch))
    return
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(
    count, context, _start, (tokenizer.name, tokenizer.state)
  )
  waiting: collections.deque[Any] = collections.deque()
  try:
    for batch in batches:
      with _without_main():
        waiting.append((batch, pool.submit(_encode_here, batch)))
      if len(waiting) > count * _BATCHES_AHEAD:
        batch, future = waiting.popleft()
        yield from zip(batch, future.result())
    while waiting:
      batch, future = waiting.popleft()
      yield from zip(batch, future.result())
  except concurrent.futures.process.BrokenProcessPool:
    raise tokenizers.DataError(
      "a process that encodes was ended from outside, as if memory was short: "
      f"start the same command again with --config.data.workers={count // 2}; "
      "the shards that are done stay"
    ) from None
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _batches(pieces):
  """Yield lists of pieces that are encoded at once."""
  batch, size = [], 0
  for piece in pieces:
    batch.append(piece)
    size += len(piece.text)
    if size >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


@contextlib.contextmanager
def _without_main():
  """Start processes inside that do not import the main module.

  A process that multiprocessing spawns first imports the main module of its
  parent. That of this program imports JAX, for seconds and some 300 MB.
  """
  main: Any = sys.modules["__main__"]
  saved = {name: vars(main)[name] for name in _MAIN if name in vars(main)}
  try:
    for name in saved:
      setattr(main, name, None)
    yield
  finally:
    vars(main).update(saved)
