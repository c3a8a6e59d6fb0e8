"""The steps of generation from a cache: what each method of decode.py does.

A method is (network, law, plan, state) -> (advance, passes), from the state
before all steps: advance(i, state) -> state is step i, and passes(state) the
passes of the network that it takes, one number or one a row: those that the row
would take alone. Types: plan.State, plan.Plan.
"""

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.generation import law as sampling

# Rows scored at once where the next target is chosen.
CHUNK = 64


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


def _parallel(network, law, plan, start):
  """`width` ranks a step, or all blanks in `steps`, from their marginals."""
  s = network.model.sentinels
  width = plan.tokens_per_step(start.order.shape[1])
  blanks = start.end - start.done

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

  return advance, lambda state: 1


def _share_left(done, schedule):
  """Share of the blanks that is left after a share of the steps."""
  if schedule == "cosine":
    return jnp.cos(jnp.minimum(done, 1) * (jnp.pi / 2))
  return 1 - jnp.minimum(done, 1)


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


def _adaptive(network, law, plan, start):
  """The surest `width` of all targets that are left."""
  draw, _ = _parallel(network, law, plan, start)
  T = start.order.shape[1]
  width, chunk = plan.tokens_per_step(T), min(CHUNK, T)

  def chunks(state):
    """The first chunk with a target that is left, and that after the last."""
    return state.done // chunk, -(-state.end // chunk)

  def advance(i, state):
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

    # Of rows that are not finished: those that only fill a batch soon are.
    running = state.done < state.end
    lowest, highest = chunks(state)
    scores, cache = jax.lax.fori_loop(
      jnp.min(jnp.where(running, lowest, T)),
      jnp.max(jnp.where(running, highest, 0)),
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

  def passes(state):
    lowest, highest = chunks(state)
    return highest - lowest + 1

  return advance, passes


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


def _speculative(network, law, plan, start):
  """Drafts `width` tokens from their marginals; keeps what the chain allows."""
  s, width = network.model.sentinels, plan.tokens_per_step(start.order.shape[1])

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
    again = _draw(state.keys, at + purposes.AGAIN, residual)
    tokens = jnp.where(jnp.arange(width) < kept[:, None], drafts, again)
    count = jnp.minimum(jnp.minimum(kept + 1, width), state.end - state.done)
    state = _commit(state, s, tokens, sampling.log_p_of(log_p, tokens), count)
    return state._replace(
      filled=state.done + s - 1,
      accepted=state.accepted + jnp.minimum(kept, count),
    )

  return advance, lambda state: 1 + (width > 1)


def _kept(keys, at, log_p, log_q, drafts):
  """How many leading drafts are accepted, each with min(1, p / q): [B]."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  coins = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys, at + purposes.COIN))
  log_ratio = sampling.log_p_of(log_p, drafts) - sampling.log_p_of(
    log_q, drafts
  )
  accepted = jnp.log(coins) < log_ratio
  # The first is drawn from the very law that it is checked by.
  accepted = accepted.at[:, 0].set(True)
  return jnp.cumprod(accepted, axis=1).sum(axis=1)


METHODS = {
  "sequential": _parallel,
  "parallel": _parallel,
  "speculative": _speculative,
  "adaptive": _adaptive,
}
