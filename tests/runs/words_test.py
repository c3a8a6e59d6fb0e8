"""Runs whose symbols come from a text or a file: all modes, and resuming."""

import contextlib
import io
import json
import pathlib
import tempfile

import helpers
import numpy as np
import pytest
from absl.testing import absltest
from etils import epath

import aoarm_jax
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, tokenizers
from aoarm_jax.runs import checkpoint

_WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran")
_SMALL = {
  **{"train.steps": 4, "checkpoint.every": 2, "eval.every": 0},
  **{"sample.every": 0, "eval.batches": 2, "model.L": 1},
  **{"train.batch_size": 2, "sample.count": 1, "model.T": 8, "model.D": 8},
  "eval.estimators": "('any_order',)",
}


def _write(folder: pathlib.Path) -> None:
  generator = np.random.default_rng(0)
  folder.mkdir()
  for name, length in (("train", 3000), ("valid", 600)):
    words = generator.choice(_WORDS, length)
    text = "".join(f" {word}" for word in words) + " – naïve"
    (folder / f"{name}.txt").write_text(text)


class WordsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(helpers.quick_compilation())
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    _write(self.root / "text")
    self.workdir = self.root / "run"

  def command(self, *more, **changes):
    fields = _SMALL | {"data.path": self.root / "text"}
    fields |= {name.replace("__", "."): x for name, x in changes.items()}
    return helpers.arguments(self.workdir, fields, *more)

  def printed(self, *more, **changes) -> list[dict]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      helpers.run(self.command(*more, **changes))
    return [json.loads(line) for line in out.getvalue().splitlines()]

  def test_bpe_of_a_file_that_is_gone(self):
    file = self.root / "tokenizer.json"
    data = config_lib.Data(tokenizer="bpe", vocabulary=280)
    text = (self.root / "text" / "train.txt").read_bytes()
    made = alphabets.learn(data, [[text]])
    file.write_bytes(made.state)
    bpe = {"data__tokenizer": "bpe", "data__tokenizer_file": file}
    helpers.run(self.command(**bpe))
    step = self.workdir / "checkpoints" / "4"
    self.assertEqual((self.workdir / "tokenizer.json").read_bytes(), made.state)
    self.assertEqual((step / "tokenizer.json").read_bytes(), made.state)

    other = self.root / "other.json"
    other.write_bytes(
      alphabets.learn(
        config_lib.Data(tokenizer="bpe", vocabulary=281), [[text]]
      ).state
    )
    wrong = {
      "not those of the run": {"data__tokenizer_file": other},
      "has 280 symbols: set": {"data__vocabulary": 999},
    }
    for message, fields in wrong.items():
      for mode in ("train", "eval", "sample"):
        with self.assertRaisesRegex(
          aoarm_jax.UserError, f"{message}|not the tokenizer of the run"
        ):
          helpers.run(self.command(f"--mode={mode}", **bpe | fields))
    file.unlink()
    helpers.run(self.command("--mode=eval", **bpe))
    (report,) = (self.workdir / "evaluations").glob("*.json")
    estimate = json.loads(report.read_text())["estimates"][0]
    per_byte = estimate["tokens"] / estimate["bytes"]
    self.assertEqual(estimate["unit"], "token")
    self.assertLess(per_byte, 0.6)
    self.assertAlmostEqual(
      estimate["bits_per_byte"], estimate["bits_per_token"] * per_byte
    )
    self.assertLess(estimate["bytes"] - estimate["characters"], 9)
    self.assertGreater(estimate["standard_error_bits_per_byte"], 0)

    (score,) = self.printed("--mode=score", "--text= the cat–", **bpe)
    size = len(" the cat–".encode())
    self.assertEqual((score["unit"], score["bytes"]), ("token", size))
    self.assertAlmostEqual(score["bits_per_byte"], score["bits"] / size)
    self.assertAlmostEqual(score["bits_per_char"], score["bits"] / (size - 2))

    model = aoarm_jax.load(self.workdir, progress=False)
    (text,) = model.infill(" the__ sat", blank="_")
    self.assertTrue(text.text.startswith(" the"))
    self.assertTrue(text.text.endswith(" sat"))
    self.assertEqual(text.text, made.decode(text.tokens))
    self.assertEqual(model.tokenizer, made)

  @pytest.mark.slow
  def test_chars_of_the_text(self):
    """The run goes on with the symbols of its checkpoint."""
    chars = {"data__tokenizer": "chars", "optimizer__schedule": "constant"}
    helpers.run(self.command(**chars))
    state = (self.workdir / "tokenizer.json").read_bytes()
    (self.workdir / "tokenizer.json").unlink()
    helpers.run(self.command(**chars, train__steps=6))
    self.assertEqual((self.workdir / "tokenizer.json").read_bytes(), state)
    model = aoarm_jax.load(self.workdir, progress=False)
    self.assertEqual((model.step, model.tokenizer.state), (6, state))
    with self.assertRaisesRegex(
      aoarm_jax.PromptError, "text 1: chars: character 'X' at offset 2"
    ):
      model.infill("a_X")
    records = [
      json.loads(line)
      for line in (self.workdir / "metrics.jsonl").read_text().splitlines()
    ]
    valid = [r for r in records if r["kind"] == "valid"][-1]
    self.assertEqual(valid["unit"], "char")
    self.assertGreaterEqual(valid["bits_per_char"], valid["bits_per_byte"])

    # Another text of the same symbols is refused as such, and not learned anew.
    path = self.root / "text" / "train.txt"
    path.write_text(path.read_text() + "Ω")
    with self.assertRaisesRegex(aoarm_jax.DataError, "'Ω' at offset"):
      helpers.run(self.command(**chars, train__steps=8))

    # A flipped byte of the alphabet breaks the checkpoint as any other byte.
    for step in (4, 6):
      path = self.workdir / "checkpoints" / str(step) / "tokenizer.json"
      path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with self.assertRaisesRegex(
      aoarm_jax.CheckpointError, "tokenizer.json: checksum differs"
    ):
      aoarm_jax.load(self.workdir, progress=False)

  @pytest.mark.thorough
  def test_a_prepared_text(self):
    prepared = self.root / "prepared"
    bpe = {"data__tokenizer": "bpe", "data__vocabulary": 280}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      helpers.run(
        self.command(
          "--mode=prepare", f"--out={prepared}", data__workers=1, **bpe
        )
      )
    lines = out.getvalue().splitlines()
    self.assertRegex(lines[0], "prepared: 2 documents, .* text, from 2 files")
    self.assertRegex(lines[3], r"train +1 +[\d,]+ +[\d,]+ +[23]\.\d\d\d +1")
    bpe["data__path"] = prepared
    helpers.run(self.command(**bpe))
    # The prepared text is the text, and its tokenizer is that of the text.
    bpe["data__path"] = self.root / "text"
    with self.assertLogs("absl", "INFO") as logs:
      helpers.run(self.command(**bpe))
    self.assertIn("finished: ", logs.output[-1])
    for name, fields in {
      "another bpe than the run": {"data__vocabulary": 281},
      "the shards in .* are of 'bpe'": {"data__tokenizer": "byte"},
    }.items():
      with self.assertRaisesRegex(
        aoarm_jax.DataError, f"{name}|has 280 symbols: set"
      ):
        fields = bpe | fields | {"data__path": prepared}
        if fields["data__tokenizer"] == "byte":
          fields["data__vocabulary"] = 0
        self.workdir = self.root / "other"
        helpers.run(self.command(**fields))

  def test_another_tokenizer_is_refused(self):
    checkpoints = checkpoint.Checkpoints(
      epath.Path(self.workdir) / "checkpoints", keep_last=1, keep_best=0
    )
    self.enterContext(contextlib.closing(checkpoints))
    state = alphabets.learn(config_lib.Data(tokenizer="chars"), [[b"ab"]]).state
    checkpoints.save(
      1,
      {"w": np.zeros(2, np.float32)},
      data_state={"tokenizer": "0" * 64},
      config_json="{}",
      tokenizer=state,
    )
    checkpoints.wait()
    saved = checkpoints.newest()
    with self.assertRaisesRegex(
      aoarm_jax.CheckpointError, "not the tokenizer that was saved"
    ):
      checkpoints.tokenizer(saved)
    self.assertEqual(tokenizers.get("byte").state, b"")


if __name__ == "__main__":
  absltest.main()
