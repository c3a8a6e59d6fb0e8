"""Log-probabilities of given texts, whole or in part: --mode=score.

log p(scored | known) in an order of the scored positions: known tokens come
first, by position, unknown ones never. By the chain rule, so exact; one pass a
text, or of a masked mechanism one for every scored token. Averaged over K
uniform orders it is log mean_k p(scored | known, sigma_k).
"""

import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from aoarm_jax import objective, orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import sharding
from aoarm_jax.generation import prompts
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import opening

_AT_ONCE = 1024  # Texts scored of a file before they are printed.


class Score(NamedTuple):
  """How probable a part of a text is, given another part.

  Attributes:
    text: what was scored, as it was given.
    log_p: nats: log p(scored | known); averaged over orders, the log of the
      mean of p.
    bits: -log_p / ln 2.
    positions: of the scored tokens, 1..n, in ascending order.
    token_log_p: nats, of each of them, given what came before it; averaged over
      orders, their mean over these, which does not sum to log_p.
    token_bits: -token_log_p / ln 2.
    order: the scored positions in the order that was followed; None if averaged
      over several.
    order_log_p: nats, of each of the orders averaged over.
  """

  text: str
  log_p: float
  bits: float
  positions: list[int]
  token_log_p: list[float]
  token_bits: list[float]
  order: list[int] | None
  order_log_p: list[float]


class Scorer:
  """Scores texts; compiled once for every shape."""

  def __init__(self, config: config_lib.Config, network: network_lib.Network):
    self._config, self._network = config, network
    self._mesh = network.mesh
    self._jitted = jax.jit(
      self._nats,
      static_argnames=("family", "count", "most"),
      out_shardings=sharding.replicated(network.mesh),
    )

  def score(
    self,
    params,
    texts: Sequence[tuple[str, prompts.Marked]],
    config: config_lib.Config | None = None,
    given: Sequence[Sequence[int]] | None = None,
  ) -> list[Score]:
    """Scores every text, as config.score says.

    Texts of about the same length are scored in the same orders, which depend
    on the seed: they can be compared, and the average is a law of texts too.

    Args:
      params: of the network; on the mesh.
      texts: as they are written, and parsed; of n <= T tokens each.
      config: its score and orders.given, instead of the Scorer's own.
      given: with config.score.order="given", a permutation of 1..n for every
        text; None is config.orders.given for all.

    Raises:
      PromptError: a text that this model cannot score.
    """
    config = config or self._config
    model = config.model
    shapes: dict[int, list[int]] = {}
    for i, (_, text) in enumerate(texts):
      _check(text, model)
      T = prompts.padded_length(len(text.tokens), model.T)
      shapes.setdefault(T, []).append(i)
    found: dict[int, Score] = {}
    if given is None:
      given = [config.orders.given] * len(texts)
    for T, rows in shapes.items():
      B = sharding.batch_size(self._mesh, config.score.batch_size, len(rows))
      for first in range(0, len(rows), B):
        found |= self._batch(
          params, texts, config, given, T, rows[first : first + B], B
        )
    return [found[i] for i in range(len(texts))]

  def _batch(self, params, texts, config, given, T, rows, B):
    """The scores of these texts by index, in one batch of B."""
    options = config.score
    tokens = np.zeros((B, T), np.int32)
    kinds = np.full((B, T), _UNKNOWN, np.int32)
    kinds[:, 0] = _SCORED  # Of rows that only fill the batch.
    order = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    for b, row in enumerate(rows):
      text = texts[row][1]
      n = len(text.tokens)
      tokens[b, :n] = text.tokens
      kinds[b, :n] = np.where(
        text.known, _KNOWN, np.where(text.scored, _SCORED, _UNKNOWN)
      )
      if options.order == "given":
        order[b] = prompts.within(given[row], T)
    counts = (kinds == _SCORED).sum(axis=1)
    key = jax.random.fold_in(jax.random.key(options.seed), purposes.SCORING)
    out = self._jitted(
      params,
      sharding.put(self._mesh, key),
      *sharding.put_rows(self._mesh, (tokens, kinds, order)),
      family=options.order,
      count=options.orders if options.order == "uniform" else 1,
      most=prompts.padded_length(int(counts.max()), T),
    )
    nats, order = jax.device_get(out)
    return {
      row: _score(texts[row][0], nats[:, b, :n], order[:, b, :n])
      for b, (row, n) in enumerate(zip(rows, counts))
    }

  def _nats(self, params, key, tokens, kinds, given, *, family, count, most):
    """(nats float32 [K, B, R], positions int32 [K, B, R]) of scored ranks."""
    B, T = tokens.shape
    model = self._network.model
    options = self._config.replace("orders.family", family).orders
    first = (kinds == _KNOWN).sum(axis=1)[:, None]
    ranks = jnp.minimum(first + jnp.arange(most), T - 1)
    nll = functools.partial(
      objective.order_nll, self._network.bind(params), self._network.layout
    )
    # Rows of chosen ranks belong to no slot, and so to no device of a sequence;
    # what each sees is its own, which cuDNN by name does not know.
    can_pick = model.kind.masked or (
      model.kind.streams == 2
      and self._mesh.shape["sequence"] == 1
      and self._config.compute.attention != "cudnn"
    )

    def of_order(k):
      order = given
      if family != "given":
        order = orders.draw(jax.random.fold_in(key, k), 1, T, options)
        order = jnp.broadcast_to(order, (B, T))
      order = orders.by_class(order, kinds)
      positions = jnp.take_along_axis(order, ranks, axis=1)
      if can_pick:
        return nll(tokens, order, ranks=ranks), positions
      by_rank = nll(tokens, order)
      return jnp.take_along_axis(by_rank, ranks, axis=1), positions

    return jax.lax.map(of_order, jnp.arange(count))


