"""Checkpoints: asynchronous saves, verified restores (the only orbax user).

On disk, in the directory of checkpoints:

  500/                  a step, written by orbax under another name first
    state/ ...          the arrays, as nested dicts with string keys
    manifest.json       written last: format version, step, metric, config,
                        data iterator state, leaf shapes, file checksums
  550.orbax-checkpoint-tmp...   a save in flight, or one that was killed

A step counts once its manifest stands, and older steps are deleted only after
that, manifest first. So a process killed at any moment, also while saving or
deleting, leaves a whole checkpoint behind once the first one was whole.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1

from aoarm_jax.devices import distributed
from aoarm_jax.runs import manifest, text

FORMAT_VERSION = manifest.FORMAT_VERSION
CheckpointError = manifest.CheckpointError
Saved = manifest.Saved

_STATE = "state"
# Said by process 0 instead of a step.
_NONE, _ERROR = -1, -2


class Checkpoints:
  """The checkpoints of one run.

  Reading (`steps`, `newest`, `best`, `at`, `restore`) never writes, so another
  process may evaluate while the run goes on. All processes of a run call
  `save`, `wait` and `close` together; process 0 alone writes manifests and
  deletes. Not thread-safe.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep_last: int, keep_best: int
  ):
    """Opens a directory, which need not exist: the first save creates it.

    Args:
      directory: folder or bucket path ("gs://...").
      keep_last: newest steps kept, at least 1.
      keep_best: steps of lowest metric kept besides, at least 0.
    """
    if keep_last < 1 or keep_best < 0:
      raise CheckpointError(
        f"keep_last={keep_last}, keep_best={keep_best}: keep at least 1 last "
        "and 0 best checkpoints"
      )
    path = epath.Path(directory)
    if "://" not in str(path):  # Orbax takes absolute paths only.
      path = epath.Path(os.path.abspath(path.expanduser()))
    self._steps = manifest.Steps(path)
    self._keep_last, self._keep_best = keep_last, keep_best
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="checkpoint"
    )
    self._pending = None  # (step, future) of the save in flight.
    _quiet_orbax()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      self.close()
    elif late := self._drain():  # The first error is the one to show.
      logging.error("%s", late)

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: dict[str, Any],
    config_json: str,
    metric: float | None = None,
  ) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Waits for the save before, if it is still under way. A step that stands
    whole is not written again, but takes the metric if it had another; a step
    that stands broken is replaced.

    Args:
      step: optimizer steps taken.
      state: any pytree of arrays; typed PRNG keys are fine.
      data_state: the data iterator's state, JSON values only.
      config_json: the whole configuration.
      metric: what `best` minimises, e.g. validation nats per token.

    Raises:
      CheckpointError: this save cannot start, or the one before failed.
    """
    self.wait()
    if distributed.process_0_says(lambda: self._stands(step, metric)):
      return
    leaves = _leaves_by_name(state)
    # dumps and loads: the caller may go on changing its dict.
    record = {
      "format_version": FORMAT_VERSION,
      "step": int(step),
      "metric": None if metric is None else float(metric),
      "config": config_json,
      "data_state": json.loads(json.dumps(data_state)),
      "leaves": _described(leaves),
    }
    start = time.monotonic()
    try:
      self._steps.directory.mkdir(parents=True, exist_ok=True)
      with jax.transfer_guard("allow"), _context():
        response = v1.save_checkpointables_async(
          self._steps.at(step), {_STATE: _nest(_not_empty(leaves))}
        )
    except Exception as error:
      raise self._save_error(step, error) from error
    self._pending = (
      step,
      self._thread.submit(self._finish, response, record, start),
    )

  def wait(self) -> None:
    """Returns when the last save is whole on disk.

    Raises:
      CheckpointError: it failed; reported once.
    """
    pending = self._pending is not None
    error = self._drain()
    if pending and jax.process_count() > 1:
      # Only process 0 knows when the manifest stands.
      multihost_utils.sync_global_devices("aoarm_jax_checkpoint_wait")
    if error:
      raise error

  def close(self) -> None:
    """Waits, then frees the thread; errors as in `wait`."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def steps(self) -> list[int]:
    """Steps with a manifest, ascending; whether they verify is not asked."""
    return self._steps.finished()

  def newest(self) -> Saved | None:
    """The newest whole step, or None if no checkpoint was ever completed.

    Every file that a restore reads is compared with the manifest, by process 0,
    whose step all take. Broken or interrupted steps newer than the returned one
    are logged as warnings.

    Raises:
      CheckpointError: there are checkpoints but none is whole, or the newest
        is of another format version.
    """
    return self._agreed(self._steps.newest)

  def best(self) -> Saved | None:
    """The whole step of lowest metric, or None if none was saved with one.

    Warnings and errors as for `newest`.
    """
    return self._agreed(self._steps.best)

  def at(self, step: int) -> Saved:
    """One step, verified.

    Raises:
      CheckpointError: it is absent, broken or of another format version.
    """
    try:
      return self._steps.verified(step)
    except manifest.BrokenError as error:
      raise CheckpointError(
        f"checkpoint step {step} in {self._steps.directory} cannot be used: "
        f"{error}; steps there: {_listed(self.steps())}"
      ) from error

  def restore(self, saved: Saved, abstract_state: Any) -> Any:
    """Reads a state, or some of its top-level parts.

    Args:
      saved: what `newest`, `best` or `at` returned (they verify, this not).
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any
        devices (no sharding: the default device). Top-level parts may be left
        out, e.g. {"params": ...} for evaluation; inside a part every leaf is
        wanted. Containers need not be those of the saved state: leaves are
        matched by their names (keys, fields, indices).

    Returns:
      The pytree of jax.Array, with the structure and shardings asked for.

    Raises:
      CheckpointError: a leaf differs in shape or dtype or is missing on one
        side, or the files cannot be read.
    """
    directory = self._steps.at(saved.step)
    wanted = _leaves_by_name(abstract_state)
    wanted = {names: _with_sharding(x) for names, x in wanted.items()}
    try:
      self._steps.check_leaves(saved.step, _described(wanted))
      with jax.transfer_guard("allow"), _context():
        tree = v1.load(
          directory,
          _nest(_not_empty(wanted)),
          checkpointable_name=_STATE,
        )
        leaves = [
          _lookup(tree, names)
          if leaf.size
          else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
          for names, leaf in wanted.items()
        ]
    except CheckpointError:
      raise
    except Exception as error:
      raise CheckpointError(
        f"cannot read checkpoint {directory}: {text.first_line(error)}; if a "
        "run is training there it may have removed it just now: try again"
      ) from error
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

  def _agreed(self, find):
    """What process 0 finds, on all: a disk may show each another step."""
    found = error = None

    def step():
      nonlocal found, error
      try:
        found = find()
      except CheckpointError as problem:
        error = problem
        return _ERROR
      return found.step if found else _NONE

    step = distributed.process_0_says(step)
    if error:
      raise error
    if step == _ERROR:
      raise CheckpointError(
        f"process 0 can use no checkpoint in {self._steps.directory}; its "
        "message says why"
      )
    if step == _NONE or found:
      return found
    try:
      return self._steps.unverified(step)
    except manifest.BrokenError as error:
      raise CheckpointError(
        f"checkpoint step {step} in {self._steps.directory}, which process 0 "
        f"takes, cannot be read here: {error}"
      ) from error

  def _stands(self, step, metric):
    """Whether the step stands whole; removes it if it stands broken."""
    directory = self._steps.at(step)
    if not directory.exists():
      return False
    try:
      self._steps.verified(step)
    except manifest.BrokenError as error:
      logging.warning("%s is broken: %s; it is replaced", directory, error)
      self._steps.delete(step)
      return False
    record = self._steps.record(step)
    if metric is not None and metric != record["metric"]:
      manifest.write(directory, record | {"metric": float(metric)})
    return True

  def _finish(self, response, record, start):
    """In the thread: waits for orbax, then makes the step a checkpoint."""
    step = record["step"]
    directory = self._steps.at(step)
    try:
      response.result()
      if jax.process_index() != 0:
        return
      files = manifest.checksums(directory)
      manifest.write(directory, record | {"files": files})
    except Exception:
      # Half a checkpoint would keep a full disk full.
      if jax.process_index() == 0:
        with contextlib.suppress(OSError):
          self._steps.clean()
      raise
    logging.info(
      "saved checkpoint step %d: %.1f MB in %.2f s",
      step,
      sum(f["bytes"] for f in files.values()) / 1e6,
      time.monotonic() - start,
    )
    try:
      self._steps.retain(step, self._keep_last, self._keep_best)
      self._steps.clean()
    except OSError as error:  # The save itself stands.
      logging.warning("cannot delete old checkpoints: %s", error)

  def _drain(self):
    """Waits for the save in flight; returns its error, or None."""
    if self._pending is None:
      return None
    step, future = self._pending
    error = future.exception()
    self._pending = None
    return None if error is None else self._save_error(step, error)

  def _save_error(self, step, error):
    wrapped = CheckpointError(
      f"checkpoint step {step} was not saved in {self._steps.directory}: "
      f"{text.first_line(error)}; mend that (free space? permissions?) and run "
      f"again; whole steps there: {_listed(self.steps())}"
    )
    wrapped.__cause__ = error
    return wrapped


