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

from aoarm_jax import config as config_lib
from aoarm_jax import mechanisms
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import coherence, measure, profiles

Row = dict[str, Any]
_ARM = ("mechanism", "size", "T", "orders", "budget", "steps")
# Estimators of one quantity, the mean over orders of -log p(x | sigma).
_ANY_ORDER = ("any_order", "training_order", "elbo")


def arms(cells: list[cells_lib.Cell]) -> dict[cells_lib.Cell, list]:
  """Arm -> its cells, trials left out."""
  found = {}
  for cell in cells:
    if not cell.trial:
      found.setdefault(cell.arm, []).append(cell)
  return found


def _of_arm(arm):
  return {name: getattr(arm, name) for name in _ARM}


def mean_and_error(values: list[float]) -> tuple[float, float]:
  """Mean over seeds and its standard error, nan for one seed."""
  x = np.asarray(values, float)
  error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
  return float(x.mean()), float(error)


def cells_table(cells, results) -> list[Row]:
  """One row a cell, run or not; `failed` says why where it failed."""
  rows = []
  for cell in cells:
    row = dataclasses.asdict(cell)
    result = results.result(cell)
    row["done"] = result is not None
    row["failed"] = (results.failure(cell) or {"reason": ""})["reason"]
    columns = (
      "peak_learning_rate", "cell_steps", "mlp_width", "parameters",
      "training_flops", "estimator", "bits_per_char", "standard_error_bits",
      "windows", "tokens_per_second", "seconds", "device", "folder",
    )  # fmt: skip
    row |= dict.fromkeys(columns, "")
    if result:
      estimate, config = result["estimate"], result["config"]
      model = config_lib.from_dict(config).model
      values = (
        config["optimizer"]["peak_learning_rate"], config["train"]["steps"],
        model.F, result["parameters"], f"{result['training_flops']:.4g}",
        estimate["estimator"], f"{estimate['bits_per_char']:.5f}",
        f"{estimate['standard_error_bits']:.5f}", estimate["windows"],
        result["tokens_per_second"], result["seconds"]["all"],
        result["device"], results.folder(cell).name,
      )  # fmt: skip
      row |= dict(zip(columns, values))
    rows.append(row)
  return rows


def bits_table(cells, results) -> list[Row]:
  """Bits a character of every arm; causal's is left to right: another one."""
  rows = []
  for arm, members in arms(cells).items():
    done = [r for r in map(results.result, members) if r]
    row = _of_arm(arm) | dict.fromkeys(
      ("estimator", "seeds", "bits_per_char", "error_over_seeds",
       "error_over_windows", "rate"), ""
    )  # fmt: skip
    if done:
      mean, error = mean_and_error(
        [r["estimate"]["bits_per_char"] for r in done]
      )
      row |= {
        "estimator": done[0]["estimate"]["estimator"],
        "seeds": len(done),
        "bits_per_char": mean,
        "error_over_seeds": _or_empty(error),
        "error_over_windows": done[0]["estimate"]["standard_error_bits"],
        "rate": done[0]["config"]["optimizer"]["peak_learning_rate"],
      }
    rows.append(row)
  return rows


def differences_table(cells, results, config) -> list[Row]:
  """Arm - reference, paired: the same windows, orders and seed.

  Positive: the arm needs more bits. `error` is over windows and, where there
  are two or more, over seeds, together; `error_of` says which. mdlm draws masks
  in place of orders: there only the windows are the same.
  """
  rows, budget = [], {"budget": "steps", "mechanism": config.study.reference}
  for arm, members in arms(cells).items():
    kind = mechanisms.MECHANISMS[arm.mechanism]
    if arm.mechanism == config.study.reference or kind.left_to_right:
      continue
    means, within = [], []
    for cell in members:
      other = dataclasses.replace(cell.judged, **budget)
      nats, base = (_windows(results, each) for each in (cell, other))
      if nats is None or base is None or nats.shape != base.shape:
        continue
      bits = (nats - base) / (cell.T * math.log(2))
      means.append(bits.mean())
      within.append(bits.std(ddof=1) / math.sqrt(len(bits)))
    row = _of_arm(arm) | dict.fromkeys(
      ("reference", "seeds", "difference_bits", "error", "error_of"), ""
    )
    if means:
      mean, error = mean_and_error(means)
      over_seeds, windows = len(means) > 1, float(np.mean(within))
      row |= {
        "reference": config.study.reference,
        "seeds": len(means),
        "difference_bits": mean,
        "error": math.hypot(error, windows) if over_seeds else windows,
        "error_of": "seeds and windows" if over_seeds else "windows",
      }
    rows.append(row)
  return rows


