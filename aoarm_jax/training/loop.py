"""The training loop: --mode=train."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, pipeline
from aoarm_jax.devices import distributed, sharding, stopping
from aoarm_jax.evaluation import evaluate
from aoarm_jax.generation import texts as generate
from aoarm_jax.model import cost
from aoarm_jax.runs import (
  agreement,
  alphabet,
  checkpoint,
  disk,
  exported,
  figures,
  identity,
  locking,
  metrics,
  patience,
  telemetry,
  tracking,
)
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import text as text_lib
from aoarm_jax.training import (
  distilling,
  greeting,
  resuming,
  saving,
  starting,
)
from aoarm_jax.training import program as program_lib
from aoarm_jax.training import state as train_state


class Preempted(stopping.Stopped):
  """A signal stopped the run after a save. The same command continues it."""

  def __init__(self, signal_number: int, step: int) -> None:
    """Write the message.

    Args:
      signal_number: the signal, SIGTERM or SIGINT.
      step: optimizer steps taken. At step 0 there is nothing to save.
    """
    name = signal.Signals(signal_number).name
    super().__init__(
      f"{name} at step {step:,}"
      + ", which is saved" * (step > 0)
      + ": start the same command again to continue from there",
      signal_number,
    )


def train(
  config: config_lib.Config, workdir: epath.Path, argv: list[str]
) -> None:
  """Train the run in `workdir`, or continue it from its newest checkpoint.

  Args:
    config: the run's config.
    workdir: run directory.
    argv: the command line, which is written to the run directory.

  Raises:
    ConfigError: the config does not fit the machine or the checkpoint.
    DataError: the text is missing or wrong.
    CheckpointError: a checkpoint cannot be read or written.
    EvictedError: the run directory was removed or replaced, or another run has
      saved there; the message says where the state is saved.
    NonFiniteError: the loss is NaN or infinite; the last checkpoint is good.
    Preempted: SIGTERM or SIGINT came, and the state is saved.
  """
  if exported.is_export(workdir):
    raise config_lib.ConfigError(
      f"--workdir={workdir}: is an exported model, which training would "
      "overwrite: name another folder; --config.train.start_from="
      f"{workdir} begins with its weights"
    )
  tokenizer = alphabet.of_start(config, workdir)
  teacher = functools.partial(
    distilling.network, config, tokenizer=tokenizer, workdir=workdir
  )
  program = program_lib.make(
    config, "train", "eval", tokenizer=tokenizer, open_teacher=teacher
  )
  network = program.network
  checkpoints = checkpoint.Checkpoints(
    workdir / "checkpoints",
    keep_last=config.checkpoint.keep_last,
    keep_best=config.checkpoint.keep_best,
    notice_seconds=distributed.with_environment(
      config.distributed, os.environ
    ).notice_seconds,
  )
  watchdog = distributed.Watchdog(config.distributed.step_timeout_seconds)
  with (
    jax.set_mesh(network.mesh),
    watchdog,
    stopping.Signals(
      "step", (signal.SIGTERM, signal.SIGINT), watchdog.beat
    ) as signals,
  ):
    # A missing text is told before the run directory is made.
    splits = list(dict.fromkeys(("train", config.eval.split)))
    corpus = identity.read_text(config.data, network.tokenizer, *splits)
    text = identity.text_of(corpus, *splits)
    agreement.check_text(text, tokenizer.sha256)
    # Everything that depends on what stands in the run directory is decided
    # under the lock. Before, another process may still be saving there. A save
    # that is running when an error comes ends under the lock, too.
    with locking.lock(workdir) as is_there, checkpoints:
      run_dir.check_places(workdir)
      agreement.check_disk(workdir, writes=True)
      saved = checkpoints.newest()
      agreement.check_checkpoint(checkpoints, saved)
      if saved:
        resuming.check_resume(saved, config, text, workdir, tokenizer.sha256)
        if distributed.process_0_says(
          functools.partial(_is_finished, config, workdir, saved.step)
        ):
          _say_finished(config, workdir, saved, corpus)
          return
      weights, teacher_params = None, {}
      if config.train.start_from and not saved:
        weights = starting.read(network, tokenizer, workdir)
      if program.teacher and not saved:
        teacher_params = distilling.read(program.teacher, config, tokenizer)
      run = _Run(program, workdir, argv, corpus, text, checkpoints, is_there)
      run.loop(saved or weights, signals, teacher_params)


def _say_finished(config, workdir, saved, corpus):
  """Log what stands in the run directory, and how to choose another."""
  logging.info(
    "finished: %s holds step %s of %s: %s:%s, trained on %s; choose another "
    "--workdir to train another run, as in --workdir=%s",
    workdir,
    f"{saved.step:,}",
    f"{config.train.steps:,}",
    config.name,
    config.variant,
    corpus.source,
    identity.another(workdir),
  )


def _is_finished(config, workdir, step):
  """Return whether the run has all its steps, samples and pictures."""
  products = (
    _samples_path(workdir, step),
    workdir / "loss.png",
    workdir / "slot_curve.png",
  )
  return step >= config.train.steps and all(p.exists() for p in products)


def _samples_path(workdir, step):
  return workdir / "samples" / f"step_{step:08d}.jsonl"


def _delete_samples(folder, keep_last):
  """Delete the older samples of training; those of --mode=sample stay."""
  try:
    for path in sorted(folder.glob("step_*.jsonl"))[:-keep_last]:
      path.unlink(missing_ok=True)
  except OSError as error:
    logging.warning("cannot delete old samples: %s", error)


class _Run:
  """The objects that the training loop works with, and the loop itself.

  The objects are built once, in the order of the lines below.
  """

  def __init__(
    self,
    program: program_lib.Program,
    workdir: epath.Path,
    argv: list[str],
    corpus: corpora.Corpus,
    text: dict[str, str],
    checkpoints: checkpoint.Checkpoints,
    is_there: Callable[[], bool],
  ) -> None:
    self.program, self.network = program, program.network
    self.config = config = self.network.config
    assert self.network.mesh is not None  # program.make always gives a mesh.
    self.mesh, self.workdir = self.network.mesh, workdir
    self.checkpoints, self.argv = checkpoints, argv
    self.saver = saving.Saver(
      self.network,
      workdir,
      text,
      checkpoints,
      is_there,
      describe=self._describe,
      position=self._position,
    )
    train_tokens = corpus.split("train")
    self.batches = pipeline.train_batches(
      train_tokens,
      T=config.model.T,
      batch_size=config.train.batch_size,
      seed=config.seed,
      workers=config.data.workers,
      rows=sharding.local_rows(self.mesh, config.train.batch_size),
      end=self.network.end,
    )
    if what_is_read := self.batches.describe():
      logging.info("train: %s", what_is_read)
    valid_tokens = corpus.split(config.eval.split)
    self.eval_batches = evaluate.evaluation_batches(self.network, valid_tokens)
    what_is_read = self.eval_batches.describe(self.network.tokenizer.units)
    logging.info("%s %s", config.eval.split, what_is_read)
    self.unigram_bits = corpora.unigram_entropy(
      valid_tokens, self.network.vocabulary
    )
    self.evaluator = evaluate.Evaluator(config, self.network)
    self.sampler = generate.Sampler(config, self.network)
    self.primary = jax.process_index() == 0
    # The first log line may be hours away, so the ETA is logged once as soon as
    # it is known.
    self.told_eta = False
    self._describe(workdir)
    greeting.greet(program)

  def _describe(self, workdir):
    """Write the files that explain the run into a run directory."""
    if self.primary:
      run_dir.describe_run(
        workdir,
        config_json=config_lib.to_json(self.config),
        argv=self.argv,
        params=self.network.abstract_params,
      )
      if self.program.teacher:
        distilling.describe(self.program.teacher, workdir)
      if state := self.network.tokenizer.state:
        disk.write_atomically(workdir / checkpoint.TOKENIZER, state)

  def loop(
    self,
    origin: checkpoint.Saved | starting.Weights | None,
    signals: stopping.Signals,
    teacher: Any,
  ) -> None:
    """Run the training steps up to config.train.steps.

    Args:
      origin: the checkpoint to continue from, or the weights to begin with.
        None starts from scratch.
      signals: the signals that may stop the run.
      teacher: the parameters of the teacher of a new run, or {}.

    Raises:
      NonFiniteError, Preempted, CheckpointError: see `train`.
    """
    c = self.config
    state, start = self._start(origin, teacher)
    # The devices compute padding, too, but it is no token.
    real_share = self.batches.real_share
    self.progress = telemetry.Progress(
      total_steps=c.train.steps,
      start_step=start,
      tokens_per_step=round(c.train.batch_size * c.model.T * real_share),
      flops_per_token=cost.training_flops_per_token(c, self.network.vocabulary)
      / real_share,
      devices=list(self.mesh.devices.flatten()),
    )
    profile = telemetry.ProfileWindow(
      self.workdir,
      c.telemetry.profile_start,
      c.telemetry.profile_steps,
      self.primary,
    )
    sums = None  # Sums of the previous step, still on the devices.
    with (
      metrics.Writer(
        self.workdir,
        start_step=start,
        primary=self.primary,
        trackers=tracking.start(c, self.workdir, start) if self.primary else (),
      ) as self.writer,
      contextlib.closing(profile),
      contextlib.closing(self.batches),
    ):
      for step in range(start, c.train.steps + 1):
        if signals.poll(step) or self._any_due(step):
          self._settle(step, sums)
          sums = None
          with self.progress.pause(state):
            self._visit(step, state, signals)
        if signals.received:
          if step > start:
            self.saver.check_place(step, state)
            self.saver.save(step, state)
          self.checkpoints.wait()
          raise Preempted(signals.received, step)
        if step == c.train.steps:
          break
        profile.before_step(step, state)
        # An implicit transfer could make the host wait for the device, so only
        # explicit transfers are allowed.
        with (
          jax.transfer_guard("disallow"),
          profile.annotation(step),
          self._waiting("compiling the training step", step == start),
        ):
          batch = sharding.put_batch(self.mesh, next(self.batches))
          former_sums, (state, sums) = sums, self.program.step(state, batch)
        # The sums of a step are fetched after the next step is dispatched, so
        # that the device never waits for the host.
        self._settle(step, former_sums)
    self.checkpoints.wait()
    if self.primary:
      # The run is complete and saved, with or without its pictures.
      disk.attempt(self._draw_figures)
    logging.info("done: %s", self.workdir)

  def _start(self, origin, teacher):
    """Return the state and the step to start from; set the data iterator."""
    # Sums, on the host, of the steps since the last log line.
    self.interval = []
    self.former_records = []
    if not isinstance(origin, checkpoint.Saved):
      seed = sharding.put(self.mesh, np.int32(self.config.seed))
      with patience.waiting("compiling the first parameters"):
        state = self.program.init(seed)
      state = dataclasses.replace(state, teacher=teacher)
      if origin:
        weights, train = origin.params, self.config.train
        state = train_state.with_weights(state, weights, train)
        if self.primary:
          origin.describe(self.workdir)
      return state, 0
    saved = origin
    # Steps after the checkpoint are taken again, so their records are dropped.
    records = metrics.read(self.workdir)
    self.former_records = [r for r in records if r["step"] <= saved.step]
    self.interval = saved.data_state["interval"]
    with patience.waiting(f"reading checkpoint step {saved.step:,}"):
      state = self.checkpoints.restore(saved, self.program.abstract)
    self.batches.set_state(saved.data_state["iterator"])
    logging.info("resumed from step %s", f"{saved.step:,}")
    return state, saved.step

  def _waiting(self, what, is_first):
    """Say what takes long, among the first steps only: a thread costs time."""
    return patience.waiting(what) if is_first else contextlib.nullcontext()

  def _due(self, step, every):
    """Return whether a task is due that is done every `every` steps.

    All tasks are due at the last step. `every` = 0 means at the last step only.
    """
    last = step == self.config.train.steps
    return last or (every > 0 and step > 0 and step % every == 0)

  def _any_due(self, step):
    """Return whether an evaluation, a sample or a save is due before `step`."""
    c = self.config
    return any(
      self._due(step, every)
      for every in (c.eval.every, c.sample.every, c.checkpoint.every)
    )

  def _settle(self, step, sums):
    """Fetch the sums of the step that led to `step`; check and log them."""
    if sums is None:
      return
    with self._waiting(f"computing step {step:,}", not self.told_eta):
      sums = {name: float(x) for name, x in jax.device_get(sums).items()}
    self.progress.tick(step)
    sums["loss"] = sums["nats"] / sums["tokens"]
    # A finite update keeps finite parameters finite, so the parameters need no
    # check of their own.
    names = ("loss", "gradient_norm", "update_norm")
    telemetry.check_finite(step, {name: sums[name] for name in names})
    self.interval.append(sums)
    if self.progress.eta_seconds is not None and not self.told_eta:
      self.told_eta = True
      logging.info(
        "step %s done; ETA %s",
        step,
        telemetry.format_duration(self.progress.eta_seconds),
      )
    if self._due(step, self.config.telemetry.log_every):
      self._report(step)
      self.interval = []

  def _report(self, step):
    """Write and log the means of the steps since the last log line."""
    loss = float(np.mean([sums["loss"] for sums in self.interval]))
    if self.network.end:  # Steps have different numbers of tokens.
      nats, tokens = (
        sum(sums[name] for sums in self.interval) for name in ("nats", "tokens")
      )
      loss = nats / tokens
    values = {
      "loss_nats_per_token": loss,
      f"bits_per_{self.network.tokenizer.unit}": loss / math.log(2),
      "learning_rate": self.interval[-1]["learning_rate"],
      "gradient_norm": self.interval[-1]["gradient_norm"],
      "tokens_per_second": self.progress.tokens_per_second,
      "mfu": self.progress.mfu,
    }
    matched = sum(sums.get("matched", 0) for sums in self.interval)
    if matched:
      divergence = sum(sums["divergence"] for sums in self.interval)
      values["teacher_nats_per_token"] = divergence / matched
    self.writer.write(step, "train", **values)
    eta = {"eta_seconds": self.progress.eta_seconds}
    logging.info(
      telemetry.log_line(step, self.config.train.steps, values | eta)
    )

  def _visit(self, step, state, signals):
    """Evaluate, save and sample the state before `step`, where due.

    A run that was stopped during its visit does only the missing tasks when it
    continues. A signal ends an evaluation early, so that the save is not late.
    """
    c, metric = self.config, None
    # A sample or a save would make the folder again, without the run's files.
    self.saver.check_place(step, state)
    if self._due(step, c.eval.every) and not distributed.process_0_says(
      lambda: self._is_evaluated(step)
    ):
      estimate = self.evaluator.estimate(
        self.program.read_out(state),
        self.eval_batches,
        c.eval.estimators[0],
        step,
        is_stopped=signals.poll,
      )
      if estimate is None:
        return
      metric = estimate.nats_per_token
      telemetry.check_finite(step, {"validation": metric})
      self.writer.write(
        step, "valid", unigram_bits=self.unigram_bits, **estimate.record()
      )
      logging.info(
        "step %s  %s: %s  (unigram entropy %.4f bits/%s)",
        f"{step:,}",
        c.eval.split,
        estimate,
        self.unigram_bits,
        self.network.tokenizer.unit,
      )
    if self._due(step, c.checkpoint.every):
      self.saver.save(step, state, metric)
    path = _samples_path(self.workdir, step)
    if self._due(step, c.sample.every) and not distributed.process_0_says(
      path.exists
    ):
      texts = self.sampler.sample(self.program.read_out(state))
      logging.info("sample: %s", text_lib.printable(texts[0].text))
      if self.primary:
        generate.write(path, texts, step)
        _delete_samples(path.parent, c.sample.keep_last)

  def _is_evaluated(self, step):
    """Return whether the run had evaluated this step before it was stopped."""
    return any(
      record["step"] == step and record["kind"] == "valid"
      for record in self.former_records
    )

  def _position(self):
    """Return where the run is besides its state; see saving.Saver."""
    return {"iterator": self.batches.get_state(), "interval": self.interval}

  def _draw_figures(self):
    records = metrics.read(self.workdir)
    c = self.config
    title, unit = f"{c.name}:{c.variant}", self.network.tokenizer.unit
    figures.loss_curve(
      records, self.workdir / "loss.png", title=title, unit=unit
    )
    # Somebody may have changed the file, so its records may lack values.
    valid = [r for r in records if r.keys() >= {"estimator", "slot_curve_bits"}]
    figures.slot_curve(
      {r["estimator"]: r["slot_curve_bits"] for r in valid[-1:]},
      self.workdir / "slot_curve.png",
      title=title,
      unit=unit,
    )
