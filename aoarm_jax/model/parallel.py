"""Attention and matmuls over a mesh: each device has its own rows and heads.

Along the sequence axis, several devices share a sequence (context parallelism).
Each device computes the rows of its own slots over the keys and values of all
slots, which it gathers. The slots are dealt out as pallas_kernels.shards says.
A row still sees a prefix of the slots in their own order. So only `visible` has
to describe the mask.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from aoarm_jax import orders
from aoarm_jax.devices import sharding
from aoarm_jax.model import looks
from pallas_kernels import devices, rowwise, shards

# The logical axes of rows [B, R, D].
ROWS = ("batch", "slots", "width")


def sequence_ways(S: int) -> int:
  """Return how many devices share the S slots of a sequence.

  The result is 1 if S cannot be dealt out to the devices.
  """
  mesh = sharding.spread()
  ways = mesh.shape["sequence"] if mesh else 1
  return ways if shards.can(S, ways) else 1


def collect_logits(x: jax.Array, ways: int) -> jax.Array:
  """Return logits in the order of the slots, after `deal_slots`.

  Every device sends each of its two chunks once. One chunk is even and the
  other is odd. Chunk c of the result belongs to device c // 2.

  Args:
    x: [B, S, V], logits of slots that lie as `deal_slots` lays them.
    ways: the number of devices that share a sequence.
  """
  if ways == 1:
    return x
  chunks = [
    sorted(shards.chunks(device, ways), key=lambda chunk: chunk % 2)
    for device in range(ways)
  ]

  def local(x):
    first, last = jnp.split(x, 2, axis=1)
    # On an even device the first chunk is even. On an odd device it is odd.
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
  """Return jnp.einsum(equation, x, weight) for every stream x [B, R, ...].

  On a mesh, each device sums its gradients of the weight over streams first,
  and they are summed over devices once. XLA would sum over devices once per
  stream.

  Args:
    equation: an einsum whose result is also [B, R, ...].
    streams: arrays of the same shape.
    weight: a parameter in compute dtype.
    axes: the logical axes of the weight.
  """
  rows = None
  if mesh := sharding.spread():
    rows = sharding.spec(mesh, streams[0].shape[:2], "batch", "slots")
  # One stream has no gradients to sum first. Rows that the mesh does not divide
  # occur only outside of training, where there are no gradients.
  if len(streams) == 1 or not mesh or not rows or None in rows:
    weight = sharding.gathered(weight, *axes)
    return [jnp.einsum(equation, x, weight) for x in streams]
  cut = sharding.spec(mesh, weight.shape, *axes)
  # The product goes from the width D to features of heads or hidden units, or
  # back. `width` is the dimension of the weight that has size D.
  width = 0 if axes[0] in ("embed", "width") else len(axes) - 1
  features = [axis for i, axis in enumerate(cut) if i != width]
  into, out = jax.P(*rows, None), jax.P(*rows, *features)
  if width:
    into, out = out, into
  others = [a for a in jax.tree.leaves(tuple(rows)) if a != cut[width]]

  def local(weight, *streams):
    # Gradients are summed over devices at the point where a weight begins to
    # vary over them. Here this is once, before any stream uses the weight, and
    # for a piece of the weight if it is cut.
    weight = jax.lax.pcast(weight, tuple(others), to="varying")
    if cut[width]:
      weight = jax.lax.all_gather(weight, cut[width], axis=width, tiled=True)
    products = [jnp.einsum(equation, x, weight) for x in streams]
    return jax.lax.psum(products, "tensor") if "tensor" in into else products

  return jax.shard_map(
    local,
    in_specs=(cut, *[into] * len(streams)),
    out_specs=[out] * len(streams),
  )(weight, *streams)


def deal_slots(slots: orders.Slots, ways: int) -> orders.Slots:
  """Return slots dealt out to devices, with each device's slots side by side.

  Args:
    slots: all slots in their own order.
    ways: the number of devices that share a sequence.

  Raises:
    ValueError: `slots` has queries of its own, which belong to no slot.
  """
  if ways > 1 and slots.queries is not None:
    raise ValueError("slots over several devices: queries are not slots")
  return jax.tree.map(lambda x: deal(x, ways), slots)


def deal(x: jax.Array, ways: int) -> jax.Array:
  """Return x [B, S, ...] with each device's slots side by side."""
  if ways == 1:
    return x
  return sharding.constrain(
    shards.deal(x, ways).reshape(x.shape), "batch", "slots"
  )


