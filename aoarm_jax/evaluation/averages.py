"""The mean of an estimator over sequences, with its error and its curves."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from aoarm_jax.evaluation import estimators


class Bin(NamedTuple):
  """The tokens for which a number, such as a distance, lies in low..high.

  Attributes:
    low: lowest number in the bin.
    high: highest number in the bin, inclusive.
    nats_per_token: mean over these tokens.
    tokens: how many tokens there are.
  """

  low: int
  high: int
  nats_per_token: float
  tokens: int

  def record(self, unit: str = "char") -> dict[str, Any]:
    """Return the bin in bits, for a JSON report.

    Args:
      unit: name of a token, see Tokenizer.unit.
    """
    bits = self.nats_per_token / math.log(2)
    return {
      "low": self.low,
      "high": self.high,
      f"bits_per_{unit}": bits,
      "tokens": self.tokens,
    }


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The mean of one estimator over sequences.

  Attributes:
    estimator: name of the estimator.
    nats_per_token: the mean.
    standard_error_nats: standard error of the mean, nats per token, over
      sequences that each have their own orders. If their lengths differ, the
      mean is the sum of all nats divided by the number of all tokens.
      Neighbouring windows of one text are taken as independent. NaN for one
      sequence.
    sequences: number of sequences.
    tokens: number of tokens in all sequences.
    slot_curve_nats: mean by rank, T floats; () if the estimator has no ranks.
    by_distance: mean by the distance to the nearest known token, in positions;
      () if the estimator has no ranks.
    by_recency: mean by how many steps ago that token was generated; () if the
      estimator has no ranks.
    unit: name of a token, see Tokenizer.unit.
    bytes: number of UTF-8 bytes of the text in all sequences; 0 if it is not
      known.
    characters: number of characters in all sequences; 0 if it is not known.
    standard_error_nats_per_byte: standard error of the sum of all nats divided
      by the number of bytes; NaN if it is not known.
  """

  estimator: str
  nats_per_token: float
  standard_error_nats: float
  sequences: int
  tokens: int
  slot_curve_nats: tuple[float, ...]
  by_distance: tuple[Bin, ...] = ()
  by_recency: tuple[Bin, ...] = ()
  unit: str = "char"
  bytes: int = 0
  characters: int = 0
  standard_error_nats_per_byte: float = math.nan

  @property
  def bits_per_token(self) -> float:
    """The mean in bits per token."""
    return self.nats_per_token / math.log(2)

  def _counts(self):
    """Return the size of the text in every unit; 0 where it is not known."""
    counts = {"byte": self.bytes, "char": self.characters, "token": self.tokens}
    # Where a token is a byte or a character, so much is known without counts.
    return counts | {self.unit: self.tokens}

  def _bits(self):
    """Return the mean in bits by the names of its units, as far as known."""
    total = self.bits_per_token * self.tokens
    return {
      f"bits_per_{unit}": total / count
      for unit, count in self._counts().items()
      if count
    }

  def record(self) -> dict[str, Any]:
    """Return the estimate as a record of metrics.jsonl, without its bins.

    The mean has the names bits_per_token, bits_per_byte (of UTF-8) and
    bits_per_char. The last two are absent, and bytes and characters are None,
    where their numbers are not known. Only bits_per_byte can be compared across
    tokenizers. All other bits are per token.
    """
    return {
      "estimator": self.estimator,
      "unit": self.unit,
      "nats_per_token": self.nats_per_token,
      **self._bits(),
      "standard_error_bits": _bits_or_none(self.standard_error_nats),
      "standard_error_bits_per_byte": _bits_or_none(
        self.standard_error_nats_per_byte
      ),
      "sequences": self.sequences,
      "tokens": self.tokens,
      "bytes": self._counts()["byte"] or None,
      "characters": self._counts()["char"] or None,
      "slot_curve_bits": [x / math.log(2) for x in self.slot_curve_nats],
    }

  def report(self) -> dict[str, Any]:
    """Return the record together with the bins by distance and by recency."""
    return self.record() | {
      "by_distance": [bin_.record(self.unit) for bin_ in self.by_distance],
      "by_recency": [bin_.record(self.unit) for bin_ in self.by_recency],
    }

  def __str__(self) -> str:
    error = _error_in_words(self.standard_error_nats)
    plural = "s" * (self.sequences != 1)
    names = {"token": "tokens", "byte": "bytes", "char": "characters"}
    also, sizes = "", f"{self.tokens:,} {names[self.unit]}"
    for unit, count in self._counts().items():
      # A unit of which a text has as many as tokens says nothing new.
      if unit == self.unit or count in (0, self.tokens):
        continue
      also += f"= {self._bits()[f'bits_per_{unit}']:.4f} bits/{unit}  "
      if unit == "byte":
        also += f"± {_error_in_words(self.standard_error_nats_per_byte)}  "
      sizes += f", {count:,} {names[unit]}"
    return (
      f"{self.estimator:<17}  {self.bits_per_token:.4f} bits/{self.unit}  "
      f"± {error}  {also}"
      f"({self.sequences:,} sequence{plural}, {sizes})"
    )


