"""Attention over a mesh: every device has its own rows, heads and slots.

Along the sequence axis n devices share a sequence (context parallelism): each
computes the rows of its slots over the keys and values of all of them, which it
gathers. A causal row sees as many slots as stand before it, so slots are dealt
out in turn, slot i to device i mod n, and all have the same work. What a row
sees is still a prefix of the slots in their own order, so nothing but `visible`
has to say so.
"""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from aoarm_jax import orders, sharding


def sequence_ways(S: int) -> int:
  """Devices that share the S slots of a sequence; 1 where they cannot."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return 1
  ways = mesh.shape["sequence"]
  return ways if S % ways == 0 else 1


def deal(x: jax.Array, ways: int) -> jax.Array:
  """Slots [B, S, ...] so that every device's come to lie side by side."""
  if ways == 1:
    return x
  B, S = x.shape[:2]
  x = x.reshape(B, S // ways, ways, *x.shape[2:])
  return x.swapaxes(1, 2).reshape(B, S, *x.shape[3:])


def collect(x: jax.Array, ways: int) -> jax.Array:
  """Inverse of `deal`."""
  return deal(x, x.shape[1] // ways) if ways > 1 else x


def deal_slots(slots: orders.Slots, ways: int) -> orders.Slots:
  """`deal` of all that is known about slots.

  Raises:
    ValueError: rows of other queries, which belong to no slot.
  """
  if ways > 1 and slots.queries is not None:
    raise ValueError("slots over several devices: queries are not slots")
  if ways == 1:
    return slots
  return jax.tree.map(
    lambda x: sharding.constrain(deal(x, ways), "batch", "slots"), slots
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  *,
  ways: int = 1,
  **options,
):
  """pallas_kernels.any_order_attention, on every device of the mesh.

  Args:
    q, k, v: see there.
    visible: see there.
    ways: devices that share a sequence, whose slots and rows are dealt out
      (see `deal`); then there are as many rows as slots.
    **options: implementation, return_lse.
  """
  attend = functools.partial(pallas_kernels.any_order_attention, **options)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or mesh.size == 1:
    return attend(q, k, v, visible)
  # An axis of one device is named too, or gradients are summed over it.
  slots = "slots" if ways == mesh.shape["sequence"] else None
  keys = sharding.spec(mesh, k.shape, "batch", slots, "heads", "head")
  # A group of query heads stays with its keys.
  specs = [keys, keys, keys]
  arrays = [q, k, v]
  if isinstance(visible, jax.Array):
    arrays.append(visible)
    specs.append(jax.P(*keys[:2]))

  def local(q, k, v, *seen):
    seen = seen[0] if seen else visible
    if ways > 1:
      if seen is None:
        mine = jnp.arange(q.shape[1]) * ways + jax.lax.axis_index("sequence")
        seen = jnp.broadcast_to(mine.astype(jnp.int32) + 1, q.shape[:2])
      k, v = _gather(k, ways), _gather(v, ways)
    return attend(q, k, v, seen)

  out = keys
  if options.get("return_lse"):
    out = (keys, jax.P(*keys[:3]))
  # Kernels do not say over which axes their results vary.
  return jax.shard_map(
    local, in_specs=tuple(specs), out_specs=out, check_vma=False
  )(*arrays)


def _gather(x, ways):
  """The slots of all devices, in their own order."""
  x = jax.lax.all_gather(x, "sequence", axis=2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])
