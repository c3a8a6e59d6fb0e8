"""Byte-level BPE, by the library `tokenizers` of Hugging Face.

A text becomes bytes, and the bytes of a word become tokens by learned merges
(Sennrich et al. 2016, 1508.07909; on bytes: GPT-2). The library encodes.
Decoding joins the bytes of the tokens, and needs no library.

The state holds the vocabulary, the merges and the rule that divides a text into
words. All else in a `tokenizer.json` is left out, because it changes a text or
adds tokens to it: normal forms, prefixes and templates. Marks such as
<|endoftext|> are plain text. Their ids stay, and no text is encoded to them.
"""

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from aoarm_jax.config import reading
from aoarm_jax.data import tokenizers

# Version of the states of all tokenizers.
FORMAT_VERSION = 1
_MISSING = (
  "config.data.tokenizer=bpe: the library tokenizers is not installed; pip "
  "install 'aoarm_jax[bpe]'"
)
_ADVICE = (
  "cannot be written with the tokenizer's symbols: take it out, or take a "
  "tokenizer that has all 256 bytes"
)
_MOST_SYMBOLS = 1 << 20
_STATE = {
  "added": reading.Each(reading.Count()),
  "ignore_merges": bool,
  "merges": [str],
  "vocabulary": [(str, None)],
  "words": (dict, None),
}
# How words become characters that stand for bytes.
WORDS = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
# A long text may be cut at these places where the rule for words allows it:
# after a line end between two lines, and before a single space between letters.
_AFTER_LINE = r"(?<=[^\W_]\n)(?=[^\W_])|(?<=[.,;:!?\"')。！？”’]\n)(?=[^\W_])"
_BEFORE_SPACE = r"(?<=[A-Za-z])(?= [A-Za-z])"
# The characters that may stand on the left and on the right of such a place.
_LEFT = (*("a", "Z", "it's", "can't", "x1a", "\n\nb", "  c", "(d", "_e", "éf"),)
_LEFT_LINE = (
  *_LEFT,
  "1",
  "123",
  "é",
  "中",
  "a.",
  'b."',
  "c)",
  "d。",
  "e,'",
  "!”",
)
_RIGHT = ("a", "Zb", "s", "ll", "t x", "re ", "d.", "e\n", "f'g", "h2", "iπ")
_RIGHT_LINE = (*_RIGHT, "1", "23", "中", "é", "²")


def learn(
  documents: Iterable[Iterable[bytes]], vocabulary: int
) -> tokenizers.Tokenizer:
  """Learn the symbols of a text.

  Args:
    documents: documents, each in chunks of bytes, UTF-8, cut anywhere.
    vocabulary: number of symbols: the 256 bytes, and the merges.

  Raises:
    TokenizerError: the text gives fewer symbols, or the library is missing.
  """
  if vocabulary < 256:
    raise tokenizers.TokenizerError(
      f"config.data.vocabulary={vocabulary}: bpe has a symbol for each of the "
      "256 bytes; take 256 or more"
    )
  library = _library()
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  learner = library.Tokenizer(library.models.BPE())
  learner.pre_tokenizer = library.pre_tokenizers.ByteLevel(False)
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocabulary, show_progress=False, initial_alphabet=alphabet
  )
  plain = _made(dict(WORDS), dict(zip(alphabet, range(256))))
  pieces = (p.decode() for chunks in documents for p in plain.pieces(chunks))
  learner.train_from_iterator(pieces, trainer)
  found = learner.get_vocab_size()
  if found < vocabulary:
    raise tokenizers.TokenizerError(
      f"bpe: the training text gives {found:,} symbols, fewer than "
      f"{vocabulary:,}: set --config.data.vocabulary={found}, or take a longer "
      "text"
    )
  return of_hugging_face(json.loads(learner.to_str()))


