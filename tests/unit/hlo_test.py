"""Compiled programs, as the three compilers write them."""

import re

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from aoarm_jax.devices import hlo

# A loop whose count stands in its condition; a gather beside two fusions; a
# reduce-scatter as an all-reduce of which each keeps a part; groups of a mesh.
TPU = """
HloModule jit_step
%all-reduce-scatter.1 (input: bf16[256,4,64]) -> bf16[64,4,64] {
  %all-reduce.1 = bf16[256,4,64]{2,0,1:T(8,128)(2,1)} all-reduce(%input), channel_id=13, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%async_collective_fusion.1 (p: bf16[1,64]) -> bf16[1,256] {
  %all-gather.1 = bf16[1,256]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['data'=4,'fsdp'=4] {'fsdp'}, dimensions={1}, frontend_attributes={chain_id="3"}
}
%async_collective_fusion.2 (p: bf16[1,64]) -> bf16[1,256] {
  %all-gather.2 = bf16[1,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, replica_groups=mesh['data'=4,'fsdp'=4] {'fsdp'}, dimensions={1}, frontend_attributes={chain_id="3"}
}
%body (p: (s32[], bf16[1,64])) -> (s32[], bf16[1,64]) {
  %f1 = bf16[1,256] fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  %f2 = bf16[1,256] fusion(%f1), kind=kOutput, calls=%async_collective_fusion.2
  %f3 = bf16[64,4,64] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
%condition (p: (s32[], bf16[1,64])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(11)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}
ENTRY %main (p: bf16[1,64]) -> bf16[1,64] {
  %while.1 = (s32[], bf16[1,64]) while(%t), condition=%condition, body=%body
  %all-reduce.2 = (f32[10]{0}, f32[2,5]{1,0}) all-reduce(%a, %b), channel_id=9, replica_groups=mesh['data'=4,'fsdp'=4] {'data','fsdp'}, to_apply=%add
}
"""  # noqa: E501
GPU = """
ENTRY %main (p: bf16[4,64]) -> bf16[32,64] {
  %ag = (bf16[4,64]{1,0}, bf16[32,64]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %done = bf16[32,64]{1,0} all-gather-done(%ag)
  %ar = f32[100]{0} all-reduce-start(%x), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add
  %rs = f32[10]{0} reduce-scatter(%y), channel_id=3, replica_groups={{0,1,2,3,4}}, dimensions={0}, to_apply=%add
  %none = f32[10]{0} all-reduce(%z), channel_id=4, replica_groups={{0},{1}}, to_apply=%add
  %cp = f32[10]{0} collective-permute(%y), channel_id=5, source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501
UNKNOWN = TPU.replace("constant(11)", "parameter(0)")
KNOWN = UNKNOWN.replace(
  "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
)

LOOP = """
HloModule x

%fused (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %n = f32[] negate(%p)
}

%called (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %a = f32[] fusion(%p), kind=kLoop, calls=%fused
  ROOT %b = f32[] custom-call(%a), custom_call_target="gemm"
}

%body (p: (f32[], s32[])) -> (f32[], s32[]) {
  %p = (f32[], s32[]) parameter(0)
  %x = f32[] get-tuple-element(%p), index=0
  %y = (f32[], /*index=1*/f32[]) fusion(%x), kind=kInput, calls=%fused
  %z = f32[] call(%x), to_apply=%called
  %c = f32[] copy(%z)
  ROOT %t = (f32[], s32[]) tuple(%c, %x)
}

%cond (p: (f32[], s32[])) -> pred[] {
  ROOT %p = pred[] constant(true)
}

ENTRY %main (p: (f32[], s32[])) -> (f32[], s32[]) {
  %p = (f32[], s32[]) parameter(0)
  ROOT %w = (f32[], s32[]) while(%p), condition=%cond, body=%body
}
"""


class HloTest(parameterized.TestCase):
  def traffic(self, text):
    return {
      kind: (one.count, one.sent_bytes)
      for kind, one in hlo.traffic(text).items()
      if one.count
    }

  @parameterized.parameters((TPU, 11), (KNOWN, 7))
  def test_tpu(self, text, times):
    self.assertEqual(
      self.traffic(text),
      {
        "all-gather": (times, times * 0.75 * 2 * 256),
        "reduce-scatter": (times, times * 0.75 * 2 * 256 * 4 * 64),
        "all-reduce": (1, 2 * 15 / 16 * 4 * 20),
      },
    )

  def test_gpu(self):
    self.assertEqual(
      self.traffic(GPU),
      {
        "all-gather": (1, 7 / 8 * 2 * 32 * 64),
        "all-reduce": (1, 2 * 1 / 2 * 400),
        "reduce-scatter": (1, 4 * 40),
        "collective-permute": (1, 40),
      },
    )

  @parameterized.parameters(
    ("mesh['a'=1,'b'=4,'c'=2] {'b'}", 4),
    ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b','c'}", 8),
    ("mesh['a'=16] {'a':(2)4}", 4),
    ("mesh['a'=2,'b'=3], device_ids=(0,2,4,1,3,5) {'b'}", 3),
    ("[2,3]<=[3,2]T(1,0)", 3),
    ("{{0,2},{1,3}}", 2),
  )
  def test_groups(self, groups, ways):
    text = GPU.replace("{{0,1,2,3,4}}", groups)
    sent = self.traffic(text)["reduce-scatter"]
    self.assertEqual(sent, (1, (ways - 1) * 40))

  @parameterized.parameters(
    "{}", "mesh['a'=8], frontend_attributes={'a'}", "mesh[a=2,b=4] {a}"
  )
  def test_groups_that_cannot_be_read(self, groups):
    with self.assertRaisesRegex(
      ValueError, "^which devices take part. " + re.escape(groups)
    ):
      hlo.traffic(GPU.replace("{{0,1,2,3,4}}", groups))

  def test_launches_of_a_loop(self):
    """A fusion, a copy, and two kernels in the computation that is called."""
    self.assertEqual(hlo.launches(LOOP), 4)
    self.assertEqual(hlo.launches("HloModule x"), 0)

  def test_memory_of_a_donated_argument_counts_once(self):
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    twice, once = (
      hlo.memory_bytes(jax.jit(jnp.sin, **options).lower(x).compile())
      for options in ({}, {"donate_argnums": 0})
    )
    self.assertEqual(twice - once, 256 * 256 * 4)

  def test_a_loop_without_end(self):
    with self.assertRaisesRegex(ValueError, "how often does this loop run"):
      hlo.traffic(UNKNOWN)


if __name__ == "__main__":
  absltest.main()
