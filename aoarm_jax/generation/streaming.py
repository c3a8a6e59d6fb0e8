"""The tokens of one text as they are drawn, step by step.

Every step is one step of decode.generate or diffusion.generate, with the same
keys and shapes. So a stream draws the text that they would draw.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax.data import tokenizers
from aoarm_jax.devices import sharding
from aoarm_jax.generation import decode, diffusion
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.model import cached
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import patience


class Token(NamedTuple):
  """A token that was just drawn.

  Tokens of one step come one after the other.

  Attributes:
    rank: its place in the order of generation, from 0. Known tokens have the
      first ranks, and do not come.
    position: its position, from 1.
    token: its id. The last one is the end of a document if the model draws
      that.
    log_p: nats, its log-probability under the law that decided it. The sum over
      a text is its Text.log_p.
    text: the text so far. A token before the last decided one that is not
      decided yet is a `_`.
    seed: config.sample.seed of the call. `generate` and `infill` draw the same
      text with it.
  """

  rank: int
  position: int
  token: int
  log_p: float
  text: str
  seed: int


class Decided(NamedTuple):
  """What is decided of a text after a step: arrays on the device or the host.

  Attributes:
    done: int32 [], the number of leading ranks that are decided.
    is_over: bool [], whether nothing is left.
    order: int32 [T].
    tokens: int32 [T], by position.
    nats: float32 [T], by position: the log-probability of every drawn token.
  """

  done: Any
  is_over: Any
  order: Any
  tokens: Any
  nats: Any


class Stepper:
  """Draws a batch step by step. Each program is compiled at its first use."""

  def __init__(self, network: network_lib.Network) -> None:
    """Compile nothing yet.

    Args:
      network: the network that generates; with a mesh.
    """
    assert network.mesh is not None
    self._network = network
    jit = functools.partial(
      jax.jit, out_shardings=(None, sharding.replicated(network.mesh))
    )
    self._begin = jit(self._begun, static_argnames=("plan", "prefill"))
    self._advance = jit(
      self._advanced, static_argnames="plan", donate_argnames="state"
    )

  def steps(
    self,
    params: Any,
    key: jax.Array,
    law: sampling.Sampling,
    by_row: Sequence[jax.Array],
    *,
    plan: plan_lib.Plan,
    prefill: bool,
  ) -> Iterator[Decided]:
    """Yield what is decided of the first text: at the start and by each step.

    Args:
      params: the network's parameters, on the mesh.
      key: typed PRNG key of the draws.
      law: the law of every draw.
      by_row: tokens, known, length, rows and order of decode.generate.
      plan: the way through the blanks.
      prefill: see decode.generate.
    """
    if not self._network.layout.masked:
      law, plan = decode.prepared(self._network, law, plan)
    with patience.waiting("compiling or drawing the start of a text"):
      state, decided = self._begin(
        params, key, *by_row, plan=plan, prefill=prefill
      )
      here = jax.device_get(decided)
    yield here
    first = None
    if not self._network.layout.masked:
      # Copies, because the state is given away.
      first = jax.tree.map(jnp.copy, (state.done, state.end))
    i = 0
    while not here.is_over:
      with patience.waiting("compiling or drawing a step of a text"):
        state, decided = self._advance(
          params, law, state, first, np.int32(i), plan=plan
        )
        here = jax.device_get(decided)
      i += 1
      yield here

  def _begun(
    self, params, key, tokens, known, length, rows, order, *, plan, prefill
  ):
    """Return the state before the first step, and what is decided."""
    text = key, tokens, known, order
    options = {"plan": plan, "rows": rows, "length": length}
    state: Any
    if self._network.layout.masked:
      state = diffusion.begin(self._network, *text, **options)
    else:
      network = cached.Cached(self._network.bind(params))
      state = decode.begin(network, *text, prefill=prefill, **options)
    return state, self._decided(state, plan)

  def _advanced(self, params, law, state, first, i, *, plan):
    """Return the state after a step, and what is decided."""
    if self._network.layout.masked:
      state = diffusion.advance(self._network, params, law, plan, state)
    else:
      network = cached.Cached(self._network.bind(params))
      start = state._replace(done=first[0], end=first[1])
      state = decode.step_of(network, law, plan, start)(i, state)
    return state, self._decided(state, plan)

  def _decided(self, state, plan):
    """Return what is decided of the first text of a state."""
    if self._network.layout.masked:
      is_open = diffusion.is_open(state, plan)
      done = state.length - is_open.sum(axis=1)
      every = Decided(
        done,
        ~is_open.any(axis=1),
        diffusion.decided(state),
        state.tokens,
        state.nats,
      )
    else:
      every = Decided(
        state.done,
        state.done >= state.end,
        state.order,
        decode.tokens_of(state, plan),
        decode.by_position(state, state.trace[..., 1]),
      )
    return jax.tree.map(lambda x: x[0], every)


def tokens(
  steps: Iterator[Decided],
  tokenizer: tokenizers.Tokenizer,
  n: int,
  end_token: int | None,
  seed: int,
) -> Iterator[Token]:
  """Yield every drawn token with the text so far.

  Args:
    steps: the steps of a text; see Stepper.steps.
    tokenizer: the model's tokenizer.
    n: the number of positions. Later ones hold no token of the text.
    end_token: the id that ends a padded document, or None.
    seed: the seed of the call.
  """
  shown = int(next(steps).done)
  for step in steps:
    is_decided = np.zeros(n, bool)
    at = step.order[: step.done] - 1
    before = at[:shown]
    is_decided[before[before < n]] = True
    for rank in range(shown, int(step.done)):
      place = at[rank]
      token = int(step.tokens[place])
      if place < n and token != end_token:
        is_decided[place] = True
      # A known end that tells the length has a rank, and is not in the text.
      yield Token(
        rank - int((step.order[:rank] > n).sum()),
        int(place) + 1,
        token,
        float(step.nats[place]),
        so_far(tokenizer, step.tokens[:n], is_decided),
        seed,
      )
    shown = int(step.done)


def so_far(
  tokenizer: tokenizers.Tokenizer, ids: np.ndarray, is_decided: np.ndarray
) -> str:
  """Return the text up to its last decided token, with a `_` for others.

  Args:
    tokenizer: the model's tokenizer.
    ids: int32 [n]; arbitrary where not decided.
    is_decided: bool [n].
  """
  n = int(np.flatnonzero(is_decided)[-1]) + 1 if is_decided.any() else 0
  text = ""
  borders = np.flatnonzero(np.diff(is_decided[:n])) + 1
  for run in np.split(np.arange(n), borders):
    if len(run):
      is_known = is_decided[run[0]]
      text += tokenizer.decode(ids[run]) if is_known else "_" * len(run)
  return text
