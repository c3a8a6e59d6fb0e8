"""Texts from a checkpoint: filling prompts, and --mode=sample.

decode.py and diffusion.py generate; each method's exactness is said there.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
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
  prompts,
  restore,
  run_dir,
  sampling,
  sharding,
  train_state,
)
from aoarm_jax.data import tokenizers

_GENERATION = 102  # Sets these keys apart from training's of the same seed.


class Text(NamedTuple):
  """One generated text.

  Attributes:
    text: readable.
    order: the positions 1..n, in the order of generation; the prompt's known
      positions come first.
    log_p: nats: log-probability of what was generated, each token under the law
      that decided it (temperature and cuts included).
    calls: passes of the network until the text was whole: one for what is known
      (or two sentinels), then one a step, but for speculative two a round, and
      for adaptive another for every 64 targets that it scores. As many as it
      takes alone: those for longer texts of its batch do not count.
  """

  text: str
  order: list[int]
  log_p: float
  calls: int


class Sampler:
  """Draws texts; compiled once for every shape and method."""

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
      static_argnames=("options", "given", "prefill", "most_known"),
      out_shardings=sharding.replicated(mesh),
    )

  def sample(self, params, prompt: prompts.Prompt | None = None) -> list[Text]:
    """Draws config.sample.count texts, as `fill` does.

    Args:
      params: as the Bind's; on the mesh.
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
  ) -> list[list[Text]]:
    """Draws config.sample.count texts for every prompt.

    The j-th text of prompt i depends on the seed, i * count + j and the prompt
    alone: not on config.sample.batch_size, the devices or the other prompts.

    Args:
      params: as the Bind's; on the mesh.
      texts: the prompts, each of n <= T tokens: positions 1..n are generated,
        nothing beyond.
      config: its sample and orders.given, instead of the Sampler's own.

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
    for (T, prefill), rows in shapes.items():
      B = sharding.batch_size(self._mesh, config.sample.batch_size, len(rows))
      for first in range(0, len(rows), B):
        batch = rows[first : first + B]
        found |= self._batch(params, texts, config, T, prefill, batch, B)
    return [
      [found[i * count + j] for j in range(count)] for i in range(len(texts))
    ]

  def _batch(self, params, texts, config, T, prefill, rows, B):
    """The texts of these rows by index, in one batch of B."""
    sample = config.sample
    tokens, known = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    length, index = np.ones(B, np.int32), np.zeros(B, np.int32)
    for b, row in enumerate(rows):
      prompt = texts[row // sample.count]
      n = len(prompt.tokens)
      tokens[b, :n], known[b, :n] = prompt.tokens, prompt.known
      length[b], index[b] = n, row
    everywhere = sharding.put(
      self._mesh,
      (
        jax.random.fold_in(jax.random.key(sample.seed), _GENERATION),
        sampling.make_law(sample.temperature, sample.top_k, sample.top_p),
        np.int32((length - known.sum(axis=1)).max()),
      ),
    )
    drawn = self._jitted(
      params,
      *everywhere,
      *sharding.put_rows(self._mesh, (tokens, known, length, index)),
      options=_static(sample),
      given=tuple(p for p in config.orders.given if p <= T),
      prefill=prefill,
      most_known=T if known.any() else 0,
    )
    return {
      row: Text(
        self._tokenizer.decode(text[:n]),
        by[:n].tolist(),
        float(nats),
        int(calls),
      )
      for row, n, text, by, nats, calls in zip(
        rows, length.tolist(), *jax.device_get(drawn)
      )
    }

  def _draw(
    self, params, key, law, most_blanks, tokens, known, length, index,
    *, options, given, prefill, most_known,
  ):  # fmt: skip
    order_key, draw_key = jax.random.split(key)
    B, T = tokens.shape
    family = dataclasses.replace(
      self._config.orders, family=options.order, given=given
    )
    order = orders.draw(order_key, B, T, family, rows=index)
    network = self._bind(params)
    shared = dict(rows=index, length=length)
    if network.model.kind.masked:
      return diffusion.generate(
        network, draw_key, tokens, known, order, law,
        method=options.method, steps=options.steps, **shared,
      )  # fmt: skip
    plan = decode.Plan(
      options.method,
      options.width,
      options.steps,
      options.schedule,
      options.score,
    )
    return decode.generate(
      network, draw_key, tokens, known, order, law, plan=plan,
      prefill=prefill, most_known=most_known, most_blanks=most_blanks, **shared,
    )  # fmt: skip


def _static(sample):
  """What of the options a compiled program depends on."""
  default = config_lib.Sample()
  traced = (
    "count", "batch_size", "temperature", "top_k", "top_p", "blank", "every",
    "seed",
  )  # fmt: skip
  return dataclasses.replace(
    sample, **{name: getattr(default, name) for name in traced}
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
    CheckpointError, ConfigError: see restore.restore.
    PromptError: a prompt that this model cannot fill.
  """
  tokenizer = tokenizers.get(config.data.tokenizer)
  blank = config.sample.blank
  lines = prompts.read_lines(input_file) if input_file else []
  if prompt:
    lines = [("--prompt", prompt)]
  parsed = [
    prompts.parse_prompt(line, tokenizer, blank, name) for name, line in lines
  ]
  mesh = sharding.of_run(config)
  with jax.set_mesh(mesh):
    run = restore.restore(config, workdir, mesh)
    sampler = Sampler(config, run.bind, tokenizer, mesh)
    if parsed:
      found = sampler.fill(run.params, parsed)
    else:
      found = [sampler.sample(run.params)]
  if jax.process_index() != 0:
    return
  if input_file:
    for (_, line), texts in zip(lines, found):
      for text in texts:
        print(json.dumps({"prompt": line, **text._asdict()}))
    return
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
  path = workdir / "samples" / f"{now}.jsonl"
  write(path, found[0], run.saved.step, prompt=prompt, seed=config.sample.seed)
  logging.info("written with their orders: %s", path)
  for text in found[0]:
    print(text.text)
