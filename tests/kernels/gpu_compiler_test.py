"""The training step, compiled for an H200 on a machine without a GPU.

Needs the extra `cuda`; run by -m gpu_compiler. The limits say what the step
has today, with a little room. They are counts, and no times: fewer bytes need
not be less time.
"""

import re

import jax
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import topologies

from aoarm_jax.config import schema as config_lib
from aoarm_jax.training import program as program_lib

_L = 3
# What XLA asks about the device.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
# Instructions that launch nothing.
_FREE = ("parameter", "get-tuple-element", "constant", "bitcast", "tuple")


def _compiled(mechanism, T):
  """Return the compiled step of the 8M model with three layers."""
  pytest.importorskip("jax_cuda13_plugin")
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=H200, topology="1x1x1"
  )
  config = config_lib.Config(
    model=config_lib.Model(mechanism=mechanism, T=T, D=256, L=_L, N=4),
    train=config_lib.Train(batch_size=65536 // T),
  )
  program = program_lib.make(config, "train", devices=topology.devices)
  with jax.set_mesh(program.network.mesh):
    return program.step.lower(program.abstract, program.tokens).compile()


def _instructions(text):
  """Return (shapes, name, rest of the line) of what the entry launches."""
  found = []
  for line in text[text.index("ENTRY ") :].splitlines():
    match = re.match(r"\s*(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
    if match and match[2] not in _FREE:
      found.append(match.groups())
  return found


def _largest_float32(instructions):
  """Return the number of elements of the largest float32 array."""
  sizes = [0]
  for shapes, *_ in instructions:
    for dims in re.findall(r"f32\[([\d,]+)\]", shapes):
      size = 1
      for dim in dims.split(","):
        size *= int(dim)
      sizes.append(size)
  return max(sizes)


@pytest.mark.gpu_compiler
class GpuCompilerTest(parameterized.TestCase):
  @parameterized.parameters(
    # Forward: 5 kernels of ours in each layer, and the last norm. Backward: as
    # many. With two streams a layer has 9, and the last one 7.
    ("decoupled_rope", 128, 32, 190, 2.2e9),
    ("two_stream", 128, 52, 255, 3.3e9),
  )
  def test_the_step(self, mechanism, T, ours, launches, temporary):
    step = _compiled(mechanism, T)
    text = step.as_text()
    instructions = _instructions(text)
    kernels = text.count('custom_call_target="mosaic_gpu')
    self.assertEqual(kernels, ours)
    self.assertLess(len(instructions), launches)
    # The logits, [512, 128, 27]; no rows of width D in float32.
    self.assertLess(_largest_float32(instructions), 65536 * 64)
    memory = step.memory_analysis()
    if memory is not None:
      self.assertLess(memory.temp_size_in_bytes, temporary)


if __name__ == "__main__":
  absltest.main()
