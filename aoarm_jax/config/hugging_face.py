"""The config.json of Hugging Face's transformers, and the backbone it means."""

from typing import Any, NamedTuple

from aoarm_jax.config import gpt2, llama, reading
from aoarm_jax.config import schema as config_lib

MECHANISMS = ("causal", "two_stream", "decoupled_rope")
# The module that knows the backbone of an architecture.
_FAMILIES: dict[str, Any] = {
  name: family for family in (llama, gpt2) for name in family.MODEL_TYPES
}
_count = (reading.Count(), None)
# The types of every config.json, see reading.check.
_TYPES = {
  "vocab_size": reading.Count(),
  "tie_word_embeddings?": (bool, None),
  "bos_token_id?": _count,
}
_PLAIN = {"quantization_config": ((), "quantized weights")}


class Source(NamedTuple):
  """A model of Hugging Face, as its config.json describes it.

  Attributes:
    architecture: its class in transformers, such as "Qwen3ForCausalLM".
    fields: the fields of config.model that make its backbone.
    vocabulary: the number of ids that it predicts.
    positions: the number of positions that it was made for.
    bos: the id that stands for BOS, before every text.
    eos: the id that stands for EOS, behind every text.
  """

  architecture: str
  fields: dict[str, Any]
  vocabulary: int
  positions: int
  bos: int
  eos: int


def read(tree: Any) -> Source:
  """Return what a config.json describes.

  Args:
    tree: its JSON value, which may come from a stranger.

  Raises:
    ValueError: the backbone has no such model. The message names the setting.
  """
  if not isinstance(tree, dict):
    raise ValueError("is no object")
  name = _name(tree)
  family = _FAMILIES[name]
  types = _TYPES | family.TYPES
  reading.check(tree, types)
  _check_plain(tree, name, _PLAIN | family.PLAIN)
  if any(tree[size] == 0 for size in types if not size.endswith("?")):
    raise ValueError("a size is 0")
  fields, positions = family.fields(tree, name), tree[family.POSITIONS]
  return Source(name, fields, tree["vocab_size"], positions, *_ends(tree))


def _name(tree):
  """Return the architecture of a config.json, or raise ValueError."""
  names = tree.get("architectures")
  name = names[0] if isinstance(names, list) and names else None
  if name not in (*_FAMILIES,):
    raise ValueError(
      f"architectures={reading.shown(names)}: models of "
      f"{', '.join(_FAMILIES)} are converted"
    )
  return name


def _check_plain(tree, architecture, plain):
  """Raise ValueError for a setting that a converted model lacks."""
  for name, (allowed, what) in plain.items():
    value = tree.get(name)
    if value is not None and value not in allowed:
      raise ValueError(
        f"{name}={reading.shown(value)}: a converted {architecture} has no "
        f"{what}"
      )
  kinds = tree.get("layer_types")
  if kinds and any(kind != "full_attention" for kind in kinds):
    raise ValueError(
      "layer_types: the backbone has no attention in sliding windows, and some "
      "layers have another type than full_attention"
    )


def _ends(tree):
  """Return the ids that stand for BOS and EOS."""
  eos = tree.get("eos_token_id")
  eos = eos[0] if isinstance(eos, list) and eos else eos
  reading.check({"eos_token_id": eos}, {"eos_token_id": _count})
  bos = tree.get("bos_token_id")
  bos = eos if bos is None else bos
  eos = bos if eos is None else eos
  if bos is None:
    raise ValueError(
      "has neither bos_token_id nor eos_token_id, and every text needs a token "
      "before its first: add bos_token_id"
    )
  if max(bos, eos) >= tree["vocab_size"]:
    raise ValueError(
      f"bos_token_id={bos}, eos_token_id={eos}: not below "
      f"vocab_size={tree['vocab_size']}"
    )
  return bos, eos


def missing(model: config_lib.Model) -> str:
  """Return why transformers has no such model, or "" if it has one.

  Args:
    model: the model's section of the config.
  """
  family = _FAMILIES[architecture(model)]
  # What 0 stands for.
  same = {"kv_heads": model.N, "head_size": model.D / model.N}
  for name, wanted, why in (
    ("mechanism", "causal", "its models predict from left to right"),
    ("sentinels", 1, "its models know no token behind the text"),
    *(
      (name, wanted, f"{family.NAMES} no other")
      for name, wanted in family.FIELDS.items()
    ),
  ):
    value = getattr(model, name)
    if value not in (wanted, same.get(name, wanted)):
      return (
        f"config.model.{name}={value!r}: the layout of Hugging Face needs "
        f"{wanted!r}: {why}"
      )
  return ""


def architecture(model: config_lib.Model) -> str:
  """Return the architecture that a model is written as."""
  family = gpt2 if model.positions == "learned" else llama
  return family.architecture(model)


def written(
  model: config_lib.Model, vocabulary: int, bos: int, eos: int | None
) -> dict[str, Any]:
  """Return the config.json of a model.

  Args:
    model: the model's section of the config; `missing` is "".
    vocabulary: the number of ids.
    bos: the id of BOS.
    eos: the id of the end of a text, if there is one.
  """
  name = architecture(model)
  family = _FAMILIES[name]
  return {
    "architectures": [name],
    "model_type": family.MODEL_TYPES[name],
    **family.written(model),
    "tie_word_embeddings": model.tied,
    "vocab_size": vocabulary,
    "bos_token_id": bos,
    "eos_token_id": eos,
    "pad_token_id": None,
    "torch_dtype": "float32",
    "use_cache": True,
  }
