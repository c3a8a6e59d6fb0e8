"""How much a likelihood depends on the order of generation.

spread    log p(x | sigma) of windows in several uniform orders, from left to
          right and from right to left
pairs     log p(a) + log p(b | a) beside log p(b) + log p(a | b): one law of
          both tokens would give the same number
adaptive  the orders that the model itself chooses: their rank correlation with
          the positions; 1 is left to right, -1 right to left, 0 neither
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from aoarm_jax import orders
from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.data import pipeline
from aoarm_jax.generation import prompts
from aoarm_jax.runs import canvas

_PAIRS = 4  # Pairs of each kind in a window.
_FAR = 8  # Least distance of a distant pair, in positions.


def units(session: session_lib.Session) -> list[results_lib.Unit] | str:
  """Return the units, or why there are none."""
  if session.kind.left_to_right:
    return f"mechanism {session.network.model.mechanism} has one order only"
  windows = session.window_settings()
  made = [
    results_lib.Unit(
      "orders/spread",
      windows | {"orders": session.options.orders},
      functools.partial(_spread, session),
    ),
    results_lib.Unit(
      "orders/pairs",
      windows | {"pairs": _PAIRS},
      functools.partial(_pairs, session),
    ),
  ]
  method = _adaptive_method(session)
  if method and session.T >= 3:
    settings = {
      "texts": session.options.texts,
      "seed": session.options.seed,
      "temperature": 1.0,
    }
    unit = functools.partial(_adaptive, session, method)
    made.append(results_lib.Unit("orders/adaptive", settings | method, unit))
  return made


def _adaptive_method(session):
  """Return the options of the method whose orders the model chooses."""
  if "adaptive" in session.kind.methods:
    return {"method": "adaptive", "width": 1, "score": "confidence"}
  if "confidence" in session.kind.methods:
    return {"method": "confidence", "steps": 0}
  return {}


def _whole(window):
  """Return the parsed text of a window of which every token is scored."""
  everywhere = np.ones(len(window), bool)
  return prompts.Marked(window, ~everywhere, everywhere, "a window")


def _spread(session):
  """Return bits per token of windows in several orders."""
  windows = session.windows
  texts = [_whole(window) for window in windows]
  # The end of a padded document is a position of its order.
  end = session.network.layout.predicts_end
  sizes = np.array([min(session.T, len(w) + end) for w in windows])

  def bits_in(order, given=None):
    scores = session.score(texts, order, given)
    return np.array([score.bits for score in scores]) / sizes

  uniform = np.array(
    [bits_in("given", given) for given in session.drawn_orders(sizes)]
  )
  K = len(uniform)
  # Every order is in one difference, so the differences are independent.
  apart = uniform[1::2] - uniform[: K // 2 * 2 : 2]
  forward = bits_in("left_to_right")
  log_p = -uniform * sizes * math.log(2)
  most = log_p.max(axis=0)
  ensembled = most + np.log(np.exp(log_p - most).mean(axis=0))
  values = {
    "uniform": uniform.mean(axis=0),
    "left_to_right": forward,
    "right_to_left": bits_in("right_to_left"),
    "ensembled": -ensembled / math.log(2) / sizes,
    "left_to_right_minus_uniform": forward - uniform.mean(axis=0),
    "spread": uniform.std(axis=0, ddof=1),
    "difference": apart.mean(axis=0),
    "absolute_difference": np.abs(apart).mean(axis=0),
  }
  return {
    "bits_per_token": {name: _summary(bits) for name, bits in values.items()},
    "windows": len(windows),
    "orders": K,
    "uniform_bits_per_token": uniform.T.tolist(),
    "left_to_right_bits_per_token": forward.tolist(),
  }


def _pairs(session):
  """Return how far two orders of a pair of tokens are apart, in bits."""
  found: dict[str, list[list[float]]] = {}
  for kind in ("neighbours", "distant"):
    for context in ("given the rest", "alone"):
      texts = [
        text
        for i, window in enumerate(session.windows)
        for text in _marked_pairs(session, i, window, kind, context)
      ]
      if texts:
        forward = session.score(texts, "left_to_right")
        backward = session.score(texts, "right_to_left")
        found[f"{kind}, {context}"] = [
          [a.bits, b.bits] for a, b in zip(forward, backward)
        ]
  return {
    name: {
      "pairs": len(bits),
      "bits": bits,
      "mean_bits": float(np.mean(bits)),
      "difference": _summary(np.subtract(*np.transpose(bits))),
      "absolute_difference": _summary(np.abs(np.subtract(*np.transpose(bits)))),
    }
    for name, bits in found.items()
  }


def _summary(values):
  mean, error = results_lib.mean_and_error(values)
  deviation = float(np.std(values))
  return {"mean": mean, "error": error, "standard_deviation": deviation}


def _marked_pairs(session, number, window, kind, context):
  """Yield the parsed texts of some pairs of positions of a window."""
  # The last token of a padded document is left out: its end would be scored.
  n = len(window) - session.network.layout.predicts_end
  far = 1 if kind == "neighbours" else _FAR
  if n <= far:
    return
  purpose = 3 if kind == "neighbours" else 4
  bits = pipeline.random_bits(
    session.options.seed, number, 2 * _PAIRS, purpose=purpose
  )
  for first, more in bits.reshape(-1, 2):
    a = int(first % np.uint64(n - far))
    b = a + far
    if kind == "distant":
      b += int(more % np.uint64(n - b))
    scored = np.isin(np.arange(len(window)), (a, b))
    known = ~scored & (context == "given the rest")
    yield prompts.Marked(window, known, scored, "a pair", context != "alone")


def _adaptive(session, method):
  """Return how the orders that the model chooses go through the text."""
  T = session.T
  prompt = prompts.Prompt(np.zeros(T, np.int32), np.zeros(T, bool))
  (texts,) = session.fill(
    [prompt], count=session.options.texts, temperature=1.0, **method
  )
  found = np.array([text.order[:T] for text in texts], np.int32)
  ranks = np.arange(T)
  correlations = [float(np.corrcoef(ranks, order)[0, 1]) for order in found]
  steps = np.abs(np.diff(found, axis=1)).mean(axis=1)
  return {
    "texts": len(found),
    "rank_correlation": _summary(correlations),
    "alignment": _summary(
      np.asarray(orders.alignment(jnp.asarray(found)), np.float64)
    ),
    "mean_step_in_positions": _summary(steps),
    "mean_step_of_a_uniform_order": (T + 1) / 3,
    "mean_position_by_rank": found.mean(axis=0).tolist(),
    "orders": found.tolist(),
  }


# Name in the result of `_spread`, pairs and adaptive orders -> columns.
_SPREAD = {
  "uniform": ("uniform orders", "likelihood", "mean over orders"),
  "left_to_right": ("left_to_right", "likelihood", "exact in this order"),
  "right_to_left": ("right_to_left", "likelihood", "exact in this order"),
  "ensembled": ("ensembled", "likelihood", "exact for the mixture of K orders"),
  "left_to_right_minus_uniform": (
    "left_to_right - uniform",
    "difference",
    "paired by windows",
  ),
  "spread": (
    "uniform orders",
    "spread",
    "standard deviation over the orders of a window",
  ),
  "difference": ("two uniform orders", "difference", "0 up to chance"),
  "absolute_difference": (
    "two uniform orders",
    "absolute difference",
    "0 if the law is consistent",
  ),
}
_PAIR = {
  "difference": "log p(b) + log p(a|b) - log p(a) - log p(b|a), a < b",
  "absolute_difference": "0 if the law is consistent",
}
_ADAPTIVE = {
  "rank_correlation": ("1", "of rank and position; 1 is left to right"),
  "alignment": ("1", "of recency and nearness; 1 is a moving front"),
  "mean_step_in_positions": ("positions", "a uniform order has {:.2f}"),
}


def rows(results: Mapping[str, Any]) -> list[results_lib.Row]:
  """Return the rows of the table.

  Args:
    results: "spread", "pairs" and "adaptive" -> the result of the unit.
  """

  def row(subject, measure, value, unit, n, note):
    return results_lib.Row(
      "orders", subject, measure, value["mean"], value["error"], unit, n, note
    )

  table = []
  if spread := results.get("spread"):
    for name, (subject, measure, note) in _SPREAD.items():
      value, n = spread["bits_per_token"][name], spread["windows"]
      table.append(row(subject, measure, value, "bits_per_token", n, note))
  for name, pair in results.get("pairs", {}).items():
    for key, note in _PAIR.items():
      deviation = pair[key]["standard_deviation"]
      note = f"{note}; standard deviation {deviation:.4f}"
      measure, n = key.replace("_", " "), pair["pairs"]
      table.append(row(f"pairs, {name}", measure, pair[key], "bits", n, note))
  if adaptive := results.get("adaptive"):
    for key, (unit, note) in _ADAPTIVE.items():
      note = note.format(adaptive["mean_step_of_a_uniform_order"])
      measure, n = key.replace("_", " "), adaptive["texts"]
      table.append(
        row("adaptive orders", measure, adaptive[key], unit, n, note)
      )
  return table


def draw(results: Mapping[str, Any], path: epath.Path, title: str) -> None:
  """Draw the spread, the pairs and the adaptive orders, as far as measured.

  Args:
    results: "spread", "pairs" and "adaptive" -> the result of the unit.
    path: of the PNG file.
    title: of the picture.
  """
  panels = {"spread": _draw_spread, "pairs": _draw_pairs}
  panels["adaptive"] = _draw_adaptive
  shown = [name for name in panels if name in results]
  with canvas.draw(
    [path], 1, len(shown), inches=(1 + 4.6 * len(shown), 4.4)
  ) as (picture, grid):
    picture.suptitle(title, parse_math=False)
    for axes, name in zip(grid[0], shown):
      panels[name](axes, results[name])


def _draw_spread(axes, result):
  """Draw a column of dots for each window, one dot for each uniform order."""
  bits = np.array(result["uniform_bits_per_token"])
  forward = np.array(result["left_to_right_bits_per_token"])
  by_mean = np.argsort(bits.mean(axis=1))
  for place, window in enumerate(by_mean):
    axes.plot(
      np.full(bits.shape[1], place),
      bits[window],
      "o",
      ms=4,
      alpha=0.5,
      color=canvas.COLOURS[0],
      label="uniform orders" if not place else None,
    )
  axes.plot(
    forward[by_mean],
    "_",
    ms=12,
    mew=2,
    color=canvas.COLOURS[1],
    label="left to right",
  )
  axes.set_xticks([])
  axes.set_xlabel("windows, sorted by their mean")
  axes.set_ylabel("bits per token")
  axes.set_title("one window, several orders")
  axes.legend(loc="upper left")


def _draw_pairs(axes, result):
  """Draw the two numbers of each pair against each other."""
  for i, (name, pair) in enumerate(result.items()):
    bits = np.array(pair["bits"])
    axes.plot(
      *bits.T, ".", ms=6, alpha=0.6, color=canvas.COLOURS[i], label=name
    )
  low, high = axes.get_xlim()
  axes.plot([low, high], [low, high], color=canvas.GREY, lw=1, zorder=1)
  axes.set_xlabel("bits of a, then b given a")
  axes.set_ylabel("bits of b, then a given b")
  axes.set_title("two orders of a pair, a < b")
  axes.legend(loc="upper left")


def _draw_adaptive(axes, result):
  """Draw the positions of each text's tokens by their ranks."""
  found = np.array(result["orders"])
  ranks = np.arange(1, found.shape[1] + 1)
  for order in found:
    axes.plot(ranks, order, ".", ms=2.5, alpha=0.5, color=canvas.COLOURS[0])
  axes.plot(ranks, ranks, color=canvas.GREY, lw=1, label="left to right")
  value = result["rank_correlation"]["mean"]
  axes.set_xlabel("rank in the adaptive order")
  axes.set_ylabel("position")
  axes.set_ylim(top=1.17 * len(ranks))  # Room for the legend.
  axes.set_title(f"adaptive orders: correlation {value:.2f}")
  axes.legend(loc="upper left")
