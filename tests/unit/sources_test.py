"""Documents of files of every kind, and every refusal."""

import bz2
import gzip
import json
import lzma
import pathlib
import tempfile

import numpy as np
import pyarrow
import zstandard
from absl.testing import absltest, parameterized
from etils import epath
from pyarrow import parquet

from aoarm_jax.data import sources, tokenizers

_DOCUMENTS = ["a text", "né à 日本 🎉\r\n\tit's", "", "a text", "x" * 300]
_LINES = "".join(
  json.dumps({"title": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n\n"
  for i, text in enumerate(_DOCUMENTS)
).encode()
_PACK = {
  "plain": bytes,
  "gz": gzip.compress,
  "xz": lzma.compress,
  "bz2": bz2.compress,
  "zst": zstandard.ZstdCompressor().compress,
}


class SourcesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def read(self, name="x", field="text"):
    source = sources.Source(self.folder / name, name, "")
    return [
      (document.name, b"".join(document.chunks), document.is_file)
      for document in sources.documents(source, field)
    ]

  def write(self, data: bytes, name="x"):
    path = pathlib.Path(self.folder / name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)

  @parameterized.product(pack=tuple(_PACK), name=("x", "x.txt", "x.gz.jsonl"))
  def test_json_lines_are_known_by_their_content(self, pack, name):
    if pack == "plain" and ".gz" in name:
      self.skipTest("a damaged gzip file")
    self.write(_PACK[pack](b"\xef\xbb\xbf" + _LINES), name)
    got = self.read(name)
    self.assertEqual([text.decode() for _, text, _ in got], _DOCUMENTS)
    self.assertEqual(got[1][0], f"{name}, line 3")
    self.assertFalse(any(is_file for *_, is_file in got))

  @parameterized.parameters(*_PACK)
  def test_a_text_is_one_document(self, pack):
    for text in (b"{curly} braces\nand lines\n", b"x\r\ny", b"{}{", b""):
      self.write(_PACK[pack](text))
      self.assertEqual(self.read(), [("x", text, True)])

  def test_parquet(self):
    table = pyarrow.table({"n": range(5), "body": [*_DOCUMENTS[:4], None]})
    parquet.write_table(table, str(self.folder / "x"), row_group_size=2)
    got = self.read(field="body")
    texts = [text.decode() for _, text, _ in got]
    self.assertEqual(texts, [*_DOCUMENTS[:4], ""])
    self.assertEqual(got[4][0], "x, row 5")
    with self.assertRaisesRegex(
      tokenizers.DataError,
      "x: has no field 'text'; it has: n, body: .*text_fie",
    ):
      self.read()
    data = pathlib.Path(self.folder / "x").read_bytes()
    self.write(data[: len(data) // 2])
    with self.assertRaisesRegex(tokenizers.DataError, "x: a Parquet file that"):
      self.read(field="body")

  @parameterized.parameters(
    ("é text".encode("utf-16"), "x", "x: is not text: it is UTF-16 text"),
    (np.arange(999, dtype="<u2").tobytes(), "x", "x: is not text: byte 0x00"),
    (_LINES + b"{bad\n", "x", "x, line 11: is no JSON object"),
    (_LINES + b'"text"\n', "x", "x, line 11: is no JSON object"),
    (
      _LINES + b'{"body": "a"}',
      "x",
      "line 11: has no field 'text'; it has: bod",
    ),
    (
      _LINES + b'{"text": 3}',
      "x",
      "x, line 11: text is 3, and a text is wanted",
    ),
    (
      _LINES + b'{"text": "a\\udc00"}',
      "x",
      "line 11: character 1 of text is hal",
    ),
    (b"plain text", "x.jsonl", "x.jsonl: is no JSON lines"),
    (b'[{"text": "a"}]', "x.json", "x.json: is no JSON lines"),
    (gzip.compress(_LINES)[:-9], "x", "x: cannot be read .*damaged"),
  )
  def test_bad_input_is_one_line(self, data, name, message):
    self.write(data, name)
    with self.assertRaisesRegex(tokenizers.DataError, message) as refusal:
      self.read(name)
    self.assertNotIn("\n", str(refusal.exception))

  def test_files_are_found_with_their_splits(self):
    names = ("train-00001-of-2.jsonl", "TRAIN.txt", "val/a.txt", "test_2.gz")
    for name in (*names, ".hidden", "train.jsonl.gz", "validation.parquet"):
      self.write(b"", name)
    found = {s.name: s.split for s in sources.find(self.folder)}
    self.assertEqual(
      found,
      {
        "TRAIN.txt": "train",
        "test_2.gz": "test",
        "train-00001-of-2.jsonl": "train",
        "train.jsonl.gz": "train",
        "val/a.txt": "valid",
        "validation.parquet": "valid",
      },
    )
    self.assertEqual([*found], sorted(found))
    self.write(b"", "README.md")
    with self.assertNoLogs("absl", "WARNING"):
      self.assertLen(sources.find(self.folder), 6)
    self.write(b"", "more.txt")
    with self.assertLogs("absl", "WARNING") as logs:
      self.assertLen(sources.find(self.folder), 6)
    self.assertEndsWith(logs.output[0], "these are not: more.txt")

  def test_files_without_splits(self):
    for name in ("b", "a/train.txt", "a.trainer"):
      self.write(b"", name)
    found = sources.find(self.folder)
    self.assertEqual([s.name for s in found], ["a.trainer", "a/train.txt", "b"])
    self.assertEqual({s.split for s in found}, {""})
    for path, message in ((self.folder / "c", "no such file"),):
      with self.assertRaisesRegex(tokenizers.DataError, message):
        sources.find(path)
    with (
      tempfile.TemporaryDirectory() as empty,
      self.assertRaisesRegex(tokenizers.DataError, "the folder has no files"),
    ):
      sources.find(epath.Path(empty))


if __name__ == "__main__":
  absltest.main()
