"""The text and its tokenizer."""

import dataclasses

from aoarm_jax.config.sections import fields


@dataclasses.dataclass(frozen=True)
class Data:
  """The text (aoarm_jax/data)."""

  corpus: str = fields.field(
    "auto",
    "kind of text; auto: the built-in books without data.path, text8 if "
    "data.path is a file, folder if data.path is a folder",
    choices=("auto", "books", "text8", "folder"),
  )
  path: str = fields.field(
    "", "file or folder of the text; '' means the built-in text"
  )
  tokenizer: str = fields.field(
    "char27",
    "symbols of the text; char27: a to z and space; byte: the bytes of any "
    "text; chars: the characters of the training split; bpe: parts of words "
    "that are learned from the training split, or those of data.tokenizer_file",
    choices=("char27", "byte", "chars", "bpe"),
    binds="model",
  )
  vocabulary: int = fields.field(
    0,
    "bpe: number of symbols, and 0 means 4096 or the number of an existing "
    "tokenizer; chars: greatest number of characters, and 0 means 1024",
    low=0,
    high=1_000_000,
  )
  tokenizer_file: str = fields.field(
    "",
    "bpe and chars: file of an existing tokenizer: a tokenizer.json of Hugging "
    "Face with BPE on bytes, or the tokenizer.json of a run or of a prepared "
    "text; '' means that the symbols are found in the training split",
  )
  documents: str = fields.field(
    "join",
    "how documents become sequences of T tokens; join: windows of all text, "
    "without marks between documents; stream: the same, with an end token "
    "after each document; pad: one document a sequence, cut or padded to T",
    choices=("join", "stream", "pad"),
    binds="model",
  )
  lines: bool = fields.field(
    False,
    "whether each line of a text file is a document, for --mode=prepare and "
    "for data.documents=stream and pad; a text file is else one document",
  )
  normalise: bool = fields.field(
    False,
    "bring the text, prompts and texts to score into the form of text8: "
    "letters become lower case, digits become words, and all else becomes "
    "single spaces",
  )
  largest_megabytes: int = fields.field(
    0,
    "largest text that is read, in 10^6 bytes after unpacking; 0 means half of "
    "the memory",
    low=0,
  )
  workers: int = fields.field(
    0,
    "number of loader processes, and 0 means that a thread loads; for "
    "--mode=prepare the number of processes that encode, and 0 means one for "
    "each CPU",
    low=0,
  )
  text_field: str = fields.field(
    "text",
    "where documents are read, as by --mode=prepare: name of the text in the "
    "objects of JSON lines, and of the column in Parquet files",
  )
  held_out_share: float = fields.field(
    0.01,
    "where documents are read, as by --mode=prepare: share of the documents "
    "that go to the split valid, and as many to test, where no file is named "
    "after a split; the hash of a document decides",
    low=0.0,
    high=0.4,
  )
