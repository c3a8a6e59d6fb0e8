"""The device that a call will run on is told before the call."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import devices, tuning
from pallas_kernels.hopper import attention as hopper


def _mesh(kind, platform):
  """A mesh of one device that is not here."""
  device = jax.sharding.AbstractDevice(kind, None, platform)
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  )


class DevicesTest(parameterized.TestCase):
  def test_the_default_device(self):
    self.assertEqual(devices.of(np.ones(2)).platform, jax.default_backend())
    card = mock.Mock(platform="gpu", device_kind="NVIDIA B200")
    config = mock.Mock(values={"jax_default_device": card})
    with mock.patch.object(jax, "config", config):
      self.assertEqual(devices.of(np.ones(2)).kind, "NVIDIA B200")

  def test_arrays_say_where_they_are(self):
    """The mesh and the default device do not matter to them."""
    x = jnp.ones(2, device=jax.devices("cpu")[0])
    with _mesh("TPU v5 lite", "tpu"):
      self.assertEqual(devices.of().platform, "tpu")
      self.assertEqual(devices.of(x).platform, "cpu")

  @parameterized.parameters(
    ("NVIDIA H200", "9.0"),
    ("NVIDIA H100 PCIe", "9.0"),
    ("NVIDIA GH200 480GB", "9.0"),
    ("NVIDIA H20", "9.0"),
    ("NVIDIA B200", ""),
    ("NVIDIA A100-SXM4-80GB", ""),
  )
  def test_a_mesh_of_devices_that_are_not_here(self, kind, capability):
    q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    with _mesh(kind, "gpu"):
      self.assertEqual(devices.of(q), devices.Device("gpu", kind, capability))
      self.assertEqual(
        not hopper.unsupported(q, q, None, None), capability != ""
      )

  def test_the_choice_under_jit_follows_the_mesh(self):
    found = []
    q = jax.ShapeDtypeStruct((2,), jnp.float32)

    def platform(q):
      found.append(devices.of(q).platform)
      return q

    with _mesh("NVIDIA H200", "gpu"):
      jax.eval_shape(platform, q)
    jax.eval_shape(platform, q)
    self.assertEqual(found, ["gpu", jax.default_backend()])

  def test_a_block_for_every_multiprocessor(self):
    """An H100 PCIe has 114, and an H20 has 78."""
    card = mock.Mock(compute_capability="9.0", core_count=78, platform="gpu")
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    found = mock.Mock(side_effect=tuning.hopper)
    with (
      mock.patch.object(jax, "local_devices", return_value=[card]),
      mock.patch.object(tuning, "hopper", found),
      mock.patch.object(hopper, "_attention", side_effect=StopIteration),
      self.assertRaises(StopIteration),
    ):
      jax.eval_shape(
        lambda q: pallas_kernels.any_order_attention(
          q, q, q, implementation="mosaic_gpu"
        ),
        q,
      )
    self.assertEqual(found.call_args.args[-1], 78)


if __name__ == "__main__":
  absltest.main()
