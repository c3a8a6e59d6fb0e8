"""Meshes, and the one table from logical axes to mesh axes.

data      copies of the model, each with its own rows of a batch
fsdp      rows of a batch too; parameters are split along their width and
          gathered, layer by layer, where they are used (ZeRO 3)
tensor    heads and hidden units (Megatron)
sequence  slots: keys and values are gathered, see model/parallel.py
"""

import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aoarm_jax.config import schema as config_lib

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis of an array -> mesh axis, or axes; None is replicated.
MESH_AXIS = {
  "batch": ("data", "fsdp"),
  "slots": "sequence",
  "heads": "tensor",
  "hidden": "tensor",
  # D of a row or of a parameter that stays whole; and of one that is cut.
  "width": None,
  "embed": "fsdp",
  # Small: symbols, positions, what a mechanism is conditioned on, features of
  # a head, and vectors such as the scales of norms.
  "vocabulary": None,
  "positions": None,
  "condition": None,
  "head": None,
  "vector": None,
  "layers": None,
}


def make_mesh(mesh: config_lib.Mesh, devices=None) -> jax.sharding.Mesh:
  """The mesh that the config asks for, over `devices` (None: all).

  Raises:
    ConfigError: it does not fit the devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  platform = devices[0].platform
  kind = f"{count} {platform} device{'s' * (count > 1)}"

  def more(needed):
    # Virtual ones are made at will; a launcher says how many a process has.
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
  config: config_lib.Config, *batches: str, devices=None
) -> jax.sharding.Mesh:
  """The mesh of a run, by which its model and its batches divide.

  Args:
    config: of the run.
    *batches: "train", "eval": those that it reads.
    devices: as of make_mesh.

  Raises:
    ConfigError: it does not fit the devices, the model or a batch.
  """
  mesh = make_mesh(config.mesh, devices)
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
  """As in 'data 2 x tensor 4'."""
  sizes = [f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1]
  return " x ".join(sizes) or "one device"


def check(mesh: jax.sharding.Mesh, config: config_lib.Config) -> None:
  """Raises ConfigError if the model does not divide by the mesh."""
  m = config.model
  for axis, path, value in (
    ("tensor", f"config.model.N={m.N} heads", m.N),
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
  """Raises ConfigError if a batch of `batch_size` does not divide."""
  ways = _batch_ways(mesh)
  if batch_size % (ways * micro_batches):
    of = f" in each of {micro_batches} micro-batches" * (micro_batches > 1)
    raise config_lib.ConfigError(
      f"{path}={batch_size}: must be a multiple of the {ways} devices along "
      f"the batch (config.mesh.data and fsdp){of}"
    )


def named(mesh: jax.sharding.Mesh, *axes: str | None) -> NamedSharding:
  """The sharding of an array with these logical axes."""
  return NamedSharding(mesh, PartitionSpec(*map(_mesh_axis, axes)))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def put(mesh: jax.sharding.Mesh, tree):
  """Host values to every device of the mesh."""
  return jax.device_put(tree, replicated(mesh))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a global batch this process's devices hold: int [rows]."""
  rows = batch_size // _batch_ways(mesh)
  first = rows * np.array(_own_parts(mesh))[:, None]
  return (first + np.arange(rows)).reshape(-1)


def put_batch(mesh: jax.sharding.Mesh, tree):
  """This process's rows of a global batch, as `local_rows` says, to devices."""
  ways, own = _batch_ways(mesh), _own_parts(mesh)
  where = named(mesh, "batch")

  def put_one(x):
    rows = len(x) // len(own)

    def part(index):
      at = own.index((index[0].start or 0) // rows) * rows
      return x[at : at + rows]

    return jax.make_array_from_callback(
      (rows * ways, *x.shape[1:]), where, part
    )

  # With several processes JAX does not count it as an explicit transfer.
  with jax.transfer_guard("allow"):
    return jax.tree.map(put_one, tree)


def _batch_ways(mesh):
  return math.prod(mesh.shape[axis] for axis in MESH_AXIS["batch"])


def _own_parts(mesh):
  """Which of the equal parts of a batch lie on devices of this process."""
  own = jax.process_index()
  parts = mesh.devices.reshape(_batch_ways(mesh), -1)
  return [
    i for i, p in enumerate(parts) if any(d.process_index == own for d in p)
  ]


def parameter_axes(
  mesh: jax.sharding.Mesh,
  axes: tuple[str | None, ...],
  shape: tuple[int, ...],
  smallest_shard: int,
) -> tuple[str | None, ...]:
  """Logical axes of a parameter that is cut into no short pieces.

  Args:
    mesh: of devices.
    axes: logical, of the last dimensions; those before are layers.
    shape: of the parameter.
    smallest_shard: elements; a dimension whose pieces along fsdp would be
      shorter is "width", which stays whole, instead of "embed".
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
  """Where a parameter lies, and what the optimizer keeps about it.

  Args:
    mesh: of devices.
    axes: logical, of the last dimensions; those before are layers.
    shape: of the parameter.

  Raises:
    ConfigError: a dimension does not divide.
  """
  return NamedSharding(mesh, _parameter_spec(mesh, axes, shape))


def constrain_parameters(tree, axes):
  """Pins a tree like the parameters'; nothing happens without a mesh.

  Args:
    tree: of arrays.
    axes: the same tree of logical axes.
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
  """A parameter where it is used: whole along fsdp; its gradient is not."""
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
  # Left to itself the gradient would be gathered too, by the constraint's own.
  return (constrain(gradient, *axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


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
  """Rows a batch for so many in all, of which few sizes come to be compiled.

  The next power of two, at most `most`; then a multiple of the devices along
  the batch.
  """
  devices = _batch_ways(mesh)
  rows = min(most, 1 << (rows - 1).bit_length())
  return -(-rows // devices) * devices


def spread() -> jax.sharding.AbstractMesh | None:
  """The mesh that arrays are spread over here.

  None where none is set or it is one device, and in a function that
  jax.shard_map runs on every device: arrays are a device's own there.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's sharding; nothing happens where none is spread.

  A dimension that does not divide is left whole: texts are generated in
  batches of any size. Those of training are refused before; see `check`.
  """
  if not (mesh := spread()):
    return x
  return jax.lax.with_sharding_constraint(x, spec(mesh, x.shape, *axes))


def spec(mesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
  """Of an activation; a dimension that does not divide is left whole."""
  parts = [_mesh_axis(name) for name in axes]
  for i, axis in enumerate(parts):
    several = (axis,) if isinstance(axis, str) else axis or ()
    if shape[i] % math.prod(mesh.shape[a] for a in several):
      parts[i] = None
  return PartitionSpec(*parts)


def _mesh_axis(name):
  return name and MESH_AXIS[name]
