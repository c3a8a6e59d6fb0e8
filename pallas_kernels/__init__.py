"""Fused operations of an any-order transformer, each with implementations."""

from pallas_kernels.api import IMPLEMENTATIONS, any_order_attention
from pallas_kernels.context import interpret
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.products import gelu_mlp, project_heads
from pallas_kernels.rowwise import (
  ROWWISE_IMPLEMENTATIONS,
  Part,
  Rotation,
  gelu,
  rms_norm,
  rotate,
  rotation,
  split_heads,
)

__all__ = [
  "IMPLEMENTATIONS",
  "ROWWISE_IMPLEMENTATIONS",
  "Part",
  "Rotation",
  "UnsupportedError",
  "any_order_attention",
  "gelu",
  "gelu_mlp",
  "interpret",
  "project_heads",
  "rms_norm",
  "rotate",
  "rotation",
  "split_heads",
]
