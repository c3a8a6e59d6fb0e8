"""--config.study.part=measure: what networks rely on, and what they know.

The networks are those of cells with kept weights. Three measures are taken of
each, in float32, on windows of the evaluated split, for four tables:

  knockouts.csv   the rise in bits where attention is barred from slots
  probes.csv      the characters that a linear map reads from a cached state
  characters.csv  how many characters are read, added up over such probes
  locality.csv    over which distances heads attend, see profiles

The first rows of an order see few slots and lose all of them. So the rise is
also given for the second half of the order alone (`late_bits`).

A cell keeps its measures in measures.json beside its weights, and is measured
again only if the options or the weights differ. All errors are standard errors
over windows. So they say nothing of other seeds. The report has the tables.
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import mechanisms, reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, tokenizers
from aoarm_jax.runs import disk, identity
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import (
  instruments,
  knockouts,
  layerwise,
  measure,
  profiles,
  statistics,
)

MEASURES = "measures.json"
TABLES = ("knockouts", "probes", "characters", "locality")
_VERSION = 2  # Of the measures; another one is measured again.
_KINDS = {
  "options": dict,
  "weights": str,
  "bits": list,
  "knockouts": list,
  "probes": list,
  "locality": list,
}
# Sums of probes: by, the offsets, their name.
_SUMS = (
  ("recency", range(1, 9), "1 to 8"),
  ("position", (*range(-4, 0), *range(1, 5)), "-4 to 4"),
  ("target", (*range(-4, 0), *range(1, 5)), "-4 to 4"),
)


def _options(config):
  """Return what the measures of a cell depend on, beside its weights."""
  everywhere, by_layer = knockouts.wanted(config.study)
  return {
    "version": _VERSION,
    "windows": config.study.measure_windows,
    "knockouts": everywhere,
    "layer_knockouts": by_layer,
    "split": config.eval.split,
  }


def _cell_config(result, config):
  """Return the config of a cell that is done, with the study's options."""
  own = config_lib.from_dict(result["config"])
  compute = dataclasses.replace(
    config.compute, dtype="float32", remat=False, scan_layers=True
  )
  return (
    own.replace("compute", compute)
    .replace("study", config.study)
    .replace("eval.split", config.eval.split)
  )


def run(
  config: config_lib.Config,
  cells: Iterable[cells_lib.Cell],
  results: Any,
) -> None:
  """Measure the cells that have weights and are not measured yet.

  Args:
    config: of the study.
    cells: those that are to be measured.
    results: results.Results.

  Raises:
    ConfigError: a knock-out cannot be read, or no cell has weights.
    DataError: the text is not that of the cells, is too short, or a file is
      damaged.
  """
  knockouts.wanted(config.study)
  kept = _kept(cells, results)
  if not kept:
    raise config_lib.ConfigError(
      "config.study.part='measure': no cell in "
      f"{results.workdir / 'cells'} has weights; run cells with "
      "--config.study.keep_weights=true"
    )
  missing = [
    (cell, path)
    for path, cell in kept.items()
    if _read(path, results.result(cell), config) is None
  ]
  logging.info("%d cells have weights, to measure: %d", len(kept), len(missing))
  if missing:
    _measure_all(config, missing, results)


def _kept(cells, results):
  """Return {folder: cell} of the cells that can be measured."""
  kept: dict[epath.Path, cells_lib.Cell] = {}
  for cell in cells:
    path, result = results.folder(cell), results.result(cell)
    if result is None or not (path / measure.WEIGHTS).exists():
      continue
    if layerwise.supports(config_lib.from_dict(result["config"]).model):
      kept.setdefault(path, cell)
    else:
      logging.info("%s: no row a slot to measure, passed over", cell.label)
  return kept


def _measure_all(config, missing, results):
  """Measure cells one after the other, and note what is found of each."""
  split = config.eval.split
  tokenizer = tokenizers.get(config.data.tokenizer)
  corpus = identity.read_text(config.data, tokenizer, split)
  made: dict[config_lib.Config, instruments.Instruments] = {}
  start = time.monotonic()
  for n, (cell, path) in enumerate(missing):
    if 0 < config.study.limit_seconds < time.monotonic() - start:
      logging.info("limit of time: %d cells are left", len(missing) - n)
      return
    logging.info("measure %d/%d  %s", n + 1, len(missing), cell.label)
    result = results.result(cell)
    if result["text"].get(split) != corpus.hash(split):
      raise corpora.DataError(
        f"config.data.path={config.data.path!r}: its {split} split is not that "
        f"of {path}; name the text that the cells were run with"
      )
    own = _cell_config(result, config)
    measuring = made.setdefault(_shared(own), instruments.Instruments(own))
    params = measure.read_weights(
      path, result, measuring.network.abstract_params
    )
    # A GPU would round the factors of float32 products.
    with jax.default_matmul_precision("highest"):
      fit, held = instruments.windows(own, corpus.split(split))
      found = measuring.measures(params, fit, held)
    record = {
      "options": _options(config),
      "weights": result["files"][measure.WEIGHTS],
      "device": jax.devices()[0].device_kind,
    }
    text = disk.to_json(record | found) + "\n"
    disk.write_atomically(path / MEASURES, text)


