"""Batches of text that do not depend on the number of workers or processes.

A sequence of a batch is a crop of the text, or a document that is padded.

One grain element holds the start indices of one *global* batch. The element is
a function of (seed, batch index) alone, and each process then cuts its own
rows. So neither workers nor processes change the data. A run may continue with
another number of processes, and the state of a loader is one number.
"""

import sys
from typing import Any

import grain
import numpy as np

from aoarm_jax.data import corpora, documents, mapped
from aoarm_jax.data import workers as workers_lib


class TrainBatches:
  """Iterator over random crops or documents; `train_batches` makes it."""

  def __init__(
    self, starts: "_Starts", crops: "_Crops | documents.Rows", workers: int
  ):
    self._starts, self._crops, self._workers = starts, crops, workers
    self._next_batch = 0
    self._iterator: Any = None  # grain's iterator, while it runs.

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> np.ndarray:
    """Return this process's rows of the next global batch: [r, T]."""
    if self._iterator is None:
      self._iterator = iter(self._dataset())
    crops = next(self._iterator)
    self._next_batch += 1
    # A worker's batch lies in shared memory. grain frees this memory with the
    # array, but JAX may keep the data without a copy. So the data are copied.
    return np.array(crops) if self._workers else crops

  @property
  def real_share(self) -> float:
    """The mean share of the positions that are not padding."""
    if isinstance(self._crops, _Crops):
      return 1.0
    return float(self._crops.lengths.mean() / self._crops.T)

  def describe(self) -> str:
    """Return a line about the documents; "" for crops."""
    if isinstance(self._crops, _Crops):
      return ""
    padding = f"{1 - self.real_share:.0%} of the positions are padding"
    count = f"{len(self._crops.lengths):,} documents"
    return f"{count}, one a sequence; {padding}{self._crops.cut()}"

  def get_state(self) -> dict[str, int]:
    """Return the position as JSON; all processes and worker counts agree."""
    return {"next_batch": self._next_batch}

  def set_state(self, state: dict[str, int]) -> None:
    """Move to the position that a loader's `get_state` returned."""
    self.close()
    self._next_batch = int(state["next_batch"])

  def close(self) -> None:
    """End threads and worker processes; `next` would start them again."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _dataset(self) -> grain.IterDataset:
    batches = grain.MapDataset.range(self._next_batch, sys.maxsize)
    batches = batches.map(self._starts).map(self._crops)
    # A crop is only a copy in memory. One thread hides its cost. More threads
    # would only contend for the interpreter.
    dataset = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    )
    if not self._workers:
      return dataset
    return dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=self._workers, per_worker_buffer_size=4
      ),
      worker_init_fn=_start_worker,
    )


def train_batches(
  tokens: np.ndarray,
  *,
  T: int,
  batch_size: int,
  seed: int,
  workers: int = 0,
  rows: np.ndarray | None = None,
  end: documents.End | None = None,
) -> TrainBatches:
  """Return an endless iterator over random crops of a text, or its documents.

  Crops and documents are drawn with replacement.

  Args:
    tokens: unsigned integers [n], n >= T. Every worker process gets a copy,
      unless the text is long, see data/mapped.py.
    T: the length of a crop.
    batch_size: the number of crops in a global batch.
    seed: the seed of the start indices, at least 0.
    workers: the number of loader processes. With 0 a thread loads. Loader
      processes need parsed absl flags, as in a program run by absl.app.run,
      because grain has flags of its own.
    rows: int [r], the rows of a global batch that are read here. None means all
      rows.
    end: the end of a document. Each sequence is then one document, cut or
      padded to T; see documents.Rows. None means crops.

  Returns:
    An iterator of [r, T].

  Raises:
    DataError: the text is shorter than T, or has no document.
  """
  rows = np.arange(batch_size) if rows is None else rows
  if end:
    found = documents.Rows(tokens, end, T, rows)
    starts = _Starts(seed, batch_size, len(found.lengths))
    return TrainBatches(starts, found, workers)
  check_length(tokens, T)
  starts = _Starts(seed, batch_size, len(tokens) - T + 1)
  return TrainBatches(starts, _Crops(tokens, T, rows), workers)


class EvalBatches:
  """Sequence of batches (tokens, real); `eval_batches` makes it.

  Attributes:
    sequences: the number of real sequences in all batches, over all processes.
    split_tokens: the number of tokens of the text.
    evaluated_tokens: the number of tokens in all sequences.
    left_out: the number of tokens after the last whole window, which are in no
      batch.
    lengths: int64 [sequences], the number of tokens of every sequence that
      count; None if they all have T.
  """

  lengths: np.ndarray | None = None

  def __init__(self, crops: "_Crops", starts: np.ndarray, batch_size: int):
    self._crops: Any = crops
    self._starts, self._batch_size = starts, batch_size
    self.sequences = len(starts)
    self.split_tokens = len(crops.tokens)
    self.evaluated_tokens = len(starts) * crops.T
    self.left_out = self.split_tokens % crops.T

  def sums(self, of_token: np.ndarray) -> np.ndarray:
    """Return a sum over the tokens of every real sequence.

    Args:
      of_token: int64 [V], the terms by token id, such as Tokenizer.bytes_of.

    Returns:
      int64 [sequences].
    """
    crops = np.lib.stride_tricks.sliding_window_view(
      self._crops.tokens, self._crops.T
    )
    parts = [
      of_token[crops[self._starts[i : i + 1024]]].sum(axis=1)
      for i in range(0, len(self._starts), 1024)
    ]
    return np.concatenate(parts)

  def describe(self, units: str = "characters") -> str:
    """Return one line that says how much of the text the batches hold.

    Args:
      units: name of the tokens, see Tokenizer.units.
    """
    line = (
      f"evaluated: {self.evaluated_tokens:,} of {self.split_tokens:,} "
      f"{units}, in {self.sequences:,} of "
      f"{self.split_tokens // self._crops.T:,} windows"
    )
    if self.left_out:
      line += (
        f"; the last {self.left_out:,} fill no window of "
        f"config.model.T={self._crops.T} and are left out"
      )
    return line

  def __len__(self) -> int:
    return -(-len(self._starts) // self._batch_size)

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    """Return batch `index`: tokens [r, T] and real bool [r]."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    first = index * self._batch_size
    starts = self._starts[first : first + self._batch_size]
    real = np.arange(self._batch_size) < len(starts)
    # Rows that are not real repeat the first window of the text. They are not
    # counted.
    starts = np.pad(starts, (0, self._batch_size - len(starts)))
    return self._crops(starts), real[self._crops.rows]


