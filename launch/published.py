"""Values that Google Cloud and Slurm accept, from their publications.

This is the only file with such tables. A value that is not here is refused
before anything is sent. If a table has grown, add the line here.

Read on 2026-11-29:
- topologies: cloud.google.com/tpu/docs, pages types-topologies (v4),
  supported-tpu-configurations (v5p) and v5e; for v6e and the node labels of GKE
  src/xpk/core/system_characteristics.py of github.com/AI-Hypercomputer/xpk at
  367c838 (2026-06-25);
- other GPUs: AcceleratorType of Vertex AI, which has the names of the labels;
- spot machines: cloud.google.com/kubernetes-engine/docs/concepts/spot-vms;
- Slurm: sbatch and slurmctld 22.05.8, tried out. They store larger numbers
  wrongly, without an error.
"""

import itertools
import math
from typing import NamedTuple


class Tpu(NamedTuple):
  """A generation of TPUs.

  Attributes:
    label: value of the node label of GKE.
    accelerator: how an accelerator type of Cloud TPU begins.
    runtime: runtime version of Cloud TPU.
    cores: what a chip adds to the size in an accelerator type.
    chips_of_one_host: most chips of a slice that has one host. The hosts of
      other slices have CHIPS_PER_HOST.
    topologies: shapes of slices.
  """

  label: str
  accelerator: str
  runtime: str
  cores: int
  chips_of_one_host: int
  topologies: tuple[str, ...]

  def hosts(self, topology: str) -> int:
    """Return the number of hosts of a slice."""
    slice_chips = chips(topology)
    if slice_chips <= self.chips_of_one_host:
      return 1
    return slice_chips // CHIPS_PER_HOST

  def sizes(self) -> list[int]:
    """Return the sizes of the accelerator types."""
    return sorted({self.cores * chips(x) for x in self.topologies})


CHIPS_PER_HOST = 4


def chips(topology: str) -> int:
  """Return the number of chips of a topology such as 4x4x8."""
  return math.prod(map(int, topology.split("x")))


def _cubes(most: int) -> tuple[str, ...]:
  """Return the topologies of three axes: AxBxC with A <= B <= C.

  Above one cube of 4x4x4 chips, each axis is a multiple of 4 up to 256.

  Args:
    most: largest number of cubes.
  """
  axis = range(1, 65)
  return (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *(
      f"{4 * a}x{4 * b}x{4 * c}"
      for a, b, c in itertools.combinations_with_replacement(axis, 3)
      if a * b * c <= most
    ),
  )


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPUS = {
  "v4": Tpu(
    label="tpu-v4-podslice",
    accelerator="v4",
    runtime="tpu-ubuntu2204-base",
    cores=2,
    chips_of_one_host=4,
    topologies=_cubes(64),
  ),
  "v5e": Tpu(
    label="tpu-v5-lite-podslice",
    accelerator="v5litepod",
    runtime="v2-alpha-tpuv5-lite",
    cores=1,
    chips_of_one_host=8,
    topologies=_SQUARES,
  ),
  "v5p": Tpu(
    label="tpu-v5p-slice",
    accelerator="v5p",
    runtime="v2-alpha-tpuv5",
    cores=2,
    chips_of_one_host=4,
    topologies=_cubes(96),
  ),
  "v6e": Tpu(
    label="tpu-v6e-slice",
    accelerator="v6e",
    runtime="v2-alpha-tpuv6e",
    cores=1,
    chips_of_one_host=8,
    topologies=_SQUARES,
  ),
}

# Node labels of GKE, and the most GPUs of a machine that has the label. Without
# the generations that CUDA 13 does not support.
GPUS = {
  "nvidia-tesla-t4": 4,
  "nvidia-l4": 8,
  "nvidia-tesla-a100": 16,
  "nvidia-a100-80gb": 8,
  "nvidia-h100-80gb": 8,
  "nvidia-h100-mega-80gb": 8,
  "nvidia-h200-141gb": 8,
  "nvidia-b200": 8,
  "nvidia-gb200": 4,
  "nvidia-rtx-pro-6000": 8,
}

# From the notice to the end of a spot machine there are 30 s. GKE keeps a part
# for its own pods; see docs/launching.md.
SPOT_GRACE_SECONDS = 25
# The most that a node pool of spot machines can be configured to give.
MOST_SPOT_GRACE_SECONDS = 120
# maxRestarts of a JobSet is an int32.
MOST_RESTARTS = 2**31 - 1

# Slurm adds a time up in seconds, in an int32.
MOST_SLURM_SECONDS = 2**31 - 1
# Tasks of a node, CPUs of a task: uint16, without two special values.
MOST_SLURM_COUNT = 2**16 - 3
MOST_SLURM_NOTICE_SECONDS = 2**16 - 1
