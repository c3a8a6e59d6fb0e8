"""The report on a trained run."""

import dataclasses

from aoarm_jax.config.sections import evaluation, fields

BENCHMARK_PARTS = (
  "likelihood",
  "orders",
  "infilling",
  "generation",
  "last_word",
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A report on a trained run (aoarm_jax/benchmark)."""

  parts: tuple[str, ...] = fields.field(
    (), "parts of the report; () means all", choices=BENCHMARK_PARTS
  )
  text: str = fields.field(
    "",
    "file or folder of the text that is scored, masked and cut into windows; "
    "'' means the split eval.split of the run's text",
  )
  tokens: int = fields.field(
    2048,
    "likelihood: how many tokens from the start of the text are scored; of "
    "padded documents, whole ones; 0 means all",
    low=0,
  )
  stride: int = fields.field(
    0,
    "likelihood: tokens of a block, which are scored together behind at least "
    "T - stride tokens of context; 0 means half of T, and T means windows "
    "without context",
    low=0,
  )
  estimators: tuple[str, ...] = fields.field(
    (),
    "likelihoods to compute; () means all that the mechanism has",
    choices=evaluation.ESTIMATORS,
  )
  orders: int = fields.field(
    8, "number K of uniform orders of a text, for means and ensembles", low=2
  )
  windows: int = fields.field(
    16,
    "orders, infilling and generation: number of windows of T tokens, or of "
    "padded documents, that are drawn from the text",
    low=2,
  )
  samples: int = fields.field(
    4, "infilling: number of fillings of a masked window", low=1
  )
  texts: int = fields.field(
    16, "generation: number of texts at each temperature", low=2
  )
  temperatures: tuple[float, ...] = fields.field(
    (0.5, 0.7, 0.85, 1.0, 1.2),
    "generation: temperatures, above 0",
    of=float,
  )
  scorer: str = fields.field(
    "",
    "generation: run directory of another run, which scores the texts; '' "
    "measures diversity alone",
  )
  last_words: str = fields.field(
    "",
    "last_word: file with one text a line, or JSON lines with data.text_field; "
    "'' leaves the part out",
  )
  batch_size: int = fields.field(
    64, "greatest number of texts at once, over all devices", low=1
  )
  seed: int = fields.field(0, "seed of orders, masks and texts", low=0)
