"""Check that a changed config can continue a run from its checkpoint."""

from absl import logging
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import checkpoint, identity
from aoarm_jax.training import optimizer


def check_resume(
  saved: checkpoint.Saved,
  config: config_lib.Config,
  text: dict[str, str],
  workdir: epath.Path,
  tokenizer: str = "",
) -> None:
  """Check that this start can continue the run of a checkpoint.

  A changed number of steps is allowed where the schedule permits it, and is
  logged with its effect on the learning rate.

  Args:
    saved: the checkpoint from which the run would continue.
    config: the config of the new start.
    text: sha256 of the splits that are read now, by their names.
    workdir: run directory.
    tokenizer: sha256 of the tokenizer's state; "" if the config fixes it.

  Raises:
    ConfigError: the run has another text, another tokenizer, another switch of
      random numbers, or another value of a field that the run is bound to. The
      message names both values. Or the run has weights and no optimizer.
  """
  identity.check_same_run(saved, config, text, workdir, tokenizer)
  if saved.step == 0:  # Training saves nothing before its first step.
    raise config_lib.ConfigError(
      f"--workdir={workdir}: holds converted weights without an optimizer, so "
      "no training goes on there: name another --workdir, and begin with "
      f"--config.train.start_from={workdir}"
    )
  before = identity.config_of(saved)
  error = config_rules.schedule_steps_error(before, config, saved.step)
  if not error and saved.step > config.train.steps:
    error = (
      f"its checkpoint is at step {saved.step}: train no fewer steps, or "
      "choose another --workdir, as in "
      f"--workdir={identity.another(workdir)}"
    )
  if error:
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
