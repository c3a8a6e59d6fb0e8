"""Tokenizers in the form that other programs read: tokenizer.json."""

import json
from typing import Any

from aoarm_jax.data import bpe, tokenizers

_PLAIN = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
_CHARACTERS = {
  "type": "Split",
  "pattern": {"Regex": r"[\s\S]"},
  "behavior": "Isolated",
  "invert": False,
}


def to_hugging_face(
  tokenizer: tokenizers.Tokenizer, bos: int, marks: dict[int, str]
) -> tuple[dict[str, Any], dict[int, str]]:
  """Return the value of a `tokenizer.json` of Hugging Face, and its marks.

  Args:
    tokenizer: the tokenizer.
    bos: the id that the file puts before every text.
    marks: the texts of ids that no text is encoded to, by their ids, where the
      tokenizer has no text for them.

  Returns:
    The value, and all marks by their ids.
  """
  if tokenizer.name == "bpe":
    whole = bpe.whole(tokenizer.state)
    added = json.loads(tokenizer.state)["added"]
    marks = marks | {i: name for name, i in added.items()}
  else:
    whole = _of_characters(tokenizer)
  whole["added_tokens"] = [
    {"id": i, "content": text, "special": True, **_PLAIN}
    for i, text in sorted(marks.items())
  ]
  first = marks.get(bos) or next(
    name for name, i in whole["model"]["vocab"].items() if i == bos
  )
  pieces = [
    {"SpecialToken": {"id": first, "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
  ]
  whole["post_processor"] = {
    "type": "TemplateProcessing",
    "single": pieces,
    "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {first: {"id": first, "ids": [bos], "tokens": [first]}},
  }
  whole["decoder"] = dict(bpe.WORDS)
  return whole, marks


def _of_characters(tokenizer):
  """Return a BPE on bytes without merges: each character is a word."""
  names = {byte: name for name, byte in bpe.byte_of_character().items()}
  symbols = tokenizer.symbols
  if isinstance(symbols, bytes):
    symbols = [bytes([byte]) for byte in symbols]
  ids = {
    "".join(names[byte] for byte in symbol): i
    for i, symbol in enumerate(symbols)
  }
  words = [_CHARACTERS, bpe.WORDS | {"use_regex": False}]
  return {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
    "model": {"type": "BPE", "ignore_merges": True, "vocab": ids, "merges": []},
  }
