"""Texts from a checkpoint: prompts with blanks, and --mode=sample.

decode.py and diffusion.py generate; each method's exactness is said there.
"""

import dataclasses
import datetime
import json
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax import config as config_lib
from aoarm_jax import (
  decode,
  diffusion,
  orders,
  restore,
  run_dir,
  sampling,
  sharding,
  train_state,
)
from aoarm_jax.data import tokenizers

_GENERATION = 102  # Sets these keys apart from training's of the same seed.


class PromptError(ValueError):
  """A prompt that cannot be: one line that names what and where."""


class Text(NamedTuple):
  """One generated text.

  Attributes:
    text: readable.
    order: the positions 1..n, in the order of generation; the prompt's known
      positions come first.
    log_p: nats: log-probability of what was generated, each token under the law
      that decided it (temperature and cuts included).
    calls: passes of the network.
  """

  text: str
  order: list[int]
  log_p: float
  calls: int


class Prompt(NamedTuple):
  """A text with blanks: tokens int32 [n], known bool [n]."""

  tokens: np.ndarray
  known: np.ndarray


def parse_prompt(
  text: str, tokenizer: tokenizers.Tokenizer, blank: str
) -> Prompt:
  """Reads a text in which every `blank` is one token to generate.

  Raises:
    PromptError: no blank in it, or a character that is not in the vocabulary.
  """
  if blank not in text:
    raise PromptError(
      f"--prompt={text!r} has no blank {blank!r}: there is nothing to generate"
    )
  # Blanks are encoded as some known symbol, and never read. The whole text
  # goes first, so that a complaint counts from its start.
  filler = tokenizer.decode([0])
  try:
    tokens = tokenizer.encode(text.replace(blank, filler)).astype(np.int32)
  except tokenizers.TokenizerError as error:
    raise PromptError(f"--prompt: {error}") from error
  known = []
  for part in text.split(blank):
    known += [True] * len(tokenizer.encode(part)) + [False]
  known = np.array(known[:-1])
  return Prompt(tokens, known)


class Sampler:
  """Draws texts as config.sample says; compiled once a prompt length."""

  def __init__(
    self,
    config: config_lib.Config,
    bind: train_state.Bind,
    tokenizer: tokenizers.Tokenizer,
    mesh: jax.sharding.Mesh,
  ):
    self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
    self._bind = bind
    self._jitted = jax.jit(
      self._draw,
      static_argnames="prefill",
      out_shardings=sharding.replicated(mesh),
    )

  def sample(self, params, prompt: Prompt | None = None) -> list[Text]:
    """Draws config.sample.count texts; the same call gives the same texts.

    Args:
      params: as the Bind's; on the mesh.
      prompt: of n <= T tokens: positions 1..n are generated, nothing beyond.
        None generates all T.

    Raises:
      PromptError: a prompt that this model cannot fill.
    """
    model, sample = self._config.model, self._config.sample
    prefill = prompt is not None or model.sentinels > 1
    if prompt is None:
      prompt = Prompt(np.zeros(model.T, np.int32), np.zeros(model.T, bool))
    self._check(prompt)
    law = sampling.Sampling(
      temperature=np.float32(sample.temperature),
      top_k=np.int32(sample.top_k),
      top_p=np.float32(sample.top_p),
    )
    tokens, order, log_p, calls = jax.device_get(
      self._jitted(
        params,
        *sharding.put(
          self._mesh,
          (
            jax.random.fold_in(jax.random.key(sample.seed), _GENERATION),
            np.tile(prompt.tokens, (sample.count, 1)),
            np.tile(prompt.known, (sample.count, 1)),
            law,
          ),
        ),
        prefill=prefill,
      )
    )
    return [
      Text(self._tokenizer.decode(row), by.tolist(), float(nats), int(passes))
      for row, by, nats, passes in zip(tokens, order, log_p, calls)
    ]

  def _check(self, prompt):
    model = self._config.model
    if len(prompt.tokens) > model.T:
      raise PromptError(
        f"--prompt has {len(prompt.tokens)} tokens; the model generates at "
        f"most {model.T} (config.model.T)"
      )
    blanks = np.flatnonzero(~prompt.known)
    if model.kind.left_to_right and prompt.known[blanks[0] :].any():
      raise PromptError(
        f"--prompt: the blank at position {blanks[0] + 1} stands before known "
        f"text, but mechanism {model.mechanism} generates left to right only"
      )

  def _draw(self, params, key, tokens, known, law, prefill):
    sample, options = self._config.sample, self._config.orders
    order_key, draw_key = jax.random.split(key)
    B, T = tokens.shape
    options = dataclasses.replace(
      options,
      family=sample.order,
      given=tuple(p for p in options.given if p <= T),
    )
    order = orders.draw(order_key, B, T, options)
    network = self._bind(params)
    if network.model.kind.masked:
      return diffusion.generate(
        network, draw_key, tokens, known, order, law,
        method=sample.method, steps=sample.steps,
      )  # fmt: skip
    plan = decode.Plan(
      sample.method, sample.width, sample.steps, sample.schedule, sample.score
    )
    return decode.generate(
      network, draw_key, tokens, known, order, law, plan=plan, prefill=prefill
    )


def write(path: epath.Path, texts: list[Text], step: int, **facts) -> None:
  """Writes texts as JSON lines, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (
    json.dumps({"step": step, **facts, **text._asdict()}) for text in texts
  )
  run_dir.write_atomically(path, "".join(line + "\n" for line in lines))


def sample(config: config_lib.Config, workdir: epath.Path, prompt: str) -> None:
  """--mode=sample: prints texts and writes them with their orders.

  Needs nothing but the checkpoint. Texts go to standard output, one a line,
  and with their orders to samples/ in the run directory.

  Raises:
    CheckpointError, ConfigError: see restore.restore.
    PromptError: a prompt that this model cannot fill.
  """
  tokenizer = tokenizers.get(config.data.tokenizer)
  parsed = (
    parse_prompt(prompt, tokenizer, config.sample.blank) if prompt else None
  )
  mesh = sharding.make_mesh(config.mesh)
  sharding.check(mesh, config)
  with jax.set_mesh(mesh):
    run = restore.restore(config, workdir, mesh)
    texts = Sampler(config, run.bind, tokenizer, mesh).sample(
      run.params, parsed
    )
  if jax.process_index() == 0:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    path = workdir / "samples" / f"{now}.jsonl"
    write(path, texts, run.saved.step, prompt=prompt, seed=config.sample.seed)
    logging.info("written with their orders: %s", path)
    for text in texts:
      print(text.text)
