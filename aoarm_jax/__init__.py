"""Any-order autoregressive language models in JAX.

  model = aoarm_jax.load("runs/two_stream-tiny")
  model.generate(count=4)
  model.infill("the qu___ brown fox", count=4)
  model.score("the [qu]ick brown fox")

All methods are documented in aoarm_jax.api.Model. Importing this package is
fast: JAX is imported when `load` is called.
"""

import os
import typing

if typing.TYPE_CHECKING:
  from aoarm_jax import api

__version__ = "0.1.0"


def load(workdir: os.PathLike | str, *, read: str = "newest") -> "api.Model":
  """Return the trained model of a run directory.

  Args:
    workdir: run directory, as training wrote it. Its config.json says what the
      model is.
    read: "newest" or "best", the checkpoint to load.

  Raises:
    CheckpointError: there is no run, or no complete checkpoint.
    ConfigError: config.json cannot be read, or does not fit the devices.
  """
  from aoarm_jax import api

  return api.Model(workdir, read=read)
