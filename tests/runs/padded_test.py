"""Runs on documents: prepared, padded, resumed, and used in all modes."""

import contextlib
import io
import json
import pathlib
import re
import tempfile

import helpers
import numpy as np
from absl.testing import absltest

import aoarm_jax

_SMALL = {
  **{"train.steps": 4, "checkpoint.every": 2, "eval.every": 2},
  **{"sample.every": 0, "eval.batches": 0, "model.L": 1, "model.T": 12},
  **{"train.batch_size": 8, "sample.count": 3, "model.D": 8},
  "eval.estimators": "('any_order',)",
  "optimizer.schedule": "constant",
  "data.tokenizer": "chars",
  "data.documents": "pad",
}


def _write(folder: pathlib.Path) -> None:
  """Writes 200 short proteins, a file each, and an empty file."""
  generator = np.random.default_rng(0)
  folder.mkdir()
  for i in range(200):
    n = generator.integers(2, 13)
    residues = generator.choice([*"ACDEFGHIKLMNPQRSTVWY"], n)
    (folder / f"{i:03d}.txt").write_text("".join(residues))
  (folder / "200.txt").write_text("")


class DocumentsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(helpers.quick_compilation())
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    _write(self.root / "proteins")

  def command(self, *more, run="run", **changes):
    fields = _SMALL | {"data.path": self.root / "prepared"}
    fields |= {name.replace("__", "."): x for name, x in changes.items()}
    return helpers.arguments(self.root / run, fields, *more)

  def printed(self, *more, **changes) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      helpers.run(self.command(*more, **changes))
    return out.getvalue().splitlines()

  def prepare(self, **changes):
    return self.printed(
      "--mode=prepare",
      f"--out={self.root / 'prepared'}",
      data__path=self.root / "proteins",
      data__held_out_share=0.2,
      data__workers=1,
      **changes,
    )

  def test_padded_documents(self):
    report = "\n".join(self.prepare())
    self.assertIn("left out: 1; the first is 200.txt", report)
    with self.assertLogs(level="INFO") as logs:
      helpers.run(self.command())
    logged = "\n".join(logs.output)
    self.assertRegex(logged, r"train: 1\d\d documents, one a .* and cut: \d")
    match = re.search(r"in (\d+) of \1 documents", logged)
    assert match, logged
    valid = int(match[1])
    self.assertGreater(valid, 20)

    # Interrupted and resumed, the run is the same bit for bit.
    helpers.run(self.command(run="resumed", train__steps=2))
    helpers.run(self.command(run="resumed"))
    config = helpers.config_of(self.command())
    states = [
      helpers.leaves_as_bytes(helpers.final_state(self.root / run, config)[1])
      for run in ("resumed", "run")
    ]
    self.assertEqual(*states)

    helpers.run(self.command("--mode=eval"))
    (report,) = (self.root / "run" / "evaluations").glob("*.json")
    estimate = json.loads(report.read_text())["estimates"][0]
    self.assertEqual(estimate["sequences"], valid)
    # Tokens are residues and ends. A document without room has no end.
    ends = estimate["tokens"] - estimate["bytes"]
    self.assertLess(ends, valid)
    self.assertGreater(ends, valid // 2)
    self.assertAlmostEqual(
      estimate["bits_per_byte"] * estimate["bytes"],
      estimate["bits_per_token"] * estimate["tokens"],
    )

    texts = self.printed("--mode=sample")
    self.assertLen(texts, 3)
    self.assertLessEqual(max(map(len, texts)), 12)
    (score,) = map(json.loads, self.printed("--mode=score", "--text=ACDE"))
    self.assertEqual((score["positions"], score["bytes"]), ([1, 2, 3, 4, 5], 4))

    model = aoarm_jax.load(self.root / "run", progress=False)
    (filled,) = model.infill("AC__E", seed=1)
    self.assertLen(filled.text, 5)
    (text,) = model.generate(prompt="AC", length=7, seed=1)
    self.assertLen(text.text, 7)
    for text in model.generate(8, order="left_to_right", seed=2):
      score = model.score(text, order=text.order)
      self.assertAlmostEqual(score.log_p, text.log_p, delta=1e-4)
    self.assertEqual(model.score("ACDE").positions, [1, 2, 3, 4, 5])

    # A model of padded documents is no model of a stream.
    with self.assertRaisesRegex(
      aoarm_jax.ConfigError, "config.data.documents='stream'.*'pad'"
    ):
      helpers.run(self.command(data__documents="stream"))


if __name__ == "__main__":
  absltest.main()
