"""The cost of a model: FLOPs of its matrix products, and bytes of its cache."""

import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import configured


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
  model, batch = config.model, config.train.batch_size
  V = vocabulary or configured.tokenizer(config.data).V - config.gives_end
  query_fraction = config.train.query_fraction
  D, L, S, T = model.D, model.L, model.S, model.T
  heads, key_heads = model.N * model.H, model.key_heads * model.H
  mlp = (3 if model.mlp == "swiglu" else 2) * D * model.F
  kind, copies = model.kind, model.kind.copies
  visible = (S + 1) / 2 if visible_only and not kind.masked else S
  read_out = S
  if query_fraction < 1:
    read_out = orders.query_count(T, query_fraction)

  def of_rows(count: float, visible: float) -> float:
    return count * (2 * (2 * D * heads + mlp) + 4 * heads * visible)

  # With one stream all rows are read out.
  sequence = of_rows(copies * L * read_out, copies * visible)
  if kind.streams == 2:
    # The last layer computes only the rows that are read out.
    look = model.look if visible_only else None
    content_visible = _mean_seen(look, model) if look else visible
    sequence += of_rows((L - 1) * S, content_visible)
  sequence += 2 * 2 * D * key_heads * L * S * copies + 2 * D * V * read_out
  modulation = 2 * (T + 2) * kind.condition * D * (6 * L + 2)
  return batch * sequence + modulation


def _mean_seen(look, model):
  """Return how many slots a content row with a Look sees in the mean."""
  s, T = model.sentinels, model.T
  # A token's row sees the sentinels, its own slot and earlier tokens.
  of_tokens = sum(s + 1 + min(rank, look.most) for rank in range(T - 1))
  return (s * (s + 1) / 2 + of_tokens) / model.S


def training_flops_per_token(
  config: config_lib.Config, vocabulary: int | None = None
) -> float:
  """Return the FLOPs of forward and backward pass per token of text.

  The two passes together count as 3 forward passes.

  Args:
    config: see `forward_flops`.
    vocabulary: see `forward_flops`.
  """
  tokens = config.train.batch_size * config.model.T
  return 3 * forward_flops(config, vocabulary=vocabulary) / tokens


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
