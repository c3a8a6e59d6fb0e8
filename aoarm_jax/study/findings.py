"""Tables -> answers: yes, no, unclear or not measured, each with its numbers.

The answers are about mechanisms, so what chance leaves open is what other seeds
could give. An effect counts where it is larger than t times its standard error,
t the 97.5% quantile of Student's law of (seeds - 1) degrees of freedom.
Where a part of the error is over windows, or two arms are compared (the fewer
seeds count), that errs on the side of unclear. One seed cannot tell, however
many windows it was measured on.
"""

import math
from typing import NamedTuple

from aoarm_jax.study import tables

YES, NO, UNCLEAR, OPEN = "yes", "no", "unclear", "not measured"
ONE_SEED = "unclear (one seed)"
# 97.5% quantiles of Student's t, for 1 degree of freedom and so on.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
_NORMAL = 1.96


class Answer(NamedTuple):
  """One question.

  Attributes:
    question: with its expected answer (the paper's, or the hypothesis') yes.
    answer: YES, NO, UNCLEAR, ONE_SEED or OPEN.
    numbers: what it rests on.
  """

  question: str
  answer: str
  numbers: str

  @property
  def contradicts(self) -> bool:
    return self.answer == NO


def all_of(differences, areas, specialisation, reference, size) -> list[Answer]:
  """The answers, from the tables of the same names, for models of one size."""
  differences, areas, specialisation = (
    tables.find(rows, size=size)
    for rows in (differences, areas, specialisation)
  )
  return [
    *_reproduction(areas),
    *_areas_against(areas, reference),
    *_deficits(differences, reference),
    _growth_with_length(differences, reference),
    _growth_with_width(differences, reference),
    *_parting(specialisation),
  ]


def _quantile(seeds: int) -> float:
  """Of two or more seeds; of very many that of a few, which is larger."""
  return _STUDENT[min(seeds - 1, len(_STUDENT)) - 1]


def _sign(value: float, error: float, seeds: int) -> str:
  """Whether a value is above 0, as a finding; what is nan is unclear."""
  if seeds < 2:
    return ONE_SEED
  if not abs(value) > _quantile(seeds) * error:
    return UNCLEAR
  return YES if value > 0 else NO


def _area(rows, mechanism, T):
  found = [
    r for r in tables.find(rows, mechanism=mechanism, T=T, budget="steps",
                           orders="uniform")
    if r["area_from_4"] != ""
  ]  # fmt: skip
  return found[0] if found else None


def _shown(row):
  return (
    f"{row['area_from_4']:.3f} "
    f"[{row['area_from_4_low']:.3f}, {row['area_from_4_high']:.3f}]"
  )


def _apart(a, b, stretch):
  """Of two areas: 1, -1 or, where their bands overlap, 0.

  `stretch` is by how much the bands are made wider about their values.
  """

  def ends(row):
    value = row["area_from_4"]
    for side in ("low", "high"):
      yield value + stretch * (row[f"area_from_4_{side}"] - value)

  (a_low, a_high), (b_low, b_high) = ends(a), ends(b)
  return 1 if a_low > b_high else -1 if a_high < b_low else 0


def _pair(rows, T, one, other, question, expected):
  a, b = _area(rows, one, T), _area(rows, other, T)
  if a is None or b is None:
    return Answer(question, OPEN, "")
  numbers = f"dominated area: {one} {_shown(a)}, {other} {_shown(b)}"
  seeds = min(a["seeds"], b["seeds"])
  if seeds < 2:
    return Answer(question, ONE_SEED, numbers)
  # A bootstrap's band of few seeds is a normal law's, not Student's, and of the
  # spread about their own mean. What is apart has to be so by the wider band,
  # what is level by the narrower.
  wider = _quantile(seeds) / _NORMAL * math.sqrt(seeds / (seeds - 1))
  found = _apart(a, b, wider)
  if found == expected and found == _apart(a, b, 1):
    return Answer(question, YES, numbers)
  return Answer(question, UNCLEAR if found == 0 else NO, numbers)


def _reproduction(rows):
  one, other = "decoupled_rope", "mdlm"
  return [
    _pair(rows, 128, one, other,
          f"T = 128: is {one} level with {other} (coherence-diversity)?", 0),
    _pair(rows, 1024, one, other,
          f"T = 1024: is {one} behind {other}?", -1),
  ]  # fmt: skip


def _areas_against(rows, reference):
  return [
    _pair(rows, T, reference, "decoupled_rope",
          f"T = {T}: is {reference} ahead of decoupled_rope "
          "(coherence-diversity, equal steps)?", 1)
    for T in (128, 1024)
  ]  # fmt: skip


def _measured(rows, **wanted):
  return [r for r in tables.find(rows, **wanted) if r["difference_bits"] != ""]


