"""Likelihood estimators over a split; estimators.py says what each is."""

import dataclasses
import datetime
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.devices import sharding
from aoarm_jax.evaluation import estimators
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import figures, opening, telemetry

_SECONDS_BETWEEN_LINES = 15.0


class Bin(NamedTuple):
  """The tokens for which a number lies in low..high: their mean, and count."""

  low: int
  high: int
  nats_per_token: float
  tokens: int

  def record(self) -> dict:
    bits = self.nats_per_token / math.log(2)
    return {
      "low": self.low,
      "high": self.high,
      "bits_per_char": bits,
      "tokens": self.tokens,
    }


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The mean over sequences of one estimator.

  Attributes:
    estimator: its name.
    nats_per_token: mean.
    standard_error_nats: of the mean, over sequences, each with orders of its
      own (neighbouring windows of one text are taken as independent).
    sequences: how many.
    slot_curve_nats: mean by rank, T floats; () where there are no ranks.
    by_distance: mean by distance to the nearest known token; () likewise.
    by_recency: mean by how many steps ago that token was generated.
  """

  estimator: str
  nats_per_token: float
  standard_error_nats: float
  sequences: int
  slot_curve_nats: tuple[float, ...]
  by_distance: tuple[Bin, ...] = ()
  by_recency: tuple[Bin, ...] = ()

  @property
  def bits_per_char(self) -> float:
    return self.nats_per_token / math.log(2)

  def record(self) -> dict:
    """The estimate as a metrics.jsonl record, in bits; without its bins."""
    return {
      "estimator": self.estimator,
      "nats_per_token": self.nats_per_token,
      "bits_per_char": self.bits_per_char,
      "standard_error_bits": self.standard_error_nats / math.log(2),
      "sequences": self.sequences,
      "slot_curve_bits": [x / math.log(2) for x in self.slot_curve_nats],
    }

  def report(self) -> dict:
    """All of it, in bits."""
    return self.record() | {
      "by_distance": [each.record() for each in self.by_distance],
      "by_recency": [each.record() for each in self.by_recency],
    }

  def __str__(self):
    return (
      f"{self.estimator:<17}  {self.bits_per_char:.4f} bits/char  "
      f"± {self.standard_error_nats / math.log(2):.4f}  "
      f"({self.sequences:,} sequences)"
    )


class Evaluator:
  """The estimators of one run; jitted once each."""

  def __init__(self, config: config_lib.Config, network: network_lib.Network):
    self._config, self._network = config, network
    self._mesh = network.mesh
    self._jitted = {}

  def estimate(
    self,
    params,
    batches: Sequence,
    estimator: str,
    step: int,
    is_stopped: Callable[[], object] = lambda: False,
  ) -> Estimate | None:
    """Averages an estimator over batches.

    Args:
      params: of the network; on the mesh.
      batches: of (tokens uint8 [B, T], real bool [B]); rows that are not real
        are padding of the last batch and count nowhere.
      estimator: a name of config.ESTIMATORS.
      step: of the parameters; training_order under a curriculum depends on it.
      is_stopped: asked before every batch; ends the evaluation.

    Returns:
      The Estimate, or None if stopped. The same batches, parameters and config
      give the same one.
    """
    if estimator not in self._jitted:
      self._jitted[estimator] = jax.jit(
        functools.partial(
          estimators.estimate, estimator, self._config, self._network
        ),
        out_shardings=sharding.replicated(self._mesh),
      )
    key = jax.random.fold_in(
      jax.random.key(self._config.eval.seed), purposes.EVALUATION
    )
    key, step = sharding.put(self._mesh, (key, np.int32(step)))
    found = over_batches(
      functools.partial(self._jitted[estimator], params, key, step),
      batches,
      self._mesh,
      is_stopped,
    )
    if found is None:
      return None
    return mean(estimator, self._config.model.T, *found)


def over_batches(
  estimate: Callable,
  batches: Sequence,
  mesh: jax.sharding.Mesh,
  is_stopped: Callable[[], object] = lambda: False,
) -> tuple[np.ndarray, dict | None] | None:
  """What an estimator gives for every real sequence, and its sums over all.

  Logs now and then how long it will take.

  Args:
    estimate: (first_row, tokens, real) -> what estimators.estimate gives.
    batches: of (tokens uint8 [B, T], real bool [B]).
    mesh: where they go.
    is_stopped: asked before every batch; ends the evaluation.

  Returns:
    Nats of the real sequences, float32 [sequences], and the sums, float64; or
    None if stopped.
  """
  first_row = sharding.put(mesh, np.int32(0))
  sequence_nats, total = [], None
  begun = said = time.monotonic()
  for done, batch in enumerate(batches):
    if done and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
      said = time.monotonic()
      left = (said - begun) / done * (len(batches) - done)
      logging.info(
        "%d of %d batches  ETA %s", done, len(batches),
        telemetry.format_duration(left),
      )  # fmt: skip
    if is_stopped():
      return None
    nats, sums, real, first_row = estimate(
      first_row, *sharding.put_batch(mesh, batch)
    )
    nats, sums, real = jax.device_get((nats, sums, real))
    sequence_nats.append(nats[real])
    sums = jax.tree.map(np.float64, sums)
    total = jax.tree.map(np.add, total, sums) if total else sums
  return np.concatenate(sequence_nats), total


def mean(
  estimator: str, T: int, sequence_nats: np.ndarray, total: dict | None
) -> Estimate:
  """The Estimate of what `over_batches` gives."""
  nats, count = sequence_nats.astype(np.float64), len(sequence_nats)
  spread = nats.std(ddof=1) if count > 1 else math.nan
  curve = total["by_rank"] / count if total else ()
  return Estimate(
    estimator=estimator,
    nats_per_token=float(nats.mean() / T),
    standard_error_nats=float(spread / math.sqrt(count) / T),
    sequences=count,
    slot_curve_nats=tuple(map(float, curve)),
    by_distance=_bins(*total["by_distance"]) if total else (),
    by_recency=_bins(*total["by_recency"]) if total else (),
  )


def _bins(nats, tokens):
  """The bins that are not empty."""
  highs = estimators.bin_edges(len(nats))
  lows = [0, *(high + 1 for high in highs[:-1])]
  return tuple(
    Bin(low, high, float(total / count), int(count))
    for low, high, total, count in zip(lows, highs, nats, tokens)
    if count
  )


def evaluate(config: config_lib.Config, workdir: epath.Path) -> None:
  """--mode=eval: every estimator of config.eval on the newest checkpoint.

  Logs them, and writes evaluations/step_<n>_<split>_<time>.json,
  slot_curve_<split>.png and nearness_<split>.png to the run directory.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    DataError: the split is missing or wrong.
  """
  run = opening.open_run(workdir, config, "eval")
  network = run.network
  corpus = corpora.load(config.data.corpus, config.data.path, network.tokenizer)
  logging.info("text: %s", corpus.describe(config.eval.split))
  opening.warn_other_text(run.text, corpus, config.eval.split)
  batches = evaluation_batches(network, corpus.split(config.eval.split))
  # training_order is the family that the checkpoint was trained on.
  given = config.orders.given or run.trained.orders.given
  trained = dataclasses.replace(run.trained.orders, given=given)
  evaluator = Evaluator(config.replace("orders", trained), network)
  with jax.set_mesh(network.mesh):
    estimates = []
    for estimator in config.eval.estimators:
      estimates.append(
        evaluator.estimate(run.params, batches, estimator, run.step)
      )
      logging.info("%s  %s", config.eval.split, estimates[-1])
  if jax.process_index() == 0:
    _write(config, workdir, run.step, corpus, estimates)


def _write(config, workdir, step, corpus, estimates):
  split = config.eval.split
  report = {
    "step": step,
    "split": split,
    "text": corpus.describe(),
    "sha256": corpus.hash(split),
    "unigram_bits": corpora.unigram_entropy(
      corpus.split(split), corpus.tokenizer.V
    ),
    "eval": dataclasses.asdict(config.eval),
    "estimates": [e.report() for e in estimates],
  }
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
  path = workdir / "evaluations" / f"step_{step:08d}_{split}_{now}.json"
  run_dir.write_atomically(path, json.dumps(report, indent=2) + "\n")
  logging.info("written: %s", path)
  figures.slot_curve(
    {
      e.estimator: e.record()["slot_curve_bits"]
      for e in estimates
      if e.slot_curve_nats
    },
    workdir / f"slot_curve_{split}.png",
    title=f"{config.name}:{config.variant}, {split}",
  )
  figures.nearness(
    {e.estimator: e.report() for e in estimates if e.by_distance},
    workdir / f"nearness_{split}.png",
    title=f"{config.name}:{config.variant}, {split}",
  )


def evaluation_batches(
  network: network_lib.Network, tokens: np.ndarray
) -> pipeline.EvalBatches:
  """Returns the windows of a split that every evaluation of a run reads.

  Args:
    network: with the config; its mesh says which rows are read here.
    tokens: uint8 [n], of the split.
  """
  config = network.config
  return pipeline.eval_batches(
    tokens,
    T=config.model.T,
    batch_size=config.eval_batch_size,
    batches=config.eval.batches,
    seed=config.eval.seed,
    rows=sharding.local_rows(network.mesh, config.eval_batch_size),
  )
