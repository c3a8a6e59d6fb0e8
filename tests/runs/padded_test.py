"""Runs on documents: the commands of the page on data, resuming, all modes."""

import contextlib
import io
import json
import pathlib
import re
import shlex
import tempfile

import helpers
import numpy as np
from absl.testing import absltest

import aoarm_jax

_SMALL = {
  **{"train.steps": 4, "checkpoint.every": 2, "eval.every": 2},
  **{"sample.every": 0, "eval.batches": 0, "model.L": 1, "model.T": 12},
  **{"train.batch_size": 8, "model.D": 8, "compute.dtype": "float32"},
  "eval.estimators": "('any_order',)",
  "optimizer.schedule": "constant",
}


def _write(folder: pathlib.Path) -> None:
  """Writes 200 short proteins, a file each, and an empty file."""
  generator = np.random.default_rng(0)
  folder.mkdir()
  for i in range(200):
    residues = generator.choice(
      [*"ACDEFGHIKLMNPQRSTVWY"], generator.integers(2, 13)
    )
    (folder / f"{i:03d}.txt").write_text("".join(residues))
  (folder / "200.txt").write_text("")


def _documented() -> dict[str, list[str]]:
  """The commands of docs/data.md on proteins, by what they do."""
  page = (helpers.ROOT / "docs" / "data.md").read_text()
  lines = [line for line in page.splitlines() if "/proteins" in line]
  commands = [shlex.split(line)[3:] for line in lines if line[:6] == "python"]
  names = ("prepare", "train", "sample", "infill", "score")
  folder = f"--config={helpers.ROOT}/"
  return {
    name: [re.sub("^--config=", folder, word) for word in words]
    for name, words in zip(names, commands, strict=True)
  }


class DocumentsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(helpers.quick_compilation())
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(contextlib.chdir(root))
    _write(root / "proteins")

  def printed(self, command) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      helpers.run(command)
    return out.getvalue().splitlines()

  def test_padded_documents(self):
    page = _documented()
    report = "\n".join(
      self.printed([*page["prepare"], "--config.data.workers=1"])
    )
    self.assertIn("left out: 1; the first is 200.txt", report)
    small = [f"--config.{name}={value}" for name, value in _SMALL.items()]
    train = [*page["train"], *small]
    with self.assertLogs(level="INFO") as logs:
      helpers.run(train)
    logged = "\n".join(logs.output)
    self.assertRegex(logged, r"train: 1\d\d documents, one a .* and cut: \d")
    # The documented command trains the order that draws lengths.
    self.assertNotIn("texts will be too short", logged)
    match = re.search(r"in (\d+) of \1 documents", logged)
    assert match, logged
    valid = int(match[1])
    self.assertGreater(valid, 10)

    # Interrupted and resumed, the run is the same bit for bit.
    resumed = [*train, "--workdir=runs/resumed"]
    helpers.run([*resumed, "--config.train.steps=2"])
    helpers.run(resumed)
    config = helpers.config_of(train)
    states = [
      helpers.leaves_as_bytes(
        helpers.final_state(pathlib.Path("runs") / run, config)[1]
      )
      for run in ("resumed", "proteins")
    ]
    self.assertEqual(*states)

    helpers.run([*train, "--mode=eval"])
    (report,) = pathlib.Path("runs/proteins/evaluations").glob("*.json")
    estimate = json.loads(report.read_text())["estimates"][0]
    self.assertEqual(estimate["sequences"], valid)
    # Tokens are residues and ends. A document without room has no end.
    ends = estimate["tokens"] - estimate["bytes"]
    self.assertLessEqual(ends, valid)
    self.assertGreater(ends, valid // 2)
    self.assertAlmostEqual(
      estimate["bits_per_byte"] * estimate["bytes"],
      estimate["bits_per_token"] * estimate["tokens"],
    )

    self.assertLessEqual(max(map(len, self.printed(page["sample"]))), 12)
    for text in self.printed(page["infill"]):
      self.assertRegex(text, "^MK..LV$")
    (score,) = map(json.loads, self.printed(page["score"]))
    self.assertEqual(score["positions"], [1, 2, 3, 4, 5, 6, 7])
    self.assertEqual(score["bytes"], 6)

    model = aoarm_jax.load("runs/proteins", progress=False)
    (text,) = model.generate(prompt="AC", length=7, seed=1)
    self.assertLen(text.text, 7)
    for text in model.generate(8, order="left_to_right", seed=2):
      score = model.score(text, order=text.order)
      self.assertAlmostEqual(score.log_p, text.log_p, delta=1e-4)

    # A model of padded documents is no model of a stream.
    with self.assertRaisesRegex(
      aoarm_jax.ConfigError, "config.data.documents='stream'.*'pad'"
    ):
      helpers.run([*train, "--config.data.documents=stream"])


if __name__ == "__main__":
  absltest.main()
