"""The device that a call will run on."""

import re
from typing import Any, NamedTuple

import jax

# Multiprocessors of an H100 SXM, an H200 and a GH200. Other cards with Hopper
# chips have fewer, and a device that is here says how many it has.
_HOPPER_CORES = 132
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


class Device(NamedTuple):
  """The facts that choose a kernel and its sizes.

  Attributes:
    platform: name of the backend, such as "cpu", "gpu" or "tpu".
    kind: name of the chip.
    capability: compute capability of an NVIDIA GPU, such as "9.0". Other makers
      use names such as "gfx942". Empty where there is none.
    cores: multiprocessors of a GPU.
  """

  platform: str
  kind: str
  capability: str = ""
  cores: int = _HOPPER_CORES


def of(*arrays: Any) -> Device:
  """Return the device on which a call with these arrays will run.

  Arrays with values say where they are. Under a transformation, such as
  jax.jit, arrays do not know it. Then it is the device of the mesh
  (jax.set_mesh), and without a mesh JAX's default device.
  """
  for x in arrays:
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      return _described(next(iter(x.devices())))
  if device := jax.sharding.get_abstract_mesh().abstract_device:
    return _of_kind(device.platform, device.device_kind)
  default = jax.config.values["jax_default_device"]
  if default is None or isinstance(default, str):
    return _described(jax.local_devices(backend=default)[0])
  return _described(default)


def _of_kind(platform: str, kind: str) -> Device:
  """Describe a device of a mesh, which may be one that is not here."""
  if platform == jax.default_backend():
    for device in jax.local_devices():
      if device.device_kind == kind:
        return _described(device)
  return Device(platform, kind, "9.0" if _HOPPER.search(kind) else "")


def _described(device: jax.Device) -> Device:
  return Device(
    device.platform,
    device.device_kind,
    str(getattr(device, "compute_capability", "")),
    getattr(device, "core_count", _HOPPER_CORES),
  )
