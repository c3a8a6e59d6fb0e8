"""One cell: trained, evaluated, sampled and profiled; the files that it leaves.

  result.json   what was run and its likelihood; written last: without it a
                cell is not done
  samples.npz   counts of the generated texts, and of real ones, see coherence
  windows.npz   nats of every evaluated window
  profile.npz   sums of attention, see profiles
  texts.jsonl   a few texts at some temperatures

Nothing else is kept of a cell: no parameters.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax import config as config_lib
from aoarm_jax import (
  decode,
  diffusion,
  estimators,
  evaluate,
  optimizer,
  orders,
  run_dir,
  sampling,
  sharding,
  telemetry,
  train,
  train_state,
)
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.model import cost
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, profiles

RESULT = "result.json"
_ORDERS, _SAMPLES = 103, 104  # Set keys apart from training's.
_TELL_SECONDS = 15.0
_TEXTS = 2  # Kept of every third temperature.
# Full passes keep no cache but all scores: fewer rows at once.
_MASKED_TOKENS = 1 << 17


class Programs:
  """Compiled programs, each made once, in the background.

  While one cell trains, those of the next are compiled. Cells that differ by
  their seeds alone share them.
  """

  def __init__(self, mesh: jax.sharding.Mesh, vocabulary: int):
    self._mesh, self._vocabulary = mesh, vocabulary
    self._pool = concurrent.futures.ThreadPoolExecutor(4)
    self._made = {}

  def close(self):
    self._pool.shutdown(cancel_futures=True)

  def of(self, config: config_lib.Config, trial: bool) -> dict:
    """Starts to compile what a cell needs: name -> future."""
    names = ["init", "train", "evaluate"]
    if not trial:
      names.append("sample")
      if config.study.profile_sequences and not config.model.kind.masked:
        names.append("profile")
    return {name: self._future(name, config) for name in names}

  def _future(self, name, config):
    config = dataclasses.replace(config, seed=0)
    if name not in ("init", "train"):  # Does not depend on how it was trained.
      ema = config_lib.Optimizer(ema_decay=config.optimizer.ema_decay)
      train = dataclasses.replace(config.train, steps=1)
      config = dataclasses.replace(config, optimizer=ema, train=train)
    key = name, config
    if key not in self._made:
      self._made[key] = self._pool.submit(self._compile, name, config)
    return self._made[key]

  def _compile(self, name, config):
    with jax.set_mesh(self._mesh):  # That of a thread is its own.
      function, arguments, options = _PROGRAMS[name](
        config, self._vocabulary, self._mesh
      )
      return jax.jit(function, **options).lower(*arguments).compile()


def _abstract(mesh, *shape, dtype=jnp.int32, batch=False):
  axes = ("batch",) if batch else ()
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.named(mesh, *axes)
  )


def _init_program(config, vocabulary, mesh):
  bind, abstract, _ = train_state.create(config, vocabulary, mesh)
  chain = optimizer.make(config.optimizer, config.train.steps)

  def init(seed):
    return train_state.init(bind, chain, seed, config.optimizer.ema_decay > 0)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return init, (_abstract(mesh),), dict(out_shardings=shardings)


def _train_program(config, vocabulary, mesh):
  bind, abstract, _ = train_state.create(config, vocabulary, mesh)
  shape = config.train.batch_size, config.model.T
  tokens = _abstract(mesh, *shape, dtype=jnp.uint8, batch=True)
  shardings = (
    jax.tree.map(lambda leaf: leaf.sharding, abstract),
    sharding.replicated(mesh),
  )
  options = dict(donate_argnums=0, out_shardings=shardings)
  step = train.make_step(config, bind, vocabulary)
  return step, (abstract, tokens), options


def _params(config, vocabulary, mesh):
  bind, abstract, _ = train_state.create(config, vocabulary, mesh)
  return bind, abstract.read_out_params


def _evaluate_program(config, vocabulary, mesh):
  bind, params = _params(config, vocabulary, mesh)
  estimate = functools.partial(
    estimators.estimate, config.eval.estimators[0], bind, config, vocabulary
  )

  def program(params, seed, first_row, tokens, real):
    # The step matters to a curriculum alone, which no cell has.
    step, key = jnp.int32(0), jax.random.key(seed)
    return estimate(params, key, step, first_row, tokens, real)

  B, T = config.eval_batch_size, config.model.T
  arguments = (
    params, _abstract(mesh), _abstract(mesh),
    _abstract(mesh, B, T, dtype=jnp.uint8, batch=True),
    _abstract(mesh, B, dtype=jnp.bool_, batch=True),
  )  # fmt: skip
  return program, arguments, dict(out_shardings=sharding.replicated(mesh))


def _sample_program(config, vocabulary, mesh):
  bind, params = _params(config, vocabulary, mesh)
  model, rows = config.model, _rows_at_once(config)
  options = dataclasses.replace(config.orders, family=config.sample.order)

  def program(params, seed, first_row, temperature):
    """Texts of rows first_row.. of all rows: int32 [rows, T]."""
    order_key, key = jax.random.split(jax.random.key(seed))
    network, blank = bind(params), jnp.zeros((rows, model.T), jnp.int32)
    # One law a row, so that all temperatures are one batch.
    law = sampling.Sampling(
      temperature[:, None, None], jnp.int32(0), jnp.float32(1)
    )
    order = orders.draw(order_key, rows, model.T, options, first_row=first_row)
    key = jax.random.fold_in(key, first_row)
    arguments = network, key, blank, blank > 0, order, law
    if model.kind.masked:
      return diffusion.generate(*arguments, method="sequential", steps=0).tokens
    return decode.generate(*arguments, prefill=model.sentinels > 1).tokens

  arguments = (
    params, _abstract(mesh), _abstract(mesh),
    _abstract(mesh, rows, dtype=jnp.float32),
  )  # fmt: skip
  return program, arguments, dict(out_shardings=sharding.replicated(mesh))


def _profile_program(config, vocabulary, mesh):
  bind, params = _params(config, vocabulary, mesh)

  def program(params, tokens):
    order = profiles.orders_of(config, _ORDERS)
    return profiles.profile(bind(params), tokens.astype(jnp.int32), order)

  shape = config.study.profile_sequences, config.model.T
  arguments = params, _abstract(mesh, *shape, dtype=jnp.uint8)
  return program, arguments, dict(out_shardings=sharding.replicated(mesh))


_PROGRAMS = {
  "init": _init_program,
  "train": _train_program,
  "evaluate": _evaluate_program,
  "sample": _sample_program,
  "profile": _profile_program,
}


def samples_per_temperature(config: config_lib.Config) -> int:
  return max(2, config.study.characters // config.model.T)


def temperatures(study: config_lib.Study) -> np.ndarray:
  """float32 [temperatures]."""
  return np.linspace(
    study.temperature_low, study.temperature_high, study.temperatures,
    dtype=np.float32,
  )  # fmt: skip


def _rows_at_once(config):
  rows = config.study.temperatures * samples_per_temperature(config)
  if config.model.kind.masked:
    rows = min(rows, max(1, _MASKED_TOKENS // config.model.T))
  return rows


class Lab:
  """The text, read once, and the programs; runs cells one after the other."""

  def __init__(
    self,
    config: config_lib.Config,
    corpus: corpora.Corpus,
    mesh: jax.sharding.Mesh,
    programs: Programs,
  ):
    self.study, self.corpus, self.mesh = config.study, corpus, mesh
    self.tokenizer, self.programs = corpus.tokenizer, programs
    self.text = {
      name: corpus.hash(name) for name in sorted({"train", config.eval.split})
    }

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
    programs = self.programs.of(config, cell.trial)
    with _timed(clock, "train"):
      params, curve, speed = self._train(config, programs)
    with _timed(clock, "evaluate"):
      estimate = self._evaluate(config, programs, params, folder)
    if not cell.trial:
      with _timed(clock, "sample"):
        self._sample(config, programs, params, folder)
    if "profile" in programs:
      with _timed(clock, "profile"):
        self._profile(config, programs, params, folder)
    clock["all"] = time.monotonic() - start
    result = {
      "cell": dataclasses.asdict(cell),
      "estimate": estimate,
      "parameters": run_dir.parameter_count(params),
      "training_flops": training_flops(config, self.tokenizer.V),
      "tokens_per_second": speed,
      "training_nats_per_token": curve,
      "seconds": {name: round(x, 2) for name, x in clock.items()},
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "text": self.text,
      "config": dataclasses.asdict(
        dataclasses.replace(config, data=dataclasses.replace(config.data, path=""))
      ),
    }  # fmt: skip
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
        state, sums = step(state, batch)
        # Fetched one step late, so the device never waits.
        _note(losses, former)
        former = sums
      _note(losses, former)
    seconds = time.monotonic() - start
    tokens = config.train.batch_size * config.model.T * config.train.steps
    marks = np.linspace(0, len(losses), 51).astype(int)
    curve = [
      round(float(np.mean(losses[a:b])), 4)
      for a, b in zip(marks, marks[1:])
      if b > a
    ]
    return state.read_out_params, curve, round(tokens / seconds)

  def _evaluate(self, config, programs, params, folder):
    program, split = programs["evaluate"].result(), config.eval.split
    batches = evaluate.evaluation_batches(config, self.corpus.split(split))
    seed, row = sharding.put(
      self.mesh, (np.int32(config.eval.seed), np.int32(0))
    )
    all_nats, total = [], None
    for tokens, real in batches:
      batch = sharding.put_batch(self.mesh, (tokens, real))
      nats, sums, real, row = program(params, seed, row, *batch)
      nats, sums, real = jax.device_get((nats, sums, real))
      all_nats.append(nats[real])
      sums = jax.tree.map(np.float64, sums)
      total = jax.tree.map(np.add, total, sums) if total else sums
    nats, T = np.concatenate(all_nats), config.model.T
    _write_arrays(folder / "windows.npz", nats=nats)
    bits = nats.astype(np.float64) / (T * math.log(2))
    report = {
      "estimator": config.eval.estimators[0],
      "split": split,
      "bits_per_char": float(bits.mean()),
      "standard_error_bits": float(bits.std(ddof=1) / math.sqrt(len(bits))),
      "windows": len(bits),
    }
    if total:
      curve = total["by_rank"] / (len(bits) * math.log(2))
      eighths = np.array_split(curve, min(8, T))
      report["bits_by_eighth"] = [float(part.mean()) for part in eighths]
      for name in ("by_distance", "by_recency"):
        sums, tokens = total[name]
        report[name] = [
          {"up_to": edge, "bits_per_char": float(x / n / math.log(2)), "tokens": int(n)}
          for edge, x, n in zip(estimators.bin_edges(len(sums)), sums, tokens)
          if n
        ]  # fmt: skip
    return report

  def _sample(self, config, programs, params, folder):
    program, each = programs["sample"].result(), samples_per_temperature(config)
    at_once, levels = _rows_at_once(config), temperatures(config.study)
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
    _write_arrays(
      folder / "samples.npz",
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
    run_dir.write_atomically(
      folder / "texts.jsonl", "".join(line + "\n" for line in lines)
    )

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

  def _profile(self, config, programs, params, folder):
    batches = pipeline.eval_batches(
      self.corpus.split(config.eval.split), T=config.model.T,
      batch_size=config.study.profile_sequences, batches=1,
      seed=config.eval.seed,
    )  # fmt: skip
    tokens = sharding.put(self.mesh, np.ascontiguousarray(batches[0][0]))
    sums = jax.device_get(programs["profile"].result()(params, tokens))
    arrays = profiles.to_arrays(*sums, config.model.kind)
    _write_arrays(folder / "profile.npz", **arrays)


def training_flops(config: config_lib.Config, vocabulary: int) -> float:
  """Of a whole run: see cost.training_flops_per_token."""
  tokens = config.train.batch_size * config.model.T * config.train.steps
  return tokens * cost.training_flops_per_token(
    config.model, vocabulary, config.train.batch_size,
    config.train.query_fraction,
  )  # fmt: skip


@contextlib.contextmanager
def _timed(clock, name):
  start = time.monotonic()
  yield
  clock[name] = time.monotonic() - start
  logging.info("  %s: %.1f s", name, clock[name])


def _note(losses, sums):
  if sums is not None:
    loss = float(sums["nats"]) / float(sums["tokens"])
    telemetry.check_finite(len(losses) + 1, {"loss": loss})
    losses.append(loss)


def _write_json(path, value):
  run_dir.write_atomically(path, json.dumps(value, indent=1) + "\n")


def _write_arrays(path, **arrays):
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)
  run_dir.write_atomically(path, data.getvalue())


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """Of an npz file; {} if there is none."""
  if not path.exists():
    return {}
  with np.load(io.BytesIO(path.read_bytes())) as file:
    return dict(file)