def _bits_or_none(nats):
  """Return nats in bits; None if they are not finite."""
  bits = nats / math.log(2)
  return bits if math.isfinite(bits) else None


def _error_in_words(nats):
  """Return a standard error in bits for people."""
  bits = _bits_or_none(nats)
  return "unknown" if bits is None else f"{bits:.4f}"


def mean(
  estimator: str,
  T: int,
  sequence_nats: np.ndarray,
  total: dict[str, Any] | None,
  lengths: np.ndarray | None = None,
) -> Estimate:
  """Return the Estimate of the results of `over_batches`.

  The bytes and characters of the text are not known.

  Args:
    estimator: name of the estimator.
    T: tokens of a sequence.
    sequence_nats: float32 [sequences].
    total: the sums over all sequences; None or {} for an estimator without
      ranks.
    lengths: int [sequences or more], the tokens of every sequence, in the order
      of the sequences. None means T each.
  """
  nats, count = sequence_nats.astype(np.float64), len(sequence_nats)
  if lengths is not None:
    return _mean_of_documents(estimator, nats, total, lengths[:count], T)
  deviation = nats.std(ddof=1) if count > 1 else math.nan
  curve = total["by_rank"] / count if total else ()
  return Estimate(
    estimator=estimator,
    nats_per_token=float(nats.mean() / T),
    standard_error_nats=float(deviation / math.sqrt(count) / T),
    sequences=count,
    tokens=count * T,
    slot_curve_nats=tuple(map(float, curve)),
    by_distance=_bins(*total["by_distance"]) if total else (),
    by_recency=_bins(*total["by_recency"]) if total else (),
  )


def _mean_of_documents(estimator, nats, total, lengths, T):
  """Return the Estimate of documents of several lengths, see `mean`."""
  tokens = int(lengths.sum())
  # The number of documents that have a rank, by rank.
  counts = np.bincount(lengths, minlength=T + 1)[::-1].cumsum()[::-1][1:]
  counts = counts[counts > 0]
  curve = total["by_rank"][: len(counts)] / counts if total else ()
  return Estimate(
    estimator=estimator,
    nats_per_token=float(nats.sum() / tokens),
    standard_error_nats=error_of_ratio(nats, lengths),
    sequences=len(lengths),
    tokens=tokens,
    slot_curve_nats=tuple(map(float, curve)),
    by_distance=_bins(*total["by_distance"]) if total else (),
    by_recency=_bins(*total["by_recency"]) if total else (),
  )


def _bins(nats, tokens):
  """Return the bins that are not empty, from sums and counts [bins]."""
  highs = estimators.bin_edges(len(nats))
  lows = [0, *(high + 1 for high in highs[:-1])]
  return tuple(
    Bin(low, high, float(total / count), int(count))
    for low, high, total, count in zip(lows, highs, nats, tokens)
    if count
  )


def error_of_ratio(nats: np.ndarray, sizes: np.ndarray) -> float:
  """Return the standard error of sum(nats) / sum(sizes), to first order.

  It is NaN for one sequence.

  Args:
    nats: float [sequences].
    sizes: int [sequences]. They vary, and they are correlated with the nats.
  """
  if len(nats) < 2:
    return math.nan
  nats = nats.astype(np.float64)
  deviations = nats - nats.sum() / sizes.sum() * sizes
  error = math.sqrt((deviations**2).sum() / (len(nats) - 1) / len(nats))
  return float(error / sizes.mean())
