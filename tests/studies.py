"""What the tests of the study share."""

import helpers

from aoarm_jax.config import schema as config_lib

STUDY = str(helpers.ROOT / "configs" / "study_tradeoff.py")
V = 27


def config(sweep, **study):
  return config_lib.Config(study=config_lib.Study(sweep=sweep, **study))
