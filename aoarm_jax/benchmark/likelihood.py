"""Likelihoods of a text of any length under every estimator of a mechanism.

The text is scored in blocks, see pipeline.StridedBatches. Every token counts
once.
"""

import functools
from collections.abc import Mapping
from typing import Any

from etils import epath

from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.runs import canvas

_NOTES = {
  "any_order": "exact in one uniform order of each block",
  "training_order": "exact in one order of training of each block",
  "left_to_right": "exact in this order",
  "given_order": "exact in this order",
  "ensembled": "exact for the mixture of K orders",
  "context_ensembled": "exact for the mixture of K contexts of each token",
  "elbo": "bound: estimates the mean of any_order, which is at least -log p",
}


def units(session: session_lib.Session) -> list[results_lib.Unit]:
  """Return a unit for each estimator.

  given_order is left out if the run has no given order, and training_order if
  its orders are those of any_order.
  """
  options, config = session.options, session.config
  trained = session.run.trained.orders
  names = options.estimators or session.kind.estimators
  if not options.estimators:
    absent = set()
    if not (config.orders.given or trained.given):
      absent.add("given_order")
    if trained.family == "uniform" and trained.groups == "none":
      absent.add("training_order")
    names = tuple(name for name in names if name not in absent)
  settings = {
    "text": session.start.facts,
    "T": session.T,
    "stride": session.stride(session.T),
    "seed": options.seed,
  }
  ensembles = {"orders": options.orders}
  more: dict[str, dict[str, Any]] = {
    "ensembled": ensembles,
    "context_ensembled": ensembles,
    "elbo": {
      "times": config.eval.times,
      "least_time": config.train.least_time,
    },
  }
  return [
    results_lib.Unit(
      f"likelihood/{name}",
      settings | more.get(name, {}),
      functools.partial(_measure, session, name),
    )
    for name in names
  ]


def _measure(session, estimator):
  """Return the Estimate of the text as values of JSON."""
  record = session.estimate(estimator, session.start).record()
  del record["slot_curve_bits"]
  return record


def rows(results: Mapping[str, Any]) -> list[results_lib.Row]:
  """Return bits per byte, character and token of every estimator.

  Args:
    results: the estimator -> the result of its unit.
  """
  table = []
  for estimator, result in results.items():
    unit = f"bits_per_{result['unit']}"
    # Units of which the text has equally many say the same.
    sizes = {result["bytes"]: "bits_per_byte"}
    sizes.setdefault(result["tokens"], unit)
    sizes.setdefault(result["characters"], "bits_per_char")
    errors = {
      unit: result["standard_error_bits"],
      "bits_per_byte": result["standard_error_bits_per_byte"],
    }
    table += [
      results_lib.Row(
        "likelihood",
        estimator,
        "likelihood",
        result[name],
        errors.get(name),
        name,
        result["tokens"],
        _NOTES[estimator],
      )
      for name in sizes.values()
    ]
  return table


def draw(results: Mapping[str, Any], path: epath.Path, title: str) -> None:
  """Draw bits per byte, or per token, of every estimator with its error.

  Args:
    results: the estimator -> the result of its unit.
    path: of the PNG file.
    title: of the picture.
  """
  first = next(iter(results.values()))
  unit = "byte" if "bits_per_byte" in first else first["unit"]
  error = "standard_error_bits" + "_per_byte" * (unit == "byte")
  with canvas.draw([path], inches=(8, 1.2 + 0.5 * len(results))) as (_, grid):
    axes = grid[0, 0]
    axes.set_title(title, parse_math=False)
    for i, (name, result) in enumerate(results.items()):
      bits = result[f"bits_per_{unit}"]
      axes.errorbar(
        bits,
        i,
        xerr=result[error] or 0,
        fmt="s" if name == "elbo" else "o",
        color=canvas.COLOURS[1 if name == "elbo" else 0],
        capsize=4,
      )
      axes.annotate(
        f"{bits:.4f}",
        (bits, i),
        (0, 7),
        textcoords="offset points",
        ha="center",
      )
    canvas.name_lines(axes, [name.replace("_", " ") for name in results])
    axes.margins(x=0.2)
    axes.set_xlabel(f"bits per {unit}, with standard errors")
