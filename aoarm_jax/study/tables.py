"""Results of cells -> the tables of the report, as rows of a csv file.

A row is a dict; what was not run is "". Everything is recomputed from the
cells' files, and in the order of the sweep.
"""

import csv
import dataclasses
import io
import math
import warnings
from typing import Any

import numpy as np
from absl import logging

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, profiles, statistics

Row = dict[str, Any]
_ARM = ("mechanism", "size", "T", "orders", "budget", "steps")
_AT_ONE = ("familiarity", "repetition")


def arms(cells: list[cells_lib.Cell]) -> dict[cells_lib.Cell, list]:
  """Arm -> its cells."""
  found: dict[cells_lib.Cell, list] = {}
  for cell in cells:
    found.setdefault(cell.arm, []).append(cell)
  return found


def _of_arm(arm):
  return {name: getattr(arm, name) for name in _ARM}


def trained(cells: list[cells_lib.Cell], results: Any) -> list[cells_lib.Cell]:
  """The cells without those that learned nothing but the letters' shares.

  Their differences, texts and attention are of a run that had not begun.
  """
  return [cell for cell in cells if not results.is_untrained(cell)]


def cells_table(cells: list[cells_lib.Cell], results: Any) -> list[Row]:
  """One row a cell, run or not; `failed` says why where it failed."""
  rows = []
  for cell in cells:
    row = dataclasses.asdict(cell)
    result = results.result(cell)
    row["done"] = result is not None
    row["failed"] = (results.failure(cell) or {"reason": ""})["reason"]
    columns = (
      "peak_learning_rate",
      "cell_steps",
      "mlp_width",
      "parameters",
      "training_flops",
      "estimator",
      "bits_per_char",
      "standard_error_bits",
      "windows",
      "tokens_per_second",
      "seconds",
      "device",
      "folder",
    )
    row |= dict.fromkeys(columns, "")
    if result:
      estimate = result["estimate"]
      row |= _of_run(results.folder(cell), result) | {
        "mlp_width": config_lib.from_dict(result["config"]).model.F,
        "training_flops": f"{result['training_flops']:.4g}",
        "standard_error_bits": f"{error_bits(estimate):.5f}",
        "windows": estimate["windows"],
        "tokens_per_second": result["tokens_per_second"],
      }
    rows.append(row)
  return rows


def runs_table(results: Any) -> list[Row]:
  """One row for every run that is done, of this sweep or of another one."""
  names = ("mechanism", "size", "T", "orders", "seed")
  return [
    {name: result["cell"][name] for name in names}
    | {"text": result["text"]["train"][:12]}
    | _of_run(folder, result)
    for folder, result in results.every()
  ]


def error_bits(report: dict[str, Any]) -> float:
  """Return the standard error of an estimate's report; NaN of one window."""
  error = report["standard_error_bits"]
  return math.nan if error is None else error


def _of_run(folder, result):
  """What the tables of cells and of runs both say of a run."""
  config, estimate = result["config"], result["estimate"]
  return {
    "peak_learning_rate": config["optimizer"]["peak_learning_rate"],
    "cell_steps": config["train"]["steps"],
    "parameters": result["parameters"],
    "estimator": estimate["estimator"],
    "bits_per_char": f"{estimate['bits_per_char']:.5f}",
    "seconds": result["seconds"]["all"],
    "device": result["device"],
    "folder": folder.name,
  }


def bits_table(cells: list[cells_lib.Cell], results: Any) -> list[Row]:
  """Bits a character of every arm; some arms are left to right only."""
  rows = []
  for arm, members in arms(cells).items():
    members = [cell for cell in members if results.result(cell)]
    row = _of_arm(arm) | dict.fromkeys(
      (
        "estimator",
        "seeds",
        "bits_per_char",
        "error_over_seeds",
        "error_over_windows",
        "rate",
        "rate_at_edge",
        "steps_run",
        "untrained",
      ),
      "",
    )
    if members:
      first = results.result(members[0])
      bits = statistics.over_seeds([results.bits(cell) for cell in members])
      windows = _windows(results, members[0]) / (arm.T * math.log(2))
      run = first["config"]
      rate = run["optimizer"]["peak_learning_rate"]
      row |= {
        "estimator": first["estimate"]["estimator"],
        "seeds": len(members),
        "bits_per_char": bits.value,
        "error_over_seeds": _or_empty(bits.error),
        "error_over_windows": _or_empty(statistics.over_windows(windows).error),
        "rate": rate,
        "rate_at_edge": results.at_edge(members[0]),
        "steps_run": run["train"]["steps"],
        "untrained": sum(map(results.is_untrained, members)) or "",
      }
    rows.append(row)
  return rows


