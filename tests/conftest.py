"""Compiles fast, and once for all tests: most of their time is XLA's."""

import gc
import os
import pathlib
import tempfile

import pytest

# XLA's older emitters for the CPU compile in a third of the time. Processes
# that tests start inherit this. .ci/run runs the quick start with a user's
# options.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    # Processes share the cores, so to cut a program into pieces only costs.
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
)

# Tests with these marks need hours or a device. They run by these names alone.
_APART = (
  "slow",
  "tpu_compiler",
  "gpu",
  "gpu_compiler",
  "slurm",
  "browser",
  "interop",
)


def selection(expression: str) -> str:
  """The tests that `-m expression` selects, as a whole expression.

  An expression of the user takes the place of the one in pyproject.toml. So
  what is marked both thorough and slow is left out of the thorough tests here.
  No test has the mark default: "default or thorough" selects both tiers.
  """
  tiers = {"thorough": ["thorough"], "default or thorough": []}
  if expression not in tiers:
    return expression
  return " and ".join(tiers[expression] + [f"not {mark}" for mark in _APART])


def pytest_configure(config):
  config.option.markexpr = selection(config.option.markexpr)
  # Both tiers run small programs a few times, so optimisations do not repay.
  # Kernels for accelerators are compiled as a user's are.
  if "not gpu" in config.option.markexpr:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  if hasattr(config, "workerinput"):
    return  # A worker has its parent's folder.
  folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
  config.add_cleanup(folder.cleanup)
  os.environ["AOARM_TEST_COMPILED"] = folder.name


@pytest.hookimpl(wrapper=True)
def pytest_collection():
  # To import and to trace makes many objects, and little garbage. The collector
  # would look through all of them again and again, for a tenth of the time.
  gc.disable()
  try:
    return (yield)
  finally:
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
  """Forget compiled programs where a worker has grown large."""
  yield
  resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  if resident * os.sysconf("SC_PAGE_SIZE") > 2 << 30:
    import jax  # Not before the options above are set.

    jax.clear_caches()
    gc.collect()