_KNOWN, _SCORED, _UNKNOWN = range(3)


def _score(text, nats, order):
  """A Score from nats [K, n] at positions [K, n]."""
  log_p = -nats.astype(np.float64).sum(axis=1)
  largest = log_p.max()
  total = float(largest + np.log(np.exp(log_p - largest).mean()))
  by_position = np.take_along_axis(nats, np.argsort(order, axis=1), axis=1)
  token_log_p = -by_position.astype(np.float64).mean(axis=0)
  return Score(
    text=text,
    log_p=total,
    bits=-total / math.log(2),
    positions=sorted(order[0].tolist()),
    token_log_p=token_log_p.tolist(),
    token_bits=(-token_log_p / math.log(2)).tolist(),
    order=order[0].tolist() if len(order) == 1 else None,
    order_log_p=log_p.tolist(),
  )


def _check(text, model):
  n = len(text.tokens)
  if n > model.T:
    raise prompts.PromptError(
      f"{text.name} has {n} tokens; the model knows at most {model.T} "
      "(config.model.T)"
    )
  kinds = np.where(text.known, _KNOWN, np.where(text.scored, 1, _UNKNOWN))
  if model.kind.left_to_right and (np.diff(kinds) < 0).any():
    raise prompts.PromptError(
      f"{text.name}: mechanism {model.mechanism} generates left to right only: "
      "what is given must come first, then what is scored, then what is unknown"
    )


def score(
  config: config_lib.Config,
  workdir: epath.Path,
  text: str = "",
  input_file: str = "",
) -> None:
  """--mode=score: prints a Score a text, as JSON lines.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    PromptError: a text that this model cannot score.
  """
  tokenizer = tokenizers.get(config.data.tokenizer)
  lines = [("--text", text)] if text else prompts.read_lines(input_file)
  texts = [
    (
      line,
      prompts.parse_marked(
        line, tokenizer, config.sample.blank, config.score.marks, name
      ),
    )
    for name, line in lines
  ]
  run = opening.open_run(workdir, config)
  with jax.set_mesh(run.network.mesh):
    scorer = Scorer(config, run.network)
    # By parts, so that what was done is there whatever comes after.
    for start in range(0, len(texts), _AT_ONCE):
      scores = scorer.score(run.params, texts[start : start + _AT_ONCE])
      if jax.process_index() == 0:
        for each in scores:
          print(json.dumps(each._asdict()))
        sys.stdout.flush()
