"""Meshes, and the one table from logical axes to mesh axes.

The axes of a mesh:

data      copies of the model, each with its own rows of a batch
fsdp      rows of a batch too; parameters are split along their width and
          gathered, layer by layer, where they are used (ZeRO 3)
tensor    heads and hidden units (Megatron)
sequence  slots: keys and values are gathered, see model/parallel.py
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aoarm_jax.config import schema as config_lib

AXES = ("data", "fsdp", "tensor", "sequence")

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


def all_devices() -> list[jax.Device]:
  """Return the devices of all processes.

  Raises:
    ConfigError: the variable JAX_PLATFORMS names devices that are not here.
  """
  try:
    return jax.devices()
  # JAX says nothing at all where a platform has no devices.
  except (RuntimeError, AssertionError) as error:
    platforms = jax.config.values["jax_platforms"]
    if not platforms:
      raise
    why = f" ({text})" if (text := str(error).partition("\n")[0]) else ""
    raise config_lib.ConfigError(
      f"JAX_PLATFORMS={platforms}: JAX finds no such device here{why}; unset "
      "the variable, or install JAX for the device: pip install "
      "'aoarm_jax[cuda]' or 'aoarm_jax[tpu]'"
    ) from None


def make_mesh(
  mesh: config_lib.Mesh, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Return the mesh that the config asks for.

  Args:
    mesh: the section of the config.
    devices: the devices to use. None means all devices.

  Raises:
    ConfigError: the mesh does not fit the devices.
  """
  devices = all_devices() if devices is None else devices
  count = len(devices)
  platform = devices[0].platform
  kind = f"{count} {platform} device{'s' * (count > 1)}"

  def more(needed):
    # A single process can have any number of virtual CPU devices. With several
    # processes, the launcher decides how many each process has.
    if platform != "cpu" or jax.process_count() > 1:
      return "more devices"
    flag = f"--xla_force_host_platform_device_count={needed}"
    return f"{needed} devices (XLA_FLAGS={flag})"

  sizes = [mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence]
  if not mesh.fsdp:
    sizes[0] = mesh.data or 1
  given = math.prod(size for size in sizes if size)
  asked = " x ".join(f"{a} {n}" for a, n in zip(AXES, sizes) if n > 1)
  if 0 in sizes:
    if count % given:
      raise config_lib.ConfigError(
        f"config.mesh: {asked} does not divide the {kind}; choose sizes "
        f"whose product does, or start with {more(given * -(-count // given))}"
      )
    sizes[sizes.index(0)] = count // given
  used = math.prod(sizes)
  if used > count:
    raise config_lib.ConfigError(
      f"config.mesh.data={mesh.data}: there are {kind}, and {asked} needs "
      f"{used}; use at most that many, or 0 for all that are left, or start "
      f"with {more(used)}"
    )
  if used < count and jax.process_count() > 1:
    raise config_lib.ConfigError(
      f"config.mesh.data={mesh.data}: {asked or 'one'} leaves some of the "
      f"{kind} idle, and several processes must use all; set it to 0"
    )
  return jax.sharding.Mesh(
    mesh_utils.create_device_mesh(
      sizes, devices[:used], allow_split_physical_axes=True
    ),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def of_run(
  config: config_lib.Config,
  *batches: str,
  mesh: jax.sharding.Mesh | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Return the mesh of a run, after checking the model and the batches.

  Args:
    config: the config of the run.
    *batches: the batches that the run reads: "train", "eval".
    mesh: the mesh. None makes the config's mesh over `devices`.
    devices: see `make_mesh`.

  Raises:
    ConfigError: the mesh does not fit the devices, the model or a batch.
  """
  mesh = mesh or make_mesh(config.mesh, devices)
  check(mesh, config)
  if "train" in batches:
    check_batch(
      mesh,
      "config.train.batch_size",
      config.train.batch_size,
      config.compute.accumulate,
    )
  if "eval" in batches:
    check_batch(mesh, "config.eval.batch_size", config.eval_batch_size)
  return mesh


def describe(mesh: jax.sharding.Mesh) -> str:
  """Return the sizes of a mesh for people, such as 'data 2 x tensor 4'."""
  sizes = [f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1]
  return " x ".join(sizes) or "one device"


def check(mesh: jax.sharding.Mesh, config: config_lib.Config) -> None:
  """Raise ConfigError if the mesh does not divide the model."""
  m = config.model
  for axis, path, value in (
    ("tensor", f"config.model.N={m.N} heads", m.N),
    (
      "tensor",
      f"config.model.kv_heads={m.key_heads} heads of keys and values",
      m.key_heads,
    ),
    ("tensor", f"config.model.mlp_width={m.F} hidden units", m.F),
  ):
    if value % mesh.shape[axis]:
      raise config_lib.ConfigError(
        f"config.mesh.{axis}={mesh.shape[axis]}: must divide {path}"
      )
  ways = mesh.shape["sequence"]
  if ways == 1:
    return
  if m.S % (2 * ways):
    raise config_lib.ConfigError(
      f"config.mesh.sequence={ways}: twice that must divide the {m.S} slots of "
      f"config.model.T={m.T}"
    )
  if config.train.query_fraction < 1:
    raise config_lib.ConfigError(
      f"config.train.query_fraction={config.train.query_fraction}: must be 1 "
      "where slots are spread over devices (config.mesh.sequence)"
    )
  if config.compute.attention == "cudnn" and not m.kind.masked:
    raise config_lib.ConfigError(
      "config.compute.attention='cudnn': sees contiguous slots only, and "
      f"config.mesh.sequence={ways} deals them out; use auto, xla, mosaic_gpu "
      "or mosaic_tpu"
    )


def check_batch(
  mesh: jax.sharding.Mesh, path: str, batch_size: int, micro_batches: int = 1
) -> None:
  """Raise ConfigError if the mesh does not divide a batch.

  Args:
    mesh: the mesh of the run.
    path: the field that gives the batch size, for the message.
    batch_size: the number of rows in the batch.
    micro_batches: the number of parts that the batch is split into.
  """
  ways = _batch_ways(mesh)
  if batch_size % (ways * micro_batches):
    scope = f" in each of {micro_batches} micro-batches" * (micro_batches > 1)
    raise config_lib.ConfigError(
      f"{path}={batch_size}: must be a multiple of the {ways} devices along "
      f"the batch (config.mesh.data and fsdp){scope}"
    )


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
  rows = batch_size // _batch_ways(mesh)
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
  ways, local_parts = _batch_ways(mesh), _local_parts(mesh)
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


def _batch_ways(mesh: jax.sharding.Mesh) -> int:
  """Return how many parts the mesh divides a batch into."""
  return math.prod(mesh.shape[axis] for axis in _tuple_of(MESH_AXIS["batch"]))


def _local_parts(mesh: jax.sharding.Mesh) -> list[int]:
  """Return which parts of a batch lie on devices of this process."""
  process = jax.process_index()
  devices = mesh.devices.reshape(_batch_ways(mesh), -1)
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
  devices = _batch_ways(mesh)
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
