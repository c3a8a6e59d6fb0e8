"""Reads compiled programs: traffic between devices, kernel launches, memory.

A program's text is what `jax.stages.Compiled.as_text()` returns. The CPU, GPU
and TPU compilers write it a little differently; all three are read.
"""

import dataclasses
import math
import re
from typing import Any

import jax

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
  r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\("
)
# Instructions that launch no kernel.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
_COLLECTIVE = re.compile(
  rf" = (.*?) (?:ragged-)?({'|'.join(KINDS)})(-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|called_computations|branch_computations|true_computation|"
  r"false_computation)=\{?(%?[\w.-]+(?:, *%?[\w.-]+)*)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The size of each axis, then the order of the devices (may be missing), then
# the axes along which a group lies.
_MESH_GROUPS = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")
_CONSTANT = re.compile(r"= [su](?:32|64)\[\](?:\{[^}]*\})? constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The number of runs of one kind of collective, and the bytes it sends.

  Attributes:
    count: executions in one run of the program.
    sent_bytes: bytes that each device sends around the ring of its group. In a
      group of n devices, an array of s bytes costs (n - 1) / n * s bytes, and
      all-reduce costs twice as much.
  """

  count: int = 0
  sent_bytes: float = 0.0

  def __add__(self, other: "Traffic") -> "Traffic":
    return Traffic(self.count + other.count, self.sent_bytes + other.sent_bytes)

  def __mul__(self, times: int) -> "Traffic":
    return Traffic(self.count * times, self.sent_bytes * times)


def traffic(text: str) -> dict[str, Traffic]:
  """Returns the traffic of one run of a program, by kind of collective.

  A collective in a loop counts once for each iteration.

  Args:
    text: of the compiled program.

  Raises:
    ValueError: the text does not say how often a loop with collectives runs,
      or which devices form the groups of a collective.
  """
  computations, entry = _computations(text)
  return _total(entry, computations, {})


def launches(text: str) -> int:
  """Returns the number of kernels in one step of a program's largest loop.

  Args:
    text: of the compiled program.

  Returns:
    The instructions in the loop's body that launch a kernel. 0 if the program
    has no loop, or if the body contains another loop.
  """
  computations, _ = _computations(text)
  bodies = re.findall(r"\bbody=%?([\w.-]+)", text)

  def count(computation):
    total = 0
    for line in computations.get(computation, ()):
      match = _INSTRUCTION.match(line)
      if not match or match[1] in _FREE:
        continue
      if match[1] == "while":
        return 0
      is_call = match[1] == "call" and "to_apply=" in line
      total += count(_called(line, "to_apply")) if is_call else 1
    return total

  if not bodies:
    return 0
  return count(max(bodies, key=lambda body: len(computations.get(body, ()))))


def memory_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes that a compiled program needs on each device.

  Counts arguments, outputs, temporaries and code. An output that takes the
  memory of a donated argument counts once.
  """
  memory: Any = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
    - memory.alias_size_in_bytes
  )


def _computations(text):
  """Returns ({name of a computation: its lines}, name of the entry)."""
  computations: dict[str, list[str]] = {}
  entry: str | None = None
  lines: list[str] | None = None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = computations[match[2]] = []
      entry = match[2] if match[1] else entry
    elif line.startswith("}"):
      lines = None
    elif lines is not None:
      lines.append(line)
  return computations, entry


def _total(name, computations, known):
  """Returns the traffic of one execution of a computation, with its loops.

  Args:
    name: of the computation.
    computations: as `_computations` returns them.
    known: the totals found so far, by name; this one is added.
  """
  if name not in known:
    collectives: dict[Any, tuple[str, Traffic]] = {}
    loops: list[str] = []
    _read(name, computations, collectives, loops, set())
    total = dict.fromkeys(KINDS, Traffic())
    for kind, traffic_once in collectives.values():
      total[kind] += traffic_once
    for line in loops:
      body = _total(_called(line, "body"), computations, known)
      if any(of_kind.count for of_kind in body.values()):
        times = _trip_count(line, computations)
        for kind, of_kind in body.items():
          total[kind] += of_kind * times
    known[name] = total
  return known[name]


def _read(name, computations, collectives, loops, seen):
  """Collects the collectives and loops of a computation and all that it calls.

  Args:
    name: of the computation.
    computations: as `_computations` returns them.
    collectives: receives key -> (kind, Traffic). The key is the chain that a
      collective belongs to: where one runs beside a chain of fusions, the TPU
      compiler writes it into every fusion.
    loops: receives the lines of the loops.
    seen: names of the computations that were read already.
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
        collectives[key] = (kind, _traffic_once(match, ways, scatters))
    elif " while(" in line:
      loops.append(line)
    else:
      for called in _CALLED.findall(line):
        for each in re.findall(r"[\w.-]+", called):
          _read(each, computations, collectives, loops, seen)
      if " call(" in line:
        _read(_called(line, "to_apply"), computations, collectives, loops, seen)


def _traffic_once(match, ways, scatters):
  """Returns the Traffic of one execution of a collective.

  Args:
    match: of _COLLECTIVE on its line.
    ways: number of devices in a group.
    scatters: whether this is the TPU compiler's reduce-scatter. The compiler
      writes an all-reduce, whose result each device cuts to its own share.
  """
  sizes = [
    math.prod(int(dim) for dim in dims.split(",") if dim) * _item_bytes(name)
    for name, dims in _SHAPE.findall(match[1])
  ]
  kind = match[2]
  # The type of a start lists the operands, then the results. A permutation adds
  # scalars that count, which are left out.
  if match[3] and kind not in ("all-reduce",):
    sizes = [size for size in sizes if size > 4] or sizes
    sizes = sizes[len(sizes) // 2 :]
  size = sum(sizes)
  share = (ways - 1) / ways
  sent = {
    "all-gather": share * size,
    "reduce-scatter": (ways - 1) * size,  # The result is one share.
    "all-reduce": (1 if scatters else 2) * share * size,
    "all-to-all": share * size,
    "collective-permute": size,
  }[kind]
  return Traffic(1, float(sent))


def _item_bytes(name):
  """Returns the bytes of an element: name is bf16, s32, f8e4m3fn, pred ..."""
  bits = re.search(r"\d+", name)
  return max(int(bits[0]) // 8, 1) if bits else 1


def _group_size(line):
  """Returns the number of devices in one group of a collective."""
  if "source_target_pairs" in line:
    return 2
  _, _, groups = line.partition("replica_groups=")
  if match := _MESH_GROUPS.match(groups):
    sizes = dict(re.findall(r"'([\w.-]+)'=(\d+)", match[1]))
    axes = re.findall(r"'([\w.-]+)'(?::\(\d+\)(\d+))?", match[2])
    if axes or not match[2]:
      return math.prod(int(share or sizes[axis]) for axis, share in axes)
  if match := re.match(r"\[(\d+),(\d+)\]", groups):
    return int(match[2])
  if match := re.match(r"\{\{([\d,]*)\}", groups):
    return len(match[1].split(","))
  raise ValueError(f"which devices take part? {(groups or line).strip()[:200]}")


def _called(line, attribute):
  match = re.search(rf"{attribute}=%?([\w.-]+)", line)
  assert match is not None, line
  return match[1]


def _trip_count(line, computations):
  if match := _TRIP_COUNT.search(line):
    return int(match[1])
  condition = "\n".join(computations[_called(line, "condition")])
  limits = _CONSTANT.findall(condition)
  if len(limits) == 1 and "direction=LT" in condition:
    return int(limits[0])
  raise ValueError(f"how often does this loop run? {line.strip()[:200]}")
