"""Generation with masked mechanisms, by full passes without a cache.

sequential   Exact: a text has probability p(x | sigma). One token is decided
             per step, by the chain rule of the any-order likelihoods.
ancestral    Not exact: MDLM's sampler (arXiv 2406.07524) for the linear
             schedule. The tokens of one step are drawn independently of each
             other. With many steps it tends to sequential in a uniform order.
confidence   Not exact, and its law is not known: every step keeps the drawn
             tokens to which the model gives the highest probability (as in
             MaskGIT, arXiv 2202.04200). Temperature and cuts change the draws,
             but not these probabilities.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import objective, orders
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.model import network as network_lib


def generate(
  network: network_lib.Network,
  params: Any,
  key: jax.Array,
  tokens: jax.Array,
  known: jax.Array,
  order: jax.Array,
  law: sampling.Sampling,
  *,
  plan: plan_lib.Plan,
  rows: jax.Array | None = None,
  length: jax.Array | None = None,
) -> sampling.Generation:
  """Fill the blanks of every text.

  The draws of a row depend on the key and on the row's index, and not on the
  batch.

  Args:
    network: a network of a masked mechanism with at least T positions.
      Positions after T stay masked.
    params: the network's parameters.
    key: typed PRNG key.
    tokens: int32 [B, T], natural order; arbitrary where not known.
    known: bool [B, T], by position.
    order: int32 [B, T], permutations of 1..T. Only `sequential` follows them.
    law: the law of every draw.
    plan: the plan. Its method is sequential, ancestral or confidence. The
      latter two take at most plan.steps steps, or T if plan.steps is 0.
    rows: int32 [B], the rows' indices; None means 0 to B - 1.
    length: int32 [B], 1 to T, number of positions in each row. Positions
      beyond it stay masked. For padded documents the model is told this length,
      and positions beyond it are not seen. None means T.

  Returns:
    The texts, and the orders in which their tokens were decided: known
    positions first, positions of one step in ascending order, and positions
    beyond a row's length last.

  Raises:
    ValueError: the mechanism is not masked, or it has no such method.
  """
  plan.check(network.model, masked=True)
  chex.assert_equal_shape([tokens, known, order])
  B, T = tokens.shape
  s, T_max = network.layout.sentinels, network.model.T
  count = T if plan.method == "sequential" else plan.steps or T
  keys = objective.keys_of(key, jnp.arange(B) if rows is None else rows)
  length = jnp.full(B, T) if length is None else length
  told = None if network.layout.end_token is None else length
  beyond = jnp.arange(T) >= length[:, None]
  order = orders.known_first(order, known, length)
  next_rank = known.sum(axis=1, keepdims=True)
  rank_of = jnp.argsort(order, axis=1)

  def is_open(step_of):
    return (step_of == count) & ~beyond

  def step(state):
    i, tokens, step_of, total, calls = state
    masked, open_ = step_of == count, is_open(step_of)
    window = ((0, 0), (0, T_max - T))
    slots = orders.to_masked_slots(
      jnp.pad(tokens, window),
      jnp.pad(masked, window, constant_values=True),
      network.layout,
      told,
    )
    logits = network.apply(params, slots)[:, s : s + T]
    log_p = sampling.log_law(logits, law)
    step_keys = objective.fold_rows(keys, i)
    token_keys, coin_keys = jax.vmap(jax.random.split, out_axes=1)(step_keys)
    drawn = jax.vmap(sampling.draw)(token_keys, log_p)
    match plan.method:
      case "sequential":
        chosen = (rank_of == next_rank + i) & open_
      case "ancestral":
        coins = objective.uniform(coin_keys, T)
        chosen = open_ & (coins * (count - i) < 1)
      case "confidence":
        left = open_.sum(axis=1, keepdims=True)
        chosen = _surest(logits, drawn, open_) < -(-left // (count - i))
      case _:
        raise ValueError(f"unknown method {plan.method!r}")
    nats = sampling.log_p_of(log_p, drawn)
    return (
      i + 1,
      jnp.where(chosen, drawn, tokens),
      jnp.where(chosen, i, step_of),
      total + jnp.where(chosen, nats, 0.0).sum(axis=1),
      calls + open_.any(axis=1),
    )

  start = (
    0,
    tokens.astype(jnp.int32),
    jnp.where(known, -1, count),
    jnp.zeros(B),
    jnp.zeros(B, jnp.int32),
  )
  # The loop ends as soon as no blank is left. The host waits for every step to
  # end, which costs little compared with a full pass.
  _, tokens, step_of, log_p, calls = jax.lax.while_loop(
    lambda state: (state[0] < count) & is_open(state[2]).any(), step, start
  )
  decided = jnp.argsort(step_of, axis=1, stable=True) + 1
  return sampling.Generation(
    tokens, decided.astype(jnp.int32), log_p, calls, jnp.zeros_like(calls)
  )


def _surest(logits, drawn, masked):
  """Return the place of each masked position if the surest draw comes first.

  The model's own law ranks the draws. The law of the draw would not do: at
  temperature 0 or with top_k = 1 every draw has probability 1.

  Args:
    logits: float32 [B, T, V].
    drawn: int32 [B, T], the tokens drawn.
    masked: bool [B, T]. Other positions come last.

  Returns:
    int32 [B, T], places from 0.
  """
  log_p = sampling.log_p_of(jax.nn.log_softmax(logits), drawn)
  sure = jnp.where(masked, log_p, -jnp.inf)
  place = functools.partial(jnp.argsort, axis=1, stable=True)
  return jnp.where(masked, place(place(-sure)), sure.shape[1])