def _context():
  context = v1.Context()
  # Random float32 shrinks by 8% only, in three times the time.
  context.array.saving.use_compression = False
  # A folder that cannot be made fails at once, not in a thread 10 s later.
  context.asynchronous.create_directories_asynchronously = False
  context.pytree.loading.partial_load = True
  return context


def _quiet_orbax():
  """Drops orbax's messages that say nothing new; its warnings pass."""
  logger = logging.get_absl_logger()
  if _passes not in logger.filters:
    logger.addFilter(_passes)
  if getattr(sys.unraisablehook, "func", None) is not _report_unraisable:
    sys.unraisablehook = functools.partial(
      _report_unraisable, sys.unraisablehook
    )


def _passes(record):
  if f"{os.sep}orbax{os.sep}" not in record.pathname:
    return True
  # Tens of INFO lines a save; and the tracebacks of every thread of a failed
  # save, whose error reaches us, and the user in one line, through result().
  return (
    record.levelno > logging.converter.STANDARD_INFO
    and "_SignalingThread.run() raised" not in str(record.msg)
  )


def _report_unraisable(report, unraisable):
  """`report`, but for the writes that outlive a failed save.

  The first write to fail ends the save and closes its event loop; each that
  was still under way then has nobody to tell, and prints a traceback.
  """
  # They name no object, unlike transports that a program forgot to close.
  if (
    unraisable.object is not None
    or str(unraisable.exc_value) != "Event loop is closed"
  ):
    report(unraisable)


