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
import pytest
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.benchmark import harness
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.config import schema as config_lib

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


def _command(name, *more, experiment=helpers.TINY, **changes):
  named = {path.replace("__", "."): value for path, value in changes.items()}
  changes = {**_SMALL, "data.path": _folder() / "text", **named}
  return helpers.arguments(
    _folder() / name, changes, *more, experiment=experiment
  )


def _benchmark(name, **changes):
  """Returns (what is printed, benchmark.json)."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    helpers.run(_command(name, "--mode=benchmark", **changes))
  report = _folder() / name / "benchmark" / "benchmark.json"
  return out.getvalue(), json.loads(report.read_text())


class BenchmarkTest(parameterized.TestCase):
  @classmethod
  def tearDownClass(cls):
    super().tearDownClass()
    shutil.rmtree(_folder())

  def options(self):
    text, words = _folder() / "benchmark.txt", _folder() / "words.jsonl"
    text.write_text("abc bca cab " * 10)
    words.write_text('{"text": "abc bca cab"}\n{"text": "cab bc"}\n')
    return {"benchmark__text": text, "benchmark__last_words": words}

  def reported(self, name, **options):
    """Checks that every part is in every file; returns what is reported."""
    printed, report = _benchmark(name, **options)
    files = helpers.contents(_folder() / name / "benchmark")
    parts = {name.partition("/")[0] for name in report["units"]}
    for part in parts:
      self.assertIn(f"{part}.png", files)
      row = f"\n| {part.replace('_', ' ')} | "
      self.assertIn(row, files["README.md"].decode())
      self.assertIn(f"\n{part},", files["benchmark.csv"].decode())
    return printed, report

  def same_twice(self, name, **options):
    """Checks that a second run gives the same; returns benchmark.json."""
    first = self.reported(name, **options)
    folder = _folder() / name / "benchmark"
    files = helpers.contents(folder)
    # Nothing is measured again as long as nothing has changed.
    units = sorted((folder / "units").iterdir())
    times = [os.stat(unit).st_mtime_ns for unit in units]
    self.assertEqual(_benchmark(name, **options), first)
    self.assertEqual(times, [os.stat(unit).st_mtime_ns for unit in units])
    # The unit that is lost is measured again, and nothing else.
    units[0].unlink()
    self.assertEqual(_benchmark(name, **options), first)
    del units[0], times[0]
    self.assertEqual(times, [os.stat(unit).st_mtime_ns for unit in units])
    # A new start from nothing has the same numbers and the same pictures.
    shutil.rmtree(folder)
    self.assertEqual(_benchmark(name, **options), first)
    self.assertEqual(helpers.contents(folder), files)
    return first[1]

  @pytest.mark.thorough
  def test_all_parts(self):
    self.check_parts("two_stream", lambda *x, **y: self.reported(*x, **y)[1])

  @parameterized.parameters("two_stream", "mdlm")
  @pytest.mark.slow
  def test_all_parts_are_the_same_twice(self, mechanism):
    self.check_parts(mechanism, self.same_twice)

  def check_parts(self, mechanism, measure):
    """Checks the report that `measure` returns."""
    experiment = str(helpers.ROOT / "configs" / f"{mechanism}.py:tiny")
    helpers.run(_command(mechanism, experiment=experiment))
    options = {"benchmark__scorer": _folder() / mechanism}
    options |= {"experiment": experiment, **self.options()}
    report = measure(mechanism, **options)
    self.assertEqual(report["left_out"], {})
    parts = [name.partition("/")[0] for name in report["units"]]
    self.assertEqual(tuple(dict.fromkeys(parts)), config_lib.BENCHMARK_PARTS)
    notes = " ".join(row["note"] for row in report["table"])
    self.assertEqual("bound" in notes, mechanism == "mdlm")

  def test_a_harness_of_a_run(self):
    """It gives the scores of the model that users load."""
    helpers.run(_command("run"))
    text, model = "abc bca", aoarm_jax.load(_folder() / "run")
    made = harness.of_run(_folder() / "run", order="uniform", orders=2, seed=3)
    want = model.score([text, "abc[ bca]"], order="uniform", orders=2, seed=3)
    (whole,) = made.loglikelihood_rolling([text])
    ((part, _),) = made.loglikelihood([("abc", " bca")])
    self.assertAlmostEqual(whole, want[0].log_p, places=4)
    self.assertAlmostEqual(part, want[1].log_p, places=4)
    for options, message in (
      ({"order": "given"}, "order='given': texts of many lengths have no"),
      ({"order": "x"}, "config.score.order='x': 'x' is not one of"),
      ({"stride": 1.5}, "stride=1.5: must be a whole number"),
      ({"batch_size": 0}, "config.benchmark.batch_size=0: must be at least 1"),
    ):
      with self.assertRaisesRegex(config_lib.ConfigError, f"^{message}"):
        harness.of_run(_folder() / "run", **options)

  def test_a_second_run_gives_the_same_numbers(self):
    helpers.run(_command("run"))
    options = self.options()
    text = options["benchmark__text"]
    report = self.same_twice(
      "run",
      **options,
      benchmark__parts="('likelihood','last_word')",
      benchmark__estimators="('any_order','left_to_right')",
    )
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
    _, other = _benchmark(
      "run",
      benchmark__text=text,
      benchmark__tokens=0,
      benchmark__parts="('likelihood','last_word')",
      benchmark__estimators="('left_to_right',)",
    )
    self.assertEqual(list(other["left_out"]), ["last_word"])
    self.assertEqual(list(other["units"]), ["likelihood/left_to_right"])
    found = other["units"]["likelihood/left_to_right"]["result"]
    self.assertEqual(found["tokens"], 119)

    # A mistake of the user is told in one line, before anything is measured.
    for field, message in (
      ("text", "benchmark.text=/absent: no such file"),
      ("last_words", "benchmark.last_words=/absent: no such file"),
      ("scorer", "/absent/config.json: no such file"),
    ):
      with self.assertRaisesRegex(aoarm_jax.UserError, message):
        _benchmark("run", **{f"benchmark__{field}": "/absent"})
    for field, value, message in (
      ("stride", 17, "at most config.model.T=16"),
      ("estimators", "('elbo',)", "two_stream has the likelihoods: any_order"),
      ("temperatures", "(0.0,)", "all above 0"),
    ):
      with self.assertRaisesRegex(aoarm_jax.ConfigError, message):
        _benchmark("run", **{f"benchmark__{field}": value})


if __name__ == "__main__":
  absltest.main()
