"""The only place that defines a likelihood: from slots and logits to nats.

The chain rule in a given order sigma is (arXiv 2602.16092)

  log p(x | sigma) = sum over ranks r of log p(x_sigma(r) | x_sigma(<r), sigma).

Estimators differ in where their orders come from. evaluation/estimators.py
lists them.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp

from aoarm_jax import lengths, orders
from aoarm_jax.config import mechanisms, purposes
from aoarm_jax.config import schema as config_lib

# The logit of what is impossible. Its probability is exactly 0, and no product
# with it is NaN.
_NEVER = -1e9

# Maps int32 slots [B, S] to float32 logits [B, R, V]. A network with bound
# parameters is such a function. Beside it, a network has a method `nats` that
# takes slots, targets and Barred, and returns what `nats_of_logits` would,
# without holding all logits in memory. It may return a tree of such arrays, as
# model/distilled.py does; then the functions below return such a tree.
Apply = Callable[[orders.Slots], jax.Array]


class Barred(NamedTuple):
  """A symbol that some rows cannot have.

  Attributes:
    symbol: its id.
    rows: bool [B, R], the rows in which its probability is 0.
  """

  symbol: int
  rows: jax.Array


def order_nll(
  apply: Apply,
  layout: orders.Layout,
  tokens: jax.Array,
  order: jax.Array,
  *,
  group_start: jax.Array | None = None,
  ranks: jax.Array | None = None,
) -> jax.Array:
  """Return -log p(x_sigma(r) | x_sigma(<r), sigma), by rank r.

  With a masked mechanism, every rank takes its own pass, in which this rank and
  all later ranks are masked.

  Where rows are padded documents, real positions come first in every order, and
  the ranks of padding have 0 nats. A row has the nats of the same row with
  other padding, and of a shorter row without it. With one sentinel the end
  token is predicted, and it has probability 0 where lengths.can_end says that
  the text cannot end. From left to right, the probabilities of all texts that
  fit into T positions then sum to 1. Any other order of the real positions
  tells something of the length. So the probability is that of a text given what
  its order tells, and those of all lengths may sum to more than 1. With two
  sentinels all probabilities are those of a text given its length.

  Args:
    apply: maps slots to logits.
    layout: the layout of the network. Its `end` is larger than T + 1 if only
      the first T positions of its window are scored.
    tokens: int [B, T], natural order.
    order: int32 [B, T], permutations of 1..T.
    group_start: bool [B, T], see orders.to_slots. Each rank is then conditioned
      on the groups before its own. The sum of a row is the log-probability of
      generating whole groups at once.
    ranks: int32 [B, R], the only ranks to compute, for two streams or a masked
      mechanism. None means all ranks.

  Returns:
    float32 [B, T] nats. Column r is rank r, and the sum of a row is -log p(x |
    sigma). If `ranks` are given, the shape is [B, R].
  """
  chex.assert_equal_shape([tokens, order])
  length = lengths.real(tokens, layout)
  # The last group may go on with padding: only padding comes after it and sees
  # its content rows.
  order = lengths.real_first(order, length)
  if layout.masked:
    return _masked_chain_nll(apply, layout, tokens, order, ranks)
  slots = orders.to_slots(tokens, order, layout, group_start, ranks, length)
  targets = jnp.take_along_axis(tokens.astype(jnp.int32), order - 1, axis=1)
  # Without ranks, every slot predicts, also the sentinels before the last one.
  before = ((0, 0), (layout.sentinels - 1, 0))

  def of_rows(by_rank):
    if ranks is not None:
      return jnp.take_along_axis(by_rank, ranks, axis=1)
    return jnp.pad(by_rank, before)

  barred = is_real = None
  if length is not None:
    is_real = lengths.is_real(length, order.shape[1])
  if is_real is not None and layout.predicts_end:
    never = is_real & ~lengths.can_end(order, group_start)
    barred = Barred(cast(int, layout.end_token), of_rows(never))
  nats = _nats(apply, slots, of_rows(targets), barred)
  if is_real is not None:
    rows = of_rows(is_real)
    nats = jax.tree.map(lambda x: jnp.where(rows, x, 0.0), nats)
  first = 0 if ranks is not None else layout.sentinels - 1
  return jax.tree.map(lambda x: x[:, first:], nats)


def order_logits(
  apply: Apply, layout: orders.Layout, tokens: jax.Array, order: jax.Array
) -> jax.Array:
  """Return the logits of every conditional of `order_nll`, by rank.

  Args:
    apply: maps slots to logits.
    layout: the layout of the network.
    tokens: int [B, T], natural order.
    order: int32 [B, T], permutations of 1..T. For padded documents the real
      positions come first, as in `order_nll`, and the logits of later ranks are
      arbitrary.

  Returns:
    float32 [B, T, V]. Row r has the logits of the token at position order[r],
    given the tokens of the ranks before r. -log softmax of them at that token
    is `order_nll`.
  """
  chex.assert_equal_shape([tokens, order])
  length = lengths.real(tokens, layout)
  order = lengths.real_first(order, length)
  s = layout.sentinels
  if layout.masked:

    def of_pass(tokens, masked, index):
      told = lengths.real(tokens, layout)
      logits = apply(orders.to_masked_slots(tokens, masked, layout, told))
      index = (index + s)[..., None]
      return jnp.take_along_axis(logits, index, axis=1)[:, 0]

    logits = _over_ranks(of_pass, layout, tokens, order)
    return jnp.moveaxis(logits, 0, 1)
  logits = apply(orders.to_slots(tokens, order, layout, length=length))
  logits = logits[:, s - 1 :]
  if layout.predicts_end:
    never = ~lengths.can_end(order)
    logits = _without(logits, Barred(cast(int, layout.end_token), never))
  return logits


def _without(logits, barred):
  """Return logits [B, R, V] with `_NEVER` where a symbol cannot be."""
  is_symbol = jnp.arange(logits.shape[-1]) == barred.symbol
  never = barred.rows[..., None] & is_symbol[None, None]
  return jnp.where(never, _NEVER, logits)


def _nats(apply, slots, targets, barred=None):
  if hasattr(apply, "nats"):
    return apply.nats(slots, targets, barred)
  return nats_of_logits(apply(slots), targets, barred)


def nats_of_logits(
  logits: jax.Array, targets: jax.Array, barred: Barred | None = None
) -> jax.Array:
  """Return -log softmax(logits) at the targets: float32 [B, R].

  Args:
    logits: float32 [B, R, V].
    targets: int32 [B, R].
    barred: a symbol that some rows cannot have.
  """
  if barred is not None:
    logits = _without(logits, barred)
  log_p = jax.nn.log_softmax(logits)
  # A one-hot product replaces a gather, whose gradient would be a scatter.
  chosen = jax.nn.one_hot(targets, logits.shape[-1], dtype=log_p.dtype)
  return -jnp.sum(log_p * chosen, axis=-1)


def _masked_chain_nll(apply, layout, tokens, order, ranks):
  """Return `order_nll` of a masked mechanism."""

  def of_pass(tokens, masked, index):
    by_position = masked_nll(apply, layout, tokens, masked)
    return jnp.take_along_axis(by_position, index, axis=1)[:, 0]

  return _over_ranks(of_pass, layout, tokens, order, ranks).T


def _over_ranks(of_pass, layout, tokens, order, ranks=None):
  """Return a result [R, B, ...] of the pass that each rank takes.

  Args:
    of_pass: function from the tokens of the whole window [B, W], the masked
      positions, bool [B, W], and the index of the rank's position, int32
      [B, 1], to [B, ...].
    layout: the layout of a masked mechanism.
    tokens: int [B, T].
    order: int32 [B, T], real positions first.
    ranks: int32 [B, R]. None means all ranks.
  """
  rank_of = jnp.argsort(order, axis=1)
  if ranks is None:
    ranks = jnp.broadcast_to(jnp.arange(order.shape[1])[None], order.shape)
  # Positions after T belong to the network's window. They are masked.
  window = ((0, 0), (0, layout.end - 1 - order.shape[1]))
  tokens = jnp.pad(tokens, window, constant_values=layout.end_token or 0)
  rank_of = jnp.pad(rank_of, window, constant_values=layout.end)

  def of_rank(rank):
    index = jnp.take_along_axis(order, rank[:, None], axis=1) - 1
    return of_pass(tokens, rank_of >= rank[:, None], index)

  return jax.lax.map(of_rank, ranks.T)


def masked_nll(
  apply: Apply, layout: orders.Layout, tokens: jax.Array, masked: jax.Array
) -> jax.Array:
  """Return -log p(x_p | the unmasked tokens), by position p.

  Args:
    apply: maps slots to logits, with a masked mechanism.
    layout: the layout of the network.
    tokens: int [B, T].
    masked: bool [B, T].

  Returns:
    float32 [B, T] nats. The entry is 0 where a token is not masked, and where
    it is padding.
  """
  length = lengths.real(tokens, layout)
  if length is not None:
    masked = masked & lengths.is_real(length, tokens.shape[1])
  slots = orders.to_masked_slots(tokens, masked, layout, length)
  before = ((0, 0), (layout.sentinels, 0))
  nats = _nats(apply, slots, jnp.pad(tokens.astype(jnp.int32), before))
  return jnp.where(masked, nats[:, layout.sentinels :], 0.0)


def ensembled_nll(sequence_nats: jax.Array) -> jax.Array:
  """Return -log mean_k p(x | sigma_k).

  Args:
    sequence_nats: float32 [K, B], -log p(x | sigma_k).

  Returns:
    float32 [B] nats. By Jensen's inequality this is at most the mean of
    `sequence_nats` over k. So never compare it with any_order.
  """
  K = sequence_nats.shape[0]
  return jnp.log(K) - jax.nn.logsumexp(-sequence_nats, axis=0)


def context_ensembled_nll(
  apply: Apply,
  layout: orders.Layout,
  keys: jax.Array,
  tokens: jax.Array,
  order: jax.Array,
  *,
  contexts: int,
  ranks: jax.Array | None = None,
) -> jax.Array:
  """Return -log mean_k p(x_sigma(r) | x_sigma(<r) in order pi_k), by rank r.

  Every conditional is averaged over random permutations pi_k of its context
  (AO-GPT, arXiv 2506.19935). New permutations are drawn for every rank. The
  result is a normalised density in the order sigma. It costs T * contexts
  passes.

  Args:
    apply: maps slots to logits, with a mechanism that is not masked.
    layout: the layout of the network.
    keys: typed PRNG keys [B].
    tokens: int [B, T].
    order: int32 [B, T], sigma.
    contexts: K, the number of permutations per rank.
    ranks: int32 [B, R], the only ranks to compute. None means all ranks.

  Returns:
    float32 [B, T] nats, by rank; [B, R] if `ranks` are given.
  """
  T = order.shape[1]
  order = lengths.real_first(order, lengths.real(tokens, layout))
  all_ranks = jnp.arange(T)[None]
  if ranks is None:
    ranks = jnp.broadcast_to(all_ranks, order.shape)
  R = ranks.shape[1]

  def of_draw(column_and_draw):
    column, draw = column_and_draw
    rank = jax.lax.dynamic_slice_in_dim(ranks, column, 1, axis=1)
    row_keys = jax.vmap(jax.random.fold_in)(keys, rank[:, 0] * contexts + draw)
    place = jnp.where(all_ranks < rank, uniform(row_keys, T), 1.0 + all_ranks)
    shuffled = jnp.take_along_axis(order, jnp.argsort(place, axis=1), axis=1)
    nats = order_nll(apply, layout, tokens, shuffled)
    return jnp.take_along_axis(nats, rank, axis=1)[:, 0]

  grid = jnp.meshgrid(jnp.arange(R), jnp.arange(contexts), indexing="ij")
  nats = jax.lax.map(of_draw, tuple(x.reshape(-1) for x in grid))
  return jax.vmap(ensembled_nll)(nats.reshape(R, contexts, -1)).T


class Draws(NamedTuple):
  """The random choices of one training step, for each sequence.

  A choice that the loss does not use is None.

  Attributes:
    order: int32 [B, T].
    group_start: bool [B, T], see orders.to_slots.
    ranks: int32 [B, R], the ranks that are predicted.
    time: float32 [B], for a masked mechanism, the expected share of masked
      tokens.
    masked: bool [B, T], by position: whether the token is masked.
  """

  order: jax.Array
  group_start: jax.Array | None = None
  ranks: jax.Array | None = None
  time: jax.Array | None = None
  masked: jax.Array | None = None


def draw(
  key: jax.Array,
  batch: int,
  T: int,
  options: config_lib.Orders,
  train: config_lib.Train,
  kind: mechanisms.Mechanism,
  step: jax.Array,
  length: jax.Array | None = None,
) -> Draws:
  """Draw the orders of a training step and the other draws of its loss.

  Args:
    key: typed PRNG key of the step.
    batch: B.
    T: the number of positions.
    options: the orders and groups of training.
    train: gives query_fraction and least_time.
    kind: the mechanism.
    step: the training step, for the curriculum.
    length: int32 [B], the real positions of padded documents; None means T.
      Real positions come first in the orders, and real ranks are chosen first.
  """

  def fold(purpose):
    return jax.random.fold_in(key, purpose)

  order = orders.draw(key, batch, T, options, step=step)
  order = lengths.real_first(order, length)
  if kind.masked:
    time = draw_times(fold(purposes.TIMES), batch, train.least_time)
    keys = row_keys(fold(purposes.MASKS), batch)
    masked = draw_masked(keys, order, time, length)
    return Draws(order, time=time, masked=masked)
  ranks = None
  if train.query_fraction < 1:
    R = orders.query_count(T, train.query_fraction)
    noise = uniform(row_keys(fold(purposes.RANKS), batch), T)
    if length is not None:
      noise += ~lengths.is_real(length, T)
    ranks = jnp.sort(jnp.argsort(noise, axis=1)[:, :R], axis=1)
  groups = orders.draw_groups(fold(purposes.GROUPS), batch, T, options)
  return Draws(order, group_start=groups, ranks=ranks)


def draw_times(key: jax.Array, batch: int, least: float) -> jax.Array:
  """Draw stratified times in [least, 1): float32 [B].

  Each time is uniform, and together they are evenly spread.

  Args:
    key: typed PRNG key.
    batch: B.
    least: the least time.
  """
  share = jax.random.uniform(key) + jnp.arange(batch) / batch
  return least + (1 - least) * (share % 1)


def draw_masked(
  keys: jax.Array,
  order: jax.Array,
  time: jax.Array,
  length: jax.Array | None = None,
  known: jax.Array | None = None,
) -> jax.Array:
  """Mask the last Binomial(T, time) tokens of every order.

  With a uniform order, this masks every token independently with probability
  `time`: the linear schedule of MDLM (arXiv 2406.07524).

  Args:
    keys: typed PRNG keys [B].
    order: int32 [B, T].
    time: float32 [B].
    length: int32 [B], the number of leading ranks to mask among; None means T.
      Then Binomial(length, time) of them are masked.
    known: int32 [B], the number of leading ranks that are never masked. It
      needs `length`, and Binomial(length - known, time) tokens are masked.

  Returns:
    bool [B, T], by position.
  """
  T, rank_of = order.shape[1], jnp.argsort(order, axis=1)
  coins = uniform(keys, T) < time[:, None]
  if length is None:
    return rank_of >= T - coins.sum(axis=1, keepdims=True)
  coins &= lengths.is_real(length, T)
  if known is not None:
    coins &= ~lengths.is_real(known, T)
  length = length[:, None]
  first = length - coins.sum(axis=1, keepdims=True)
  return (rank_of >= first) & (rank_of < length)


def row_keys(
  key: jax.Array, batch: int, first_row: jax.Array | int = 0
) -> jax.Array:
  """Return a key for every row, as a function of (key, first_row + b) alone.

  Args:
    key: typed PRNG key.
    batch: B.
    first_row: the index of row 0 in a larger batch.

  Returns:
    Typed PRNG keys [B].
  """
  return keys_of(key, first_row + jnp.arange(batch))


def keys_of(key: jax.Array, rows: jax.Array) -> jax.Array:
  """Return a key for every row index in `rows`, int32 [B]: typed keys [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_rows(keys: jax.Array, data: jax.Array | int) -> jax.Array:
  """Fold the same number into every key of `keys` [B]: typed keys [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def uniform(keys: jax.Array, count: int) -> jax.Array:
  """Draw numbers in [0, 1) from each key of `keys` [B]: float32 [B, count]."""
  return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def training_nll(
  apply: Apply, layout: orders.Layout, tokens: jax.Array, draws: Draws
) -> jax.Array:
  """Return the loss that training minimises: nats of every sequence.

  Without groups this is an unbiased estimate of -log p(x | sigma), however the
  ranks are chosen.

  With a masked mechanism under uniform orders, this is an unbiased estimate of
  the negative ELBO of MDLM (arXiv 2406.07524, eq. 8), with all times from
  least_time on. The negative ELBO is the mean of -log p(x | sigma) over uniform
  orders. Under other orders the loss of a masked mechanism is no likelihood.

  Args:
    apply: maps slots to logits.
    layout: the layout of the network.
    tokens: int [B, T].
    draws: the draws of this batch.

  Returns:
    float32 [B]; a tree of them if `apply.nats` returns a tree.
  """
  if draws.masked is not None:
    assert draws.time is not None  # `draw` draws the two together.
    nats = masked_nll(apply, layout, tokens, draws.masked)
    return nats.sum(axis=1) / draws.time
  nats = order_nll(
    apply,
    layout,
    tokens,
    draws.order,
    group_start=draws.group_start,
    ranks=draws.ranks,
  )
  R = tokens.shape[1] if draws.ranks is None else draws.ranks.shape[1]
  factor: jax.Array | float = tokens.shape[1] / R
  length = lengths.real(tokens, layout)
  if length is not None and draws.ranks is not None:
    factor = length / jnp.minimum(length, R)
  return jax.tree.map(lambda x: x.sum(axis=1) * factor, nats)
