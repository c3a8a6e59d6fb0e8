"""The Python interface: a trained model that generates, infills and scores."""

from aoarm_jax.api.model import Model
from aoarm_jax.api.options import (
  GenerateOptions,
  InfillOptions,
  Order,
  ScoreOptions,
)

__all__ = [
  "GenerateOptions",
  "InfillOptions",
  "Model",
  "Order",
  "ScoreOptions",
]
