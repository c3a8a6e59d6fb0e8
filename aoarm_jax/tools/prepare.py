"""--mode=prepare: documents become shards of tokens, with a report.

python -m aoarm_jax.main --mode=prepare --config=two_stream --out=prepared
  --config.data.path=texts --config.data.tokenizer=bpe
"""

import os
import time
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import preparing, shards
from aoarm_jax.devices import neighbours
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import locking, telemetry
from aoarm_jax.runs import text as text_lib

_SECONDS_BETWEEN_LINES = 15.0


def prepare(config: config_lib.Config, out: epath.Path) -> str:
  """Prepare the text of a config, and return the report.

  Args:
    config: its section data says what is prepared.
    out: folder of the prepared text, on this machine.

  Raises:
    ConfigError: the config names no text or several processes, or another
      program prepares there.
    DataError: see preparing.prepare.
  """
  if neighbours.several():
    raise config_lib.ConfigError(
      "config.distributed.enabled=True: --mode=prepare runs on one machine, "
      "with config.data.workers processes"
    )
  if not config.data.path:
    raise config_lib.ConfigError(
      "config.data.path='': --mode=prepare needs a file or a folder of text; "
      "the built-in text needs no preparing"
    )
  if "://" in str(out):
    raise config_lib.ConfigError(
      f"--out={out}: shards are written to this machine: name a folder here, "
      "and copy it afterwards"
    )
  source = paths.of(config.data.path, "config.data.path")
  if os.path.realpath(source) in _and_parents(out):
    raise config_lib.ConfigError(
      f"--out={out}: lies in config.data.path={source}, whose files are all "
      "read: name a folder beside it"
    )
  if "://" not in str(source) and shards.is_prepared(source):
    raise config_lib.ConfigError(
      f"config.data.path={source}: is a prepared text already: train with it, "
      "or name the text that it came from"
    )
  run_dir.check_workdir(out, "--out")
  with locking.lock(out, "--out", "preparing a text"):
    index = preparing.prepare(config.data, out, _Progress())
  return report(index, out)


def _and_parents(path):
  """Return the real paths of a folder and of all folders that it lies in."""
  real = epath.Path(os.path.realpath(path))
  return {str(folder) for folder in (real, *real.parents)}


class _Progress:
  """Logs what is done and the time left, every 15 seconds at most."""

  def __init__(self) -> None:
    self._what, self._begun = "", 0.0
    self._first, self._last_line = 0, 0.0

  def __call__(self, what: str, done: int, total: int) -> None:
    now = time.monotonic()
    if what != self._what:
      self._what, self._begun, self._first = what, now, done
      self._last_line = now
    if now - self._last_line < _SECONDS_BETWEEN_LINES:
      return
    self._last_line = now
    speed = (done - self._first) / (now - self._begun)
    line = f"{what}: {done / 1e6:,.0f} MB"
    if total:
      line = f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
    line += f"  {speed / 1e6:.2g} MB/s"
    if total and speed:
      line += f"  ETA {telemetry.format_duration((total - done) / speed)}"
    logging.info("%s", line)


def report(index: dict[str, Any], out: epath.Path) -> str:
  """Return the report of a prepared text, as lines for people.

  Args:
    index: the content of its index.
    out: the folder.
  """
  facts, tokenizer = index["report"], index["tokenizer"]
  lines = [
    f"{out}: {text_lib.counted(facts['documents'], 'document')}, "
    f"{facts['bytes']:,} bytes of text, from "
    f"{text_lib.counted(facts['files'], 'file')}",
    f"tokenizer: {tokenizer['name']}, {tokenizer['V']:,} symbols",
    "split        documents           tokens            bytes  bytes a token  "
    "shards",
  ]
  for name, split in index["splits"].items():
    lines.append(
      f"{name:<6}  {split['documents']:>14,}  {split['tokens']:>15,}  "
      f"{split['bytes']:>15,}  {split['bytes'] / split['tokens']:>13.3f}  "
      f"{len(split['shards']):>6,}"
    )
  if repeated := facts["documents_that_repeat_another"]:
    lines.append(f"documents that repeat an earlier one: {repeated:,}")
  if empty := facts["empty_documents"]:
    lines.append(
      f"empty documents, which are left out: {empty:,}; the first is "
      f"{facts['first_empty_document']}"
    )
  lines.append("longest documents:")
  lines += [
    f"  {document['bytes']:>15,} bytes  {document['name']}"
    for document in facts["longest_documents"]
  ]
  wanted = ("train", "valid")
  if absent := [name for name in wanted if name not in index["splits"]]:
    lines.append(
      f"no document is in {' and in '.join(absent)}, which training reads: "
      "name files after the splits, or raise --config.data.held_out_share"
    )
  return "\n".join(lines)