def attention(
  q: Sequence[jax.Array],
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | int | None,
  seen: jax.Array | None = None,
  *,
  scale: float,
  ways: int = 1,
  **options: Any,
) -> Any:
  """Run pallas_kernels.any_order_attention on every device of the mesh.

  Args:
    q: the queries of each stream, [B, R, N, H]; N is a multiple of the heads
      of k.
    k, v: see pallas_kernels.any_order_attention.
    visible: see pallas_kernels.any_order_attention.
    seen: for one stream whose rows see no prefix: bool [B or 1, R, S], see
      looks.attention. XLA divides this attention over the mesh by itself.
    scale: factor of the scores.
    ways: the number of devices that share a sequence. If it is above 1, slots
      and rows are dealt out (see `deal_slots`), and there are as many rows as
      slots.
    **options: implementation and return_lse.

  Returns:
    The result of pallas_kernels.any_order_attention for a list of streams.
  """
  if seen is not None:
    return (looks.attention(q[0], k, v, seen, scale),)
  attend: Callable[..., Any] = functools.partial(
    pallas_kernels.any_order_attention, scale=scale, **options
  )
  if not (mesh := sharding.spread()):
    return attend(list(q), k, v, visible)
  # The axis is also named if it has one device. Otherwise gradients would be
  # summed over it.
  slots = "slots" if ways == mesh.shape["sequence"] else None
  keys = sharding.spec(mesh, k.shape, "batch", slots, "heads", "head")
  # The queries are cut like the keys, so a group of query heads stays with its
  # keys.
  specs = [(keys,) * len(q), keys, keys]
  arrays = [tuple(q), k, v]
  if isinstance(visible, jax.Array):
    arrays.append(visible)
    specs.append(jax.P(*keys[:2]))

  def local(q, k, v, *local_visible):
    row_visible = local_visible[0] if local_visible else visible
    if ways > 1:
      if row_visible is None:
        device = jax.lax.axis_index("sequence")
        local_slots = shards.slots(device, q[0].shape[1], ways)
        row_visible = jnp.broadcast_to(local_slots + 1, q[0].shape[:2])
      k, v = (jax.lax.all_gather(x, "sequence") for x in (k, v))
    return attend(q, k, v, row_visible)

  out: Any = (keys,) * len(q)
  if options.get("return_lse"):
    out = out, (jax.P(*keys[:3]),) * len(q)
  # Kernels do not declare the axes over which their results vary, so this is
  # not checked.
  return jax.shard_map(
    local, in_specs=tuple(specs), out_specs=out, check_vma=False
  )(*arrays)


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  update: jax.Array | None,
  epsilon: float,
  implementation: str,
) -> tuple[jax.Array, jax.Array]:
  """Run pallas_kernels.rms_norm on every device of the mesh.

  Args:
    x: [B, R, D].
    scale: float32 [D].
    update: like x, or None.
    epsilon: is added to the mean square.
    implementation: compute.rowwise.
  """
  norm = functools.partial(rowwise.rms_norm, epsilon=epsilon)
  return _on_rows(norm, ROWS, implementation, x, scale, update)


def split_heads(
  packed: jax.Array,
  parts: Sequence[rowwise.Part | None],
  epsilon: float,
  implementation: str,
) -> tuple[jax.Array, ...]:
  """Run pallas_kernels.split_heads on every device of the mesh.

  Args:
    packed: [B, R, C, N, H].
    parts: C of them.
    epsilon: is added to the mean squares.
    implementation: compute.rowwise.
  """
  axes = "batch", "slots", None, "heads", "head"
  return _on_rows(
    functools.partial(rowwise.split_heads, epsilon=epsilon),
    axes,
    implementation,
    packed,
    tuple(parts),
  )


def project_heads(
  x: jax.Array,
  weight: jax.Array,
  parts: Sequence[rowwise.Part | None],
  epsilon: float,
  implementation: str,
) -> tuple[jax.Array, ...]:
  """Run pallas_kernels.project_heads on the one device that there is.

  Args:
    x: [B, R, D].
    weight: [D, C, N, H].
    parts: C of them.
    epsilon: is added to the mean squares.
    implementation: compute.rowwise.
  """
  named = None if implementation == "auto" else implementation
  return pallas_kernels.project_heads(
    x, weight, parts, epsilon=epsilon, implementation=named
  )


def gelu(x: jax.Array, implementation: str) -> jax.Array:
  """Run pallas_kernels.gelu on every device of the mesh.

  Args:
    x: [B, R, F].
    implementation: compute.rowwise.
  """
  return _on_rows(rowwise.gelu, ("batch", "slots", "hidden"), implementation, x)


def mlp(
  x: jax.Array, up: jax.Array, down: jax.Array, implementation: str
) -> jax.Array:
  """Run pallas_kernels.gelu_mlp on the one device that there is.

  Args:
    x: [B, R, D].
    up: [D, F].
    down: [F, D].
    implementation: compute.rowwise.
  """
  named = None if implementation == "auto" else implementation
  return pallas_kernels.gelu_mlp(x, up, down, implementation=named)


def _on_rows(
  function: Callable[..., Any],
  axes: tuple[str | None, ...],
  implementation: str,
  x: jax.Array,
  *others: Any,
) -> Any:
  """Return function(x, *others), on every device of the mesh.

  Args:
    function: returns one or more arrays.
    axes: the logical axes of x. The results have those that have a name.
    implementation: compute.rowwise.
    x: the rows.
    *others: arrays [B, R, ...] are cut like x. Vectors stay whole.
  """
  named = None if implementation == "auto" else implementation
  function = functools.partial(function, implementation=named)
  mesh = sharding.spread()
  # Only kernels need it. XLA divides the plain implementation by itself.
  if not mesh or devices.of(x).platform != "gpu":
    return function(x, *others)
  spec = sharding.spec(mesh, x.shape, *axes)
  out = jax.P(*(cut for cut, axis in zip(spec, axes) if axis))
  specs = jax.tree.map(
    lambda other: jax.P(*spec[:2]) if other.ndim > 1 else jax.P(), others
  )
  # Kernels do not declare the axes over which their results vary, so this is
  # not checked.
  return jax.shard_map(
    function, in_specs=(spec, *specs), out_specs=out, check_vma=False
  )(x, *others)
