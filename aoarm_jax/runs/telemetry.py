"""Reports of a run: log lines, speed, time left, profile, NaN guard.

Everything here runs on the host, at the edge of the training loop, on plain
floats. directory.py writes the files of the run directory, and patience.py says
what takes long.
"""

import collections
import contextlib
import importlib.util
import logging as python_logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import errors
from aoarm_jax.devices import peaks

# Libraries whose progress messages are dropped; their warnings are shown.
_NOISY = (
  "orbax",
  "grain",
  "jax",
  "jaxlib",
  "flax",
  "etils",
  "fsspec",
  "matplotlib",
  "tensorboardX",
  "wandb",
)
# Speed is the mean over this time. It follows a machine that slows down, and
# does not jump between log lines.
_SPEED_WINDOW_SECONDS = 60.0


class NonFiniteError(errors.UserError, RuntimeError):
  """A loss or gradient norm that is NaN or infinite: training must stop."""


def check_finite(step: int, values: Mapping[str, float]) -> None:
  """Raises NonFiniteError naming the step and every value that is not finite.

  Args:
    step: the optimizer step the values belong to.
    values: name to float, such as {"loss": 1.4, "gradient norm": 0.4}.
  """
  bad = [f"{k} is {float(v)}" for k, v in values.items() if not np.isfinite(v)]
  if bad:
    raise NonFiniteError(
      f"{' and '.join(bad)} at step {step}; nothing of it was saved. Start a "
      "new run with a lower --config.optimizer.peak_learning_rate, or resume "
      "from the last checkpoint with --config.compute.dtype=float32"
    )


class _ShortLines(python_logging.Formatter):
  """Writes 'HH:MM:SS message', and the level of warnings and errors."""

  def __init__(self):
    super().__init__("%(asctime)s %(mark)s%(message)s", "%H:%M:%S")

  def format(self, record):
    is_loud = record.levelno >= python_logging.WARNING
    record.mark = f"{record.levelname.lower()}: " if is_loud else ""
    return super().format(record)


class _QuietLibraries(python_logging.Filter):
  """Drops the messages of noisy libraries that are less than warnings.

  Orbax and grain log through absl's only logger, as this package does. So the
  file that logs tells them apart, and not the name of the logger.
  """

  def __init__(self):
    super().__init__()
    specs = [importlib.util.find_spec(name) for name in _NOISY]
    self._folders = tuple(
      folder + os.sep
      for spec in specs
      if spec is not None
      for folder in spec.submodule_search_locations or ()
    )

  def filter(self, record):
    return record.levelno >= python_logging.WARNING or not (
      record.pathname.startswith(self._folders)
    )


def setup_logging() -> None:
  """Writes short log lines on stderr; may be called again."""
  handler = logging.get_absl_handler()
  handler.setFormatter(_ShortLines())
  for old in [f for f in handler.filters if isinstance(f, _QuietLibraries)]:
    handler.removeFilter(old)
  handler.addFilter(_QuietLibraries())
  for name in _NOISY:
    python_logging.getLogger(name).setLevel(python_logging.WARNING)
  logging.use_absl_handler()
  logging.set_stderrthreshold("info")
  logging.set_verbosity(logging.INFO)


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Returns whether a device had too little memory for a program."""
  # The error of a CPU has no code.
  return any(
    words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")
  )


class Progress:
  """Steady-state speed and time left, without pauses and compilation.

  Steps are dispatched ahead of their execution, so a clock that is read after a
  dispatch tells little. Call `tick(step)` where the host has just waited for
  the results of `step`: after the first step, which leaves its compilation out,
  and at each log line. Any subset of the steps is enough.
  """

  def __init__(
    self,
    *,
    total_steps: int,
    start_step: int,
    tokens_per_step: int,
    flops_per_token: float | None,
    devices: Sequence[jax.Device],
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts with no speed known.

    Args:
      total_steps: the step at which training ends.
      start_step: the step resumed from.
      tokens_per_step: tokens of a step, over all devices.
      flops_per_token: FLOPs that the model needs to train on one token; None
        if not known.
      devices: all devices of the mesh.
      clock: seconds, for tests.
    """
    self._total_steps = total_steps
    self._step = start_step
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    flops = [peaks.of_kind(device.device_kind).flops for device in devices]
    known = [peak for peak in flops if peak is not None]
    self._peak_flops = sum(known) if len(known) == len(flops) else None
    self._clock = clock
    self._paused_seconds = 0.0
    # (step, seconds without pauses)
    self._marks: collections.deque[tuple[int, float]] = collections.deque()

  def tick(self, step: int) -> None:
    """Notes that `step` is finished."""
    self._step = step
    seconds = self._clock() - self._paused_seconds
    self._marks.append((step, seconds))
    oldest = seconds - _SPEED_WINDOW_SECONDS
    while len(self._marks) > 2 and self._marks[1][1] <= oldest:
      self._marks.popleft()

  @contextlib.contextmanager
  def pause(self, wait_for: Any = None) -> Iterator[None]:
    """Does not count the time inside: validation, samples, saves.

    Args:
      wait_for: a pytree of arrays of the last step that was dispatched. The
        pause begins when they are there, so that the step itself counts.
    """
    jax.block_until_ready(wait_for)
    start = self._clock()
    try:
      yield
    finally:
      self._paused_seconds += self._clock() - start

  @property
  def step_seconds(self) -> float | None:
    """Seconds per step; None until two ticks."""
    if len(self._marks) < 2:
      return None
    (first, start), (last, end) = self._marks[0], self._marks[-1]
    return (end - start) / (last - first) if last > first else None

  @property
  def tokens_per_second(self) -> float | None:
    """Tokens per second, over all devices."""
    seconds = self.step_seconds
    return self._tokens_per_step / seconds if seconds else None

  @property
  def mfu(self) -> float | None:
    """Model FLOPs utilization, a fraction; None if the peak is not known.

    FLOPs of the model over peak FLOPs (Chowdhery et al. 2022, PaLM, app. B).
    """
    speed = self.tokens_per_second
    if not (speed and self._flops_per_token and self._peak_flops):
      return None
    return speed * self._flops_per_token / self._peak_flops

  @property
  def eta_seconds(self) -> float | None:
    """Seconds until the last step, without future pauses."""
    if self.step_seconds is None:
      return None
    return max(self._total_steps - self._step, 0) * self.step_seconds


