"""The arrays of a checkpoint on disk. orbax is used in this module only.

Orbax writes a folder under a temporary name, and renames it when it is whole.
The folder of a step holds the arrays in `state/`, as nested dicts with string
keys. Empty arrays, which orbax refuses, are not there.
"""

import functools
import logging as python_logging
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from orbax.checkpoint import v1
from orbax.checkpoint._src.serialization import tensorstore_utils

from aoarm_jax.runs import manifest, text

_STATE = "state"
# {names from the root of a tree: leaf}, in the order of jax.tree.leaves.
Leaves = dict[tuple[str, ...], Any]


def save(folder: epath.Path, leaves: Leaves) -> Any:
  """Start to save arrays. They may be donated as soon as this returns.

  Args:
    folder: the folder of the step, which is absent.
    leaves: arrays, see `by_name`.

  Returns:
    An object whose method `result` waits until the folder is whole. It raises
    the error of the save.
  """
  with jax.transfer_guard("allow"), _context():
    return v1.save_checkpointables_async(
      folder, {_STATE: _nest(_not_empty(leaves))}
    )


def load(folder: epath.Path, leaves: Leaves) -> list[jax.Array]:
  """Read arrays, with the shapes, dtypes and shardings of abstract ones.

  Args:
    folder: the folder of the step.
    leaves: jax.ShapeDtypeStruct with shardings, see `placed`. Saved arrays
      that are not among them are not read.

  Returns:
    The arrays, in the order of `leaves`.
  """
  with jax.transfer_guard("allow"), _context():
    tree = v1.load(
      folder, _nest(_not_empty(leaves)), checkpointable_name=_STATE
    )
    return [
      _lookup(tree, names)
      if leaf.size
      else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
      for names, leaf in leaves.items()
    ]


def by_name(tree: Any) -> Leaves:
  """Return {names from the root: leaf}, in the order of jax.tree.leaves.

  The names are dict keys, fields and indices. So the layout on disk does not
  depend on the container types of a library's version.

  Raises:
    CheckpointError: a name has a dot or a slash, or is not unique.
  """
  leaves: Leaves = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = tuple(_key_name(key) for key in path) or ("value",)
    # Orbax joins names by dots, so names with dots would be ambiguous.
    if names in leaves or any("." in n or "/" in n for n in names):
      raise manifest.CheckpointError(
        f"leaf {jax.tree_util.keystr(path)}: names must be unique, without "
        "dots and slashes, to be saved; rename it"
      )
    leaves[names] = leaf
  return leaves


def _key_name(key):
  """Return the name of one key of a pytree path."""
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def described(leaves: Leaves) -> dict[str, str]:
  """Return {name: dtype and shape}, as in {"params/w": "float32[3,7]"}."""
  return {
    "/".join(names): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    for names, leaf in leaves.items()
  }


def placed(leaves: Leaves) -> Leaves:
  """Return abstract leaves with shardings, by default on one local device.

  Without a sharding orbax would take the saved one, and its devices may be
  absent.
  """
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return {
    names: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding or here
    )
    for names, leaf in leaves.items()
  }


def _nest(leaves):
  """Return the nested dict of {names: leaf}."""
  tree: dict[str, Any] = {}
  for names, leaf in leaves.items():
    node = tree
    for name in names[:-1]:
      node = node.setdefault(name, {})
    node[names[-1]] = leaf
  return tree


def _not_empty(leaves):
  """Return the leaves without arrays of size zero, which orbax refuses.

  The manifest records their shapes.
  """
  return {names: leaf for names, leaf in leaves.items() if leaf.size}


def _lookup(tree, names):
  """Return the leaf of a nested dict by its names."""
  for name in names:
    tree = tree[name]
  return tree


def _context():
  """Return the options that orbax saves and loads with."""
  context = v1.Context()
  # Compression makes random float32 only 8% smaller and takes three times as
  # long.
  context.array.saving.use_compression = False
  # Then a folder that cannot be made raises at once, and not in a thread after
  # 10 s.
  context.asynchronous.create_directories_asynchronously = False
  context.pytree.loading.partial_load = True
  return context


def reason(error: BaseException) -> str:
  """Return why a save failed, without the names of orbax's temporary files."""
  line = text.first_line(error)
  code = re.search(r"os_error_code='(\d+)'|\bOS error (\d+)", line)
  if isinstance(error, OSError) and error.errno is not None:
    return os.strerror(error.errno)
  if code:
    return os.strerror(int(code[1] or code[2]))
  return re.sub(r"\S*[.]orbax-checkpoint-tmp\S*", "a temporary file", line)


def quiet_orbax() -> None:
  """Drop orbax's messages that say nothing new; let its warnings pass."""
  logger = logging.get_absl_logger()
  if _passes not in logger.filters:
    logger.addFilter(_passes)
  # For its log, orbax asks for tensorstore's statistics at every save. Each
  # answer leaks its lists, some 20 kB a save.
  for name in ("get_tensorstore_raw_bytes", "print_ts_debug_data"):
    if hasattr(tensorstore_utils, name):
      setattr(tensorstore_utils, name, lambda *_, **__: 0)
  if getattr(sys.unraisablehook, "func", None) is not _report_unraisable:
    sys.unraisablehook = functools.partial(
      _report_unraisable, sys.unraisablehook
    )


def _passes(record):
  """Return whether a log record is shown."""
  if f"{os.sep}orbax{os.sep}" not in record.pathname:
    return True
  # Orbax logs tens of INFO lines per save. After a failed save it also logs a
  # traceback per thread. Its error reaches us through result(), and then the
  # user in one line.
  return (
    record.levelno > python_logging.INFO
    and "_SignalingThread.run() raised" not in str(record.msg)
  )


def _report_unraisable(report, unraisable):
  """Call `report`, except for writes that outlive a failed save.

  The first write that fails ends the save and closes its event loop. The writes
  that are still running then find the loop closed, and each would print a
  traceback.

  Args:
    report: the former sys.unraisablehook.
    unraisable: see sys.unraisablehook.
  """
  # These errors name no object, unlike the errors of transports that a program
  # forgot to close.
  if (
    unraisable.object is not None
    or str(unraisable.exc_value) != "Event loop is closed"
  ):
    report(unraisable)
