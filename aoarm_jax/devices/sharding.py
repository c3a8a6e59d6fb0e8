"""How arrays lie on a mesh: one table from logical axes to mesh axes."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aoarm_jax.config import schema as config_lib

# The mesh axis, or axes, of each logical axis of an array. None means that the
# array is replicated along this dimension.
MESH_AXIS: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "slots": "sequence",
  "heads": "tensor",
  "hidden": "tensor",
  # The width D is "width" in rows and in parameters that stay whole. It is
  # "embed" in parameters that are cut.
  "width": None,
  "embed": "fsdp",
  # These dimensions are small: symbols, positions, the conditioning of a
  # mechanism, features of a head, and vectors such as the scales of norms.
  "vocabulary": None,
  "positions": None,
  "condition": None,
  "head": None,
  "vector": None,
  "layers": None,
}


def named(mesh: jax.sharding.Mesh, *axes: str | None) -> NamedSharding:
  """Return the sharding of an array with these logical axes."""
  return NamedSharding(mesh, PartitionSpec(*map(_mesh_axis, axes)))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Return the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def put(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Copy a tree of host arrays to every device of the mesh."""
  return jax.device_put(tree, replicated(mesh))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Return the rows of a global batch that this process holds: int [rows]."""
  rows = batch_size // batch_ways(mesh)
  first = rows * np.array(_local_parts(mesh))[:, None]
  return (first + np.arange(rows)).reshape(-1)


def put_batch(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Return the global batch, put together from the rows of each process.

  Args:
    mesh: the mesh of the run.
    tree: arrays of this process's rows, in the order of `local_rows`.

  Returns:
    A tree of arrays that are sharded along the batch.
  """
  ways, local_parts = batch_ways(mesh), _local_parts(mesh)
  placement = named(mesh, "batch")

  def put_leaf(x):
    rows = len(x) // len(local_parts)

    def rows_at(index):
      first = local_parts.index((index[0].start or 0) // rows) * rows
      return x[first : first + rows]

    return jax.make_array_from_callback(
      (rows * ways, *x.shape[1:]), placement, rows_at
    )

  # With several processes, JAX does not count this as an explicit transfer.
  with jax.transfer_guard("allow"):
    return jax.tree.map(put_leaf, tree)


def batch_ways(mesh: jax.sharding.Mesh) -> int:
  """Return how many parts the mesh divides a batch into."""
  return math.prod(mesh.shape[axis] for axis in _tuple_of(MESH_AXIS["batch"]))


def _local_parts(mesh: jax.sharding.Mesh) -> list[int]:
  """Return which parts of a batch lie on devices of this process."""
  process = jax.process_index()
  devices = mesh.devices.reshape(batch_ways(mesh), -1)
  return [
    i
    for i, part in enumerate(devices)
    if any(device.process_index == process for device in part)
  ]


def parameter_axes(
  mesh: jax.sharding.Mesh,
  axes: tuple[str | None, ...],
  shape: tuple[int, ...],
  smallest_shard: int,
) -> tuple[str | None, ...]:
  """Return the logical axes of a parameter that is not cut too short.

  A dimension whose pieces along fsdp would be shorter than `smallest_shard`
  gets the name "width", which stays whole, instead of "embed".

  Args:
    mesh: the mesh of the run.
    axes: logical axes of the last dimensions. Dimensions before are layers.
    shape: the shape of the parameter.
    smallest_shard: the least length of a piece, in elements.
  """
  ways = mesh.shape["fsdp"]
  return tuple(
    "width"
    if name == "embed" and ways > 1 and size < ways * smallest_shard
    else name
    for name, size in zip(axes, shape[len(shape) - len(axes) :])
  )


def parameter(
  mesh: jax.sharding.Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
  """Return the sharding of a parameter and of its optimizer state.

  Args:
    mesh: the mesh of the run.
    axes: logical axes of the last dimensions. Dimensions before are layers.
    shape: the shape of the parameter.

  Raises:
    ConfigError: the mesh does not divide a dimension.
  """
  return NamedSharding(mesh, _parameter_spec(mesh, axes, shape))


def constrain_parameters(tree: Any, axes: Any) -> Any:
  """Pin the sharding of a tree with the parameters' structure.

  Without a mesh the tree is returned unchanged.

  Args:
    tree: arrays with the shapes of the parameters.
    axes: a tree of the same structure with the logical axes of each array.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.tree.map(
    lambda x, names: jax.lax.with_sharding_constraint(
      x, _parameter_spec(mesh, names, x.shape)
    ),
    tree,
    axes,
  )


def _parameter_spec(mesh, axes, shape):
  axes = ("layers",) * (len(shape) - len(axes)) + axes
  spec = []
  for name, size in zip(axes, shape):
    axis = _mesh_axis(name)
    if axis and size % mesh.shape[axis]:
      raise config_lib.ConfigError(
        f"config.mesh.{axis}={mesh.shape[axis]}: must divide the {name} axis "
        f"of every parameter, and there is one of shape {shape}"
      )
    spec.append(axis)
  return PartitionSpec(*spec)


def gathered(x: jax.Array, *axes: str | None) -> jax.Array:
  """Return a parameter for use: whole along fsdp, with a sharded gradient."""
  mesh = spread()
  if not mesh or mesh.shape["fsdp"] == 1 or "embed" not in axes:
    return x
  return _gathered(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x, axes):
  return constrain(x, *("width" if a == "embed" else a for a in axes))


def _gathered_forward(x, axes):
  return _gathered(x, axes), None


def _gathered_backward(axes, _, gradient):
  # The gradient of a constraint is the same constraint. Without this rule, the
  # gradient would be gathered too.
  return (constrain(gradient, *axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def put_rows(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Shard a global batch that every process holds along the batch.

  With several processes, each process gives the rows of its own devices.

  Args:
    mesh: the mesh of the run.
    tree: arrays with all rows.
  """
  placement = named(mesh, "batch")
  with jax.transfer_guard("allow"):
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(
        x.shape, placement, lambda index: x[index]
      ),
      tree,
    )


def batch_size(
  mesh: jax.sharding.Mesh, most: int, rows: int, least: int = 1
) -> int:
  """Return the batch size for `rows` items; few sizes are compiled.

  The size is the next power of four, limited to `most`. It is then rounded up
  to a multiple of the devices along the batch.

  Args:
    mesh: the mesh of the run.
    most: the greatest batch size before the last rounding.
    rows: the number of items in all.
    least: the least size before the limit; a power of four.
  """
  devices = batch_ways(mesh)
  size = least
  while size < rows:
    size *= 4
  rows = min(most, size)
  return -(-rows // devices) * devices


def spread() -> jax.sharding.AbstractMesh | None:
  """Return the mesh that arrays are spread over here, or None.

  The result is None if no mesh is set, and if the mesh has one device. It is
  also None inside jax.shard_map, where each device has arrays of its own.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pin the sharding of an activation; do nothing without a mesh.

  A dimension that the mesh does not divide stays whole, because texts are
  generated in batches of any size. For training, such sizes are refused
  earlier; see `check`.

  Args:
    x: the activation.
    *axes: its logical axes.
  """
  if not (mesh := spread()):
    return x
  return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, *axes))


def spec(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  shape: tuple[int, ...],
  *axes: str | None,
) -> PartitionSpec:
  """Return the partition of an activation.

  A dimension that the mesh does not divide stays whole.

  Args:
    mesh: the mesh of the run.
    shape: the shape of the activation.
    *axes: its logical axes.
  """
  mesh_axes = [_mesh_axis(name) for name in axes]
  for i, axis in enumerate(mesh_axes):
    if shape[i] % math.prod(mesh.shape[a] for a in _tuple_of(axis)):
      mesh_axes[i] = None
  return PartitionSpec(*mesh_axes)


def _tuple_of(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Return the mesh axes of an entry of MESH_AXIS as a tuple."""
  return (axis,) if isinstance(axis, str) else axis or ()


def _mesh_axis(name):
  return name and MESH_AXIS[name]
