"""Checkpoints: asynchronous saves and verified restores.

The directory of checkpoints holds:

  500/                  A step. Orbax writes it under a temporary name first.
    state/ ...          The arrays, see arrays.py.
    tokenizer.json      State of the tokenizer, unless the config fixes it.
    manifest.json       Written last: format version, step, metric, config,
                        state of the data iterator, shapes, file checksums.
  550.orbax-checkpoint-tmp...   A save that is running, or that was killed.

A step counts as a checkpoint once its manifest is written. Older steps are
deleted only after that, and their manifests are deleted first. So after the
first complete checkpoint there is always one, even if the process is killed
while it saves or deletes.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import time
import types
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from aoarm_jax.config import reading
from aoarm_jax.data import alphabets
from aoarm_jax.devices import distributed, neighbours, waits
from aoarm_jax.runs import arrays, disk, manifest, text
from aoarm_jax.runs import steps as steps_lib

FORMAT_VERSION = manifest.FORMAT_VERSION
CheckpointError = manifest.CheckpointError
Saved = manifest.Saved

TOKENIZER = alphabets.FILE
# A step that is to be saved may stand on disk already.
_ABSENT, _OURS, _FOREIGN = 0, 1, 2
# Process 0 broadcasts one of these numbers if it has no step to broadcast.
_NONE, _ERROR = -1, -2


class ForeignStepError(CheckpointError):
  """A step that is to be saved stands on disk, and another run saved it."""


class Checkpoints:
  """The checkpoints of one run.

  The methods that read (`steps`, `newest`, `best`, `at`, `restore`) never
  write. So another process may evaluate while the run continues. All processes
  of a run call `save`, `wait` and `close` together. Only process 0 writes
  manifests and deletes. The class is not thread-safe.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep_last: int,
    keep_best: int,
    notice_seconds: float = 0,
  ) -> None:
    """Open a directory. It need not exist, since the first save creates it.

    Args:
      directory: folder or bucket path ("gs://...").
      keep_last: number of newest steps to keep, at least 1.
      keep_best: number of steps with the lowest metric to keep in addition, at
        least 0.
      notice_seconds: the first save that takes longer is warned of; 0 warns of
        none.

    Raises:
      CheckpointError: keep_last or keep_best is too small.
    """
    if keep_last < 1 or keep_best < 0:
      raise CheckpointError(
        f"keep_last={keep_last}, keep_best={keep_best}: keep at least 1 last "
        "and 0 best checkpoints"
      )
    path = epath.Path(directory)
    if "://" not in str(path):
      # Orbax accepts only absolute paths.
      path = epath.Path(os.path.abspath(path))
    self._steps = steps_lib.Steps(path)
    self._keep_last, self._keep_best = keep_last, keep_best
    self._notice_seconds = notice_seconds
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="checkpoint"
    )
    # The step and the future of the save that is running.
    self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
    arrays.quiet_orbax()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    if error is None:
      self.close()
    elif not neighbours.is_lost(error):
      # Orbax would wait for minutes for a process that is gone.
      if save_error := self._drain():
        # `error` came first, so it is raised, and the later one is only logged.
        logging.error("%s", save_error)
      self._thread.shutdown()

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: dict[str, Any],
    config_json: str,
    metric: float | None = None,
    tokenizer: bytes = b"",
    is_ours: Callable[[Saved], bool] = lambda saved: True,
  ) -> None:
    """Start to save a step. The state may be donated as soon as this returns.

    The call first waits for the previous save. A step that is complete on disk
    is not written again, and only its metric is replaced if the new one
    differs. A step that is broken on disk is replaced.

    Args:
      step: optimizer steps taken.
      state: any pytree of arrays, which may include typed PRNG keys.
      data_state: the state of the data iterator, JSON values only.
      config_json: the whole configuration.
      metric: the number that `best` minimises, such as validation nats per
        token.
      tokenizer: the state of the tokenizer, which is written beside the arrays;
        b"" writes none.
      is_ours: whether a step that is complete on disk was saved by this run.

    Raises:
      ForeignStepError: another run has saved the step.
      CheckpointError: this save cannot start, or the previous save failed.
    """
    self.wait()
    standing = distributed.process_0_says(
      lambda: self._stands(step, metric, is_ours)
    )
    if standing == _FOREIGN:
      raise ForeignStepError(
        f"checkpoint step {step} in {self._steps.directory} was saved by "
        "another run since this run looked"
      )
    if standing == _OURS:
      return
    leaves = arrays.by_name(state)
    # The caller may change its dict later, so dumps and loads copy it.
    record = {
      "format_version": FORMAT_VERSION,
      "step": int(step),
      "metric": None if metric is None else float(metric),
      "config": config_json,
      "data_state": json.loads(json.dumps(data_state)),
      "leaves": arrays.described(leaves),
    }
    start = time.monotonic()
    try:
      self._steps.directory.mkdir(parents=True, exist_ok=True)
      with waits.ending_at_sigterm():
        response = arrays.save(self._steps.at(step), leaves)
    except Exception as error:
      self._clean_after_failure()
      raise self._save_error(step, error) from error
    self._pending = (
      step,
      self._thread.submit(self._finish, response, record, tokenizer, start),
    )

  def wait(self) -> None:
    """Wait until the last save is complete on disk.

    Raises:
      CheckpointError: the save failed. The error is raised once.
    """
    pending = self._pending is not None
    with waits.ending_at_sigterm():
      if error := self._drain():
        raise error  # The others are told, wherever they wait.
      if pending and jax.process_count() > 1:
        # Only process 0 writes the manifest, so the others wait for it.
        multihost_utils.sync_global_devices("aoarm_jax_checkpoint_wait")

  def close(self) -> None:
    """Wait for the last save and free the thread.

    Raises:
      CheckpointError: see `wait`.
    """
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  @property
  def directory(self) -> epath.Path:
    """The folder of the steps."""
    return self._steps.directory

  def steps(self) -> list[int]:
    """Return the steps that have a manifest, ascending, without verifying."""
    return self._steps.finished()

  def files(self, step: int) -> dict[str, Any]:
    """Return the sizes and checksums of a step's files, from its manifest.

    Raises:
      CheckpointError: this process cannot read the manifest.
    """
    try:
      files: dict[str, Any] = self._steps.record(step)["files"]
    except manifest.BrokenError as error:
      raise CheckpointError(
        f"checkpoint step {step} in {self._steps.directory} cannot be used: "
        f"{error}"
      ) from error
    return files

  def newest(self) -> Saved | None:
    """Return the newest complete step, or None if there is no checkpoint.

    Process 0 compares every file that a restore reads with the manifest, and
    all processes take its choice. A warning names every broken or interrupted
    step that is newer than the returned one.

    Raises:
      CheckpointError: there are checkpoints but none is complete, or the newest
        has another format version.
    """
    return self._agreed(self._steps.newest)

  def best(self) -> Saved | None:
    """Return the complete step with the lowest metric.

    Warnings and errors are those of `newest`.

    Returns:
      The step, or None if no step was saved with a metric.
    """
    return self._agreed(self._steps.best)

  def at(self, step: int) -> Saved:
    """Return one step after verifying its files.

    Raises:
      CheckpointError: the step is absent, broken or has another format version.
    """
    try:
      return self._steps.verified(step)
    except manifest.BrokenError as error:
      raise CheckpointError(
        f"checkpoint step {step} in {self._steps.directory} cannot be used: "
        f"{error}; steps there: {_listed(self.steps())}"
      ) from error

  def tokenizer(self, saved: Saved) -> bytes:
    """Return the state of the tokenizer in a step; b"" if there is none.

    Args:
      saved: a step that `newest`, `best` or `at` returned.

    Raises:
      CheckpointError: the state is missing, or is not what was saved.
    """
    wanted = saved.data_state.get("tokenizer", "")
    if not wanted:
      return b""
    directory = self._steps.at(saved.step)
    path = directory / TOKENIZER
    try:
      state = reading.read(path, reading.JSON_BYTES, inside=directory)
    except (OSError, reading.ReadError) as error:
      raise CheckpointError(
        f"{path}: the tokenizer cannot be read: {text.first_line(error)}"
      ) from error
    if hashlib.sha256(state).hexdigest() != wanted:
      raise CheckpointError(
        f"{path}: not the tokenizer that was saved (the sha256 differs): "
        "restore that folder from a copy"
      )
    return state

  def restore(self, saved: Saved, abstract_state: Any) -> Any:
    """Read a state, or some of its top-level parts.

    Args:
      saved: a step that `newest`, `best` or `at` returned. These methods verify
        the files; `restore` does not verify them again.
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings on any
        devices. A leaf without a sharding goes to the default device. Top-level
        parts may be left out, as in {"params": ...} for evaluation. Inside a
        part every leaf must be there. Leaves are matched by their names (keys,
        fields, indices), so the container types may differ from the saved ones.

    Returns:
      The pytree of jax.Array with the structure and shardings of
      `abstract_state`.

    Raises:
      CheckpointError: a leaf differs in shape or dtype or is missing on one
        side, or the files cannot be read.
    """
    directory = self._steps.at(saved.step)
    wanted = arrays.placed(arrays.by_name(abstract_state))
    try:
      self._steps.check_leaves(saved.step, arrays.described(wanted))
      leaves = arrays.load(directory, wanted)
    except CheckpointError:
      raise
    except Exception as error:
      raise CheckpointError(
        f"cannot read checkpoint {directory}: {text.first_line(error)}; if a "
        "run is training there it may have removed it just now: try again"
      ) from error
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

  def _agreed(self, find):
    """Broadcast process 0's choice of checkpoint to all processes.

    Every process may see another newest step on a shared disk, so they must not
    choose for themselves.

    Args:
      find: function that returns a Saved or None.
    """
    saved = error = None

    def find_step():
      nonlocal saved, error
      try:
        saved = find()
      except CheckpointError as problem:
        error = problem
        return _ERROR
      return saved.step if saved else _NONE

    step = distributed.process_0_says(find_step)
    if error:
      raise error
    if step == _ERROR:
      raise CheckpointError(
        f"process 0 can use no checkpoint in {self._steps.directory}; its "
        "message says why"
      )
    if step == _NONE or saved:
      return saved
    try:
      return self._steps.unverified(step)
    except manifest.BrokenError as broken:
      raise CheckpointError(
        f"checkpoint step {step} in {self._steps.directory}, which process 0 "
        f"takes, cannot be read here: {broken}"
      ) from broken

  def _stands(self, step, metric, is_ours):
    """Say what stands on disk for a step; delete a broken step.

    The metric of a complete step of this run is replaced if the new metric
    differs.

    Returns:
      _ABSENT, _OURS or _FOREIGN.
    """
    directory = self._steps.at(step)
    if manifest.is_link(directory) and not directory.exists():
      logging.warning("%s leads nowhere; it is replaced", directory)
      self._steps.delete(step)
    if not directory.exists():
      return _ABSENT
    try:
      saved = self._steps.verified(step)
    except manifest.BrokenError as error:
      logging.warning("%s is broken: %s; it is replaced", directory, error)
      self._steps.delete(step)
      return _ABSENT
    if not is_ours(saved):
      return _FOREIGN
    if metric is not None and metric != saved.metric:
      record = self._steps.record(step)
      manifest.write(directory, record | {"metric": float(metric)})
    return _OURS

  def _finish(self, response, record, tokenizer, start):
    """Wait for orbax, then write the manifest; runs in the thread."""
    step = record["step"]
    directory = self._steps.at(step)
    try:
      response.result()
      if jax.process_index() != 0:
        return
      with neighbours.saving():
        if tokenizer:
          disk.write_atomically(directory / TOKENIZER, tokenizer)
        files = manifest.checksums(directory)
        manifest.write(directory, record | {"files": files})
    except Exception:
      self._clean_after_failure()
      raise
    seconds = time.monotonic() - start
    logging.info(
      "saved checkpoint step %d: %.1f MB in %.2f s",
      step,
      sum(f["bytes"] for f in files.values()) / 1e6,
      seconds,
    )
    if 0 < self._notice_seconds < seconds:
      logging.warning(
        "this save took longer than the %g s from SIGTERM to the kill "
        "(config.distributed.notice_seconds): a preempted run goes on from the "
        "checkpoint before; raise the launcher's --grace-seconds or "
        "--notice-seconds, or lower config.checkpoint.every",
        self._notice_seconds,
      )
      self._notice_seconds = 0  # Once is enough.
    try:
      self._steps.retain(step, self._keep_last, self._keep_best)
      self._steps.clean()
    except OSError as error:
      # The save itself has succeeded, so this is only a warning.
      logging.warning("cannot delete old checkpoints: %s", error)

  def _clean_after_failure(self):
    """Delete the remains of a save that failed.

    If the disk is full, half a checkpoint would keep it full. Writes that are
    still running may add files meanwhile, so the folder is looked at again.
    """
    if jax.process_index() != 0:
      return
    for pause in (0.0, 0.1, 0.5):
      time.sleep(pause)
      with contextlib.suppress(OSError):
        self._steps.clean()
        if not self._steps.remains():
          return

  def _drain(self):
    """Wait for the running save and return its CheckpointError or None."""
    if self._pending is None:
      return None
    step, future = self._pending
    error = future.exception()
    self._pending = None
    return None if error is None else self._save_error(step, error)

  def _save_error(self, step, error):
    """Return the CheckpointError for a save that failed with `error`."""
    wrapped = CheckpointError(
      f"checkpoint step {step} was not saved in {self._steps.directory}: "
      f"{arrays.reason(error)}; mend that (free space? permissions?) and run "
      f"again; whole steps there: {_listed(self.steps())}"
    )
    wrapped.__cause__ = error
    return wrapped


def _listed(steps):
  return ", ".join(map(str, steps)) or "none"
