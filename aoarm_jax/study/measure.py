"""One cell: trained, evaluated, sampled and profiled; the files that it leaves.

  result.json   what was run, its likelihood and the hashes of the other files;
                written last: without it a cell is not done
  samples.npz   counts of the generated texts, and of real ones, see coherence
  windows.npz   nats of every evaluated window
  profile.npz   sums of attention, see profiles
  texts.jsonl   a few texts at some temperatures
  training.npz  nats a token of every training step, with a trunk
  weights.npz   the last parameters, with config.study.keep_weights
  failed.json   of a cell that failed: why, and whether it is worth another try

A cell of a curve over budgets leaves its states beside these files while it
runs, see trunks.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.devices import sharding
from aoarm_jax.evaluation import averages, evaluate
from aoarm_jax.runs import disk, identity, telemetry
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, profiles, trunks
from aoarm_jax.study import programs as programs_lib
from aoarm_jax.tools import matching
from aoarm_jax.training import optimizer

RESULT, FAILED, WEIGHTS = "result.json", "failed.json", "weights.npz"
# The types of what is read back, see reading.check.
_RESULT_KINDS = {
  "cell?": {
    **dict.fromkeys(("mechanism", "size", "orders", "budget", "rate"), str),
    **dict.fromkeys(("T", "steps", "seed"), int),
    "changes?": str,
  },
  "config?": dict,
  "estimate?": {"bits_per_char": float},
  "files?": reading.Each(str),
  "text?": reading.Each(str),
  "unigram_bits?": float,
  "training_flops?": float,
  "steps_taken?": int,
}
_FAILED_KINDS = {"reason": str, "again": bool}
_MOST_ARRAYS = 1 << 34  # Bytes of an npz file.
_MOST_UNPACKED = 1 << 26
_TELL_SECONDS = 15.0
_TEXTS = 2  # Kept of every third temperature.


def text_of(
  corpus: corpora.Corpus, config: config_lib.Config
) -> dict[str, str]:
  """The hashes of the splits that are trained on and evaluated."""
  return identity.text_of(corpus, "train", config.eval.split)


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
    self.split = config.eval.split
    self.text = text_of(corpus, config)

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """Characters of the splits that are trained on and evaluated."""
    return {name: len(self.corpus.split(name)) for name in self.text}

  @functools.cached_property
  def unigram_bits(self) -> float:
    """Entropy of a character by itself, in the split that is evaluated."""
    return corpora.unigram_entropy(
      self.corpus.split(self.split), self.tokenizer.V
    )

  @functools.cached_property
  def reference(self) -> coherence.Reference:
    tokens = self.corpus.split(self.study.vocabulary_split)
    return coherence.reference(
      tokens, self.tokenizer.to_bytes(tokens), self.study.ngram
    )

  def run(
    self,
    cell: cells_lib.Cell,
    config: config_lib.Config,
    folder: epath.Path,
    keeper: trunks.Keeper | None = None,
    where: Callable[[epath.Path], epath.Path] = lambda folder: folder,
  ) -> dict:
    """Runs one cell and writes its files; returns what result.json holds.

    Args:
      cell: what is run.
      config: resolved, see cells.resolve.
      folder: of the cell's files.
      keeper: saves and restores its states; None: the run is not interrupted.
      where: returns the place of the folder at the end, see place.Place.of.

    Raises:
      NonFiniteError: the loss is no number.
      OutOfTimeError: the keeper's time is up; the state is saved.
      Stopped: a signal came, and the keeper saved the state.
    """
    clock: dict[str, float] = {}
    start = time.monotonic()
    programs = self.programs.of(config)
    with _timed(clock, "compile"):  # Those of evaluation, during training.
      for name in ("init", "train"):
        programs[name].result()
    with _timed(clock, "train"):
      state, losses, speed, taken = self._train(config, programs, keeper)
    # With a trunk the average lags behind the decay: the parameters count.
    params = state.params if keeper else state.read_out_params
    weights = {"": params} | ({"ema": state.ema} if keeper else {})
    files = {}  # Written together: those of two runs never stand side by side.
    with _timed(clock, "evaluate"):
      estimates, files["windows.npz"] = self._evaluate(
        config, programs, weights
      )
    estimate = estimates[0]
    # What the last step made of the parameters, no loss of training says.
    bits = {"bits/char": estimate["bits_per_char"]}
    telemetry.check_finite(config.train.steps, bits)
    if "sample" in programs:
      with _timed(clock, "sample"):
        files |= self._sample(config, programs, params)
    if "profile" in programs:
      with _timed(clock, "profile"):
        files["profile.npz"] = self._profile(config, programs, params)
    if keeper:
      files["training.npz"] = _npz(nats=np.float32(losses))
    if self.study.keep_weights:
      files[WEIGHTS] = _weights(params)
    clock["all"] = time.monotonic() - start
    result = {
      "cell": dataclasses.asdict(cell),
      "estimate": estimate,
      "estimates": estimates,
      "parameters": matching.parameters(config),
      "training_flops": matching.training_flops(config),
      "steps_taken": taken,
      "tokens_per_second": speed,
      "training_nats_per_token": _marks(losses),
      "last_training_bits": _last_bits(losses),
      "seconds": {name: round(x, 2) for name, x in clock.items()},
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "text": self.text,
      "text_characters": self.sizes,
      "unigram_bits": self.unigram_bits,
      "unigram_split": self.split,
      "files": {name: _hash(data) for name, data in files.items()},
      "config": dataclasses.asdict(
        # Where the text lay is no part of what was run.
        config.replace("data", config_lib.Data())
      ),
    }
    folder = where(folder)
    for name, data in files.items():
      disk.write_atomically(folder / name, data)
    _write_json(folder / RESULT, result)
    return result

  def _train(self, config, programs, keeper):
    """(state, nats per token of all steps, tokens/s, steps taken here)."""
    train_step, steps = programs["train"].result(), config.train.steps
    first, state, losses = self._start(config, programs, keeper)
    batches = pipeline.train_batches(
      self.corpus.split("train"),
      T=config.model.T,
      batch_size=config.train.batch_size,
      seed=config.seed,
    )
    batches.set_state({"next_batch": first})
    # Learning rates of all steps, float32 [steps].
    schedule = optimizer.schedule(config.optimizer, steps)
    rates = np.asarray(jax.jit(schedule)(np.arange(steps)), np.float32)
    former, start = None, time.monotonic()
    told = start
    with contextlib.closing(batches), keeper or contextlib.nullcontext():
      for n in range(first, steps):
        if keeper and keeper.due(n) and n > first:
          _note(losses, former)
          former = None
          keeper.save(n, state, losses)
        if time.monotonic() - told > _TELL_SECONDS:
          told = time.monotonic()
          left = (told - start) / (n - first) * (steps - n)
          logging.info(
            "  step %d/%d  loss %.4f nats/token  ETA of training %s",
            n,
            steps,
            losses[-1],
            telemetry.format_duration(left),
          )
        batch = sharding.put_batch(self.mesh, next(batches))
        rate = sharding.put(self.mesh, rates[n])
        state, sums = train_step(state, batch, rate)
        # Fetched one step late, so the device never waits.
        _note(losses, former)
        former = sums
      _note(losses, former)
    seconds = time.monotonic() - start
    tokens = config.train.batch_size * config.model.T * (steps - first)
    return state, losses, round(tokens / seconds), steps - first

  def _start(self, config, programs, keeper):
    """(steps taken, state, nats per token of these steps) to go on from."""
    restored = keeper and keeper.restore(self.programs.abstract_state(config))
    if restored:
      return restored
    seed = sharding.put(self.mesh, np.int32(config.seed))
    return 0, programs["init"].result()(seed), []

  def _evaluate(self, config, programs, weights):
    """(what result.json says of every estimator and weights, windows.npz)."""
    reports, arrays = [], {}
    batches = evaluate.evaluation_batches(
      self.programs.network(config), self.corpus.split(config.eval.split)
    )
    seed = sharding.put(self.mesh, np.int32(config.eval.seed))
    first = config.eval.estimators[0]
    for estimator in config.eval.estimators:
      program = programs[programs_lib.evaluate_name(estimator)].result()
      for name, params in weights.items():
        evaluated = evaluate.over_batches(
          functools.partial(program, params, seed), batches, self.mesh
        )
        assert evaluated is not None  # Nothing stops this evaluation.
        nats, sums = evaluated
        found = averages.mean(estimator, config.model.T, nats, sums)
        reports.append(
          _report(found.report(), config.eval.split)
          | ({"weights": name} if name else {})
        )
        words = [estimator] * (estimator != first) + [name] * bool(name)
        suffix = "_".join(["", *words])
        arrays[f"nats{suffix}"] = nats
        if len(weights) > 1 and sums:
          arrays[f"slots{suffix}"] = np.asarray(
            found.slot_curve_nats, np.float32
          )
    return reports, _npz(**arrays)

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
          np.int32(config.seed),
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
    text = "".join(line + "\n" for line in lines)
    return {"samples.npz": counts, "texts.jsonl": text.encode()}

  def _count(self, tokens):
    text = self.tokenizer.to_bytes(tokens)
    return coherence.count(tokens, text, self.reference)

  def _real(self, config, count):
    """As many windows of real text, of a split that is not the reference."""
    split = "valid" if self.study.vocabulary_split == "train" else "train"
    batches = pipeline.eval_batches(
      self.corpus.split(split),
      T=config.model.T,
      batch_size=count,
      batches=1,
      seed=config.eval.seed,
    )
    tokens, real = batches[0]
    return tokens[real]

  def _profile(self, config, programs, params):
    """profile.npz."""
    batches = pipeline.eval_batches(
      self.corpus.split(config.eval.split),
      T=config.model.T,
      batch_size=config.study.profile_sequences,
      batches=1,
      seed=config.eval.seed,
    )
    batch = sharding.put(self.mesh, batches[0])
    earlier, last = jax.device_get(programs["profile"].result()(params, *batch))
    return _npz(**profiles.to_arrays(earlier, last, config.model.kind))


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


def _report(found, split):
  """Return the part of an estimate's report that result.json holds."""
  report = {
    "estimator": found["estimator"],
    "split": split,
    "bits_per_char": found["bits_per_char"],
    "standard_error_bits": found["standard_error_bits"],
    "windows": found["sequences"],
  }
  if curve := found["slot_curve_bits"]:
    eighths = np.array_split(curve, min(8, len(curve)))
    report["bits_by_eighth"] = [float(part.mean()) for part in eighths]
    report |= {name: found[name] for name in ("by_distance", "by_recency")}
  return report


