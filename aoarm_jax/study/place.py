"""The directory of a running study, and a place for results if it goes."""

import contextlib
from collections.abc import Iterator

from etils import epath

from aoarm_jax.runs import identity, locking


class Place:
  """The directory of a study.

  A cell takes hours. Meanwhile somebody may remove or move the directory. Files
  that were written to its path then would make a second, smaller study there.
  """

  def __init__(self, workdir: epath.Path) -> None:
    """Watch nothing yet.

    Args:
      workdir: directory of the study.
    """
    self._workdir = workdir
    self._is_there = lambda: True
    self._other: epath.Path | None = None

  @contextlib.contextmanager
  def watched(self) -> Iterator[None]:
    """Watch the directory, which is made if it is absent."""
    with locking.watched(self._workdir) as self._is_there:
      yield

  def of(self, folder: epath.Path) -> epath.Path:
    """Return where the files of a folder are written now.

    Args:
      folder: a folder in the directory of the study.

    Returns:
      The folder itself. If the directory is gone, the folder of this name in a
      new directory beside it.
    """
    if self._is_there():
      return folder
    self._other = self._other or identity.another(self._workdir)
    return self._other / folder.relative_to(self._workdir)

  def check(self) -> None:
    """Check that the directory still stands.

    Raises:
      EvictedError: it is gone; says where files were written instead.
    """
    if self._is_there() and not self._other:
      return
    mend = "bring it back"
    if self._other:
      mend = (
        f"the last files are in {self._other}: copy its folders into the "
        "directory of the study"
      )
    raise locking.EvictedError(
      f"--workdir={self._workdir} was removed, moved or replaced while this "
      f"study ran there; {mend}, and start the same command again"
    )