def rates_table(
  cells: list[cells_lib.Cell], results: Any, config: config_lib.Config
) -> list[Row]:
  """Bits a character at every learning rate, where cells ask for the best.

  inf: the loss became no number.
  """
  rows = {}
  for cell in cells:
    trials = tuple(cells_lib.trials(cell, config))
    if not trials or trials in rows:
      continue
    first, rate = trials[0], results.rate(cell)
    row = {name: getattr(first, name) for name in _ARM}
    for trial in trials:
      bits = results.bits(trial)
      if bits is None:
        bits = "" if results.is_open(trial) else math.inf
      row[trial.rate] = bits
    row["chosen"] = "" if rate is None else f"{rate:g}"
    rows[trials] = row
  return list(rows.values())


def differences_table(
  cells: list[cells_lib.Cell], results: Any, config: config_lib.Config
) -> list[Row]:
  """Arm - reference, paired: the same windows, orders and seed.

  Positive: the arm needs more bits. `error` is over windows and, where there
  are two or more, over seeds, together; `error_of` says which. A masked
  mechanism draws masks in place of orders: there only the windows are the same.
  An ablation is held against what it changes, too. Runs that learned nothing
  are in no pair.

  Args:
    cells: all of the sweep.
    results: sweep.Results.
    config: of the study.
  """
  rows = []
  # The rates of every arm.
  rates: dict[cells_lib.Cell, set[str]] = {}
  for cell in cells:
    rates.setdefault(_without_rate(cell.arm), set()).add(cell.rate)
  for arm, members in arms(trained(cells, results)).items():
    kind = mechanisms.MECHANISMS[arm.mechanism]
    if arm.mechanism == config.study.reference or kind.left_to_right:
      continue
    plain = cells_lib.unablated(arm.mechanism)
    references = [config.study.reference]
    if plain != arm.mechanism:
      references.append(plain)
    for reference in references:
      rows.append(_difference(arm, members, reference, rates, results))
  return rows


def _without_rate(arm):
  return dataclasses.replace(arm, rate="")


def _opposite(cell, reference, rates):
  """The cell of the reference that `cell` is held against: at the same rate,
  but for a sweep that gives each mechanism a rate of its own."""
  other = dataclasses.replace(cell.judged, budget="steps", mechanism=reference)
  has = rates.get(_without_rate(other.arm), set())
  if other.rate not in has and len(has) == 1:
    return dataclasses.replace(other, rate=min(has))
  return other


def _difference(arm, members, reference, rates, results):
  pairs = []
  for cell in members:
    other = _opposite(cell, reference, rates)
    if results.is_untrained(other):
      continue
    nats, base = (_windows(results, each) for each in (cell, other))
    if nats is not None and base is not None and nats.shape == base.shape:
      pairs.append((nats - base) / (cell.T * math.log(2)))
  row = _of_arm(arm) | {"reference": reference}
  row |= dict.fromkeys(
    ("seeds", "difference_bits", "error", "degrees", "error_of"), ""
  )
  if pairs:
    found = statistics.over_both(pairs)
    row |= {
      "seeds": found.seeds,
      "difference_bits": found.value,
      "error": found.error,
      "degrees": found.degrees,
      "error_of": "windows" if len(pairs) == 1 else "seeds and windows",
    }
  return row


def estimate(row: Row) -> statistics.Estimate:
  """What a measured row of the table of differences says."""
  return statistics.Estimate(
    row["difference_bits"], row["error"], row["degrees"], row["seeds"]
  )


def _windows(results, cell):
  if results.result(cell) is None:
    return None
  return results.arrays(cell, "windows.npz")["nats"].astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Curve:
  """Coherence and diversity of an arm by temperature.

  Attributes:
    seeds: how many.
    temperature: [K].
    mean: [K, MEASURES], all samples of all seeds.
    low, high: [K, MEASURES], 95% bootstrap bands over seeds and samples.
    area: rule -> the dominated area; of one seed its error is that of the
      samples.
    real: [MEASURES], of real text.
  """

  seeds: int
  temperature: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  area: dict[str, statistics.Estimate]
  real: np.ndarray


