"""How the tools that measure speed fill a table.

All programs are compiled side by side. Then the rows are measured one after the
other, and each is printed and saved as soon as it is known. A row that cannot
be measured says why, and the others go on.
"""

import concurrent.futures
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from etils import epath

import pallas_kernels
from aoarm_jax.config import experiments
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import disk, telemetry, text

# Sizes of the models that are measured: name -> fields of config.model.
SIZES: dict[str, dict[str, Any]] = {
  "tiny": dict(D=64, L=2, N=4),
  "8m": dict(D=256, L=10, N=4),
  "base": dict(D=768, L=12, N=12),
  "124m": dict(D=768, L=12, N=12, tied=True),
  "350m": dict(D=1024, L=24, N=16),
} | {
  name: {
    field.removeprefix("model."): value
    for field, value in experiments.VARIANTS[name].items()
    if field.startswith("model.") and field != "model.T"
  }
  for name in ("qwen3-0.6b", "qwen3-1.7b")
}
_SECONDS_BETWEEN_PROGRESS = 10.0

Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row")
Result = TypeVar("Result")


def compile_all(
  programs: Mapping[Key, Callable[[], Any]],
) -> dict[Key, concurrent.futures.Future]:
  """Compiles programs side by side, and tells on stderr how many are done.

  Returns when the last is done: a program that is timed while others compile
  looks too slow.

  Args:
    programs: key -> a function that compiles a program and returns it.

  Returns:
    Key -> a future that is done. It has the program, or the error of the
    compiler.
  """
  # Several processes must compile the same programs in the same order.
  threads = 1 if jax.process_count() > 1 else min(16, os.cpu_count() or 1)
  start = told = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    futures = {key: pool.submit(make) for key, make in programs.items()}
    finished = concurrent.futures.as_completed(futures.values())
    for count, _ in enumerate(finished, start=1):
      now = time.monotonic()
      is_time = now - told > _SECONDS_BETWEEN_PROGRESS or count == len(futures)
      if is_time and jax.process_index() == 0:
        told = now
        print(
          f"{count} of {len(futures)} programs compiled, {now - start:.0f} s",
          file=sys.stderr,
          flush=True,
        )
  return futures


def measured(
  rows: Iterable[Row], measure: Callable[[Row], Result]
) -> Iterator[tuple[Row, Result | None, str]]:
  """Measures one row after the other.

  Args:
    rows: to be measured.
    measure: returns the result of a row.

  Yields:
    (row, its result, "") or, where a row cannot be measured, (row, None, why):
    its config or its attention is not supported, or memory is too small.

  Raises:
    JaxRuntimeError: any other error of a device.
  """
  for row in rows:
    try:
      result, failure = measure(row), ""
    except (config_lib.ConfigError, pallas_kernels.UnsupportedError) as error:
      result, failure = None, str(error)
    except jax.errors.JaxRuntimeError as error:
      if not telemetry.is_out_of_memory(error):
        raise
      result, failure = None, "out of device memory"
    yield row, result, failure


def write_csv(path: epath.PathLike, rows: list[dict[str, Any]]) -> bool:
  """Writes or replaces a CSV file; the first row has the titles.

  Returns:
    Whether the file was written. A failure is logged: the table is on the
    screen already, and further rows may come.
  """
  content = text.csv_table(rows)
  return disk.attempt(lambda: disk.write_atomically(path, content))


def append_json(path: epath.PathLike, row: dict[str, Any]) -> bool:
  """Adds a row to a file that has one JSON object per line.

  Returns:
    Whether the row was written. A failure is logged, as in `write_csv`.
  """
  path = epath.Path(path)

  def write():
    before = path.read_text() if path.exists() else ""
    disk.write_atomically(path, before + disk.to_json(row) + "\n")

  return disk.attempt(write)
