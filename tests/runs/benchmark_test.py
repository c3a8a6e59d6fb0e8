"""--mode=benchmark: a run's report, which a second run gives again."""

import contextlib
import functools
import io
import json
import os
import pathlib
import shutil
import tempfile

import helpers
from absl.testing import absltest

import aoarm_jax
from aoarm_jax.benchmark import session as session_lib

_SMALL = {
  "train.steps": 2,
  "eval.batches": 1,
  "checkpoint.keep_best": 0,
  "benchmark.tokens": 40,
  "benchmark.stride": 6,
  "benchmark.orders": 2,
  "benchmark.windows": 3,
  "benchmark.samples": 2,
  "benchmark.texts": 3,
  "benchmark.temperatures": (0.5, 1.0),
}
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


@functools.cache
def _folder():
  folder = pathlib.Path(tempfile.mkdtemp())
  helpers.write_text(folder / "text")
  return folder


def _command(name, *more, **changes):
  return helpers.command_in(_folder(), _SMALL, name, *more, **changes)


def _benchmark(name, **changes):
  """Returns (what is printed, benchmark.json)."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    helpers.run(_command(name, "--mode=benchmark", **changes))
  report = _folder() / name / "benchmark" / "benchmark.json"
  return out.getvalue(), json.loads(report.read_text())


class BenchmarkTest(absltest.TestCase):
  @classmethod
  def tearDownClass(cls):
    super().tearDownClass()
    shutil.rmtree(_folder())

  def test_a_second_run_gives_the_same_numbers(self):
    helpers.run(_command("run"))
    text = _folder() / "benchmark.txt"
    text.write_text("abc bca cab " * 10)
    first = _benchmark("run", benchmark__text=text)
    folder = _folder() / "run" / "benchmark"
    files = helpers.contents(folder)
    self.assertIn("README.md", files)
    # Nothing is measured again as long as nothing has changed.
    units = sorted((folder / "units").iterdir())
    times = [os.stat(unit).st_mtime_ns for unit in units]
    self.assertEqual(_benchmark("run", benchmark__text=text), first)
    self.assertEqual(times, [os.stat(unit).st_mtime_ns for unit in units])
    # A new start from nothing has the same numbers and the same pictures.
    shutil.rmtree(folder)
    self.assertEqual(_benchmark("run", benchmark__text=text), first)
    self.assertEqual(helpers.contents(folder), files)

    _, report = first
    settings = report["units"]["likelihood/any_order"]["settings"]
    self.assertEqual((settings["T"], settings["stride"]), (16, 6))
    self.assertEqual(settings["text"]["tokens"], 40)
    self.assertEqual(settings["text"]["left_out_tokens"], 80)
    model = aoarm_jax.load(_folder() / "run", progress=False)
    self.assertEqual(
      report["run"]["parameters_sha256"],
      session_lib.parameters_sha256(model._params),
    )
    # The start of the text by another way: 16 tokens, then 6 behind 10.
    whole = "abc bca cab " * 4
    nats = -model.score(whole[:12]).log_p
    for start in (2, 8, 14, 20):
      context, block = whole[start : start + 10], whole[start + 10 : start + 16]
      nats -= model.score(f"{context}[{block}]").log_p
    nats -= model.score(f"{whole[24:36]}[{whole[36:40]}]").log_p
    found = report["units"]["likelihood/left_to_right"]["result"]
    self.assertAlmostEqual(found["nats_per_token"], nats / 40, delta=1e-5)

    # Another text is another measurement.
    text.write_text("abc bca cab " * 9 + "zzz zzz zzz")
    _, other = _benchmark("run", benchmark__text=text, benchmark__tokens=0)
    found = other["units"]["likelihood/left_to_right"]["result"]
    self.assertEqual(found["tokens"], 119)


if __name__ == "__main__":
  absltest.main()
