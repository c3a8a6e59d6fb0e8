"""The tokenizer that a config names, as far as it is known without a text."""

from aoarm_jax.config import paths
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, shards, tokenizers


def prepared(data: config_lib.Data) -> shards.Index | None:
  """Return the index of the prepared text that a config names, or None.

  Args:
    data: the section of the config.

  Raises:
    DataError: the prepared text is not finished, or its index is damaged.
    ConfigError: the path is an address that cannot be read, see paths.of.
  """
  if not data.path:
    return None
  folder = paths.of(data.path, "config.data.path")
  try:
    is_prepared = shards.is_prepared(folder)
  except (ImportError, OSError):  # corpora.load says what is wrong.
    return None
  return shards.read_index(folder) if is_prepared else None


def with_end(
  data: config_lib.Data, tokenizer: tokenizers.Tokenizer
) -> tokenizers.Tokenizer:
  """Return a tokenizer with the end of a document, if config.data asks for it.

  Args:
    data: the section of the config.
    tokenizer: the tokenizer, with such a token or without.
  """
  has_end = data.documents != "join"
  return tokenizers.with_end(tokenizer) if has_end else tokenizer


def tokenizer(data: config_lib.Data) -> tokenizers.Tokenizer:
  """Return the tokenizer of a config; no text is read.

  Where the symbols are to be found in a text, a stand-in of their number takes
  its place, which cannot encode. It serves where only the shapes of a model
  matter, as in --mode=compile. For chars it has the greatest number.

  Args:
    data: the section of the config.

  Raises:
    DataError: config.data.tokenizer_file or the prepared text is wrong.
  """
  return with_end(data, _without_end(data))


def _without_end(data):
  """Return the tokenizer of a config, as its text or file has it."""
  if tokenizers.is_fixed(data.tokenizer):
    return tokenizers.get(data.tokenizer)
  if data.tokenizer_file:
    return alphabets.of_file(data)
  if index := prepared(data):
    return index.tokenizer

  def refuse(_):
    raise tokenizers.TokenizerError(
      f"config.data.tokenizer={data.tokenizer}: the symbols are known only "
      "with a run, a text or a file"
    )

  auto = alphabets.MOST_CHARS
  if data.tokenizer == "bpe":
    auto = alphabets.LEARNED
  codec = tokenizers.Codec("token", refuse, lambda: None, "")
  symbols = (b"",) * (data.vocabulary or auto)
  return tokenizers.Tokenizer(data.tokenizer, symbols, codec)
