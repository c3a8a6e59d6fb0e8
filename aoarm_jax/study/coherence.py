"""Coherence and diversity of generated text, and measures beside them.

coherence    share of the generated words of a certain length that stand in the
             vocabulary of a reference split; two rules: words of more than one
             letter, and of four letters or more.
diversity    unique words / words of a sample; mean over samples.
familiarity  share of the n-grams of characters that occur in the reference: it
             needs no word boundaries, and so no spelling of whole words.
repetition   share of a sample's n-grams that occurred before in the sample.

Words are what spaces separate. The first and the last word of a sample may be
cut by the window, for every mechanism and for real text alike: hold numbers
against those of real text, not against 1.
"""

from typing import NamedTuple

import numpy as np

RULES = {"over_1": 2, "from_4": 4}  # Least number of letters.
# With fewer counted words than one in so many characters (real text has ten),
# as in a row of one letter, their share says nothing.
_CHARACTERS_PER_WORD = 64
# Columns of the counts of a sample; see `count`.
COLUMNS = (
  "words",
  "unique",
  "over_1",
  "over_1_known",
  "from_4",
  "from_4_known",
  "ngrams",
  "ngrams_known",
  "ngrams_distinct",
)
MEASURES = (
  "coherence_over_1",
  "coherence_from_4",
  "diversity",
  "familiarity",
  "repetition",
)


class Reference(NamedTuple):
  """What generated text is held against.

  Attributes:
    words: the vocabulary.
    ngrams: int64, sorted codes of the n-grams that occur.
    n: characters of an n-gram.
  """

  words: frozenset[bytes]
  ngrams: np.ndarray
  n: int


def reference(tokens: np.ndarray, text: bytes, n: int) -> Reference:
  """The words and n-grams of a split.

  Args:
    tokens: uint8 [size], ids of the split.
    text: the same as bytes.
    n: characters of an n-gram, at most 8.
  """
  return Reference(frozenset(text.split()), np.unique(_codes(tokens, n)), n)


def _codes(tokens, n):
  """int64, one number for each n-gram in order; none if there are too few."""
  if len(tokens) < n:
    return np.zeros(0, np.int64)
  windows = np.lib.stride_tricks.sliding_window_view(tokens, n)
  codes = np.zeros(len(windows), np.int64)
  for column in windows.T:
    codes = (codes << 8) | column
  return codes


def count(tokens: np.ndarray, text: bytes, against: Reference) -> list[int]:
  """The counts of one sample, in the order of COLUMNS.

  Args:
    tokens: ids [T].
    text: the same as bytes.
    against: the reference.
  """
  words = text.split()
  row = [len(words), len(set(words))]
  for letters in RULES.values():
    long = [word for word in words if len(word) >= letters]
    row += [len(long), sum(word in against.words for word in long)]
  codes = _codes(np.asarray(tokens, np.uint8), against.n)
  known = 0
  if len(against.ngrams):
    at = np.searchsorted(against.ngrams, codes)
    at = np.minimum(at, len(against.ngrams) - 1)
    known = int((against.ngrams[at] == codes).sum())
  return [*row, len(codes), known, len(np.unique(codes))]


def measures(counts: np.ndarray) -> np.ndarray:
  """Counts of samples -> MEASURES.

  Coherence, familiarity and repetition are ratios of sums over the samples;
  nan where nothing was counted, coherence also where hardly any words were. A
  sample without words has diversity 0.

  Args:
    counts: [..., samples, COLUMNS].

  Returns:
    float64 [..., MEASURES].
  """
  counts = np.asarray(counts, np.float64)
  sums = counts.sum(-2)
  total = dict(zip(COLUMNS, np.moveaxis(sums, -1, 0)))
  words, unique = counts[..., 0], counts[..., 1]
  of_sample = unique / np.maximum(words, 1)
  diversity = of_sample.mean(-1)

  def ratio(part, whole):
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)

  def coherence(rule):
    few = total[rule] * _CHARACTERS_PER_WORD < total["ngrams"]
    return np.where(few, np.nan, ratio(total[f"{rule}_known"], total[rule]))

  return np.stack(
    [
      *map(coherence, RULES),
      diversity,
      ratio(total["ngrams_known"], total["ngrams"]),
      1 - ratio(total["ngrams_distinct"], total["ngrams"]),
    ],
    axis=-1,
  )


def areas(counts: np.ndarray) -> dict[str, float]:
  """The area under coherence over diversity by both rules.

  Args:
    counts: [temperatures, samples, COLUMNS].

  Returns:
    {"area_<rule>": area, see `dominated_area`}.
  """
  values = dict(zip(MEASURES, measures(counts).T))
  return {
    f"area_{rule}": dominated_area(
      values["diversity"], values[f"coherence_{rule}"]
    )
    for rule in RULES
  }


def dominated_area(x: np.ndarray, y: np.ndarray) -> float:
  """Area of the points (a, b) >= 0 with a <= x_i and b <= y_i for some i.

  One number for a curve of two goods, both in [0, 1]: what it makes possible.

  Args:
    x: [n].
    y: [n]; points with a nan are left out.
  """
  good = np.isfinite(x) & np.isfinite(y)
  area = reached = 0.0
  for a, b in sorted(zip(x[good], y[good]), reverse=True):
    if b > reached:
      area += a * (b - reached)
      reached = b
  return float(area)
