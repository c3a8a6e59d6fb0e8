"""Alphabets that are found in a text: what they write comes back as it was."""

import builtins
import hashlib
import json
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import (
  alphabets,
  bpe,
  configured,
  corpora,
  tokenizers,
)

_TEXT = (
  "It's the end, isn't it? They'll say 12 or 345 things.\nThe cat sat on the "
  "mat;\n\n  and then it ran away.\r\nNaïve 3RD words — “quoted”. 日本語。\n"
) * 20
_PIECES = (
  *("a", "Z", " ", "  ", "\n", "\r\n", "\t", "\0", "\x1b[0m", "'s", "'LL"),
  *(
    "12",
    "é",
    "e\u0301",
    "ß",
    "中文",
    "🎉",
    "👩‍👩‍👧",
    "\u200b",
    "\ufeff",
    "\u2028",
  ),
  *(
    "<|endoftext|>",
    "the",
    " the",
    ".\n",
    "/",
    "_",
    "ﬁ",
    "\u00a0",
    "\U0010ffff",
  ),
)
# Rules that divide a text into words: of GPT-2, of GPT-4 and Qwen, of GPT-4o.
_GPT4 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _texts(count: int, seed: int = 0):
  generator = np.random.default_rng(seed)
  for _ in range(count):
    yield "".join(generator.choice(_PIECES, generator.integers(1, 60)))


def _rule(regex: str):
  split = {"type": "Split", "pattern": {"Regex": regex}}
  split |= {"behavior": "Isolated", "invert": False}
  last = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False}
  return {"type": "Sequence", "pretokenizers": [split, last]}


def _file(words=None, **changes) -> dict:
  """A `tokenizer.json` like GPT-2's, with merges of _TEXT."""
  state = json.loads(_learned().state)
  merges = [merge.split(" ") for merge in state["merges"]]
  model = {"vocab": {s: i for i, s in enumerate(state["vocabulary"])}}
  model |= {"type": "BPE", "merges": merges, "unk_token": None, "dropout": None}
  mark = {"id": len(model["vocab"]), "content": "<|endoftext|>"}
  mark |= {"special": True, "lstrip": True, "rstrip": True, "normalized": False}
  return {
    "version": "1.0",
    "added_tokens": [mark],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": words or state["words"],
    "post_processor": {"type": "ByteLevel", "trim_offsets": False},
    "model": model | changes,
  }


def _learned(text: str = _TEXT, vocabulary: int = 300) -> tokenizers.Tokenizer:
  data = config_lib.Data(tokenizer="bpe", vocabulary=vocabulary)
  return alphabets.learn(data, [[text.encode()]])


def _chars(text: str, most: int = 0) -> tokenizers.Tokenizer:
  data = config_lib.Data(tokenizer="chars", vocabulary=most)
  return alphabets.learn(data, [[text.encode()]])


