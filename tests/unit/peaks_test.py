"""The table of what each device can do."""

from absl.testing import absltest, parameterized

from aoarm_jax.devices import peaks


class PeaksTest(parameterized.TestCase):
  @parameterized.parameters(
    ("NVIDIA H100 80GB HBM3", 989e12, 3.0e12),
    ("NVIDIA H100 PCIe", 756e12, None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ("NVIDIA H200", 989e12, 4.3e12),
    ("NVIDIA H200 NVL", 835e12, None),
    ("NVIDIA GH200 480GB", 989e12, None),
    ("NVIDIA A100-SXM4-40GB", 312e12, None),
    ("NVIDIA RTX A1000", None, None),
    ("NVIDIA B200", 2250e12, None),
    ("NVIDIA L40S", 362e12, None),
    ("NVIDIA L4", 121e12, None),
    ("TPU v4", 275e12, None),
    ("TPU v4 lite", None, None),
    ("TPU v5 lite", 197e12, 819e9),
    ("TPU v5", 459e12, 2765e9),
    ("TPU v5p", 459e12, 2765e9),
    ("TPU v6 lite", 918e12, 1640e9),
    ("TPU v99", None, None),
    ("cpu", None, None),
  )
  def test_of_kind(self, kind, flops, bandwidth):
    found = peaks.of_kind(kind)
    self.assertEqual(
      (found.flops, found.attainable_bandwidth), (flops, bandwidth)
    )

  def test_what_was_measured_comes_first(self):
    """A device without a measurement is bound by the vendor's figure."""
    self.assertEqual(peaks.of_kind("NVIDIA H200").attainable_flops, 790e12)
    self.assertEqual(peaks.of_kind("NVIDIA A100").attainable_flops, 312e12)
    self.assertIsNone(peaks.of_kind("cpu").attainable_flops)

  def test_chips_of_a_topology_have_every_number_that_a_plan_needs(self):
    for chip in peaks.CHIPS.values():
      self.assertNotIn(
        None,
        (chip.flops, chip.memory, chip.memory_bandwidth, chip.link_bandwidth),
      )


if __name__ == "__main__":
  absltest.main()
