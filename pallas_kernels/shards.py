"""Which slots each of P devices has that share a sequence.

A causal row sees as many slots as stand before it. For all devices to have the
same work, 2 P chunks of slots are dealt out from both ends: device p has chunk
p and then chunk 2 P - 1 - p (the zigzag of Llama 3, arXiv 2407.21783, 3.3.2).
"""

import jax
import jax.numpy as jnp


def can(S: int, P: int) -> bool:
  """Whether S slots can be dealt out to P devices."""
  return P == 1 or S % (2 * P) == 0


def chunks(device, P: int):
  """The two chunks of a device; an int or an int32 scalar."""
  return device, 2 * P - 1 - device


def deal(x: jax.Array, P: int) -> jax.Array:
  """Slots [B, S, ...] in their order -> [B, P, S / P, ...], by device."""
  B, S = x.shape[:2]
  x = x.reshape(B, 2, P, S // (2 * P), *x.shape[2:])
  x = jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2)
  return x.reshape(B, P, S // P, *x.shape[4:])


def collect(x: jax.Array) -> jax.Array:
  """Inverse of `deal`."""
  B, P, size = x.shape[:3]
  x = x.reshape(B, P, 2, size // 2, *x.shape[3:])
  x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
  return x.reshape(B, P * size, *x.shape[3:])


def whole(x: jax.Array) -> jax.Array:
  """Keys [P, B, S / P, ...] as gathered from devices -> [B, S, ...]."""
  return collect(jnp.moveaxis(x, 0, 1))


def slots(device: jax.Array, size: int, P: int) -> jax.Array:
  """The numbers of a device's slots, int32 [size]; `device` an int32 scalar."""
  half = jnp.arange(size // 2, dtype=jnp.int32)
  return jnp.concatenate([c * (size // 2) + half for c in chunks(device, P)])


def place(slot, S: int, P: int):
  """Where a slot lies: (device, index there); ints or int32 scalars.

  A slot past the last lies past the end of that one's device.
  """
  size = S // (2 * P)
  chunk = jnp.minimum(slot // size, 2 * P - 1)
  last = chunk >= P
  device = jnp.where(last, 2 * P - 1 - chunk, chunk)
  return device, slot - chunk * size + jnp.where(last, size, 0)
