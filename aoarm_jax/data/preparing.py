"""Prepare a text for training: documents become shards of tokens.

The files are read twice. The first pass checks and counts every document, and
the second pass encodes. One process reads and writes, and other processes
encode, so the shards are the same for any number of processes. A shard is whole
or absent. An interrupted preparing goes on with the shards that are missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, scanning, shards, tokenizers, workers
from aoarm_jax.data import writing as writing_lib

# Bytes of text in a shard, at least, except in the last one.
SHARD_BYTES = 1 << 26
_UNFINISHED = {
  "format_version": int,
  "plan": str,
  "tokenizer": str,
  "shards": [shards.SHARD],
}


@dataclasses.dataclass
class _Output:
  """The part of a split that has been read so far."""

  name: str
  documents: int = 0
  size: int = 0  # Bytes of text.
  characters: int = 0
  shards: list[str] = dataclasses.field(default_factory=list)
  in_shard: int = SHARD_BYTES  # Bytes of text; full at first.
  sha256: Any = dataclasses.field(default_factory=hashlib.sha256)

  def place(self, text: bytes, is_last: bool) -> str:
    """Count a piece, and return the name of its shard."""
    if self.in_shard >= SHARD_BYTES:
      number = len(self.shards)
      self.shards.append(f"{self.name}-{number:05d}.array_record")
      self.in_shard = 0
    self.in_shard += len(text)
    self.size += len(text)
    self.documents += is_last
    starts = np.frombuffer(text, np.uint8) & 0xC0 != 0x80
    self.characters += int(starts.sum())
    self.sha256.update(text)
    return self.shards[-1]


def prepare(
  data: config_lib.Data, out: epath.Path, progress: scanning.Progress
) -> dict[str, Any]:
  """Prepare the text of a config.

  Args:
    data: the section of the config.
    out: folder of the prepared text, local. It may hold an unfinished
      preparing of the same text, which goes on.
    progress: called now and then.

  Returns:
    The content of the index.

  Raises:
    DataError: a file is wrong, or the folder holds something else.
    OSError: a file cannot be written; names the file.
  """
  return _Maker(data, out, progress).run()


class _Maker:
  """The preparing of one text."""

  def __init__(self, data, out, progress):
    self._data, self._out, self._progress = data, out, progress
    self._documents = scanning.Documents(data, progress)
    self._scan = self._documents.scan
    self._plan = self._planned()
    self._done: dict[str, shards.Shard] = {}

  def run(self):
    """Do all that is missing; return the content of the index."""
    state = self._look()
    self._out.mkdir(parents=True, exist_ok=True)
    tokenizer = self._tokenizer(state)
    self._note(tokenizer.sha256)
    _write(self._out / "sources.tsv", self._scan.table)
    splits = self._encoded(tokenizer)
    index = shards.index_json(
      tokenizer, self._data.normalise, splits, self._plan, self._report()
    )
    _write(self._out / shards.INDEX, index)
    (self._out / shards.UNFINISHED).unlink(missing_ok=True)
    return json.loads(index)

  def _planned(self):
    """Return the sha256 of all that the shards depend on."""
    data = self._data
    given = self._documents.known.sha256 if data.tokenizer_file else ""
    facts = {
      "format_version": shards.FORMAT_VERSION,
      "sources": self._scan.table,
      "tokenizer": [data.tokenizer, data.vocabulary, given],
      "normalise": data.normalise,
      "text_field": data.text_field,
      "held_out_share": data.held_out_share,
      "sizes": [SHARD_BYTES, tokenizers.PIECE],
    }
    if data.lines:  # Without it the plan is that of earlier versions.
      facts["lines"] = True
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

  def _look(self):
    """Find the shards that are whole; return the state of their tokenizer.

    Raises:
      DataError: the folder holds something else.
    """
    out = self._out
    if not out.exists():
      return b""
    if not out.is_dir():
      raise tokenizers.DataError(f"--out={out}: is a file; name a folder")
    names = {file.name for file in out.iterdir()}
    for name in names:
      if name.startswith(".") and name.endswith(".tmp"):
        (out / name).unlink(missing_ok=True)  # Of a process that was killed.
    if all(name.startswith(".") for name in names):
      return b""
    tree = self._listed(names)
    for entry in tree["shards"]:
      shard = shards.Shard(**{name: entry[name] for name in shards.SHARD})
      try:
        shards.check_shard(out, shard)
        self._done[shard.name] = shard
      except tokenizers.DataError as error:
        logging.warning("%s", str(error).partition(";")[0])
    return self._state(tree["tokenizer"])

  def _listed(self, names):
    """Return what the folder says about its shards.

    Args:
      names: names of its files.
    """
    out = self._out
    is_unfinished = shards.UNFINISHED in names
    path = out / (shards.UNFINISHED if is_unfinished else shards.INDEX)
    if path.name not in names:
      raise tokenizers.DataError(
        f"--out={out}: is not empty, and holds no prepared text: name another "
        "folder"
      )
    try:
      raw = reading.read(path, reading.JSON_BYTES, inside=out)
      if is_unfinished:
        tree = reading.parse(raw, _UNFINISHED)
      else:
        tree = reading.parse(raw, {"plan": str, **shards.INDEX_TYPES})
        every = [s["shards"] for s in tree["splits"].values()]
        tree["shards"] = [shard for part in every for shard in part]
        tree["tokenizer"] = tree["tokenizer"]["sha256"]
    except (OSError, ValueError) as error:
      raise tokenizers.DataError(
        f"{path}: damaged, or of another version: {error}: delete the folder, "
        "or name another --out"
      ) from None
    if tree["plan"] != self._plan:
      raise tokenizers.DataError(
        f"--out={out}: holds a text that was prepared from other files or with "
        "other options: name another folder, or delete this one"
      )
    return tree

  def _state(self, sha256):
    """Return the state of the tokenizer in the folder; b"" if there is none."""
    path = self._out / alphabets.FILE
    if not sha256:
      return b""
    try:
      state = reading.read(path, reading.JSON_BYTES, inside=self._out)
    except (OSError, reading.ReadError):
      state = b""
    if hashlib.sha256(state).hexdigest() == sha256:
      return state
    logging.warning("%s: damaged, so it is made anew", path)
    return b""

  def _tokenizer(self, state):
    """Return the tokenizer of the shards; write its state."""
    if not self._documents.known.state and tokenizers.is_fixed(
      self._data.tokenizer
    ):
      return self._documents.known
    if self._data.tokenizer_file:
      made = self._documents.known
    elif state:
      made = alphabets.of_state(state, str(self._out / alphabets.FILE))
    else:
      self._note("")  # From here on the folder says whose it is.
      made = alphabets.learn(self._data, self._documents.training())
    _write(self._out / alphabets.FILE, made.state)
    return made

  def _note(self, tokenizer):
    """Write which shards are done.

    Args:
      tokenizer: sha256 of the tokenizer's state; "" if it has none yet.
    """
    done = [dataclasses.asdict(self._done[name]) for name in sorted(self._done)]
    tree = {
      "format_version": shards.FORMAT_VERSION,
      "plan": self._plan,
      "tokenizer": tokenizer,
      "shards": done,
    }
    _write(self._out / shards.UNFINISHED, json.dumps(tree, indent=1) + "\n")

  def _encoded(self, tokenizer):
    """Write the shards that are not done; return all splits."""
    outputs = {name: _Output(name) for name in scanning.SPLITS}
    writing: dict[str, writing_lib.Writer] = {}
    skipped, done = frozenset(self._done), 0

    def say(piece):
      nonlocal done
      done += len(piece.text)
      self._progress("encoding", done, self._scan.bytes)

    def missing():
      for piece in self._pieces(tokenizer, outputs):
        if piece.shard in skipped:
          say(piece)
        else:
          yield piece

    def finish(split):
      shard = writing[split].finish()
      del writing[split]
      self._done[shard.name] = shard
      self._note(tokenizer.sha256)

    with contextlib.ExitStack() as stack:
      stack.callback(_abandon, writing)
      encoded = workers.encoded(
        tokenizer, missing(), self._data.workers or os.cpu_count() or 1
      )
      for piece, ids in stack.enter_context(contextlib.closing(encoded)):
        split = piece.split
        if split in writing and writing[split].name != piece.shard:
          finish(split)
        if split not in writing:
          writing[split] = writing_lib.Writer(self._out, piece.shard)
        record = writing_lib.to_record(ids, piece.is_last)
        writing[split].write(record, len(ids))
        say(piece)
      for split in [*writing]:
        finish(split)
    if sum(output.size for output in outputs.values()) != self._scan.bytes:
      raise tokenizers.DataError(
        f"config.data.path={self._data.path}: the files have changed while "
        "they were read: start the same command again"
      )
    return {
      name: self._split(output)
      for name, output in outputs.items()
      if output.documents
    }

  def _pieces(self, tokenizer, outputs):
    """Yield all pieces of all documents, each with its place."""
    between_characters = tokenizer.codec is not None
    for split, name, chunks in self._documents.splits(between_characters):
      before, former = 0, None
      for text in tokenizer.pieces(chunks):
        if former is not None:
          yield self._placed(outputs[split], name, before, former, False)
          before += len(former)
        former = text
      if former is not None:
        yield self._placed(outputs[split], name, before, former, True)

  def _placed(self, output, name, before, text, is_last):
    """Return a piece with its place."""
    shard = output.place(text, is_last)
    return workers.Piece(output.name, shard, is_last, name, before, text)

  def _split(self, output):
    """Return the entry of a split in the index."""
    entries = tuple(self._done[name] for name in output.shards)
    return shards.Split(
      documents=output.documents,
      tokens=sum(shard.tokens for shard in entries),
      bytes=output.size,
      characters=output.characters,
      sha256=output.sha256.hexdigest(),
      shards=entries,
    )

  def _report(self):
    """Return what the index says for people."""
    scan = self._scan
    return {
      "files": scan.table.count("\n") - 1,
      "documents": scan.documents,
      "bytes": scan.bytes,
      "sources_sha256": hashlib.sha256(scan.table.encode()).hexdigest(),
      "empty_documents": scan.empty,
      "first_empty_document": scan.first_empty,
      "documents_that_repeat_another": scan.duplicates,
      "longest_documents": [
        {"name": name, "bytes": size} for size, name in scan.longest
      ],
    }


def _abandon(writing):
  """Delete the temporary files of shards that are not finished."""
  for writer in writing.values():
    writer.abandon()


def _write(path, content):
  """Write a file that is whole at any moment."""
  data = content.encode() if isinstance(content, str) else content
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise OSError(error.errno, error.strerror, str(path)) from error
