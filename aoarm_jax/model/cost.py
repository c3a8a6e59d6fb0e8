"""The cost of a model: FLOPs of its matrix products, and bytes of its cache."""

import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import configured
from aoarm_jax.model import adapters


def forward_flops(
  config: config_lib.Config,
  *,
  visible_only: bool = True,
  vocabulary: int | None = None,
) -> float:
  """Return the matmul FLOPs of one forward pass over a training batch.

  Recomputation and the one-hot embedding are left out. Sequences are generated
  token by token, not in groups.

  Args:
    config: gives the model, the alphabet, train.batch_size and
      train.query_fraction. Work that is shared by all sequences counts once.
    visible_only: if true, rows attend only to the slots that they see, which is
      the work that the model needs. If false, rows attend to all slots, as in a
      plain implementation.
    vocabulary: size V of the vocabulary. None takes what the config says.
  """
  model, kind, copies = (
    config.model,
    config.model.kind,
    config.model.kind.copies,
  )
  L, S, heads = model.L, model.S, model.N * model.H
  visible = (S + 1) / 2 if visible_only and not kind.masked else S
  sequence = sum(_of_weights(config, vocabulary).values())
  sequence += 4 * heads * copies * L * _read_out(config) * copies * visible
  if kind.streams == 2:
    look = model.look if visible_only else None
    content_visible = _mean_seen(look, model) if look else visible
    sequence += 4 * heads * (L - 1) * S * content_visible
  modulation = 2 * (model.T + 2) * kind.condition * model.D * (6 * L + 2)
  return config.train.batch_size * sequence + modulation


def _read_out(config):
  """Return the number of rows of a sequence that make predictions."""
  fraction, T = config.train.query_fraction, config.model.T
  return orders.query_count(T, fraction) if fraction < 1 else config.model.S


def _of_weights(config, vocabulary):
  """Return {name of a weight: FLOPs of its products for one sequence}."""
  model, copies = config.model, config.model.kind.copies
  D, L, S, read_out = model.D, model.L, model.S, _read_out(config)
  V = vocabulary or configured.tokenizer(config.data).V - config.gives_end
  # With one stream all rows are read out. The last layer computes only the rows
  # that are read out.
  rows = copies * L * read_out + (L - 1) * S * (model.kind.streams == 2)
  asks, knows = rows * model.N, L * S * copies * model.key_heads
  counts = {"query": asks, "out": asks, "key": knows, "value": knows}
  flops = {
    f"blocks/attention/{name}": 2 * D * model.H * count
    for name, count in counts.items()
  }
  for name in ("gate", "up", "down")[model.mlp != "swiglu" :]:
    flops[f"blocks/mlp/{name}"] = 2 * D * model.F * rows
  flops["embedding" if model.tied else "head"] = 2 * D * V * read_out
  return flops


def _mean_seen(look, model):
  """Return how many slots a content row with a Look sees in the mean."""
  s, T = model.sentinels, model.T
  # A token's row sees the sentinels, its own slot and earlier tokens.
  of_tokens = sum(s + 1 + min(rank, look.most) for rank in range(T - 1))
  return (s * (s + 1) / 2 + of_tokens) / model.S


def training_flops(
  config: config_lib.Config, vocabulary: int | None = None
) -> float:
  """Return the matmul FLOPs of forward and backward pass over a batch.

  The two passes together count as 3 forward passes. A weight that is frozen
  (config.train) has no gradient, so its products count twice. The products of
  adapters and the pass of a teacher are left out.

  Args:
    config: see `forward_flops`.
    vocabulary: see `forward_flops`.
  """
  frozen = sum(
    flops
    for name, flops in _of_weights(config, vocabulary).items()
    if adapters.is_frozen(name, config.train)
  )
  whole = 3 * forward_flops(config, vocabulary=vocabulary)
  return whole - config.train.batch_size * frozen


def training_flops_per_token(
  config: config_lib.Config, vocabulary: int | None = None
) -> float:
  """Return the FLOPs of `training_flops` per token of text.

  Args:
    config: see `forward_flops`.
    vocabulary: see `forward_flops`.
  """
  tokens = config.train.batch_size * config.model.T
  return training_flops(config, vocabulary) / tokens


def cache_bytes_per_token(model: config_lib.Model, dtype: str) -> int:
  """Return the bytes of the keys and values of one slot in all layers.

  A masked mechanism has no cache, so the result is 0.

  Args:
    model: the model's section of the config.
    dtype: the compute dtype.
  """
  if model.kind.masked:
    return 0
  itemsize = jnp.dtype(dtype).itemsize
  width = model.key_heads * model.H * model.kind.copies
  return 2 * model.L * width * itemsize
