"""Any-order autoregressive language models in JAX.

  model = aoarm_jax.load("runs/two_stream-tiny")
  model.generate(count=4)
  model.infill("the qu___ brown fox", count=4)
  model.score("the [qu]ick brown fox")

See aoarm_jax.api.Model. Nothing is imported before `load` is called.
"""

__version__ = "0.1.0"


def load(workdir, *, read: str = "newest"):
  """The model of a run directory: an aoarm_jax.api.Model.

  Args:
    workdir: as training wrote it; its config.json says what the model is.
    read: the newest or the best checkpoint.

  Raises:
    CheckpointError: there is no run, or no whole checkpoint.
    ConfigError: its config.json cannot be read, or does not fit the devices.
  """
  from aoarm_jax import api

  return api.Model(workdir, read=read)
