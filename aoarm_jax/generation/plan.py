"""The state of a generation from a cache, and the plan of its steps."""

import math
from typing import NamedTuple

import jax

from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import cached


class State(NamedTuple):
  """The state of the generation of a batch.

  Attributes:
    content: int32 [B, S + 1], tokens by slot; slot s + r holds rank r.
    order: int32 [B, T], known positions first.
    done: int32 [B], number of leading ranks that are decided.
    end: int32 [B], number of leading ranks to decide in all. It becomes `done`
      where a text ends before.
    filled: int32 [B], number of leading slots that are in the cache. The slots
      up to done + s - 1 are decided, but may not be in the cache yet.
    cache: keys and values of S slots.
    log_p: float32 [B], nats, log-probability of the tokens drawn so far.
    trace: float32 [B, T, 2], by rank: the number of the step that decided the
      token (see law.Generation.steps), and the log-probability of the token.
    calls: int32 [B], see law.Generation.
    accepted: int32 [B], see law.Generation.
    keys: typed PRNG keys [B].
  """

  content: jax.Array
  order: jax.Array
  done: jax.Array
  end: jax.Array
  filled: jax.Array
  cache: cached.Cache
  log_p: jax.Array
  trace: jax.Array
  calls: jax.Array
  accepted: jax.Array
  keys: jax.Array


class Plan(NamedTuple):
  """The way through the ranks. It is static: every plan has its own program.

  Attributes:
    method: a value of config.sample.method.
    width: parallel, adaptive: tokens per step. speculative: drafts per round.
      sequential ignores it and decides 1.
    steps: parallel: number of steps for all tokens, in place of `width`; 0
      goes by `width`. ancestral, confidence: largest number of steps; 0 takes
      as many as there are positions.
    schedule: parallel in `steps` steps: "linear" decides equally many tokens
      in every step, "cosine" few at first.
    score: adaptive: the next target is the one with the highest probability
      of its likeliest token ("confidence"), the lowest entropy ("entropy") or
      the largest margin between its two likeliest tokens ("margin").
    groups: parallel, adaptive: whether the tokens of a step are a group of
      orders.to_slots, as two streams are trained with config.orders.groups.
    is_open: whether the model draws where a padded document ends. The order
      must then be left to right. Otherwise the length is given, and the end
      token is never drawn.
  """

  method: str = "sequential"
  width: int = 1
  steps: int = 0
  schedule: str = "linear"
  score: str = "confidence"
  groups: bool = False
  is_open: bool = False

  @classmethod
  def of(cls, sample: config_lib.Sample, orders: config_lib.Orders) -> "Plan":
    """Return the plan of a config's section `sample`.

    Args:
      sample: the section.
      orders: the orders of training. If they have groups, the plan has groups.
    """
    return cls(
      sample.method,
      sample.width or orders.width,
      sample.steps,
      sample.schedule,
      sample.score,
      orders.groups != "none",
    )

  def check(self, model: config_lib.Model, *, masked: bool) -> None:
    """Check that a model can be sampled by this plan.

    Args:
      model: the model.
      masked: whether masked mechanisms are sampled here: by full passes, and
        not from a cache.

    Raises:
      ValueError: the mechanism is of the other sort, or lacks the method.
    """
    name, kind = model.mechanism, model.kind
    if kind.masked != masked:
      raise ValueError(
        f"mechanism {name} is {'masked' if kind.masked else 'not masked'}: "
        f"{'diffusion' if kind.masked else 'decode'}.generate draws its texts"
      )
    if self.method not in kind.methods:
      raise ValueError(
        f"method {self.method!r}: mechanism {name} generates by: "
        + ", ".join(kind.methods)
      )

  def tokens_per_step(self, T: int) -> int:
    """Return the largest number of tokens that one step decides, of T."""
    if not self.steps:
      return min(self.width, T)
    n = self.steps
    # In both schedules no step decides a larger share than the last one.
    cosine = self.schedule == "cosine"
    last_share = math.sin(math.pi / 2 / n) if cosine else 1 / n
    return min(T, math.ceil(T * last_share) + 1)
