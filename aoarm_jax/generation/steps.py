"""The step of every method of generation from a cache, see decode.py.

A method is a function (network, law, plan, start) -> (advance, passes), where
`start` is the state before all steps:

  advance(i, state) -> state    is step i.
  passes(state) -> int          is the number of passes of the network that this
                                step takes, one number or int32 [B]. It counts
                                the passes that the row would take alone.

The types are cached.Cached, law.Sampling, plan.Plan and plan.State.
"""

import jax
import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.generation import law as sampling

# Number of targets that `adaptive` scores at once.
CHUNK = 64


def _window(network, state, start, R):
  """Return the R slots from `start` [B] on; arbitrary after the last slot."""
  s, end = network.model.sentinels, network.model.T + 1
  if network.layout.end_token is not None:
    end = state.end[:, None] + 1
  at = start[:, None] + jnp.arange(R)
  # The first slot holds the token of this rank and predicts the next rank.
  rank = start - s
  return orders.Slots(
    jnp.take_along_axis(
      state.content, jnp.minimum(at, state.content.shape[1] - 1), axis=1
    ),
    # Slot 0 is BOS at position 0. With two sentinels slot 1 is EOS, at T + 1 or
    # behind the document.
    jnp.where(at < s, at * end, _ranks(state.order, rank, R)),
    jnp.where(at < s - 1, 0, _ranks(state.order, rank + 1, R)),
  )


def _ranks(order, first, count):
  """Return the positions of `count` ranks from `first` [B] on: [B, count].

  Positions are arbitrary past the last rank and before the first one.
  """
  at = first[:, None] + jnp.arange(count)
  return jnp.take_along_axis(order, jnp.clip(at, 0, order.shape[1] - 1), axis=1)


