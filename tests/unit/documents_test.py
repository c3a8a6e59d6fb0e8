"""Documents with ends: found in files, and cut into rows."""

import json
import pathlib
import pickle
import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, documents, pipeline, preparing, tokenizers

_BYTE = tokenizers.with_end(tokenizers.get("byte"))
_TEXTS = ("one", "a second", "x", "the last of them", "né")


def _joined(texts):
  """The tokens of texts with an end after each."""
  ids = [[*text.encode(), _BYTE.end] for text in texts]
  return np.array([i for text in ids for i in text], _BYTE.dtype)


class TokenizerTest(absltest.TestCase):
  def test_an_end_has_no_text(self):
    char27 = tokenizers.with_end(tokenizers.get("char27"))
    self.assertEqual((char27.V, char27.end, char27.unit), (28, 27, "token"))
    ids = np.array([3, 27, 1, 2, 27])
    self.assertEqual(char27.to_bytes(ids), b"cab")
    self.assertEqual(char27.decode(ids), "c␄ab␄")
    self.assertEqual(char27.bytes_of[ids].sum(), 3)
    self.assertEqual(char27.characters_of[ids].sum(), 3)
    with self.assertRaisesRegex(tokenizers.TokenizerError, "'{' at offset 1"):
      char27.encode("z{")
    # 256 bytes and an end do not fit into 8 bits.
    np.testing.assert_array_equal(_BYTE.encode("é"), [0xC3, 0xA9])
    self.assertEqual(_BYTE.encode(b"\xff").dtype, np.uint16)


class FoundTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.text = self.root / "text"
    self.text.mkdir()

  def write(self, kind):
    """Writes the texts of the training split, and two of validation."""
    if kind == "files":
      for split, texts in (("train", _TEXTS), ("valid", _TEXTS[:2])):
        (self.text / split).mkdir()
        for i, text in enumerate((*texts, "")):
          (self.text / split / f"{i}.txt").write_text(text)
    if kind == "objects":
      for split, texts in (("train", _TEXTS), ("valid", _TEXTS[:2])):
        lines = (json.dumps({"text": text}) for text in (*texts, ""))
        (self.text / f"{split}.jsonl").write_text("\n".join(lines))
    if kind == "lines":
      lines = "\ufeff" + "\r\n".join((*_TEXTS, " ")) + "\n"
      (self.text / "train.txt").write_bytes(lines.encode())
      (self.text / "valid.txt").write_text("\n".join((*_TEXTS[:2], "")) + "\n")

  @parameterized.parameters("files", "objects", "lines")
  def test_prepared_or_not_the_tokens_are_the_same(self, kind):
    self.write(kind)
    data = config_lib.Data(
      path=str(self.text),
      tokenizer="byte",
      documents="stream",
      lines=kind == "lines",
      workers=1,
    )
    corpus = corpora.of_config(data, _BYTE)
    np.testing.assert_array_equal(corpus.split("train"), _joined(_TEXTS))
    note = "7 documents in all, and 2 empty ones are left out, the first is "
    self.assertIn(note + "train", corpus.describe("train"))
    out = epath.Path(self.root / "out")
    preparing.prepare(data, out, lambda *_: None)
    prepared = corpora.of_config(
      config_lib.Data(path=str(out), tokenizer="byte", documents="pad"), _BYTE
    )
    for split in ("train", "valid"):
      np.testing.assert_array_equal(prepared.split(split), corpus.split(split))
      self.assertEqual(prepared.hash(split), corpus.hash(split))
    # Without ends it is the text as before.
    joined = corpora.load("auto", str(out), tokenizers.get("byte"))
    self.assertEqual(joined.split("train").tobytes(), "".join(_TEXTS).encode())

  @parameterized.parameters("files", "objects", "lines")
  def test_the_whole_text_has_all_splits(self, kind):
    self.write(kind)
    data = config_lib.Data(
      path=str(self.text), tokenizer="byte", lines=kind == "lines"
    )
    whole = documents.Found(data, _BYTE).whole()
    np.testing.assert_array_equal(whole, _joined(_TEXTS + _TEXTS[:2]))
    # Without ends the texts follow each other.
    joined = documents.Found(data, tokenizers.get("byte")).whole()
    text = "".join(_TEXTS + _TEXTS[:2]).encode()
    self.assertEqual(joined.tobytes(), text)

  def test_a_file_alone_is_one_document_of_the_whole_text(self):
    path = self.root / "novel.txt"
    path.write_text("a line\nand another\n")
    data = config_lib.Data(path=str(path), tokenizer="byte")
    whole = documents.Found(data, _BYTE).whole()
    np.testing.assert_array_equal(whole, _joined(["a line\nand another\n"]))

  def test_other_documents_are_another_text(self):
    hashes = []
    for texts in (("ab", "c"), ("a", "bc")):
      (self.text / "train.txt").write_text("\n".join(texts))
      (self.text / "valid.txt").write_text("x")
      data = config_lib.Data(
        path=str(self.text), tokenizer="byte", documents="pad", lines=True
      )
      hashes.append(corpora.of_config(data, _BYTE).hash("train"))
    self.assertNotEqual(*hashes)

  def test_bad_documents_are_one_line(self):
    (self.text / "train.txt").write_text("a\nb\nC\n")
    char27 = tokenizers.with_end(tokenizers.get("char27"))
    for message, fields in {
      "train.txt, line 3: char27: .*'C'": {"lines": True},
      "has one for training: --config.data.lines=true": {"tokenizer": "byte"},
      "more than 1,000,000: --mode=prepare": {
        "tokenizer": "byte",
        "largest_megabytes": 1,
      },
    }.items():
      if "more" in message:
        (self.text / "train.txt").write_text("a\n" * 600_000)
      data = config_lib.Data(path=str(self.text), documents="pad", **fields)
      tokenizer = _BYTE if data.tokenizer == "byte" else char27
      with self.assertRaisesRegex(tokenizers.DataError, message):
        corpora.of_config(data, tokenizer).split("train")
    (self.text / "train.txt").write_text("a\nb\n")
    data = config_lib.Data(path=str(self.text), documents="pad", lines=True)
    with self.assertRaisesRegex(
      tokenizers.DataError, "no document is in valid"
    ):
      corpora.of_config(data, char27).split("valid")

  @pytest.mark.thorough
  def test_paragraphs_of_the_built_in_text(self):
    data = config_lib.Data(documents="pad", lines=True)
    char27 = tokenizers.with_end(tokenizers.get("char27"))
    tokens = corpora.of_config(data, char27).split("test")
    self.assertGreater(len(documents.ends(tokens, char27.end)), 500)
    self.assertNotIn("  ", char27.decode(tokens[:5000]))


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_cut_or_padded(self, is_given):
    end = documents.End(_BYTE.end, is_given)
    tokens = _joined(("abc", "abcd", "abcde", "a"))
    rows = documents.Rows(tokens, end, 4, np.arange(2))
    got = rows(np.array([3, 0, 1]))
    np.testing.assert_array_equal(got[0], [97, 256, 256, 256])
    np.testing.assert_array_equal(got[1], [97, 98, 99, 256])
    np.testing.assert_array_equal(rows.of(np.array([2]))[0], [97, 98, 99, 100])
    want = [3, 4, 4, 1] if is_given else [4, 4, 4, 2]
    np.testing.assert_array_equal(rows.lengths, want)
    self.assertIn("T=4, and cut: 1" if is_given else "cut: 2", rows.cut())
    self.assertEqual(rows.split_tokens, 13 if is_given else 17)
    copy = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(copy(np.array([3, 0])), got)

  def test_every_document_is_evaluated_once(self):
    texts = [f"{i:03d}" + "z" * (i % 7) for i in range(20)]
    end = documents.End(_BYTE.end, False)
    options = dict(T=8, batch_size=6, end=end)
    batches = pipeline.eval_batches(_joined(texts), **options)
    seen = [row for rows, real in batches for row in rows[real]]
    cut = [(text.encode() + b"$")[:8] for text in texts]
    got = [bytes(36 if i == 256 else i for i in row) for row in seen]
    self.assertEqual(
      [row.rstrip(b"$") for row in got], [text.rstrip(b"$") for text in cut]
    )
    np.testing.assert_array_equal(batches.lengths, [len(text) for text in cut])
    self.assertEqual(batches.evaluated_tokens, sum(map(len, cut)))
    sizes = [len(text.rstrip(b"$")) for text in cut]
    np.testing.assert_array_equal(batches.sums(_BYTE.bytes_of), sizes)
    self.assertRegex(
      batches.describe("tokens"), "in 20 of 20 documents.*and cut: 5$"
    )
    part = pipeline.eval_batches(_joined(texts), batches=2, **options)
    self.assertEqual(part.sequences, 12)

  def test_processes_share_a_batch(self):
    texts = [f"{i:03d}" + "z" * (i % 7) for i in range(20)]
    options = dict(
      T=8, batch_size=6, seed=3, end=documents.End(_BYTE.end, False)
    )
    whole = pipeline.train_batches(_joined(texts), **options)
    halves = [
      pipeline.train_batches(_joined(texts), rows=rows, **options)
      for rows in (np.arange(2), np.arange(2, 6))
    ]
    batches = [next(whole) for _ in range(3)]
    for batch in batches:
      parts = np.concatenate([next(half) for half in halves])
      np.testing.assert_array_equal(batch, parts)
    halves[0].set_state({"next_batch": 1})
    np.testing.assert_array_equal(next(halves[0]), batches[1][:2])
    self.assertLess(whole.real_share, 1)
    self.assertRegex(whole.describe(), r"20 documents, .* padding; .*cut: 5$")
    for loader in (whole, *halves):
      loader.close()

  def test_a_text_without_ends_is_refused(self):
    with self.assertRaisesRegex(tokenizers.DataError, "no document that ends"):
      documents.Rows(
        np.zeros(9, np.uint16), documents.End(_BYTE.end, False), 4, np.arange(1)
      )


if __name__ == "__main__":
  absltest.main()
