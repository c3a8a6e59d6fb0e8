"""What a compiled program sends between devices, read from its text.

The text is that of `jax.stages.Compiled.as_text()`, of the CPU, GPU or TPU
compiler.
"""

import dataclasses
import math
import re

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
# Sizes by axis, perhaps the devices in their order, and the axes of a group.
_MESH_GROUPS = re.compile(r"mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")
_CONSTANT = re.compile(r"= [su](?:32|64)\[\](?:\{[^}]*\})? constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one kind of collective does in a run of the program.

  Attributes:
    count: how often it is executed.
    sent_bytes: by every device, around a ring of its group: of n devices and
      an array of s bytes (n - 1) / n * s, and twice that for all-reduce.
  """

  count: int = 0
  sent_bytes: float = 0.0

  def __add__(self, other: "Traffic") -> "Traffic":
    return Traffic(self.count + other.count, self.sent_bytes + other.sent_bytes)

  def __mul__(self, times: int) -> "Traffic":
    return Traffic(self.count * times, self.sent_bytes * times)


def traffic(text: str) -> dict[str, Traffic]:
  """Traffic by kind; what stands in a loop counts as often as it runs.

  Raises:
    ValueError: collectives in a loop whose trip count the text does not tell,
      or of groups that it does not tell.
  """
  computations, entry = _computations(text)
  return _total(entry, computations, {})


def _computations(text):
  """({name: its lines}, name of the entry)."""
  computations, entry, lines = {}, None, None
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
  """Of one execution of a computation, loops in it included."""
  if name not in known:
    collectives, loops = {}, []
    _read(name, computations, collectives, loops, set())
    total = dict.fromkeys(KINDS, Traffic())
    for kind, one in collectives.values():
      total[kind] += one
    for line in loops:
      body = _total(_called(line, "body"), computations, known)
      if any(one.count for one in body.values()):
        times = _trip_count(line, computations)
        for kind, one in body.items():
          total[kind] += one * times
    known[name] = total
  return known[name]


def _read(name, computations, collectives, loops, seen):
  """Finds collectives and loops in all that is called.

  The TPU compiler writes a collective that runs beside a chain of fusions into
  each of them.
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
        collectives[key] = (kind, _one(match, ways, scatters))
    elif " while(" in line:
      loops.append(line)
    else:
      for called in _CALLED.findall(line):
        for each in re.findall(r"[\w.-]+", called):
          _read(each, computations, collectives, loops, seen)
      if " call(" in line:
        _read(_called(line, "to_apply"), computations, collectives, loops, seen)


def _one(match, ways, scatters):
  """Traffic of one collective.

  Args:
    match: of its line.
    ways: devices in a group.
    scatters: the TPU compiler's reduce-scatter, written as an all-reduce of
      which each device keeps its part.
  """
  sizes = [
    math.prod(int(dim) for dim in dims.split(",") if dim) * _item_bytes(name)
    for name, dims in _SHAPE.findall(match[1])
  ]
  kind = match[2]
  # The type of a start has operands first, then results (and, of permutations,
  # what is counted in scalars).
  if match[3] and kind not in ("all-reduce",):
    sizes = [size for size in sizes if size > 4] or sizes
    sizes = sizes[len(sizes) // 2 :]
  size = sum(sizes)
  share = (ways - 1) / ways
  sent = {
    "all-gather": share * size,
    "reduce-scatter": (ways - 1) * size,  # Its result is one part.
    "all-reduce": (1 if scatters else 2) * share * size,
    "all-to-all": share * size,
    "collective-permute": size,
  }[kind]
  return Traffic(1, float(sent))


def _item_bytes(name):
  """Of an element, by a name such as bf16, s32, f8e4m3fn or pred."""
  bits = re.search(r"\d+", name)
  return max(int(bits[0]) // 8, 1) if bits else 1


def _group_size(line):
  """How many devices take part in one group of a collective."""
  if "source_target_pairs" in line:
    return 2
  _, _, groups = line.partition("replica_groups=")
  if match := _MESH_GROUPS.match(groups):
    sizes = dict(re.findall(r"'([\w.-]+)'=(\d+)", match[1]))
    parts = re.findall(r"'([\w.-]+)'(?::\(\d+\)(\d+))?", match[2])
    if parts or not match[2]:
      return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if match := re.match(r"\[(\d+),(\d+)\]", groups):
    return int(match[2])
  if match := re.match(r"\{\{([\d,]*)\}", groups):
    return len(match[1].split(","))
  raise ValueError(f"which devices take part? {(groups or line).strip()[:200]}")


def _called(line, attribute):
  return re.search(rf"{attribute}=%?([\w.-]+)", line)[1]


def _trip_count(line, computations):
  if match := _TRIP_COUNT.search(line):
    return int(match[1])
  condition = "\n".join(computations[_called(line, "condition")])
  limits = _CONSTANT.findall(condition)
  if len(limits) == 1 and "direction=LT" in condition:
    return int(limits[0])
  raise ValueError(f"how often does this loop run? {line.strip()[:200]}")
