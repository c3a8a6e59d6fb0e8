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
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import lengths, objective, orders
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
  state = begin(
    network, key, tokens, known, order, plan=plan, rows=rows, length=length
  )
  # The loop ends as soon as no blank is left. The host waits for every step to
  # end, which costs little compared with a full pass.
  state = jax.lax.while_loop(
    lambda state: (state.i < _count(state, plan)) & is_open(state, plan).any(),
    lambda state: advance(network, params, law, plan, state),
    state,
  )
  return sampling.Generation(
    state.tokens,
    decided(state),
    state.nats.sum(axis=1),
    state.calls,
    jnp.zeros_like(state.calls),
    jnp.where(state.step_of == _count(state, plan), -1, state.step_of),
    state.nats,
  )


class State(NamedTuple):
  """The state of the generation of a batch.

  Attributes:
    i: int32 [], the number of steps so far.
    tokens: int32 [B, T], natural order; arbitrary where not decided.
    step_of: int32 [B, T], the step that decided each token: -1 where it was
      known, and the greatest number of steps where it is not decided.
    nats: float32 [B, T], the log-probability of every drawn token, else 0.
    calls: int32 [B], see law.Generation.
    keys: typed PRNG keys [B].
    rank_of: int32 [B, T], the rank of every position.
    first: int32 [B, 1], the number of known tokens.
    length: int32 [B], the number of positions.
  """

  i: jax.Array
  tokens: jax.Array
  step_of: jax.Array
  nats: jax.Array
  calls: jax.Array
  keys: jax.Array
  rank_of: jax.Array
  first: jax.Array
  length: jax.Array


def begin(
  network: network_lib.Network,
  key: jax.Array,
  tokens: jax.Array,
  known: jax.Array,
  order: jax.Array,
  *,
  plan: plan_lib.Plan,
  rows: jax.Array | None,
  length: jax.Array | None,
) -> State:
  """Return the state before the first step; see `generate`."""
  plan.check(network.model, masked=True)
  chex.assert_equal_shape([tokens, known, order])
  B, T = tokens.shape
  length = jnp.full(B, T) if length is None else length
  order = orders.known_first(order, known, length)
  return State(
    i=jnp.int32(0),
    tokens=tokens.astype(jnp.int32),
    step_of=jnp.where(known, -1, _steps(plan, T)),
    nats=jnp.zeros((B, T)),
    calls=jnp.zeros(B, jnp.int32),
    keys=objective.keys_of(key, jnp.arange(B) if rows is None else rows),
    rank_of=jnp.argsort(order, axis=1),
    first=known.sum(axis=1, keepdims=True),
    length=length,
  )


def _steps(plan, T):
  """Return the greatest number of steps for T positions."""
  return T if plan.method == "sequential" else plan.steps or T


def _count(state, plan):
  return _steps(plan, state.tokens.shape[1])


def is_open(state: State, plan: plan_lib.Plan) -> jax.Array:
  """Return where a token is still to be decided: bool [B, T]."""
  inside = lengths.is_real(state.length, state.tokens.shape[1])
  return (state.step_of == _count(state, plan)) & inside


def decided(state: State) -> jax.Array:
  """Return the positions in the order in which they were decided: [B, T]."""
  by_step = jnp.argsort(state.step_of, axis=1, stable=True)
  return (by_step + 1).astype(jnp.int32)


def advance(
  network: network_lib.Network,
  params: Any,
  law: sampling.Sampling,
  plan: plan_lib.Plan,
  state: State,
) -> State:
  """Return the state after one more step.

  Args:
    network: the network.
    params: the network's parameters.
    law: the law of every draw.
    plan: the plan.
    state: the state before the step.
  """
  s, T = network.layout.sentinels, state.tokens.shape[1]
  count, i = _count(state, plan), state.i
  masked, open_ = state.step_of == count, is_open(state, plan)
  window = ((0, 0), (0, network.model.T - T))
  slots = orders.to_masked_slots(
    jnp.pad(state.tokens, window),
    jnp.pad(masked, window, constant_values=True),
    network.layout,
    None if network.layout.end_token is None else state.length,
  )
  logits = network.apply(params, slots)[:, s : s + T]
  log_p = sampling.log_law(logits, law)
  step_keys = objective.fold_rows(state.keys, i)
  token_keys, coin_keys = jax.vmap(jax.random.split, out_axes=1)(step_keys)
  drawn = jax.vmap(sampling.draw)(token_keys, log_p)
  match plan.method:
    case "sequential":
      chosen = (state.rank_of == state.first + i) & open_
    case "ancestral":
      coins = objective.uniform(coin_keys, T)
      chosen = open_ & (coins * (count - i) < 1)
    case "confidence":
      left = open_.sum(axis=1, keepdims=True)
      chosen = _surest(logits, drawn, open_) < -(-left // (count - i))
    case _:
      raise ValueError(f"unknown method {plan.method!r}")
  nats = sampling.log_p_of(log_p, drawn)
  return state._replace(
    i=i + 1,
    tokens=jnp.where(chosen, drawn, state.tokens),
    step_of=jnp.where(chosen, i, state.step_of),
    nats=jnp.where(chosen, nats, state.nats),
    calls=state.calls + open_.any(axis=1),
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