def _draw(keys, slots, log_p):
  """Draw a token for every slot [B, Q] from laws [B, Q, V] with keys [B]."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  return jax.vmap(jax.vmap(sampling.draw))(fold(keys, slots), log_p)


def _commit(state, s, tokens, log_p, count, end_token):
  """Decide the next `count` [B] ranks by the first of the tokens [B, Q].

  The first end token ends its row. None means that there is no such token.
  """
  B, Q = tokens.shape
  rows = jnp.arange(B)[:, None]
  at = state.done[:, None] + s + jnp.arange(Q)
  taken = jnp.arange(Q) < count[:, None]
  end = state.end
  if end_token is not None:
    ends = taken & (tokens == end_token)
    is_over = ends.any(axis=1)
    count = jnp.where(is_over, jnp.argmax(ends, axis=1) + 1, count)
    end = jnp.where(is_over, state.done + count, end)
    taken = jnp.arange(Q) < count[:, None]
  # Writes out of bounds are dropped.
  at = jnp.where(taken, at, state.content.shape[1])
  # Every step of a row has more calls before it than the last one.
  steps = jnp.broadcast_to(state.calls[:, None], log_p.shape)
  trace = jnp.stack([steps.astype(jnp.float32), log_p], axis=-1)
  return state._replace(
    content=state.content.at[rows, at].set(tokens, mode="drop"),
    trace=state.trace.at[rows, at - s].set(trace, mode="drop"),
    done=state.done + count,
    end=end,
    log_p=state.log_p + jnp.where(taken, log_p, 0.0).sum(axis=1),
  )


def _parallel(network, law, plan, start):
  """Decide several ranks per step, each drawn from its marginal law.

  A step decides `plan.width` ranks. If plan.steps is set, all blanks are spread
  over that many steps instead.
  """
  s = network.model.sentinels
  end_token = network.layout.end_token if plan.is_open else None
  width = plan.tokens_per_step(start.order.shape[1])
  blanks = start.end - start.done

  def advance(i, state):
    count = width
    if plan.steps:
      left = blanks * _share_left((i + 1) / plan.steps, plan.schedule)
      count = state.end - jnp.ceil(left - 1e-4).astype(jnp.int32) - state.done
    # At least one rank is decided, so that the row ends. No rank is decided
    # once the row has ended.
    count = jnp.minimum(jnp.clip(count, 1, width), state.end - state.done)
    logits, state = _predict(
      network,
      state,
      width,
      _ranks(state.order, state.done, width),
      plan.groups,
    )
    log_p = sampling.log_law(logits, law)
    at = state.done[:, None] + s + jnp.arange(width)
    tokens = _draw(state.keys, at, log_p)
    nats = sampling.log_p_of(log_p, tokens)
    return _commit(state, s, tokens, nats, count, end_token)

  return advance, lambda state: 1


def _share_left(done, schedule):
  """Return the share of blanks left after a share `done` of the steps."""
  if schedule == "cosine":
    return jnp.cos(jnp.minimum(done, 1) * (jnp.pi / 2))
  return 1 - jnp.minimum(done, 1)


def _predict(network, state, R, targets, as_group=False):
  """Put the pending slots, R at most, into the cache and predict targets.

  Args:
    network: cached.Cached.
    state: plan.State.
    R: most slots that may be pending.
    targets: int32 [B, Q], the positions to predict, see cached.Cached.predict.
    as_group: whether the pending slots are a group. They are the tokens of the
      last step, or one slot before the first step.

  Returns:
    (logits float32 [B, Q, V], the state with these slots in its cache).
  """
  s = network.model.sentinels
  pending = jnp.clip(state.done + s - state.filled, 1, R)
  logits, cache = network.predict(
    _window(network, state, state.filled, R),
    state.cache,
    state.filled,
    pending,
    targets,
    as_group=as_group,
  )
  filled = jnp.maximum(state.done + s, state.filled)
  return logits, state._replace(cache=cache, filled=filled)


def _adaptive(network, law, plan, start):
  """Decide the `plan.width` targets that the model is surest of.

  A step first scores all targets that are left, in chunks. Then it sorts the
  order by score and decides the first ranks as `_parallel` does.
  """
  draw, _ = _parallel(network, law, plan, start)
  T = start.order.shape[1]
  width, chunk = plan.tokens_per_step(T), min(CHUNK, T)

  def chunks(state):
    """Return the chunks (first, after the last) with a target that is left."""
    return state.done // chunk, -(-state.end // chunk)

  def advance(i, state):
    first = _ranks(state.order, state.done, 1)

    def score(c, carry):
      scores, cache = carry
      ranks = jnp.full_like(state.done, c * chunk)
      # In a single stream the last slot always has the next target. So the
      # next target comes first, and its score is dropped below.
      targets = jnp.concatenate(
        [first, _ranks(state.order, ranks, chunk)], axis=1
      )
      logits, after = _predict(
        network, state._replace(cache=cache), width, targets, plan.groups
      )
      chunk_scores = _score(jax.nn.softmax(logits[:, 1:]), plan.score)
      at = jnp.minimum(ranks[:, None] + jnp.arange(chunk), T)
      rows = jnp.arange(len(at))[:, None]
      scores = scores.at[rows, at].set(chunk_scores, mode="drop")
      # Every chunk writes the pending slots again, in place.
      return scores, after.cache

    # Only unfinished rows bound the chunks. Rows that only fill the batch are
    # finished soon.
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
  """Return how sure the model is of targets with laws p [B, Q, V]: [B, Q]."""
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
  """Draft `plan.width` tokens from their marginals; keep a checked prefix.

  The first draft that the chain rule rejects is replaced by a draw from the
  residual law, so the law of a text is exact (ASSD, arXiv 2504.20456).
  """
  s, width = network.model.sentinels, plan.tokens_per_step(start.order.shape[1])
  end_token = network.layout.end_token if plan.is_open else None

  def advance(i, state):
    del i
    rows = jnp.arange(len(state.done))[:, None]
    targets = _ranks(state.order, state.done, width)
    logits, state = _predict(network, state, 1, targets)
    at = state.done[:, None] + s + jnp.arange(width)
    log_q = sampling.log_law(logits, law)
    drafts = _draw(state.keys, at, log_q)
    # One pass gives the laws of the chain rule: each is conditioned on the
    # drafts before its own.
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
    accepted = _kept(state.keys, at, log_p, log_q, drafts)
    residual = jnp.log(jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0))
    again = _draw(state.keys, at + purposes.AGAIN, residual)
    tokens = jnp.where(jnp.arange(width) < accepted[:, None], drafts, again)
    count = jnp.minimum(
      jnp.minimum(accepted + 1, width), state.end - state.done
    )
    nats, before = sampling.log_p_of(log_p, tokens), state.done
    state = _commit(state, s, tokens, nats, count, end_token)
    return state._replace(
      filled=state.done + s - 1,
      accepted=state.accepted + jnp.minimum(accepted, state.done - before),
    )

  return advance, lambda state: 1 + (width > 1)


def _kept(keys, at, log_p, log_q, drafts):
  """Return how many leading drafts are accepted: int32 [B].

  A draft is accepted with probability min(1, p / q).

  Args:
    keys: typed PRNG keys [B].
    at: int32 [B, Q], the slots of the drafts.
    log_p: float32 [B, Q, V], laws of the chain rule.
    log_q: float32 [B, Q, V], laws that the drafts were drawn from.
    drafts: int32 [B, Q].
  """
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  coins = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys, at + purposes.COIN))
  log_ratio = sampling.log_p_of(log_p, drafts) - sampling.log_p_of(
    log_q, drafts
  )
  accepted = jnp.log(coins) < log_ratio
  # The first draft is drawn from the same law that checks it, so it passes
  # whatever the rounding.
  accepted = accepted.at[:, 0].set(True)
  return jnp.cumprod(accepted, axis=1).sum(axis=1)


METHODS = {
  "sequential": _parallel,
  "parallel": _parallel,
  "speculative": _speculative,
  "adaptive": _adaptive,
}