class RoundTripTest(parameterized.TestCase):
  @parameterized.parameters("chars", "bpe", "file", "gpt4", "gpt4o")
  def test_every_text_comes_back(self, kind):
    """Also in small pieces, which have the tokens of the whole text."""
    match kind:
      case "chars":
        made = _chars("".join(_PIECES) + _TEXT)
      case "bpe":
        made = _learned()
      case "file":
        made = bpe.of_hugging_face(_file(ignore_merges=True))
      case _:
        rule = _rule(_GPT4 if kind == "gpt4" else _GPT4O)
        made = bpe.of_hugging_face(_file(rule))
    self.assertIsNotNone(made.codec.cuts())
    for text in (*_texts(60), _TEXT, ""):
      ids = made.encode(text)
      self.assertEqual(made.decode(ids), text)
      self.assertEqual(made.to_bytes(ids), text.encode())
      self.assertEqual(ids.dtype, made.dtype)
      self.assertEqual(made.bytes_of[ids].sum(), len(text.encode()))
      self.assertEqual(made.characters_of[ids].sum(), len(text))
      data = text.encode()
      for size, step in ((20, 7), (5, 1000)):
        with mock.patch.object(tokenizers, "PIECE", size):
          chunks = [data[i : i + step] for i in range(0, len(data), step)]
          pieces = [*made.encode_chunks(chunks)]
        np.testing.assert_array_equal(np.concatenate([ids[:0], *pieces]), ids)
    if kind != "chars":
      self.assertLess(len(made.encode(_TEXT)), len(_TEXT) * 0.7)

  def test_pieces_do_not_depend_on_chunks(self):
    for made in (_chars(_TEXT), _learned(), tokenizers.get("byte")):
      data = _TEXT.encode()
      want = [*made.pieces([data], 50)]
      self.assertGreater(len(want), 10)
      for step in (1, 13, 600):
        chunks = [data[i : i + step] for i in range(0, len(data), step)]
        self.assertEqual([*made.pieces(chunks, 50)], want)

  def test_a_text_without_a_place_to_cut_is_one_piece(self):
    self.assertLen([*_learned().pieces([b"a" * 999], 10)], 1)

  @parameterized.parameters("chars", "bpe")
  def test_a_state_is_the_tokenizer(self, kind):
    made = _chars(_TEXT) if kind == "chars" else _learned()
    again = alphabets.of_state(made.state, "x")
    self.assertEqual((again, again.sha256), (made, made.sha256))
    np.testing.assert_array_equal(again.encode(_TEXT), made.encode(_TEXT))

  def test_the_same_text_gives_the_same_tokenizer(self):
    data = _TEXT.encode()
    for kind in ("chars", "bpe"):
      config = config_lib.Data(tokenizer=kind, vocabulary=300)
      states = {
        alphabets.learn(
          config, [[data[i : i + n] for i in range(0, len(data), n)]]
        ).state
        for n in (7, 1000, len(data))
      }
      self.assertLen(states, 1)

  def test_marks_of_a_file_are_text(self):
    made = bpe.of_hugging_face(_file())
    ids = made.encode("a <|endoftext|> b")
    self.assertEqual(made.V, 301)
    self.assertNotIn(300, ids)
    self.assertEqual(made.decode([300]), "<|endoftext|>")


