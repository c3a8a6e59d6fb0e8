"""JAX's own switches that would change what a run is.

Environment variables such as JAX_ENABLE_X64 set them, often for another
program. Types are fixed by this library: parameters, states and random numbers
have 32 bits, whatever the switch says. Switches that would stop every program
are off too. The switches of random numbers stay with the user. A checkpoint
records them, see runs/identity.py.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

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