def _marks(losses):
  """Means of 50 equal parts of a run, nats per token."""
  marks = np.linspace(0, len(losses), 51).astype(int)
  return [
    round(float(np.mean(losses[a:b])), 4)
    for a, b in itertools.pairwise(marks)
    if b > a
  ]


def _last_bits(losses):
  """Mean of the last 2% of a run, bits per token."""
  last = losses[-max(1, round(0.02 * len(losses))) :]
  return float(np.mean(last) / np.log(2))


def _weights(params):
  """weights.npz: names as in "blocks/attention/query", bfloat16 as uint16."""
  arrays = {
    _name_of(path): np.asarray(leaf, jnp.bfloat16).view(np.uint16)
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(params))
  }
  return _npz(**arrays)


def _name_of(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _write_json(path, value):
  disk.write_atomically(path, disk.to_json(value, indent=1) + "\n")


def _npz(**arrays):
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)
  return data.getvalue()


def _hash(data):
  return hashlib.sha256(data).hexdigest()


def read_result(path: epath.Path) -> dict:
  """What a result.json or failed.json holds; DataError where it is damaged."""
  kinds = _RESULT_KINDS if path.name == RESULT else _FAILED_KINDS
  try:
    data = reading.read(path, reading.JSON_BYTES, inside=path.parent)
    return reading.parse(data, kinds)
  except reading.ReadError as error:
    raise _damaged(path, error.reason) from None
  except (OSError, ValueError) as error:
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
  try:
    data = reading.read(path, _MOST_ARRAYS, inside=folder)
  except reading.ReadError as error:
    raise _damaged(path, error.reason) from None
  except OSError as error:
    raise _damaged(path, error.strerror) from None
  if _hash(data) != result["files"][name]:
    raise _damaged(path, f"it is not the one of {RESULT}")
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      unpacked = sum(file.file_size for file in archive.infolist())
    if unpacked > max(_MOST_UNPACKED, 16 * len(data)):
      raise ValueError(f"{len(data):,} bytes that unpack to {unpacked:,}")
    with np.load(io.BytesIO(data)) as file:
      return dict(file)
  except (*(EOFError, KeyError, OSError, ValueError), zipfile.BadZipFile) as e:
    raise _damaged(path, e) from None


def read_weights(folder: epath.Path, result: dict, abstract: Any) -> Any:
  """Return the last parameters of a cell, in float32.

  Args:
    folder: of the cell.
    result: what its result.json holds.
    abstract: the shapes of the parameters, a nested dict.

  Raises:
    DataError: the file is damaged, or has other parameters.
  """
  arrays = read_arrays(folder, WEIGHTS, result)

  def of_leaf(path, leaf):
    bits = arrays.get(_name_of(path))
    if bits is None or bits.shape != leaf.shape or bits.dtype != np.uint16:
      raise _damaged(folder / WEIGHTS, f"{_name_of(path)} is missing or other")
    return jnp.asarray(bits.view(jnp.bfloat16), jnp.float32)

  return jax.tree_util.tree_map_with_path(of_leaf, abstract)


def _damaged(path, error):
  """The error of a cell's file that cannot be read."""
  return corpora.DataError(
    f"{path}: damaged ({error}); delete {path.parent}, and the study runs this "
    "cell again"
  )
