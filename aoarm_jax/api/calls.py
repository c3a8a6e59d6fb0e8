"""The work behind the methods of Model: options and texts become programs."""

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from aoarm_jax.api import given
from aoarm_jax.api import options as options_lib
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import switches
from aoarm_jax.evaluation import blocks, inside
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts, streaming
from aoarm_jax.generation import texts as generate_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import patience


class Programs(NamedTuple):
  """The compiled programs of a model; each is made at its first use."""

  sampler: generate_lib.Sampler
  scorer: score_lib.Scorer
  reader: inside.Reader

  @classmethod
  def of(
    cls, config: config_lib.Config, network: network_lib.Network
  ) -> "Programs":
    """Return the programs of a network; nothing is compiled yet."""
    return cls(
      generate_lib.Sampler(config, network),
      score_lib.Scorer(config, network),
      inside.Reader(network),
    )


@dataclasses.dataclass(frozen=True)
class Calls:
  """The calls of a model, as it is at one moment.

  The options of a call are those of the method of Model with its name.

  Attributes:
    config: the config of the model.
    network: its network.
    params: its parameters, on the mesh.
    programs: its programs.
    progress: whether long waits are told.
  """

  config: config_lib.Config
  network: network_lib.Network
  params: Any
  programs: Programs
  progress: bool

  def __post_init__(self) -> None:
    """Refuse to work in a fork of a process that has used JAX."""
    switches.check_not_forked()

  @contextlib.contextmanager
  def ready(self) -> Iterator[None]:
    """Set the mesh and the types of the model, and tell of long waits."""
    mesh = self.network.mesh
    assert mesh is not None
    seconds = self.config.telemetry.patience_seconds if self.progress else 0
    with (
      switches.fixed_types(),
      jax.set_mesh(mesh),
      patience.on_stderr(seconds),
    ):
      yield

  def start(self, prompt: Any, length: Any, normalise: Any) -> prompts.Prompt:
    """Return the prompt of `generate`."""
    tokenizer = self.network.tokenizer
    return given.start(self.config, tokenizer, prompt, length, normalise)

  def blanks(
    self, call: str, texts: Any, normalise: Any, options: Mapping[str, Any]
  ) -> list[prompts.Prompt]:
    """Return the prompts of `infill` or `infill_stream`."""
    texts = options_lib.several(texts, str)
    config = options_lib.applied(self.config, call, options)
    tokenizer = self.network.tokenizer

    def parse(text: str, name: str) -> prompts.Prompt:
      blank = config.sample.blank
      prompt = prompts.parse_prompt(text, tokenizer, blank, name)
      generate_lib.check(prompt, config.model)
      return prompt

    lines = given.lines(config, tokenizer, texts, normalise, "")
    return prompts.check_lines(lines, parse)

  def fill(
    self,
    call: str,
    parsed: list[prompts.Prompt],
    count: Any,
    options: Mapping[str, Any],
  ) -> list[list[generate_lib.Text]]:
    """Return `count` texts for each prompt."""
    config, orders = self._sampling(call, parsed, count, options)
    with self.ready():
      sampler = self.programs.sampler
      return sampler.fill(self.params, parsed, config, orders)

  def stream(
    self, call: str, parsed: prompts.Prompt, options: Mapping[str, Any]
  ) -> Iterator[streaming.Token]:
    """Return an iterator over the tokens of a text for the prompt."""
    config, orders = self._sampling(call, [parsed], 1, options)
    order = orders[0] if orders else None

    def drawn():
      tokens = self.programs.sampler.stream(self.params, parsed, config, order)
      while True:
        # The caller's own work between two tokens has none of these settings.
        with self.ready():
          token = next(tokens, None)
        if token is None:
          return
        yield token

    return drawn()

  def _sampling(self, call, parsed, count, options):
    """Return the config of a call that draws texts, and the orders of texts."""
    options = dict(options)
    if options.get("seed") is None:
      # Seeds are int32 on devices.
      options["seed"] = secrets.randbits(31)
    count = config_rules.whole_number("count", count)
    config = options_lib.applied(self.config, call, options)
    config = config_rules.validate(config.replace("sample.count", count))
    return config, self._orders(options, parsed)

  def score(
    self,
    texts: Any,
    blank: Any,
    normalise: Any,
    stride: Any,
    options: Mapping[str, Any],
  ) -> list[score_lib.Score]:
    """Return the scores of texts."""
    several = options_lib.several(texts, (str, generate_lib.Text))
    config = options_lib.applied(self.config, "score", options, blank)
    stride = blocks.checked_stride(stride, config.model)

    def parse(text: str, name: str) -> tuple[str, prompts.Marked]:
      parsed_text, marked = given.marked(config, self.network, text, name)
      if not blocks.is_long(marked, config.model):
        score_lib.check(marked, config.model)
      return parsed_text, marked

    tokenizer, marks = self.network.tokenizer, config.score.marks
    lines = given.lines(config, tokenizer, several, normalise, marks)
    parsed = prompts.check_lines(lines, parse)
    orders = self._orders(options, [marked for _, marked in parsed])
    is_long = [blocks.is_long(text, config.model) for _, text in parsed]
    if orders and any(is_long):
      raise config_lib.ConfigError(
        f"order: a list of positions is for texts of up to {config.model.T} "
        "tokens (config.model.T); a longer text takes the name of an order"
      )
    return self._scores(parsed, is_long, orders, stride, config)

  def _scores(self, parsed, is_long, orders, stride, config):
    """Return the scores of parsed texts, short and long ones."""
    scorer = self.programs.scorer
    long = [text for text, is_so in zip(parsed, is_long) if is_so]
    short = [text for text, is_so in zip(parsed, is_long) if not is_so]
    with self.ready():
      of_long = iter(
        blocks.score(scorer, self.network, self.params, long, config, stride)
      )
      of_short = iter(scorer.score(self.params, short, config, orders))
    return [next(of_long if is_so else of_short) for is_so in is_long]

  def _orders(self, options, texts):
    """Return the permutations of texts; None for the name of a family."""
    order, has_ends = options.get("order", ""), self.network.end is not None
    return options_lib.permutations(order, texts, has_ends)

  def read(
    self, what: str, texts: Any, order: Any, normalise: Any, known: Any = None
  ) -> Any:
    """Return what the network computes of texts.

    Args:
      what: "logits", "hidden_states" or "attention".
      texts: one text or several.
      order: the option of the call.
      normalise: the option of the call.
      known: the option of the call.
    """
    config, network = self.config, self.network
    parsed, is_one = given.contents(config, network, texts, normalise)
    has_ends = network.end is not None
    orders = options_lib.followed(config.model, order, parsed, has_ends)
    read = [inside.given(network, *pair) for pair in zip(parsed, orders)]
    if what == "logits":
      more = config.score.batch_size
    else:
      more = options_lib.known_tokens(config.model, known, read)
    with self.ready():
      found = getattr(self.programs.reader, what)(self.params, read, more)
    return found[0] if is_one else found

  def head(self) -> np.ndarray:
    """Return the weights of the head: float32 [D, V]."""
    with self.ready():
      weights = self.network.bind(self.params).output_weights()
      return np.asarray(weights.astype(np.float32))