class DocumentBatches(EvalBatches):
  """Batches of documents that are cut or padded; `eval_batches` makes it."""

  def __init__(
    self, rows: documents.Rows, numbers: np.ndarray, batch_size: int
  ):
    self._crops, self._starts, self._batch_size = rows, numbers, batch_size
    self.sequences, self.lengths = len(numbers), rows.lengths[numbers]
    self.split_tokens = rows.split_tokens
    self.evaluated_tokens = int(self.lengths.sum())
    self.left_out = 0

  def sums(self, of_token: np.ndarray) -> np.ndarray:
    """Return a sum over every document; see EvalBatches.sums.

    Padding is the end token. So the term of the end must be 0.
    """
    parts = [
      of_token[self._crops.of(self._starts[i : i + 1024])].sum(axis=1)
      for i in range(0, len(self._starts), 1024)
    ]
    return np.concatenate(parts)

  def describe(self, units: str = "characters") -> str:
    """Return one line that says how much of the text the batches hold."""
    return (
      f"evaluated: {self.evaluated_tokens:,} of {self.split_tokens:,} "
      f"{units}, in {self.sequences:,} of {len(self._crops.lengths):,} "
      f"documents{self._crops.cut()}"
    )


class StridedBatches(EvalBatches):
  """Batches of blocks of texts, each with the tokens before it as context.

  A text is cut into blocks of `stride` tokens, and its last block may be
  shorter. So every token is in one block. A block comes in a window of T
  tokens, behind at least T - stride tokens of context. At the start of a text a
  block has all tokens before it as context, and these may be fewer.

  A batch is (tokens [B, T], real bool [B], ranks int32 [B, R]), where R is the
  stride; see estimators.estimate.
  """

  def __init__(
    self,
    tokens: np.ndarray,
    ends: np.ndarray,
    *,
    T: int,
    stride: int,
    batch_size: int,
    end: documents.End | None = None,
  ):
    """Lay out the blocks.

    Args:
      tokens: unsigned integers [n], the texts one after the other.
      ends: int [texts], ascending: where each text ends, without an end token
        that is given.
      T: the length of a window.
      stride: the greatest number of tokens of a block, at most T.
      batch_size: the number B of rows in a batch.
      end: the end of padded documents. Windows are filled up with it.
    """
    self._tokens, self._T, self._batch_size = tokens, T, batch_size
    self._stride, self._fill = stride, end.token if end else 0
    # A given end follows each text but is no part of it.
    begins = np.concatenate([[0], ends[:-1] + bool(end and end.is_given)])
    counts = -(-(ends - begins) // stride)
    text = np.repeat(np.arange(len(ends)), counts)
    place = np.arange(len(text)) - np.repeat(counts.cumsum() - counts, counts)
    self._firsts = begins[text] + place * stride
    self._text_ends = ends[text]
    self._lasts = np.minimum(self._firsts + stride, self._text_ends)
    self._window_starts = np.maximum(begins[text], self._lasts - T)
    self._sizes = self.lengths = self._lasts - self._firsts
    self.sequences = len(text)
    self.split_tokens = self.evaluated_tokens = int(self.lengths.sum())
    self.left_out = 0

  def blocks(self) -> list[tuple[int, int, int]]:
    """Return (start of the window, first token, after the last) of each block.

    All three are places in `tokens`, from 0.
    """
    places = self._window_starts, self._firsts, self._lasts
    return list(zip(*(x.tolist() for x in places)))

  def sums(self, of_token: np.ndarray) -> np.ndarray:
    """Return a sum over the tokens of every block; see EvalBatches.sums."""
    sums = np.zeros(len(self._tokens) + 1, np.int64)
    np.cumsum(of_token[self._tokens], out=sums[1:])
    return sums[self._lasts] - sums[self._firsts]

  def describe(self, units: str = "characters") -> str:
    """Return one line that says how the text is scored."""
    return (
      f"scored: {self.evaluated_tokens:,} {units} in {self.sequences:,} blocks "
      f"of up to {self._stride:,}, each behind at least "
      f"{self._T - self._stride:,} of context, except at the start of a text"
    )

  def __len__(self) -> int:
    return -(-self.sequences // self._batch_size)

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    """Return batch `index`: tokens [B, T], real bool [B], ranks [B, R]."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    B, T, R = self._batch_size, self._T, self._stride
    blocks = index * B + np.arange(B)
    real = blocks < self.sequences
    blocks = np.where(real, blocks, 0)
    at = self._window_starts[blocks][:, None] + np.arange(T)
    last = self._text_ends[blocks][:, None]
    tokens = self._tokens[np.minimum(at, last - 1)]
    tokens = np.where(at < last, tokens, self._fill)
    first = (self._firsts - self._window_starts)[blocks][:, None]
    ranks = first + np.arange(R)
    is_scored = np.arange(R) < self._sizes[blocks][:, None]
    return tokens, real, np.where(is_scored, ranks, T).astype(np.int32)


def eval_batches(
  tokens: np.ndarray,
  *,
  T: int,
  batch_size: int,
  batches: int = 0,
  seed: int = 0,
  rows: np.ndarray | None = None,
  end: documents.End | None = None,
) -> EvalBatches:
  """Return batches of the consecutive windows of a text, or of its documents.

  The windows do not overlap. Tokens after the last whole window are left out.
  Every document comes once.

  Args:
    tokens: unsigned integers [n], n >= T.
    T: the length of a window.
    batch_size: the number of rows in a global batch.
    batches: the number k of batches. They hold k * batch_size random windows in
      text order, or all windows if there are fewer. The random choice makes
      them stand for the whole text. With 0 all windows are read.
    seed: the seed of the random choice, at least 0. A greater k keeps all
      windows of a smaller k.
    rows: int [r], the rows of a global batch that are read here. None means all
      rows.
    end: the end of a document. Documents then take the place of windows; see
      documents.Rows. None means windows.

  Returns:
    A sequence of (tokens [r, T], real bool [r]). The last batch is filled
    up with rows that are not real.

  Raises:
    DataError: the text is shorter than T, or has no document.
  """
  rows = np.arange(batch_size) if rows is None else rows
  found = documents.Rows(tokens, end, T, rows) if end else None
  if found:
    windows = np.arange(len(found.lengths))
  else:
    check_length(tokens, T)
    windows = np.arange(len(tokens) // T)
  if batches:
    keys = random_bits(seed, 0, len(windows), purpose=1)
    chosen = np.argsort(keys, kind="stable")[: batches * batch_size]
    windows = np.sort(chosen)
  if found:
    return DocumentBatches(found, windows, batch_size)
  return EvalBatches(_Crops(tokens, T, rows), windows * T, batch_size)


class _Starts:
  """Map a batch index to its start indices: int64 [batch_size]."""

  def __init__(self, seed: int, batch_size: int, count: int):
    self._seed, self._batch_size, self._count = seed, batch_size, count

  def __call__(self, index: int) -> np.ndarray:
    bits = random_bits(self._seed, index, self._batch_size, purpose=0)
    # The remainder has a bias of count / 2^64, which is negligible.
    return (bits % np.uint64(self._count)).astype(np.int64)


class _Crops:
  """Map the start indices of a global batch to this process's [r, T]."""

  def __init__(self, tokens: np.ndarray, T: int, rows: np.ndarray):
    self.tokens, self.T, self.rows = tokens, T, rows

  def __getstate__(self) -> Any:
    # A loader process maps the file of a long text and gets no copy.
    return self.__dict__ | {"tokens": mapped.packed(self.tokens)}

  def __setstate__(self, state: Any) -> None:
    self.__dict__.update(state, tokens=mapped.unpacked(state["tokens"]))

  def __call__(self, starts: np.ndarray) -> np.ndarray:
    crops = np.lib.stride_tricks.sliding_window_view(self.tokens, self.T)
    return crops[starts[self.rows]]


def _start_worker(worker_index: int, worker_count: int) -> None:
  """Tie the life of a loader process to its parent, and to nothing else."""
  del worker_index, worker_count
  workers_lib.tie_to_parent()


def random_bits(
  seed: int, index: int, size: int, *, purpose: int
) -> np.ndarray:
  """Return random bits, uint64 [size], as a function of the arguments.

  numpy keeps raw bits the same from version to version. It does not promise
  this for the numbers that its Generator makes of them.
  """
  bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, purpose])
  return bits.random_raw(size)


def check_length(tokens: np.ndarray, T: int) -> None:
  """Raise DataError if a text is too short for one sequence of T tokens."""
  if len(tokens) < T:
    raise corpora.DataError(
      f"a text of {len(tokens)} tokens holds no sequence of "
      f"config.model.T={T}: take a longer text or a smaller T"
    )
