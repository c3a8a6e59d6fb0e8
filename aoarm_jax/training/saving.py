"""Saves of a run: in its run directory, or beside it if that is lost."""

import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import distributed
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import checkpoint, identity, locking
from aoarm_jax.runs import text as text_lib


class Saver:
  """Saves the state of a run.

  If the run directory was removed or replaced, or another run has saved there,
  the state is saved in another directory and the run stops.
  """

  def __init__(
    self,
    network: network_lib.Network,
    workdir: epath.Path,
    text: dict[str, str],
    checkpoints: checkpoint.Checkpoints,
    is_there: Callable[[], bool],
    *,
    describe: Callable[[epath.Path], None],
    position: Callable[[], dict[str, Any]],
  ) -> None:
    """Save nothing yet.

    Args:
      network: the network of the run.
      workdir: run directory.
      text: sha256 of every split that the run reads, by the split's name.
      checkpoints: the checkpoints in the run directory.
      is_there: returns whether the run directory still stands at its path.
      describe: writes the files that explain the run into a directory.
      position: returns where the run is besides its state, as JSON values: the
        state of the data iterator, and the sums since the last log line.
    """
    self._network, self._text = network, text
    self._workdir, self._checkpoints = workdir, checkpoints
    self._is_there = is_there
    self._describe, self._position = describe, position

  def save(
    self,
    step: int,
    state: Any,
    metric: float | None = None,
  ) -> None:
    """Start to save a checkpoint.

    Args:
      step: optimizer steps taken.
      state: the training state.
      metric: the validation loss of the state, if it is known.

    Raises:
      EvictedError: another run has saved the step in the run directory.
      CheckpointError: see Checkpoints.save.
    """
    try:
      self._save_in(self._checkpoints, step, state, metric)
    except checkpoint.ForeignStepError as error:
      self._save_elsewhere(step, state, str(error))

  def check_place(self, step: int, state: Any) -> None:
    """Stop with the state saved elsewhere if the run directory is gone.

    Args:
      step: see `save`.
      state: see `save`.

    Raises:
      EvictedError: it is gone.
    """
    if not distributed.process_0_says(self._is_there):
      self._save_elsewhere(
        step,
        state,
        f"--workdir={self._workdir} was removed, moved or replaced while this "
        "run trained there",
      )

  def _save_in(self, checkpoints, step, state, metric=None):
    """Start to save a checkpoint in one of two directories."""
    network, text = self._network, self._text
    checkpoints.save(
      step,
      state,
      data_state={
        **self._position(),
        **identity.record(text, network.tokenizer.sha256),
      },
      config_json=config_lib.to_json(network.config),
      metric=metric,
      tokenizer=network.tokenizer.state,
      is_ours=lambda saved: identity.is_same_run(
        saved, network.config, text, network.tokenizer.sha256
      ),
    )

  def _save_elsewhere(self, step, state, reason):
    """Save the state beside the run directory; raise EvictedError.

    Where the run has one process, the folder for temporary files is the second
    choice.
    """
    places = [lambda: identity.another(self._workdir)]
    if jax.process_count() == 1:
      places.append(lambda: epath.Path(tempfile.mkdtemp(prefix="aoarm_jax-")))
    problems = []
    for place in places:
      try:
        folder = place()
        with checkpoint.Checkpoints(
          folder / "checkpoints", keep_last=1, keep_best=0
        ) as checkpoints:
          self._save_in(checkpoints, step, state)
        self._describe(folder)
      except (OSError, checkpoint.CheckpointError) as error:
        problems.append(text_lib.first_line(error))
        continue
      raise locking.EvictedError(
        f"{reason}; step {step:,} is saved in {folder}: the same command with "
        f"--workdir={folder} continues from there"
      )
    raise locking.EvictedError(
      f"{reason}; step {step:,} could not be saved elsewhere either: "
      + "; ".join(problems)
    )
