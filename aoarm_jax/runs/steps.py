"""The steps in a directory of checkpoints: which are whole, which are kept."""

import math
import re
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from aoarm_jax.runs import manifest

# Mark in the name of a save that is running or was killed.
_ORBAX = ".orbax-checkpoint-tmp"
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
_LOOKS = 20  # Times that vanished steps make a reader look again.


class Steps:
  """The steps in one directory.

  Only `delete`, `clean` and `retain` change files. All other methods only read.

  Attributes:
    directory: folder of the steps. It need not exist.
  """

  def __init__(self, directory: epath.Path) -> None:
    self.directory = directory

  def at(self, step: int) -> epath.Path:
    """Return the folder of a step."""
    return self.directory / str(int(step))

  def folders(self) -> list[int]:
    """Return the steps that have a folder, complete or not, ascending."""
    if not self.directory.is_dir():
      return []
    # A link whose folder is gone is no step, and a file is no step.
    names = [path.name for path in self.directory.iterdir() if path.is_dir()]
    return sorted(int(n) for n in names if _NUMBER.fullmatch(n))

  def finished(self) -> list[int]:
    """Return the steps that have a manifest, ascending."""
    return [step for step in self.folders() if manifest.present(self.at(step))]

  def record(self, step: int) -> dict[str, Any]:
    """Return the record in a step's manifest.

    Raises:
      BrokenError: the manifest is missing, or is not what was written.
      CheckpointError: the manifest has another format version.
    """
    record = manifest.read(self.at(step))
    version = record["format_version"]
    if version != manifest.FORMAT_VERSION:
      raise manifest.CheckpointError(
        f"checkpoint step {step} in {self.directory} has format version "
        f"{version}, this code reads version {manifest.FORMAT_VERSION}: use "
        "the release that wrote it, or start in another directory"
      )
    manifest.check(record)
    if record["step"] != step:
      raise manifest.BrokenError(
        f"{manifest.NAME}: is of step {record['step']}"
      )
    return record

  def verified(self, step: int) -> manifest.Saved:
    """Return a step after comparing every file with the manifest.

    Raises:
      BrokenError: a file is missing, or is not what was written.
      CheckpointError: see `record`.
    """
    manifest.verify(self.at(step), self.record(step))
    return self.unverified(step)

  def unverified(self, step: int) -> manifest.Saved:
    """Return a step as its manifest describes it, without reading its files.

    Raises:
      BrokenError, CheckpointError: see `record`.
    """
    record = self.record(step)
    return manifest.Saved(
      step=record["step"],
      config_json=record["config"],
      data_state=record["data_state"],
      metric=record["metric"],
      parts=frozenset(name.partition("/")[0] for name in record["leaves"]),
      digest=manifest.digest(record["files"]),
    )

  def check_leaves(self, step: int, wanted: dict[str, str]) -> None:
    """Check that the leaves of a state match the saved leaves.

    A whole top-level part may be left out, but nothing inside a part.

    Args:
      step: the step to compare with.
      wanted: {"part/name": "float32[3,7]"} of the state asked for.

    Raises:
      CheckpointError: a leaf differs; names the first one.
      BrokenError: see `record`.
    """
    saved = self.record(step)["leaves"]
    parts = {name.partition("/")[0] for name in wanted}
    in_parts = [name for name in saved if name.partition("/")[0] in parts]
    for name in [*wanted, *in_parts]:
      have, want = saved.get(name, "absent"), wanted.get(name, "absent")
      if have != want:
        advice = "use the configuration saved there"
        if have.partition("[")[2] == want.partition("[")[2] != "":
          # The config decides shapes, and no types.
          advice = (
            "the types of a state are fixed, so another version of this "
            "program wrote it, or one with JAX_ENABLE_X64 or "
            "JAX_DEFAULT_PRNG_IMPL set: use that one, or start in another "
            "directory"
          )
        raise manifest.CheckpointError(
          f"leaf {name} is {have} in checkpoint {self.at(step)} but {want} in "
          f"the state asked for: {advice}"
        )

  def newest(self) -> manifest.Saved | None:
    """Return the newest complete step, see `checkpoint.Checkpoints.newest`."""
    return self._first_whole(lambda: self.folders()[::-1])

  def best(self) -> manifest.Saved | None:
    """Return the step of lowest metric, see `checkpoint.Checkpoints.best`."""
    return self._first_whole(self._by_metric)

  def delete(self, step: int) -> None:
    """Delete a step with all its files."""
    if manifest.is_link(self.at(step)):
      self.at(step).unlink()  # What it leads to belongs to somebody else.
      return
    # The manifest goes first, so that half a step never counts as a checkpoint.
    (self.at(step) / manifest.NAME).unlink(missing_ok=True)
    self.at(step).rmtree()

  def retain(self, saved_step: int, keep_last: int, keep_best: int) -> None:
    """Delete the steps that need not be kept now that `saved_step` is complete.

    Steps after `saved_step` are neither deleted nor counted. They are broken,
    and the run resumed from an earlier step.

    Args:
      saved_step: the step that was just saved.
      keep_last: number of newest steps to keep, at least 1.
      keep_best: number of steps with the lowest metric to keep in addition.
    """
    older = [step for step in self.finished() if step <= saved_step]
    best = self._by_metric()[:keep_best] if keep_best else []
    for step in older[:-keep_last]:
      if step not in best:
        self.delete(step)

  def remains(self) -> list[epath.Path]:
    """Return the folders of killed, failed or running saves."""
    if not self.directory.is_dir():
      return []
    unfinished = [
      self.at(step)
      for step in self.folders()
      if not manifest.present(self.at(step))
    ]
    marked = ((p, p.name.partition(_ORBAX)) for p in self.directory.iterdir())
    return unfinished + [
      path for path, (number, mark, _) in marked if mark and number.isdecimal()
    ]

  def clean(self) -> None:
    """Delete the remains of killed or failed saves.

    Raises:
      OSError: some could not be deleted; all were tried.
    """
    problems = []
    for path in self.remains():
      try:
        path.unlink() if manifest.is_link(path) else path.rmtree()
      except FileNotFoundError:
        pass
      except OSError as error:
        problems.append(error)
    if problems:
      raise problems[0]

  def _by_metric(self):
    """Return the steps whose metric is a number, lowest metric first."""
    metrics = []
    for step in self.finished():
      try:
        metric = self.record(step)["metric"]
      except manifest.BrokenError as error:
        self._warn(step, f"{error}; its metric is unknown")
        continue
      if metric is not None and not math.isnan(metric):
        metrics.append((metric, step))
    return [step for _, step in sorted(metrics)]

  def _first_whole(
    self, candidates: Callable[[], list[int]]
  ) -> manifest.Saved | None:
    """Return the first of `candidates()` that verifies, or None.

    A warning names every broken step before it.

    Raises:
      CheckpointError: there are steps with a manifest, but none is complete.
    """
    problems: dict[int, manifest.BrokenError] = {}
    saved, looks = None, _LOOKS
    steps = candidates()
    while steps and saved is None:
      step = steps.pop(0)
      try:
        saved = self.verified(step)
      except manifest.BrokenError as error:
        if self.at(step).exists():
          problems[step] = error
          continue
        # A running training has just deleted the step, so look again.
        looks -= 1
        if not looks:
          raise manifest.CheckpointError(
            f"steps in {self.directory} vanish while they are read, {_LOOKS} "
            f"times, at last step {step}: {error}; end what deletes them"
          ) from None
        steps = [s for s in candidates() if s not in problems]
    if saved is None and any(
      manifest.present(self.at(step)) for step in problems
    ):
      reasons = "; ".join(f"step {s}: {e}" for s, e in problems.items())
      raise manifest.CheckpointError(
        f"no checkpoint in {self.directory} is whole ({reasons}): restore that "
        "folder from a copy, or start in another directory"
      )
    used = f"using step {saved.step} instead" if saved else "there is no other"
    for step, problem in problems.items():
      self._warn(step, f"{problem}; {used}")
    return saved

  def _warn(self, step, what):
    logging.warning(
      "checkpoint step %d in %s is broken: %s", step, self.directory, what
    )
