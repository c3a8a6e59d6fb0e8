"""Runs that can be interrupted, and that share a trunk.

With config.study.decay_share a run is a trunk, at a constant rate after its
warmup, and a branch, in which the rate decays to zero. Runs that differ by
their steps alone have the same trunk, so its states are kept:

  trunks/<trunk>/<step>/   the two newest states at a constant rate; a branch's
                           start is one of them when the branch begins
  cells/<cell>/branch/     the newest state of a branch that is under way

A run goes on from the latest state that belongs to it. The result is that of a
run without interruption, bit for bit.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.devices import stopping
from aoarm_jax.runs import checkpoint, identity

BRANCH = "branch"
_RESERVE_SECONDS = 5.0  # For a save, before time is up.


class OutOfTimeError(Exception):
  """The time of this process is up; the state is saved."""


class GoneError(Exception):
  """The folder of the states is gone; the state is saved elsewhere."""


class Keeper:
  """Saves the states of one run, and says when time is up.

  As a context, it takes SIGTERM and Ctrl-C for the end of the time.
  """

  def __init__(
    self,
    config: config_lib.Config,
    trunk: epath.Path,
    branch: epath.Path,
    *,
    text: dict[str, str],
    deadline: float | None,
    where: Callable[[epath.Path], epath.Path] = lambda folder: folder,
  ):
    """Opens both folders, which need not exist.

    Args:
      config: of the run.
      trunk: folder of the trunk's states.
      branch: folder of the branch's states.
      text: hashes of the splits, which a state must be of.
      deadline: on time.monotonic's clock; None: no limit.
      where: returns the place of a folder at a save, see place.Place.of.
    """
    self._config, self._text, self._deadline = config, text, deadline
    self._start = config.train.steps - config.optimizer.decay_steps
    self._folders, self._where = (trunk, branch), where
    self._trunk = checkpoint.Checkpoints(trunk, keep_last=2, keep_best=0)
    self._branch = checkpoint.Checkpoints(branch, keep_last=1, keep_best=0)
    self._signals = stopping.Signals("step", (signal.SIGTERM, signal.SIGINT))

  def __enter__(self) -> "Keeper":
    self._signals.__enter__()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._signals.__exit__()
    if kind is None and self._signals.received:
      # The signal came after the last save, so it does what it does elsewhere.
      signal.raise_signal(self._signals.received)

  def restore(self, abstract: Any) -> tuple[int, Any, list[float]] | None:
    """Returns (step, state, losses) to go on from; None to begin anew.

    Args:
      abstract: the state's shapes, with shardings.

    Raises:
      CheckpointError: the saved state has another form.
      DataError: the saved state was trained on another text, or with another
        switch of random numbers.
    """
    places = (self._branch, self._trunk)
    found = ((place, self._latest(place)) for place in places)
    place, saved = next((pair for pair in found if pair[1]), (None, None))
    if place is None or saved is None:
      return None
    for kind, name, then, now in identity.differences(saved, text=self._text):
      raise corpora.DataError(
        f"config.data.path={self._config.data.path!r}: a state of this run, at "
        f"step {saved.step}, is of another text; choose another --workdir"
        if kind == "text"
        else f"{name}={now!r}: a state of this run, at step {saved.step}, has "
        f"{then!r}; set it back, or choose another --workdir"
      )
    state = place.restore(saved, abstract)
    logging.info("  goes on from step %s", f"{saved.step:,}")
    return saved.step, state, saved.data_state["losses"]

  def _latest(self, place):
    last = self._start if place is self._trunk else self._config.train.steps
    for step in sorted(place.steps(), reverse=True):
      if step <= last:
        try:
          return place.at(step)
        except checkpoint.CheckpointError as error:
          logging.warning("%s; an earlier state is used", error)
    return None

  def due(self, step: int) -> bool:
    """Whether the state before `step` is to be saved, or time is up."""
    every = self._config.checkpoint.every
    return step == self._start or step % every == 0 or self._is_late()

  def save(self, step: int, state: Any, losses: list[float]) -> None:
    """Saves the state before `step`.

    Raises:
      OutOfTimeError: after the save, where time is up.
      Stopped: after the save, where a signal came.
      GoneError: after the save elsewhere, where the folder is gone.
    """
    is_trunk = step <= self._start
    place = self._trunk if is_trunk else self._branch
    folder = self._folders[0 if is_trunk else 1]
    if (other := self._where(folder)) != folder:
      with contextlib.suppress(checkpoint.CheckpointError):
        place.wait()  # The former save may have lost its folder.
      with checkpoint.Checkpoints(other, keep_last=1, keep_best=0) as saves:
        self._save_in(saves, step, state, losses)
      raise GoneError(f"step {step:,} is saved in {other}")
    self._save_in(place, step, state, losses)
    if not self._is_late():
      return
    place.wait()
    if number := self._signals.received:
      raise stopping.Stopped(
        f"{signal.Signals(number).name} at step {step:,} of this cell, which "
        "is saved: start the same command again to continue from there",
        number,
      )
    raise OutOfTimeError(f"time is up at step {step:,}, which is saved")

  def _save_in(self, place, step, state, losses):
    """Start to save a state in one of the directories."""
    place.save(
      step,
      state,
      data_state={"losses": losses, **identity.record(self._text)},
      config_json=config_lib.to_json(self._config),
    )

  def close(self) -> None:
    """Waits for the last save of both folders."""
    self._trunk.close()
    self._branch.close()

  def _is_late(self):
    if self._signals.received:
      return True
    if self._deadline is None:
      return False
    return time.monotonic() > self._deadline - _RESERVE_SECONDS
