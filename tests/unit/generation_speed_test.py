"""The benchmark of decoding: every method runs, and what it prints adds up."""

import contextlib
import csv
import io
import os
import pathlib
import tempfile
from unittest import mock

import helpers
import jax
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from aoarm_jax.config import schema as config_lib
from aoarm_jax.tools import (
  decode_cells,
  decode_programs,
  decode_timing,
  table,
)
from aoarm_jax.tools import generation_speed as decode_benchmark


@pytest.mark.thorough
class BenchmarkTest(parameterized.TestCase):
  def test_every_method(self):
    self.enter_context(helpers.quick_compilation())
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    sizes = {"8m": dict(D=8, L=1, N=2)}
    out = io.StringIO()
    with (
      mock.patch.dict(table.SIZES, sizes),
      contextlib.redirect_stdout(out),
    ):
      decode_benchmark.main(
        [
          "--T",
          "8",
          "--batches",
          "2",
          "--steps",
          "4",
          "--sizes",
          "8m",
          "--out",
          str(folder / "x.csv"),
          "--methods",
          "sequential",
          "speculative-2",
          "adaptive",
          "uncached",
          "mdlm",
          "--bandwidth",
          "1e11",
        ]
      )
      decode_benchmark.main(["--plot", str(folder / "x.csv")])
    self.assertEqual(sorted(os.listdir(folder)), ["x.csv", "x.png"])
    with open(folder / "x.csv") as file:
      rows = list(csv.DictReader(file))
    self.assertEqual(
      [(row["method"], row["timed"]) for row in rows],
      [
        ("sequential", "4 tokens"),
        ("speculative-2", "whole"),
        ("adaptive", "whole"),
        ("uncached", "at 2 lengths"),
        ("mdlm T", "4 steps"),
        ("mdlm T/4", "4 steps"),
      ],
    )
    for row in rows:
      T, seconds = int(row["T"]), float(row["step_ms"]) / 1e3
      steps = T / float(row["tokens_per_step"])
      self.assertAlmostEqual(
        float(row["tokens_per_second"]) * seconds * steps / (2 * T), 1.0
      )
      self.assertGreater(float(row["floor_ms"]), 0.0)

  def test_a_model_beside_a_run_has_its_alphabet_and_dtype(self):
    config = config_lib.Config().replace("data.tokenizer", "byte")
    config = config.replace("compute.dtype", "float32")
    options = decode_programs.Options(4, False, None, None, "reference")
    benchmark = decode_timing.Benchmark(options, mock.Mock(config=config))
    cell = decode_cells.Cell("run", config.model, 2, decode_cells.MASKED)
    made = mock.patch.object(
      decode_timing, "_network", wraps=decode_timing._network
    )
    with made as network:
      benchmark._start(cell)
    (config,) = network.call_args.args
    self.assertEqual(config.data.tokenizer, "byte")
    self.assertEqual(config.compute.dtype, "float32")
    self.assertEqual(config.compute.attention, "reference")
    self.assertEqual(config.model.mechanism, decode_cells.MASKED)

  def test_no_floor_where_the_bandwidth_is_not_known(self):
    self.enter_context(helpers.quick_compilation())
    out, err = io.StringIO(), io.StringIO()
    sizes = {"tiny": dict(D=8, L=1, N=2)}
    command = ["--quick", "--T", "8", "--batches", "2", "--only", "sequential"]
    with (
      mock.patch.dict(table.SIZES, sizes),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
    ):
      decode_benchmark.main(command)
    told, _, quick, _, row = out.getvalue().splitlines()
    self.assertIn("memory bandwidth of 'cpu' is not known: no floors", told)
    self.assertStartsWith(quick, "--quick on a CPU is of a tiny model")
    self.assertStartsWith(err.getvalue(), "1 of 1 programs compiled")
    size, T, B, method, _, _, floor, floors, *_ = row.split()
    self.assertEqual((size, T, B, method), ("tiny", "8", "2", "sequential"))
    self.assertEqual((floor, floors), ("-", "-"))

  @parameterized.parameters(("cpu", "tiny T128 B8"), ("gpu", "8m T1024 B64"))
  def test_quick(self, platform, name):
    """Four methods of one size; what else is given is taken."""
    with mock.patch.object(jax, "default_backend", return_value=platform):
      options = decode_benchmark._parse(["--quick"])
      other = decode_benchmark._parse(["--quick", "--T", "16"])
    chosen = [str(cell) for cell in decode_benchmark.cells(options, None)]
    self.assertEqual(
      [cell for cell in chosen if options.only.search(cell)],
      [
        f"{name} {method}"
        for method in ("sequential", "parallel-16", "uncached", "mdlm")
      ],
    )
    self.assertEqual((other.T, other.sizes), ([16], options.sizes))

  def test_what_does_not_fit_is_left_out(self):
    """One line; the other cells are measured, other errors are not hidden."""
    fits = decode_cells.Result("8m", 8, 1, "mdlm", 1.0, 1.0, 1.0, 0, 1.0, "x")
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    other = jax.errors.JaxRuntimeError("INTERNAL: another")
    command = ["--sizes", "8m", "--T", "8", "--methods", "mdlm", "--batches"]
    out, folder = (
      io.StringIO(),
      self.enter_context(tempfile.TemporaryDirectory()),
    )

    def main(outcomes, *more):
      measure = mock.patch.object(
        decode_timing.Benchmark, "measure", side_effect=outcomes
      )
      compiled = mock.patch.object(decode_timing.Benchmark, "compile")
      with measure, compiled, contextlib.redirect_stdout(out):
        decode_benchmark.main([*command, *more])

    path = pathlib.Path(folder) / "x.csv"
    main([full, [fits], full], "64", "1", "0", "--out", str(path))
    self.assertEqual(
      out.getvalue().splitlines()[-3:],
      [
        "8m T8 B64 mdlm: out of device memory",
        str(fits),
        "8m T8 Bbest mdlm: out of device memory",
      ],
    )
    self.assertLen(path.read_text().splitlines(), 2)
    with self.assertRaisesRegex(SystemExit, "no cell could be measured"):
      main([full], "64")  # Not a wrong --only.
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "INTERNAL"):
      main([other], "64")

  def test_attention_that_is_not_supported(self):
    """One line; the other cells are measured; an error if there are none."""
    fits = decode_cells.Result("8m", 8, 1, "mdlm", 1.0, 1.0, 1.0, 0, 1.0, "x")
    no = pallas_kernels.UnsupportedError("attention 'cudnn': no such device")
    command = ["--sizes", "8m", "--T", "8", "--methods", "mdlm", "--batches"]

    def main(outcomes, *batches):
      out = io.StringIO()
      with (
        mock.patch.object(
          decode_timing.Benchmark, "measure", side_effect=outcomes
        ),
        mock.patch.object(decode_timing.Benchmark, "compile"),
        contextlib.redirect_stdout(out),
      ):
        try:
          decode_benchmark.main([*command, *batches])
          code = 0
        except SystemExit as stop:
          code = stop.code
      return code, out.getvalue().splitlines()[3:]

    line = f"8m T8 B1 mdlm: {no}"
    self.assertEqual(main([no, [fits]], "1", "2"), (0, [line, str(fits)]))
    none = "no cell could be measured; each says why"
    self.assertEqual(main([no], "1"), (none, [line]))

  @parameterized.parameters(
    (["--T", "0"], "--T: '0': must be a whole number of at least 1"),
    (["--T", "-4"], "--T: '-4': must be"),
    (["--batches", "-1"], "--batches: '-1': must be a whole number of at le"),
    (["--steps", "0"], "--steps: '0': must be"),
    (["--bandwidth=-1"], "--bandwidth: '-1': must be a number of at least 0"),
    (["--bandwidth=nan"], "--bandwidth: 'nan': must be a number"),
    (["--only", "("], "--only: '(' is not a regular expression: missing )"),
    (["--out=/"], "--out: '/': name a file, not a folder"),
    (["--out=/dev/null"], "--out: '/dev/null': is a device or a pipe; name a"),
    ([f"--out={__file__}/x"], f"{__file__} is no folder that can be written"),
    (["--attention", "foo"], "--attention: invalid choice: 'foo'"),
    (["--methods"], "--methods: expected at least one argument"),
    (["--methods", "speculative-0"], "is any whole number from 1"),
    (["--plot=/absent.csv"], "--plot=/absent.csv: No such file"),
    ([f"--plot={__file__}"], f"--plot={__file__}: no CSV file that --out"),
    (["--only", "typo"], "no cell has a name with 'typo'; the first one's is "),
    (["--workdir", "/absent"], "/absent/config.json: no such file"),
    (
      ["--mechanism", "causal", "--methods", "adaptive"],
      "--methods adaptive: a model of mechanism causal does not generate so",
    ),
  )
  def test_what_cannot_be(self, command, message):
    """One line, before anything is measured."""
    out, err = io.StringIO(), io.StringIO()
    with (
      self.assertRaises(SystemExit) as caught,
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
    ):
      decode_benchmark.main(command)
    code = caught.exception.code
    text = err.getvalue() if code == 2 else code
    self.assertIn(message, text)
    self.assertLen(text.splitlines(), 1)
    self.assertEqual(out.getvalue(), "")

  def test_a_masked_run_has_no_cache(self):
    config = config_lib.Config(model=config_lib.Model(mechanism="mdlm"))
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "config.json"
      path.write_text(config_lib.to_json(config))
      for method in ("sequential", "parallel-4", "adaptive", "uncached"):
        with self.assertRaisesRegex(
          SystemExit, f"--methods {method}: .* mdlm does not .* timed: mdlm$"
        ):
          decode_benchmark.main(
            ["--workdir", folder, "--methods", "mdlm", method]
          )
    options = decode_benchmark._parser().parse_args([])
    methods = {cell.method for cell in decode_benchmark.cells(options, config)}
    self.assertEqual(methods, {"mdlm"})


if __name__ == "__main__":
  absltest.main()
