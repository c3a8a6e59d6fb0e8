"""KV-cached generation and infilling in any order.

Exact: a text comes out with probability p(x | sigma) under the sampling law
(temperature, top-k, top-p) of every conditional. Known tokens come first in
the order, by position, and are prefilled in one pass, causally among
themselves, so the density stays that of the chain rule.
"""

import dataclasses
import datetime
import functools
import json
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from aoarm_jax import config as config_lib
from aoarm_jax import (
  diffusion,
  orders,
  restore,
  run_dir,
  sampling,
  sharding,
  train_state,
)
from aoarm_jax.data import tokenizers
from aoarm_jax.model import transformer

_GENERATION = 102  # Sets these keys apart from training's of the same seed.


def generate(
  network: transformer.Transformer,
  key: jax.Array,
  tokens: jax.Array,
  known: jax.Array,
  order: jax.Array,
  law: sampling.Sampling,
  *,
  prefill: bool = True,
) -> sampling.Generation:
  """Fills the blanks of every text, one token a step, from one cache.

  Row b's draws depend on (key, b) alone, not on the batch. Rows may have
  different numbers of known tokens.

  Args:
    network: of T_max >= T positions.
    key: typed PRNG key.
    tokens: int32 [B, T], natural order; anything where not known.
    known: bool [B, T].
    order: int32 [B, T], permutations of 1..T; known positions are moved to the
      front by position, blanks keep their order.
    law: of every draw.
    prefill: may be False where nothing is known and there is one sentinel.

  Returns:
    The texts and the orders used.
  """
  chex.assert_equal_shape([tokens, known, order])
  B, T = tokens.shape
  s = network.model.sentinels
  order = orders.known_first(order, known)
  slots = orders.to_slots(
    tokens, order, s, network.vocabulary, end=network.model.T + 1
  )
  S = T + s - 1
  cache = transformer.empty_cache(network.model, network.compute, B, S)
  if prefill:
    # One pass over all slots keeps shapes static. Slots of blanks hold anything
    # so far: no known slot sees them, and each is written anew when it comes.
    _, cache = network.extend(slots, cache, jnp.zeros(B, jnp.int32))
  rows = jnp.arange(B)
  row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)

  def unfinished(state):
    slot, _, _ = state
    return jnp.any(slot < S)

  def step(state):
    slot, content, cache = state
    # A finished row computes its last slot again and changes nothing.
    at = jnp.minimum(slot, S - 1)
    here = orders.Slots(
      *(
        array[rows, at][:, None]
        for array in (content, slots.position, slots.target_position)
      )
    )
    logits, cache = network.extend(here, cache, at)
    step_keys = jax.vmap(jax.random.fold_in)(row_keys, at)
    token = jax.vmap(jax.random.categorical)(
      step_keys, sampling.log_law(logits[:, 0], law)
    )
    token = jnp.where(slot < S, token, content[rows, at + 1])
    return slot + 1, content.at[rows, at + 1].set(token), cache

  # Slot i + 1 receives what slot i predicts; the last one is never content.
  last = jnp.take_along_axis(tokens, order[:, -1:] - 1, axis=1)
  content = jnp.concatenate([slots.tokens, last.astype(jnp.int32)], axis=1)
  first = known.sum(axis=1) + s - 1
  _, content, _ = jax.lax.while_loop(unfinished, step, (first, content, cache))
  by_position = jnp.zeros((B, T), jnp.int32)
  by_position = by_position.at[rows[:, None], order - 1].set(content[:, s:])
  return sampling.Generation(tokens=by_position, order=order)


class PromptError(ValueError):
  """A prompt that cannot be: one line that names what and where."""


class Text(NamedTuple):
  """One generated text.

  Attributes:
    text: readable.
    order: the positions 1..n, in the order of generation; the prompt's known
      positions come first.
  """

  text: str
  order: list[int]


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
    tokens, order = jax.device_get(
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
      Text(self._tokenizer.decode(row), by.tolist())
      for row, by in zip(tokens, order)
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
    return generate(
      network, draw_key, tokens, known, order, law, prefill=prefill
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
