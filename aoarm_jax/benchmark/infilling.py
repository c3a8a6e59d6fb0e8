"""Infilling: words, sentences and paragraphs of held-out text are masked.

Several gaps of a window are masked at once. The tokens of the gaps are scored,
and drawn, given all other tokens. The model knows how many tokens a gap has.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.data import pipeline
from aoarm_jax.generation import prompts
from aoarm_jax.runs import canvas


class _Kind(NamedTuple):
  """A kind of gap.

  Attributes:
    pattern: finds all spans of a text that may be a gap: its group 1.
    most: the greatest number of gaps in a window.
    purpose: number of the random choice of gaps.
  """

  pattern: re.Pattern[bytes]
  most: int
  purpose: int


# A span stands between others of its kind, so none is cut by the window.
_KINDS = {
  "words": _Kind(re.compile(rb"(?<=\s)(\w[^\s]*)(?=\s)"), 3, 5),
  "sentences": _Kind(
    re.compile(rb"(?<=[.!?])[\"')]*\s+(\S[^.!?]*[.!?])(?=[\s\"')])"), 2, 6
  ),
  "paragraphs": _Kind(
    re.compile(rb"(?<=\n\n)(\S(?:(?!\r?\n\s*\n).)*)(?=\r?\n\s*\n)", re.DOTALL),
    2,
    7,
  ),
}
# Windows without a gap of the kind are passed over, up to so many for each.
_LOOKS = 64


class Gapped(NamedTuple):
  """A window with gaps.

  Attributes:
    tokens: int32 [n].
    gaps: bool [gaps, n], the tokens of each gap.
  """

  tokens: np.ndarray
  gaps: np.ndarray

  @property
  def masked(self) -> np.ndarray:
    """The tokens of all gaps: bool [n]."""
    return np.any(self.gaps, axis=0)


def units(session: session_lib.Session) -> list[results_lib.Unit] | str:
  """Return a unit for each kind of gap, or why there are none."""
  if session.kind.left_to_right:
    return (
      f"mechanism {session.network.model.mechanism} knows no text after a gap"
    )
  settings = session.window_settings() | session.sampling()
  settings |= {
    "orders": session.options.orders,
    "samples": session.options.samples,
  }
  return [
    results_lib.Unit(
      f"infilling/{name}",
      settings | {"most_gaps": kind.most},
      functools.partial(_measure, session, kind),
    )
    for name, kind in _KINDS.items()
  ]


def gapped(
  session: session_lib.Session, kind: _Kind
) -> tuple[list[Gapped], int]:
  """Return windows with gaps, and how many windows were looked at."""
  found: list[Gapped] = []
  most = session.options.windows
  looked = 0
  for i, window in enumerate(session.every_window()):
    if len(found) == most or i == _LOOKS * most:
      break
    looked += 1
    chosen = _gaps(session, kind, i, window)
    if len(chosen):
      found.append(Gapped(window, chosen))
  return found, looked


def _gaps(session, kind, number, window):
  """Return the gaps of a window: bool [gaps, n]. They leave half of it."""
  n = len(window)
  ends = np.cumsum(session.tokenizer.bytes_of[window])
  begins = np.concatenate([[0], ends[:-1]])
  text = session.tokenizer.to_bytes(window)
  spans = [match.span(1) for match in kind.pattern.finditer(text)]
  bits = pipeline.random_bits(
    session.options.seed, number, len(spans), purpose=kind.purpose
  )
  gaps: list[np.ndarray] = []
  taken = np.zeros(n, bool)
  for i in np.argsort(bits, kind="stable"):
    first, last = spans[i]
    gap = (begins < last) & (ends > first)
    if not (gap & taken).any() and (taken | gap).sum() * 2 <= n:
      gaps.append(gap)
      taken |= gap
    if len(gaps) == kind.most:
      break
  return np.array(gaps, bool).reshape(-1, n)


def _measure(session, kind):
  """Return the scores of the references, and how near samples come to them."""
  windows, looked = gapped(session, kind)
  if not windows:
    return {"windows": 0, "looked_at": looked}
  marked = [
    prompts.Marked(w.tokens, ~w.masked, w.masked, "a window", True)
    for w in windows
  ]
  forward = session.score(marked, "left_to_right")
  uniform = session.score(marked, "uniform")
  filled = session.fill(
    [prompts.Prompt(w.tokens, ~w.masked) for w in windows],
    count=session.options.samples,
  )
  return {
    "windows": len(windows),
    "looked_at": looked,
    "gaps": [len(w.gaps) for w in windows],
    "tokens": [int(w.masked.sum()) for w in windows],
    "bytes": [score.bytes for score in forward],
    "bits": {
      "left_to_right": [score.bits for score in forward],
      "any_order": [
        float(-np.mean(score.order_log_p) / np.log(2)) for score in uniform
      ],
      "ensembled": [score.bits for score in uniform],
    },
    "is_bound": session.kind.masked,
    "sample_log_p": [[text.log_p for text in texts] for texts in filled],
    **_nearness(session, windows, filled),
  }


def _nearness(session, windows, filled):
  """Return how often and how nearly samples are the reference, by windows."""
  exact, all_exact, distance = [], [], []
  for window, texts in zip(windows, filled):
    hits = []
    apart = []
    for text in texts:
      tokens = np.array(text.tokens)[: len(window.tokens)]
      hits.append([
        bool((tokens[gap] == window.tokens[gap]).all()) for gap in window.gaps
      ])  # fmt: skip
      apart.append(
        [
          share_of_edits(*map(session.tokenizer.to_bytes, pair))
          for gap in window.gaps
          for pair in [(tokens[gap], window.tokens[gap])]
        ]
      )
    exact.append(float(np.mean(hits)))
    all_exact.append(float(np.mean(np.all(hits, axis=1))))
    distance.append(float(np.mean(apart)))
  return {
    "exact_match": exact,
    "exact_match_of_all_gaps": all_exact,
    "edit_distance": distance,
  }


def share_of_edits(text: bytes, reference: bytes) -> float:
  """Return the edit distance of two texts, divided by the longer length.

  It counts inserted, deleted and replaced bytes (Levenshtein).

  Args:
    text: the one text.
    reference: the other text.
  """
  if not text and not reference:
    return 0.0
  other = np.frombuffer(reference, np.uint8)
  places = np.arange(len(other) + 1)
  row = places
  for i, byte in enumerate(text, start=1):
    replaced = np.minimum(row[:-1] + (other != byte), row[1:] + 1)
    row = np.concatenate([[i], replaced])
    # Insertions after every place cost one each.
    row = np.minimum.accumulate(row - places) + places
  return int(row[-1]) / max(len(text), len(other))


_NOTES = {
  "left_to_right": "exact, the gaps filled from left to right",
  "any_order": "exact, mean over K orders of the gaps",
  "ensembled": "exact for the mixture of K orders of the gaps",
}
_BOUNDS = {
  "left_to_right": "of this order alone, which the diffusion does not follow",
  "any_order": "bound: the diffusion's bits are at most this",
  "ensembled": "bound, tighter: the diffusion's bits are at most this in the "
  "mean",
}


def rows(results: Mapping[str, Any]) -> list[results_lib.Row]:
  """Return the rows of the table.

  Args:
    results: kind of gap -> the result of the unit.
  """
  table = []
  for kind, result in results.items():
    make = functools.partial(results_lib.Row, "infilling", kind)
    count = result["windows"]
    if not count:
      looked = f"no window of {result['looked_at']:,} has one"
      table.append(make("windows", None, None, "", 0, looked))
      continue
    notes = _BOUNDS if result["is_bound"] else _NOTES
    for order, bits in result["bits"].items():
      measure = f"reference, {order.replace('_', ' ')}"
      ratio = results_lib.ratio_and_error(bits, result["bytes"])
      table.append(make(measure, *ratio, "bits_per_byte", count, notes[order]))
    gaps = f"{sum(result['gaps'])} gaps of {sum(result['tokens'])} tokens"
    for name, note in (
      ("exact_match", "share of the gaps"),
      ("exact_match_of_all_gaps", "share of the windows"),
      ("edit_distance", f"edits / length; {gaps}"),
    ):
      mean = results_lib.mean_and_error(result[name])
      table.append(make(name.replace("_", " "), *mean, "share", count, note))
  return table


def draw(results: Mapping[str, Any], path: epath.Path, title: str) -> None:
  """Draw the bits of the references, and how near the samples come.

  Args:
    results: kind of gap -> the result of the unit.
    path: of the PNG file.
    title: of the picture.
  """
  table = rows(results)
  is_bound = any(result.get("is_bound") for result in results.values())
  bits = "bits per byte of the reference" + ", bounds" * is_bound
  with canvas.draw([path], 1, 2, inches=(10.5, 4.2)) as (picture, grid):
    picture.suptitle(title, parse_math=False)
    for axes, unit, label in (
      (grid[0, 0], "bits_per_byte", bits),
      (grid[0, 1], "share", "share"),
    ):
      _draw_bars(axes, [row for row in table if row.unit == unit])
      axes.set_ylabel(label)
      axes.set_ylim(bottom=0)


def _draw_bars(axes, table):
  """Draw a group of bars for each kind of gap, from Rows."""
  subjects = [*dict.fromkeys(row.subject for row in table)]
  measures = [*dict.fromkeys(row.measure for row in table)]
  width = 0.8 / max(1, len(measures))
  for subject, measure in itertools.product(subjects, measures):
    i, j = subjects.index(subject), measures.index(measure)
    for row in table:
      if (row.subject, row.measure) == (subject, measure):
        axes.bar(
          i + (j - (len(measures) - 1) / 2) * width,
          row.value,
          0.9 * width,
          yerr=row.error or 0,
          capsize=3,
          color=canvas.COLOURS[j],
          label=None if i else measure,
        )
  counts = {row.subject: row.n for row in table}
  labels = [f"{name}\n({counts[name]} windows)" for name in subjects]
  axes.set_xticks(range(len(subjects)), labels)
  axes.grid(False, axis="x")
  axes.margins(y=0.3)
  if table:
    axes.legend(loc="upper left", fontsize=9)
