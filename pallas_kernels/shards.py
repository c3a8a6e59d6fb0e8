"""The slots that each of P devices holds when they share a sequence.

A causal row sees as many slots as stand before it, so later rows cost more. To
give all devices the same work, a sequence is cut into 2 P chunks. Device p
holds chunk p and, after it, chunk 2 P - 1 - p (the zigzag of Llama 3,
arXiv 2407.21783, section 3.3.2).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

# A number known in Python, or an int32 scalar.
_Index = TypeVar("_Index", int, jax.Array)


def can(S: int, P: int) -> bool:
  """Return whether P devices can share S slots."""
  return P == 1 or S % (2 * P) == 0


def chunks(device: _Index, P: int) -> tuple[_Index, _Index]:
  """Return the two chunks that a device holds."""
  return device, 2 * P - 1 - device


def deal(x: jax.Array, P: int) -> jax.Array:
  """Deal slots [B, S, ...] out to devices: [B, P, S / P, ...]."""
  B, S = x.shape[:2]
  x = x.reshape(B, 2, P, S // (2 * P), *x.shape[2:])
  x = jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2)
  return x.reshape(B, P, S // P, *x.shape[4:])


def collect(x: jax.Array) -> jax.Array:
  """Invert `deal`: [B, P, S / P, ...] -> [B, S, ...]."""
  B, P, size = x.shape[:3]
  x = x.reshape(B, P, 2, size // 2, *x.shape[3:])
  x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
  return x.reshape(B, P * size, *x.shape[3:])


def whole(x: jax.Array) -> jax.Array:
  """Put slots in order that an all-gather over the devices returns.

  [P, B, S / P, ...] -> [B, S, ...].
  """
  return collect(jnp.moveaxis(x, 0, 1))


def slots(device: jax.Array, size: int, P: int) -> jax.Array:
  """Return the indices of the slots that a device holds, int32 [size].

  Args:
    device: int32 scalar.
    size: slots of a device, S / P.
    P: devices.
  """
  half = jnp.arange(size // 2, dtype=jnp.int32)
  return jnp.concatenate([c * (size // 2) + half for c in chunks(device, P)])


def place(slot: int | jax.Array, S: int, P: int) -> tuple[jax.Array, jax.Array]:
  """Return (device, index on this device) of a slot, int32 scalars.

  A slot past the last one continues on the last slot's device.
  """
  size = S // (2 * P)
  chunk = jnp.minimum(slot // size, 2 * P - 1)
  is_second = chunk >= P
  device = jnp.where(is_second, 2 * P - 1 - chunk, chunk)
  return device, slot - chunk * size + jnp.where(is_second, size, 0)
