"""The mesh of a run, and what it must divide.

The axes of a mesh:

data      copies of the model, each with its own rows of a batch
fsdp      rows of a batch too; parameters are split along their width and
          gathered, layer by layer, where they are used (ZeRO 3)
tensor    heads and hidden units (Megatron)
sequence  slots: keys and values are gathered, see model/parallel.py
"""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding

AXES = ("data", "fsdp", "tensor", "sequence")


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
  ways = sharding.batch_ways(mesh)
  if batch_size % (ways * micro_batches):
    scope = f" in each of {micro_batches} micro-batches" * (micro_batches > 1)
    raise config_lib.ConfigError(
      f"{path}={batch_size}: must be a multiple of the {ways} devices along "
      f"the batch (config.mesh.data and fsdp){scope}"
    )
