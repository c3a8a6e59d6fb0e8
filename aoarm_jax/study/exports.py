"""Cells of a study as exported models, for runs whose weights were kept."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import exporting, text
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import measure

LOG = "training.csv"


def run(
  config: config_lib.Config,
  cells: Iterable[cells_lib.Cell],
  results: Any,
  folder: epath.Path,
) -> None:
  """Export the cells that have weights: the last weights, in bfloat16.

  A folder also has the training curve, as a csv file.

  Args:
    config: of the study; data.path says what the text is called.
    cells: those that are to be exported.
    results: results.Results.
    folder: each cell becomes a folder of its name here. A folder that stands
      there already is passed over.

  Raises:
    ConfigError: no cell has weights.
    DataError: a file of a cell is damaged.
  """
  kept = {
    path: cell
    for cell in cells
    if (path := results.folder(cell)) and (path / measure.WEIGHTS).exists()
  }
  if not kept:
    raise config_lib.ConfigError(
      "config.study.part='export': no cell in "
      f"{results.workdir / 'cells'} has weights; run cells with "
      "--config.study.keep_weights=true"
    )
  for path, cell in kept.items():
    target = folder / path.name
    if target.exists():
      logging.info("%s stands there already", target)
      continue
    result = results.result(cell)
    model = _model(path, cell, result, config.data.path)
    log = _log(result["training_nats_per_token"], cell.steps)
    exporting.write(
      target,
      model,
      "bfloat16",
      flag="config.study.part='export', workdir",
      others={LOG: log.encode()},
    )


def _model(path, cell, result, source):
  """Return the exporting.Model of a cell.

  Args:
    path: the folder of the cell.
    cell: the cell.
    result: what its result.json holds.
    source: what the user calls the text.
  """
  config = config_lib.from_dict(result["config"])
  network = network_lib.Network(config)
  tokens = cell.steps * config.train.batch_size * config.model.T
  return exporting.Model(
    params=measure.read_weights(path, result, network.abstract_params),
    part="params",
    config=config,
    vocabulary=network.vocabulary,
    tokenizer=network.tokenizer.state,
    training={
      "step": cell.steps,
      "tokens": tokens,
      "corpus": config.data.corpus,
      "path": exporting.last_part(source),
      "started_from": "",
      "checkpoint": result["files"][measure.WEIGHTS],
      "text": result["text"],
      "switches": {},
    },
    evaluations=[
      _evaluation(estimate, result, config.model.T)
      for estimate in result["estimates"]
      if not estimate.get("weights")  # Others are of the moving average.
    ],
  )


def _evaluation(estimate, result, T):
  """Return an estimate as config.json of an exported model has it."""
  split, bits = estimate["split"], estimate["bits_per_char"]
  return {
    "source": "study",
    "split": split,
    "sha256": result["text"].get(split, ""),
    "estimator": estimate["estimator"],
    "unit": "char",
    "bits_per_token": bits,
    "bits_per_char": bits,
    "standard_error_bits": estimate["standard_error_bits"],
    "tokens": estimate["windows"] * T,
  }


def _log(curve, steps):
  """Return the training curve as csv.

  Args:
    curve: the mean loss of equal stretches of the steps, nats a token.
    steps: steps of the run.
  """
  return text.csv_table(
    {
      "last_step": round(i * steps / len(curve)),
      "bits_per_token": f"{nats / np.log(2):.4f}",
    }
    for i, nats in enumerate(curve, start=1)
  )
