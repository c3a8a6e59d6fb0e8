"""What the tests of the study share."""

import dataclasses
import functools
import json
import runpy

import helpers
import numpy as np
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import measure, rates, records
from aoarm_jax.tools import matching

STUDY = str(helpers.ROOT / "configs" / "study_tradeoff.py")
V = 27
WINDOWS = 48


def config(sweep, **study):
  return config_lib.Config(study=config_lib.Study(sweep=sweep, **study))


def expanded(name, variant="default"):
  """Return the config of a study, and its cells."""
  path = helpers.ROOT / "configs" / f"{name}.py"
  get_config = runpy.run_path(str(path))["get_config"]
  made = config_lib.from_config_dict(get_config(variant))
  return made, cells_lib.expand(made)


@functools.cache
def _resolved(cell, made):
  """Return the config of a cell, its training FLOPs and its parameters."""
  resolved = cells_lib.resolve(cell, made, 1e-3)
  flops = matching.training_flops(resolved)
  return resolved, flops, matching.parameters(resolved)


def _result(cell, made, bits):
  """Return what result.json would hold, but for the files."""
  rule = rates.parse(cell.rate)
  # As if every check wanted another rate than the search.
  rate = {"search": 1e-3, "checked": 2e-3}[rule[0]] if rule else cell.rate
  # Seeds and rates change nothing that takes time.
  alike = dataclasses.replace(cell, seed=0, rate="0.001")
  resolved, flops, parameters = _resolved(alike, made)
  config_of_cell = dataclasses.asdict(resolved)
  config_of_cell["optimizer"]["peak_learning_rate"] = float(rate)
  return {
    "cell": dataclasses.asdict(cell),
    "config": config_of_cell,
    "estimate": {
      "estimator": resolved.eval.estimators[0],
      "bits_per_char": bits,
      "standard_error_bits": 0.01,
      "windows": WINDOWS,
    },
    "training_flops": flops,
    "parameters": parameters,
    "text": {"train": "0", "valid": "1"},
    "tokens_per_second": 1,
    "device": "none",
  }


def runs(study, bits, done=lambda cell: True):
  """Return records.Run of cells, with results that are made up.

  Args:
    study: (config, cells), see `expanded`.
    bits: function from a cell to its bits per character.
    done: function that says if a cell is done.
  """
  made, cells = study
  found = {}
  for cell in filter(done, cells):
    result = _result(cell, made, bits(cell))
    # All runs read the same windows.
    text = 0.1 * np.random.default_rng(cell.T).normal(size=WINDOWS)
    steps, rate = (
      result["config"][section][name]
      for section, name in (
        ("train", "steps"),
        ("optimizer", "peak_learning_rate"),
      )
    )
    values = bits(cell) + text - text.mean()
    folder = epath.Path(f"{cell.name}-{cell.T}-{steps}-{rate:g}-{cell.seed}")
    # Equal cells are one run.
    found.setdefault(
      folder, records.Run(cell, cell.name, result, folder, values)
    )
  return list(found.values())


def write_cells(workdir, runs):
  """Write the files of runs that `runs` made up; return the results."""
  every = []
  for run in runs:
    folder = epath.Path(workdir) / "cells" / run.folder
    data = measure._npz(nats=run.bits * np.log(2) * run.cell.T)
    result = run.result | {"files": {"windows.npz": measure._hash(data)}}
    folder.mkdir(parents=True)
    (folder / "windows.npz").write_bytes(data)
    (folder / measure.RESULT).write_text(json.dumps(result))
    every.append((folder, result))
  return every
