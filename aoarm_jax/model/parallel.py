"""Attention over a mesh: every device has its own rows, heads and slots.

Along the sequence axis several devices share a sequence (context parallelism):
each computes the rows of its slots over the keys and values of all of them,
which it gathers. Slots are dealt out as pallas_kernels.shards says. What a row
sees is still a prefix of the slots in their own order, so nothing but `visible`
has to say so.
"""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from aoarm_jax import orders, sharding
from pallas_kernels import shards


def sequence_ways(S: int) -> int:
  """Devices that share the S slots of a sequence; 1 where they cannot."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return 1
  ways = mesh.shape["sequence"]
  return ways if shards.can(S, ways) else 1


def collect_logits(x: jax.Array, ways: int) -> jax.Array:
  """Logits [B, S, V] of slots that lie as `deal_slots` lays them, in order.

  Every device sends each of its two chunks once: one is even, one odd, and
  chunk c belongs to device c // 2.
  """
  if ways == 1:
    return x
  chunks = [
    sorted(shards.chunks(device, ways), key=lambda chunk: chunk % 2)
    for device in range(ways)
  ]

  def local(x):
    first, last = jnp.split(x, 2, axis=1)
    # The first chunk of an even device is the even one.
    swap = jax.lax.axis_index("sequence") % 2 == 1
    halves = jnp.where(swap, last, first), jnp.where(swap, first, last)
    received = [
      jax.lax.ppermute(
        half,
        "sequence",
        [(device, pair[parity] // 2) for device, pair in enumerate(chunks)],
      )
      for parity, half in enumerate(halves)
    ]
    return jnp.concatenate(received, axis=1)

  mesh = jax.sharding.get_abstract_mesh()
  spec = sharding.spec(mesh, x.shape, "batch", "slots", "vocabulary")
  return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def deal_slots(slots: orders.Slots, ways: int) -> orders.Slots:
  """All that is known about slots, every device's side by side.

  Raises:
    ValueError: rows of other queries, which belong to no slot.
  """
  if ways > 1 and slots.queries is not None:
    raise ValueError("slots over several devices: queries are not slots")
  if ways == 1:
    return slots

  def deal(x):
    return sharding.constrain(
      shards.deal(x, ways).reshape(x.shape), "batch", "slots"
    )

  return jax.tree.map(deal, slots)


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
      (see `deal_slots`); then there are as many rows as slots.
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
        device = jax.lax.axis_index("sequence")
        mine = shards.slots(device, q.shape[1], ways)
        seen = jnp.broadcast_to(mine + 1, q.shape[:2])
      k, v = (jax.lax.all_gather(x, "sequence") for x in (k, v))
    return attend(q, k, v, seen)

  out = keys
  if options.get("return_lse"):
    out = (keys, jax.P(*keys[:3]))
  # Kernels do not say over which axes their results vary.
  return jax.shard_map(
    local, in_specs=tuple(specs), out_specs=out, check_vma=False
  )(*arrays)
