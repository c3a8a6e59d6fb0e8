"""The backbone of all mechanisms: from slots to logits at every slot."""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax import objective, orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import attention as attention_lib
from aoarm_jax.model import layers, parallel, parameters, rotary
from aoarm_jax.model import rows as rows_lib
from aoarm_jax.model import setting as setting_lib
from aoarm_jax.model import vocabulary as vocabulary_lib
from pallas_kernels import rowwise


class Transformer(nnx.Module):
  """Embedding, rows of the mechanism, L blocks, norm, and head.

  The blocks are pre-norm, with RMSNorm, by default also on queries and keys.
  They use rotary pairs and an MLP with GELU or SwiGLU. Heads of keys may be
  fewer than heads of queries. LayerNorm, biases and learned positions are
  options. Parameters, norms, softmax and logits are float32. The inputs of
  matrix products and the residual stream are in `compute.dtype`.
  """

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    vocabulary: int,
    end_token: int | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    self.model, self.compute, self.vocabulary = model, compute, vocabulary
    self.end_token = end_token
    self.dtype = jnp.dtype(compute.dtype)
    # The embedding also has BOS, EOS and MASK, which are never predicted. So it
    # has more symbols than the vocabulary.
    symbols = vocabulary + (3 if model.kind.masked else 2)
    self.embedding = parameters.normal(
      rngs, (symbols, model.D), ("vocabulary", "embed")
    )
    self.start = rows_lib.Start(model, rngs=rngs)
    self.blocks = jax.vmap(
      lambda key: layers.Block(model, compute, rngs=nnx.Rngs(key))
    )(jax.random.split(rngs.params(), model.L))
    self.norm = parameters.norm_of_rows(model)
    if model.kind.condition:
      self.modulation = layers.Modulation(
        model.kind.condition, 2, model.D, rngs=rngs
      )
    if not model.tied:
      self.head = parameters.normal(
        rngs, (model.D, vocabulary), ("embed", "vocabulary")
      )

  @property
  def layout(self) -> orders.Layout:
    """The layout that this network expects."""
    model = self.model
    return orders.Layout(
      model.sentinels,
      self.vocabulary,
      model.T + 1,
      model.kind.masked,
      self.end_token,
    )

  def __call__(self, slots: orders.Slots) -> jax.Array:
    """Return the logits of every slot that predicts, from all slots at once.

    Args:
      slots: int32 [B, S] each. A row sees the slots that `slots.visible` gives.
        If it is None, a row sees itself and the slots before it, or all slots
        with a masked mechanism.

    Returns:
      float32 [B, R, V], the logits of the token at each slot's target position.
      They are those of `slots.queries` if given, else of all slots: R = S.
    """
    x, ways = self._read_rows(slots)
    logits = vocabulary_lib.logits(x, self.output_weights())
    logits = parallel.collect_logits(logits, ways)
    return sharding.constrain(logits, "batch", "slots", "vocabulary")

  def nats(
    self,
    slots: orders.Slots,
    targets: jax.Array,
    barred: objective.Barred | None = None,
  ) -> jax.Array:
    """Return -log p of a target at every slot that predicts, in nats.

    With a large vocabulary the logits of all rows are never in memory together.

    Args:
      slots: as in `__call__`.
      targets: int32 [B, R].
      barred: a symbol that some rows cannot have.

    Returns:
      float32 [B, R].
    """
    block = vocabulary_lib.block_size(self.vocabulary, self.compute)
    if not block:
      return objective.nats_of_logits(self(slots), targets, barred)
    x, ways = self._read_rows(slots)
    targets = parallel.deal(targets, ways)
    if barred is not None:
      barred = barred._replace(rows=parallel.deal(barred.rows, ways))
    nats = vocabulary_lib.nll(x, self.output_weights(), targets, block, barred)
    return parallel.collect_logits(nats[..., None], ways)[..., 0]

  def rows(self, slots: orders.Slots) -> jax.Array:
    """Return the normed rows before the head, [B, R, D], in compute dtype.

    Args:
      slots: as in `__call__`. No mesh may spread them over its axis sequence.
    """
    x, ways = self._read_rows(slots)
    assert ways == 1, "rows of a sequence that is spread out have another order"
    return x

  def output_weights(
    self, dtype: jax.typing.DTypeLike | None = None
  ) -> jax.Array:
    """Return the weights of the head: [D, V].

    Args:
      dtype: the dtype of the result. None means the compute dtype.
    """
    dtype = self.dtype if dtype is None else dtype
    if self.model.tied:
      table = parameters.used(self.embedding, dtype)
      return table[: self.vocabulary].T
    return parameters.used(self.head, dtype)

  def _read_rows(self, slots):
    """Return the rows before the head, and the devices of a sequence."""
    chex.assert_equal_shape(slots[:3])
    S = slots.tokens.shape[1]
    ways = parallel.sequence_ways(S)
    index = parallel.deal(jnp.arange(S)[None], ways)
    streams, setting = self.enter(parallel.deal_slots(slots, ways), index)
    S *= self.model.kind.copies
    name = self.compute.attention
    attend = functools.partial(
      parallel.attention,
      ways=ways,
      implementation=None if name == "auto" else name,
      scale=rotary.score_scale(self.model),
    )

    def body(streams, block):
      return block(streams, setting, attend, S), None

    if self.compute.remat:
      body = jax.checkpoint(body, prevent_cse=not self.compute.scan_layers)
    L = self.model.L
    streams, _ = jax.lax.scan(
      body,
      streams,
      jax.tree.map(lambda p: p[: L - 1], self.blocks),
      unroll=1 if self.compute.scan_layers else max(L - 1, 1),
    )
    last = self.layer(L - 1)
    return self._last_rows(last, streams, setting, attend, S), ways

  def enter(
    self,
    slots: orders.Slots,
    index: jax.Array | None = None,
    contents: rows_lib.Contents | None = None,
  ) -> tuple[tuple[jax.Array, ...], setting_lib.Setting]:
    """Return the streams [B, R, D] before the first layer, with setting.

    Args:
      slots: int32 [B, S] each.
      index: int32 [1, S], the index of each slot in the order. None means 0 to
        S - 1.
      contents: the slots that query rows may see. None means `slots`.
    """
    kind = self.model.kind
    if index is None:
      index = jnp.arange(slots.tokens.shape[1])[None]
    if kind.copies > 1:
      slots = rows_lib.copied(slots, kind.copies, index)
    table = parameters.used(self.embedding, self.dtype)
    embed = functools.partial(vocabulary_lib.embed, table)
    streams = self.start(embed, slots, index, contents)

    factors = rotary.factors(self.model)

    def rotation(position):
      if position is None:
        return None
      return rowwise.rotation(
        position, self.model.H, self.model.rope_base, factors
      )

    condition = jax.nn.silu(self.start.target[...]) if kind.condition else None
    setting = setting_lib.Setting(
      query_rotation=tuple(rotation(rows.query_position) for rows in streams),
      key_rotation=rotation(slots.position[..., None] if kind.query else None),
      condition=condition,
      target=tuple(rows.target for rows in streams),
      visible=tuple(rows.visible for rows in streams),
      seen=tuple(rows.seen for rows in streams),
    )
    x = tuple(sharding.constrain(rows.x, *parallel.ROWS) for rows in streams)
    return x, setting

  def layer(self, index: int) -> layers.Block:
    """Return the block of one layer."""
    return jax.tree.map(lambda p: p[index], self.blocks)

  def read_out(
    self,
    last: layers.Block,
    streams: tuple[jax.Array, ...],
    setting: setting_lib.Setting,
    attend: attention_lib.Attend,
    S: int,
  ) -> jax.Array:
    """Apply the last layer, the norm and the head to the predicting rows.

    Args:
      last: the last layer.
      streams: [B, R, D] each, the streams after the other layers.
      setting: the setting that the layers share.
      attend: the attention.
      S: the number of content rows.

    Returns:
      float32 [B, R', V], the logits of the rows that are read out.
    """
    x = self._last_rows(last, streams, setting, attend, S)
    return vocabulary_lib.logits(x, self.output_weights())

  def _last_rows(self, last, streams, setting, attend, S):
    """Return the normed rows that are read out, [B, R', D]."""
    pick = functools.partial(rows_lib.read_out, S=S)
    (x,) = last(streams, setting, attend, S, pick)
    return self.normed_rows(x, setting, S)

  def normed_rows(
    self, x: jax.Array, setting: setting_lib.Setting, S: int
  ) -> jax.Array:
    """Return the rows whose product with the head gives the logits.

    Args:
      x: [B, R', D], the rows after the last layer that are read out.
      setting: the setting of all rows.
      S: the number of content rows.

    Returns:
      [B, R', D], normed; the mean of a slot's rows if it has several.
    """
    modulation = None
    (target,) = rows_lib.read_out(setting.target, S)
    if target is not None:
      assert setting.condition is not None  # The two come together.
      modulation = self.modulation(setting.condition, target, self.dtype)
    _, x = layers.normed(
      self.norm, x, None, modulation, 0, self.compute.rowwise
    )
    return rows_lib.merged(x, self.model.kind.copies)
