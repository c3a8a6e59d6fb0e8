"""Batches of text, the same for any number of workers and processes.

One grain element is the start indices of one *global* batch, a function of
(seed, batch index) alone; each process then cuts its own rows. So
neither workers nor processes change the data, any process count may continue
what another began, and the state of a loader is one number.
"""

import multiprocessing
import os
import signal
import sys
import threading

import grain
import numpy as np

from aoarm_jax.data import corpora


class TrainBatches:
  """Iterator of random crops, see `train_batches`."""

  def __init__(self, starts: "_Starts", crops: "_Crops", workers: int):
    self._starts, self._crops, self._workers = starts, crops, workers
    self._next_batch = 0
    self._iterator = None

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> np.ndarray:
    """uint8 [rows, T]: this process's rows of the next global batch."""
    if self._iterator is None:
      self._iterator = iter(self._dataset())
    crops = next(self._iterator)
    self._next_batch += 1
    # A worker's batch lies in shared memory that grain takes back when the
    # array goes: no place for what JAX may keep without a copy.
    return np.array(crops) if self._workers else crops

  def get_state(self) -> dict[str, int]:
    """For JSON; the same in every process and for every worker count."""
    return {"next_batch": self._next_batch}

  def set_state(self, state: dict[str, int]):
    """Goes to where the loader stood whose `get_state` this is."""
    self.close()
    self._next_batch = int(state["next_batch"])

  def close(self):
    """Ends threads and worker processes; `next` would start them again."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _dataset(self) -> grain.IterDataset:
    batches = grain.MapDataset.range(self._next_batch, sys.maxsize)
    batches = batches.map(self._starts).map(self._crops)
    # A crop is a copy in memory: one thread hides it, more would only contend
    # for the interpreter.
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
) -> TrainBatches:
  """Random crops of a text, with replacement, without end.

  Args:
    tokens: uint8 [n], n >= T. Every worker process gets a copy.
    T: length of a crop.
    batch_size: crops of a global batch.
    seed: of the starts, at least 0.
    workers: loader processes; 0: a thread. Processes need absl's flags parsed
      (grain has flags of its own), as absl.app.run does.
    rows: int [r], the rows of a global batch that are read here; None: all.

  Returns:
    Iterator of uint8 [r, T].

  Raises:
    DataError: the text is too short.
  """
  rows = np.arange(batch_size) if rows is None else rows
  check_length(tokens, T)
  starts = _Starts(seed, batch_size, len(tokens) - T + 1)
  return TrainBatches(starts, _Crops(tokens, T, rows), workers)


class EvalBatches:
  """Sequence of (tokens, real), see `eval_batches`.

  Attributes:
    sequences: real sequences in all batches, over all processes.
  """

  def __init__(self, crops: "_Crops", starts: np.ndarray, batch_size: int):
    self._crops, self._starts, self._batch_size = crops, starts, batch_size
    self.sequences = len(starts)

  def __len__(self) -> int:
    return -(-len(self._starts) // self._batch_size)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens uint8 [rows, T], real bool [rows]) of batch `index`."""
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    first = index * self._batch_size
    starts = self._starts[first : first + self._batch_size]
    real = np.arange(self._batch_size) < len(starts)
    # A row that is not real repeats the text's first window: it is not counted.
    starts = np.pad(starts, (0, self._batch_size - len(starts)))
    return self._crops(starts), real[self._crops.rows]


def eval_batches(
  tokens: np.ndarray,
  *,
  T: int,
  batch_size: int,
  batches: int = 0,
  seed: int = 0,
  rows: np.ndarray | None = None,
) -> EvalBatches:
  """Windows of a text that do not overlap; fewer than T at its end are left.

  Args:
    tokens: uint8 [n], n >= T.
    T: length of a window.
    batch_size: rows of a global batch.
    batches: 0: all windows; k: a random part of k * batch_size of them (all,
      if there are fewer), so that it stands for the whole. In text order.
    seed: of the part, at least 0. A greater k has all windows of a lesser one.
    rows: int [r], the rows of a global batch that are read here; None: all.

  Returns:
    Sequence of (tokens uint8 [r, T], real bool [r]). The last batch is filled
    with rows that are not real.

  Raises:
    DataError: the text is too short.
  """
  rows = np.arange(batch_size) if rows is None else rows
  check_length(tokens, T)
  windows = np.arange(len(tokens) // T)
  if batches:
    keys = _random_bits(seed, 0, len(windows), purpose=1)
    part = np.argsort(keys, kind="stable")[: batches * batch_size]
    windows = np.sort(part)
  return EvalBatches(_Crops(tokens, T, rows), windows * T, batch_size)


class _Starts:
  """Batch index -> start indices of the global batch, int64 [batch_size]."""

  def __init__(self, seed: int, batch_size: int, count: int):
    self._seed, self._batch_size, self._count = seed, batch_size, count

  def __call__(self, index: int) -> np.ndarray:
    bits = _random_bits(self._seed, index, self._batch_size, purpose=0)
    # The remainder's bias, count / 2^64, is beyond notice.
    return (bits % np.uint64(self._count)).astype(np.int64)


class _Crops:
  """Start indices of the global batch -> this process's rows, uint8 [., T]."""

  def __init__(self, tokens: np.ndarray, T: int, rows: np.ndarray):
    self._tokens, self._T, self.rows = tokens, T, rows

  def __call__(self, starts: np.ndarray) -> np.ndarray:
    crops = np.lib.stride_tricks.sliding_window_view(self._tokens, self._T)
    return crops[starts[self.rows]]


def _start_worker(worker_index: int, worker_count: int):
  """Ties a loader process's life to its parent's, and to nothing else."""
  del worker_index, worker_count
  # Launchers and terminals signal the whole process group: the parent must
  # still get batches until it has saved.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
  # Of itself a worker whose parent was killed would wait for ever.
  multiprocessing.parent_process().join()
  os._exit(1)


def _random_bits(seed, index, size, *, purpose) -> np.ndarray:
  """uint64 [size], a function of the arguments.

  Raw bits, which numpy keeps the same from version to version, as it does not
  keep what its Generator makes of them.
  """
  bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, purpose])
  return bits.random_raw(size)


def check_length(tokens: np.ndarray, T: int) -> None:
  """DataError where a text holds no sequence of T tokens."""
  if len(tokens) < T:
    raise corpora.DataError(
      f"a text of {len(tokens)} characters holds no sequence of "
      f"config.model.T={T}: take a longer text or a smaller T"
    )
