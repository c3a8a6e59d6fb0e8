"""Preparing: the same shards by every way, and nothing lost."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from array_record.python import array_record_module
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import (
  alphabets,
  configured,
  corpora,
  preparing,
  scanning,
  shards,
  tokenizers,
  workers,
)
from aoarm_jax.tools import prepare as tool

_WORDS = ("the", "cat", "sat", "on", "a", "mat", "it's", "naïve", "日本", "12")


def _documents(count: int, seed: int = 0) -> list[str]:
  generator = np.random.default_rng(seed)
  return [
    " ".join(generator.choice(_WORDS, generator.integers(1, 60)))
    + "." * bool(generator.integers(2))
    for _ in range(count)
  ]


class PreparingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.text = self.root / "text"
    self.text.mkdir()
    # Many shards of many records.
    for module, name, value in (
      (preparing, "SHARD_BYTES", 3000),
      (tokenizers, "PIECE", 100),
      (workers, "_BATCH_BYTES", 500),
    ):
      self.enterContext(mock.patch.object(module, name, value))

  def write_lines(self, name="docs.jsonl", count=120, seed=0):
    lines = (json.dumps({"text": x}) for x in _documents(count, seed))
    (self.text / name).write_text("\n".join(lines))

  def prepare(self, out="out", progress=lambda *_: None, **fields):
    fields = {"path": str(self.text), "workers": 1, "vocabulary": 270} | fields
    fields = {"tokenizer": "bpe"} | fields
    if fields["tokenizer"] in ("char27", "byte"):
      fields["vocabulary"] = 0
    data = config_lib.Data(**fields)
    index = preparing.prepare(data, epath.Path(self.root / out), progress)
    return index, data

  def corpus(self, data, out="out"):
    index = shards.read_index(epath.Path(self.root / out))
    return corpora.load(
      "auto", str(self.root / out), index.tokenizer, data.normalise
    )

  def content(self, out="out") -> dict[str, str]:
    return {
      path.name: hashlib.sha256(path.read_bytes()).hexdigest()
      for path in (self.root / out).iterdir()
      if not path.name.startswith(".lock")
    }

  @contextlib.contextmanager
  def refused(self, message: str) -> Iterator[None]:
    with self.assertRaisesRegex(tokenizers.DataError, message) as refusal:
      yield
    self.assertNotIn("\n", str(refusal.exception))

  @parameterized.product(
    tokenizer=("byte", "chars", "bpe", "char27"), normalise=(False, True)
  )
  def test_text_files_give_what_they_give_unprepared(
    self, tokenizer, normalise
  ):
    if tokenizer == "char27" and not normalise:
      self.skipTest("the text has other characters")
    texts = _documents(90)
    for name, some in (("train", texts[:80]), ("valid", texts[80:])):
      (self.text / f"{name}.txt").write_bytes(
        b"\xef\xbb\xbf" + "\r\n\n".join(some).encode() + b"\n"
      )
    fields = {"tokenizer": tokenizer, "normalise": normalise}
    if tokenizer == "bpe":
      fields["vocabulary"] = 270
    index, data = self.prepare(**fields)
    made = shards.read_index(epath.Path(self.root / "out")).tokenizer
    plain = corpora.load("auto", str(self.text), made, normalise)
    got = self.corpus(data)
    for split in ("train", "valid"):
      np.testing.assert_array_equal(got.split(split), plain.split(split))
      self.assertEqual(got.hash(split), plain.hash(split))
      self.assertEqual(got.split(split).dtype, made.dtype)
      entry = index["splits"][split]
      text = made.to_bytes(got.split(split))
      self.assertEqual(entry["bytes"], len(text))
      self.assertEqual(entry["characters"], len(text.decode()))
      self.assertEqual(entry["documents"], 1)
      self.assertEqual(entry["tokens"], len(got.split(split)))
    self.assertGreater(len(index["splits"]["train"]["shards"]), 1)
    self.assertIn("documents: 1 in train, 1 in valid", got.describe())
    with self.refused("the test split is asked for, and .*has train, valid"):
      got.split("test")

  @parameterized.parameters("byte", "bpe")
  def test_a_lone_text_is_split_as_unprepared(self, tokenizer):
    path = self.text / "book"
    path.write_text("naïve 日本, it's. " * 400)
    fields = {"path": str(path), "tokenizer": tokenizer, "vocabulary": 270}
    _, data = self.prepare(**fields)
    got = self.corpus(data)
    plain = corpora.load("auto", str(path), got.tokenizer)
    for split in corpora.SPLITS:
      np.testing.assert_array_equal(got.split(split), plain.split(split))
      self.assertEqual(got.hash(split), plain.hash(split))

  def test_any_number_of_processes_gives_the_same_bytes(self):
    self.write_lines()
    self.prepare("one", held_out_share=0.1)
    index, _ = self.prepare("two", held_out_share=0.1, workers=2)
    self.assertEqual(self.content("one"), self.content("two"))
    self.assertEqual([*index["splits"]], ["train", "valid", "test"])
    self.assertGreater(len(index["splits"]["train"]["shards"]), 3)

    # Documents come back, in order, with their ends.
    read = shards.read_index(epath.Path(self.root / "two"))
    texts, waiting = [], []
    for split in scanning.SPLITS:
      for tokens, is_last in shards.records(read, split):
        waiting.append(read.tokenizer.to_bytes(tokens))
        if is_last:
          texts.append((split, b"".join(waiting).decode()))
          waiting = []
    self.assertEqual(waiting, [])
    of = {text: split for split, text in texts}
    self.assertCountEqual([text for _, text in texts], _documents(120))
    order = [text for text in _documents(120) if of[text] == "train"]
    self.assertEqual([t for s, t in texts if s == "train"], order)
    self.assertEqual(index["splits"]["train"]["documents"], len(order))

  def test_an_interrupted_preparing_goes_on(self):
    self.write_lines()
    self.prepare("whole")
    stops = {"finding the symbols": [1], "encoding": [4000, 9000, 13_000]}
    for what, places in stops.items():
      for place in places:

        def progress(now, done, total, what=what, place=place):
          if now == what and done >= place:
            raise KeyboardInterrupt

        before = self.content() if (self.root / "out").exists() else {}
        with self.assertRaises(KeyboardInterrupt):
          self.prepare(progress=progress)
        after = self.content()
        # Whole shards only, and those of before are not written again.
        whole = self.content("whole")
        for name, sha256 in after.items():
          self.assertFalse(name.endswith(".tmp"), name)
          if name.endswith(".array_record"):
            self.assertEqual(sha256, whole[name])
        self.assertGreaterEqual(len(after), len(before))
        with self.refused("not finished: start the same --mode=prepare"):
          shards.read_index(epath.Path(self.root / "out"))
    times = {p: p.stat().st_mtime_ns for p in self.shards()}
    self.assertGreater(len(times), 2)
    (self.root / "out" / ".train-00009.array_record.123.tmp").write_text("x")
    self.prepare()
    self.assertEqual(self.content(), self.content("whole"))
    self.assertEqual({p: p.stat().st_mtime_ns for p in times}, times)

  def shards(self, out="out"):
    return sorted((self.root / out).glob("*.array_record"))

  def test_a_damaged_shard_is_named_and_made_anew(self):
    self.write_lines(count=60)
    _, data = self.prepare()
    whole = self.content()
    first, second, third = self.shards()[:3]
    damages = (
      (first, lambda b: b[:-9], r"it has [\d,]+ bytes, and not [\d,]+"),
      (second, lambda b: b[:99] + b"\xff" + b[100:], "its sha256 differs"),
      (third, lambda b: b"", "it has 0 bytes"),
    )
    for path, damage, message in damages:
      path.write_bytes(damage(path.read_bytes()))
      with self.refused(f"{path}: a damaged shard: {message}.*only this shard"):
        self.corpus(data).split("train")
      if path == third:
        path.unlink()
        with self.refused(f"{path}: a damaged shard: it is missing"):
          self.corpus(data).split("train")
      with self.assertLogs("absl", "WARNING") as logs:
        self.prepare()
      self.assertLen(logs.output, 1)
      self.assertEqual(self.content(), whole)

  def test_records_that_are_none(self):
    """Also where somebody has changed the index with the shard."""
    self.write_lines(count=30)
    self.prepare(tokenizer="byte", held_out_share=0.0)
    folder = epath.Path(self.root / "out")
    path = self.shards()[0]
    tree = json.loads((folder / shards.INDEX).read_text())
    entry = tree["splits"]["train"]["shards"][0]

    def refused(message):
      entry["bytes"] = path.stat().st_size
      entry["sha256"] = shards.digest(epath.Path(path))
      (folder / shards.INDEX).write_text(json.dumps(tree))
      with self.refused(message):
        shards.read_split(shards.read_index(folder), "train")

    entry["records"] += 1
    refused("a damaged shard: ")
    path.write_bytes(b"no shard" * 9999)
    refused("a damaged shard: ")
    entry["name"] = "../x"
    refused("'../x' is no name of a shard")

  def test_other_folders_and_texts_are_refused(self):
    self.write_lines(count=30)
    (self.root / "other").mkdir()
    (self.root / "other" / "file").touch()
    with self.refused(
      "--out=.*other: is not empty, and holds no prepared text"
    ):
      self.prepare("other")
    (self.root / "file").touch()
    with self.refused("--out=.*file: is a file"):
      self.prepare("file")
    self.prepare()
    whole = self.content()
    for fields in (
      {"held_out_share": 0.2},
      {"vocabulary": 271},
      {"tokenizer": "byte"},
      {"normalise": True},
    ):
      with self.refused("out: holds a text that was prepared from other files"):
        self.prepare(**fields)
    self.write_lines(count=31)
    with self.refused("out: holds a text that was prepared from other files"):
      self.prepare()
    self.assertEqual(self.content(), whole)
    path = self.root / "out" / "index.json"
    path.write_text(path.read_text().replace('version": 1', 'version": 2'))
    message = "index.json: no index: its format_version is 2, .* reads 1; prep"
    with self.refused(message):
      shards.read_index(epath.Path(self.root / "out"))
    path.write_text("{")
    with self.refused("index.json: no index: no JSON"):
      shards.read_index(epath.Path(self.root / "out"))
    with self.refused("index.json: damaged, or of another version"):
      self.prepare()

  def test_folders_that_are_refused_at_once(self):
    inside = epath.Path(self.text / "out")
    config = config_lib.Config(data=config_lib.Data(path=str(self.text)))
    for out, words in (
      (inside, "lies in config.data.path="),
      (epath.Path(self.text), "lies in config.data.path="),
      ("gs://bucket/out", "shards are written to this machine"),
    ):
      with self.assertRaisesRegex(config_lib.ConfigError, words):
        tool.prepare(config, out)
    (self.text / shards.INDEX).touch()
    with self.assertRaisesRegex(
      config_lib.ConfigError, "prepared text already"
    ):
      tool.prepare(config, epath.Path(self.root / "out"))
    with self.assertRaisesRegex(config_lib.ConfigError, "needs a file or a fo"):
      tool.prepare(config_lib.Config(), epath.Path(self.root / "out"))
    with self.refused("gs://bucket/text: shards are read from this machine"):
      shards.read_index(epath.Path("gs://bucket/text"))
    self.assertFalse((self.root / "out").exists())

  def test_another_tokenizer_is_refused(self):
    self.write_lines(count=30)
    self.prepare()
    folder = epath.Path(self.root / "out")
    index = shards.read_index(folder)
    data = config_lib.Data(path=str(folder), tokenizer="bpe")
    self.assertEqual(configured.tokenizer(data), index.tokenizer)
    byte = tokenizers.get("byte")
    with self.refused(
      "tokenizer='byte': the shards .* are of 'bpe' .270 symbo"
    ):
      corpora.load("auto", str(folder), byte)
    data = config_lib.Data(tokenizer="bpe", vocabulary=260)
    other = alphabets.learn(data, [[b"the cat sat on the mat " * 9]])
    with self.refused("the shards have another bpe than the run"):
      corpora.load("auto", str(folder), other)
    with self.refused(
      "normalise=True: the text in .* with False: set .*=false"
    ):
      corpora.load("auto", str(folder), index.tokenizer, normalise=True)
    (folder / alphabets.FILE).write_bytes(other.state)
    with self.refused("tokenizer.json: not the tokenizer of the shards"):
      shards.read_index(folder)
    (folder / alphabets.FILE).unlink()
    with self.refused("tokenizer.json: the tokenizer of the shards cannot be"):
      shards.read_index(folder)
    with self.assertLogs("absl", "WARNING"):
      self.prepare()
    self.assertEqual(shards.read_index(folder).tokenizer, index.tokenizer)

  def test_a_full_disk_is_one_line_and_loses_nothing(self):
    self.write_lines(count=60)
    self.prepare("whole")
    real, opened = array_record_module.ArrayRecordWriter, []

    def full(path, options):
      opened.append(path)
      return real(path if len(opened) < 3 else "/dev/full", options)

    with (
      mock.patch.object(array_record_module, "ArrayRecordWriter", full),
      self.assertRaises(OSError) as refusal,
    ):
      self.prepare()
    error = refusal.exception
    self.assertEqual(error.errno, errno.ENOSPC)
    self.assertEqual(error.filename, str(self.root / "out" / _name(opened[2])))
    self.assertLen(self.shards(), 2)
    self.assertFalse([*(self.root / "out").glob(".*.tmp")])
    self.prepare()
    self.assertEqual(self.content(), self.content("whole"))

  def test_empty_documents_and_repetitions_are_counted(self):
    texts = ["a b c", "", "a b c", "d e", "a b c", ""]
    lines = (json.dumps({"text": text}) for text in texts)
    (self.text / "train.jsonl").write_text("\n".join(lines))
    (self.text / "valid.txt").write_text("")
    index, _ = self.prepare(tokenizer="byte")
    report = index["report"]
    self.assertEqual(report["empty_documents"], 3)
    self.assertEqual(report["first_empty_document"], "train.jsonl, line 2")
    self.assertEqual(report["documents_that_repeat_another"], 2)
    self.assertEqual(
      report["longest_documents"][0],
      {"name": "train.jsonl, line 1", "bytes": 5},
    )
    lines = tool.report(index, epath.Path("out")).splitlines()
    self.assertIn("out: 4 documents, 18 bytes of text, from 2 files", lines)
    self.assertIn("documents that repeat an earlier one: 2", lines)
    self.assertRegex(lines[3], r"train +4 +18 +18 +1.000 +1")
    self.assertIn("no document is in valid, which training reads", lines[-1])
    (self.text / "train.jsonl").write_text('{"text": ""}')
    with self.refused("there is no text: every document is empty .2 in all"):
      self.prepare("none", tokenizer="byte")

  def test_repetitions_come_to_one_split(self):
    lines = [json.dumps({"text": text}) for text in _documents(300)]
    (self.text / "a.jsonl").write_text("\n".join(lines))
    for name in ("b.txt", "c.txt"):
      (self.text / name).write_text(_documents(1)[0])
    index, data = self.prepare(tokenizer="byte", held_out_share=0.2)
    counts = {name: s["documents"] for name, s in index["splits"].items()}
    self.assertEqual(sum(counts.values()), 302)
    self.assertBetween(counts["valid"], 40, 80)
    self.assertBetween(counts["test"], 40, 80)
    found = [
      bytes(self.corpus(data).split(name)).count(_documents(1)[0].encode())
      for name in counts
    ]
    self.assertEqual(sorted(found), [0, 0, 3])

  def test_a_symbol_of_a_document_that_is_new(self):
    self.write_lines("train.jsonl")
    lines = [json.dumps({"text": text}) for text in ("the cat", "a ∞")]
    (self.text / "valid.jsonl").write_text("\n".join(lines))
    for count in (1, 2):
      with self.refused(
        "valid.jsonl, line 2: chars: character '∞' at offset 2"
      ):
        self.prepare(tokenizer="chars", workers=count)

  def test_files_that_change_meanwhile(self):
    self.write_lines(count=60)
    self.write_lines("last.jsonl", count=60)

    def progress(what, done, total):
      if what == "encoding" and done < 999:
        self.write_lines("last.jsonl", count=50)

    with self.refused("have changed while they were read"):
      self.prepare(tokenizer="byte", progress=progress)

  @pytest.mark.thorough
  def test_a_process_that_is_killed(self):
    self.write_lines(count=60)
    with (
      mock.patch.object(workers, "_start", _end),
      self.refused("ended from outside, .* with --config.data.workers=1"),
    ):
      self.prepare(tokenizer="byte", workers=2)


def _end(name, state):
  os._exit(9)


def _name(temporary: str) -> str:
  """Return the name of the shard of a temporary file."""
  return pathlib.Path(temporary).name[1:].rsplit(".", 2)[0]


if __name__ == "__main__":
  absltest.main()
