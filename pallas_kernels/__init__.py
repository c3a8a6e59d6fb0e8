"""Fused any-order attention: one operation with several implementations."""

from pallas_kernels.api import (
  IMPLEMENTATIONS,
  UnsupportedError,
  any_order_attention,
)
from pallas_kernels.context import interpret

__all__ = [
  "IMPLEMENTATIONS",
  "UnsupportedError",
  "any_order_attention",
  "interpret",
]
