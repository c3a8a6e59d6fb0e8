"""The fields of a model: its backbone and its mechanism."""

import dataclasses

from aoarm_jax.config import mechanisms
from aoarm_jax.config.sections import fields


@dataclasses.dataclass(frozen=True)
class Model:
  """The backbone and its mechanism (aoarm_jax/model)."""

  mechanism: str = fields.field(
    "two_stream",
    "how a row learns which position it predicts",
    choices=tuple(mechanisms.MECHANISMS),
    binds="model",
  )
  sentinels: int = fields.field(
    1,
    "number of sentinels, which mark the ends of the window or of a padded "
    "document; 1: BOS; 2: BOS and EOS",
    low=1,
    high=2,
    binds="model",
  )
  T: int = fields.field(
    128, "number of positions to generate", low=1, binds="model"
  )
  D: int = fields.field(256, "width of the model", low=2, binds="model")
  L: int = fields.field(10, "number of layers", low=1, binds="model")
  N: int = fields.field(4, "number of attention heads", low=1, binds="model")
  kv_heads: int = fields.field(
    0,
    "number of heads of keys and values, each of which serves as many "
    "attention heads (grouped-query attention); 0 means N",
    low=0,
    binds="model",
  )
  head_size: int = fields.field(
    0, "width H of an attention head; 0 means D / N", low=0, binds="model"
  )
  qk_norm: bool = fields.field(
    True, "norm each head of queries and keys (QK-norm)", binds="model"
  )
  mlp: str = fields.field(
    "gelu",
    "kind of the MLP; gelu: GELU(x U) W; swiglu: (SiLU(x G) * x U) W, whose "
    "three matrices have 1.5 times as many parameters at the same width",
    choices=("gelu", "swiglu"),
    binds="model",
  )
  mlp_width: int = fields.field(
    0, "hidden width F of the MLP; 0 means 4 D", low=0, binds="model"
  )
  biases: bool = fields.field(
    False,
    "add a bias to every matrix product of attention and MLP",
    binds="model",
  )
  norm: str = fields.field(
    "rms",
    "kind of the norms of rows; rms: RMSNorm; layer: LayerNorm with a bias; "
    "heads of queries and keys (qk_norm) always have RMSNorm",
    choices=("rms", "layer"),
    binds="model",
  )
  norm_epsilon: float = fields.field(
    1e-6,
    "number that every norm adds to the mean square, or to the variance",
    above=0.0,
    binds="model",
  )
  positions: str = fields.field(
    "rotary",
    "how rows learn positions; rotary: as the mechanism says, by rotations in "
    "most; learned: nothing is rotated, and a learned embedding of the "
    "position is added to the input of a row, for content rows that of their "
    "token, for query rows that of their target",
    choices=("rotary", "learned"),
    binds="model",
  )
  rope_base: float = fields.field(
    10000.0,
    "base of the rotary frequencies; the longest wavelength divided by 2 pi is "
    "about this many positions",
    low=1.0,
    binds="model",
  )
  rope_scaling: str = fields.field(
    "none",
    "how rotary frequencies are lowered for texts longer than "
    "rope_original_T; llama3: as Llama 3.1 does; yarn: as YaRN (arXiv "
    "2309.00071) does, which also multiplies the scores of attention",
    choices=("none", "llama3", "yarn"),
    binds="model",
  )
  rope_factor: float = fields.field(
    1.0,
    "rope_scaling only: factor by which the lowest frequencies are divided",
    low=1.0,
    binds="model",
  )
  rope_original_T: int = fields.field(
    0,
    "rope_scaling only: number of positions that the frequencies were made "
    "for; it must be set",
    low=0,
    binds="model",
  )
  rope_slow_turns: float = fields.field(
    1.0,
    "rope_scaling only: a rotary pair that turns less often than this over "
    "rope_original_T positions gets its frequency divided by the whole factor",
    above=0.0,
    binds="model",
  )
  rope_fast_turns: float = fields.field(
    0.0,
    "rope_scaling only: a rotary pair that turns more often than this keeps "
    "its frequency; 0 means 4 for llama3 and 32 for yarn",
    low=0.0,
    binds="model",
  )
  tied: bool = fields.field(
    False, "use the embedding as the head, too", binds="model"
  )
  condition_scale: float = fields.field(
    0.02,
    "adaLN only: initial standard deviation of the target's embedding; AO-GPT "
    "uses 0.02, with which all gates are nearly closed at the start",
    above=0.0,
    binds="run",
  )
  shifted: bool = fields.field(
    False,
    "a query for the token at a target position stands at the position before, "
    "as in a left-to-right model; query rows of two streams also begin as the "
    "token there, where they see it; models that were converted from "
    "left-to-right ones have it",
    binds="model",
  )
  content_sees: str = fields.field(
    "prefix",
    "two_stream only: the slots that content rows see; prefix: all slots up to "
    "their own; self: their own; last:8, nearest:8, random:8: their own and 8 "
    "earlier slots, which are the last ones in the order, those nearest in "
    "position, or a fixed random choice; sentinels are always seen, and query "
    "rows always see the prefix",
    binds="model",
  )

  @property
  def H(self) -> int:
    """Width of one attention head."""
    return self.head_size or self.D // self.N

  @property
  def key_heads(self) -> int:
    """Number of heads of keys and values."""
    return self.kv_heads or self.N

  @property
  def fast_turns(self) -> float:
    """Turns above which a rotary pair keeps its frequency; see rope_scaling."""
    return self.rope_fast_turns or (
      4.0 if self.rope_scaling == "llama3" else 32.0
    )

  @property
  def F(self) -> int:
    """Hidden width of the MLP."""
    return self.mlp_width or 4 * self.D

  @property
  def S(self) -> int:
    """Number of slots: the sentinels and the tokens that are content.

    The last generated token is never content, except with a masked mechanism.
    """
    return self.T + self.sentinels - (not self.kind.masked)

  @property
  def kind(self) -> mechanisms.Mechanism:
    """The pieces that the mechanism is made of."""
    kind = mechanisms.MECHANISMS[self.mechanism]
    return (
      kind.with_learned_positions() if self.positions == "learned" else kind
    )

  @property
  def look(self) -> mechanisms.Look | None:
    """The slots that content rows see; None if they see a prefix."""
    return mechanisms.look(self.content_sees)
