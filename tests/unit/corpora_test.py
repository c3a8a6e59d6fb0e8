"""Corpora: splits, files of every kind, and every refusal."""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import math
import os
import pathlib
import re
import resource
import tarfile
import tempfile
import zipfile
from unittest import mock

import numpy as np
import zstandard
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.data import cleaning, corpora, files, mapped, tokenizers

# sha256 of the built-in text, as it is and in normal form: runs are compared by
# their numbers on it, so it must never change unnoticed.
_BOOKS = {
  "byte": {
    "train": "2ecd42736cfcfaa3cc3f55fc3c84ea61360fd05944d39279d44deb60c44831dd",
    "valid": "78ffc73fcc73ba3929dbf37fff30489d5b6a4da781f92111279df218dd71c7e7",
    "test": "e853e3a7c4310b2f1e30e77acb34fc93765774674d19af8c329a138b581348fc",
  },
  "char27": {
    "train": "d2c4d23742c192ce307a901cdb881d56411866118597db4b8a3c27018b9ec516",
    "valid": "682851e6e376b5fa2d14dafe4b2ded857fd5a8cf0939a432163fe774df56b994",
    "test": "3636150a8bc610218f8399e9b6cc4567b1ab86f7aca5197a1947af17f538bf45",
  },
}
_TEXT = b"the cat sat on the mat and then it ran away " * 3


def _zip(data: bytes, names=("text8",)) -> bytes:
  with tempfile.TemporaryFile() as file:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
      for name in names:
        archive.writestr(name, data)
    file.seek(0)
    return file.read()


def _two_frames(data: bytes) -> bytes:
  pack = zstandard.ZstdCompressor(write_checksum=True).compress
  return pack(data[:50]) + pack(data[50:])


_PACK = {
  "": bytes,
  ".gz": gzip.compress,
  ".xz": lzma.compress,
  ".bz2": bz2.compress,
  ".zst": _two_frames,
  ".zip": _zip,
}


def _bomb(suffix: str) -> bytes:
  """A small file that unpacks to 200 million letters."""
  letters = b"a" * 1_000_000
  file = io.BytesIO()
  match suffix:
    case ".zst":
      frame = zstandard.ZstdCompressor().compress(letters)
      return frame * 200
    case ".zip":
      with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("text8", "w") as packed,
      ):
        for _ in range(200):
          packed.write(letters)
      return file.getvalue()
  return _PACK[suffix](letters) * 200


class CorporaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.char27 = tokenizers.get("char27")

  def file(self, name: str, data: bytes) -> str:
    (self.folder / name).write_bytes(data)
    return str(self.folder / name)

  def load(self, path, corpus="auto", tokenizer="char27"):
    return corpora.load(corpus, str(path), tokenizers.get(tokenizer))

  @contextlib.contextmanager
  def assert_refused(self, *parts: str):
    """Of its block: a DataError of one line that holds all parts."""
    with self.assertRaises(corpora.DataError) as refusal:
      yield
    message = str(refusal.exception)
    for part in parts:
      self.assertIn(part, message)
    self.assertNotIn("\n", message)

  # files

  @parameterized.parameters("pipe", "/dev/zero", "/dev/stdin")
  def test_only_regular_files_are_texts(self, kind):
    path = self.folder / "train.txt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    with (
      mock.patch.object(os, "open", side_effect=AssertionError),
      self.assert_refused("train.txt: is a ", "only regular files are read"),
    ):
      self.load(self.folder, "folder").split("train")

  @parameterized.parameters("", ".gz", ".xz", ".bz2", ".zst", ".zip")
  def test_a_text_that_is_too_large(self, suffix):
    """A packed one is refused as it grows, and a plain one by its size."""
    path = self.folder / f"train.txt{suffix}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if suffix:
      path.write_bytes(_bomb(suffix))
      self.assertLess(path.stat().st_size, 1e6)
    else:
      with path.open("wb") as file:
        file.truncate(1 << 40)
    corpus = corpora.load(
      "auto", str(path), self.char27, largest_megabytes=0 if not suffix else 60
    )
    with self.assert_refused(f"{path}: ", "more than", "largest_megabytes="):
      corpus.split("train")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    self.assertLess((after - before) / 1024, 160)  # Megabytes.

  @parameterized.product(
    text=(
      b"\xef\xbb\xbfthe cat sat on the mat and then it ran away\r\n",
      "It’s 12 o’clock; naïve 3RD words,  one\n\n two".encode() * 2,
      b"a" * 90,
      b"  -  " * 20 + b"word" + b"1" * 9 + b"  " * 20,
    ),
    tokenizer=("char27", "byte"),
    chunk=(3, 4, 7),
  )
  def test_chunks_change_nothing(self, text, tokenizer, chunk):
    path, tokenizer = self.file("x.txt", text), tokenizers.get(tokenizer)
    for normalise in (False, True):
      results = []
      for size, long in ((1 << 24, 1 << 26), (chunk, 1 << 26), (chunk, 3)):
        corpus = corpora.load("auto", path, tokenizer, normalise)
        with (
          mock.patch.object(files, "_CHUNK", size),
          mock.patch.object(mapped, "_LONG", long),
        ):
          try:
            results.append(corpus.hash("train") + corpus.hash("test"))
          except corpora.DataError as error:
            results.append(str(error))
      self.assertLen({*results}, 1, results)

  @parameterized.parameters(1, 3, 50)
  def test_a_wrong_byte_has_the_same_offset_in_chunks(self, chunk):
    for wrong in (b"\xff", b"\0", "é".encode()[:1]):
      data = "né à 日本 🎉".encode() * 3 + wrong + b"text"
      with mock.patch.object(files, "_CHUNK", 1 << 24):
        want = files.not_text(data)
      with mock.patch.object(files, "_CHUNK", chunk):
        self.assertEqual(files.not_text(data), want)

  @parameterized.parameters("TemporaryFile", "gettempdir")
  def test_a_long_text_where_no_file_can_be_written(self, name):
    path = self.file("x.txt", _TEXT)
    with (
      mock.patch.object(files, "_CHUNK", 50),
      mock.patch.object(mapped, "_LONG", 60),
      mock.patch.object(tempfile, "tempdir", None),
      mock.patch.object(
        tempfile, name, side_effect=OSError(28, "No space left")
      ),
      self.assertLogs("absl", "WARNING") as log,
    ):
      ids = corpora._encode(epath.Path(path), self.char27, False, 0)
    self.assertEqual(self.char27.to_bytes(ids), _TEXT)
    self.assertIn("No space left: the text stays in memory", log.output[0])

  @parameterized.product(
    suffix=tuple(_PACK), name=("text", "text.bin", "text.TXT")
  )
  def test_a_packed_file_is_known_by_its_content(self, suffix, name):
    path = self.file(name, _PACK[suffix](_TEXT))
    corpus = self.load(path, tokenizer="byte")
    text = b"".join(bytes(corpus.split(s)) for s in corpora.SPLITS)
    self.assertEqual(text, _TEXT)

  @parameterized.parameters(
    (_TEXT.decode().encode("utf-16"), "UTF-16 text; byte 0xff at offset 0"),
    (_TEXT.decode().encode("utf-16-le"), "byte 0x00 at offset 1 is of binary"),
    (
      _TEXT + "é".encode("latin-1") + _TEXT,
      "byte 0xe9 at offset 132 is no UTF",
    ),
    (_TEXT + b"\0" + _TEXT, "byte 0x00 at offset 132 is of binary"),
    (np.arange(999, dtype=np.uint16).tobytes(), "byte 0x00 at offset 0 is of"),
    (bytes(range(1, 27)) * 9, "byte 0x01 at offset 0 is one of many control"),
    (gzip.compress(gzip.compress(_TEXT)), "what is packed in it is not text"),
    (b"%PDF-1.4" + _TEXT, "it is a PDF document"),
    (b"\x93NUMPY\1\0" + _TEXT, "an array of numpy; byte 0x00 at offset 7"),
  )
  def test_a_file_that_is_not_text(self, data, message):
    for tokenizer in ("byte", "char27"):
      with self.assert_refused("x.txt: ", message, "UTF-8 text"):
        self.load(self.file("x.txt", data), tokenizer=tokenizer).split("train")

  @parameterized.parameters(bytes, gzip.compress)
  def test_a_tar_archive_is_not_text(self, pack):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
      tar.addfile(tarfile.TarInfo("a.txt"))
    with self.assert_refused("x.tgz: ", "a tar archive; unpack it"):
      path = self.file("x.tgz", pack(archive.getvalue()))
      self.load(path, tokenizer="byte").split("train")

  @parameterized.parameters(
    ("né à 日本 🎉".encode() * 9, 1, -1),
    ("é".encode() * 9, 1, 17),
    ("🎉".encode() * 9, 3, 33),
    (_TEXT + b"\x02\x1b[0m" + _TEXT, 0, None),
    (b"a short text of DOS \x1a\x7f", 0, None),
    (b"PK is no zip, BZh no bzip2" * 9, 0, None),
  )
  def test_text_of_every_kind(self, data, start, end):
    """A text may begin and end within a character; one control is stray."""
    for chunk in (1, 2, 3, 1 << 24):
      with mock.patch.object(files, "_CHUNK", chunk):
        self.assertEqual(files.not_text(data[start:end]), "")

  def test_a_wrong_byte_is_found_across_chunks(self):
    data = "aé日".encode() * 3 + b"\xff" + _TEXT
    for chunk in (1, 2, 3, 5, 1 << 24):
      with mock.patch.object(files, "_CHUNK", chunk):
        self.assertIn("0xff at offset 18 is no UTF", files.not_text(data))

  # text8

  @parameterized.product(suffix=tuple(_PACK), tokenizer=("char27", "byte"))
  def test_text8_of_every_compression(self, suffix, tokenizer):
    path = self.file(f"text8{suffix}", _PACK[suffix](_TEXT))
    corpus = self.load(path, tokenizer=tokenizer)
    self.assertEqual(corpus.name, "text8")
    splits = [corpus.split(name) for name in corpora.SPLITS]
    self.assertEqual([len(split) for split in splits], [118, 7, 7])
    text = b"".join(corpus.tokenizer.to_bytes(split) for split in splits)
    self.assertEqual(text, _TEXT)
    self.assertEqual({split.dtype for split in splits}, {np.dtype(np.uint8)})

  @parameterized.parameters(*sorted(_PACK.keys() - {""}))
  def test_a_truncated_file_is_named(self, suffix):
    packed = _PACK[suffix](_TEXT)
    for size in {1, len(packed) // 2, len(packed) - 1}:
      path = self.file(f"text8{suffix}", packed[:size])
      with self.assert_refused(path, "cannot be read", "damaged"):
        self.load(path).split("train")

  @parameterized.parameters(*sorted(_PACK.keys() - {""}))
  def test_a_damaged_file_is_named(self, suffix):
    packed = bytearray(_PACK[suffix](_TEXT))
    packed[len(packed) // 2] ^= 0x55
    path = self.file(f"text8{suffix}", bytes(packed))
    with self.assert_refused(path):
      self.load(path).split("train")

  def test_a_zip_of_two_files_is_refused(self):
    path = self.file("text8.zip", _zip(_TEXT, names=("a", "b")))
    # It is not damaged. A document of a word processor is such an archive.
    message = f"{path}: is no text but a zip archive of 2 files"
    with self.assert_refused(message, "unpack it"):
      self.load(path).split("train")

  @parameterized.parameters(
    (b"ab cd" * 9 + b"\n\n", r"byte 0x0a ('\n') at offset 45"),
    (b"ab cd" * 9 + b"Q1", "byte 0x51 ('Q') at offset 45"),
  )
  def test_a_wrong_byte_has_its_offset(self, data, message):
    path = self.file("text8.gz", gzip.compress(data))
    # Whichever split is asked for.
    with self.assert_refused(path, message, "config.data.normalise=true"):
      self.load(path).split("train")
    self.load(path, tokenizer="byte").split("train")

  @parameterized.parameters(b"", b"a", b"a" * 19)
  def test_too_short_for_splits(self, data):
    path = self.file("text8", data)
    with self.assert_refused(path, f"{len(data)} characters are too few"):
      self.load(path).split("train")

  def test_a_text_whose_normal_form_is_short(self):
    path = self.file("text8", b"... 2 !" * 3)
    corpus = corpora.load("auto", path, self.char27, normalise=True)
    with self.assert_refused(path, "11 characters in normal form are too few"):
      corpus.split("train")

  def test_twenty_characters_are_enough(self):
    corpus = self.load(self.file("text8", b"abcdefghijklmnopqrst"))
    splits = [self.char27.decode(corpus.split(s)) for s in corpora.SPLITS]
    self.assertEqual(splits, ["abcdefghijklmnopqr", "s", "t"])

  @parameterized.parameters(
    (-7, "(193 in all"), (0, ""), (7, "of 207 are used")
  )
  def test_the_standard_split(self, more, note):
    data = (np.arange(200 + more) % 26 + 97).astype(np.uint8).tobytes()
    path = self.file("text8", data)
    with mock.patch.object(corpora, "TEXT8_CHARACTERS", 200):
      corpus = self.load(path)
      splits = [self.char27.to_bytes(corpus.split(s)) for s in corpora.SPLITS]
      line = corpus.describe(*corpora.SPLITS)
    if more >= 0:
      self.assertEqual(splits, [data[:180], data[180:190], data[190:200]])
    self.assertStartsWith(line, f"text8 {path}: train {len(splits[0])}, ")
    self.assertEndsWith(line, "characters" if not note else ")")
    self.assertIn(note, line)

  def test_a_shorter_text8_says_so(self):
    line = self.load(self.file("text8", _TEXT)).describe()
    self.assertIn("132 in all, shorter than text8's 100,000,000", line)
    self.assertIn("90/5/5%", line)

  # folder

  @parameterized.parameters("", ".gz", ".xz", ".bz2", ".zst")
  def test_folder_of_every_compression(self, suffix):
    for name in corpora.SPLITS:
      self.file(f"{name}.txt{suffix}", _PACK[suffix](_TEXT + name.encode()))
    corpus = self.load(self.folder)
    self.assertEqual(corpus.name, "folder")
    for name in corpora.SPLITS:
      text = self.char27.to_bytes(corpus.split(name))
      self.assertEqual(text, _TEXT + name.encode())
      self.assertEqual(corpus.hash(name), hashlib.sha256(text).hexdigest())

  def test_only_what_is_asked_for_is_read_and_once(self):
    self.file("train.txt", _TEXT)
    self.file("valid.txt.gz", b"no gzip")
    corpus = self.load(self.folder)
    first = corpus.split("train")
    self.assertFalse(first.flags.writeable)
    (self.folder / "train.txt").unlink()
    self.assertIs(corpus.split("train"), first)
    self.assertIn(": train 132 characters", corpus.describe("train"))
    with self.assert_refused(f"{self.folder}: the test split", "no test.txt"):
      corpus.split("test")
    with self.assert_refused("valid.txt.gz", "cannot be read"):
      corpus.split("valid")

  def test_two_files_of_one_split_are_refused(self):
    self.file("train.txt", _TEXT)
    self.file("train.txt.gz", gzip.compress(_TEXT))
    with self.assert_refused("both train.txt and train.txt.gz"):
      self.load(self.folder).split("train")

  def test_an_empty_split_is_refused(self):
    self.file("test.txt", b"")
    with self.assert_refused(str(self.folder), "test split is empty"):
      self.load(self.folder).split("test")

  def test_a_folder_in_place_of_a_file(self):
    (self.folder / "test.txt").mkdir()
    with self.assert_refused("test.txt", "is a folder"):
      self.load(self.folder).split("test")

  def test_the_hash_is_of_the_text_and_not_of_its_ids(self):
    self.file("test.txt", _TEXT)
    with mock.patch.object(corpora, "_CHUNK", 17):
      hashes = {
        self.load(self.folder, tokenizer=name).hash("test")
        for name in ("char27", "byte")
      }
    self.assertEqual(hashes, {hashlib.sha256(_TEXT).hexdigest()})

  # ordinary prose

  @parameterized.product(tokenizer=("char27", "byte"), folder=(False, True))
  def test_prose_in_normal_form(self, tokenizer, folder):
    prose = "\ufeffThe Élan of 3 cats,\r\nand\tmore.\r\n".encode() * 9
    name = "train.txt" if folder else "prose"
    path = self.folder if folder else self.file(name, prose)
    self.file(name, prose)
    coder = tokenizers.get(tokenizer)
    with self.assert_refused("byte", "config.data.normalise=true"):
      corpora.load("auto", str(path), self.char27).split("train")
    corpus = corpora.load("auto", str(path), coder, normalise=True)
    self.assertStartsWith(
      coder.decode(corpus.split("train")),
      "the lan of three cats and more the lan",
    )
    self.assertIn(f"{path} in normal form", corpus.describe())

  def test_the_built_in_text_in_normal_form(self):
    byte = tokenizers.get("byte")
    corpus = corpora.load("auto", "", byte, normalise=True)
    self.assertEqual(corpus.hash("valid"), _BOOKS["char27"]["valid"])

  @parameterized.parameters(b"\n", b"\r\n", b"")
  def test_the_line_end_and_the_mark_that_editors_add(self, end):
    data = b"\xef\xbb\xbf" + _TEXT + end
    for tokenizer, want in (("char27", _TEXT), ("byte", _TEXT + end)):
      corpus = self.load(self.file("text8", data), tokenizer=tokenizer)
      splits = [corpus.split(name) for name in corpora.SPLITS]
      text = b"".join(map(corpus.tokenizer.to_bytes, splits))
      self.assertEqual(text, want)

  @parameterized.parameters(
    ("train", "TRAIN.TXT"),
    ("train", "Training.txt"),
    ("valid", "val.txt"),
    ("valid", "Validation.TXT"),
    ("test", "test.txt.GZ"),
  )
  def test_other_names_of_a_split(self, split, name):
    is_packed = name.endswith(".GZ")
    self.file(name, gzip.compress(_TEXT) if is_packed else _TEXT)
    with self.assertLogs("absl", "INFO") as logs:
      ids = self.load(self.folder).split(split)
    self.assertEqual(self.char27.to_bytes(ids), _TEXT)
    self.assertIn(f"the {split} split is {name}", logs.output[0])
    # The exact name goes first, and two others are refused.
    self.file(f"{split}.txt", _TEXT[:40])
    self.assertLen(self.load(self.folder).split(split), 40)
    (self.folder / f"{split}.txt").unlink()
    self.file(f"{split}.tXT", _TEXT)
    with self.assert_refused("both ", f"{split}.tXT", name):
      self.load(self.folder).split(split)

  def test_a_missing_split_says_what_is_there(self):
    self.file("dev.txt", _TEXT)
    with self.assert_refused("no valid.txt", "the folder has: dev.txt"):
      self.load(self.folder).split("valid")

  # paths

  def test_home_folder(self):
    self.file("text8", _TEXT)
    with mock.patch.dict(os.environ, {"HOME": str(self.folder)}):
      self.assertLen(self.load("~/text8").split("valid"), 7)

  @parameterized.parameters("auto", "text8", "folder")
  def test_a_missing_path_is_named(self, corpus):
    path = str(self.folder / "nothing")
    with self.assert_refused(
      f"config.data.path={path}: no such file or folder"
    ):
      self.load(path, corpus)

  def test_a_remote_path_without_its_client_says_what_to_install(self):
    error = ImportError("Please install gcsfs")
    with (
      mock.patch.object(corpora.epath, "Path") as path,
      self.assert_refused("gs://bucket/text8", "install gcsfs"),
    ):
      path.return_value.expanduser.return_value.exists.side_effect = error
      self.load("gs://bucket/text8")

  def test_text8_without_a_path_says_where_it_is(self):
    with self.assert_refused(
      "http://mattmahoney.net/dc/text8.zip", "--config.data.path="
    ):
      self.load("", "text8")

  def test_folder_without_a_path(self):
    with self.assert_refused(
      "config.data.corpus=folder", "--config.data.path="
    ):
      self.load("", "folder")

  def test_the_wrong_kind_of_path(self):
    path = self.file("text8", _TEXT)
    with self.assert_refused(path, "--config.data.corpus=text8"):
      self.load(path, "folder")
    with self.assert_refused(str(self.folder), "--config.data.corpus=folder"):
      self.load(self.folder, "text8")
    with self.assert_refused(path, "takes no path"):
      self.load(path, "books")

  def test_unknown_names(self):
    with self.assert_refused("config.data.corpus='enwik8'", "books"):
      self.load("", "enwik8")
    self.file("test.txt", _TEXT)
    with self.assert_refused("no split 'dev'", "train, valid, test"):
      self.load(self.folder).split("dev")

  # books

  @parameterized.product(corpus=("auto", "books"), tokenizer=("char27", "byte"))
  def test_the_built_in_text(self, corpus, tokenizer):
    corpus = self.load("", corpus, tokenizer)
    self.assertEqual(corpus.name, "books")
    for name in corpora.SPLITS:
      self.assertEqual(corpus.hash(name), _BOOKS[tokenizer][name], name)
      self.assertGreater(len(corpus.split(name)), 150_000)
    line = corpus.describe("valid")
    self.assertStartsWith(line, "built-in text, eleven English novels: valid 2")

  def test_the_readme_of_the_built_in_text_names_its_files(self):
    readme = (corpora.BOOKS / "README.md").read_text(encoding="utf-8")
    for name in corpora.SPLITS:
      path = corpora.BOOKS / f"{name}.txt.xz"
      size = len(lzma.decompress(path.read_bytes()))
      row = f"| {path.stat().length:,} | {size:,} | {_BOOKS['byte'][name]} |"
      self.assertIn(f"| {path.name} {row}", readme)
      books = re.findall(rf"\| {name} \|.* ([\d,]+) \|\n", readme)
      sizes = [int(book.replace(",", "")) for book in books]
      # An empty line between two books, one newline at the end.
      self.assertEqual(sum(sizes) + 2 * len(sizes) - 1, size)

  def test_a_split_of_the_built_in_text_is_read_when_it_is_asked_for(self):
    with mock.patch.object(files, "read", return_value=b"One.\n") as read:
      corpus = self.load("")
      read.assert_not_called()
      self.assertEqual(self.char27.decode(corpus.split("valid")), "one")
      read.assert_called_once_with(corpora.BOOKS / "valid.txt.xz")

  @parameterized.parameters(
    ("Hello,  World!\n", b"hello world"),
    ("3.14 x2", b"three one four x two"),
    ("Élan in \u212a, don't", b"lan in don t"),
    ("٣", b""),  # A digit, but not one of wikifil.pl's.
    ("{a}\x00`b@[Z]", b"a b z"),
    (" \n", b""),
  )
  def test_normal_form(self, text, expected):
    self.assertEqual(cleaning.normal_form(text.encode()), expected)

  # unigram_entropy

  @parameterized.parameters(
    ([1], 0.0), ([0, 1, 2], math.log2(3)), ([0, 0, 0, 2], 0.811278124459)
  )
  def test_unigram_entropy(self, tokens, bits):
    with mock.patch.object(corpora, "_CHUNK", 2):
      entropy = corpora.unigram_entropy(np.array(tokens, np.uint8), 3)
    self.assertAlmostEqual(entropy, bits)


if __name__ == "__main__":
  absltest.main()
