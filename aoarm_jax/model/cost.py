"""What a model costs: the FLOPs of its matmuls, and the bytes of its cache."""

import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers


def forward_flops(
  config: config_lib.Config, *, visible_only: bool = True
) -> float:
  """Returns the matmul FLOPs of one pass over a batch of training.

  Recomputation and the one-hot embedding are left out. Sequences are generated
  one token after the other, not in groups.

  Args:
    config: its model, alphabet, train.batch_size and train.query_fraction; what
      is computed once for all sequences counts once.
    visible_only: whether rows attend to the slots that they see, which is what
      the model needs, or to all, as a plain implementation does.
  """
  model, batch = config.model, config.train.batch_size
  vocabulary = tokenizers.get(config.data.tokenizer).V
  query_fraction = config.train.query_fraction
  D, F, L, S, T = model.D, model.F, model.L, model.S, model.T
  kind = model.kind
  seen = (S + 1) / 2 if visible_only and not kind.masked else S
  row = 2 * (2 * D * D + 2 * D * F) + 4 * D * seen
  read_out = S
  if query_fraction < 1:
    read_out = orders.query_count(T, query_fraction)
  # The last layer computes the rows that are read out and no others.
  rows = (L - 1) * S + read_out
  if kind.streams == 2:
    rows += (L - 1) * read_out
  key_value = 2 * 2 * D * D * L * S
  sequence = row * rows + key_value + 2 * D * vocabulary * read_out
  modulation = 2 * (T + 2) * kind.condition * D * (6 * L + 2)
  return batch * sequence + modulation


def training_flops_per_token(config: config_lib.Config) -> float:
  """Returns FLOPs of forward and backward (3 x forward) per token of text."""
  tokens = config.train.batch_size * config.model.T
  return 3 * forward_flops(config) / tokens


def cache_bytes_per_token(model: config_lib.Model, dtype: str) -> int:
  """Keys and values of one slot in all layers; 0 for a masked mechanism."""
  if model.kind.masked:
    return 0
  return 2 * model.L * model.D * jnp.dtype(dtype).itemsize
