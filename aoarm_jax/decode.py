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

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import objective, orders, sampling
from aoarm_jax.model import cached, transformer

# Set the keys of a row apart: those of draws are numbered by slot.
_COIN, _AGAIN = 2**29, 2**30
# Rows scored at once where the next target is chosen.
CHUNK = 64
# A cache of so many bytes grows in so many stages, each a compiled loop of its
# own: a shorter one is read in less time, which a small one does not repay.
# Rounds of speculation are a larger program.
_LARGE, _STAGES, _STAGES_OF_ROUNDS = 2**28, 4, 2


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
    calls: int32 [B], passes of the network while the row was not finished.
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
  keys: jax.Array


class Plan(NamedTuple):
  """How to go through the ranks; static.

  Attributes:
    method: sequential, parallel, speculative or adaptive.
    width: tokens a step, drafts of speculative; sequential has 1.
    steps: parallel: all tokens in so many steps instead; 0: by width.
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


def generate(
  network: transformer.Transformer,
  key: jax.Array,
  tokens: jax.Array,
  known: jax.Array,
  order: jax.Array,
  law: sampling.Sampling,
  *,
  plan: Plan | None = None,
  prefill: bool = True,
  most_known: int | None = None,
  most_blanks: int | None = None,
  rows: jax.Array | None = None,
  length: jax.Array | None = None,
) -> sampling.Generation:
  """Fills the blanks of every text.

  A row's draws depend on the key and its index alone, not on the batch. Rows
  may have different lengths and numbers of known tokens.

  Args:
    network: of T_max >= T positions.
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
    most_blanks: no row has more blanks, which bounds the steps; None is T.
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
  network = cached.Cached(network)
  rows = jnp.arange(B) if rows is None else rows
  length = jnp.full(B, T) if length is None else length
  order = orders.known_first(order, known, length)
  keys = objective.keys_of(key, rows)
  state = _start(network, keys, tokens, known, order, length, prefill)
  state = _run(
    network,
    state,
    law,
    plan or Plan(),
    T if most_known is None else most_known,
    T if most_blanks is None else most_blanks,
  )
  by_position = jnp.zeros((B, T), jnp.int32)
  by_position = by_position.at[jnp.arange(B)[:, None], state.order - 1].set(
    state.content[:, s:]
  )
  return sampling.Generation(by_position, state.order, state.log_p, state.calls)