def _shared(config):
  """Return the config without what no program depends on."""
  plain = config_lib.Config()
  for name in ("train", "optimizer", "name", "variant", "seed", "match"):
    config = config.replace(name, getattr(plain, name))
  return config


def _read(path, result, config=None):
  """Return the measures of a cell, or None if there are none of these options.

  Args:
    path: the folder of the cell.
    result: what its result.json holds.
    config: of the study. None takes measures with any options.
  """
  if not (path / MEASURES).exists():
    return None
  try:
    data = reading.read(path / MEASURES, reading.JSON_BYTES, inside=path)
    found = reading.parse(data, _KINDS)
  except (reading.ReadError, ValueError) as error:
    raise corpora.DataError(
      f"{path / MEASURES}: damaged ({error}); delete it, and "
      "--config.study.part=measure makes it again"
    ) from None
  same = found["weights"] == result["files"].get(measure.WEIGHTS)
  if config is not None:
    same = same and found["options"] == _options(config)
  return found if same else None


def rows(path: epath.Path, result: dict) -> dict[str, list[dict[str, Any]]]:
  """Return the tables of the measures of a cell, empty without measures.

  Where heads were not measured, their locality is that of the profile that the
  run itself left.

  Args:
    path: the folder of the cell.
    result: the content of its result.json.

  Returns:
    {table: rows} with the names of TABLES. The options of the measures may be
    any; the columns say them.
  """
  tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
  if found := _read(path, result):
    made = _knockout_rows, _probe_rows, _character_rows
    tables = dict(
      zip(TABLES, [*(list(of(found)) for of in made), found["locality"]])
    )
  tables["locality"] = tables["locality"] or _profile_rows(path, result)
  return tables


def _profile_rows(path, result):
  profile = measure.read_arrays(path, "profile.npz", result)
  if not profile or not profiles.is_current(profile):
    return []
  mechanism = result["config"]["model"]["mechanism"]
  return profiles.rows(
    profile, profiles.streams(mechanisms.MECHANISMS[mechanism])
  )


def _with_error(name, values):
  """Return the mean over windows and its standard error, as two columns."""
  estimate = statistics.over_windows(values)
  error = estimate.error
  return {
    name: estimate.value,
    f"{name}_error": error if math.isfinite(error) else "",
  }


def _knockout_rows(found):
  intact = float(np.mean(found["bits"]))
  for row in found["knockouts"]:
    yield {
      "knockout": row["knockout"],
      "stream": row["stream"],
      "layer": row["layer"],
      **_with_error("rise_bits", row["rise_bits"]),
      **_with_error("late_bits", row["late_bits"]),
      "mass": float(np.mean(row["mass"])),
      "intact_bits": intact,
      "windows": len(row["rise_bits"]),
    }


def _accuracies(found):
  """Return {(by, offset): [states, windows]} of the share that is read."""
  table: dict[tuple[str, int], list[np.ndarray]] = {}
  for row in found["probes"]:
    share = np.divide(row["right"], row["seen"])
    table.setdefault((row["by"], row["offset"]), []).append(share)
  return {key: np.array(rows) for key, rows in table.items()}


def _probe_rows(found):
  for (by, offset), share in _accuracies(found).items():
    for layer, values in enumerate(share):
      yield {
        "by": by,
        "offset": offset,
        "layer": layer,
        **_with_error("accuracy", values),
        **_with_error("above_own_token", values - share[0]),
        "windows": len(values),
      }


def _character_rows(found):
  """Yield how many characters of a group can be read from a state.

  A character that is guessed from the own token alone does not count. With a
  the accuracy and a0 that of the own token, it counts (a - a0) / (1 - a0).
  """
  shares = _accuracies(found)
  for by, offsets, name in _SUMS:
    group = [shares[by, d] for d in offsets if (by, d) in shares]
    if not group:
      continue
    total = sum(
      (share - share[0]) / max(1 - share[0].mean(), 1e-9) for share in group
    )
    for layer, values in enumerate(total):
      yield {
        "by": by,
        "offsets": name,
        "layer": layer,
        "probes": len(group),
        **_with_error("characters", values),
        "windows": len(values),
      }