def format_duration(seconds: float) -> str:
  """Returns a duration as '12s', '3m20s', '1h02m' or '2d03h'."""
  s = round(seconds)
  if s < 60:
    return f"{s}s"
  if s < 3600:
    return f"{s // 60}m{s % 60:02}s"
  if s < 86400:
    return f"{s // 3600}h{s % 3600 // 60:02}m"
  return f"{s // 86400}d{s % 86400 // 3600:02}h"


def format_count(count: float) -> str:
  """Returns a count with three digits: '870', '53.1k', '2.12M' or '1.05B'."""
  for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if count >= 0.9995 * size:
      return f"{count / size:#.3g}".rstrip(".") + unit
  return f"{count:.0f}"


_LOG_FIELDS = {
  "loss_nats_per_token": lambda x: f"loss {x:.4f} nats/token",
  "bits_per_char": lambda x: f"{x:.3f} bits/char",
  "bits_per_byte": lambda x: f"{x:.3f} bits/byte",
  "bits_per_token": lambda x: f"{x:.3f} bits/token",
  "learning_rate": lambda x: f"lr {x:.1e}",
  "gradient_norm": lambda x: f"grad {x:.2f}",
  "tokens_per_second": lambda x: f"{format_count(x)} tokens/s",
  "mfu": lambda x: f"MFU {x:.0%}" if x >= 0.1 else f"MFU {x:.1%}",
  "eta_seconds": lambda x: f"ETA {format_duration(x)}",
}


def log_line(step: int, total: int, values: Mapping[str, Any]) -> str:
  """Returns one line for people, with the values that _LOG_FIELDS names.

  Args:
    step: optimizer steps done.
    total: steps of the whole run.
    values: name in metrics.jsonl, or eta_seconds -> value. None counts as
      absent. Other names are for the file only.
  """
  parts = [f"step {step:>{len(f'{total:,}')},}/{total:,}"]
  for name, show in _LOG_FIELDS.items():
    if values.get(name) is not None:
      parts.append(show(values[name]))
  return "  ".join(parts)


class ProfileWindow:
  """Traces a few steps to workdir/profile, for XProf or Perfetto."""

  def __init__(
    self, workdir: epath.PathLike, start: int, steps: int, primary: bool
  ):
    """Plans the window.

    Args:
      workdir: the run directory.
      start: the first step that is traced; -1 traces no step.
      steps: number of steps.
      primary: whether this is the primary process; the others do not trace.
    """
    self._folder = epath.Path(workdir) / "profile"
    self._start = start
    self._stop = start + steps if primary and start >= 0 else start
    self._is_open = False

  def before_step(self, step: int, wait_for: Any = None) -> None:
    """Opens or closes the trace; call before the step is dispatched.

    Args:
      step: the step about to be dispatched.
      wait_for: arrays of the step before. Execution lags behind dispatch, so
        the trace opens and closes only when they are there.
    """
    inside = self._start <= step < self._stop
    if inside == self._is_open:
      return
    jax.block_until_ready(wait_for)
    if inside:
      self._folder.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(str(self._folder))
      self._is_open = True
    else:
      self.close()

  def annotation(self, step: int) -> contextlib.AbstractContextManager:
    """Marks the dispatch of `step` in the trace, if one is open."""
    if not self._is_open:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def close(self) -> None:
    """Ends an open trace; may be called again."""
    if self._is_open:
      self._is_open = False
      jax.profiler.stop_trace()
      logging.info("profile written to %s", self._folder)
