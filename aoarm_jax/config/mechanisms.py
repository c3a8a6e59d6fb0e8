"""Which mechanisms there are, and what each is made of.

A mechanism is how a row learns which position it predicts. The table below is
the one place where they differ by name; the pieces that it names are built in
aoarm_jax/model/rows.py, and no other room knows a mechanism by name.

To add one that is made of these pieces, add a line here and a file in configs/.
"""

import dataclasses

# Generation from a cache: config.sample.method.
_LEFT_TO_RIGHT = ("sequential", "parallel", "speculative")
_ANY_ORDER = (*_LEFT_TO_RIGHT, "adaptive")
# Likelihoods by the chain rule: config.eval.estimators.
_CHAIN_RULE = (
  "any_order",
  "training_order",
  "left_to_right",
  "given_order",
  "ensembled",
)


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """What a mechanism is made of.

  c is the position of a row's content, t the position that it predicts.

  Attributes:
    source: who proposed it.
    streams: 1, or 2: query rows beside the content rows. A query row starts as
      one learned vector; keys and values come from content rows alone.
    query: the positions by which the query of the row that is read out turns:
      any of "content" and "target". Two of them take turns among the rotary
      pairs. Keys turn by "content"; without any, neither turns.
    added: learned position embeddings added to the input, side by side where
      there are two: any of "content" and "target".
    condition: width of a learned embedding of t that shifts, scales and gates
      every layer and scales and shifts the head's input (adaLN); 0 is none.
    masked: whether rows are in natural order, each at its own position, some
      of them MASK, all visible to all: a masked diffusion model, without cache.
    left_to_right: whether this is the only order that it knows.
    methods: the values of config.sample.method by which it generates.
    estimators: the likelihoods that it has, see evaluation/estimators.py.
    changes_one_thing_of: the mechanism that an ablation is compared with, "" if
      it is none.
  """

  source: str
  streams: int = 1
  query: tuple[str, ...] = ()
  added: tuple[str, ...] = ()
  condition: int = 0
  masked: bool = False
  left_to_right: bool = False
  methods: tuple[str, ...] = _ANY_ORDER
  estimators: tuple[str, ...] = (*_CHAIN_RULE, "context_ensembled")
  changes_one_thing_of: str = ""


_TARGET_WIDTH = 128  # AO-GPT's.

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
    # It does not know the order of its context, so it averages over none.
    estimators=(*_CHAIN_RULE, "elbo"),
  ),
}
