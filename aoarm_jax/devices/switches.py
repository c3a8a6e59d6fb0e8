"""JAX's own switches that would change what a run is.

Environment variables such as JAX_ENABLE_X64 set them, often for another
program. Types are fixed by this library: parameters, states and random numbers
have 32 bits, whatever the switch says. The switches of random numbers stay with
the user. A checkpoint records them, see runs/identity.py.
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
# The types of this library. With strict promotion no program would compile.
_TYPES = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard"}


def fix_types() -> None:
  """Switch 64-bit types off, for this whole process and all its threads.

  The command line calls this. A library may not, see `fixed_types`.
  """
  for name, value in _TYPES.items():
    if getattr(jax.config, name) != value:
      logging.warning(
        "%s is set to %r here: parameters, states and random numbers have 32 "
        "bits",
        name.upper(),
        value,
      )
      jax.config.update(name, value)


@contextlib.contextmanager
def fixed_types() -> Iterator[None]:
  """Switch 64-bit types off in a context, for this thread only."""
  with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
    yield


def streams() -> dict[str, Any]:
  """Return the values of the switches that random numbers depend on.

  A switch that this version of JAX does not have is left out.
  """
  values = {name: getattr(jax.config, name, None) for name in STREAMS}
  return {name: value for name, value in values.items() if value is not None}