def _leaves_by_name(tree):
  """{names from the root: leaf}, in the order of jax.tree.leaves.

  The names are those of dict keys, fields and indices, so that what lies on
  disk does not depend on the container types of this or that version.
  """
  leaves = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = tuple(_key_name(key) for key in path) or ("value",)
    # Orbax joins names by dots.
    if names in leaves or any("." in n or "/" in n for n in names):
      raise CheckpointError(
        f"leaf {jax.tree_util.keystr(path)}: names must be unique, without "
        "dots and slashes, to be saved; rename it"
      )
    leaves[names] = leaf
  return leaves


def _key_name(key):
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def _nest(leaves):
  tree = {}
  for names, leaf in leaves.items():
    node = tree
    for name in names[:-1]:
      node = node.setdefault(name, {})
    node[names[-1]] = leaf
  return tree


def _not_empty(leaves):
  """Orbax refuses arrays of size zero; their shapes are in the manifest."""
  return {names: leaf for names, leaf in leaves.items() if leaf.size}


def _lookup(tree, names):
  for name in names:
    tree = tree[name]
  return tree


def _described(leaves):
  """{name: dtype and shape}, e.g. {"params/w": "float32[3,7]"}."""
  return {
    "/".join(names): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    for names, leaf in leaves.items()
  }


def _with_sharding(leaf):
  """Always a sharding: else orbax takes the one saved, on absent devices."""
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(
    jax.local_devices()[0]
  )
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _listed(steps):
  return ", ".join(map(str, steps)) or "none"
