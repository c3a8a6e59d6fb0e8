"""JAX's own switches that would change what a run is.

Environment variables such as JAX_ENABLE_X64 set them, often for another
program. Types are fixed by this library: parameters, states and random numbers
have 32 bits, whatever the switch says. Switches that would stop every program
are off too. The switches of random numbers stay with the user. A checkpoint
records them, see runs/identity.py.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from aoarm_jax.config import errors

# The same seed gives other numbers with another value of one of these.
STREAMS = (
  "jax_default_prng_impl",
  "jax_threefry_partitionable",
  "jax_random_seed_offset",
)
_32_BITS = "parameters, states and random numbers have 32 bits"
# The values that this library needs, and why. With strict promotion of types,
# or without promotion of ranks, no program would compile.
_FIXED = {
  "jax_enable_x64": (False, _32_BITS),
  "jax_numpy_dtype_promotion": ("standard", _32_BITS),
  "jax_numpy_rank_promotion": ("allow", "programs here promote ranks"),
}


def fix_types() -> None:
  """Set the fixed switches, for this whole process and all its threads.

  The command line calls this. A library may not, see `fixed_types`.
  """
  for name, (value, reason) in _FIXED.items():
    if getattr(jax.config, name) != value:
      logging.warning("%s is set to %r here: %s", name.upper(), value, reason)
      jax.config.update(name, value)


@contextlib.contextmanager
def fixed_types() -> Iterator[None]:
  """Set the fixed switches in a context, for this thread only."""
  with (
    jax.enable_x64(False),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


def streams() -> dict[str, Any]:
  """Return the values of the switches that random numbers depend on.

  A switch that this version of JAX does not have is left out.
  """
  values = {name: getattr(jax.config, name, None) for name in STREAMS}
  return {name: value for name, value in values.items() if value is not None}


def keep_compilations() -> None:
  """Keep compiled programs in the user's cache folder, for later processes.

  A folder that JAX_COMPILATION_CACHE_DIR names stays, and
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
  """
  # JAX adds its options as attributes, which type checkers do not see.
  cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if cache is not None:
    return
  try:
    folder = cache_folder() / "xla"
  except RuntimeError:  # Without a home folder there is no cache.
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def cache_folder() -> pathlib.Path:
  """Return $XDG_CACHE_HOME/aoarm_jax, by default ~/.cache/aoarm_jax.

  Raises:
    RuntimeError: the default is needed, and the user has no home folder.
  """
  folder = os.environ.get("XDG_CACHE_HOME", "")
  # By the XDG specification a relative path is invalid and must be ignored.
  if os.path.isabs(folder):
    return pathlib.Path(folder, "aoarm_jax")
  return pathlib.Path.home() / ".cache" / "aoarm_jax"


# The process that used a model first.
_process = 0


class ForkError(errors.UserError, RuntimeError):
  """A process that was forked after JAX had started uses a model."""


def check_not_forked() -> None:
  """Refuse to go on in a fork of a process in which JAX has started.

  JAX has threads, and a fork has none of them. The first computation there
  would wait for ever.

  Raises:
    ForkError: this process is such a fork.
  """
  global _process
  _process = _process or os.getpid()
  if _process != os.getpid():
    raise ForkError(
      f"process {os.getpid()} is a fork of process {_process}, in which a "
      "model is loaded: JAX would wait for ever here; start processes with "
      "multiprocessing.get_context('spawn'), and load the model in each"
    )