def _run(network, state, law, plan, most_known, most_blanks):
  """Decides all ranks, in one loop or, where the cache grows, several."""
  s, T = network.model.sentinels, state.order.shape[1]
  if plan.method == "sequential":
    plan = plan._replace(steps=0, width=1)
  if plan.method == "adaptive":
    plan = plan._replace(steps=0)
  advance, calls = _METHODS[plan.method](
    network, law, plan, state.end - state.done
  )

  def step(i, state):
    running = state.done < state.end
    after = advance(i, state)
    return after._replace(calls=state.calls + running * calls)

  width = _width(plan, T)
  steps = min(plan.steps or -(-most_blanks // width), most_blanks)
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
    # A known number of steps: the host need not wait for each to end.
    until = steps
    if slots < T + s - 1:
      until = min(steps, (slots - first) // width + 1)
    state = jax.lax.fori_loop(done, until, step, state)
    done = until
    if done == steps:
      break
  return state


def _start(network, keys, tokens, known, order, length, prefill):
  B, T = tokens.shape
  s = network.model.sentinels
  slots = orders.to_slots(
    tokens, order, s, network.vocabulary, end=network.model.T + 1
  )
  cache = network.empty_cache(B, T + s - 1)
  if prefill:
    # One pass over all slots keeps shapes static. Slots of blanks hold anything
    # so far: no known slot sees them, and each is written anew when it comes.
    cache = network.prefill(slots, cache)
  # Slot i + 1 receives what slot i predicts; the last one is never content.
  last = jnp.take_along_axis(tokens, order[:, -1:] - 1, axis=1)
  done = jnp.sum(known, axis=1)
  return State(
    content=jnp.concatenate([slots.tokens, last.astype(jnp.int32)], axis=1),
    order=order,
    done=done,
    end=length,
    filled=done + s - 1,
    cache=cache,
    log_p=jnp.zeros(B),
    calls=jnp.full(B, int(prefill), jnp.int32),
    keys=keys,
  )


def _lengths(cache, first, plan):
  """Lengths of the cache, one after the other: every step reads all of it."""
  S = cache.k[0].shape[2]
  if plan.steps or sum(x.nbytes for x in jax.tree.leaves(cache)) < _LARGE:
    return [S]
  in_rounds = plan.method == "speculative"
  stages = _STAGES_OF_ROUNDS if in_rounds else _STAGES
  part = max(1, -(-(S - first) // stages))
  return [*range(min(S, first + part), S, part), S]


def _fits(state, more, slots):
  """Whether a row is unfinished, and a round of `more` slots fits into all."""
  S = state.content.shape[1] - 1
  running = state.done < state.end
  most = jnp.max(jnp.where(running, state.done, 0)) + more
  return jnp.any(running) & (most <= slots if slots < S else True)


def _window(network, state, start, R):
  """The R slots from `start` on; after the last slot anything."""
  s, end = network.model.sentinels, network.model.T + 1
  at = start[:, None] + jnp.arange(R)
  rank = start - s  # Of the first slot's content; its target is the next one.
  return orders.Slots(
    jnp.take_along_axis(
      state.content, jnp.minimum(at, state.content.shape[1] - 1), axis=1
    ),
    # Slot 0 is BOS, at 0; slot 1, with two sentinels, EOS.
    jnp.where(at < s, at * end, _ranks(state.order, rank, R)),
    jnp.where(at < s - 1, 0, _ranks(state.order, rank + 1, R)),
  )


def _ranks(order, first, count):
  """Positions of the ranks first.. of every row; of no rank anything."""
  at = first[:, None] + jnp.arange(count)
  return jnp.take_along_axis(order, jnp.clip(at, 0, order.shape[1] - 1), axis=1)


def _draw(keys, slots, log_p):
  """A token for every slot [B, Q] of laws [B, Q, V], by keys [B]."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  return jax.vmap(jax.vmap(jax.random.categorical))(fold(keys, slots), log_p)


def _commit(state, s, tokens, log_p, count):
  """Decides the next `count` [B] ranks: the first of tokens [B, Q]."""
  B, Q = tokens.shape
  at = state.done[:, None] + s + jnp.arange(Q)
  taken = jnp.arange(Q) < count[:, None]
  at = jnp.where(taken, at, state.content.shape[1])  # Out of bounds: dropped.
  content = state.content.at[jnp.arange(B)[:, None], at].set(
    tokens, mode="drop"
  )
  return state._replace(
    content=content,
    done=state.done + count,
    log_p=state.log_p + jnp.where(taken, log_p, 0.0).sum(axis=1),
  )


def _parallel(network, law, plan, blanks):
  """`width` ranks a step, or all blanks in `steps`, from their marginals."""
  s = network.model.sentinels
  width = _width(plan, network.model.T)

  def advance(i, state):
    count = width
    if plan.steps:
      left = blanks * _share_left((i + 1) / plan.steps, plan.schedule)
      count = state.end - jnp.ceil(left - 1e-4).astype(jnp.int32) - state.done
    # At least one, so that it ends, and none once it has ended.
    count = jnp.minimum(jnp.clip(count, 1, width), state.end - state.done)
    logits, state = _predict(
      network, state, width, _ranks(state.order, state.done, width)
    )
    log_p = sampling.log_law(logits, law)
    at = state.done[:, None] + s + jnp.arange(width)
    tokens = _draw(state.keys, at, log_p)
    return _commit(state, s, tokens, sampling.log_p_of(log_p, tokens), count)

  return advance, 1


def _share_left(done, schedule):
  """Share of the blanks that is left after a share of the steps."""
  if schedule == "cosine":
    return jnp.cos(jnp.minimum(done, 1) * (jnp.pi / 2))
  return 1 - jnp.minimum(done, 1)


def _width(plan, T):
  """The most tokens that a step of the plan decides."""
  if not plan.steps:
    return min(plan.width, T)
  n = plan.steps
  # The steepest step of either schedule is the last one.
  steepest = math.sin(math.pi / 2 / n) if plan.schedule == "cosine" else 1 / n
  return min(T, math.ceil(T * steepest) + 1)


def _predict(network, state, R, targets):
  """Puts what is pending, at most R slots, into the cache, and predicts."""
  s = network.model.sentinels
  pending = jnp.clip(state.done + s - state.filled, 1, R)
  logits, cache = network.predict(
    _window(network, state, state.filled, R),
    state.cache,
    state.filled,
    pending,
    targets,
  )
  filled = jnp.maximum(state.done + s, state.filled)
  return logits, state._replace(cache=cache, filled=filled)


def _adaptive(network, law, plan, blanks):
  """The surest `width` of all targets that are left."""
  draw, calls = _parallel(network, law, plan, blanks)
  width = _width(plan, network.model.T)

  def advance(i, state):
    T = state.order.shape[1]
    chunk = min(CHUNK, T)
    first = _ranks(state.order, state.done, 1)

    def score(c, carry):
      scores, cache = carry
      ranks = jnp.full_like(state.done, c * chunk)
      # A single stream's last slot has the next target, whatever is scored.
      targets = jnp.concatenate(
        [first, _ranks(state.order, ranks, chunk)], axis=1
      )
      logits, after = _predict(
        network, state._replace(cache=cache), width, targets
      )
      found = _score(jax.nn.softmax(logits[:, 1:]), plan.score)
      at = jnp.minimum(ranks[:, None] + jnp.arange(chunk), T)
      rows = jnp.arange(len(at))[:, None]
      # The pending slots are written again by every chunk, in place.
      return scores.at[rows, at].set(found, mode="drop"), after.cache

    scores, cache = jax.lax.fori_loop(
      jnp.min(state.done) // chunk,
      -(-T // chunk),
      score,
      (jnp.full(state.order.shape, -jnp.inf), state.cache),
    )
    state = state._replace(cache=cache)
    rank = jnp.arange(T)[None]
    decided, beyond = rank < state.done[:, None], rank >= state.end[:, None]
    place = jnp.where(beyond, jnp.inf, -scores)
    place = jnp.argsort(
      jnp.where(decided, -jnp.inf, place), axis=1, stable=True
    )
    order = jnp.take_along_axis(state.order, place, axis=1)
    return draw(i, state._replace(order=order))

  return advance, 1 + calls


def _score(p, name):
  """How sure the laws p [B, Q, V] are: [B, Q]."""
  match name:
    case "confidence":
      return p.max(axis=-1)
    case "entropy":
      return jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
    case "margin":
      largest = jax.lax.top_k(p, 2)[0]
      return largest[..., 0] - largest[..., 1]
  raise ValueError(f"unknown score {name!r}")


def _speculative(network, law, plan, blanks):
  """Drafts `width` tokens from their marginals; keeps what the chain allows."""
  del blanks
  s, width = network.model.sentinels, _width(plan, network.model.T)

  def advance(i, state):
    del i
    rows = jnp.arange(len(state.done))[:, None]
    targets = _ranks(state.order, state.done, width)
    logits, state = _predict(network, state, 1, targets)
    at = state.done[:, None] + s + jnp.arange(width)
    log_q = sampling.log_law(logits, law)
    drafts = _draw(state.keys, at, log_q)
    # The chain rule's laws, given the drafts before.
    content = state.content.at[rows, at].set(drafts, mode="drop")
    drafted = state._replace(content=content)
    log_p = log_q
    if width > 1:
      logits, cache = network.extend(
        _window(network, drafted, state.filled, width - 1),
        state.cache,
        state.filled,
      )
      state = state._replace(cache=cache)
      log_p = jnp.concatenate(
        [log_q[:, :1], sampling.log_law(logits, law)], axis=1
      )
    kept = _kept(state.keys, at, log_p, log_q, drafts)
    residual = jnp.log(jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0))
    again = _draw(state.keys, at + _AGAIN, residual)
    tokens = jnp.where(jnp.arange(width) < kept[:, None], drafts, again)
    count = jnp.minimum(jnp.minimum(kept + 1, width), state.end - state.done)
    state = _commit(state, s, tokens, sampling.log_p_of(log_p, tokens), count)
    return state._replace(filled=state.done + s - 1)

  return advance, 1 + (width > 1)


def _kept(keys, at, log_p, log_q, drafts):
  """How many leading drafts are accepted, each with min(1, p / q): [B]."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  coins = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys, at + _COIN))
  log_ratio = sampling.log_p_of(log_p, drafts) - sampling.log_p_of(
    log_q, drafts
  )
  accepted = jnp.log(coins) < log_ratio
  # The first is drawn from the very law that it is checked by.
  accepted = accepted.at[:, 0].set(True)
  return jnp.cumprod(accepted, axis=1).sum(axis=1)


_METHODS = {
  "sequential": _parallel,
  "parallel": _parallel,
  "speculative": _speculative,
  "adaptive": _adaptive,
}
