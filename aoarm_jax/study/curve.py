"""The report of a curve over budgets: does another arm pay, and from when on?

  README.md        what was run, and the two tables that answer the question
  runs.csv         every run: budget, rate, bits by estimator, bits of training
  rates.csv        every trial of a learning rate
  chosen.csv       the rates that these trials decide
  differences.csv  bits of each arm minus those of the reference, paired
  contrasts.csv    how that difference changes from the least to the most FLOPs
  delays.csv       ratio of steps to equal loss, see delay
  bits.png, .svg   bits over FLOPs, every seed a dot
  delay.png, .svg  the delay over the budget, with the cost ratio as a line

It can be written at any time; what was not run is left out, and every number
says how many seeds it is of.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import delay, plots, rates, report, statistics, tables

MARGIN = 0.01  # Bits a character that count as nothing.


class Run(NamedTuple):
  """One run that is done.

  Attributes:
    cell: what was asked for.
    result: what its result.json holds.
    steps: optimizer steps.
    bits: of every window, bits per character, [windows].
    recipe: rate and fields that differ from the primary runs, "" for those.
  """

  cell: cells_lib.Cell
  result: dict
  steps: int
  bits: np.ndarray
  recipe: str

  @property
  def characters(self) -> int:
    train = self.result["config"]["train"]
    return self.steps * train["batch_size"] * self.cell.T

  @property
  def rate(self) -> float:
    return self.result["config"]["optimizer"]["peak_learning_rate"]


def _recipe(cell, config):
  """Return the marks of a cell that is not primary, "" for primary cells."""
  primary = f"{config.optimizer.peak_learning_rate:g}"
  given = rates.parse(cell.rate) is None and cell.rate != primary
  return " ".join(filter(None, (f"rate={cell.rate}" * given, cell.changes)))


def collect(cells: list[cells_lib.Cell], results: Any) -> list[Run]:
  """Return the runs that are done.

  Runs with a checked rate replace runs with the searched rate once they are
  done for all seeds of their arm and budget, so that no row mixes two rules.

  Args:
    cells: all cells of the sweep.
    results: the sweep.Results.
  """
  groups: dict[cells_lib.Cell, dict[str, list[cells_lib.Cell]]] = {}
  for cell in cells:
    rule = rates.parse(cell.rate)
    kind = rule[0] if rule else "given"
    shared = (
      cell.arm if kind == "given" else dataclasses.replace(cell.arm, rate="")
    )
    groups.setdefault(shared, {}).setdefault(kind, []).append(cell)
  runs: dict[tuple, Run] = {}
  for by_rule in groups.values():
    checked = by_rule.pop("checked", [])
    if checked and (not by_rule or all(map(results.result, checked))):
      by_rule = {"checked": checked}
    for cell in (cell for group in by_rule.values() for cell in group):
      result = results.result(cell)
      if result is None:
        continue
      nats = results.arrays(cell, "windows.npz")["nats"]
      steps = result["config"]["train"]["steps"]
      recipe = _recipe(cell, results.config)
      run = Run(cell, result, steps, nats / math.log(2) / cell.T, recipe)
      # The reference is the same run at equal FLOPs and at equal steps.
      key = (cell.mechanism, cell.T, recipe, steps, cell.seed)
      if key not in runs or cell.budget == "flops":
        runs[key] = run
  return list(runs.values())


def _arms(runs, reference):
  """Yields (T, mechanism, recipe, reference's runs, arm's runs).

  The runs are {steps: {seed: Run}}, with ascending steps.
  """
  by_arm: dict[tuple[int, str, str], dict[int, dict[int, Run]]] = {}
  for run in runs:
    key = run.cell.T, run.cell.mechanism, run.recipe
    by_arm.setdefault(key, {}).setdefault(run.steps, {})[run.cell.seed] = run
  for (T, mechanism, own_recipe), arm in by_arm.items():
    own = by_arm.get((T, reference, ""))
    if (mechanism, own_recipe) != (reference, "") and own:
      yield (
        T,
        mechanism,
        own_recipe,
        dict(sorted(own.items())),
        dict(sorted(arm.items())),
      )


def differences(runs: list[Run], reference: str) -> list[tables.Row]:
  """Return each arm minus the reference, at equal FLOPs and at equal steps.

  The differences are paired by seed and window. At equal steps the arm was run
  for as many steps as the reference; only where that run is missing are its
  bits interpolated, for every window, in the logarithm of the steps.

  `answer` is "worse" or "better" where the whole 95% interval is on one side of
  0 and the difference is above MARGIN, "equal" where the whole interval lies
  within MARGIN, and "unclear" else.
  """
  rows = []
  for T, mechanism, own_recipe, own, arm in _arms(runs, reference):
    for steps, by_seed in own.items():
      budget = next(iter(by_seed.values()))
      pairs = {
        "flops": _of_equal_flops(steps, arm),
        "steps": _interpolated(steps, arm),
      }
      for equal, found in pairs.items():
        seeds = sorted(found.keys() & by_seed.keys())
        if not seeds:
          continue
        estimate = statistics.over_both(
          [found[seed] - by_seed[seed].bits for seed in seeds]
        )
        rows.append(
          {
            "mechanism": mechanism,
            "recipe": own_recipe,
            "T": T,
            "characters": budget.characters,
            "steps": steps,
            "equal": equal,
            "difference_bits": estimate.value,
            "half_of_95_percent": estimate.half,
            "seeds": len(seeds),
            "answer": _answer(estimate),
          }
        )
  return rows


def contrasts(runs: list[Run], reference: str) -> list[tables.Row]:
  """Return how the difference at equal FLOPs depends on the budget.

  For each arm and length: the difference at the largest budget minus the
  difference at the smallest one, paired by seed and window. Only seeds that ran
  all four runs count.
  """
  rows = []
  for T, mechanism, own_recipe, own, arm in _arms(runs, reference):
    ends = [
      (n, {seed: bits - own[n][seed].bits for seed, bits in pairs.items()})
      for n in own
      if (
        pairs := {
          seed: bits
          for seed, bits in _of_equal_flops(n, arm).items()
          if seed in own[n]
        }
      )
    ]
    if len(ends) < 2:
      continue
    (small, least), (large, most) = ends[0], ends[-1]
    seeds = sorted(least.keys() & most.keys())
    if not seeds:
      continue
    estimate = statistics.over_both(
      [most[seed] - least[seed] for seed in seeds]
    )
    rows.append(
      {
        "mechanism": mechanism,
        "recipe": own_recipe,
        "T": T,
        "from_steps": small,
        "to_steps": large,
        "change_bits": estimate.value,
        "half_of_95_percent": estimate.half,
        "seeds": len(seeds),
      }
    )
  return rows


def _of_equal_flops(steps, arm):
  """{seed: bits of every window} of an arm, at the FLOPs of the reference."""
  return {
    seed: run.bits
    for seeds in arm.values()
    for seed, run in seeds.items()
    if run.cell.budget == "flops" and run.cell.steps == steps
  }


def _answer(estimate):
  if estimate.seeds < 2:
    return "one seed"
  effect = statistics.effect(estimate, MARGIN)
  return {1: "worse", -1: "better", 0: "equal", None: "unclear"}[effect]


def _interpolated(steps, arm):
  """{seed: bits of every window} of an arm at so many steps."""
  by_seed: dict[int, dict[int, np.ndarray]] = {}
  for n, seeds in arm.items():
    for seed, run in seeds.items():
      by_seed.setdefault(seed, {})[n] = run.bits
  found = {}
  for seed, curve in by_seed.items():
    for low, high in itertools.pairwise(sorted(curve)):
      if low <= steps <= high:
        share = math.log(steps / low) / math.log(high / low)
        found[seed] = (1 - share) * curve[low] + share * curve[high]
  return found


def delays(runs: list[Run], reference: str, resamples: int) -> list[tables.Row]:
  """The delay of each arm at each budget of the reference, see delay.Delay."""
  rows = []
  for T, mechanism, own_recipe, own, arm in _arms(runs, reference):
    # Only seeds that ran every budget of both arms: curves must be whole.
    every = [set(seeds) for group in (own, arm) for seeds in group.values()]
    seeds = sorted(set.intersection(*every))
    if not seeds or len(arm) < 2:
      continue
    budgets = list(own)
    found = delay.delays(
      budgets,
      [[own[n][seed].bits for seed in seeds] for n in budgets],
      list(arm),
      [[runs_of[seed].bits for seed in seeds] for runs_of in arm.values()],
      resamples=resamples,
    )
    own_flops, arm_flops = (
      group[n][seeds[0]].result["training_flops"] / n
      for group, n in ((own, budgets[0]), (arm, next(iter(arm))))
    )
    ratio = own_flops / arm_flops
    for n, one in zip(budgets, found):
      rows.append(
        {
          "mechanism": mechanism,
          "recipe": own_recipe,
          "T": T,
          "characters": own[n][seeds[0]].characters,
          "steps": n,
          "delay": one.value,
          "bound": one.bound,
          "low": one.low,
          "high": one.high,
          "resampled_low": one.resampled[0],
          "resampled_high": one.resampled[1],
          "cost_ratio": ratio,
          "seeds": len(seeds),
          "second_stream": _pays(one, ratio, len(seeds)),
        }
      )
  return rows


def _pays(one, ratio, seeds):
  """Return whether a second stream pays, from a delay and the cost ratio."""
  if one.bound:
    return f"delay {one.bound} {one.value:.3f}: see the difference"
  if seeds < 2:
    return "one seed"
  if one.low > ratio:
    return "pays"
  return "does not pay" if one.high < ratio else "unclear"


def runs_table(runs: list[Run]) -> list[tables.Row]:
  """One row a run."""
  rows = []
  for run in runs:
    row = {
      "mechanism": run.cell.mechanism,
      "T": run.cell.T,
      "seed": run.cell.seed,
      "recipe": run.recipe,
      "rate": run.rate,
      "steps": run.steps,
      "characters": run.characters,
      "training_flops": run.result["training_flops"],
    }
    for found in run.result["estimates"]:
      words = [found["estimator"], *filter(None, [found.get("weights")])]
      row["_".join(words)] = found["bits_per_char"]
    row["standard_error"] = tables.error_bits(run.result["estimate"])
    row["training"] = run.result["last_training_bits"]
    row["tokens_per_second"] = run.result["tokens_per_second"]
    row["device"] = run.result["device"]
    rows.append(row)
  return rows


def rates_table(
  cells: list[cells_lib.Cell], config: config_lib.Config, results: Any
) -> list[tables.Row]:
  """Return one row for every trial of a learning rate that is done.

  Args:
    cells: all cells of the sweep.
    config: the config of the study.
    results: the sweep.Results.
  """
  rows = {}
  for cell in cells:
    if not rates.parse(cell.rate):
      continue
    needed, _ = rates.plan(cell, config, results.outcome)
    for trial in needed:
      bits = results.outcome(trial)
      if bits is not None:
        rate = results.rate(trial)
        rows[trial.arm, trial.seed, rate] = {
          "mechanism": trial.mechanism,
          "T": trial.T,
          "reference_steps": trial.steps,
          "seed": trial.seed,
          "rate": rate,
          "bits_per_char": bits,
        }
  order = ("T", "mechanism", "reference_steps", "seed", "rate")
  return sorted(rows.values(), key=lambda row: [row[name] for name in order])


def chosen_table(cells: list[cells_lib.Cell], results: Any) -> list[tables.Row]:
  """Return one row for every arm, length and budget whose rate trials decide.

  Args:
    cells: all cells of the sweep.
    results: the sweep.Results.
  """
  rows = {}
  for cell in cells:
    if rates.parse(cell.rate):
      rate = results.rate(cell)
      rows[cell.mechanism, cell.T, cell.steps, cell.rate] = {
        "mechanism": cell.mechanism,
        "T": cell.T,
        "reference_steps": cell.steps,
        "rule": cell.rate,
        "rate": "open" if rate is None else f"{rate:g}",
      }
  return list(rows.values())


def write(
  config: config_lib.Config,
  cells: list[cells_lib.Cell],
  results: Any,
  folder: epath.Path,
  argv: list[str],
) -> None:
  """Writes the tables and the pictures that there is data for.

  Args:
    config: of the study.
    cells: all of the sweep.
    results: sweep.Results.
    folder: made if absent.
    argv: of this process.
  """
  reference = config.study.reference
  runs = collect(cells, results)
  made = {
    "runs": runs_table(runs),
    "rates": rates_table(cells, config, results),
    "chosen": chosen_table(cells, results),
    "differences": differences(runs, reference),
    "contrasts": contrasts(runs, reference),
    "delays": delays(runs, reference, config.study.bootstrap),
  }
  for name, rows in made.items():
    if rows:
      run_dir.write_atomically(folder / f"{name}.csv", tables.to_csv(rows))
  # Pictures show runs without a recipe of their own.
  drawn = []
  if not all(row["recipe"] for row in made["runs"]):
    plots.bits_over_flops(made["runs"], folder, "bits")
    drawn.append("bits")
  if not all(row["recipe"] for row in made["delays"]):
    plots.delay_over_budget(made["delays"], folder, "delay")
    drawn.append("delay")
  shown = report.command(argv, config.data.path)
  failures = results.failures(cells)
  text = _page(config.name, made, drawn, shown, len(cells), len(runs), failures)
  run_dir.write_atomically(folder / "README.md", text)


def _page(name, made, drawn, shown, asked, done, failures):
  """README.md."""
  parts = [
    "# Arms against the reference\n",
    "The question, the budgets, the seeds and the rule for the learning rates "
    "were declared before the runs, in the docstring of "
    f"`configs/{name}.py`.\n",
    f"So far {done} of the {asked} runs that the sweep names are done. Runs "
    "with a checked rate that equals the searched one count twice. Every "
    "number says how many seeds stand behind it; one seed is a pilot and no "
    f"result. Made by `{shown}`.\n",
  ]
  tables_shown = (
    (
      "differences",
      "Bits per character, arm minus reference",
      {
        "mechanism": "",
        "recipe": "",
        "T": "",
        "characters": ",",
        "equal": "",
        "difference_bits": "+.4f",
        "half_of_95_percent": ".4f",
        "seeds": "",
        "answer": "",
      },
    ),
    (
      "contrasts",
      "Change of the difference at equal FLOPs, smallest to largest budget",
      {
        "mechanism": "",
        "recipe": "",
        "T": "",
        "from_steps": ",",
        "to_steps": ",",
        "change_bits": "+.4f",
        "half_of_95_percent": ".4f",
        "seeds": "",
      },
    ),
    (
      "delays",
      "Delay: steps of the arm over steps of the reference at equal "
      "loss; a second stream pays above the cost ratio",
      {
        "mechanism": "",
        "recipe": "",
        "T": "",
        "characters": ",",
        "bound": "",
        "delay": ".3f",
        "low": ".3f",
        "high": ".3f",
        "cost_ratio": ".3f",
        "seeds": "",
        "second_stream": "",
      },
    ),
    (
      "rates",
      "Trials of learning rates, at the FLOPs of the reference's steps",
      {
        "mechanism": "",
        "T": "",
        "reference_steps": "",
        "seed": "",
        "rate": "g",
        "bits_per_char": ".4f",
      },
    ),
    (
      "chosen",
      "Rates that the trials decide",
      {"mechanism": "", "T": "", "reference_steps": "", "rule": "", "rate": ""},
    ),
  )
  for name, title, columns in tables_shown:
    parts.append(f"## {title}\n\n{_table(made[name], columns)}\n")
    if made[name]:
      parts.append(f"[{name}.csv]({name}.csv)\n")
  if made["runs"]:
    parts.append("All runs: [runs.csv](runs.csv)\n")
  if failures:
    listed = "\n".join(f"- {line}" for line in failures)
    parts.append(f"## Runs that failed\n\n{listed}\n")
  parts += [f"![{name}]({name}.png)\n" for name in drawn]
  return "\n".join(parts)


def _table(rows, columns):
  if not rows:
    return "Nothing measured yet."
  head = "| " + " | ".join(name.replace("_", " ") for name in columns) + " |"
  body = [
    "| " + " | ".join(format(row[n], how) for n, how in columns.items()) + " |"
    for row in rows
  ]
  return "\n".join([head, "|" + "---|" * len(columns), *body])
