"""How and where a run is computed."""

import dataclasses

from aoarm_jax.config.sections import fields


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the same mathematics is computed; may change between restarts."""

  dtype: str = fields.field(
    "bfloat16",
    "dtype of the inputs of matrix multiplications",
    choices=("bfloat16", "float32"),
  )
  attention: str = fields.field(
    "auto",
    "implementation in pallas_kernels for whole sequences; auto: the fastest "
    "supported implementation; attention over a cache always uses xla",
    choices=(
      "auto",
      "reference",
      "xla",
      "blockwise",
      "cudnn",
      "mosaic_gpu",
      "mosaic_tpu",
    ),
  )
  rowwise: str = fields.field(
    "auto",
    "implementation in pallas_kernels of norms, rotary embedding and GELU; "
    "auto: the fastest supported implementation",
    choices=("auto", "xla", "mosaic_gpu"),
  )
  scan_layers: bool = fields.field(
    False, "compile one layer and loop over it, instead of all layers"
  )
  remat: bool = fields.field(
    False, "recompute activations in the backward pass, to save memory"
  )
  loss_block: int = fields.field(
    0,
    "symbols of the vocabulary whose logits are in memory together in the "
    "loss; 0: all of them below 8,192 symbols, else 4,096",
    low=0,
  )
  accumulate: int = fields.field(1, "number of micro-batches per step", low=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Number of devices along each axis (aoarm_jax/devices/meshes.py)."""

  data: int = fields.field(
    0,
    "number of copies of the model, which share the batch; 0 uses all "
    "remaining devices",
    low=0,
  )
  fsdp: int = fields.field(
    1,
    "number of devices that share the batch and the parameters; 0 uses all "
    "remaining devices, and mesh.data is then 1 unless it is set",
    low=0,
  )
  tensor: int = fields.field(
    1, "number of devices that share the heads and the hidden units", low=1
  )
  sequence: int = fields.field(
    1,
    "number of devices that share the slots of a sequence (context "
    "parallelism)",
    low=1,
  )
  smallest_shard: int = fields.field(
    8,
    "shortest piece, in elements, that fsdp may cut a dimension of a "
    "parameter into; a dimension with shorter pieces stays whole",
    low=1,
  )


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes as one run (aoarm_jax/devices/distributed.py).

  Launchers set the first four fields and notice_seconds by environment
  variables, which override the config. The names are in distributed.VARIABLES.
  """

  enabled: bool = fields.field(
    False, "join other processes; this is never guessed"
  )
  coordinator_address: str = fields.field(
    "",
    "host:port of process 0; '' asks Cloud TPU, Slurm or Kubernetes",
  )
  process_count: int = fields.field(
    0, "number of processes; 0 finds it together with the address", low=0
  )
  process_id: int = fields.field(
    -1,
    "number of this process, 0 to process_count - 1; -1 finds it together "
    "with the address",
    low=-1,
  )
  heartbeat_timeout_seconds: int = fields.field(
    100,
    "the other processes stop after a process was silent for this time",
    low=1,
  )
  initialization_timeout_seconds: int = fields.field(
    300, "longest wait for all processes to start", low=1
  )
  notice_seconds: int = fields.field(
    0,
    "seconds from SIGTERM to the kill; a save that takes longer is warned of; "
    "0 is unknown",
    low=0,
  )
  step_timeout_seconds: int = fields.field(
    3600,
    "a stuck process ends itself after this time without progress: a step, a "
    "batch of an evaluation, or a save; it must exceed any compilation; 0 "
    "never ends a process",
    low=0,
  )
