"""Fused operations of an any-order transformer, each with implementations."""

from pallas_kernels.api import IMPLEMENTATIONS, any_order_attention
from pallas_kernels.context import interpret
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.rowwise import (
  ROWWISE_IMPLEMENTATIONS,
  Rotation,
  gelu,
  rms_norm,
  rotate,
  rotated_norm,
  rotation,
)

__all__ = [
  "IMPLEMENTATIONS",
  "ROWWISE_IMPLEMENTATIONS",
  "Rotation",
  "UnsupportedError",
  "any_order_attention",
  "gelu",
  "interpret",
  "rms_norm",
  "rotate",
  "rotated_norm",
  "rotation",
]
