"""Scores of texts that are longer than T tokens, block by block.

A text is cut into blocks of `stride` tokens, see pipeline.StridedBatches. Every
token is scored once, behind at least T - stride tokens of context, except at
the start of the text. The log-probability of the text is the sum over blocks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import pipeline
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts
from aoarm_jax.model import network as network_lib


def is_long(text: prompts.Marked, model: config_lib.Model) -> bool:
  """Return whether a text has more than T tokens.

  Args:
    text: the parsed text.
    model: the model.

  Raises:
    PromptError: it has more, and a part of it is marked or unknown.
  """
  n = len(text.tokens)
  if n > model.T and not text.scored.all():
    raise prompts.PromptError(
      f"{text.name} has {n} tokens; a text of more than {model.T} "
      "(config.model.T) is scored as a whole, block by block, so it takes no "
      "marks and no blanks"
    )
  return n > model.T


def checked_stride(stride: Any, model: config_lib.Model) -> int:
  """Return the number of tokens of a block.

  Args:
    stride: the option of a call; None means half of T.
    model: the model.

  Raises:
    ConfigError: it is no number from 1 to T.
  """
  if stride is None:
    return max(1, model.T // 2)
  if not 1 <= config_rules.whole_number("stride", stride) <= model.T:
    raise config_lib.ConfigError(
      f"stride={stride}: must be at least 1 and at most {model.T} "
      "(config.model.T)"
    )
  return int(stride)


def score(
  scorer: score_lib.Scorer,
  network: network_lib.Network,
  params: Any,
  texts: Sequence[tuple[str, prompts.Marked]],
  config: config_lib.Config,
  stride: int,
) -> list[score_lib.Score]:
  """Return a Score of every text.

  Over several orders, the p of every block is averaged by itself, as in the
  estimator ensembled. So log_p is not the log of the mean of exp(order_log_p),
  where order_log_p has the sums over blocks in each order.

  Args:
    scorer: scores the blocks.
    network: the network of the scorer.
    params: the network's parameters, on the mesh.
    texts: pairs of the text and the parsed text, of more than T tokens each.
    config: its section score counts. The order is that within a block.
    stride: the number of tokens of a block.
  """
  layout, T = network.layout, network.model.T
  laid_out, windows = [], []
  for text, marked in texts:
    tokens = marked.tokens
    if layout.predicts_end and not marked.has_given_end:
      tokens = np.append(tokens, np.int32(layout.end_token or 0))
    places = pipeline.StridedBatches(
      tokens, np.array([len(tokens)]), T=T, stride=stride, batch_size=1
    ).blocks()
    laid_out.append((text, tokens, places))
    windows += [("", _window(tokens, T, *p, marked.name)) for p in places]
  scores = iter(scorer.score(params, windows, config))
  return [
    _joined(
      text, tokens, places, [next(scores) for _ in places], network.tokenizer
    )
    for text, tokens, places in laid_out
  ]


def _window(tokens, T, start, first, last, name):
  """Return T tokens of which those before a block are known."""
  at = start + np.arange(T)
  scored = (at >= first) & (at < last)
  return prompts.Marked(tokens[start : start + T], at < first, scored, name)


def _joined(text, tokens, places, scores, tokenizer):
  """Return the Score of a text from those of its blocks."""
  starts = [start for start, _, _ in places]
  order: list[int] | None = None
  if scores[0].order is not None:
    order = [
      start + position
      for start, block in zip(starts, scores)
      for position in block.order
    ]
  return score_lib.of_tokens(
    text,
    tokens,
    tokenizer,
    log_p=sum(block.log_p for block in scores),
    positions=list(range(1, len(tokens) + 1)),
    token_log_p=np.concatenate([block.token_log_p for block in scores]),
    order=order,
    order_log_p=np.sum([block.order_log_p for block in scores], axis=0),
  )
