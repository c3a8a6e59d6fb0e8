"""Texts from a checkpoint: filling prompts, and --mode=sample.

decode.py and diffusion.py generate; each method's exactness is said there.
"""

import datetime
import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax import orders
from aoarm_jax.config import purposes
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import sharding
from aoarm_jax.generation import decode, diffusion, prompts
from aoarm_jax.generation import law as sampling
from aoarm_jax.generation import plan as plan_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import opening

_AT_ONCE = 1024  # Texts drawn of a file before they are printed.


class Text(NamedTuple):
  """One generated text.

  Attributes:
    text: readable; bytes that are no UTF-8 are U+FFFD in it.
    tokens: the ids, which say all: model.score(text) reads these.
    order: the positions 1..n, in the order of generation; the prompt's known
      positions come first.
    log_p: nats: log-probability of what was generated, each token under the law
      that decided it (temperature and cuts included).
    calls: passes of the network until the text was whole: one for what is known
      (or two sentinels), then one a step, but for speculative two a round, and
      for adaptive another for every 64 targets that it scores. As many as it
      takes alone: those for longer texts of its batch do not count.
    accepted: of speculative, how many of the generated tokens were drafts that
      passed: over all of them, the rate of acceptance.
  """

  text: str
  tokens: list[int]
  order: list[int]
  log_p: float
  calls: int
  accepted: int = 0


