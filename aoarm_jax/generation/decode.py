"""Generation from one KV cache, in any order: one state, one loop.

sequential   exact: a text comes out with probability p(x | sigma) under the
             law of every draw.
speculative  exact, the same law: several tokens are drafted at once, each from
             what is known alone, checked by one pass of the chain rule, and
             kept as far as they pass (ASSD, arXiv 2504.20456).
parallel     NOT exact: several tokens a step, drawn independently.
adaptive     NOT exact: the next target is chosen by how sure the model is of
             it, so the order depends on the text, and the texts' law is not
             that of any order.

Known tokens come first, by position, and are prefilled in one pass, causally
among themselves, so the density stays that of the chain rule.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import objective, orders
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import steps as decode_steps
from aoarm_jax.model import cached
from aoarm_jax.model import network as network_lib

# A cache of so many bytes grows in so many stages, each a compiled loop of its
# own: a shorter one is read in less time, which a small one does not repay.
# Rounds of speculation are a larger program.
_LARGE, _STAGES, _STAGES_OF_ROUNDS = 2**28, 4, 2
_TILE = 128
# Steps between two looks of the host at how many there are, where that is not
# known to the compiler: a GPU stands idle while it looks.
_GROUP = 8


def generate(
  network: network_lib.Network,
  params: Any,
  key: jax.Array,
  tokens: jax.Array,
  known: jax.Array,
  order: jax.Array,
  law: sampling.Sampling,
  *,
  plan: plan_lib.Plan | None = None,
  prefill: bool = True,
  most_known: int | None = None,
  most_blanks: int | jax.Array | None = None,
  rows: jax.Array | None = None,
  length: jax.Array | None = None,
) -> sampling.Generation:
  """Fills the blanks of every text.

  A row's draws depend on the key and its index alone, not on the batch. Rows
  may have different lengths and numbers of known tokens.

  Args:
    network: of T_max >= T positions.
    params: of the network.
    key: typed PRNG key.
    tokens: int32 [B, T], natural order; anything where not known.
    known: bool [B, T].
    order: int32 [B, T], permutations of 1..T; known positions are moved to the
      front by position, blanks keep their order (but for adaptive).
    law: of every draw.
    plan: how to go through the blanks; None is one by one.
    prefill: may be False where nothing is known and there is one sentinel.
    most_known: no row has more known tokens; None is T. With few of them, a
      large cache grows in stages.
    most_blanks: no row has more blanks, which bounds the steps; None is T. An
      int is compiled for; an array, int32 [], serves any number, and up to 7
      steps follow the last one.
    rows: int32 [B], the rows' indices; None is 0 to B - 1.
    length: int32 [B], 1 to T: the positions of each row; nothing beyond is
      generated. None is T.

  Returns:
    The texts, the orders used (of a shorter row its positions come first), and
    what was counted on the way.
  """
  chex.assert_equal_shape([tokens, known, order])
  B, T = tokens.shape
  s = network.model.sentinels
  cached_network = cached.Cached(network.bind(params))
  rows = jnp.arange(B) if rows is None else rows
  length = jnp.full(B, T) if length is None else length
  order = orders.known_first(order, known, length)
  keys = objective.keys_of(key, rows)
  state = _start(cached_network, keys, tokens, known, order, length, prefill)
  state = _run(
    cached_network,
    state,
    law,
    plan or plan_lib.Plan(),
    T if most_known is None else most_known,
    T if most_blanks is None else most_blanks,
  )
  by_position = jnp.zeros((B, T), jnp.int32)
  by_position = by_position.at[jnp.arange(B)[:, None], state.order - 1].set(
    state.content[:, s:]
  )
  return sampling.Generation(
    by_position, state.order, state.log_p, state.calls, state.accepted
  )


def _run(network, state, law, plan, most_known, most_blanks):
  """Decides all ranks, in one loop or, where the cache grows, several."""
  s, T = network.model.sentinels, state.order.shape[1]
  if plan.method == "sequential":
    plan = plan._replace(steps=0, width=1)
  if plan.method == "adaptive":
    plan = plan._replace(steps=0)
  advance, passes = decode_steps.METHODS[plan.method](network, law, plan, state)

  def step(i, state):
    running = state.done < state.end
    after = advance(i, state)
    return after._replace(calls=state.calls + running * passes(state))

  width = plan.tokens_per_step(T)
  fixed = isinstance(most_blanks, int)
  least, group = (min, 1) if fixed else (jnp.minimum, _GROUP)
  steps = least(plan.steps or -(-most_blanks // width), most_blanks)
  # Slots that a row may have filled by the end of step i: first + i * width.
  first, done = most_known + s, 0
  for slots in _lengths(state.cache, first, plan):
    state = state._replace(cache=cached.resized(state.cache, slots))
    if plan.method == "speculative":
      state = jax.lax.while_loop(
        lambda state, slots=slots: _fits(state, s + width, slots),
        lambda state: step(0, state),
        state,
      )
      continue
    until = steps
    if slots < T + s - 1:
      # Whole groups, or the last one would need more slots.
      fit = (slots - first) // width + 1
      until = least(steps, done + (fit - done) // group * group)
    state = _repeat(step, done, until, state)
    done = until
    if fixed and done == steps:
      break
  return state


def _repeat(step, first, until, state):
  """Steps first.. until, and some more where the number is traced."""
  if isinstance(until, int):
    # A known number of steps: the host need not wait for each to end.
    return jax.lax.fori_loop(first, until, step, state)

  def some(i, state):
    at = first + i * _GROUP
    return jax.lax.fori_loop(
      0, _GROUP, lambda j, state: step(at + j, state), state
    )

  return jax.lax.fori_loop(0, -(-(until - first) // _GROUP), some, state)


def _start(network, keys, tokens, known, order, length, prefill):
  B, T = tokens.shape
  s = network.model.sentinels
  slots = orders.to_slots(tokens, order, network.layout)
  cache = network.empty_cache(B, T + s - 1)
  if prefill:
    # One pass over all slots keeps shapes static. Slots of blanks hold anything
    # so far: no known slot sees them, and each is written anew when it comes.
    cache = network.prefill(slots, cache)
  # Slot i + 1 receives what slot i predicts; the last one is never content.
  last = jnp.take_along_axis(tokens, order[:, -1:] - 1, axis=1)
  done = jnp.sum(known, axis=1)
  return plan_lib.State(
    content=jnp.concatenate([slots.tokens, last.astype(jnp.int32)], axis=1),
    order=order,
    done=done,
    end=length,
    filled=done + s - 1,
    cache=cache,
    log_p=jnp.zeros(B),
    calls=jnp.full(B, int(prefill), jnp.int32),
    accepted=jnp.zeros(B, jnp.int32),
    keys=keys,
  )


def _lengths(cache, first, plan):
  """Lengths of the cache, one after the other: every step reads all of it."""
  S = cache.k[0].shape[2]
  if plan.steps or sum(x.nbytes for x in jax.tree.leaves(cache)) < _LARGE:
    return [S]
  in_rounds = plan.method == "speculative"
  stages = _STAGES_OF_ROUNDS if in_rounds else _STAGES
  ends = [first + (S - first) * (i + 1) // stages for i in range(stages - 1)]
  # Whole tiles: matmuls of odd sizes are slow.
  ends = {end // _TILE * _TILE for end in ends}
  return [*sorted(end for end in ends if first <= end < S), S]


def _fits(state, more, slots):
  """Whether a row is unfinished, and a round of `more` slots fits into all."""
  S = state.content.shape[1] - 1
  running = state.done < state.end
  most = jnp.max(jnp.where(running, state.done, 0)) + more
  return jnp.any(running) & (most <= slots if slots < S else True)
