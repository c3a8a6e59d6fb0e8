"""Tables -> answers: yes, no, unclear or not measured, each with its numbers.

The answers are about mechanisms, so what chance leaves open is what other seeds
could give: an effect counts where its 95% interval, by Student's law of the
degrees of freedom of its error, leaves 0 out. That nothing is there counts
where the interval is within what matters. One seed cannot tell, however many
windows it was measured on.
"""

import math
from typing import NamedTuple

from aoarm_jax.config import mechanisms
from aoarm_jax.study import statistics, tables

YES, NO, UNCLEAR, OPEN = "yes", "no", "unclear", "not measured"
ONE_SEED = "unclear (one seed)"
MIXED = "yes and no"
# What matters of an area and of a locality; both are between 0 and 1.
LEAST_AREA = LEAST_LOCALITY = 0.02
LEVEL = f"no (within {LEAST_AREA:g})"
# Bits: a standard error over seeds beyond which seeds part widely.
_WIDE = 0.02
# The two arms of the paper: the first single stream that knows any order, and
# the masked mechanism.
SINGLE = next(
  name
  for name, kind in mechanisms.MECHANISMS.items()
  if kind.streams == 1 and not kind.left_to_right
)
TWO_STREAMS = next(
  name for name, kind in mechanisms.MECHANISMS.items() if kind.streams == 2
)
MASKED = next(
  name for name, kind in mechanisms.MECHANISMS.items() if kind.masked
)


class Answer(NamedTuple):
  """One question.

  Attributes:
    question: with its expected answer (the paper's, or the hypothesis') yes.
    answer: YES, NO, LEVEL, MIXED, UNCLEAR, ONE_SEED or OPEN.
    numbers: what it rests on.
  """

  question: str
  answer: str
  numbers: str

  @property
  def contradicts(self) -> bool:
    return self.answer in (NO, LEVEL, MIXED)


def all_of(
  differences: list[tables.Row],
  areas: list[tables.Row],
  specialisation: list[tables.Row],
  reference: str,
  size: str,
) -> list[Answer]:
  """The answers, from the tables of the same names, for models of one size."""
  differences, areas, specialisation = (
    tables.find(rows, size=size)
    for rows in (differences, areas, specialisation)
  )
  differences = [r for r in differences if r["difference_bits"] != ""]
  against = tables.find(differences, reference=reference)
  return [
    *_areas(areas, reference),
    *_deficits(against, reference),
    *(
      growth(against, reference, budget)
      for growth in (_growth_with_length, _growth_with_width)
      for budget in ("steps", "flops")
    ),
    *_content(differences, reference),
    *_parting(specialisation),
  ]


def seeds_apart(bits: list[tables.Row]) -> list[str]:
  """The arms of the table `bits` whose seeds part widely, with how far."""
  return [
    f"`{row['mechanism']}` {row['size']} at T = {row['T']}, {row['orders']} "
    f"orders, equal {row['budget']}: {row['error_over_seeds']:.3f}"
    for row in bits
    if row["error_over_seeds"] != "" and row["error_over_seeds"] > _WIDE
  ]


def _decide(estimate: statistics.Estimate, least: float = 0.0) -> str:
  """Whether something is above 0."""
  if estimate.seeds < 2:
    return ONE_SEED
  answers: dict[int | None, str] = {1: YES, 0: LEVEL, -1: NO}
  return answers.get(statistics.effect(estimate, least), UNCLEAR)


def _number(x):
  return math.nan if x == "" else x


def _areas(rows, reference):
  """The paper's comparison, and that with the arm that it lacks.

  That of the paper is of two lengths; the other of all that have several seeds,
  and of those two.
  """
  answers, paper = [], (128, 1024)
  for T in sorted({row["T"] for row in rows}):
    for budget in ("steps", "flops"):
      at = f"T = {T}, equal {budget}"
      found = {
        name: _area(rows, name, T, budget)
        for name in (SINGLE, MASKED, reference)
      }
      if T in paper:
        level = T == 128
        answers.append(
          _pair(
            f"{at}: is {SINGLE} {'level with' if level else 'behind'} "
            f"{MASKED} (coherence-diversity)?",
            *((MASKED, SINGLE), found),
            level=level,
          )
        )
      mine = (found[SINGLE], found[reference])
      if T in paper or all(area and area.seeds > 1 for area in mine):
        answers.append(
          _pair(
            f"{at}: is {reference} ahead of {SINGLE} (coherence-diversity)?",
            (reference, SINGLE),
            found,
          )
        )
  return answers


def _area(rows, mechanism, T, budget):
  found = tables.find(
    rows, mechanism=mechanism, T=T, budget=budget, orders="uniform"
  )
  if not found or found[0]["area_from_4"] == "":
    return None
  row = found[0]
  error = _number(row["area_from_4_error"])
  return statistics.Estimate(
    row["area_from_4"], error, row["seeds"] - 1, row["seeds"]
  )


def _pair(question, names, found, level=False):
  """Whether the first is above the second, or level with it."""
  one, other = (found[name] for name in names)
  if one is None or other is None:
    return Answer(question, OPEN, "")
  numbers = "dominated area: " + ", ".join(
    f"{name} {found[name].value:.3f} ± {found[name].error:.3f}"
    for name in names
  )
  difference = one.minus(other)
  answer = _decide(difference, LEAST_AREA)
  if level and difference.seeds > 1:
    apart = statistics.effect(difference, LEAST_AREA)
    answer = {0: YES, None: UNCLEAR}.get(apart, NO)
  return Answer(question, answer, numbers)


