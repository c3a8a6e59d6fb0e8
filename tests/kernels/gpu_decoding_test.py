"""Steps of generation, compiled for an H200 on a machine without a GPU.

Needs the extra `cuda`; run by -m gpu_compiler. The limits say what a layer has
today. They are counts, and no times: fewer launches need not be less time.
"""

import re

import gpu_compiler_test
import jax
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import topologies

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import hlo, meshes
from aoarm_jax.model import network as network_lib
from aoarm_jax.tools import decode_cells, decode_programs


def _compiled(mechanism, B, L):
  """Return the text of the compiled sequential decoding of the 8M model."""
  pytest.importorskip("jax_cuda13_plugin")
  topology = topologies.get_topology_desc(
    platform="cuda",
    target_config=gpu_compiler_test.H200,
    topology="1x1x1",
  )
  placement = jax.sharding.SingleDeviceSharding(topology.devices[0])
  model = config_lib.Model(mechanism=mechanism, T=1024, D=256, L=L, N=4)
  network = network_lib.Network(config_lib.Config(model=model))
  cell = decode_cells.Cell("8m", model, B, "sequential")
  params, key = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
    (network.abstract_params, jax.eval_shape(lambda: jax.random.key(0))),
  )
  (program,), _ = decode_programs.cached(
    cell, network, params, decode_programs.Options()
  )
  # The kernels ask the mesh on which device they will run.
  with jax.set_mesh(meshes.make_mesh(config_lib.Mesh(), topology.devices)):
    return jax.jit(program).lower(params, key).compile().as_text()


@pytest.mark.gpu_compiler
class GpuDecodingTest(parameterized.TestCase):
  @parameterized.parameters(
    ("two_stream", 1, 14),
    ("two_stream", 64, 16),
    ("decoupled_rope", 1, 14),
    ("decoupled_rope", 64, 14),
  )
  def test_launches_of_a_layer(self, mechanism, B, most):
    few, many = (_compiled(mechanism, B, L) for L in (3, 5))
    launches = hlo.launches(many) - hlo.launches(few)
    self.assertBetween(launches, 1, 2 * most)
    # No product with a weight was replaced by products of elements, which
    # would be rounded to bfloat16.
    rounded = re.findall(r" = bf16\[([\d,]+)\]\S* multiply\(", many)
    for dims in rounded:
      self.assertNotIn(dims, ("4,64,256", "256,4,64", "256,1024", "1024,256"))


if __name__ == "__main__":
  absltest.main()
