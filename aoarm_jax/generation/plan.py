"""Where a generation from a cache stands, and how it goes on."""

import math
from typing import NamedTuple

import jax

from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import cached


class State(NamedTuple):
  """Where the generation of a batch stands.

  Attributes:
    content: int32 [B, S + 1], tokens by slot; slot s + r holds rank r.
    order: int32 [B, T], known positions first.
    done: int32 [B], ranks that are decided.
    end: int32 [B], ranks to be decided.
    filled: int32 [B], leading slots in the cache; those up to done + s - 1 are
      decided but may not be in it yet.
    cache: of S slots.
    log_p: float32 [B], nats: log-probability of what was drawn so far.
    calls, accepted: int32 [B], see law.Generation.
    keys: typed PRNG keys [B].
  """

  content: jax.Array
  order: jax.Array
  done: jax.Array
  end: jax.Array
  filled: jax.Array
  cache: cached.Cache
  log_p: jax.Array
  calls: jax.Array
  accepted: jax.Array
  keys: jax.Array


class Plan(NamedTuple):
  """How to go through the ranks; static, so a program is compiled for each.

  Attributes:
    method: a name of config.sample.method.
    width: tokens a step, or drafts of speculative; sequential has 1.
    steps: parallel: all tokens in so many steps instead; 0: by width.
      ancestral, confidence: steps at most; 0: as many as positions.
    schedule: parallel in `steps`: linear, as many in every step; or cosine,
      few at first.
    score: adaptive: confidence (highest probability), entropy (lowest) or
      margin (of the two likeliest).
  """

  method: str = "sequential"
  width: int = 1
  steps: int = 0
  schedule: str = "linear"
  score: str = "confidence"

  @classmethod
  def of(cls, sample: config_lib.Sample) -> "Plan":
    """Returns the plan of a config's section."""
    return cls(
      sample.method, sample.width, sample.steps, sample.schedule, sample.score
    )

  def tokens_per_step(self, T: int) -> int:
    """Returns the most tokens that a step decides, of T."""
    if not self.steps:
      return min(self.width, T)
    n = self.steps
    # The steepest step of either schedule is the last one.
    cosine = self.schedule == "cosine"
    steepest = math.sin(math.pi / 2 / n) if cosine else 1 / n
    return min(T, math.ceil(T * steepest) + 1)
