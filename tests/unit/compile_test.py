"""The TPU compiler's verdict on whole training steps."""

import contextlib
import dataclasses
import importlib.util
import pathlib
import re
import sys
import tempfile
from unittest import mock

import helpers
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.tools import compile as pod

_contexts = contextlib.ExitStack()


def setUpModule():
  # Not to wait for others' compilations.
  folder = _contexts.enter_context(tempfile.TemporaryDirectory())
  _contexts.enter_context(mock.patch.object(tempfile, "tempdir", folder))


def tearDownModule():
  _contexts.close()


REPORT = pod.Report(
  topology="v5p:2x2x1",
  chips=4,
  mesh="fsdp 4",
  tokens=4000,
  parameter_bytes=1e9,
  memory_bytes=9.5e9,
  model_flops=3 * 459e12,
  flops=4 * 459e12,
  sent_bytes={"all-gather": 0.0, "all-reduce": 300e9},
)


# The lines of the planning table: config, T, slice, chips, batch, mesh, memory,
# FLOPs, sent, step, MFU.
TABLE = [
  [cell.strip(" `") for cell in line.strip("|").split("|")]
  for line in (helpers.ROOT / "docs/pods.md").read_text().splitlines()
  if line.startswith("| `")
]


def small(**mesh):
  return config_lib.Config(
    model=config_lib.Model(T=128, D=256, L=3, N=4),
    train=config_lib.Train(batch_size=64, steps=10),
    compute=config_lib.Compute(scan_layers=True, attention="xla"),
    mesh=config_lib.Mesh(**mesh),
  )


class ReportTest(parameterized.TestCase):
  def test_bounds(self):
    self.assertEqual(REPORT.step_seconds, 4)
    self.assertEqual(REPORT.seconds["collectives"], 0.5)
    self.assertEqual(REPORT.mfu_bound, 0.75)
    text = str(REPORT)
    self.assertIn("compiled, not run", text)
    self.assertIn("9.50 GB of 95 GB (10%)", text)
    self.assertIn("all-reduce 300 GB\n", text)
    self.assertIn("250 tokens/s a chip, MFU 75.0%", text)

  def test_slow_links_bound_the_step(self):
    slow = dataclasses.replace(REPORT, sent_bytes={"all-to-all": 600e9 * 6})
    self.assertEqual((slow.step_seconds, slow.mfu_bound), (6, 0.5))

  @parameterized.parameters("", "v5p", "h100:8", "v5e:4by4", "v5e:0x", "4x4")
  def test_topologies_that_cannot_be(self, topology):
    with self.assertRaisesRegex(config_lib.ConfigError, "--topology=.* give"):
      pod.estimate(small(), topology)

  @parameterized.parameters(
    ("os.kill(os.getpid(), 11)", "the TPU compiler crashed .SIGSEGV. on v5e"),
    ("raise KeyError('what')", "the process that compiles failed: KeyError"),
    ('print(\'{"error": "e: no"}\')', "^e: no$"),
  )
  def test_a_compiler_that_fails_is_one_line(self, code, message):
    with tempfile.TemporaryDirectory() as folder:
      program = pathlib.Path(folder) / "python"
      program.write_text(f"#!{sys.executable}\nimport os\n{code}\n")
      program.chmod(0o755)
      with (
        mock.patch.object(sys, "executable", str(program)),
        self.assertRaisesRegex(pod.PodError, message) as caught,
      ):
        pod.estimate(small(), "v5e:2x2")
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.parameters(
    (
      "Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(17.31G) exceeds available HBM (15.75G). HLO module: jit_step.",
      "does not fit: needs at least 17.31GiB of the 15.75GiB of a chip; take",
    ),
    (
      "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
      "does not fit: needs at least 20.50GiB of the 15.75GiB of a chip; take",
    ),
    ("No room\nleft", "does not fit: No room; take"),
  )
  def test_the_compilers_words_for_too_much(self, message, wanted):
    self.assertStartsWith(pod._does_not_fit(message), wanted)

  def test_without_the_compiler(self):
    if importlib.util.find_spec("libtpu") is not None:
      self.skipTest("libtpu is installed")
    with self.assertRaisesRegex(config_lib.ConfigError, "pip install -e"):
      pod.estimate(small(), "v5e:2x2")

  def test_the_command_line(self):
    for words, message in (
      (["--mode=compile"], "--mode=compile needs a TPU slice, as in --topo"),
      (["--topology=v5e:2x2"], "--topology needs --mode=compile"),
    ):
      with self.assertRaisesRegex(Exception, message):
        helpers.run(helpers.arguments(pathlib.Path("/nowhere"), {}, *words))


