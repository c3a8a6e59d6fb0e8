"""Meshes, and the one table from logical axes to mesh axes."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aoarm_jax import config as config_lib

# Logical axis of an array -> mesh axis; None is replicated.
MESH_AXIS = {
  "batch": "data",
  "slots": None,
  "streams": None,
  "embed": None,
  "vocabulary": None,
}


def make_mesh(mesh: config_lib.Mesh, devices=None) -> jax.sharding.Mesh:
  """The mesh that the config asks for, over `devices` (None: all).

  Raises:
    ConfigError: more devices asked for than there are.
  """
  devices = jax.devices() if devices is None else devices
  data = mesh.data or len(devices)
  if data > len(devices):
    raise config_lib.ConfigError(
      f"config.mesh.data={data}: there are {len(devices)} "
      f"{devices[0].platform} devices; use at most that many, or 0 for all"
    )
  return jax.sharding.Mesh(
    np.array(devices[:data]), ("data",), axis_types=(AxisType.Auto,)
  )


def check_batch(mesh: jax.sharding.Mesh, path: str, batch_size: int) -> None:
  """Raises ConfigError if a batch of `batch_size` does not divide."""
  if batch_size % mesh.shape["data"]:
    raise config_lib.ConfigError(
      f"{path}={batch_size}: must be a multiple of the {mesh.shape['data']} "
      "devices along the batch (config.mesh.data)"
    )


def named(mesh: jax.sharding.Mesh, *axes: str | None) -> NamedSharding:
  """The sharding of an array with these logical axes."""
  return NamedSharding(mesh, _spec(axes))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def put(mesh: jax.sharding.Mesh, tree):
  """Host values to every device of the mesh."""
  return jax.device_put(tree, replicated(mesh))


def put_batch(mesh: jax.sharding.Mesh, tree):
  """This process's rows of a global batch to the devices along the batch."""
  # With several processes JAX does not count it as an explicit transfer.
  with jax.transfer_guard("allow"):
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(named(mesh, "batch"), x),
      tree,
    )


def put_rows(mesh: jax.sharding.Mesh, tree):
  """A global batch, which every process holds, to the devices along the batch.

  With several processes each gives its own devices' rows.
  """
  where = named(mesh, "batch")
  with jax.transfer_guard("allow"):
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(
        x.shape, where, lambda index: x[index]
      ),
      tree,
    )


def batch_size(mesh: jax.sharding.Mesh, most: int, rows: int) -> int:
  """Rows a batch for so many in all: a multiple of the devices along it."""
  devices = mesh.shape["data"]
  return -(-min(most, rows) // devices) * devices


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's sharding; nothing happens where no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(axes))


def _spec(axes):
  return PartitionSpec(*(a and MESH_AXIS[a] for a in axes))
