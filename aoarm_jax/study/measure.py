"""One cell: trained, evaluated, sampled and profiled; the files that it leaves.

  result.json   what was run, its likelihood and the hashes of the other files;
                written last: without it a cell is not done
  samples.npz   counts of the generated texts, and of real ones, see coherence
  windows.npz   nats of every evaluated window
  profile.npz   sums of attention, see profiles
  texts.jsonl   a few texts at some temperatures
  failed.json   of a cell that failed: why, and whether it is worth another try

Nothing else is kept of a cell: no parameters.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import time

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax import config as config_lib
from aoarm_jax import (
  evaluate,
  matching,
  run_dir,
  sharding,
  telemetry,
)
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, profiles
from aoarm_jax.study import programs as programs_lib

RESULT, FAILED = "result.json", "failed.json"
_SAMPLES = 104  # Sets these keys apart from training's.
_TELL_SECONDS = 15.0
_TEXTS = 2  # Kept of every third temperature.


def text_of(
  corpus: corpora.Corpus, config: config_lib.Config
) -> dict[str, str]:
  """The hashes of the splits that are trained on and evaluated."""
  return {
    name: corpus.hash(name) for name in sorted({"train", config.eval.split})
  }


class Lab:
  """The text, read once, and the programs; runs cells one after the other."""

  def __init__(
    self,
    config: config_lib.Config,
    corpus: corpora.Corpus,
    mesh: jax.sharding.Mesh,
    programs: programs_lib.Programs,
  ):
    self.study, self.corpus, self.mesh = config.study, corpus, mesh
    self.tokenizer, self.programs = corpus.tokenizer, programs
    self.text = text_of(corpus, config)

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """Characters of the splits that are trained on and evaluated."""
    return {name: len(self.corpus.split(name)) for name in self.text}

  @functools.cached_property
  def unigram_bits(self) -> float:
    """Entropy of a character by itself, in the training split."""
    share = np.bincount(self.corpus.split("train"))
    share = share[share > 0] / share.sum()
    return float(-(share * np.log2(share)).sum())

  @functools.cached_property
  def reference(self) -> coherence.Reference:
    tokens = self.corpus.split(self.study.vocabulary_split)
    return coherence.reference(
      tokens, self.tokenizer.to_bytes(tokens), self.study.ngram
    )

  def run(
    self, cell: cells_lib.Cell, config: config_lib.Config, folder: epath.Path
  ) -> dict:
    """Runs one cell and writes its files; returns what result.json holds.

    Raises:
      NonFiniteError: the loss is no number.
    """
    clock, start = {}, time.monotonic()
    programs = self.programs.of(config)
    with _timed(clock, "compile"):  # Those of evaluation, during training.
      for name in ("init", "train"):
        programs[name].result()
    with _timed(clock, "train"):
      params, curve, speed = self._train(config, programs)
    files = {}  # Written together: those of two runs never stand side by side.
    with _timed(clock, "evaluate"):
      estimate, files["windows.npz"] = self._evaluate(config, programs, params)
    # What the last step made of the parameters, no loss of training says.
    bits = {"bits/char": estimate["bits_per_char"]}
    telemetry.check_finite(config.train.steps, bits)
    with _timed(clock, "sample"):
      files |= self._sample(config, programs, params)
    if "profile" in programs:
      with _timed(clock, "profile"):
        files["profile.npz"] = self._profile(config, programs, params)
    clock["all"] = time.monotonic() - start
    result = {
      "cell": dataclasses.asdict(cell),
      "estimate": estimate,
      "parameters": matching.parameters(config.model, self.tokenizer.V),
      "training_flops": matching.training_flops(config, self.tokenizer.V),
      "tokens_per_second": speed,
      "training_nats_per_token": curve,
      "seconds": {name: round(x, 2) for name, x in clock.items()},
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "text": self.text,
      "text_characters": self.sizes,
      "unigram_bits": self.unigram_bits,
      "files": {name: _hash(data) for name, data in files.items()},
      "config": dataclasses.asdict(
        # Where the text lay is no part of what was run.
        dataclasses.replace(config, data=config_lib.Data())
      ),
    }  # fmt: skip
    for name, data in files.items():
      run_dir.write_atomically(folder / name, data)
    _write_json(folder / RESULT, result)
    return result

  def _train(self, config, programs):
    """(parameters, nats per token along the way, tokens/s without the wait)."""
    step = programs["train"].result()
    state = programs["init"].result()(
      sharding.put(self.mesh, np.int32(config.seed))
    )
    batches = pipeline.train_batches(
      self.corpus.split("train"), T=config.model.T,
      batch_size=config.train.batch_size, seed=config.seed,
    )  # fmt: skip
    rate = sharding.put(
      self.mesh, np.float32(config.optimizer.peak_learning_rate)
    )
    losses, former, start = [], None, time.monotonic()
    told = start
    with contextlib.closing(batches):
      for n in range(config.train.steps):
        if time.monotonic() - told > _TELL_SECONDS:
          told = time.monotonic()
          left = (told - start) / n * (config.train.steps - n)
          logging.info(
            "  step %d/%d  loss %.4f nats/token  ETA of training %s",
            n, config.train.steps, losses[-1], telemetry.format_duration(left),
          )  # fmt: skip
        batch = sharding.put_batch(self.mesh, next(batches))
        state, sums = step(state, batch, rate)
        # Fetched one step late, so the device never waits.
        _note(losses, former)
        former = sums
      _note(losses, former)
    seconds = time.monotonic() - start
    tokens = config.train.batch_size * config.model.T * config.train.steps
    marks = np.linspace(0, len(losses), 51).astype(int)
    curve = [
      round(float(np.mean(losses[a:b])), 4)
      for a, b in itertools.pairwise(marks)
      if b > a
    ]
    return state.read_out_params, curve, round(tokens / seconds)

  def _evaluate(self, config, programs, params):
    """(what result.json says of it, windows.npz)."""
    program, split = programs["evaluate"].result(), config.eval.split
    batches = evaluate.evaluation_batches(
      config, self.corpus.split(split), self.mesh
    )
    seed = sharding.put(self.mesh, np.int32(config.eval.seed))
    nats, sums = evaluate.over_batches(
      functools.partial(program, params, seed), batches, self.mesh
    )
    found = evaluate.mean(
      config.eval.estimators[0], config.model.T, nats, sums
    ).report()
    report = {
      "estimator": found["estimator"],
      "split": split,
      "bits_per_char": found["bits_per_char"],
      "standard_error_bits": found["standard_error_bits"],
      "windows": found["sequences"],
    }
    if sums:
      curve = found["slot_curve_bits"]
      eighths = np.array_split(curve, min(8, len(curve)))
      report["bits_by_eighth"] = [float(part.mean()) for part in eighths]
      report |= {name: found[name] for name in ("by_distance", "by_recency")}
    return report, _npz(nats=nats)

  def _sample(self, config, programs, params):
    """samples.npz and texts.jsonl by their names."""
    program = programs["sample"].result()
    each = programs_lib.samples_per_temperature(config)
    at_once = programs_lib.rows_at_once(config)
    levels = programs_lib.temperatures(config.study)
    temperature = np.repeat(levels, each)
    pad = -len(temperature) % at_once
    padded = np.append(temperature, np.ones(pad, np.float32))
    texts = []
    for first in range(0, len(padded), at_once):
      seed, row, laws = sharding.put(
        self.mesh,
        (
          np.int32(_SAMPLES + 1000 * config.seed),
          np.int32(first),
          padded[first : first + at_once],
        ),
      )
      texts.append(jax.device_get(program(params, seed, row, laws)))
    tokens = np.concatenate(texts)[: len(temperature)]
    tokens = tokens.reshape(len(levels), each, -1).astype(np.uint8)
    counts = _npz(
      temperature=levels,
      counts=np.array([[self._count(x) for x in row] for row in tokens]),
      real=np.array([self._count(x) for x in self._real(config, each)]),
    )
    lines = (
      json.dumps(
        {"temperature": round(float(t), 3), "text": self.tokenizer.decode(x)}
      )
      for t, row in list(zip(levels, tokens))[::3]
      for x in row[:_TEXTS]
    )
    texts = "".join(line + "\n" for line in lines)
    return {"samples.npz": counts, "texts.jsonl": texts.encode()}

  def _count(self, tokens):
    text = self.tokenizer.to_bytes(tokens)
    return coherence.count(tokens, text, self.reference)

  def _real(self, config, count):
    """As many windows of real text, of a split that is not the reference."""
    split = "valid" if self.study.vocabulary_split == "train" else "train"
    batches = pipeline.eval_batches(
      self.corpus.split(split), T=config.model.T, batch_size=count,
      batches=1, seed=config.eval.seed,
    )  # fmt: skip
    tokens, real = batches[0]
    return tokens[real]

  def _profile(self, config, programs, params):
    """profile.npz."""
    batches = pipeline.eval_batches(
      self.corpus.split(config.eval.split), T=config.model.T,
      batch_size=config.study.profile_sequences, batches=1,
      seed=config.eval.seed,
    )  # fmt: skip
    batch = sharding.put(self.mesh, batches[0])
    sums = jax.device_get(programs["profile"].result()(params, *batch))
    return _npz(**profiles.to_arrays(*sums, config.model.kind))


def note_failure(folder: epath.Path, reason: str, again: bool) -> None:
  """Writes failed.json: `reason`, and whether another start tries again."""
  _write_json(folder / FAILED, {"reason": reason, "again": again})


@contextlib.contextmanager
def _timed(clock, name):
  start = time.monotonic()
  yield
  clock[name] = time.monotonic() - start
  logging.info("  %s: %.1f s", name, clock[name])


def _note(losses, sums):
  if sums is not None:
    sums = jax.device_get(sums)
    loss = float(sums["nats"] / sums["tokens"])
    telemetry.check_finite(len(losses) + 1, {"loss": loss})
    losses.append(loss)


def _write_json(path, value):
  run_dir.write_atomically(path, json.dumps(value, indent=1) + "\n")


def _npz(**arrays):
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)
  return data.getvalue()


def _hash(data):
  return hashlib.sha256(data).hexdigest()


def read_result(path: epath.Path) -> dict:
  """What a result.json or failed.json holds; DataError where it is damaged."""
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise _damaged(path, error) from None


def read_arrays(
  folder: epath.Path, name: str, result: dict
) -> dict[str, np.ndarray]:
  """The arrays of a cell's npz file by their names; {} if its run made none.

  Args:
    folder: of the cell.
    name: of the file.
    result: what its result.json holds.

  Raises:
    DataError: damaged, or of another run than result.json.
  """
  if "files" not in result:
    raise _damaged(folder / RESULT, "it names no files")
  if name not in result["files"]:
    return {}
  path = folder / name
  if not path.exists():
    raise _damaged(path, "it is not there")
  data = path.read_bytes()
  if _hash(data) != result["files"][name]:
    raise _damaged(path, f"it is not the one of {RESULT}")
  with np.load(io.BytesIO(data)) as file:
    return dict(file)


def _damaged(path, error):
  """The error of a cell's file that cannot be read."""
  return corpora.DataError(
    f"{path}: damaged ({error}); delete {path.parent}, and the study runs this "
    "cell again"
  )