def _over(question, rows):
  """One answer for several lengths; those of one seed are only listed."""
  if not rows:
    return Answer(question, OPEN, "")
  several = [r for r in rows if r["seeds"] > 1]
  signs = {_decide(tables.estimate(r)) for r in several}
  if not several:
    answer = ONE_SEED
  elif signs == {YES, NO}:
    answer = MIXED
  else:
    answer = signs.pop() if len(signs) == 1 else UNCLEAR
  return Answer(question, answer, _list(rows, "T"))


def _deficits(rows, reference):
  answers: list[Answer] = []
  former: list[tuple[int, float]] = []
  for budget in ("steps", "flops", "parameters"):
    found = tables.find(rows, mechanism=SINGLE, budget=budget, orders="uniform")
    same = [(r["T"], r["difference_bits"]) for r in found]
    if same and set(same) <= set(former):
      continue  # The same runs: it is as large as it stands.
    former += same
    answers.append(
      _over(
        f"equal {budget}: does {SINGLE} need more bits than {reference}?",
        found,
      )
    )
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
  growth = tables.estimate(last).minus(tables.estimate(first))
  ends = "" if several == rows else ", of those with several seeds"
  numbers = (
    f"from {key} = {first[key]} to {last[key]}{ends}: {growth.value:+.4f} ± "
    f"{growth.error:.4f}; {_list(rows, key)}"
  )
  return Answer(question, _decide(growth), numbers)


def _growth_with_length(rows, reference, budget):
  found = tables.find(rows, mechanism=SINGLE, budget=budget, orders="uniform")
  question = (
    f"equal {budget}: does {SINGLE}'s deficit against {reference} grow with "
    "length?"
  )
  return _growth(question, sorted(found, key=lambda r: r["T"]), "T")


def _growth_with_width(rows, reference, budget):
  found = tables.find(rows, mechanism=SINGLE, budget=budget)
  T = max((r["T"] for r in found if r["orders"].startswith("block")), default=0)
  widths = tables.by_width(tables.find(found, T=T))
  question = (
    f"equal {budget}: does the deficit against {reference} grow with order "
    "divergence (width of the blocks)?"
  )
  return _growth(question, [row | {"width": w} for w, row in widths], "width")


def _content(rows, reference):
  """The rival explanation: that the rows miss where their content stands."""
  name = f"{SINGLE}_content"
  found = tables.find(rows, mechanism=name, budget="steps", orders="uniform")
  if not found:
    return []
  answer = _over(
    f"equal steps: does {SINGLE} need more bits than {reference} also where "
    f"its rows know their content's position ({name})?",
    tables.find(found, reference=reference),
  )
  plain = tables.find(found, reference=SINGLE)
  if plain:
    numbers = f"{answer.numbers}; against {SINGLE}: {_list(plain, 'T')}"
    answer = answer._replace(numbers=numbers)
  return [answer]


def _parting(rows):
  """At the lengths that have several seeds, where any has."""
  answers = []
  several = [r for r in rows if r["seeds"] > 1]
  lengths = sorted({r["T"] for r in several or rows})
  for T in lengths or ["any"]:
    mine = tables.find(rows, T=T, budget="steps", orders="uniform")
    two = {
      (r["index"], r["stream"]): r
      for r in tables.find(mine, mechanism=TWO_STREAMS)
    }
    one = {r["index"]: r for r in tables.find(mine, mechanism=SINGLE)}
    part = "query - content"
    for question, key, sign in (
      (
        "have query rows more semantic locality than content rows",
        ("semantic", part),
        1,
      ),
      (
        "have query rows less structural locality than content rows",
        ("structural", part),
        -1,
      ),
      (
        "do content rows look structurally (locality above 0)",
        ("structural", "content"),
        1,
      ),
    ):
      answers.append(
        _locality(f"T = {T}: {question}?", two.get(key), key, sign)
      )
    answers.append(_between(two, one, T))
  return answers


def _index(row, sign=1):
  return statistics.Estimate(
    sign * row["locality"],
    _number(row["error"]),
    row["seeds"] - 1,
    row["seeds"],
  )


def _locality(question, row, key, sign):
  if row is None:
    return Answer(question, OPEN, "")
  numbers = f"{key[1]} {row['locality']:+.3f}"
  if row["error"] != "":
    numbers += f" ± {row['error']:.3f}"
  if key == ("structural", "content"):
    numbers += (
      "; on its own slot, the last token generated, "
      f"{row['mass_own']:.1%} of the attention"
    )
  return Answer(question, _decide(_index(row, sign), LEAST_LOCALITY), numbers)


def _between(two, one, T):
  """By the indices in which the streams part at all."""
  question = f"T = {T}: does {SINGLE} sit between the two streams?"
  if not two or not one:
    return Answer(question, OPEN, "")
  inside, parts = [], []
  for index in ("semantic", "structural"):
    own = _index(one[index])
    ends = [_index(two[index, name]) for name in ("content", "query")]
    parts.append(
      f"{index}: content {ends[0].value:.3f}, query {ends[1].value:.3f}, "
      f"{SINGLE} {own.value:.3f}"
    )
    low, high = sorted(ends, key=lambda end: end.value)
    if min(low.seeds, high.seeds, own.seeds) < 2:
      inside.append(ONE_SEED)
    elif high.value - low.value >= LEAST_LOCALITY:
      inside.append(_all(_decide(own.minus(low)), _decide(high.minus(own))))
  answer = _all(*inside) if inside else UNCLEAR
  if not inside:
    parts.append("the streams do not part")
  return Answer(question, answer, "; ".join(parts))


def _all(*answers):
  """Of what has to hold together."""
  for answer in (NO, LEVEL, ONE_SEED, UNCLEAR):
    if answer in answers:
      return answer
  return YES
