"""Differences between arms, their delays, and predictions with their outcomes.

All differences are paired by seed and window. `answer` is "worse" or "better"
if the whole 95% interval lies on one side of 0 and the difference is above
MARGIN, "equal" if the whole interval lies within MARGIN, "undecided" otherwise,
and "one seed" for a single seed, however many windows it was measured on.
"""

import re

import numpy as np

from aoarm_jax.study import delay, records, statistics

MARGIN = 0.01  # Bits per character that count as nothing.
WHY = "study_why"  # The study whose predictions stand below.
EXPLANATIONS = {
  "split": "two tasks compete in one stream",
  "capacity": "one stream lacks capacity",
  "position": "one stream lacks the position of its content",
}
# The explanation, a contrast of arms and the answers that agree with it, from
# the docstring of configs/study_why.py. The word of a changed field is its
# beginning, since a tiny study has other values.
PREDICTIONS = tuple(
  tuple(line.strip().split(": "))
  for line in """
  split: two_stream content_sees=self - two_stream: worse
  split: two_stream content_sees=last - two_stream: equal
  split: two_stream content_sees=nearest - two_stream content_sees=last: worse
  split: two_stream content_sees=random - two_stream content_sees=last: worse
  split: two_stream_untied - two_stream: equal or better
  split: register - two_stream: worse
  split: decoupled_rope L= - two_stream: worse
  split: decoupled_rope D= - two_stream: worse
  split: decoupled_rope L= - decoupled_rope D=: better
  split: decoupled_rope N= - two_stream N= - decoupled_rope + two_stream: better
  split: decoupled_rope_added - decoupled_rope: equal
  capacity: register - two_stream: equal or better
  capacity: decoupled_rope L= - two_stream: equal or better
  capacity: decoupled_rope D= - two_stream: equal or better
  capacity: two_stream content_sees=self - two_stream: equal
  position: decoupled_rope_added - two_stream: equal or better
  """.strip().splitlines()
)


def answer(estimate: statistics.Estimate) -> str:
  """Return what may be said of a difference, see above."""
  if estimate.seeds < 2:
    return "one seed"
  effect = statistics.effect(estimate, MARGIN)
  return {1: "worse", -1: "better", 0: "equal", None: "undecided"}[effect]


def _paired(terms):
  """Return the statistics.Estimate of a sum of arms, or None without a seed.

  Args:
    terms: [(sign, {seed: run})].
  """
  seeds = set.intersection(*(set(runs) for _, runs in terms))
  seeds = {
    s for s in seeds if len({runs[s].bits.size for _, runs in terms}) == 1
  }
  if not seeds:
    return None
  return statistics.over_both(
    [sum(sign * runs[s].bits for sign, runs in terms) for s in sorted(seeds)]
  )


def _columns(estimate):
  return {
    "difference_bits": estimate.value,
    "half_of_95_percent": estimate.half,
    "seeds": estimate.seeds,
    "answer": answer(estimate),
  }


def _flops_of_a_step(by_steps):
  run = next(iter(next(iter(by_steps.values())).values()))
  return run.flops / run.steps


def at(
  arm: dict[int, dict[int, records.Run]],
  reference: dict[int, dict[int, records.Run]],
  steps: int,
  equal: str,
) -> dict[int, records.Run]:
  """Return the runs {seed: run} of an arm at a budget of the reference.

  Args:
    arm: runs by steps and seed.
    reference: runs by steps and seed.
    steps: the steps of the reference.
    equal: "steps" or "flops".
  """
  if equal == "steps":
    return arm.get(steps, {})
  wanted = steps * _flops_of_a_step(reference) / _flops_of_a_step(arm)
  nearest = min(arm, key=lambda n: abs(n - wanted))
  return arm[nearest] if abs(nearest - wanted) <= 1 else {}


def _budgets(settings, reference):
  """Yield (setting, reference's runs, arm, its runs) of every other arm."""
  for setting, arms in settings.items():
    for name, arm in arms.items():
      if name != reference and reference in arms:
        yield setting, arms[reference], name, arm


def _some(by_seed):
  return next(iter(by_seed.values()))


def _mean(by_seed, others):
  """Return the mean bits over the seeds that both have."""
  shared = by_seed.keys() & others.keys()
  return float(np.mean([by_seed[seed].bits.mean() for seed in shared]))


def differences(
  settings: dict[records.Setting, records.Arms], reference: str
) -> list[records.Row]:
  """Return bits of each arm minus the reference, at equal FLOPs and steps."""
  rows = []
  for setting, own, name, arm in _budgets(settings, reference):
    for steps, runs in own.items():
      for equal in ("flops", "steps"):
        others = at(arm, own, steps, equal)
        estimate = others and _paired([(1, others), (-1, runs)])
        if estimate:
          rows.append(
            setting._asdict()
            | {
              "arm": name,
              "rate": _some(others).rate,
              "characters": _some(runs).characters,
              "steps": steps,
              "equal": equal,
              "arm_bits": _mean(others, runs),
              "reference_bits": _mean(runs, others),
            }
            | _columns(estimate)
          )
  return rows


