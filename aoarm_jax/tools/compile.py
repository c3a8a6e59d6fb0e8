"""--mode=compile: would this run fit a TPU slice, and how fast could it be?

The real TPU compiler compiles the whole training step for the slice. It needs
no TPU and comes with the extra `tpu`. It may crash, and refuses to run twice at
a time: so it runs in a process of its own, one at a time on this machine.

Nothing is executed. Memory and collectives are read from the compiled program,
and FLOPs are counted by model/cost.py. The time of a step is a lower bound: the
longest of the times that matrix products, memory and links need at their peaks.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import jax
from absl import logging
from jax.experimental import topologies

import pallas_kernels
from aoarm_jax.config import errors
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import hlo, meshes, peaks
from aoarm_jax.model import cost
from aoarm_jax.runs import telemetry, text
from aoarm_jax.training import program as program_lib


class PodError(errors.UserError):
  """Why a step does not compile for a slice, or does not fit it; one line."""


@dataclasses.dataclass(frozen=True)
class Report:
  """What a training step needs on a slice; see `estimate`.

  Attributes:
    topology: chip and shape, as in v5p:4x4x8.
    chips: number of chips.
    mesh: its axes, as in "fsdp 128".
    tokens: of a step, over all chips.
    parameter_bytes: of parameters, optimizer and EMA, on one chip.
    memory_bytes: all that the step needs on one chip.
    model_flops: of the forward and backward pass of a step, on one chip.
    flops: model_flops, and with remat a second forward pass.
    sent_bytes: kind of collective -> bytes that one chip sends in a step.
  """

  topology: str
  chips: int
  mesh: str
  tokens: int
  parameter_bytes: float
  memory_bytes: float
  model_flops: float
  flops: float
  sent_bytes: dict[str, float]

  @property
  def chip(self) -> peaks.Peaks:
    """The peaks of one chip."""
    return peaks.CHIPS[self.topology.partition(":")[0]]

  @property
  def seconds(self) -> dict[str, float]:
    """Seconds that each resource needs for a step at its peak."""
    return {
      "matmuls": self.flops / _known(self.chip.flops),
      # Adam reads and writes parameters and state once, and reads a gradient.
      "state in memory": 2
      * self.parameter_bytes
      / _known(self.chip.memory_bandwidth),
      "collectives": sum(self.sent_bytes.values())
      / _known(self.chip.link_bandwidth),
    }

  @property
  def step_seconds(self) -> float:
    """Seconds of a step if all resources are busy at the same time."""
    return max(self.seconds.values())

  @property
  def mfu_bound(self) -> float:
    """The MFU of a step that takes step_seconds, a fraction."""
    return self.model_flops / _known(self.chip.flops) / self.step_seconds

  def __str__(self):
    memory = _known(self.chip.memory)
    share = self.memory_bytes / memory
    sent = ", ".join(
      f"{kind} {n / 1e9:.3g} GB" for kind, n in self.sent_bytes.items() if n
    )
    parts = ", ".join(
      f"{name} {1e3 * s:.3g} ms" for name, s in self.seconds.items()
    )
    lines = (
      f"{self.topology}: {self.chips} chips, mesh {self.mesh}; "
      "compiled, not run",
      f"memory a chip   {self.memory_bytes / 1e9:.2f} GB of "
      f"{memory / 1e9:g} GB ({share:.0%}); state "
      f"{self.parameter_bytes / 1e9:.2f} GB",
      f"FLOPs a step    {self.model_flops * self.chips:.4g} of the model, "
      f"{self.flops * self.chips:.4g} with what is recomputed",
      f"sent by a chip  {sent or 'nothing'}",
      f"roofline        {1e3 * self.step_seconds:.3g} ms a step ({parts})",
      f"bounds          {self.tokens / self.step_seconds / self.chips:,.0f} "
      f"tokens/s a chip, MFU {self.mfu_bound:.1%}",
    )
    return "\n".join(lines)


def _known(peak: float | None) -> float:
  """Returns a peak of a TPU chip. The table has every peak of these chips."""
  assert peak is not None
  return peak


def estimate(config: config_lib.Config, topology: str) -> Report:
  """Compiles a training step for a slice, in a process of its own.

  Args:
    config: its mesh is over the slice's chips. attention=auto becomes
      mosaic_tpu.
    topology: chip and shape, as in v5e:16x16, v5p:4x4x8, v6e:8x8.

  Raises:
    ConfigError: there is no such topology, the mesh does not fit it, or the
      compiler is not installed.
    PodError: the step does not fit the memory, or the compiler failed.
  """
  name, _, shape = topology.partition(":")
  if name not in peaks.CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
    raise config_lib.ConfigError(
      f"--topology={topology!r}: give chip and shape, as in v5e:16x16, "
      f"v5p:4x4x8 or v6e:8x8; chips: {', '.join(peaks.CHIPS)}"
    )
  given = {
    "config": dataclasses.asdict(config),
    "topology": topology,
  }
  with _alone():
    done = subprocess.run(
      [sys.executable, "-m", "aoarm_jax.tools.compile"],
      input=json.dumps(given),
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
      },
      capture_output=True,
      text=True,
    )
  if done.returncode < 0:
    raise PodError(
      f"the TPU compiler crashed ({signal.Signals(-done.returncode).name}) on "
      f"{topology}, mesh {config.mesh}; try larger shards "
      "(--config.mesh.smallest_shard), or another mesh"
    )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise PodError(f"{topology}: the process that compiles failed: {lines[-1]}")
  answer = json.loads(done.stdout.splitlines()[-1])
  if "config_error" in answer:
    raise config_lib.ConfigError(answer["config_error"])
  if "error" in answer:
    raise PodError(answer["error"])
  return Report(**answer)


@contextlib.contextmanager
def _alone():
  """Waits until no other process compiles: the library refuses a second one."""
  import fcntl  # Windows has no fcntl; only this function needs it.

  path = pathlib.Path(tempfile.gettempdir()) / f"aoarm_jax_pod_{os.getuid()}"
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("waiting for another --mode=compile on this machine")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _compile(config: config_lib.Config, topology: str) -> dict:
  """Compiles in the child process, and returns the fields of Report."""
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except Exception as error:  # The library raises many types.
    raise config_lib.ConfigError(
      f"--topology={topology}: {text.first_line(error)}; the TPU compiler "
      "comes with pip install -e '.[tpu]'"
    ) from error
  if config.compute.attention == "auto":
    config = config.replace("compute.attention", "mosaic_tpu")
  program = program_lib.make(config, "train", devices=devices)
  mesh = program.network.mesh
  assert mesh is not None
  # A mesh without devices: a device that is not there cannot compute the
  # constants of a trace.
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    pallas_kernels.interpret(False),
  ):
    lowered = program.step.lower(program.abstract, program.tokens)
  compiled = lowered.compile()
  program_text = compiled.as_text()
  assert program_text is not None
  flops = cost.training_flops(config)
  recomputed = cost.forward_flops(config) if config.compute.remat else 0.0
  return dict(
    topology=topology,
    chips=len(devices),
    mesh=meshes.describe(mesh),
    tokens=math.prod(program.tokens.shape),
    parameter_bytes=float(
      sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(program.abstract)
      )
    ),
    memory_bytes=float(hlo.memory_bytes(compiled)),
    model_flops=flops / len(devices),
    flops=(flops + recomputed) / len(devices),
    sent_bytes={
      kind: traffic.sent_bytes
      for kind, traffic in hlo.traffic(program_text).items()
    },
  )


def _answer(given: dict) -> dict:
  """Returns the fields of Report, or the error as one field."""
  try:
    return _compile(config_lib.from_dict(given["config"]), given["topology"])
  except config_lib.ConfigError as error:
    return {"config_error": str(error)}
  except pallas_kernels.UnsupportedError as error:
    return {"config_error": f"config.compute.attention: {error}"}
  except jax.errors.JaxRuntimeError as error:
    if not telemetry.is_out_of_memory(error):
      return {"error": f"the TPU compiler failed: {text.first_line(error)}"}
    return {"error": f"{given['topology']}: {_does_not_fit(str(error))}"}


# The compiler has two messages, by the moment when it notices.
_TOO_MUCH = (
  r"Used (?P<used>[\d.]+\w) of (?P<there>[\d.]+\w) hbm",
  r"\((?P<used>[\d.]+\w)\) exceeds available HBM \((?P<there>[\d.]+\w)\)",
)


def _does_not_fit(message):
  """Returns one line about a step that needs too much memory."""
  matches = (re.search(pattern, message) for pattern in _TOO_MUCH)
  sizes = next(filter(None, matches), None)
  what = (
    f"needs at least {sizes['used']}iB of the {sizes['there']}iB of a chip"
    if sizes
    else text.first_line(message)
  )
  return (
    f"does not fit: {what}; take more chips, a smaller "
    "--config.train.batch_size, a larger --config.mesh.fsdp (0: all chips), "
    "--config.compute.accumulate, or --config.compute.remat=true"
  )


if __name__ == "__main__":
  print(json.dumps(_answer(json.load(sys.stdin))))
  sys.stdout.flush()
  os._exit(0)  # At a regular exit the compiler library is slow, or crashes.
