"""How a text comes about.

  python -m aoarm_jax.tools.strip --workdir=RUN --out=x.png

Draws three texts as they are generated: in random, adaptive and left-to-right
order. The run's mechanism must generate in any order from a cache.
"""

import sys
from collections.abc import Sequence
from typing import Any

import aoarm_jax
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.runs import checkpoint, figures
from aoarm_jax.tools import arguments

_PANELS: dict[str, dict[str, Any]] = {
  "random order": dict(order="uniform"),
  "adaptive order: where the model is surest": dict(method="adaptive", width=1),
  "left to right": dict(order="left_to_right"),
}


def _symbol(tokenizer: tokenizers.Tokenizer, token: int) -> str:
  """Returns what is shown of a token, which may be part of a character."""
  text = tokenizer.decode([token])
  return text if text.isprintable() else "\N{REPLACEMENT CHARACTER}"


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the picture."""
  parser = arguments.parser("tools.strip", __doc__)
  parser.add_argument(
    "--workdir", required=True, type=arguments.place, help="of a run"
  )
  parser.add_argument(
    "--out", required=True, type=arguments.output, help="PNG file"
  )
  parser.add_argument("--temperature", type=float, default=0.7)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(argv)
  law = dict(temperature=options.temperature, seed=options.seed)
  try:
    model = aoarm_jax.load(options.workdir)
    texts = {
      label: model.generate(**changes, **law)[0]
      for label, changes in _PANELS.items()
    }
  except (config_lib.ConfigError, checkpoint.CheckpointError) as error:
    sys.exit(f"aoarm_jax: error: {error}")
  kind = model.config.model.mechanism
  tokenizer = model.tokenizer
  figures.generation_strip(
    {
      label: ([_symbol(tokenizer, x) for x in text.tokens], text.order)
      for label, text in texts.items()
    },
    options.out,
    title=f"{kind}, temperature {options.temperature:g}",
  )
  print(options.out)


if __name__ == "__main__":
  main()
