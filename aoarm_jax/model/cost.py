"""What a model costs: the FLOPs of its matmuls, and the bytes of its cache."""

import jax.numpy as jnp

from aoarm_jax import orders
from aoarm_jax.config import schema as config_lib


def forward_flops(
  model: config_lib.Model,
  vocabulary: int,
  batch: int,
  *,
  query_fraction: float = 1.0,
  visible_only: bool = True,
) -> float:
  """Matmul FLOPs of one pass over `batch` sequences.

  No recomputation and no one-hot embedding; sequences are generated one token
  after the other, not in groups.

  Args:
    model: the model.
    vocabulary: V.
    batch: B; what is computed once for all sequences counts once.
    query_fraction: of the ranks that two streams predict.
    visible_only: whether rows attend to the slots that they see, which is what
      the model needs, or to all, as a plain implementation does.
  """
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


def training_flops_per_token(
  model: config_lib.Model,
  vocabulary: int,
  batch: int,
  query_fraction: float = 1.0,
) -> float:
  """Of forward and backward (3 x forward), per token of the text."""
  forward = forward_flops(
    model, vocabulary, batch, query_fraction=query_fraction
  )
  return 3 * forward / (batch * model.T)


def cache_bytes_per_token(model: config_lib.Model, dtype: str) -> int:
  """Keys and values of one slot in all layers; 0 for a masked mechanism."""
  if model.kind.masked:
    return 0
  return 2 * model.L * model.D * jnp.dtype(dtype).itemsize
