"""The table of mechanisms, and the pieces that each mechanism is made of.

A mechanism tells a row which position it predicts. Mechanisms differ by name in
the table below and nowhere else. aoarm_jax/model/rows.py builds the pieces that
the table names. No computation knows a mechanism by name.

To add a mechanism that is made of these pieces, add a line here and a file in
configs/.
"""

import dataclasses
import re
from typing import NamedTuple

# The values of config.sample.method that generate from a cache.
_LEFT_TO_RIGHT = ("sequential", "parallel", "speculative")
_ANY_ORDER = (*_LEFT_TO_RIGHT, "adaptive")
# The values of config.eval.estimators that are likelihoods by the chain rule.
_CHAIN_RULE = (
  "any_order",
  "training_order",
  "left_to_right",
  "given_order",
  "ensembled",
)


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """The pieces that a mechanism is made of.

  A row has two positions. Its content stands at the content position c, and it
  predicts the token at the target position t.

  Attributes:
    source: the paper that proposed the mechanism, or its purpose.
    streams: the number of streams, 1 or 2. With 2 there are query rows beside
      the content rows. A query row starts as one learned vector. Keys and
      values come from content rows alone.
    untied: for two streams, whether each stream has weights of its own in every
      block. Else the streams share all weights.
    copies: the number of rows per slot, for one stream. The rows of a slot have
      the same content, positions and mask, and all of them are keys. A learned
      vector is added to the input of each row but the first, since equal rows
      would stay equal. The mean of a slot's rows makes the prediction.
    query: the positions by which the queries of the predicting rows are
      rotated: any of "content" and "target". Two positions take turns among the
      rotary pairs. Keys are rotated by "content". If `query` is empty, neither
      queries nor keys are rotated.
    added: the learned position embeddings that are added to the input: any of
      "content" and "target". Two embeddings stand side by side, each with half
      of the width. A query row of two streams has no content: it takes the
      embedding of its target in place of the content's.
    condition: the width of a learned embedding of t. The embedding shifts,
      scales and gates every layer, and shifts and scales the input of the head
      (adaLN). 0 means no conditioning.
    masked: whether this is a masked diffusion model. Its rows are in natural
      order, each at its own position. Some rows hold MASK, every row sees every
      row, and there is no cache.
    left_to_right: whether the mechanism knows the order from left to right
      only.
    methods: the values of config.sample.method that the mechanism supports.
    estimators: the likelihoods that the mechanism has; see
      evaluation/estimators.py.
    changes_one_thing_of: for an ablation, the name of the mechanism that it is
      compared with. "" otherwise.
  """

  source: str
  streams: int = 1
  untied: bool = False
  copies: int = 1
  query: tuple[str, ...] = ()
  added: tuple[str, ...] = ()
  condition: int = 0
  masked: bool = False
  left_to_right: bool = False
  methods: tuple[str, ...] = _ANY_ORDER
  estimators: tuple[str, ...] = (*_CHAIN_RULE, "context_ensembled")
  changes_one_thing_of: str = ""

  @property
  def has_one_position(self) -> bool:
    """A row that predicts stands at a single position.

    Then an embedding of this position can take the place of the rotations. A
    row of one stream that is rotated by its target has two positions.
    """
    return self.streams == 2 or self.query == ("content",)

  def with_learned_positions(self) -> "Mechanism":
    """Return the mechanism with embeddings of positions, without rotations."""
    return dataclasses.replace(self, query=(), added=("content",))


_TARGET_WIDTH = 128  # The value of AO-GPT.

MECHANISMS = {
  "two_stream": Mechanism(
    "XLNet, arXiv 1906.08237, section 2.3", streams=2, query=("target",)
  ),
  "decoupled_rope": Mechanism("arXiv 2602.16092", query=("target",)),
  "decoupled_rope_content": Mechanism(
    "ablation: the query carries its content position too",
    query=("target", "content"),
    changes_one_thing_of="decoupled_rope",
  ),
  "decoupled_rope_adaln": Mechanism(
    "ablation: decoupled_rope with ao_gpt's conditioning",
    query=("target",),
    condition=_TARGET_WIDTH,
    changes_one_thing_of="decoupled_rope",
  ),
  "sigma_gpt": Mechanism(
    "sigma-GPT, arXiv 2404.09562", added=("content", "target")
  ),
  "ao_gpt": Mechanism(
    "AO-GPT, arXiv 2506.19935", added=("content",), condition=_TARGET_WIDTH
  ),
  "causal": Mechanism(
    "plain RoPE transformer",
    query=("content",),
    left_to_right=True,
    methods=_LEFT_TO_RIGHT,
    estimators=("left_to_right",),
  ),
  "mdlm": Mechanism(
    "MDLM, arXiv 2406.07524",
    query=("content",),
    masked=True,
    methods=("sequential", "ancestral", "confidence"),
    # MDLM does not see the order of its context, so there are no orders of the
    # context to average over.
    estimators=(*_CHAIN_RULE, "elbo"),
  ),
  "decoupled_rope_added": Mechanism(
    "ablation: the input carries the position of the content",
    query=("target",),
    added=("content",),
    changes_one_thing_of="decoupled_rope",
  ),
  "register": Mechanism(
    "ablation: decoupled_rope with two rows per slot, which share all tasks",
    copies=2,
    query=("target",),
    # Drafts are copies of a single row, see model/cached.py.
    methods=("sequential",),
    changes_one_thing_of="decoupled_rope",
  ),
  "two_stream_untied": Mechanism(
    "ablation: each stream has its own weights",
    streams=2,
    untied=True,
    query=("target",),
    changes_one_thing_of="two_stream",
  ),
}


class Look(NamedTuple):
  """The slots that a content row sees besides its own and the sentinels.

  Attributes:
    kind: the measure of distance, "last", "nearest" or "random".
    most: the greatest number of earlier slots that are seen, the nearest by
      `kind`.
  """

  kind: str
  most: int


def look(text: str) -> Look | None:
  """Return the Look of a value of config.model.content_sees; None: a prefix.

  Args:
    text: "prefix", "self", or "last:k", "nearest:k" or "random:k" with a whole
      number k of at least 1.

  Raises:
    ValueError: `text` is none of these.
  """
  if text == "prefix":
    return None
  if text == "self":
    return Look("last", 0)
  match = re.fullmatch(r"(last|nearest|random):([1-9][0-9]{0,5})", text)
  if not match:
    raise ValueError(text)
  return Look(match[1], int(match[2]))
