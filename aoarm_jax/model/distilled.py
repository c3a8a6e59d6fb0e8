"""The divergence of a network from a teacher that reads left to right.

A teacher gives p(x_t | x_1 ... x_{t-1}). The student gives p(x_t | a set of
known tokens, in the order in which they became known). The two laws have the
same context where the known tokens are exactly x_1 ... x_{t-1}. There, and only
there, the student is compared with the teacher.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoarm_jax import lengths, objective, orders
from aoarm_jax.model import transformer, vocabulary


class Terms(NamedTuple):
  """What training sums with a teacher: float32 [B, R] each.

  Attributes:
    nats: -log p of the targets, as without a teacher.
    divergence: KL(teacher || student) of the laws of the targets, in nats, each
      at the temperature. It is 0 where the contexts differ.
    matched: 1 where the contexts are the same, else 0.
  """

  nats: jax.Array
  divergence: jax.Array
  matched: jax.Array


class Distilled:
  """A network beside its teacher; takes the place of the network in the loss.

  Its method `nats` returns Terms. So objective.training_nll returns Terms of
  sums over sequences.
  """

  def __init__(
    self,
    student: transformer.Transformer,
    teacher: transformer.Transformer,
    tokens: jax.Array,
    temperature: float,
  ):
    """Read the rows of the teacher.

    Args:
      student: the network that is trained.
      teacher: a network that generates left to right, with the same symbols.
      tokens: int32 [B, T], natural order.
      temperature: the logits of both are divided by it.
    """
    self.student, self.teacher = student, teacher
    self.temperature = temperature
    natural = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)
    order = jnp.broadcast_to(natural[None], tokens.shape)
    length = lengths.real(tokens, teacher.layout)
    slots = orders.to_slots(tokens, order, teacher.layout, length=length)
    # Row t - 1 predicts position t.
    rows = teacher.rows(slots)[:, teacher.layout.sentinels - 1 :]
    self._rows = jax.lax.stop_gradient(rows)

  def nats(
    self,
    slots: orders.Slots,
    targets: jax.Array,
    barred: objective.Barred | None = None,
  ) -> Terms:
    """Return the terms of every slot that predicts.

    Args:
      slots: int32 [B, S] each, of a mechanism that is not masked.
      targets: int32 [B, R].
      barred: a symbol that some rows cannot have, in either law.
    """
    student, V = self.student, self.student.vocabulary
    x, head = student.rows(slots), student.output_weights(jnp.float32)
    block = vocabulary.block_size(V, student.compute)
    if block:
      weight = head.astype(student.dtype)
      nats = vocabulary.nll(x, weight, targets, block, barred)
    else:
      logits = vocabulary.logits(x, head.astype(student.dtype))
      nats = objective.nats_of_logits(logits, targets, barred)
    target = slots.target_position
    if slots.queries is not None:
      target = slots.queries.target_position
    place = jnp.maximum(target - 1, 0)[..., None]
    rows = jnp.take_along_axis(self._rows, place, axis=1)
    R = x.shape[1]
    divergence = _divergence(
      (x, head),
      (rows, self.teacher.output_weights(jnp.float32)),
      jnp.zeros(targets.shape, bool) if barred is None else barred.rows,
      -1 if barred is None else barred.symbol,
      self.temperature,
      max(1, R * block // V) if block else R,
    )
    matched = orders.continues(slots, student.layout.sentinels)
    return Terms(
      nats, jnp.where(matched, divergence, 0.0), matched.astype(jnp.float32)
    )


def _divergence(student, teacher, barred, symbol, temperature, chunk):
  """Return KL(teacher || student) of every row: float32 [B, R].

  The logits of `chunk` rows of each sequence are in memory together.

  Args:
    student: its rows [B, R, D] and its head [D, V], float32.
    teacher: the same, with a width of its own.
    barred: bool [B, R], the rows that cannot have `symbol`.
    symbol: a symbol, or -1.
    temperature: the logits are divided by it.
    chunk: number of rows.
  """
  heads = student[1], teacher[1]

  @jax.checkpoint
  def of_rows(rows, heads):
    *pair, never = rows
    # In this dtype the heads are cast anew for every chunk, so that their
    # gradients are summed in float32.
    laws = []
    for x, head in zip(pair, heads):
      logits = vocabulary.logits(x, head.astype(x.dtype)) / temperature
      is_never = never[..., None] & (jnp.arange(logits.shape[-1]) == symbol)
      laws.append(jax.nn.log_softmax(jnp.where(is_never, -1e9, logits)))
    log_q, log_p = laws
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)

  rows = student[0], teacher[0], barred
  B, R = barred.shape
  if chunk >= R:
    return of_rows(rows, heads)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, -R % chunk), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

  found = jax.lax.map(
    lambda rows: of_rows(rows, heads), jax.tree.map(cut, rows)
  )
  return found.swapaxes(0, 1).reshape(B, -1)[:, :R]
