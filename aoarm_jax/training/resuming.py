"""Check that a changed config can continue a run from its checkpoint."""

from absl import logging

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import checkpoint
from aoarm_jax.training import optimizer


def check_resume(saved: checkpoint.Saved, config: config_lib.Config) -> None:
  """Check that `config` can continue the run of a checkpoint.

  A changed number of steps is allowed where the schedule permits it, and is
  logged with its effect on the learning rate.

  Args:
    saved: the checkpoint from which the run would continue.
    config: the config of the new start.

  Raises:
    ConfigError: a field that the run is bound to has another value; names the
      field and both values.
  """
  before = config_lib.from_json(saved.config_json)
  for path, old, new in config_rules.differences(
    before, config, ("model", "run")
  ):
    if path == "config.train.steps":
      continue
    raise config_lib.ConfigError(
      f"{path}={new!r}: the run to be resumed has {old!r}; set it back, or "
      "choose another --workdir"
    )
  if error := config_rules.schedule_steps_error(before, config, saved.step):
    raise config_lib.ConfigError(
      f"config.train.steps={config.train.steps}: the run has "
      f"{before.train.steps}, and {error}"
    )
  if before.train.steps != config.train.steps:
    schedule = optimizer.schedule(config.optimizer, config.train.steps)
    logging.info(
      "train.steps: %s instead of %s; the learning rate (%s schedule) goes on "
      "at %.3g and ends at %.3g",
      f"{config.train.steps:,}",
      f"{before.train.steps:,}",
      config.optimizer.schedule,
      schedule(saved.step),
      schedule(config.train.steps - 1),
    )
