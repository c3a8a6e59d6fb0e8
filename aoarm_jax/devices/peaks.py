"""The most that each device can do: one table for every share and every bound.

The source of a number is NVIDIA's datasheet of the part (half of the figure
"with sparsity") or Google's page of the TPU, unless the field says measured:
https://docs.cloud.google.com/tpu/docs/system-architecture.
"""

import dataclasses

from pallas_kernels.hopper import peaks as hopper


@dataclasses.dataclass(frozen=True)
class Peaks:
  """The peaks of one device. None means that the number is not in the table.

  Attributes:
    flops: dense bfloat16 FLOP/s, from the vendor. MFU is relative to this.
    memory: size of the device's memory in bytes, from the vendor.
    memory_bandwidth: bytes/s, from the vendor.
    link_bandwidth: bytes/s that a device sends over all its links together,
      which is half of the vendor's figure for both directions.
    measured_flops: bfloat16 FLOP/s that matrix products reach.
    measured_bandwidth: bytes/s of device memory that kernels reach.
  """

  flops: float | None = None
  memory: float | None = None
  memory_bandwidth: float | None = None
  link_bandwidth: float | None = None
  measured_flops: float | None = None
  measured_bandwidth: float | None = None

  @property
  def attainable_flops(self) -> float | None:
    """The measured FLOP/s, or the vendor's where nobody has measured."""
    return self.measured_flops or self.flops

  @property
  def attainable_bandwidth(self) -> float | None:
    """The measured bytes/s, or the vendor's where nobody has measured."""
    return self.measured_bandwidth or self.memory_bandwidth


UNKNOWN = Peaks()

# TPU chips by the name that a topology has, as in v5p:4x4x8.
CHIPS = {
  "v5e": Peaks(197e12, 16e9, 819e9, 200e9),
  "v5p": Peaks(459e12, 95e9, 2765e9, 600e9),
  "v6e": Peaks(918e12, 32e9, 1640e9, 400e9),
}

# By a part of jax.Device.device_kind: the first match counts. UNKNOWN keeps a
# lesser device from a match further down. Devices without bfloat16 matrix units
# (V100, T4) are left out.
_KINDS = (
  ("MIG", UNKNOWN),  # A slice of a chip, whose name does not tell its share.
  ("GH200", Peaks(989e12)),
  ("H200 NVL", Peaks(835e12)),
  (
    "H200",
    Peaks(
      989e12,
      measured_flops=hopper.FLOPS_PER_SECOND,
      measured_bandwidth=hopper.BYTES_PER_SECOND,
    ),
  ),
  ("H100 NVL", Peaks(835e12)),
  ("H100 PCIe", Peaks(756e12)),
  ("H100", Peaks(989e12, measured_bandwidth=3.0e12)),
  ("NVIDIA A100", Peaks(312e12)),
  ("GB200", Peaks(2500e12)),
  ("B200", Peaks(2250e12)),
  ("L40S", Peaks(362e12)),
  ("L40", Peaks(181e12)),
  ("NVIDIA L4", Peaks(121e12)),
  ("TPU v4 lite", UNKNOWN),
  ("TPU v4", Peaks(275e12)),
  ("TPU v5 lite", CHIPS["v5e"]),
  ("TPU v5e", CHIPS["v5e"]),
  ("TPU v5", CHIPS["v5p"]),
  ("TPU v6 lite", CHIPS["v6e"]),
  ("TPU v6e", CHIPS["v6e"]),
)


def of_kind(device_kind: str) -> Peaks:
  """Returns the peaks of a device; all are None where it is not in the table.

  Args:
    device_kind: jax.Device.device_kind, as in "NVIDIA H100 80GB HBM3".
  """
  matches = (peaks for part, peaks in _KINDS if part in device_kind)
  return next(matches, UNKNOWN)
