"""Average likelihood estimators over a split: --mode=eval."""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.devices import sharding, stopping
from aoarm_jax.evaluation import averages, estimators
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import (
  agreement,
  disk,
  figures,
  identity,
  opening,
  patience,
)


class Batches(Protocol):
  """A sequence of (tokens [B, T], real bool [B]).

  Rows that are not real are padding of the last batch and count nowhere. The
  scored ranks, int32 [B, R], may follow; see estimators.estimate.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> tuple[np.ndarray, ...]: ...


class Evaluator:
  """The estimators of one run. Each is compiled once, at its first use."""

  def __init__(
    self, config: config_lib.Config, network: network_lib.Network
  ) -> None:
    """Compile nothing yet.

    Args:
      config: its sections orders and eval and train.least_time are read.
      network: the network whose likelihood is estimated; with a mesh.
    """
    assert network.mesh is not None
    self._config, self._network = config, network
    self._mesh = network.mesh
    self._jitted: dict[str, Callable[..., Any]] = {}

  def estimate(
    self,
    params: Any,
    batches: Batches,
    estimator: str,
    step: int,
    is_stopped: Callable[[], object] = lambda: False,
    keeps_part: bool = False,
  ) -> averages.Estimate | None:
    """Average an estimator over batches.

    The same batches, parameters and config give the same estimate.

    Args:
      params: the network's parameters, on the mesh.
      batches: the sequences to evaluate.
      estimator: a name of schema.ESTIMATORS.
      step: training steps of the parameters. The orders of training_order
        under a curriculum depend on it.
      is_stopped: called before every batch. A true result ends the evaluation.
      keeps_part: whether an evaluation that was stopped returns the mean over
        the batches before.

    Returns:
      The Estimate, or None if the evaluation was stopped.
    """
    # A later evaluation tells its progress in `over_batches`.
    waiting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if estimator not in self._jitted:
      waiting = patience.waiting(f"compiling and evaluating {estimator}")
      self._jitted[estimator] = jax.jit(
        functools.partial(
          estimators.estimate, estimator, self._config, self._network
        ),
        out_shardings=sharding.replicated(self._mesh),
      )
    key = jax.random.fold_in(
      jax.random.key(self._config.eval.seed), purposes.EVALUATION
    )
    key, step_here = sharding.put(self._mesh, (key, np.int32(step)))
    with waiting:
      nats_and_sums = over_batches(
        functools.partial(self._jitted[estimator], params, key, step_here),
        batches,
        self._mesh,
        is_stopped,
        keeps_part,
      )
    if nats_and_sums is None:
      return None
    lengths = None
    if isinstance(batches, pipeline.EvalBatches):
      lengths = batches.lengths
    found = averages.mean(
      estimator, self._config.model.T, *nats_and_sums, lengths
    )
    return self._with_units(found, nats_and_sums[0], batches)

  def _with_units(self, found, sequence_nats, batches):
    """Return an Estimate with the bytes and characters of its text."""
    tokenizer = self._network.tokenizer
    found = dataclasses.replace(found, unit=tokenizer.unit)
    if (
      not isinstance(batches, pipeline.EvalBatches)
      or found.tokens != batches.evaluated_tokens
    ):
      # The text of a part of the batches is not known.
      return found
    sizes = batches.sums(tokenizer.bytes_of)
    characters = int(batches.sums(tokenizer.characters_of).sum())
    return dataclasses.replace(
      found,
      bytes=int(sizes.sum()),
      characters=characters,
      standard_error_nats_per_byte=averages.error_of_ratio(
        sequence_nats, sizes
      ),
    )


def over_batches(
  estimate: Callable[..., Any],
  batches: Batches,
  mesh: jax.sharding.Mesh,
  is_stopped: Callable[[], object] = lambda: False,
  keeps_part: bool = False,
) -> tuple[np.ndarray, dict[str, Any] | None] | None:
  """Run an estimator over batches; collect its nats and add its sums up.

  A long evaluation logs its progress and the time left, every 15 seconds at
  most.

  Args:
    estimate: function of first_row and the arrays of a batch that returns the
      tuple of estimators.estimate.
    batches: the sequences to evaluate.
    mesh: the mesh that the batches are put on.
    is_stopped: called before every batch. A true result ends the evaluation.
    keeps_part: whether an evaluation that was stopped returns what it has.

  Returns:
    The nats of the real sequences, float32 [sequences], and the sums in
    float64. None if the evaluation was stopped.
  """
  first_row = sharding.put(mesh, np.int32(0))
  sequence_nats: list[np.ndarray] = []
  total = None
  for done in patience.counted(range(len(batches))):
    batch = batches[done]
    if is_stopped():
      if done and keeps_part:
        logging.info("stopped after %d of %d batches", done, len(batches))
        break
      return None
    nats, sums, real, first_row = estimate(
      first_row, *sharding.put_batch(mesh, batch)
    )
    nats, sums, real = jax.device_get((nats, sums, real))
    sequence_nats.append(nats[real])
    sums = jax.tree.map(np.float64, sums)
    total = jax.tree.map(np.add, total, sums) if total else sums
  return np.concatenate(sequence_nats), total


def evaluate(config: config_lib.Config, workdir: epath.Path) -> None:
  """Evaluate a checkpoint with every estimator of config.eval: --mode=eval.

  The estimates are logged. They are also written to the run directory:
  evaluations/step_<n>_<split>_<time>.json, slot_curve_<split>.png and
  nearness_<split>.png. A failure to write one of them is a warning.

  Args:
    config: the config; checkpoint.read says which checkpoint is read.
    workdir: run directory.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    DataError: the split is missing or wrong.
    Stopped: SIGTERM came. The estimates so far are logged, and not written.
  """
  run = opening.open_run(workdir, config, "eval")
  network = run.network
  corpus = identity.read_text(config.data, network.tokenizer, config.eval.split)
  agreement.check_text(
    identity.text_of(corpus, config.eval.split), network.tokenizer.sha256
  )
  identity.warn_other_text(run.saved, corpus, config.eval.split)
  batches = evaluation_batches(network, corpus.split(config.eval.split))
  logging.info("%s", batches.describe(network.tokenizer.units))
  # The estimator training_order takes the orders of training, whatever the
  # command line says about them.
  given = config.orders.given or run.trained.orders.given
  trained = dataclasses.replace(run.trained.orders, given=given)
  evaluator = Evaluator(config.replace("orders", trained), network)
  estimates: list[averages.Estimate] = []
  with jax.set_mesh(network.mesh), stopping.Signals("batch") as signals:
    for done, estimator in enumerate(config.eval.estimators):
      estimate = evaluator.estimate(
        run.params,
        batches,
        estimator,
        run.step,
        is_stopped=signals.poll,
        keeps_part=True,
      )
      if estimate is not None:
        logging.info("%s  %s", config.eval.split, estimate)
        estimates.append(estimate)
      total = len(config.eval.estimators)
      signals.raise_if_stopped(f"{done} of {total} estimators")
  if jax.process_index() == 0:
    _write(config, workdir, run.step, corpus, batches, estimates)


def _write(config, workdir, step, corpus, batches, estimates):
  """Write the report and the pictures of an evaluation."""
  split = config.eval.split
  report = {
    "step": step,
    "split": split,
    "text": corpus.describe(),
    "sha256": corpus.hash(split),
    "split_tokens": batches.split_tokens,
    "evaluated_tokens": batches.evaluated_tokens,
    "left_out_at_the_end": batches.left_out,
    "unigram_bits": corpora.unigram_entropy(
      corpus.split(split), corpus.tokenizer.V - config.gives_end
    ),
    "eval": dataclasses.asdict(config.eval),
    "estimates": [e.report() for e in estimates],
  }
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
  path = workdir / "evaluations" / f"step_{step:08d}_{split}_{now}.json"
  content = disk.to_json(report, indent=2) + "\n"
  if disk.attempt(lambda: disk.write_atomically(path, content)):
    logging.info("written: %s", path)
  title = f"{config.name}:{config.variant}, {split}"
  curves = {
    e.estimator: e.record()["slot_curve_bits"]
    for e in estimates
    if e.slot_curve_nats
  }
  bins = {e.estimator: e.report() for e in estimates if e.by_distance}
  options = {"title": title, "unit": corpus.tokenizer.unit}
  for draw, values, name in (
    (figures.slot_curve, curves, "slot_curve"),
    (figures.nearness, bins, "nearness"),
  ):
    picture = workdir / f"{name}_{split}.png"
    disk.attempt(functools.partial(draw, values, picture, **options))


def evaluation_batches(
  network: network_lib.Network, tokens: np.ndarray
) -> pipeline.EvalBatches:
  """Return the windows or documents that every evaluation of a run reads.

  Args:
    network: the network, with the run's config. Its mesh says which rows of a
      batch this process reads.
    tokens: unsigned integers [n], the split.

  Raises:
    DataError: the split is shorter than T tokens.
  """
  assert network.mesh is not None
  config = network.config
  return pipeline.eval_batches(
    tokens,
    T=config.model.T,
    batch_size=config.eval_batch_size,
    batches=config.eval.batches,
    seed=config.eval.seed,
    rows=sharding.local_rows(network.mesh, config.eval_batch_size),
    end=network.end,
  )