def of_hugging_face(tree: Any, size: int = 0) -> tokenizers.Tokenizer:
  """Return the tokenizer of a `tokenizer.json`.

  Args:
    tree: its JSON value, which may come from a stranger.
    size: the number of ids that a model predicts. Ids below it that the file
      does not name become marks <|unused_ID|>. 0 adds none.

  Raises:
    ValueError: the file holds no byte-level BPE, or has more ids than `size`.
  """
  reading.check(
    tree,
    {
      "model": {
        "type?": str,
        "vocab": reading.Each(reading.Count()),
        "merges": list,
        "ignore_merges?": bool,
        "byte_fallback?": (bool, None),
        "continuing_subword_prefix?": (str, None),
        "end_of_word_suffix?": (str, None),
      },
      "added_tokens?": [{"id": reading.Count(), "content": str}],
      "pre_tokenizer": (dict, None),
    },
  )
  model = tree["model"]
  kind = model.get("type", "BPE")
  if kind != "BPE":
    raise ValueError(
      f"it is of the type {reading.shown(kind)}, and BPE on bytes is wanted"
    )
  words = _plain_words(tree["pre_tokenizer"])
  odd = [
    name
    for name in (
      "byte_fallback",
      "continuing_subword_prefix",
      "end_of_word_suffix",
    )
    if model.get(name)
  ]
  if odd or '"ByteLevel"' not in json.dumps(words):
    raise ValueError(
      f"its BPE is not on bytes ({odd[0] if odd else 'no ByteLevel'}), so a "
      "text would not come back as it was; take a tokenizer such as GPT-2's or "
      "Qwen's"
    )
  merges = [
    merge if isinstance(merge, str) else " ".join(map(str, merge))
    for merge in model["merges"]
  ]
  added = {
    token["content"]: token["id"] for token in tree.get("added_tokens", [])
  }
  named = {*model["vocab"].values(), *added.values()}
  if size and (most := max(named, default=0)) >= size:
    raise ValueError(
      f"it has the id {most:,}, and the model predicts {size:,} ids, which "
      "begin with 0: take the tokenizer of this model"
    )
  added |= {f"<|unused_{i}|>": i for i in range(size) if i not in named}
  return _made(
    words, model["vocab"], merges, added, model.get("ignore_merges", False)
  )


def of_document(tree: dict[str, Any]) -> tokenizers.Tokenizer:
  """Return the tokenizer of the JSON value of a state.

  Raises:
    ValueError: a value is missing, or has a wrong type.
  """
  reading.check(tree, _STATE)
  names = tree["vocabulary"]
  ids = {name: i for i, name in enumerate(names) if name is not None}
  return _made(
    tree["words"], ids, tree["merges"], tree["added"], tree["ignore_merges"]
  )


def _made(words, ids, merges=(), added=None, ignore_merges=False):
  """Return the tokenizer of the parts of a state.

  Args:
    words: the rule that divides a text into words: pre_tokenizer of the file.
    ids: id of every symbol, whose bytes are written as GPT-2 writes them.
    merges: pairs of symbols, as "a b".
    added: ids of marks, by their text.
    ignore_merges: whether a word that is a symbol is one token.
  """
  added = dict(added or {})
  V = 1 + max((*ids.values(), *added.values()), default=0)
  if V > _MOST_SYMBOLS or len({*ids.values()}) < len(ids):
    raise ValueError("its ids are too great, or two symbols have one id")
  names: list[str | None] = [None] * V
  symbols = [b""] * V
  for name, i in ids.items():
    names[i], symbols[i] = name, _bytes_of(name)
  for text, i in added.items():
    symbols[i] = symbols[i] or text.encode("utf-8", "replace")
  document = {
    "format_version": FORMAT_VERSION,
    "kind": "bpe",
    "added": added,
    "ignore_merges": ignore_merges,
    "merges": list(merges),
    "vocabulary": names,
    "words": words,
  }
  state = json.dumps(document, sort_keys=True).encode()
  table = tuple(symbols)

  def encode(text):
    try:
      (encoded,) = _encoder(state).encode_batch_fast(
        [text.decode()], add_special_tokens=False
      )
    except UnicodeDecodeError as error:
      raise tokenizers.UnknownSymbolError(error.start) from None
    # The library leaves out what it does not know, without a word.
    written = b"".join(map(table.__getitem__, encoded.ids))
    if written != text:
      raise tokenizers.UnknownSymbolError(_first_difference(written, text))
    return np.array(encoded.ids, np.int64)

  codec = tokenizers.Codec(
    "token", encode, functools.partial(_cuts, state), _ADVICE
  )
  return tokenizers.Tokenizer("bpe", table, codec, state)