def _deficits(rows, reference):
  answers = []
  for budget in ("steps", "flops", "parameters"):
    found = _measured(
      rows, mechanism="decoupled_rope", budget=budget, orders="uniform"
    )
    question = (
      f"equal {budget}: does decoupled_rope need more bits than {reference}?"
    )
    if not found:
      answers.append(Answer(question, OPEN, ""))
      continue
    signs = {_sign(r["difference_bits"], r["error"], r["seeds"]) for r in found}
    answer = signs.pop() if len(signs) == 1 else UNCLEAR
    answers.append(Answer(question, answer, _list(found, "T")))
  return answers


def _list(rows, key):
  return "; ".join(
    f"{key} = {r[key]}: {r['difference_bits']:+.4f} ± {r['error']:.4f} "
    f"bits/char ({r['seeds']} seed{'s' * (r['seeds'] > 1)}, error over "
    f"{r['error_of']})"
    for r in rows
  )


def _growth(question, rows, key):
  if len(rows) < 2:
    return Answer(question, OPEN, _list(rows, key))
  # From the first to the last that has more than one seed.
  several = [r for r in rows if r["seeds"] > 1]
  if len(several) < 2:
    return Answer(question, ONE_SEED, _list(rows, key))
  first, last = several[0], several[-1]
  growth = last["difference_bits"] - first["difference_bits"]
  error = math.hypot(first["error"], last["error"])
  numbers = (
    f"from {key} = {first[key]} to {last[key]}: {growth:+.4f} ± {error:.4f}; "
    f"{_list(rows, key)}"
  )
  seeds = min(first["seeds"], last["seeds"])
  return Answer(question, _sign(growth, error, seeds), numbers)


def _growth_with_length(rows, reference):
  found = sorted(
    _measured(
      rows, mechanism="decoupled_rope", budget="flops", orders="uniform"
    ),
    key=lambda r: r["T"],
  )
  question = (
    f"equal FLOPs: does decoupled_rope's deficit against {reference} grow with "
    "length?"
  )
  return _growth(question, found, "T")


def _growth_with_width(rows, reference):
  found = _measured(rows, mechanism="decoupled_rope", budget="flops")
  T = max((r["T"] for r in found if r["orders"].startswith("block")), default=0)
  widths = tables.by_width(tables.find(found, T=T))
  question = (
    f"equal FLOPs: does the deficit against {reference} grow with order "
    "divergence (width of the blocks)?"
  )
  return _growth(question, [row | {"width": w} for w, row in widths], "width")


def _parting(rows):
  answers = []
  lengths = sorted({r["T"] for r in rows})
  for T in lengths or ["any"]:
    mine = tables.find(rows, T=T, budget="steps", orders="uniform")
    two = tables.find(mine, mechanism="two_stream")
    one = tables.find(mine, mechanism="decoupled_rope")
    answers += [
      _specialised(two, T, "semantic", 1),
      _specialised(two, T, "structural", -1),
    ]
    answers.append(_between(two, one, T))
  return answers


def _specialised(rows, T, index, sign):
  side = "more" if sign > 0 else "less"
  question = (
    f"T = {T}: have query rows {side} {index} locality than content rows?"
  )
  found = tables.find(rows, index=index, stream="query - content")
  if not found:
    return Answer(question, OPEN, "")
  row = found[0]
  numbers = f"query - content {row['locality']:+.3f}"
  if row["seeds"] > 1:
    numbers += f" ± {_error(row):.3f}"
  answer = _sign(sign * row["locality"], _error(row), row["seeds"])
  return Answer(question, answer, numbers)


def _error(row):
  return math.nan if row["error"] == "" else row["error"]


def _between(two, one, T):
  question = f"T = {T}: does decoupled_rope sit between the two streams?"
  if not two or not one:
    return Answer(question, OPEN, "")
  parts, inside = [], []
  for index in ("semantic", "structural"):
    rows = {r["stream"]: r for r in tables.find(two, index=index)}
    own = tables.find(one, index=index)[0]
    ends = sorted((rows["content"], rows["query"]), key=lambda r: r["locality"])
    # Above the lower one, and below the higher one.
    signs = {_difference(own, ends[0]), _difference(ends[1], own)}
    inside.append(
      signs.pop() if len(signs) == 1 else NO if NO in signs else UNCLEAR
    )
    parts.append(
      f"{index}: content {rows['content']['locality']:.3f}, query "
      f"{rows['query']['locality']:.3f}, decoupled_rope "
      f"{own['locality']:.3f}"
    )
  answer = inside[0] if len(set(inside)) == 1 else UNCLEAR
  return Answer(question, answer, "; ".join(parts))


def _difference(a, b):
  """Whether the locality of one is above that of the other."""
  seeds = min(a["seeds"], b["seeds"])
  error = math.hypot(_error(a), _error(b))
  return _sign(a["locality"] - b["locality"], error, seeds)
