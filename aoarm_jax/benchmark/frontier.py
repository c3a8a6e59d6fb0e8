"""Generation: quality against diversity over temperatures.

quality    bits per byte of the texts from left to right under another run,
           config.benchmark.scorer; fewer is better
diversity  the measured entropy: the mean of -log q(x | order) over texts x that
           were drawn from q, where q is the law of the draws, temperature and
           cuts included. It is exact for exact methods. Beside it stands the
           unigram entropy, of the frequencies of the tokens within a text. It
           tells little of the law that the text was drawn from.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.config import paths
from aoarm_jax.config import rules as config_rules
from aoarm_jax.data import corpora, tokenizers
from aoarm_jax.generation import prompts
from aoarm_jax.runs import canvas, opening

_REFERENCE = "reference"


def units(session: session_lib.Session) -> list[results_lib.Unit]:
  """Return a unit for each temperature, and one for real text."""
  scorer = _Scorer(session)
  options = session.options
  settings = {"seed": options.seed, "scorer": scorer.facts}
  sampling = session.sampling() | {"length": session.config.sample.length}
  return [
    *(
      results_lib.Unit(
        f"generation/{temperature:g}",
        settings
        | sampling
        | {"sample.temperature": temperature, "texts": options.texts},
        functools.partial(_measure, session, scorer, temperature),
      )
      for temperature in options.temperatures
    ),
    results_lib.Unit(
      f"generation/{_REFERENCE}",
      settings | session.window_settings(),
      functools.partial(_of_windows, session, scorer),
    ),
  ]


class _Scorer:
  """Another run, which scores texts; or none."""

  def __init__(self, session: session_lib.Session) -> None:
    """Open the run that config.benchmark.scorer names, if it names one."""
    self._session, self.facts = session, None
    workdir = session.options.scorer
    if not workdir:
      return
    place = paths.of(workdir, "config.benchmark.scorer")
    config = opening.for_these_devices(opening.read_config(place))
    self._run = opening.open_run(place, config_rules.validate(config))
    tokenizer = self._run.network.tokenizer
    self.facts = {
      "experiment": f"{config.name}:{config.variant}",
      "mechanism": config.model.mechanism,
      "T": config.model.T,
      "stride": session.stride(config.model.T),
      "step": self._run.step,
      "parameters_sha256": session_lib.parameters_sha256(self._run.params),
      "tokenizer": tokenizer.name,
      "tokenizer_sha256": tokenizer.sha256 or "fixed",
    }

  def quality(self, texts: Sequence[bytes]) -> dict[str, float | None]:
    """Return bits per byte of texts from left to right, and their error.

    Texts that are longer than the window of the scorer are scored in blocks. An
    empty text counts nothing. Bytes that are no UTF-8 are scored as they are
    shown, as U+FFFD.

    Raises:
      DataError: the scorer's tokenizer does not know a symbol.
    """
    if self.facts is None:
      return {}
    network = self._run.network
    tokenizer, end = network.tokenizer, network.end
    try:
      ids = [
        tokenizer.encode(text.decode(errors="replace"))
        for text in texts
        if text
      ]
    except tokenizers.TokenizerError as error:
      raise tokenizers.DataError(
        f"config.benchmark.scorer={self._session.options.scorer}: its "
        f"tokenizer cannot read the texts: {error}; name a run whose tokenizer "
        "knows all symbols, such as one of bytes"
      ) from error
    if end is not None:
      ids = [np.append(row, end.token) for row in ids]
    given = end is not None and end.is_given
    ends = np.cumsum([len(row) for row in ids]) - given
    tokens = np.concatenate(ids).astype(tokenizer.dtype)
    text = session_lib.Text(tokens, ends, {})
    found = self._session.estimate("left_to_right", text, self._run)
    record = found.record()
    return {
      "bits_per_byte": record["bits_per_byte"],
      "error": record["standard_error_bits_per_byte"],
      "perplexity_per_token": math.exp(found.nats_per_token),
    }


def _measure(session, scorer, temperature):
  """Return quality and diversity of texts at a temperature."""
  length = session.config.sample.length
  n = length or session.T
  prompt = prompts.Prompt(
    np.zeros(n, np.int32), np.zeros(n, bool), is_open=not length
  )
  (texts,) = session.fill(
    [prompt], count=session.options.texts, temperature=temperature
  )
  nats = [-text.log_p for text in texts]
  tokens = [np.array(text.tokens) for text in texts]
  as_bytes = [session.tokenizer.to_bytes(row) for row in tokens]
  return {
    "texts": len(texts),
    "is_exact": session.is_exact,
    "nats": nats,
    "bytes": [len(text) for text in as_bytes],
    **_of_tokens(session, tokens),
    "quality": scorer.quality(as_bytes),
    "samples": [text.text for text in texts],
  }


def _of_windows(session, scorer):
  """Return quality and unigram entropy of real text."""
  windows = session.windows
  return {
    "texts": len(windows),
    **_of_tokens(session, windows),
    "quality": scorer.quality([*map(session.tokenizer.to_bytes, windows)]),
  }


def _of_tokens(session, texts):
  """Return the sizes and the unigram entropies of texts."""
  V = session.tokenizer.V
  return {
    "tokens": [len(tokens) for tokens in texts],
    "unigram_bits": [corpora.unigram_entropy(tokens, V) for tokens in texts],
  }


def rows(results: Mapping[str, Any]) -> list[results_lib.Row]:
  """Return the rows of the table.

  Args:
    results: the temperature, or "reference" -> the result of the unit.
  """
  table = []
  for name, result in results.items():
    is_real = name == _REFERENCE
    subject = "real text" if is_real else f"temperature {name}"
    make = functools.partial(results_lib.Row, "generation", subject)
    count = result["texts"]
    if not is_real:
      note = "exact: mean of -log q(x | order)"
      if not result["is_exact"]:
        note = "mean of -log q of the draws; this method is not exact"
      bits = np.array(result["nats"]) / math.log(2)
      for unit in ("token", "byte"):
        ratio = results_lib.ratio_and_error(bits, result[f"{unit}s"])
        table.append(
          make("measured entropy", *ratio, f"bits_per_{unit}", count, note)
        )
    mean = results_lib.mean_and_error(result["unigram_bits"])
    note = "of the tokens within a text"
    table.append(make("unigram entropy", *mean, "bits_per_token", count, note))
    if quality := result["quality"]:
      note = (
        "under the scorer; perplexity per token "
        f"{quality['perplexity_per_token']:.2f}"
      )
      value = quality["bits_per_byte"], quality["error"]
      table.append(make("quality", *value, "bits_per_byte", count, note))
  return table


def draw(results: Mapping[str, Any], path: epath.Path, title: str) -> None:
  """Draw quality over the measured and over the unigram entropy.

  Without a scorer both entropies are drawn over the temperature.

  Args:
    results: the temperature, or "reference" -> the result of the unit.
    path: of the PNG file.
    title: of the picture.
  """
  table = rows(results)
  by_measure: dict[str, dict[str, results_lib.Row]] = {}
  for row in reversed(table):  # Bits per token stay where there are both.
    by_measure.setdefault(row.measure, {})[row.subject] = row
  entropies = ("measured entropy", "unigram entropy")
  with canvas.draw([path], 1, 2, inches=(10.5, 4.4)) as (picture, grid):
    picture.suptitle(title, parse_math=False)
    for axes, entropy in zip(grid[0], entropies):
      found = by_measure.get(entropy, {})
      quality = by_measure.get("quality", {})
      axes.set_title(entropy)
      if quality:
        _draw_frontier(axes, found, quality)
      else:
        _draw_over_temperature(axes, found)


def _draw_frontier(axes, entropy, quality):
  """Draw bits per byte under the scorer over an entropy."""
  draw_samples(
    axes, entropy, quality, colour=canvas.COLOURS[0], label="samples"
  )
  real = quality["real text"].value
  axes.axhline(real, color=canvas.GREY, ls="--", label="real text")
  if "real text" in entropy:
    axes.plot(entropy["real text"].value, real, "*", ms=12, color=canvas.GREY)
  axes.set_xlabel("bits per token: more is more diverse")
  axes.set_ylabel("bits per byte under the scorer")
  axes.legend(loc="upper left")


def draw_samples(
  axes: Any,
  entropy: Mapping[str, results_lib.Row],
  quality: Mapping[str, results_lib.Row],
  colour: str,
  label: str,
) -> None:
  """Draw the quality of samples over an entropy, with standard errors.

  Args:
    axes: the axes of matplotlib.
    entropy: subject, such as "temperature 0.7" -> the row of the table.
    quality: subject -> the row of the table.
    colour: of the line.
    label: of the line, for the legend.
  """
  names = [name for name in entropy if name != "real text"][::-1]
  x, y = ([rows[name].value for name in names] for rows in (entropy, quality))
  errors = (
    [rows[name].error or 0 for name in names] for rows in (quality, entropy)
  )
  axes.errorbar(x, y, *errors, fmt="o-", color=colour, capsize=3, label=label)
  for name, *place in zip(names, x, y):
    axes.annotate(
      name.removeprefix("temperature "), place, (6, -12),
      textcoords="offset points",
    )  # fmt: skip
  axes.margins(0.12)


def _draw_over_temperature(axes, entropy):
  """Draw an entropy over the temperature."""
  drawn = {
    float(name.split()[1]): row
    for name, row in entropy.items()
    if name != "real text"
  }
  temperatures = sorted(drawn)
  axes.errorbar(
    temperatures,
    [drawn[t].value for t in temperatures],
    [drawn[t].error or 0 for t in temperatures],
    fmt="o-",
    color=canvas.COLOURS[0],
    capsize=3,
    label="samples",
  )
  if "real text" in entropy:
    real = entropy["real text"].value
    axes.axhline(real, color=canvas.GREY, ls="--", label="real text")
  axes.set_xlabel("temperature")
  axes.set_ylabel("bits per token")
  axes.legend(loc="upper left")
