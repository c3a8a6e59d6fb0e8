"""The identity of a run: one list, compared in one place.

  fields     of the config that bind a checkpoint ("model") or a run ("run"):
             model, tokenizer, optimizer, orders, batches, seed, validation
  text       sha256 of every split that the run reads
  tokenizer  sha256 of its state, unless the config fixes it
  switches   JAX's switches that random numbers depend on

Training refuses every difference, before it says that a run is finished and
before it resumes one. Evaluation, generation and scoring refuse another model.
They only warn of another text and of other switches, because a model may well
be evaluated on another text.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, corpora, tokenizers
from aoarm_jax.devices import switches
from aoarm_jax.runs import manifest, patience

# training/resuming.py compares this field.
_STEPS = "config.train.steps"


class Difference(NamedTuple):
  """One thing that differs between a checkpoint and this start.

  Attributes:
    kind: "field", "tokenizer", "text" or "switch".
    name: the field, the split, or the environment variable of the switch.
    then: the value of the checkpoint. A text and a tokenizer are their sha256.
    now: the value of this start.
  """

  kind: str
  name: str
  then: Any
  now: Any


def record(text: dict[str, str], tokenizer: str = "") -> dict[str, Any]:
  """Return what a checkpoint records besides the config, as JSON.

  Args:
    text: sha256 of every split that the run reads, by the split's name.
    tokenizer: sha256 of the tokenizer's state; "" if the config fixes it.
  """
  symbols = {"tokenizer": tokenizer} if tokenizer else {}
  return {"text": text, "switches": switches.streams()} | symbols


def read_text(
  data: config_lib.Data, tokenizer: tokenizers.Tokenizer, *splits: str
) -> corpora.Corpus:
  """Read some splits of the text of a config, and log what was read.

  Args:
    data: the config's section.
    tokenizer: the tokenizer of the ids.
    *splits: names of the splits.

  Raises:
    DataError, ConfigError: see corpora.load and Corpus.split.
  """
  with patience.waiting("reading the text"):
    corpus = corpora.of_config(data, tokenizer)
    description = corpus.describe(*splits)  # This reads the splits.
  logging.info("text: %s", description)
  return corpus


def config_of(saved: manifest.Saved) -> config_lib.Config:
  """Return the config that a checkpoint was saved with.

  Raises:
    CheckpointError: the checkpoint holds no config of this program.
  """
  try:
    return config_lib.from_json(saved.config_json)
  except config_lib.ConfigError as error:
    raise manifest.CheckpointError(
      f"checkpoint step {saved.step}: its manifest has no config that this "
      f"program can read: {error}; use the release that wrote it"
    ) from error


def text_of(corpus: corpora.Corpus, *splits: str) -> dict[str, str]:
  """Return the sha256 of some splits by their names."""
  return {name: corpus.hash(name) for name in sorted({*splits})}


def differences(
  saved: manifest.Saved,
  config: config_lib.Config | None = None,
  text: dict[str, str] | None = None,
  tokenizer: str | None = None,
) -> Iterator[Difference]:
  """Yield what differs between a checkpoint and this start.

  Values that the checkpoint does not record are not compared.

  Args:
    saved: the checkpoint.
    config: the config of this start. None compares no fields.
    text: sha256 of the splits that are read now. None compares no text.
    tokenizer: sha256 of the tokenizer's state now; "" if the config fixes it.
      None compares no tokenizer.
  """
  if config is not None:
    before = config_of(saved)
    for field in config_rules.differences(before, config, ("model", "run")):
      yield Difference("field", *field)
  symbols = saved.data_state.get("tokenizer", "")
  if tokenizer is not None and symbols != tokenizer:
    yield Difference("tokenizer", "config.data.tokenizer", symbols, tokenizer)
  then = saved.data_state.get("switches", {})
  for name, now in switches.streams().items():
    if then.get(name, now) != now:
      yield Difference("switch", name.upper(), then[name], now)
  recorded = saved.data_state.get("text", {})
  for split, sha256 in (text or {}).items():
    if recorded.get(split, sha256) != sha256:
      yield Difference("text", split, recorded[split], sha256)


def check_same_run(
  saved: manifest.Saved,
  config: config_lib.Config,
  text: dict[str, str],
  workdir: epath.Path,
  tokenizer: str = "",
) -> None:
  """Check that this start is of the run that stands in `workdir`.

  train.steps is not compared here, see training/resuming.py.

  Args:
    saved: the newest checkpoint there.
    config: the config of this start.
    text: sha256 of the splits that are read now.
    workdir: run directory.
    tokenizer: sha256 of the tokenizer's state; "" if the config fixes it.

  Raises:
    ConfigError: something differs. The message names the value, what stands in
      the directory, and how to choose another directory.
  """
  before = config_of(saved)
  stands = (
    f"the run in {workdir} (step {saved.step:,} of {before.train.steps:,})"
  )
  for kind, name, then, now in differences(saved, config, text, tokenizer):
    if name == _STEPS:
      continue
    what = f"{name}={now!r}: {stands} has {then!r}"
    if kind == "switch":
      what += ", and the same seed would draw other numbers"
    if kind == "tokenizer":
      what = (
        f"{name}={config.data.tokenizer!r}: its symbols are not those of "
        f"{stands} (sha256 {now[:12]} now, {then[:12]} then)"
      )
    if kind == "text":
      what = (
        f"config.data.path={config.data.path!r}: the {name} text is not that "
        f"of {stands}, {other_text(before, config)} (sha256 {now[:12]} now, "
        f"{then[:12]} then)"
      )
    raise config_lib.ConfigError(
      f"{what}; set it back, or choose another --workdir, as in "
      f"--workdir={another(workdir)}"
    )


def other_text(before: config_lib.Config, config: config_lib.Config) -> str:
  """Return why a text may differ from a run's, as the end of a sentence.

  Args:
    before: the config of the run.
    config: the config of this start. It reads another text.
  """
  differing = [
    f"config.data.{name}={value!r}"
    for name in ("corpus", "path", "documents", "lines", "normalise")
    if (value := getattr(before.data, name)) != getattr(config.data, name)
  ]
  if differing:
    return f"which has {' and '.join(differing)}"
  return (
    "which has the same config.data: the text has changed since, or it begins "
    "with a byte order mark, which earlier versions took for text"
  )


def is_same_run(
  saved: manifest.Saved,
  config: config_lib.Config,
  text: dict[str, str],
  tokenizer: str = "",
) -> bool:
  """Return whether this run can have saved a checkpoint.

  Args:
    saved: the checkpoint.
    config: the config of this run. Its number of steps may have changed.
    text: sha256 of the splits that are read now.
    tokenizer: sha256 of the tokenizer's state; "" if the config fixes it.
  """
  found = differences(saved, config, text, tokenizer)
  return all(difference.name == _STEPS for difference in found)


def another(workdir: epath.Path) -> epath.Path:
  """Return a directory beside `workdir` that does not exist."""
  if workdir.name in ("", "..") and "://" not in str(workdir):
    # A path such as "." has no name that others could be made of.
    workdir = epath.Path(os.path.abspath(workdir))
  names = (f"{workdir.name}-{n}" for n in itertools.count(2))
  return next(
    path for name in names if not (path := workdir.parent / name).exists()
  )


def check_same_model(
  saved: manifest.Saved, config: config_lib.Config, workdir: epath.Path
) -> None:
  """Check that a config can read the parameters of a checkpoint.

  Other switches of random numbers are logged as a warning.

  Args:
    saved: the checkpoint.
    config: the config of this start.
    workdir: run directory.

  Raises:
    ConfigError: the checkpoint has another model, and the message names the
      field.
  """
  before = config_of(saved)
  for path, old, new in config_rules.differences(before, config, ("model",)):
    raise config_lib.ConfigError(
      f"{path}={new!r}: the checkpoint in {workdir} has {old!r}; it is of "
      "another model: set the field to its value, or name another --workdir"
    )
  for _, name, then, now in differences(saved):
    logging.warning(
      "%s=%r: the checkpoint in %s was trained with %r; the same seeds draw "
      "other orders and texts",
      name,
      now,
      workdir,
      then,
    )


def check_same_symbols(
  saved: manifest.Saved,
  config: config_lib.Config,
  tokenizer: str,
  field: str,
  source: epath.Path,
) -> None:
  """Check that a checkpoint of another run has the symbols of this run.

  Args:
    saved: the checkpoint.
    config: the config of this start.
    tokenizer: sha256 of the tokenizer's state; "" if the config fixes it.
    field: the field of the config that names the other run, for messages.
    source: the run directory of the other run.

  Raises:
    ConfigError: the symbols differ. The message says how to take the others.
  """
  for kind, name, then, now in differences(saved, tokenizer=tokenizer):
    if kind == "tokenizer":
      raise config_lib.ConfigError(
        f"{name}={config.data.tokenizer!r}: its symbols are not those of "
        f"{field}={source} (sha256 {now[:12]} and {then[:12]}): take the "
        f"{alphabets.FILE} of that run, as in --config.data.tokenizer_file="
        f"{source / alphabets.FILE}"
      )


def warn_other_text(
  saved: manifest.Saved, corpus: corpora.Corpus, split: str
) -> None:
  """Log a warning if a split is not the text that the run read.

  This is no error: a model may be evaluated on any text.

  Args:
    saved: the checkpoint.
    corpus: the text that is read now.
    split: name of the split to compare.
  """
  if split not in saved.data_state.get("text", {}):
    logging.info(
      "the checkpoint does not record the %s text: this text is not compared "
      "with the run's",
      split,
    )
  for kind, _, then, now in differences(saved, text=text_of(corpus, split)):
    if kind == "text":
      logging.warning(
        "the %s text is not the checkpoint's (sha256 %s now, %s then): numbers "
        "cannot be compared with that run's",
        split,
        now[:12],
        then[:12],
      )
