"""The traffic between devices in a compiled program, read from its text.

The text is the result of `jax.stages.Compiled.as_text()`. The CPU, GPU and TPU
compilers are supported.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(
  rf" = (.*?) (?:ragged-)?({'|'.join(KINDS)})(-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|called_computations|branch_computations|true_computation|"
  r"false_computation)=\{?(%?[\w.-]+(?:, *%?[\w.-]+)*)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Groups written as a mesh: the size of each axis, optionally the order of the
# devices, and the axes of a group.
_MESH_GROUPS = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")
_CONSTANT = re.compile(r"= [su](?:32|64)\[\](?:\{[^}]*\})? constant\((\d+)\)")
# Lines of each computation of a program, by the computation's name.
_Computations = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The traffic of one kind of collective in one run of a program.

  Attributes:
    count: how often the collective is executed.
    sent_bytes: bytes that every device sends around a ring of its group. With n
      devices and an array of s bytes this is (n - 1) / n * s, and twice that
      for all-reduce.
  """

  count: int = 0
  sent_bytes: float = 0.0

  def __add__(self, other: "Traffic") -> "Traffic":
    return Traffic(self.count + other.count, self.sent_bytes + other.sent_bytes)

  def __mul__(self, times: int) -> "Traffic":
    return Traffic(self.count * times, self.sent_bytes * times)


def traffic(text: str) -> dict[str, Traffic]:
  """Return the traffic by kind of collective.

  A collective in a loop counts as often as the loop runs.

  Args:
    text: the text of a compiled program.

  Raises:
    ValueError: the text does not tell the trip count of a loop with
      collectives, or the groups of a collective.
  """
  computations, entry = _computations(text)
  return _total(entry, computations, {})


def _computations(text: str) -> tuple[_Computations, str]:
  """Return the lines of each computation, and the name of the entry."""
  computations: _Computations = {}
  entry, lines = "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = computations[match[2]] = []
      entry = match[2] if match[1] else entry
    elif line.startswith("}"):
      lines = None
    elif lines is not None:
      lines.append(line)
  return computations, entry


def _total(
  name: str, computations: _Computations, totals: dict[str, dict[str, Traffic]]
) -> dict[str, Traffic]:
  """Return the traffic of one execution of a computation, with its loops.

  Args:
    name: of the computation.
    computations: all computations.
    totals: results by name; this function adds to them.
  """
  if name not in totals:
    collectives: dict[Sequence[str], tuple[str, Traffic]] = {}
    loops: list[str] = []
    _read(name, computations, collectives, loops, set())
    total = dict.fromkeys(KINDS, Traffic())
    for kind, sent in collectives.values():
      total[kind] += sent
    for line in loops:
      body = _total(_called(line, "body"), computations, totals)
      if any(sent.count for sent in body.values()):
        times = _trip_count(line, computations)
        for kind, sent in body.items():
          total[kind] += sent * times
    totals[name] = total
  return totals[name]


def _read(
  name: str,
  computations: _Computations,
  collectives: dict[Sequence[str], tuple[str, Traffic]],
  loops: list[str],
  seen: set[str],
) -> None:
  """Collect the collectives and loops of a computation and all it calls.

  The TPU compiler may run a collective beside a chain of fusions. It then
  writes the collective into each fusion, and it is counted once here.

  Args:
    name: of the computation.
    computations: all computations.
    collectives: the collectives by an identity; this function adds to them.
    loops: the lines of loops; this function adds to them.
    seen: names of the computations that were read; this function adds to them.
  """
  if name in seen or name not in computations:
    return
  seen.add(name)
  for line in computations[name]:
    if match := _COLLECTIVE.search(line):
      chain = re.search(r"channel_id=(\d+).*chain_id=\"(\d+)\"", line)
      key = chain.groups() if chain else (name, line)
      scatters = name.startswith("all-reduce-scatter")
      kind = "reduce-scatter" if scatters else match[2]
      ways = _group_size(line)
      if ways > 1:
        collectives[key] = (kind, _one_collective(match, ways, scatters))
    elif " while(" in line:
      loops.append(line)
    else:
      for called in _CALLED.findall(line):
        for callee in re.findall(r"[\w.-]+", called):
          _read(callee, computations, collectives, loops, seen)
      if " call(" in line:
        _read(_called(line, "to_apply"), computations, collectives, loops, seen)


def _one_collective(match: re.Match[str], ways: int, scatters: bool) -> Traffic:
  """Return the traffic of one collective.

  Args:
    match: the match of _COLLECTIVE in its line.
    ways: the number of devices in a group.
    scatters: whether this is a reduce-scatter of the TPU compiler, which is
      written as an all-reduce whose result each device keeps a part of.
  """
  sizes = [
    math.prod(int(dim) for dim in dims.split(",") if dim) * _item_bytes(name)
    for name, dims in _SHAPE.findall(match[1])
  ]
  kind = match[2]
  # The type of a start lists the operands first and then the results. A
  # permutation also has scalars in its type, which are left out.
  if match[3] and kind not in ("all-reduce",):
    sizes = [size for size in sizes if size > 4] or sizes
    sizes = sizes[len(sizes) // 2 :]
  size = sum(sizes)
  share = (ways - 1) / ways
  sent = {
    "all-gather": share * size,
    "reduce-scatter": (ways - 1) * size,  # `size` is that of one part.
    "all-reduce": (1 if scatters else 2) * share * size,
    "all-to-all": share * size,
    "collective-permute": size,
  }[kind]
  return Traffic(1, float(sent))


def _item_bytes(name: str) -> int:
  """Return the bytes of one element of a type.

  Args:
    name: of the type, such as bf16, s32, f8e4m3fn or pred.
  """
  bits = re.search(r"\d+", name)
  return max(int(bits[0]) // 8, 1) if bits else 1


def _group_size(line: str) -> int:
  """Return how many devices take part in one group of a collective."""
  if "source_target_pairs" in line:
    return 2
  _, _, groups = line.partition("replica_groups=")
  if match := _MESH_GROUPS.match(groups):
    sizes = dict(re.findall(r"'([\w.-]+)'=(\d+)", match[1]))
    # An axis may be followed by the size of the part of it that is used.
    axes = re.findall(r"'([\w.-]+)'(?::\(\d+\)(\d+))?", match[2])
    if axes or not match[2]:
      return math.prod(int(size or sizes[axis]) for axis, size in axes)
  if match := re.match(r"\[(\d+),(\d+)\]", groups):
    return int(match[2])
  if match := re.match(r"\{\{([\d,]*)\}", groups):
    return len(match[1].split(","))
  raise ValueError(f"which devices take part? {(groups or line).strip()[:200]}")


def _called(line: str, attribute: str) -> str:
  """Return the computation that an attribute of a line names."""
  match: Any = re.search(rf"{attribute}=%?([\w.-]+)", line)
  return match[1]


def _trip_count(line: str, computations: _Computations) -> int:
  """Return how often a loop runs.

  Raises:
    ValueError: the text does not tell.
  """
  if match := _TRIP_COUNT.search(line):
    return int(match[1])
  condition = "\n".join(computations[_called(line, "condition")])
  limits = _CONSTANT.findall(condition)
  if len(limits) == 1 and "direction=LT" in condition:
    return int(limits[0])
  raise ValueError(f"how often does this loop run? {line.strip()[:200]}")
