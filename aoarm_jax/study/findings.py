"""Tables -> answers: yes, no, unclear or not measured, each with its numbers.

An effect counts where it is larger than twice its standard error, or where 95%
bands do not overlap. One seed cannot tell: its difference is unclear, however
many windows it was measured on.
"""

import math
from typing import NamedTuple

from aoarm_jax.study import tables

YES, NO, UNCLEAR, OPEN = "yes", "no", "unclear", "not measured"


class Answer(NamedTuple):
  """One question.

  Attributes:
    question: with its expected answer (the paper's, or the hypothesis') yes.
    answer: YES, NO, UNCLEAR or OPEN.
    numbers: what it rests on.
  """

  question: str
  answer: str
  numbers: str

  @property
  def contradicts(self) -> bool:
    return self.answer == NO


def all_of(differences, areas, specialisation, reference) -> list[Answer]:
  """The answers, from the tables of the same names."""
  return [
    *_reproduction(areas),
    *_areas_against(areas, reference),
    *_deficits(differences, reference),
    _growth_with_length(differences, reference),
    _growth_with_width(differences, reference),
    *_parting(specialisation),
  ]


def _sign(value: float, error: float) -> str:
  """Whether a value is above 0, as a finding."""
  if not math.isfinite(error):
    return UNCLEAR
  if abs(value) <= 2 * error:
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


def _compare(a, b):
  """Of two areas: 1, -1 or, where their bands overlap, 0."""
  if a["area_from_4_low"] > b["area_from_4_high"]:
    return 1
  return -1 if a["area_from_4_high"] < b["area_from_4_low"] else 0


def _pair(rows, T, one, other, question, expected):
  a, b = _area(rows, one, T), _area(rows, other, T)
  if a is None or b is None:
    return Answer(question, OPEN, "")
  found = _compare(a, b)
  numbers = f"dominated area: {one} {_shown(a)}, {other} {_shown(b)}"
  if min(a["seeds"], b["seeds"]) < 2:
    return Answer(question, UNCLEAR, f"{numbers} (one seed)")
  if found == expected:
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
    signs = {_sign(r["difference_bits"], _error(r)) for r in found}
    answer = signs.pop() if len(signs) == 1 else UNCLEAR
    answers.append(Answer(question, answer, _list(found, "T")))
  return answers


def _error(row):
  """The standard error of a difference; of one seed, nan."""
  return row["error"] if row["seeds"] > 1 else math.nan


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
    return Answer(question, UNCLEAR, _list(rows, key))
  first, last = several[0], several[-1]
  growth = last["difference_bits"] - first["difference_bits"]
  error = math.hypot(first["error"], last["error"])
  numbers = (
    f"from {key} = {first[key]} to {last[key]}: {growth:+.4f} ± {error:.4f}; "
    f"{_list(rows, key)}"
  )
  return Answer(question, _sign(growth, error), numbers)


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
  found = [
    r for r in _measured(rows, mechanism="decoupled_rope", budget="flops")
    if r["orders"].startswith("block")
  ]  # fmt: skip
  found.sort(key=lambda r: int(r["orders"].removeprefix("block")))
  question = (
    f"equal FLOPs: does the deficit against {reference} grow with order "
    "divergence (width of the blocks)?"
  )
  return _growth(question, found, "orders")


def _parting(rows):
  answers = []
  lengths = sorted({r["T"] for r in rows})
  for T in lengths or ["any"]:
    mine = tables.find(rows, T=T, budget="steps", orders="uniform")
    two = tables.find(mine, mechanism="two_stream")
    one = tables.find(mine, mechanism="decoupled_rope")
    answers += [_apart(two, T, "semantic", 1), _apart(two, T, "structural", -1)]
    answers.append(_between(two, one, T))
  return answers


def _apart(rows, T, index, sign):
  side = "more" if sign > 0 else "less"
  question = (
    f"T = {T}: have query rows {side} {index} locality than content rows?"
  )
  found = tables.find(rows, index=index, stream="query - content")
  if not found:
    return Answer(question, OPEN, "")
  value, error = found[0]["locality"], found[0]["error"]
  numbers = f"query - content {value:+.3f}"
  if error == "":
    return Answer(question, UNCLEAR, f"{numbers} (one seed: no error)")
  answer = _sign(sign * value, error)
  return Answer(question, answer, f"{numbers} ± {error:.3f}")


def _between(two, one, T):
  question = f"T = {T}: does decoupled_rope sit between the two streams?"
  if not two or not one:
    return Answer(question, OPEN, "")
  parts, inside = [], []
  for index in ("semantic", "structural"):
    values = {r["stream"]: r["locality"] for r in tables.find(two, index=index)}
    own = tables.find(one, index=index)[0]["locality"]
    low, high = sorted((values["content"], values["query"]))
    inside.append(low <= own <= high)
    parts.append(
      f"{index}: content {values['content']:.3f}, query "
      f"{values['query']:.3f}, decoupled_rope {own:.3f}"
    )
  answer = YES if all(inside) else NO if not any(inside) else UNCLEAR
  return Answer(question, answer, "; ".join(parts))
