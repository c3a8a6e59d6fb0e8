"""Attention and matmuls over a mesh: devices have their own rows and heads.

Along the sequence axis several devices share a sequence (context parallelism):
each computes the rows of its slots over the keys and values of all of them,
which it gathers. Slots are dealt out as pallas_kernels.shards says. What a row
sees is still a prefix of the slots in their own order, so nothing but `visible`
has to say so.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import pallas_kernels
from aoarm_jax import orders
from aoarm_jax.devices import sharding
from pallas_kernels import shards


def sequence_ways(S: int) -> int:
  """Devices that share the S slots of a sequence; 1 where they cannot."""
  mesh = sharding.spread()
  ways = mesh.shape["sequence"] if mesh else 1
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


def matmuls(
  equation: str,
  streams: Sequence[jax.Array],
  weight: jax.Array,
  axes: tuple[str | None, ...],
) -> list[jax.Array]:
  """jnp.einsum(equation, x, weight) of every stream [B, R, ...].

  On a mesh a device sums its gradients of the weight over streams before they
  are summed over devices. XLA would sum over devices once for every stream.

  Args:
    equation: whose result is [B, R, ...] too.
    streams: of one shape.
    weight: a parameter in compute dtype.
    axes: its logical axes.
  """
  rows = None
  if mesh := sharding.spread():
    rows = sharding.spec(mesh, streams[0].shape[:2], "batch", "slots")
  # One has nothing to sum before; what does not divide is not trained on.
  if len(streams) == 1 or not rows or None in rows:
    weight = sharding.gathered(weight, *axes)
    return [jnp.einsum(equation, x, weight) for x in streams]
  cut = sharding.spec(mesh, weight.shape, *axes)
  # From D to features of heads or hidden units, or back.
  D = 0 if axes[0] in ("embed", "width") else len(axes) - 1
  features = [axis for i, axis in enumerate(cut) if i != D]
  into, out = jax.P(*rows, None), jax.P(*rows, *features)
  if D:
    into, out = out, into
  others = [a for a in jax.tree.leaves(tuple(rows)) if a != cut[D]]

  def local(weight, *streams):
    # Gradients are summed over devices where a weight begins to vary over them:
    # not where each stream meets it, and of a piece where it is in pieces.
    weight = jax.lax.pcast(weight, tuple(others), to="varying")
    if cut[D]:
      weight = jax.lax.all_gather(weight, cut[D], axis=D, tiled=True)
    streams = [jnp.einsum(equation, x, weight) for x in streams]
    return jax.lax.psum(streams, "tensor") if "tensor" in into else streams

  return jax.shard_map(
    local,
    in_specs=(cut, *[into] * len(streams)),
    out_specs=[out] * len(streams),
  )(weight, *streams)


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
  if not (mesh := sharding.spread()):
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
