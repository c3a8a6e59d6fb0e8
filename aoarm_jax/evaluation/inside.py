"""Logits, states and attention weights of given texts, as numpy arrays.

A program is compiled once for every shape of a batch. Texts are filled up to
few lengths, see shapes.length, and the arrays of a text have its own length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aoarm_jax import lengths, objective, orders
from aoarm_jax.devices import sharding
from aoarm_jax.generation import prompts, shapes
from aoarm_jax.model import inside
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import patience

# The most logits of one batch: 256 MB.
_MOST_LOGITS = 1 << 26


class HiddenStates(NamedTuple):
  """The states of all rows of a text, layer by layer.

  A text of n tokens has R rows. Without a mask they are its slots in the order
  of generation: the sentinels, then the tokens of all ranks but the last, so R
  = n + s - 1 for s sentinels. With several rows per slot (register) the rows of
  a slot are neighbours. A masked mechanism (mdlm) has the sentinels and then
  all T positions of its window from left to right, R = T + s; tokens that are
  not known are MASK there. `token`, `position` and `target` say what each row
  is.

  Attributes:
    content: float32 [L + 1, R, D]. Entry 0 is the input of the first layer, and
      entry l is the state after layer l. Of two streams these are the content
      rows; nothing reads them after the last layer. Of one stream these are
      its rows, which predict, too.
    query: float32 [L + 1, R, D], the query rows of two streams, which predict.
      None for one stream.
    read_out: float32 [n, D], by position: the normed state that predicts the
      token at position p is read_out[p - 1]. Its product with Model.head is row
      p - 1 of the logits, up to rounding. There alone the end of a padded
      document is ruled out where the text cannot end.
    token: int32 [R], the id of each row's content: a token, or V for BOS, V + 1
      for EOS and V + 2 for MASK.
    position: int32 [R], the position c of this content. BOS is at 0.
    target: int32 [R], the position t that the row predicts. 0 where a row
      predicts nothing.
  """

  content: np.ndarray
  query: np.ndarray | None
  read_out: np.ndarray
  token: np.ndarray
  position: np.ndarray
  target: np.ndarray


class Attention(NamedTuple):
  """The weights of attention of all rows of a text, by layer and head.

  See HiddenStates for the rows. Keys are always the content rows. A weight is 0
  where the mask bars a key, and the weights of a row sum to 1.

  Attributes:
    content: float32 [L, N, R, R], by layer, head, row and key: the content rows
      of two streams, or the rows of the only stream.
    query: float32 [L, N, R, R], the query rows of two streams. None for one
      stream.
    token: see HiddenStates.
    position: see HiddenStates.
    target: see HiddenStates.
  """

  content: np.ndarray
  query: np.ndarray | None
  token: np.ndarray
  position: np.ndarray
  target: np.ndarray


class Given(NamedTuple):
  """A text whose inside is wanted.

  Attributes:
    tokens: int32 [n]. The end of a padded document is one of them if it is
      predicted.
    order: int32 [n], a permutation of 1..n.
    end: int32 [0 or 1], the token after them that tells the length.
  """

  tokens: np.ndarray
  order: np.ndarray
  end: np.ndarray


def given(
  network: network_lib.Network,
  text: prompts.Marked,
  order: Sequence[int] | str,
) -> Given:
  """Return a text with its order and, for a padded document, with its end.

  Args:
    network: the network.
    text: the text; all its tokens are known.
    order: "left_to_right", "right_to_left" or a permutation of 1..n. It may
      have n + 1 positions if the end of the text is predicted.
  """
  layout, tokens = network.layout, text.tokens
  end = np.zeros(0, np.int32)
  if layout.end_token is not None and len(tokens) < network.model.T:
    end = np.array([layout.end_token], np.int32)
    if layout.predicts_end:
      tokens, end = np.append(tokens, end), end[:0]
  natural = np.arange(1, len(tokens) + 1, dtype=np.int32)
  if isinstance(order, str):
    return Given(tokens, natural[:: 1 - 2 * (order == "right_to_left")], end)
  return Given(tokens, np.array(prompts.within(order, len(tokens))), end)


class Reader:
  """Reads what a network computes. Programs are compiled at their first use."""

  def __init__(self, network: network_lib.Network) -> None:
    """Compile nothing yet.

    Args:
      network: the network; with a mesh.
    """
    assert network.mesh is not None
    self._network, self._mesh = network, network.mesh
    whole = sharding.replicated(network.mesh)
    self._logits = jax.jit(self._logits_of, out_shardings=whole)
    self._inside = jax.jit(
      self._inside_of, static_argnames="with_weights", out_shardings=whole
    )

  def logits(
    self, params: Any, texts: Sequence[Given], batch_size: int
  ) -> list[np.ndarray]:
    """Return the logits of every text by position: float32 [n, V] each.

    Args:
      params: the network's parameters, on the mesh.
      texts: the texts.
      batch_size: the greatest number of texts in a batch.
    """
    V, T = self._network.vocabulary, self._network.model.T
    longest = max((len(text.tokens) for text in texts), default=1)
    most = max(1, _MOST_LOGITS // (V * shapes.length(longest, T)))
    found: dict[int, np.ndarray] = {}
    batches = list(self._batches(texts, min(most, batch_size)))
    for rows, batch in patience.counted(batches):
      with patience.waiting(f"logits of {_words(len(rows), batch)}"):
        by_rank = jax.device_get(self._logits(params, *batch))
      for b, row in enumerate(rows):
        order = texts[row].order
        found[row] = by_rank[b][np.argsort(order)]
    return [found[i] for i in range(len(texts))]

  def hidden_states(
    self, params: Any, texts: Sequence[Given], known: int = 0
  ) -> list[HiddenStates]:
    """Return the states of every text.

    Args:
      params: the network's parameters, on the mesh.
      texts: the texts.
      known: for a masked mechanism: how many leading ranks are known.
    """
    found = []
    for text, made, slots in self._each(params, texts, known, False):
      rows = (slice(len(slots.token)),)
      content, query = _by_stream(made.states, rows)
      place = np.argsort(text.order)
      if self._network.layout.masked:
        place = np.arange(len(text.tokens)) + 1
      read_out = made.read_out[0][self._network.layout.sentinels - 1 :]
      found.append(HiddenStates(content, query, read_out[place], *slots))
    return found

  def attention(
    self, params: Any, texts: Sequence[Given], known: int = 0
  ) -> list[Attention]:
    """Return the weights of attention of every text.

    Args:
      params: the network's parameters, on the mesh.
      texts: the texts.
      known: for a masked mechanism: how many leading ranks are known.
    """
    found = []
    for _, made, slots in self._each(params, texts, known, True):
      rows = (slice(len(slots.token)),) * 2
      content, query = _by_stream(made.weights, (slice(None), *rows))
      found.append(Attention(content, query, *slots))
    return found

  def _batches(self, texts, most):
    """Yield (indices of texts, arrays on the mesh) of texts alike in length."""
    T = self._network.model.T
    by_length: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
      length = shapes.length(len(text.tokens) + len(text.end), T)
      by_length.setdefault(length, []).append(i)
    for length, indices in by_length.items():
      B = sharding.batch_size(self._mesh, most, len(indices))
      for first in range(0, len(indices), B):
        rows = indices[first : first + B]
        tokens = np.zeros((B, length), np.int32)
        order = np.tile(np.arange(1, length + 1, dtype=np.int32), (B, 1))
        for b, row in enumerate(rows):
          n = len(texts[row].tokens)
          filled = np.append(texts[row].tokens, texts[row].end)
          tokens[b, : len(filled)], order[b, :n] = filled, texts[row].order
        yield rows, sharding.put_rows(self._mesh, (tokens, order))

  def _each(self, params, texts, known, with_weights):
    """Yield (text, inside.Inside, what the rows are) of every text."""
    known_here = sharding.put(self._mesh, np.int32(known))
    what = "attention" if with_weights else "states"
    for text in patience.counted(texts):
      for rows, batch in self._batches([text], 1):
        with patience.waiting(f"{what} of {_words(len(rows), batch)}"):
          made, slots = jax.device_get(
            self._inside(params, known_here, *batch, with_weights=with_weights)
          )
        yield text, made, self._rows(text, slots)

  def _rows(self, text, slots):
    """Return (token, position, target) of the rows of the first text."""
    kind, s = self._network.model.kind, self._network.layout.sentinels
    n = len(text.tokens) + s - 1
    if kind.masked:
      n = slots.tokens.shape[1]
    tokens = slots.tokens[0, :n]
    target = slots.target_position[0, :n].copy()
    if kind.masked:
      target[tokens != self._network.layout.vocabulary + 2] = 0
    target[: s - 1] = 0
    by_slot = tokens, slots.position[0, :n], target
    return Rows(*(np.repeat(x, kind.copies) for x in by_slot))

  def _logits_of(self, params, tokens, order):
    bound = self._network.bind(params)
    return objective.order_logits(bound, self._network.layout, tokens, order)

  def _inside_of(self, params, known, tokens, order, *, with_weights):
    layout, bound = self._network.layout, self._network.bind(params)
    length = lengths.real(tokens, layout)
    order = lengths.real_first(order, length)
    if layout.masked:
      window = ((0, 0), (0, layout.end - 1 - tokens.shape[1]))
      masked = jnp.argsort(order, axis=1) >= known
      slots = orders.to_masked_slots(
        jnp.pad(tokens, window, constant_values=layout.end_token or 0),
        jnp.pad(masked, window, constant_values=True),
        layout,
        length,
      )
    else:
      slots = orders.to_slots(tokens, order, layout, length=length)
    return inside.observe(bound, slots, with_weights), slots


class Rows(NamedTuple):
  """The slots of the rows; see HiddenStates."""

  token: np.ndarray
  position: np.ndarray
  target: np.ndarray


def _by_stream(arrays, rows):
  """Return (content, query) of the first text, with some of its rows alone."""
  content, *query = (x[:, 0][(slice(None), *rows)] for x in arrays)
  return content, query[0] if query else None


def _words(count, batch):
  return shapes.describe(count, batch[0].shape[1])