def _windows(results, cell):
  if results.result(cell) is None:
    return None
  return measure.read_arrays(results.folder(cell) / "windows.npz")[
    "nats"
  ].astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Curve:
  """Coherence and diversity of an arm by temperature.

  Attributes:
    seeds: how many.
    temperature: [K].
    mean: [K, MEASURES], all samples of all seeds.
    low, high: [K, MEASURES], 95% bootstrap bands over seeds and samples.
    area: rule -> (value, low, high) of the dominated area.
    real: [MEASURES], of real text.
  """

  seeds: int
  temperature: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  area: dict[str, tuple[float, float, float]]
  real: np.ndarray


def curves(cells, results, config) -> dict[cells_lib.Cell, Curve]:
  """Of every arm of which a cell is done."""
  return _by_folders(
    cells, results, "samples.npz",
    lambda files: _curve(files, config.study.bootstrap),
  )  # fmt: skip


def _by_folders(cells, results, name, make):
  """Arm -> what `make` makes of a file of its seeds; arms of equal cells share
  it. Arms without such a file are left out."""
  found, made = {}, {}
  for arm, members in arms(cells).items():
    folders = tuple(
      results.folder(cell) for cell in members if results.result(cell)
    )
    if folders not in made:
      files = [measure.read_arrays(folder / name) for folder in folders]
      files = [file for file in files if file]
      made[folders] = make(files) if files else None
    if made[folders] is not None:
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
    each = [area(values, rule) for values in drawn]
    areas[rule] = (area(mean, rule), *np.percentile(each, (2.5, 97.5)))
  return Curve(
    seeds=len(files),
    temperature=files[0]["temperature"],
    mean=mean,
    low=low,
    high=high,
    area=areas,
    real=coherence.measures(files[0]["real"]),
  )


def curves_table(found) -> list[Row]:
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


def areas_table(cells, found) -> list[Row]:
  """The dominated area of every arm, by both rules."""
  rows = []
  for arm in arms(cells):
    row = _of_arm(arm) | {"seeds": ""}
    for rule in coherence.RULES:
      names = (f"area_{rule}", f"area_{rule}_low", f"area_{rule}_high")
      row |= dict.fromkeys(names, "")
      if arm in found:
        row |= {"seeds": found[arm].seeds}
        row |= dict(zip(names, map(float, found[arm].area[rule])))
    rows.append(row)
  return rows


def profiles_of(cells, results) -> dict[cells_lib.Cell, list[dict]]:
  """Arm -> profile arrays of its seeds, where there are any."""
  return _by_folders(cells, results, "profile.npz", list)


def locality_table(found) -> list[Row]:
  """One row an arm, stream, layer and head; means over seeds."""
  rows = []
  for arm, files in found.items():
    for stream in streams_of(arm):
      index = np.mean([profiles.locality(f, stream) for f in files], axis=0)
      shares = [profiles.shares(f, stream) for f in files]
      for layer, head in np.ndindex(index.shape[:2]):
        row = _of_arm(arm) | {"stream": stream, "layer": layer, "head": head}
        row |= dict(zip(profiles.KINDS, map(_or_empty, index[layer, head])))
        for name in ("own", "sentinels"):
          row[f"mass_{name}"] = float(
            np.mean([share[name][layer, head] for share in shares])
          )
        rows.append(row)
  return rows


def streams_of(arm: cells_lib.Cell) -> tuple[str, ...]:
  return profiles.streams(mechanisms.MECHANISMS[arm.mechanism])


def specialisation_table(found) -> list[Row]:
  """Mean locality of every stream, and what parts two streams.

  Over the layers that both streams have and all heads. Specialisation is query
  - content; a tradeoff that two streams escape shows as semantic > 0 and
  structural < 0. `error` is over seeds.
  """
  rows = []
  for arm, files in found.items():
    names = streams_of(arm)
    means = np.array([[_mean_index(f, name) for name in names] for f in files])
    for i, kind in enumerate(profiles.KINDS):
      for s, stream in enumerate(names):
        mean, error = mean_and_error(means[:, s, i])
        rows.append(_of_arm(arm) | {
          "index": kind, "stream": stream, "seeds": len(files),
          "locality": mean, "error": _or_empty(error),
        })  # fmt: skip
      if len(names) == 2:
        mean, error = mean_and_error(means[:, 1, i] - means[:, 0, i])
        rows.append(_of_arm(arm) | {
          "index": kind, "stream": "query - content", "seeds": len(files),
          "locality": mean, "error": _or_empty(error),
        })  # fmt: skip
  return rows


def _mean_index(arrays, stream):
  """[2]: over heads, and all layers but the last, which has no content rows."""
  index = profiles.locality(arrays, stream)
  layers = max(1, len(arrays[f"{stream}/own"]) - (stream != "content"))
  return np.nanmean(index[:layers], axis=(0, 1))


def _or_empty(x):
  return float(x) if math.isfinite(x) else ""


def find(rows: list[Row], **wanted) -> list[Row]:
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
