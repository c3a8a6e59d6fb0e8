"""Generation from one KV cache, in any order: one state, one loop.

sequential   Exact: a text has probability p(x | sigma) under the law of every
             draw.
speculative  Exact, with the same law. Several tokens are drafted at once, each
             from the known tokens only. One pass of the chain rule checks the
             drafts, and the first ones that pass are kept (ASSD,
             arXiv 2504.20456).
parallel     The tokens of one step are drawn independently. This is exact for
             a plan with groups: a text has the probability of
             objective.order_nll with the steps as its groups. Without groups
             it is NOT exact.
adaptive     NOT exact: the model chooses the target that it is surest of. So
             the order depends on the text, and the law of the texts is not the
             law of any order.

Known tokens come first, by position. One causal pass over them fills the cache,
so the probability of a text stays that of the chain rule. For a plan with
groups, they are groups of `plan.width` tokens.

A padded document has a given length, or an open end. With an open end the texts
are drawn from left to right, up to the end token. This is exact, too.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax import objective, orders
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.generation import steps as decode_steps
from aoarm_jax.model import cached
from aoarm_jax.model import network as network_lib

# A cache of at least _LARGE bytes grows in stages, and each stage is a compiled
# loop. A shorter cache is read in less time. For a small cache this gain does
# not repay the compilation. A round of speculation is a larger program, so
# speculation has fewer stages.
_LARGE, _STAGES, _STAGES_OF_ROUNDS = 2**28, 4, 2
_TILE = 128
# If the number of steps is not known to the compiler, the host checks it once
# every _GROUP steps, because a GPU is idle during the check.
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
  """Fill the blanks of every text.

  The draws of a row depend on the key and on the row's index, and not on the
  batch. Rows may have different lengths and numbers of known tokens.

  Args:
    network: a network with at least T positions. Its mechanism is not masked,
      see diffusion.py.
    params: the network's parameters.
    key: typed PRNG key.
    tokens: int32 [B, T], natural order; arbitrary where not known.
    known: bool [B, T], by position.
    order: int32 [B, T], permutations of 1..T. Known positions are moved to the
      front, by position. Blanks keep their order, except in `adaptive`.
    law: the law of every draw.
    plan: the way through the blanks; None decides them one by one. If it is
      open, `order` must be left to right.
    prefill: False skips the pass over known tokens. This is allowed only if
      nothing is known and there is one sentinel.
    most_known: upper bound on the known tokens of a row; None means T. If it is
      small, a large cache grows in stages.
    most_blanks: upper bound on the blanks of a row, which bounds the number of
      steps; None means T. An int is compiled into the program. An array,
      int32 [], lets one program serve every number, but up to 7 idle steps
      follow the last one.
    rows: int32 [B], the rows' indices; None means 0 to B - 1.
    length: int32 [B], 1 to T, number of positions in each row. Nothing beyond
      them is generated. None means T. For padded documents with two sentinels
      the model is told this length. With one sentinel, an end token among the
      known tokens tells the length.

  Returns:
    The texts, the orders that were used, and the counts of law.Generation. In
    the order of a shorter row, the row's own positions come first. After the
    end token of an open text, tokens are 0.

  Raises:
    ValueError: the mechanism is masked, or it has no such method.
  """
  law, plan = prepared(network, law, plan or plan_lib.Plan())
  T = tokens.shape[1]
  cached_network = cached.Cached(network.bind(params))
  state = begin(
    cached_network,
    key,
    tokens,
    known,
    order,
    plan=plan,
    prefill=prefill,
    rows=rows,
    length=length,
  )
  state = _run(
    cached_network,
    state,
    law,
    plan,
    T if most_known is None else most_known,
    T if most_blanks is None else most_blanks,
  )
  return sampling.Generation(
    tokens_of(state, plan),
    state.order,
    state.log_p,
    state.calls,
    state.accepted,
    by_position(state, state.trace[..., 0].astype(jnp.int32)),
    by_position(state, state.trace[..., 1]),
  )


def prepared(
  network: network_lib.Network, law: sampling.Sampling, plan: plan_lib.Plan
) -> tuple[sampling.Sampling, plan_lib.Plan]:
  """Return the law and the plan as the steps of this network take them.

  Args:
    network: the network.
    law: the law of every draw.
    plan: the way through the blanks.

  Raises:
    ValueError: the mechanism is masked, or it has no such method.
  """
  plan.check(network.model, masked=False)
  if plan.method not in ("parallel", "adaptive"):
    plan = plan._replace(groups=False)
  if plan.method == "sequential":
    plan = plan._replace(steps=0, width=1)
  if plan.method == "adaptive":
    plan = plan._replace(steps=0)
  if network.layout.predicts_end and not plan.is_open:
    law = law._replace(never=np.int32(network.layout.end_token))
  return law, plan


def tokens_of(state: plan_lib.State, plan: plan_lib.Plan) -> jax.Array:
  """Return the tokens by position: int32 [B, T], 0 after an open text's end.

  Args:
    state: the state. Tokens of later ranks than `done` are arbitrary.
    plan: the plan.
  """
  T = state.order.shape[1]
  content = state.content[:, -T:]
  if plan.is_open:
    content = jnp.where(jnp.arange(T)[None] < state.end[:, None], content, 0)
  return by_position(state, content)


def by_position(state: plan_lib.State, by_rank: jax.Array) -> jax.Array:
  """Return values of every rank by position: [B, T], like `by_rank`.

  Args:
    state: has the orders.
    by_rank: [B, T].
  """
  rows = jnp.arange(len(by_rank))[:, None]
  return jnp.zeros_like(by_rank).at[rows, state.order - 1].set(by_rank)


def begin(
  network: cached.Cached,
  key: jax.Array,
  tokens: jax.Array,
  known: jax.Array,
  order: jax.Array,
  *,
  plan: plan_lib.Plan,
  prefill: bool,
  rows: jax.Array | None,
  length: jax.Array | None,
) -> plan_lib.State:
  """Return the state before the first step.

  The arguments are those of `generate`, with the plan that `prepared` returned.
  """
  chex.assert_equal_shape([tokens, known, order])
  B, T = tokens.shape
  rows = jnp.arange(B) if rows is None else rows
  length = jnp.full(B, T) if length is None else length
  order = orders.known_first(order, known, length)
  width = plan.width if plan.groups else None
  keys = objective.keys_of(key, rows)
  return _start(network, keys, tokens, known, order, length, prefill, width)


def _run(network, state, law, plan, most_known, most_blanks):
  """Decide all ranks: in one loop, or in one loop per length of the cache."""
  s, T = network.model.sentinels, state.order.shape[1]
  step = step_of(network, law, plan, state)
  width = plan.tokens_per_step(T)
  is_static = isinstance(most_blanks, int)
  minimum, group = (min, 1) if is_static else (jnp.minimum, _GROUP)
  steps = minimum(plan.steps or -(-most_blanks // width), most_blanks)
  # By the end of step i (from 0) a row has filled at most first + i * width
  # slots.
  first = most_known + s
  done: int | jax.Array = 0
  for slots in _lengths(state.cache, first, plan):
    state = state._replace(cache=cached.resized(state.cache, slots))
    if plan.method == "speculative":
      state = jax.lax.while_loop(
        functools.partial(_fits, more=s + width, slots=slots),
        functools.partial(step, 0),
        state,
      )
      continue
    until: int | jax.Array = steps
    if slots < T + s - 1:
      # Only whole groups of steps run, since the last group of a loop is never
      # cut short and would need more slots.
      fitting = (slots - first) // width + 1
      until = minimum(steps, done + (fitting - done) // group * group)
    repeat = _repeat_while_open if plan.is_open else _repeat
    state = repeat(step, done, until, state)
    done = until
    if is_static and done == steps:
      break
  return state


def step_of(
  network: cached.Cached,
  law: sampling.Sampling,
  plan: plan_lib.Plan,
  start: plan_lib.State,
) -> Callable[[jax.Array | int, plan_lib.State], plan_lib.State]:
  """Return the function (i, state) -> state that is step i of a generation.

  Args:
    network: the network.
    law: the law that `prepared` returned.
    plan: the plan that `prepared` returned.
    start: the state before the first step; `done`, `end` and `order` are read.
  """
  advance, passes = decode_steps.METHODS[plan.method](network, law, plan, start)

  def step(i, state):
    running = state.done < state.end
    after = advance(i, state)
    return after._replace(calls=state.calls + running * passes(state))

  return step


def _repeat(step, first, until, state):
  """Run the steps from `first` until before `until`.

  If `until` is traced, up to _GROUP - 1 more steps follow.
  """
  if isinstance(until, int):
    # With a static number of steps the host need not wait for each to end.
    return jax.lax.fori_loop(first, until, step, state)

  def run_group(i, state):
    start = first + i * _GROUP
    return jax.lax.fori_loop(
      0, _GROUP, lambda j, state: step(start + j, state), state
    )

  return jax.lax.fori_loop(0, -(-(until - first) // _GROUP), run_group, state)


def _repeat_while_open(step, first, until, state):
  """Run the steps from `first` until before `until`, or until all rows end."""
  _, state = jax.lax.while_loop(
    lambda at: (at[0] < until) & (at[1].done < at[1].end).any(),
    lambda at: (at[0] + 1, step(*at)),
    (jnp.int32(first), state),
  )
  return state


def _start(network, keys, tokens, known, order, length, prefill, width):
  """Return the plan.State before the first step.

  Known tokens are groups of `width`, or see each other causally if it is None.
  """
  B, T = tokens.shape
  s = network.model.sentinels
  done = jnp.sum(known, axis=1)
  groups = None
  if width is not None:
    decided = jnp.arange(T)[None] < done[:, None]
    groups = orders.equal_groups(decided, width)
  told = None if network.layout.end_token is None else length
  slots = orders.to_slots(
    tokens, order, network.layout, group_start=groups, length=told
  )
  cache = network.empty_cache(B, T + s - 1)
  if prefill:
    # One pass over all slots keeps shapes static. After it, slots of blanks
    # hold arbitrary values. No known slot sees them, and each is written again
    # when its token is decided.
    cache = network.prefill(slots, cache)
  # Slot i + 1 receives the token that slot i predicts. So the content has one
  # slot more than the cache: the last token is never an input of the network.
  last = jnp.take_along_axis(tokens, order[:, -1:] - 1, axis=1)
  return plan_lib.State(
    content=jnp.concatenate([slots.tokens, last.astype(jnp.int32)], axis=1),
    order=order,
    done=done,
    end=length,
    filled=done + s - 1,
    cache=cache,
    log_p=jnp.zeros(B),
    trace=jnp.tile(jnp.array([-1.0, 0.0]), (B, T, 1)),
    calls=jnp.full(B, int(prefill), jnp.int32),
    accepted=jnp.zeros(B, jnp.int32),
    keys=keys,
  )


def _lengths(cache, first, plan):
  """Return the lengths of the cache, slots, ascending: one for each stage.

  Every step reads the whole cache, so a short cache makes early steps faster. A
  plan with a given number of steps has one stage.

  Args:
    cache: the cache, with all its slots.
    first: slots that the first step needs.
    plan: the plan of the steps.
  """
  S = cache.k[0].shape[2]
  if plan.steps or sum(x.nbytes for x in jax.tree.leaves(cache)) < _LARGE:
    return [S]
  in_rounds = plan.method == "speculative"
  stages = _STAGES_OF_ROUNDS if in_rounds else _STAGES
  ends = [first + (S - first) * (i + 1) // stages for i in range(stages - 1)]
  # Lengths are multiples of a tile, since matmuls of odd sizes are slow.
  aligned = {end // _TILE * _TILE for end in ends}
  return [*sorted(end for end in aligned if first <= end < S), S]


def _fits(state, more, slots):
  """Return whether a row is unfinished and the cache has room for a round.

  Args:
    state: the state before the round.
    more: slots that a round needs beyond the decided ranks.
    slots: length of the cache. A cache of full length always has room.

  Returns:
    bool [].
  """
  S = state.content.shape[1] - 1
  running = state.done < state.end
  most = jnp.max(jnp.where(running, state.done, 0)) + more
  return jnp.any(running) & (most <= slots if slots < S else True)