def curves(
  cells: list[cells_lib.Cell], results: Any, config: config_lib.Config
) -> dict[cells_lib.Cell, Curve]:
  """Of every arm of which a cell is done."""
  return _by_folders(
    cells,
    results,
    "samples.npz",
    lambda files: _curve(list(files.values()), config.study.bootstrap),
  )


def _by_folders(cells, results, name, make):
  """Arm -> what `make` makes of {seed: file}; arms of equal cells share it.

  Arms without such a file are left out.
  """
  found, made = {}, {}
  for arm, members in arms(cells).items():
    done = [cell for cell in members if results.result(cell)]
    folders = tuple(map(results.folder, done))
    if folders not in made:
      files = {cell.seed: results.arrays(cell, name) for cell in done}
      files = {seed: file for seed, file in files.items() if file}
      made[folders] = make(files) if files else None
    if made[folders]:
      found[arm] = made[folders]
  return found


def _curve(files, resamplings):
  counts = [file["counts"] for file in files]
  mean = coherence.measures(np.concatenate(counts, axis=1))
  drawn = coherence.bootstrap(counts, resamplings)
  with warnings.catch_warnings():
    # Where a temperature gives no words of that length at all: nan.
    warnings.simplefilter("ignore", RuntimeWarning)
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
  at = {name: i for i, name in enumerate(coherence.MEASURES)}

  def area(values, rule):
    return coherence.dominated_area(
      values[:, at["diversity"]], values[:, at[f"coherence_{rule}"]]
    )

  areas = {}
  for rule in coherence.RULES:
    areas[rule] = statistics.over_seeds(
      [area(coherence.measures(x), rule) for x in counts]
    )
    if len(files) == 1:
      spread = np.std([area(values, rule) for values in drawn])
      areas[rule] = areas[rule]._replace(error=float(spread))
  return Curve(
    seeds=len(files),
    temperature=files[0]["temperature"],
    mean=mean,
    low=low,
    high=high,
    area=areas,
    real=coherence.measures(files[0]["real"]),
  )


def curves_table(found: dict[cells_lib.Cell, Curve]) -> list[Row]:
  """One row a temperature and arm, and one of real text a length."""
  rows, lengths = [], set()
  for arm, curve in found.items():
    for k, temperature in enumerate(curve.temperature):
      row = _of_arm(arm) | {"temperature": round(float(temperature), 4)}
      for i, name in enumerate(coherence.MEASURES):
        row[name] = _or_empty(curve.mean[k, i])
        row[f"{name}_low"] = _or_empty(curve.low[k, i])
        row[f"{name}_high"] = _or_empty(curve.high[k, i])
      rows.append(row)
    if arm.T not in lengths:
      lengths.add(arm.T)
      row = dict.fromkeys(rows[0], "")
      row |= {"mechanism": "real text", "T": arm.T}
      row |= dict(zip(coherence.MEASURES, map(_or_empty, curve.real)))
      rows.append(row)
  return rows


def areas_table(
  cells: list[cells_lib.Cell], found: dict[cells_lib.Cell, Curve]
) -> list[Row]:
  """The dominated area of every arm, by both rules, and beside it what needs
  no spelling: at the temperature nearest to 1."""
  rows = []
  for arm in arms(cells):
    row = _of_arm(arm) | {"seeds": ""}
    for rule in coherence.RULES:
      row |= dict.fromkeys((f"area_{rule}", f"area_{rule}_error"), "")
    row |= dict.fromkeys(_AT_ONE, "")
    if arm in found:
      curve = found[arm]
      row["seeds"] = curve.seeds
      for rule, area in curve.area.items():
        row[f"area_{rule}"] = area.value
        row[f"area_{rule}_error"] = _or_empty(area.error)
      at_one = curve.mean[np.argmin(abs(curve.temperature - 1))]
      for name in _AT_ONE:
        value = at_one[coherence.MEASURES.index(name)]
        row[name] = _or_empty(value)
    rows.append(row)
  return rows


