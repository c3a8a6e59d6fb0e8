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

import time
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.runs import checkpoint, identity

BRANCH = "branch"
_RESERVE_SECONDS = 5.0  # For a save, before time is up.


class OutOfTimeError(Exception):
  """The time of this process is up; the state is saved."""


class Keeper:
  """Saves the states of one run, and says when time is up."""

  def __init__(
    self,
    config: config_lib.Config,
    trunk: epath.Path,
    branch: epath.Path,
    *,
    text: dict[str, str],
    deadline: float | None,
  ):
    """Opens both folders, which need not exist.

    Args:
      config: of the run.
      trunk: folder of the trunk's states.
      branch: folder of the branch's states.
      text: hashes of the splits, which a state must be of.
      deadline: on time.monotonic's clock; None: no limit.
    """
    self._config, self._text, self._deadline = config, text, deadline
    self._start = config.train.steps - config.optimizer.decay_steps
    self._trunk = checkpoint.Checkpoints(trunk, keep_last=2, keep_best=0)
    self._branch = checkpoint.Checkpoints(branch, keep_last=1, keep_best=0)

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
    """
    place = self._trunk if step <= self._start else self._branch
    place.save(
      step,
      state,
      data_state={"losses": losses, **identity.record(self._text)},
      config_json=config_lib.to_json(self._config),
    )
    if self._is_late():
      place.wait()
      raise OutOfTimeError(f"time is up at step {step:,}, which is saved")

  def close(self) -> None:
    """Waits for the last save of both folders."""
    self._trunk.close()
    self._branch.close()

  def _is_late(self):
    if self._deadline is None:
      return False
    return time.monotonic() > self._deadline - _RESERVE_SECONDS