class ErrorsTest(parameterized.TestCase):
  def test_a_new_character_is_named_with_its_place(self):
    made = _chars("aé b")
    self.assertEqual((made.V, made.unit), (4, "char"))
    message = (
      "chars: character '中' at offset {} is not in the alphabet of .*4 "
    )
    for text, offset in (("éa 中", 3), ("éa 中".encode(), 4)):
      with self.assertRaisesRegex(
        tokenizers.TokenizerError, message.format(offset + 10)
      ):
        made.encode(text, 10)
    self.assertTrue(made.knows("é"))
    self.assertFalse(made.knows("中"))

  def test_a_new_character_in_a_split_is_named_with_its_file(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      (path / "train.txt").write_text("aé b" * 20)
      (path / "valid.txt").write_text("ab " * 20 + "c")
      data = config_lib.Data(path=folder, tokenizer="chars")
      corpus = corpora.load("auto", folder, corpora.learn(data))
      self.assertLen(corpus.split("train"), 80)
      with self.assertRaisesRegex(
        corpora.DataError, r"valid.txt: chars: character 'c' at offset 60 .*bpe"
      ):
        corpus.split("valid")

  def test_a_text_in_one_file_has_the_same_splits_for_all(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "text"
      path.write_text("né à 日本 🎉, it's a text. " * 50)
      texts = []
      for kind in ("byte", "chars", "bpe"):
        data = config_lib.Data(path=str(path), tokenizer=kind)
        if kind == "bpe":
          data = config_lib.Data(path=str(path), tokenizer=kind, vocabulary=256)
        made = tokenizers.get("byte") if kind == "byte" else corpora.learn(data)
        corpus = corpora.load("auto", str(path), made)
        texts.append([made.to_bytes(corpus.split(s)) for s in corpora.SPLITS])
        self.assertEqual(
          corpus.hash("train"), hashlib.sha256(texts[-1][0]).hexdigest()
        )
      self.assertEqual(texts[1], texts[2])
      self.assertEqual(b"".join(texts[0]), b"".join(texts[1]))
      for one, other in zip(*texts[:2]):
        self.assertLess(abs(len(one) - len(other)), 8)

  def test_the_built_in_text_is_read_as_it_was_written(self):
    made = corpora.learn(config_lib.Data(tokenizer="chars"))
    self.assertEqual(made.V, 96)
    byte = corpora.load("auto", "", tokenizers.get("byte"))
    corpus = corpora.load("auto", "", made)
    self.assertEqual(corpus.hash("valid"), byte.hash("valid"))

  def test_too_many_characters(self):
    with self.assertRaisesRegex(
      tokenizers.TokenizerError, "has 12 different .* more than 11: .*=12"
    ):
      _chars("abcdefghijkl", 11)

  def test_too_few_symbols(self):
    with self.assertRaisesRegex(
      tokenizers.TokenizerError, "gives 25[79] symbols, fewer than 4,096: set"
    ):
      _learned("ab ab abc", 4096)

  def test_the_library_is_an_extra(self):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
      if name == "tokenizers":
        raise ImportError(name)
      return real(name, *args, **kwargs)

    ids = _learned().encode(_TEXT)
    with (
      mock.patch.object(builtins, "__import__", missing),
      self.assertRaisesRegex(tokenizers.TokenizerError, r"aoarm_jax\[bpe\]"),
    ):
      _learned()
    self.assertEqual(_learned().decode(ids), _TEXT)

  def test_a_symbol_that_the_file_lacks(self):
    """The library would leave it out without a word."""
    tree = _file(vocab={"a": 0, "b": 1, "ab": 2}, merges=["a b"])
    made = bpe.of_hugging_face(tree | {"added_tokens": []})
    np.testing.assert_array_equal(made.encode("abba"), [2, 1, 0])
    with self.assertRaisesRegex(
      tokenizers.TokenizerError, "character 'é' at offset 2 cannot be written"
    ):
      made.encode("abéa")
    self.assertFalse(made.knows("é"))

  @parameterized.parameters(
    ({"type": "WordPiece"}, "of the type 'WordPiece', and BPE on bytes"),
    ({"byte_fallback": True}, r"not on bytes \(byte_fallback\)"),
    ({"end_of_word_suffix": "</w>"}, r"not on bytes \(end_of_word_suffix\)"),
    ({"vocab": {"a": -1}}, "vocab.a is -1, and a whole number from 0"),
    ({"vocab": {"a": 1 << 40}}, "ids are too great"),
    ({"vocab": {"a": 0, "b": 0}}, "two symbols have one id"),
    ({"merges": 3}, "merges is 3, and a list is wanted"),
  )
  def test_files_of_other_kinds(self, changes, message):
    self._assert_refused(_file(**changes), message)

  def test_words_of_another_kind(self):
    words = {"type": "Metaspace", "replacement": "_"}
    self._assert_refused(_file(words), r"not on bytes \(no ByteLevel\)")

  def _assert_refused(self, tree, message):
    with tempfile.NamedTemporaryFile("w") as file:
      json.dump(tree, file)
      file.flush()
      data = config_lib.Data(tokenizer="bpe", tokenizer_file=file.name)
      with self.assertRaisesRegex(
        tokenizers.TokenizerError,
        f"^config.data.tokenizer_file={file.name}: .*{message}",
      ) as refusal:
        alphabets.of_file(data)
      self.assertNotIn("\n", str(refusal.exception))

  @parameterized.parameters(
    ("{", "no JSON"),
    ("[]", "an object is wanted"),
    ('{"format_version": 2, "kind": "bpe"}', "format_version is 2, .* reads 1"),
    ('{"format_version": 1, "kind": "words"}', "its kind is 'words'"),
    ('{"format_version": 1, "kind": "bpe"}', "added is missing"),
    ('{"format_version": 1, "kind": "chars", "symbols": "ba"}', "not sorted"),
    ('{"format_version": 1, "kind": "chars", "symbols": "\\ud800"}', "half a"),
    ('{"format_version":1, "kind": "chars", "symbols": "ab"}', "canonical"),
  )
  def test_states_that_are_none(self, state, message):
    with self.assertRaisesRegex(
      tokenizers.TokenizerError, f"^the file: no tokenizer.*{message}"
    ):
      alphabets.of_state(state.encode(), "the file")

  @parameterized.parameters(
    (dict(), 27),
    (dict(tokenizer="bpe"), 4096),
    (dict(tokenizer="bpe", vocabulary=50_257), 50_257),
    (dict(tokenizer="chars", path="absent"), 1024),
  )
  def test_sizes_without_a_text(self, fields, V):
    made = configured.tokenizer(config_lib.Data(**fields))
    self.assertEqual(made.V, V)
    if fields:
      with self.assertRaisesRegex(tokenizers.TokenizerError, "known only with"):
        made.encode("a")


class WithoutTheLibraryTest(absltest.TestCase):
  def test_char27_and_byte_do_not_import_it(self):
    import subprocess

    code = (
      "import sys; from aoarm_jax.data import corpora, tokenizers as t; "
      "t.get('byte').encode('a'); print('tokenizers' in sys.modules)"
    )
    out = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    self.assertEqual(out.stdout, "False\n")


if __name__ == "__main__":
  absltest.main()