class Sampler:
  """Draws texts; compiled once for every shape and method."""

  def __init__(self, config: config_lib.Config, network: network_lib.Network):
    self._config, self._network = config, network
    self._mesh = network.mesh
    self._jitted = jax.jit(
      self._draw,
      static_argnames=("plan", "family", "prefill", "most_known"),
      out_shardings=sharding.replicated(network.mesh),
    )

  def sample(self, params, prompt: prompts.Prompt | None = None) -> list[Text]:
    """Draws config.sample.count texts, as `fill` does.

    Args:
      params: of the network; on the mesh.
      prompt: None generates all T tokens.
    """
    if prompt is None:
      T = self._config.model.T
      prompt = prompts.Prompt(np.zeros(T, np.int32), np.zeros(T, bool))
    return self.fill(params, [prompt])[0]

  def fill(
    self,
    params,
    texts: Sequence[prompts.Prompt],
    config: config_lib.Config | None = None,
    given: Sequence[Sequence[int]] | None = None,
    first: int = 0,
  ) -> list[list[Text]]:
    """Draws config.sample.count texts for every prompt.

    The j-th text of prompt i depends on the seed, (first + i) * count + j and
    the prompt alone: not on config.sample.batch_size, the devices or the other
    prompts.

    Args:
      params: of the network; on the mesh.
      texts: the prompts, each of n <= T tokens: positions 1..n are generated,
        nothing beyond.
      config: its sample and orders.given, instead of the Sampler's own.
      given: with config.sample.order="given", a permutation of 1..n for every
        prompt; None is config.orders.given for all.
      first: number of the first prompt.

    Returns:
      For every prompt its texts.

    Raises:
      PromptError: a prompt that this model cannot fill.
    """
    config, model = config or self._config, self._config.model
    count = config.sample.count
    shapes: dict[tuple[int, bool], list[int]] = {}
    for i, prompt in enumerate(texts):
      _check(prompt, model)
      T = prompts.padded_length(len(prompt.tokens), model.T)
      prefill = bool(prompt.known.any()) or model.sentinels > 1
      rows = range(i * count, (i + 1) * count)
      shapes.setdefault((T, prefill), []).extend(rows)
    found: dict[int, Text] = {}
    if given is None:
      given = [config.orders.given] * len(texts)
    for (T, prefill), rows in shapes.items():
      B = sharding.batch_size(self._mesh, config.sample.batch_size, len(rows))
      for start in range(0, len(rows), B):
        found |= self._batch(
          params, texts, config, given, first, T, prefill,
          rows[start : start + B], B,
        )  # fmt: skip
    return [
      [found[i * count + j] for j in range(count)] for i in range(len(texts))
    ]

  def _batch(
    self, params, texts, config, given, first, T, prefill, rows, B
  ):  # fmt: skip
    """The texts of these rows by index, in one batch of B."""
    sample = config.sample
    tokens, known = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    length, index = np.ones(B, np.int32), np.zeros(B, np.int32)
    order = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    for b, row in enumerate(rows):
      prompt = texts[row // sample.count]
      n = len(prompt.tokens)
      tokens[b, :n], known[b, :n] = prompt.tokens, prompt.known
      length[b], index[b] = n, first * sample.count + row
      if sample.order == "given":
        order[b] = prompts.within(given[row // sample.count], T)
    everywhere = sharding.put(
      self._mesh,
      (
        jax.random.fold_in(jax.random.key(sample.seed), purposes.GENERATION),
        sampling.make_law(sample.temperature, sample.top_k, sample.top_p),
        np.int32((length - known.sum(axis=1)).max()),
      ),
    )
    drawn = self._jitted(
      params,
      *everywhere,
      *sharding.put_rows(self._mesh, (tokens, known, length, index, order)),
      plan=plan_lib.Plan.of(sample),
      family=sample.order,
      prefill=prefill,
      most_known=T if known.any() else 0,
    )
    return {
      row: Text(
        self._network.tokenizer.decode(text[:n]),
        text[:n].tolist(),
        by[:n].tolist(),
        float(nats),
        int(calls),
        int(accepted),
      )
      for row, n, text, by, nats, calls, accepted in zip(
        rows, length.tolist(), *jax.device_get(drawn)
      )
    }

  def _draw(
    self, params, key, law, most_blanks, tokens, known, length, index, order,
    *, plan, family, prefill, most_known,
  ):  # fmt: skip
    order_key, draw_key = jax.random.split(key)
    if family != "given":
      options = self._config.replace("orders.family", family).orders
      order = orders.draw(order_key, *tokens.shape, options, rows=index)
    texts = self._network, params, draw_key, tokens, known, order, law
    shared = dict(plan=plan, rows=index, length=length)
    if self._network.layout.masked:
      return diffusion.generate(*texts, **shared)
    return decode.generate(
      *texts,
      prefill=prefill,
      most_known=most_known,
      most_blanks=most_blanks,
      **shared,
    )


def _check(prompt, model):
  if len(prompt.tokens) > model.T:
    raise prompts.PromptError(
      f"{prompt.name} has {len(prompt.tokens)} tokens; the model generates at "
      f"most {model.T} (config.model.T)"
    )
  blanks = np.flatnonzero(~prompt.known)
  if model.kind.left_to_right and prompt.known[blanks[0] :].any():
    raise prompts.PromptError(
      f"{prompt.name}: the blank at position {blanks[0] + 1} stands before "
      f"known text, but mechanism {model.mechanism} generates left to right "
      "only"
    )


def write(path: epath.Path, texts: list[Text], step: int, **facts) -> None:
  """Writes texts as JSON lines, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (
    json.dumps({"step": step, **facts, **text._asdict()}) for text in texts
  )
  run_dir.write_atomically(path, "".join(line + "\n" for line in lines))


def sample(
  config: config_lib.Config,
  workdir: epath.Path,
  prompt: str = "",
  input_file: str = "",
) -> None:
  """--mode=sample: prints texts and writes them with their orders.

  Needs nothing but the checkpoint. Texts go to standard output: one a line, or
  as JSON lines where prompts come from a file; without a file they are also
  written, with their orders, to samples/ in the run directory.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    PromptError: a prompt that this model cannot fill.
  """
  tokenizer = tokenizers.get(config.data.tokenizer)
  blank, first = config.sample.blank, jax.process_index() == 0
  lines = prompts.read_lines(input_file) if input_file else []
  if prompt:
    lines = [("--prompt", prompt)]
  parsed = [
    prompts.parse_prompt(line, tokenizer, blank, name) for name, line in lines
  ]
  run = opening.open_run(workdir, config)
  with jax.set_mesh(run.network.mesh):
    sampler = Sampler(config, run.network)
    if input_file:
      # By parts, so that what was done is there whatever comes after.
      at_once = -(-_AT_ONCE // config.sample.count)
      for start in range(0, len(parsed), at_once):
        part = slice(start, start + at_once)
        found = sampler.fill(run.params, parsed[part], first=start)
        if first:
          _print_json(lines[part], found)
      return
    texts = sampler.sample(run.params, parsed[0] if parsed else None)
  if not first:
    return
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
  path = workdir / "samples" / f"{now}.jsonl"
  facts = {
    name: getattr(config.sample, name)
    for name in ("seed", "method", "order", "temperature", "top_k", "top_p")
  }
  write(path, texts, run.step, prompt=prompt, **facts)
  logging.info("written with their orders: %s", path)
  for text in texts:
    print(text.text)


def _print_json(lines, found):
  for (_, line), texts in zip(lines, found):
    for text in texts:
      print(json.dumps({"prompt": line, **text._asdict()}))
  sys.stdout.flush()
