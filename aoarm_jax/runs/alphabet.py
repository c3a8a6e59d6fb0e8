"""The tokenizer of a run: where it comes from, and how it stays the same.

A fixed tokenizer is named by the config. The state of any other tokenizer lies
in every checkpoint, and its sha256 in the checkpoint's record. So a run is read
and resumed without the file or the text that its tokenizer came from.
"""

import hashlib

from absl import logging
from etils import epath

from aoarm_jax.config import paths, reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, configured, corpora, tokenizers
from aoarm_jax.runs import exported, manifest, patience, places
from aoarm_jax.runs import steps as steps_lib


def of_start(
  config: config_lib.Config, workdir: epath.Path
) -> tokenizers.Tokenizer:
  """Return the tokenizer that a training run starts or goes on with.

  It comes from the prepared text, from config.data.tokenizer_file, from the
  newest checkpoint in the run directory, from that of config.train.start_from
  or config.train.distill, or from the training split: the first of these that
  there is.

  Args:
    config: the config of this start.
    workdir: run directory.

  Raises:
    CheckpointError: config.train.start_from names no trained run.
    DataError: the text or the file is missing or wrong, or the tokenizer is not
      the one that the config asks for.
  """
  data = config.data
  _check_source(config, workdir)
  prepared = configured.prepared(data)
  if tokenizers.is_fixed(data.tokenizer):
    return tokenizers.get(data.tokenizer)
  if prepared is not None:
    return _asked(prepared.tokenizer, data, f"config.data.path={data.path}")
  saved = _newest(workdir)
  if data.tokenizer_file and not (saved and not _exists(data.tokenizer_file)):
    return _asked(alphabets.of_file(data), data, _file(data))
  if saved:
    return _asked(saved, data, f"the run in {workdir}")
  for field in ("start_from", "distill"):
    if name := getattr(config.train, field):
      source = places.find(name, f"config.train.{field}")
      if saved := _newest(source):
        return _asked(saved, data, f"config.train.{field}={source}")
  with patience.waiting(f"finding the symbols of {data.tokenizer}"):
    made = corpora.learn(data)
  logging.info(
    "tokenizer: %s, %s symbols from the training text (sha256 %s)",
    made.name,
    f"{made.V:,}",
    made.sha256[:12],
  )
  return made


def _check_source(config, workdir):
  """Raise CheckpointError where the run to start from is none.

  It would be noticed later, but only after the text is read.
  """
  if not config.train.start_from or _finished(workdir):
    return
  source = places.find(config.train.start_from, "config.train.start_from")
  if source == workdir or exported.is_export(source):
    return
  if not _finished(source):
    raise manifest.CheckpointError(
      f"no checkpoint in {source / 'checkpoints'}: name a trained run with "
      "--config.train.start_from"
    )


def _finished(workdir):
  return steps_lib.Steps(workdir / "checkpoints").finished()


def of_run(
  config: config_lib.Config, workdir: epath.Path
) -> tokenizers.Tokenizer:
  """Return the tokenizer of a trained run, for texts that a user gives.

  Args:
    config: the config of the run.
    workdir: run directory.

  Raises:
    CheckpointError: there is no checkpoint that holds it.
    DataError: it is not the one that the config asks for.
  """
  if tokenizers.is_fixed(config.data.tokenizer):
    return tokenizers.get(config.data.tokenizer)
  if found := _newest(workdir):
    return _asked(found, config.data, f"the run in {workdir}")
  raise manifest.CheckpointError(
    f"no checkpoint with the tokenizer of the run in {workdir}: train first, "
    "or name the run with --workdir"
  )


def of_state(
  state: bytes, config: config_lib.Config, workdir: epath.Path
) -> tokenizers.Tokenizer:
  """Return the tokenizer of a checkpoint.

  Args:
    state: the state in the checkpoint; b"" if there is none.
    config: the config of this start.
    workdir: run directory, for messages.

  Raises:
    DataError: the state is no tokenizer, or the config asks for another.
  """
  if not state:
    return tokenizers.get(config.data.tokenizer)
  found = alphabets.of_state(state, f"the checkpoint in {workdir}")
  return _asked(found, config.data, f"the run in {workdir}")


def _asked(found, data, where):
  """Return the tokenizer of a place, if the config asks for no other."""
  if found.name != data.tokenizer:
    raise tokenizers.TokenizerError(
      f"config.data.tokenizer={data.tokenizer!r}: {where} has the symbols of "
      f"{found.name!r}: set --config.data.tokenizer={found.name}"
    )
  if data.tokenizer_file and _exists(data.tokenizer_file):
    given = alphabets.of_file(data)
    if given.sha256 != found.sha256:
      raise tokenizers.TokenizerError(
        f"{_file(data)}: not the tokenizer of {where} (sha256 "
        f"{given.sha256[:12]} and {found.sha256[:12]}): leave the field out, "
        "or name another --workdir or --config.data.path"
      )
  asked = data.vocabulary
  fits = asked == found.V or (found.name == "chars" and asked > found.V)
  if asked and not fits:
    raise tokenizers.TokenizerError(
      f"config.data.vocabulary={data.vocabulary}: {where} has {found.V:,} "
      f"symbols: set --config.data.vocabulary={found.V}, or leave the field out"
    )
  return found


def _newest(workdir):
  """Return the tokenizer of the newest checkpoint that has it whole, or None.

  Whoever reads the checkpoint itself compares all its files. The folder may be
  that of an exported model.
  """
  if exported.is_export(workdir):
    source = exported.Exported(workdir)
    state = source.tokenizer(source.saved)
    return alphabets.of_state(state, str(workdir)) if state else None
  steps = steps_lib.Steps(workdir / "checkpoints")
  for step in reversed(steps.finished()):
    try:
      wanted = steps.record(step)["data_state"].get("tokenizer", "")
      state = reading.read(
        steps.at(step) / alphabets.FILE,
        reading.JSON_BYTES,
        inside=steps.at(step),
      )
    except (OSError, reading.ReadError, manifest.BrokenError):
      continue
    if wanted and hashlib.sha256(state).hexdigest() == wanted:
      return alphabets.of_state(state, str(steps.at(step)))
  return None


def _exists(path):
  return paths.of(path, "config.data.tokenizer_file").exists()


def _file(data):
  return f"config.data.tokenizer_file={data.tokenizer_file}"