def profiles_of(
  cells: list[cells_lib.Cell], results: Any
) -> dict[cells_lib.Cell, dict[int, dict]]:
  """Arm -> {seed: profile arrays}, where there are any."""

  def current(files):
    found = {
      seed: file for seed, file in files.items() if profiles.is_current(file)
    }
    if len(found) < len(files):
      logging.warning(
        "profiles of an older version are left out: they are not renormalised "
        "for sentinels; delete the folders of their cells to run them again"
      )
    return found

  return _by_folders(cells, results, "profile.npz", current)


def locality_table(found: dict[cells_lib.Cell, dict[int, dict]]) -> list[Row]:
  """One row an arm, seed, stream, layer and head."""
  return [
    _of_arm(arm) | {"seed": seed} | row
    for arm, files in found.items()
    for seed, arrays in files.items()
    for row in locality_rows(arrays, streams_of(arm))
  ]


def locality_rows(
  arrays: dict[str, np.ndarray], streams: tuple[str, ...]
) -> list[Row]:
  """Return one row a stream, layer and head of one run.

  Heads are never averaged over runs: head h of one is not head h of another.
  """
  rows = []
  for stream in streams:
    index = profiles.locality(arrays, stream)
    shares = profiles.shares(arrays, stream)
    for layer, head in np.ndindex(index.shape[:2]):
      row = {"stream": stream, "layer": layer + 1, "head": head + 1}
      row |= dict(zip(profiles.INDICES, map(_or_empty, index[layer, head])))
      row |= {f"mass_{n}": float(x[layer, head]) for n, x in shares.items()}
      rows.append(row)
  return rows


def streams_of(arm: cells_lib.Cell) -> tuple[str, ...]:
  return profiles.streams(mechanisms.MECHANISMS[arm.mechanism])


def specialisation_table(
  found: dict[cells_lib.Cell, dict[int, dict]],
) -> list[Row]:
  """Mean locality of every stream, and what parts two streams.

  Over the layers that both streams have and all heads. Specialisation is query
  - content; a tradeoff that two streams escape shows as semantic > 0 and
  structural < 0. `error` is over seeds.
  """
  rows = []
  for arm, files in found.items():
    names = streams_of(arm)
    means = np.array(
      [
        [np.nanmean(index_of(f, name), axis=(0, 1)) for name in names]
        for f in files.values()
      ]
    )
    for i, kind in enumerate(profiles.INDICES):
      series = {name: means[:, s, i] for s, name in enumerate(names)}
      if len(names) == 2:
        series["query - content"] = means[:, 1, i] - means[:, 0, i]
      for stream, values in series.items():
        index = statistics.over_seeds(values)
        row = _of_arm(arm) | {
          "index": kind,
          "stream": stream,
          "seeds": index.seeds,
          "locality": index.value,
          "error": _or_empty(index.error),
          "mass_own": "",
          "mass_sentinels": "",
        }
        if stream in names:
          shares = [profiles.shares(f, stream) for f in files.values()]
          for name in ("own", "sentinels"):
            mean = np.mean([_but_last(s[name], stream) for s in shares])
            row[f"mass_{name}"] = float(mean)
        rows.append(row)
  return rows


def index_of(arrays: dict[str, np.ndarray], stream: str) -> np.ndarray:
  """Locality of a stream, [layers, N, 3], of all layers but the last.

  That one has no content rows.
  """
  return _but_last(profiles.locality(arrays, stream), stream)


def _but_last(layers, stream):
  return layers[: max(1, len(layers) - (stream != "content"))]


def _or_empty(x):
  return float(x) if math.isfinite(x) else ""


def find(rows: list[Row], **wanted: Any) -> list[Row]:
  """The rows that have these values, the measured ones."""
  return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def by_width(rows: list[Row]) -> list[tuple[int, Row]]:
  """(width, row) of the order families that are blocks, the narrowest first.

  Uniform orders are those of a block as wide as the text.
  """
  widths = (
    (int(r["orders"].removeprefix("block")), r)
    for r in rows
    if r["orders"].startswith("block")
  )
  uniform = ((r["T"], r) for r in find(rows, orders="uniform"))
  return sorted((*widths, *uniform), key=lambda pair: pair[0])


def to_csv(rows: list[Row]) -> str:
  """Numbers with at most six digits; a header also where there is no row."""
  text = io.StringIO()
  if rows:
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
      writer.writerow(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
      )
  return text.getvalue()
