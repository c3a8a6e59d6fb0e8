"""Several benchmarks side by side."""

import csv
import json
import pathlib
import tempfile

from absl.testing import absltest

from aoarm_jax.benchmark import comparison


def row(part, subject, measure, unit, value, error=None):
  return {
    "part": part,
    "subject": subject,
    "measure": measure,
    "unit": unit,
    "value": value,
    "error": error,
    "n": 7,
    "note": "",
  }


def report(symbols, text, value):
  """benchmark.json of a run."""
  run = {
    "mechanism": "two_stream",
    "step": 1200,
    "parameters": 8_000_000,
    "tokenizer": "bpe",
    "tokenizer_symbols": symbols,
    "tokenizer_sha256": str(symbols),
  }
  settings = {"text": {"sha256": "part", "sha256_of_the_whole_text": text}}
  table = [
    row("likelihood", "any_order", "likelihood", "bits_per_token", 4 * value),
    row("likelihood", "any_order", "likelihood", "bits_per_byte", value, 0.01),
  ]
  for name in ("temperature 1", "temperature 0.7", "real text"):
    for measure in ("measured entropy", "quality"):
      if (name, measure) != ("real text", "measured entropy"):
        table.append(
          row("generation", name, measure, "bits_per_byte", value, 0.1)
        )
  return {
    "run": run,
    "units": {"likelihood/any_order": {"settings": settings, "result": {}}},
    "table": table,
  }


class ComparisonTest(absltest.TestCase):
  def temporary(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    return pathlib.Path(folder.name)

  def folder(self, name, *content, under=""):
    path = self.temporary() / name
    (path / under).mkdir(parents=True)
    (path / under / "benchmark.json").write_text(json.dumps(report(*content)))
    return path

  def compare(self, *folders):
    out = self.temporary() / "compared"
    arguments = [*map(str, folders), f"--out={out}"]
    self.assertEqual(comparison.main(arguments), 0)
    return out

  def test_models_are_columns(self):
    one = self.folder("one", 40, "text", 1.25, under="benchmark")
    two = self.folder("two", 40, "text", 1.5)
    out = self.compare(one, two)
    page = (out / "README.md").read_text()
    self.assertIn("| part | subject | measure | unit | one | two |", page)
    self.assertIn("| parameters | 8,000,000 | 8,000,000 |", page)
    self.assertIn(
      "| likelihood | any order | likelihood | bits/byte | 1.250 ± 0.010 "
      "| 1.500 ± 0.010 |",
      page,
    )
    self.assertIn("likelihood | bits/token | 5.000 | 6.000 |", page)
    text = (out / "comparison.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    self.assertLen(rows, 2 * 7)
    self.assertEqual({row["model"] for row in rows}, {"one", "two"})
    for name in ("likelihood", "frontier"):
      self.assertIn(f"![{name}]({name}.png)", page)
      self.assertTrue((out / f"{name}.png").read_bytes().startswith(b"\x89PNG"))

  def test_other_tokenizers_are_compared_per_byte(self):
    folders = (self.folder(str(n), n, "text", 1.0) for n in (40, 41))
    page = (self.compare(*folders) / "README.md").read_text()
    self.assertIn("bits/byte", page)
    self.assertNotIn("bits/token", page)

  def test_what_cannot_be_compared_is_refused(self):
    one = self.folder("one", 40, "text", 1.0)
    empty = self.temporary()
    broken = self.folder("broken", 40, "text", 1.0)
    (broken / "benchmark.json").write_text('{"run": 3}')
    for other, message in (
      (self.folder("two", 40, "another", 1.0), "two: has measured another"),
      (self.folder("one", 40, "text", 1.0), "two folders have the same name"),
      (empty, f"{empty}: has no benchmark.json; make it with"),
      (broken, "is not a report of --mode=benchmark"),
    ):
      with self.assertRaisesRegex(SystemExit, message):
        self.compare(one, other)


if __name__ == "__main__":
  absltest.main()