@pytest.mark.tpu_compiler
class CompilerTest(parameterized.TestCase):
  """Needs libtpu; minutes."""

  def setUp(self):
    super().setUp()
    if importlib.util.find_spec("libtpu") is None:
      self.skipTest("libtpu is not installed: pip install -e '.[tpu]'")

  def test_memory_falls_with_chips_and_what_is_sent(self):
    few = pod.estimate(small(fsdp=0), "v5e:2x2")
    many = pod.estimate(small(fsdp=0), "v5e:4x4")
    alone = pod.estimate(small(), "v5e:4x4")
    self.assertEqual((few.chips, many.chips), (4, 16))
    # All but the vectors is sharded.
    self.assertAlmostEqual(
      few.parameter_bytes / many.parameter_bytes, 4, delta=0.2
    )
    self.assertAlmostEqual(
      alone.parameter_bytes / many.parameter_bytes, 16, delta=1
    )
    self.assertLess(many.memory_bytes, few.memory_bytes)
    self.assertLess(many.memory_bytes, alone.memory_bytes)
    # Replicas send gradients once around: 2 (n - 1) / n of bfloat16.
    gradients = alone.parameter_bytes / 3 / 2
    self.assertBetween(
      sum(alone.sent_bytes.values()),
      2 * 15 / 16 * gradients,
      1.1 * 2 * 15 / 16 * gradients,
    )
    self.assertGreater(many.sent_bytes["all-gather"], 0)

  def test_adapters_need_no_moments_of_what_is_frozen(self):
    model = dataclasses.replace(
      small().model, kv_heads=2, head_size=32, mlp="swiglu", tied=True
    )
    full = small(fsdp=0).replace("model", model)
    few = full.replace("train.lora_rank", 2)
    full, few = (pod.estimate(config, "v5e:2x2") for config in (full, few))
    self.assertBetween(few.parameter_bytes / full.parameter_bytes, 0.33, 0.45)
    self.assertBetween(few.model_flops / full.model_flops, 0.67, 0.75)

  def test_what_does_not_fit_is_refused(self):
    train = config_lib.Train(batch_size=2**16, steps=10)
    large = dataclasses.replace(small(), train=train)
    with self.assertRaisesRegex(
      pod.PodError, "v5e:2x2: does not fit: needs at least"
    ):
      pod.estimate(large, "v5e:2x2")


class TableTest(parameterized.TestCase):
  """Needs libtpu; 40 minutes on 2 cores."""

  @parameterized.parameters(*TABLE)
  @pytest.mark.slow
  def test_a_line_of_docs_pods(
    self, name, T, topology, chips, batch, mesh, memory, flops, sent, step, mfu
  ):
    del sent  # Most likely to differ between compilers.
    if importlib.util.find_spec("libtpu") is None:
      self.skipTest("libtpu is not installed: pip install -e '.[tpu]'")
    changes = {
      "model.T": T,
      "train.batch_size": batch,
      "compute.scan_layers": True,
      "compute.remat": True,
      **{f"mesh.{axis}": n for axis, n in map(str.split, mesh.split(" x "))},
    }
    command = [f"--config.{path}={value}" for path, value in changes.items()]
    file, _, variant = name.partition(":")
    file = helpers.ROOT / "configs" / f"{file}.py"
    config = helpers.config_of([f"--config={file}:{variant}", *command])
    if memory.startswith("refused: "):
      with self.assertRaisesRegex(pod.PodError, memory[len("refused: ") :]):
        pod.estimate(config, topology)
      return
    report = pod.estimate(config, topology)
    self.assertEqual((report.chips, report.mesh), (int(chips), mesh))
    used, state = map(float, re.findall(r"[\d.]+", memory)[:2])
    self.assertAlmostEqual(report.memory_bytes / 1e9, used, delta=0.06)
    self.assertAlmostEqual(report.parameter_bytes / 1e9, state, delta=0.006)
    self.assertEqual(f"{report.model_flops * report.chips:.2e}", flops)
    self.assertEqual(f"{1e3 * report.step_seconds:.3g} ms", step)
    self.assertEqual(f"{report.mfu_bound:.0%}", mfu)


if __name__ == "__main__":
  absltest.main()
