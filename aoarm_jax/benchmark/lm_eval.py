"""A run as a model of lm-eval, the Language Model Evaluation Harness.

  python -m aoarm_jax.benchmark.lm_eval run --model aoarm_jax \
    --model_args workdir=runs/two_stream-tiny,normalise=True --tasks wikitext

The command is that of lm-eval, which also knows the model aoarm_jax. Versions
of lm-eval that read the entry points of packages know it anyway.
"""

import sys
from typing import Any

import lm_eval.__main__
from lm_eval.api import instance, registry
from lm_eval.api import model as lm_eval_model

from aoarm_jax.benchmark import harness
from aoarm_jax.config import errors


@registry.register_model("aoarm_jax")
class Model(lm_eval_model.LM):
  """A run or an exported model. Its answers are those of harness.Harness."""

  def __init__(
    self,
    workdir: str,
    *,
    batch_size: int | str = "auto",
    max_batch_size: int | None = None,
    device: str | None = None,
    **options: Any,
  ) -> None:
    """Open the run.

    Args:
      workdir: all that aoarm_jax.load takes.
      batch_size: the greatest number of texts at once; "auto" is 64.
      max_batch_size: lm-eval gives it to all models. It has no effect.
      device: lm-eval gives it to all models. It has no effect: the model runs
        on all devices of JAX.
      **options: see harness.of_run.

    Raises:
      CheckpointError, ConfigError: see harness.of_run.
    """
    super().__init__()
    if str(batch_size) != "auto":
      options["batch_size"] = int(batch_size)
    self._harness = harness.of_run(workdir, **options)

  def loglikelihood(
    self, requests: list[instance.Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Return log p(continuation | context), and whether it is the likeliest."""
    return self._harness.loglikelihood([request.args for request in requests])

  def loglikelihood_rolling(
    self, requests: list[instance.Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Return log p of whole texts."""
    texts = [text for (text,) in (request.args for request in requests)]
    return self._harness.loglikelihood_rolling(texts)

  def generate_until(
    self, requests: list[instance.Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Return what follows each context."""
    return self._harness.generate_until([request.args for request in requests])


def main() -> None:
  """Run the command of lm-eval."""
  try:
    lm_eval.__main__.cli_evaluate()
  except errors.UserError as error:
    print(f"aoarm_jax: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
  main()
