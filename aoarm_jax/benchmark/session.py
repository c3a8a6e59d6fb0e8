"""The run, its programs and the text, which all parts of a benchmark share."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from aoarm_jax import orders
from aoarm_jax.config import paths, purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import documents, pipeline, tokenizers
from aoarm_jax.devices import sharding, stopping
from aoarm_jax.evaluation import averages, evaluate, score
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate
from aoarm_jax.runs import identity, opening


class Text(NamedTuple):
  """A text, or several one after the other.

  Attributes:
    tokens: unsigned integers [n].
    ends: int64 [texts], where each text ends, without an end token that is
      given.
    facts: what identifies it, as values of JSON.
  """

  tokens: np.ndarray
  ends: np.ndarray
  facts: dict[str, Any]


class Session:
  """An open run with the programs and the text of a benchmark.

  Attributes:
    config: the config, with the seed and the batch size of the benchmark.
    options: its section benchmark.
    run: the open run.
    network: the network of the run.
    kind: the pieces of its mechanism.
    T: the number of its positions.
    tokenizer: the tokenizer of the run.
    progress: what is done so far, for the message where a signal comes.
  """

  def __init__(
    self,
    config: config_lib.Config,
    run: opening.Run,
    signals: stopping.Signals,
  ) -> None:
    """Compile nothing, and read no text yet.

    Args:
      config: the config. Its sections benchmark, sample and score are read.
      run: the open run.
      signals: what may stop the benchmark.
    """
    options = config.benchmark
    for section in ("sample", "score"):
      config = config.replace(f"{section}.batch_size", options.batch_size)
      config = config.replace(f"{section}.seed", options.seed)
    config = config.replace("score.orders", options.orders)
    # Scores follow the chain rule, also those of a model with groups.
    config = config.replace("score.width", 1)
    self.config, self.run, self._signals = config, run, signals
    self.progress = ""
    self.options, self.network = options, run.network
    self.kind, self.T = config.model.kind, config.model.T
    self.tokenizer = run.network.tokenizer

  @functools.cached_property
  def evaluator(self) -> evaluate.Evaluator:
    """The estimators, with the orders that the run was trained with."""
    return evaluate.Evaluator(evaluated(self.config, self.run), self.network)

  @functools.cached_property
  def _scorer(self):
    return score.Scorer(self.config, self.network)

  @functools.cached_property
  def _sampler(self):
    return generate.Sampler(self.config, self.network)

  def score(
    self,
    texts: Sequence[prompts.Marked],
    order: str,
    given: Sequence[Sequence[int]] | None = None,
  ) -> list[score.Score]:
    """Return a Score of every text; see score.Scorer.score.

    Args:
      texts: the parsed texts.
      order: a value of config.score.order. uniform averages over
        config.benchmark.orders orders, the same for all texts.
      given: for the order "given", a permutation of every text.

    Raises:
      Stopped: a signal came.
    """
    scores = self._scorer.score(
      self.run.params,
      [("", text) for text in texts],
      self.config.replace("score.order", order),
      given,
      self._signals.poll,
    )
    self.raise_if_stopped()
    return scores

  def fill(
    self, texts: Sequence[prompts.Prompt], **sample: Any
  ) -> list[list[generate.Text]]:
    """Return texts for every prompt; see texts.Sampler.fill.

    Args:
      texts: the prompts.
      **sample: fields of config.sample that differ from the config.

    Raises:
      Stopped: a signal came.
    """
    config = self.config
    for name, value in sample.items():
      config = config.replace(f"sample.{name}", value)
    filled = self._sampler.fill(
      self.run.params, texts, config, is_stopped=self._signals.poll
    )
    self.raise_if_stopped()
    return filled

  def unfinished(
    self, tokens: np.ndarray, known: np.ndarray, name: str
  ) -> prompts.Marked:
    """Return a text that may go on, whose unknown tokens are scored.

    Nothing says that a padded document ends there: an unknown token follows.
    There is none after T tokens, where a document has no end.

    Args:
      tokens: int32 [n], n <= T.
      known: bool [n].
      name: name of the text, for messages.
    """
    goes_on = self.network.layout.predicts_end and len(tokens) < self.T
    return prompts.Marked(
      np.pad(tokens, (0, goes_on)),
      np.pad(known, (0, goes_on)),
      np.pad(~known, (0, goes_on)),
      name,
    )

  def estimate(
    self,
    estimator: str,
    text: Text,
    run: opening.Run | None = None,
  ) -> averages.Estimate:
    """Return the Estimate of a text of any length in blocks.

    Args:
      estimator: a name of schema.ESTIMATORS.
      text: the text, in the tokens of the run.
      run: another run than that of the session.

    Raises:
      Stopped: a signal came.
    """
    evaluator = self.evaluator
    if run is not None:
      config = evaluated(self.config.replace("model", run.config.model), run)
      evaluator = evaluate.Evaluator(config, run.network)
    run = run or self.run
    with jax.set_mesh(run.network.mesh):
      found = evaluator.estimate(
        run.params,
        self.blocks(text, run.network),
        estimator,
        run.step,
        is_stopped=self._signals.poll,
      )
    self.raise_if_stopped()
    assert found is not None  # Only a stopped evaluation has no result.
    return found

  def stride(self, T: int) -> int:
    """Return the number of tokens of a block for windows of T tokens."""
    return min(T, self.options.stride or max(1, T // 2))

  def blocks(self, text: Text, network: Any) -> pipeline.StridedBatches:
    """Return the blocks of a text.

    Args:
      text: the text.
      network: the network that reads it.
    """
    T = network.model.T
    stride = self.stride(T)
    count = len(text.tokens) // stride + len(text.ends)
    return pipeline.StridedBatches(
      text.tokens,
      text.ends,
      T=T,
      stride=stride,
      batch_size=sharding.batch_size(
        network.mesh, self.options.batch_size, count
      ),
      end=network.end,
    )

  def raise_if_stopped(self) -> None:
    """Raise Stopped if a signal came."""
    self._signals.raise_if_stopped(self.progress)

  @functools.cached_property
  def text(self) -> Text:
    """The whole text.

    Raises:
      DataError: the text is missing or wrong.
    """
    data, path = self.config.data, self.options.text
    if not path:
      split = self.config.eval.split
      corpus = identity.read_text(data, self.tokenizer, split)
      tokens = corpus.split(split)
      source = f"{split} split of {corpus.describe()}"
    else:
      tokens = read_whole(data, path, self.tokenizer)
      source = path
    return self.text_of(tokens, source)

  def text_of(self, tokens: np.ndarray, source: str) -> Text:
    """Return tokens as a Text: one text, or one for each padded document."""
    end = self.network.end
    if end is None:
      ends = np.array([len(tokens)])
    else:
      ends = documents.ends(tokens, end.token) + (not end.is_given)
    return Text(tokens, ends, self._facts(tokens, source))

  @functools.cached_property
  def start(self) -> Text:
    """The first config.benchmark.tokens tokens of the text.

    Of padded documents these are whole documents, and at least one.
    """
    most, text = self.options.tokens, self.text
    if not most or most >= len(text.tokens):
      return text._replace(facts=text.facts | {"left_out_tokens": 0})
    if self.network.end is not None:
      ends = text.ends + self.network.end.is_given
      last = int(np.searchsorted(ends, most, "right")) - 1
      most = int(ends[max(0, last)])
    short = self.text_of(text.tokens[:most], text.facts["source"])
    facts = {
      "left_out_tokens": len(text.tokens) - most,
      "sha256_of_the_whole_text": text.facts["sha256"],
    }
    return short._replace(facts=short.facts | facts)

  def _facts(self, tokens, source):
    digest = hashlib.sha256(self.tokenizer.to_bytes(tokens))
    if self.tokenizer.has_end:
      ends = documents.ends(tokens, self.tokenizer.end)
      digest.update(ends.astype("<i8").tobytes())
    return {
      "source": source,
      "sha256": digest.hexdigest(),
      "tokens": len(tokens),
      "bytes": int(self.tokenizer.bytes_of[tokens].sum()),
      "characters": int(self.tokenizer.characters_of[tokens].sum()),
      "documents": self.config.data.documents,
      "lines": self.config.data.lines,
      "normalise": self.config.data.normalise,
    }

  def every_window(self) -> Iterator[np.ndarray]:
    """Yield windows of the text in random order: int32 [n], n <= T.

    They are the windows of T tokens from the start, or the padded documents,
    cut to T. A text of fewer than T tokens is one window.
    """
    tokens, end = self.text.tokens, self.network.end
    count = len(self.text.ends) if end else max(1, len(tokens) // self.T)
    bits = pipeline.random_bits(self.options.seed, 0, count, purpose=2)
    rows = documents.Rows(tokens, end, self.T, np.arange(1)) if end else None
    for i in np.argsort(bits, kind="stable"):
      window = tokens[i * self.T : (i + 1) * self.T]
      if rows is not None and end is not None:
        window = rows.of(np.array([i]))[0]
        window = window[np.cumsum(window == end.token) == 0]
      if len(window):
        yield window.astype(np.int32)

  @functools.cached_property
  def windows(self) -> list[np.ndarray]:
    """The first config.benchmark.windows of `every_window`."""
    return [w for _, w in zip(range(self.options.windows), self.every_window())]

  def drawn_orders(self, lengths: Sequence[int]) -> list[list[list[int]]]:
    """Return config.benchmark.orders uniform orders of every text.

    Args:
      lengths: the number of positions of every text, at most T.

    Returns:
      K lists with one permutation for each text.
    """
    options = self.config.replace("orders.family", "uniform").orders
    key = jax.random.key(self.options.seed)
    key = jax.random.fold_in(key, purposes.BENCHMARK)
    draw = jax.jit(lambda key: orders.draw(key, len(lengths), self.T, options))
    drawn = (
      draw(jax.random.fold_in(key, k)) for k in range(self.options.orders)
    )
    return [
      [prompts.within(row, n) for row, n in zip(np.asarray(order), lengths)]
      for order in drawn
    ]

  def window_settings(self) -> dict[str, Any]:
    """Return the settings of a unit that reads windows of the text."""
    return {
      "text": self.text.facts,
      "windows": self.options.windows,
      "seed": self.options.seed,
    }

  def sampling(self) -> dict[str, Any]:
    """Return the settings that say how texts are drawn."""
    sample = self.config.sample
    names = (
      *("method", "order", "temperature", "top_k", "top_p"),
      *("width", "steps", "schedule", "score"),
    )
    return {f"sample.{name}": getattr(sample, name) for name in names}

  @property
  def is_exact(self) -> bool:
    """True if a drawn text has the log-probability that it comes with."""
    method, groups = self.config.sample.method, self.config.orders.groups
    return method in ("sequential", "speculative") or (
      method == "parallel" and groups != "none"
    )


def evaluated(config: config_lib.Config, run: opening.Run) -> config_lib.Config:
  """Return the config of the estimators of a run."""
  given = config.orders.given or run.trained.orders.given
  trained = dataclasses.replace(run.trained.orders, given=given)
  config = config.replace("orders", trained)
  config = config.replace("eval.ensemble_orders", config.benchmark.orders)
  return config.replace("eval.seed", config.benchmark.seed)


def read_whole(
  data: config_lib.Data, path: str, tokenizer: tokenizers.Tokenizer
) -> np.ndarray:
  """Return the tokens of all documents of a file or a folder: [n].

  Args:
    data: how documents are read. With documents=join they follow each other
      without marks.
    path: config.benchmark.text.
    tokenizer: the tokenizer of the ids.

  Raises:
    DataError: the text is missing or wrong.
  """
  check_exists(path, "config.benchmark.text")
  data = dataclasses.replace(data, path=path)
  if data.documents == "join":  # Line ends belong to such a text.
    data = dataclasses.replace(data, lines=False)
  tokens = documents.Found(data, tokenizer).whole()
  if not len(tokens):
    raise tokenizers.DataError(f"config.benchmark.text={path}: has no text")
  return tokens


def check_exists(path: str, field: str) -> epath.Path:
  """Return a path that a field names; raise DataError if nothing is there."""
  place = paths.of(path, field)
  try:
    exists = place.exists()
  except (ImportError, OSError) as error:
    raise tokenizers.DataError(f"{field}={path}: {error}") from error
  if not exists:
    raise tokenizers.DataError(f"{field}={path}: no such file or folder")
  return place


def parameters_sha256(params: Any) -> str:
  """Return the sha256 of all parameters, by their names, in hex.

  It depends on the numbers alone, and not on the files of a checkpoint.

  Args:
    params: pytree of arrays.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array, "<f4").tobytes())
  return digest.hexdigest()
