"""Between symbols and rows: the embedding, and the loss at the head.

Small vocabularies take one-hot products, which are fast and deterministic. With
large ones these would cost as much as the network. Then the gradient of the
embedding is a sum over sorted symbols, and the loss goes through the vocabulary
in blocks, so that the logits of all rows are never in memory together. Both are
deterministic, too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import layout

from aoarm_jax import objective
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding

# The least number of symbols of a large vocabulary, and of a block of it.
LARGE = 8192
BLOCK = 4096
# Larger blocks are a multiple of this.
_MULTIPLE = 128
# Sorted rows of which one product sums those of equal symbols.
_TILE = 128
_ROWS = ("batch", "slots")


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Return the rows of `table` [V, D] at int32 `tokens` [B, S]: [B, S, D]."""
  return _row_major(table[tokens])


def pin(x: jax.Array) -> jax.Array:
  """Return x with its last axis innermost in memory, then the one before it."""
  order = layout.Layout(major_to_minor=tuple(range(x.ndim)))
  return layout.with_layout_constraint(x, order)


def _row_major(x):
  # Without this, XLA's GPU layout pass puts the batch innermost, here and in
  # the whole residual stream. Every matmul then needs transpositions. On an
  # H200 they cost 12% of a training step with two streams, and 3% with one.
  mesh = sharding.spread()
  if not mesh or x.ndim != 3:
    return pin(x)
  # Each device pins its own piece. jax 0.10 would gather the whole batch for a
  # constraint on the whole array.
  spec = sharding.spec(mesh, x.shape, *_ROWS, "width")
  return jax.shard_map(pin, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _embed_forward(table, tokens):
  return embed(table, tokens), (tokens, table.shape[0])


def _embed_backward(residuals, gradient):
  tokens, V = residuals
  if V >= LARGE:
    return _sum_over_devices(gradient, tokens, V).astype(gradient.dtype), None
  # The gradient of a gather would be a scatter, in which all tokens contend for
  # few rows.
  one_hot = jax.nn.one_hot(tokens, V, dtype=gradient.dtype)
  return jnp.einsum("...v,...d->vd", one_hot, gradient), None


embed.defvjp(_embed_forward, _embed_backward)


def _sum_over_devices(rows, tokens, V):
  """Return `sum_by_symbol`; each device of a mesh first sums its own rows."""
  mesh = sharding.spread()
  if not mesh or rows.ndim != 3:
    return sum_by_symbol(rows, tokens, V)
  cut = sharding.spec(mesh, tokens.shape, *_ROWS)
  axes = tuple(jax.tree.leaves(tuple(cut)))

  def local(rows, tokens):
    total = sum_by_symbol(rows, tokens, V)
    return jax.lax.psum(total, axes) if axes else total

  return jax.shard_map(
    local, in_specs=(jax.P(*cut, None), cut), out_specs=jax.P(), check_vma=False
  )(rows, tokens)


def sum_by_symbol(rows: jax.Array, tokens: jax.Array, V: int) -> jax.Array:
  """Return the sum of the rows of each symbol, in a fixed order.

  The rows are sorted by symbol. Products with small one-hot matrices sum equal
  symbols within tiles of sorted rows, and a scan carries the sum of a symbol
  from tile to tile. A scatter would be as fast, but on a GPU its order changes.

  Args:
    rows: [..., D].
    tokens: int32 [...], ids below V.
    V: the number of symbols.

  Returns:
    float32 [V, D].
  """
  D = rows.shape[-1]
  rows, tokens = rows.reshape(-1, D), tokens.reshape(-1)
  padding = -len(rows) % _TILE
  rows = jnp.pad(rows, ((0, padding), (0, 0)))
  tokens = jnp.pad(tokens, (0, padding), constant_values=V)
  order = jnp.argsort(tokens, stable=True)
  ordered = tokens[order]
  ids = ordered.reshape(-1, _TILE)
  # The number of the symbol within its tile.
  changes = ids[:, 1:] != ids[:, :-1]
  place = jnp.cumsum(jnp.pad(changes, ((0, 0), (1, 0))), axis=1)
  partial = jnp.einsum(
    "ncp,ncd->npd",
    jax.nn.one_hot(place, _TILE, dtype=rows.dtype),
    rows[order].reshape(*ids.shape, D),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST,
  )
  tiles = jnp.arange(len(ids))
  # A scan sums the last symbol of each tile, in this tile and before it.
  before = jnp.pad(ids[:-1, -1], (1, 0), constant_values=-1)
  goes_on = (place[:, -1] == 0) & (ids[:, 0] == before)

  def combine(first, second):
    value = jnp.where(second[0][:, None], first[1], 0) + second[1]
    return first[0] & second[0], value

  _, carried = jax.lax.associative_scan(
    combine, (goes_on, partial[tiles, place[:, -1]])
  )
  symbols = jnp.arange(V)
  start = jnp.searchsorted(ordered, symbols, side="left")
  end = jnp.searchsorted(ordered, symbols, side="right")
  tile, row = jnp.divmod(jnp.maximum(end - 1, 0), _TILE)
  total = partial[tile, place[tile, row]]
  began_before = start < tile * _TILE
  total += jnp.where(began_before[:, None], carried[tile - 1], 0)
  return jnp.where((end > start)[:, None], total, 0)


def block_size(V: int, compute: config_lib.Compute) -> int:
  """Return the symbols of a block of the loss; 0 for all of them together."""
  if compute.loss_block:
    return min(compute.loss_block, V)
  return BLOCK if V >= LARGE else 0


def nll(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  block: int,
  barred: objective.Barred | None = None,
) -> jax.Array:
  """Return -log softmax(x @ head) at the targets, in nats.

  Args:
    x: [B, R, D].
    head: [D, V], like x.
    targets: int32 [B, R].
    block: the largest number of symbols of a block.
    barred: a symbol that some rows cannot have.

  Returns:
    float32 [B, R].
  """
  lse, chosen = _statistics(x, head, targets, block, barred)
  # On a mesh, every device of the axis of the vocabulary has a part.
  return jax.nn.logsumexp(lse, axis=-1) - chosen.sum(axis=-1)


def logits(x: jax.Array, head: jax.Array) -> jax.Array:
  """Return x @ head: float32 [B, R, V]."""
  return jnp.einsum("brd,dv->brv", x, head, preferred_element_type=jnp.float32)


def _statistics(x, head, targets, block, barred):
  """Return log-sum-exps of the logits, and the logits at the targets.

  Each is float32 [B, R, W], where W devices share the vocabulary. A part that
  does not have a target counts as 0.
  """
  symbol = -1 if barred is None else barred.symbol
  rows = jnp.zeros(targets.shape, bool) if barred is None else barred.rows
  mesh = sharding.spread()
  cut: jax.P = jax.P(None, None)
  columns = None
  if mesh:
    cut = sharding.spec(mesh, targets.shape, *_ROWS)
    columns = sharding.spec(mesh, head.shape, None, "vocabulary")[1]

  def local(x, head, targets, rows):
    first = jax.lax.axis_index(columns) * head.shape[1] if columns else 0
    found = _scan(x, head, targets - first, rows, symbol - first, block)
    return [y[..., None] for y in found]

  if not mesh:
    return local(x, head, targets, rows)
  return jax.shard_map(
    local,
    in_specs=(jax.P(*cut, None), jax.P(None, columns), cut, cut),
    out_specs=[jax.P(*cut, columns)] * 2,
    check_vma=False,
  )(x, head, targets, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _scan(x, head, targets, rows, symbol, block):
  """Return log-sum-exps and the logits at the targets: float32 [B, R] each.

  Args:
    x: [B, R, D].
    head: [D, V], the part of this device.
    targets: int32 [B, R]. Outside of this part, the logit counts as 0.
    rows: bool [B, R], the rows in which `symbol` is impossible.
    symbol: int32 [].
    block: the largest number of symbols of a block.
  """
  return _scan_forward(x, head, targets, rows, symbol, block)[0]


def _blocks(head, block):
  """Return the blocks of a head, [K, D, size], and their first symbols."""
  D, V = head.shape
  K = -(-V // block)
  size = -(-V // K)
  if size > _MULTIPLE:  # Matrix units want sizes like this.
    size = -(-size // _MULTIPLE) * _MULTIPLE
  head = jnp.pad(head, ((0, 0), (0, K * size - V)))
  return head.reshape(D, K, size).swapaxes(0, 1), size * jnp.arange(K)


def _block_logits(x, weight, first, V, rows, symbol):
  ids = first + jnp.arange(weight.shape[1])
  impossible = (ids >= V) | rows[..., None] & (ids == symbol)
  return jnp.where(impossible, -jnp.inf, logits(x, weight))


def _scan_forward(x, head, targets, rows, symbol, block):
  V = head.shape[1]

  def step(carry, weight_and_first):
    weight, first = weight_and_first
    greatest, total, chosen = carry
    value = _block_logits(x, weight, first, V, rows, symbol)
    before = greatest
    greatest = jnp.maximum(before, value.max(axis=-1))
    total *= jnp.exp(before - greatest)
    total += jnp.exp(value - greatest[..., None]).sum(axis=-1)
    place = targets - first
    found = jnp.clip(place, 0, weight.shape[1] - 1)[..., None]
    found = jnp.take_along_axis(value, found, axis=-1)[..., 0]
    is_here = (place >= 0) & (place < weight.shape[1])
    return (greatest, total, jnp.where(is_here, found, chosen)), None

  shape = targets.shape
  # Finite, so that a block without possible symbols adds 0.
  start = jnp.full(shape, -1e30), jnp.zeros(shape), jnp.zeros(shape)
  carry, _ = jax.lax.scan(step, start, _blocks(head, block))
  greatest, total, chosen = carry
  lse = greatest + jnp.log(total)
  return (lse, chosen), (x, head, targets, rows, symbol, lse)


def _scan_backward(block, residuals, gradients):
  x, head, targets, rows, symbol, lse = residuals
  d_lse, d_chosen = (gradient[..., None] for gradient in gradients)
  V = head.shape[1]

  def step(d_x, weight_and_first):
    weight, first = weight_and_first
    value = _block_logits(x, weight, first, V, rows, symbol)
    ids = first + jnp.arange(weight.shape[1])
    d_value = jnp.exp(value - lse[..., None]) * d_lse
    d_value += jnp.where(targets[..., None] == ids, d_chosen, 0)
    d_value = d_value.astype(x.dtype)
    wide = dict(preferred_element_type=jnp.float32)
    d_x += jnp.einsum("brv,dv->brd", d_value, weight, **wide)
    d_weight = jnp.einsum("brd,brv->dv", x, d_value, **wide)
    return d_x, d_weight.astype(weight.dtype)

  d_x, d_weights = jax.lax.scan(
    step, jnp.zeros(x.shape, jnp.float32), _blocks(head, block)
  )
  d_head = d_weights.swapaxes(0, 1).reshape(head.shape[0], -1)[:, :V]
  return d_x.astype(x.dtype), d_head, None, None, None


_scan.defvjp(_scan_forward, _scan_backward)