def contrasts(
  settings: dict[records.Setting, records.Arms], reference: str
) -> list[records.Row]:
  """Return how the difference at equal FLOPs depends on the budget.

  The change is the difference at the largest budget minus the difference at
  the smallest one. Only seeds that ran all four runs count.
  """
  rows = []
  for setting, own, name, arm in _budgets(settings, reference):
    pairs = [(n, at(arm, own, n, "flops")) for n in own]
    pairs = [(n, runs) for n, runs in pairs if runs]
    if len(pairs) > 1:
      (small, least), (large, most) = pairs[0], pairs[-1]
      estimate = _paired(
        [(1, most), (-1, own[large]), (-1, least), (1, own[small])]
      )
      if estimate:
        rows.append(
          setting._asdict()
          | {"arm": name, "from_steps": small, "to_steps": large}
          | _columns(estimate)
        )
  return rows


def delays(
  settings: dict[records.Setting, records.Arms], reference: str, resamples: int
) -> list[records.Row]:
  """Return the delay of each arm at each budget, see delay.Delay.

  Only seeds that ran every budget of both arms count: curves must be whole.
  """
  rows = []
  for setting, own, name, arm in _budgets(settings, reference):
    every = [set(runs) for of in (own, arm) for runs in of.values()]
    seeds = sorted(set.intersection(*every))
    if not seeds or min(len(own), len(arm)) < 2:
      continue
    found = delay.delays(
      list(own),
      [[runs[seed].bits for seed in seeds] for runs in own.values()],
      list(arm),
      [[runs[seed].bits for seed in seeds] for runs in arm.values()],
      resamples=resamples,
    )
    for steps, one in zip(own, found):
      rows.append(
        setting._asdict()
        | {
          "arm": name,
          "characters": _some(own[steps]).characters,
          "steps": steps,
          "delay": one.value,
          "bound": one.bound,
          "low": one.low,
          "high": one.high,
          "resampled_low": one.resampled[0],
          "resampled_high": one.resampled[1],
          "cost_ratio": _flops_of_a_step(own) / _flops_of_a_step(arm),
          "seeds": len(seeds),
        }
      )
  return rows


def predictions(
  settings: dict[records.Setting, records.Arms],
  reference: str,
  trials: records.Trials,
) -> list[records.Row]:
  """Return each prediction of configs/study_why.py with its outcome.

  `holds` is yes, no, "undecided", "one seed" or "not run"; it is "rate" where
  the trials ask for another rate of one of the arms. Rows at equal FLOPs are
  exploratory, so they have no `holds`.
  """
  ours: list[tuple[int | str, records.Arms]] = [
    (s.T, arms) for s, arms in settings.items() if s.study.startswith(WHY)
  ]
  rows = []
  for T, arms in ours or [("", {})]:
    for explanation, contrast, predicts in PREDICTIONS:
      for equal in ("steps", "flops"):
        name = re.sub(r"=(?= |$)", "=...", contrast)
        row = {"T": T, "explanation": explanation, "contrast": name}
        row |= {"predicts": predicts, "equal": equal, "holds": "not run"}
        terms = _terms(contrast, arms, reference, equal)
        if terms and (estimate := _paired(terms)):
          row |= _columns(estimate) | {"contrast": _named(terms)}
          row["holds"] = _holds(row, terms, trials)
        rows.append(row | ({} if equal == "steps" else {"holds": ""}))
  return rows


def _named(terms):
  """Return the contrast with the names of the arms in full."""
  signs = ("-", "", "+")
  words = [f"{signs[sign + 1]} {_some(runs).arm}" for sign, runs in terms]
  return " ".join(words).removeprefix("+ ")


def _holds(row, terms, trials):
  if any(trials.better(_some(runs)) for _, runs in terms):
    return "rate"
  if row["answer"] in ("undecided", "one seed"):
    return row["answer"]
  return "yes" if row["answer"] in row["predicts"].split(" or ") else "no"


def _terms(contrast, arms, reference, equal):
  """Return [(sign, {seed: run})] at the reference's budget; [] if one lacks."""
  own = arms.get(reference)
  parts = re.split(r" ([-+]) ", f" + {contrast}")[1:]
  terms = []
  for sign, words in zip(parts[::2], parts[1::2]):
    arm = next((arm for arm in arms if _matches(arm, words)), None)
    runs = at(arms[arm], own, max(own), equal) if own and arm else {}
    if not runs:
      return []
    terms.append((1 if sign == "+" else -1, runs))
  return terms


def _matches(arm, words):
  own, wanted = arm.split(), words.split()
  return (
    len(own) == len(wanted)
    and own[0] == wanted[0]
    and all(word.startswith(start) for word, start in zip(own[1:], wanted[1:]))
  )