def _plain_words(words):
  """Return a rule for words that adds no space before a text."""
  if isinstance(words, list):
    return [_plain_words(item) for item in words]
  if not isinstance(words, dict):
    return words
  plain = {name: _plain_words(item) for name, item in words.items()}
  if plain.get("type") == "ByteLevel":
    plain = WORDS | {"use_regex": plain.get("use_regex", True)}
  return plain


def whole(state: bytes) -> dict[str, Any]:
  """Return the value of a `tokenizer.json` for a state, without marks."""
  document = json.loads(state)
  names = document["vocabulary"]
  model = {
    "type": "BPE",
    "ignore_merges": document["ignore_merges"],
    "vocab": {name: i for i, name in enumerate(names) if name is not None},
    "merges": [merge.split(" ", 1) for merge in document["merges"]],
  }
  return {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": document["words"],
    "model": model,
  }


@functools.lru_cache(maxsize=4)
def _encoder(state):
  """Return the library's tokenizer of a state."""
  library = _library()
  try:
    return library.Tokenizer.from_str(json.dumps(whole(state)))
  except Exception as error:  # The library raises plain exceptions.
    raise tokenizers.TokenizerError(
      f"bpe: the library tokenizers refuses the tokenizer: {error}"
    ) from error


@functools.lru_cache(maxsize=4)
def _cuts(state):
  """Return the places where a text may be cut; see tokenizers.Codec."""
  rule = _encoder(state).pre_tokenizer

  def words(text):
    return [word for word, _ in rule.pre_tokenize_str(text)]

  def holds(lefts, between, rights, after):
    return all(
      words(left + between) + words(after + right)
      == words(left + between + after + right)
      for left in lefts
      for right in rights
    )

  if rule is None:
    return None
  patterns = [_AFTER_LINE] * holds(_LEFT_LINE, "\n", _RIGHT_LINE, "")
  patterns += [_BEFORE_SPACE] * holds(_LEFT, "", _RIGHT, " ")
  return re.compile("|".join(patterns)) if patterns else None


def _library():
  """Return the library.

  Raises:
    TokenizerError: it is not installed.
  """
  try:
    import tokenizers as library  # An extra that is not always installed.
  except ImportError:
    raise tokenizers.TokenizerError(_MISSING) from None
  return library


def _first_difference(written, text):
  """Return the first offset at which two texts differ."""
  size = min(len(written), len(text))
  differs = np.frombuffer(written[:size], np.uint8) != np.frombuffer(
    text[:size], np.uint8
  )
  return int(differs.argmax()) if differs.any() else size


def _bytes_of(name):
  """Return the bytes of a symbol that is written as GPT-2 writes it."""
  table = byte_of_character()
  try:
    return bytes(table[character] for character in name)
  except KeyError:  # A mark in plain text.
    return name.encode("utf-8", "replace")


@functools.cache
def byte_of_character() -> dict[str, int]:
  """Return GPT-2's table from characters to bytes.

  Printable bytes stand for themselves. The others are the characters from
  U+0100 on, in their order.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  table = {chr(byte): byte for byte in printable}
  return table | {chr(256 + i): byte for i, byte in enumerate(others)}
