"""The probability law of one draw, and the result of generation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax.model import vocabulary


class Sampling(NamedTuple):
  """The law of a draw.

  Its numbers are traced, so a sweep over them compiles one program. top_k and
  top_p are either both given or both None. Without them a draw cuts nothing.

  Attributes:
    temperature: float32 [], or [B, 1, 1] with one number per row. Logits are
      divided by it. 0 always takes the likeliest token.
    top_k: int32 []. Only the k likeliest tokens stay; 0 keeps all tokens.
    top_p: float32 []. After top_k, only the fewest likeliest tokens stay whose
      total probability reaches top_p.
    never: int32 [], the id of a token that is cut before all else. None cuts no
      token.
  """

  temperature: jax.Array | np.float32
  top_k: jax.Array | np.int32 | None = None
  top_p: jax.Array | np.float32 | None = None
  never: jax.Array | np.int32 | None = None


def make_law(
  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Sampling:
  """Return the law of plain numbers; see `Sampling` for their meaning."""
  if top_k == 0 and top_p >= 1:
    return Sampling(np.float32(temperature))
  return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p))


class Generation(NamedTuple):
  """Generated texts and the orders in which their tokens were generated.

  Attributes:
    tokens: int32 [B, T], natural order.
    order: int32 [B, T], known positions first.
    log_p: float32 [B], nats, log-probability of all drawn tokens. Each token
      counts under the law that decided it.
    calls: int32 [B], passes of the network until the row was complete. The row
      alone would take as many. Later passes, for other rows of the batch, do
      not count.
    accepted: int32 [B], tokens that were accepted drafts (speculative). The
      first draft of every round counts, although it cannot be rejected. Every
      other generated token was drawn anew in place of a rejected draft.
    steps: int32 [B, T], natural order, a number of the step that decided the
      token, at least 0. Numbers increase from step to step, and some may be
      missing. -1 where the token is known or was not generated.
    token_log_p: float32 [B, T], nats, natural order, the log-probability of
      each drawn token. 0 for the other tokens.
  """

  tokens: jax.Array
  order: jax.Array
  log_p: jax.Array
  calls: jax.Array
  accepted: jax.Array
  steps: jax.Array
  token_log_p: jax.Array


def draw(key: jax.Array, log_p: jax.Array) -> jax.Array:
  """Draw a token from each law: int32 [...].

  In JAX's default mode the noise of float32 ends too early: of 65,536 symbols,
  those of probability 1e-7 came 25 times where 66 were due. In this mode the
  limit is a probability of about 1e-14.

  Args:
    key: typed PRNG key.
    log_p: float32 [..., V], log-probabilities.
  """
  return jax.random.categorical(key, log_p, mode="high")


def log_p_of(log_p: jax.Array, tokens: jax.Array) -> jax.Array:
  """Return the log-probability of one token under each law.

  Args:
    log_p: float32 [..., V], log-probabilities.
    tokens: int32 [...].

  Returns:
    float32 [...].
  """
  return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def log_law(logits: jax.Array, law: Sampling) -> jax.Array:
  """Return the sampling law of a conditional.

  Temperature acts first, then top_k, then top_p. If tokens at the border of a
  cut are equally likely, the one with the lower id stays.

  Args:
    logits: float32 [..., V].
    law: the numbers of the law.

  Returns:
    float32 [..., V] log-probabilities, normalised; -inf where a token is cut.
  """
  V = logits.shape[-1]
  if law.never is not None:
    logits = logits.at[..., law.never].set(-jnp.inf)
  greedy = law.temperature == 0
  # The largest logit becomes 0 first, so that the division by a small
  # temperature cannot overflow.
  logits = logits - logits.max(axis=-1, keepdims=True)
  logits = logits / jnp.where(greedy, 1.0, law.temperature)
  likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), V, dtype=bool)
  logits = jnp.where(greedy & ~likeliest, -jnp.inf, logits)
  if law.top_k is None and law.top_p is None:
    return jax.nn.log_softmax(logits)
  assert law.top_k is not None  # make_law sets both or none.
  assert law.top_p is not None
  cut = _cut_by_sorting if V < vocabulary.LARGE else _cut_by_counting
  return jax.nn.log_softmax(cut(logits, law.top_k, law.top_p))


def _cut_by_sorting(logits, top_k, top_p):
  """Return logits [..., V] with -inf at the tokens that are cut."""
  V = logits.shape[-1]
  by_size = jnp.argsort(-logits, axis=-1, stable=True)
  place = jnp.argsort(by_size, axis=-1)
  k = jnp.where(top_k == 0, V, top_k)
  logits = jnp.where(place < k, logits, -jnp.inf)
  probability = jax.nn.softmax(logits)
  sorted_p = jnp.take_along_axis(probability, by_size, axis=-1)
  before = jnp.cumsum(sorted_p, axis=-1) - sorted_p
  before = jnp.take_along_axis(before, place, axis=-1)
  # Rounded sums reach 1 before the rarest tokens. So top_p = 1 keeps all tokens
  # explicitly.
  keep = (before < top_p) | (place == 0) | (top_p >= 1)
  return jnp.where(keep, logits, -jnp.inf)


def _cut_by_counting(logits, top_k, top_p):
  """Return what `_cut_by_sorting` returns up to rounding, without sorting.

  Bisection finds the value at the border of each cut. Tokens above it stay, and
  as many of the tokens with this value as fit, lower ids first. With 50,257
  symbols this is 10 times as fast as two sorts on a CPU. The sums of
  probabilities round in another order.
  """
  V = logits.shape[-1]
  k = jnp.where(top_k == 0, V, jnp.minimum(top_k, V))
  rank = _rank(logits)

  def count_from(low):
    return (rank >= low).sum(axis=-1, keepdims=True)

  border = _greatest(lambda low: count_from(low) >= k, logits.shape)
  above, ties = rank > border, rank == border
  left = k - above.sum(axis=-1, keepdims=True)
  keep = above | (ties & (jnp.cumsum(ties, axis=-1) <= left))
  logits = jnp.where(keep, logits, -jnp.inf)
  p = jax.nn.softmax(logits)
  rank = _rank(p)

  def sum_from(low):
    return jnp.where(rank >= low, p, 0.0).sum(axis=-1, keepdims=True)

  border = _greatest(lambda low: sum_from(low) >= top_p, p.shape)
  above, ties = rank > border, rank == border
  before = jnp.where(above, p, 0.0).sum(axis=-1, keepdims=True)
  before += (jnp.cumsum(ties, axis=-1) - 1) * p
  keep = above | (ties & (before < top_p)) | (top_p >= 1)
  return jnp.where(keep, logits, -jnp.inf)


def _rank(x):
  """Return uint32 numbers that compare as the float32 numbers x do."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits < sign, bits | sign, ~bits)


def _greatest(holds, shape):
  """Return the greatest uint32 number for which a condition holds, per row.

  Args:
    holds: function from numbers [..., 1] to bool [..., 1]. If it holds for a
      number, then for all smaller ones. It is taken to hold for 0.
    shape: the shape [..., V] of the rows.

  Returns:
    uint32 [..., 1].
  """

  def decide_bit(i, number):
    higher = number | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(holds(higher), higher, number)

  start = jnp.zeros((*shape[:-1], 1), jnp.uint32)
  return jax.lax.fori_loop(0, 32, decide_bit, start)
