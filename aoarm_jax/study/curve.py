"""The report of a curve over budgets: does another arm pay, and from when on?

  README.md        what was run, and the two tables that answer the question
  runs.csv         every run: budget, rate, bits by estimator, bits of training
  rates.csv        every trial of a learning rate
  chosen.csv       the rates that these trials decide
  differences.csv  bits of each arm minus those of the reference, paired
  delays.csv       ratio of steps to equal loss, see delay
  bits.png, .svg   bits over FLOPs, every seed a dot
  delay.png, .svg  the delay over the budget, with the cost ratio as a line

It can be written at any time; what was not run is left out, and every number
says how many seeds it is of.
"""

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
  """

  cell: cells_lib.Cell
  result: dict
  steps: int
  bits: np.ndarray

  @property
  def characters(self) -> int:
    train = self.result["config"]["train"]
    return self.steps * train["batch_size"] * self.cell.T

  @property
  def rate(self) -> float:
    return self.result["config"]["optimizer"]["peak_learning_rate"]


def collect(cells: list[cells_lib.Cell], results: Any) -> list[Run]:
  """Return the runs that are done.

  If several cells have the same arm, budget and seed, the last cell counts. A
  checked rate stands behind the searched rate in the sweep, and replaces it.

  Args:
    cells: all cells of the sweep.
    results: the sweep.Results.
  """
  found = {}
  for cell in cells:
    result = results.result(cell)
    if result is None:
      continue
    nats = results.arrays(cell, "windows.npz")["nats"]
    steps = result["config"]["train"]["steps"]
    run = Run(cell, result, steps, nats / math.log(2) / cell.T)
    found[cell.mechanism, cell.T, cell.changes, steps, cell.seed] = run
  return list(found.values())


def _arms(runs, reference):
  """(T, mechanism, reference's runs, arm's runs), by steps and seed."""
  by_arm: dict[tuple[int, str], dict[int, dict[int, Run]]] = {}
  for run in runs:
    if not run.cell.changes:
      arm = by_arm.setdefault((run.cell.T, run.cell.mechanism), {})
      arm.setdefault(run.steps, {})[run.cell.seed] = run
  for (T, mechanism), arm in by_arm.items():
    own = by_arm.get((T, reference))
    if mechanism != reference and own:
      yield T, mechanism, dict(sorted(own.items())), dict(sorted(arm.items()))


def differences(runs: list[Run], reference: str) -> list[tables.Row]:
  """Each arm minus the reference, at equal FLOPs and at equal steps.

  Paired by seed and window. At equal steps the arm's bits are interpolated, for
  every window, in the logarithm of the steps. `answer` is "worse" or "better"
  where the whole 95% interval is on one side of 0 and the difference is above
  MARGIN, "equal" where the interval lies within MARGIN, "unclear" else.
  """
  rows = []
  for T, mechanism, own, arm in _arms(runs, reference):
    for steps, by_seed in own.items():
      budget = next(iter(by_seed.values()))
      equal_flops = [
        seeds
        for seeds in arm.values()
        if any(
          run.cell.budget == "flops" and run.cell.steps == steps
          for run in seeds.values()
        )
      ]
      pairs = {
        "flops": {
          seed: run.bits for seeds in equal_flops for seed, run in seeds.items()
        },
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
  for T, mechanism, own, arm in _arms(runs, reference):
    seeds = _common_seeds(own, arm)
    steps = [n for n in arm if seeds <= arm[n].keys()]
    budgets = [n for n in own if seeds <= own[n].keys()]
    if not seeds or len(steps) < 2:
      continue
    found = delay.delays(
      budgets,
      [[own[n][seed].bits for seed in sorted(seeds)] for n in budgets],
      steps,
      [[arm[n][seed].bits for seed in sorted(seeds)] for n in steps],
      resamples=resamples,
    )
    flops = [
      group[n][min(seeds)].result["training_flops"] / n
      for group, n in ((arm, steps[0]), (own, budgets[0]))
    ]
    for n, one in zip(budgets, found):
      rows.append(
        {
          "mechanism": mechanism,
          "T": T,
          "characters": own[n][min(seeds)].characters,
          "steps": n,
          "delay": one.value,
          "bound": one.bound,
          "low": one.low,
          "high": one.high,
          "cost_ratio": flops[1] / flops[0],
          "seeds": len(seeds),
        }
      )
  return rows


def _common_seeds(own, arm):
  """Seeds that ran the largest number of budgets of both arms."""
  every = [set(seeds) for group in (own, arm) for seeds in group.values()]
  return set.intersection(*every) if every else set()


def runs_table(runs: list[Run]) -> list[tables.Row]:
  """One row a run."""
  rows = []
  for run in runs:
    row = {
      "mechanism": run.cell.mechanism,
      "T": run.cell.T,
      "seed": run.cell.seed,
      "with": run.cell.changes,
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
    "delays": delays(runs, reference, config.study.bootstrap),
  }
  for name, rows in made.items():
    if rows:
      run_dir.write_atomically(folder / f"{name}.csv", tables.to_csv(rows))
  drawn = []
  if runs:
    plots.bits_over_flops(made["runs"], folder, "bits")
    drawn.append("bits")
  if made["delays"]:
    plots.delay_over_budget(made["delays"], folder, "delay")
    drawn.append("delay")
  shown = report.command(argv, config.data.path)
  text = _page(made, drawn, shown, len(cells), len(runs))
  run_dir.write_atomically(folder / "README.md", text)


def _page(made, drawn, shown, asked, done):
  """README.md."""
  parts = [
    "# The budget curve\n",
    "Does a second stream pay, and from which budget on? The question, the "
    "budgets, the seeds and the rule for the learning rates were declared "
    "before the runs, in the docstring of the study's config file.\n",
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
      "delays",
      "Delay: steps of the arm over steps of the reference at equal "
      "loss; a second stream pays above the cost ratio",
      {
        "mechanism": "",
        "T": "",
        "characters": ",",
        "bound": "",
        "delay": ".2f",
        "low": ".2f",
        "high": ".2f",
        "cost_ratio": ".3f",
        "seeds": "",
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
