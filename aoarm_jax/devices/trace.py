"""Reads a profile: what a device does, and when it does nothing."""

import collections
import glob
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np


class Shares(NamedTuple):
  """Shares of the time in which a device does something; None: not known.

  Attributes:
    collectives: a collective runs.
    alone: a collective runs, and nothing else.
    idle: no kernel runs.
  """

  collectives: float | None = None
  alone: float | None = None
  idle: float | None = None


def shares(work: Callable[[], Any], device: jax.Device) -> Shares:
  """Profiles work and returns the Shares of a GPU, all None for other devices.

  Args:
    work: is called once, and returns when the device is done.
    device: a device of this process.
  """
  events, seconds = _profile(work, device)
  if not events:
    return Shares()
  network: list[tuple[float, float]] = []
  other: list[tuple[float, float]] = []
  for event in events:
    into = network if "nccl" in event.name.lower() else other
    into.append((event.start_ns, event.start_ns + event.duration_ns))
  return _shares(network, other, 1e9 * seconds)


class Kernel(NamedTuple):
  """The kernels of one name in a profile.

  Attributes:
    name: of the kernel, as the profiler tells it.
    seconds: in which they ran, together.
    launches: how many of them ran.
  """

  name: str
  seconds: float
  launches: int


class Kernels(NamedTuple):
  """The kernels of a profile.

  Attributes:
    kernels: those with most time first.
    seconds: in which at least one of them ran.
  """

  kernels: list[Kernel]
  seconds: float


def kernels(
  work: Callable[[], Any], device: jax.Device, times: int = 1
) -> Kernels:
  """Profiles work and returns the kernels of a GPU.

  Copies of memory count as kernels. For other devices there are none.

  Args:
    work: is called once, and returns when the device is done.
    device: a device of this process.
    times: how often `work` does the same; the result is of one time.
  """
  return of_events(_profile(work, device)[0], times)


def of_events(events: Iterable[Any], times: int = 1) -> Kernels:
  """Returns the kernels of events, which have a name, a start and a duration.

  Args:
    events: as a jax.profiler.ProfileData has them, in nanoseconds.
    times: how often the same was profiled; the result is of one time.
  """
  durations = collections.defaultdict(list)
  intervals = []
  for event in events:
    durations[event.name].append(event.duration_ns)
    intervals.append((event.start_ns, event.start_ns + event.duration_ns))
  found = [
    Kernel(name, sum(each) / 1e9 / times, round(len(each) / times))
    for name, each in durations.items()
  ]
  found.sort(key=lambda kernel: -kernel.seconds)
  return Kernels(found, _covered(intervals) / 1e9 / times)


def _profile(work, device):
  """Returns the events on the streams of a GPU, and the seconds of the work."""
  if device.platform != "gpu":
    return [], 0.0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      start = time.perf_counter()
      work()
      seconds = time.perf_counter() - start
    paths = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    if not paths:
      return [], seconds
    profile = jax.profiler.ProfileData.from_file(paths[0])
    name = f"/device:GPU:{device.local_hardware_id}"
    lines = (plane.lines for plane in profile.planes if plane.name == name)
    return [
      event
      for line in itertools.chain.from_iterable(lines)
      if line.name.startswith("Stream")
      for event in line.events
    ], seconds


def _shares(network, other, total):
  """Returns the Shares of a timeline.

  Args:
    network: (start, end) of every collective.
    other: (start, end) of every other kernel.
    total: length of the timeline.
  """
  both = _covered(network + other)
  alone = both - _covered(other)
  return Shares(_covered(network) / total, alone / total, 1 - both / total)


def _covered(intervals):
  """Returns the length of the union of intervals (start, end)."""
  total, reached = 0.0, -np.inf
  for start, end in sorted(intervals):
    total += max(end - max(start, reached), 0)
    reached = max(reached, end)
  return total
