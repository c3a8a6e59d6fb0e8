"""The config.json of Hugging Face's transformers, and the backbone it means."""

import math
from typing import Any, NamedTuple

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib

# Qwen3 norms the heads of queries and keys, and Llama does not.
_QK_NORM = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}
_MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
MECHANISMS = ("causal", "two_stream", "decoupled_rope")
_number = (float, None)
_count = (reading.Count(), None)
# The types of config.json, see reading.check.
_TYPES = {
  "hidden_size": reading.Count(),
  "intermediate_size": reading.Count(),
  "num_hidden_layers": reading.Count(),
  "num_attention_heads": reading.Count(),
  "num_key_value_heads?": _count,
  "head_dim?": _count,
  "vocab_size": reading.Count(),
  "max_position_embeddings": reading.Count(),
  "rms_norm_eps?": _number,
  "rope_theta?": _number,
  "rope_parameters?": (dict, None),
  "rope_scaling?": (dict, None),
  "tie_word_embeddings?": (bool, None),
  "bos_token_id?": _count,
}
_ROPE = {
  "rope_theta?": _number,
  "factor?": _number,
  "low_freq_factor?": _number,
  "high_freq_factor?": _number,
  "beta_slow?": _number,
  "beta_fast?": _number,
  "original_max_position_embeddings?": _count,
}
# Settings that change the mathematics of a backbone, and what each must be.
_PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
  "attention_bias": ((False,), "biases of attention"),
  "mlp_bias": ((False,), "biases of the MLP"),
  "hidden_act": (("silu",), "another activation than silu"),
  "use_sliding_window": ((False,), "attention in sliding windows"),
  "partial_rotary_factor": ((1, 1.0), "heads that are rotated in part"),
  "quantization_config": ((), "quantized weights"),
}
_YARN_EXTRA = ("attention_factor", "mscale", "mscale_all_dim")


class Source(NamedTuple):
  """A model of Hugging Face, as its config.json describes it.

  Attributes:
    architecture: "LlamaForCausalLM" or "Qwen3ForCausalLM".
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
  architecture = _architecture(tree)
  reading.check(tree, _TYPES)
  _check_plain(tree)
  D, N = tree["hidden_size"], tree["num_attention_heads"]
  if not all(v for v in (D, N, tree["num_hidden_layers"], tree["vocab_size"])):
    raise ValueError("a size is 0")
  heads = tree.get("num_key_value_heads") or N
  size = tree.get("head_dim") or D // N
  fields = {
    "D": D,
    "L": tree["num_hidden_layers"],
    "N": N,
    "kv_heads": 0 if heads == N else heads,
    "head_size": 0 if size * N == D else size,
    "qk_norm": _QK_NORM[architecture],
    "mlp": "swiglu",
    "mlp_width": tree["intermediate_size"],
    "norm_epsilon": float(tree.get("rms_norm_eps") or 1e-6),
    "tied": bool(tree.get("tie_word_embeddings")),
    **_rotary(tree),
  }
  bos, eos = _ends(tree)
  return Source(
    architecture,
    fields,
    tree["vocab_size"],
    tree["max_position_embeddings"],
    bos,
    eos,
  )


def _architecture(tree):
  """Return the architecture of a config.json, or raise ValueError."""
  names = tree.get("architectures")
  name = names[0] if isinstance(names, list) and names else None
  if name == "GPT2LMHeadModel":
    raise ValueError(
      "architectures=['GPT2LMHeadModel']: GPT-2 has LayerNorm, biases and "
      "learned positions, which the backbone lacks; take a model of "
      + " or ".join(_QK_NORM)
    )
  if name not in _QK_NORM:
    raise ValueError(
      f"architectures={reading.shown(names)}: models of "
      f"{' and '.join(_QK_NORM)} are converted"
    )
  return name


def _check_plain(tree):
  """Raise ValueError for a setting that the backbone lacks."""
  for name, (allowed, what) in _PLAIN.items():
    value = tree.get(name)
    if value is not None and value not in allowed:
      raise ValueError(
        f"{name}={reading.shown(value)}: the backbone has no {what}"
      )
  kinds = tree.get("layer_types")
  if kinds and any(kind != "full_attention" for kind in kinds):
    raise ValueError(
      "layer_types: the backbone has no attention in sliding windows, and some "
      "layers have another type than full_attention"
    )


def _rotary(tree):
  """Return the fields of config.model for rotary frequencies."""
  rope = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
  reading.check(rope, _ROPE)
  base = rope.get("rope_theta") or tree.get("rope_theta") or 10000.0
  fields = {"rope_base": float(base)}
  kind = rope.get("rope_type", rope.get("type")) or "default"
  if kind == "default":
    return fields
  if kind not in ("llama3", "yarn"):
    raise ValueError(
      f"rope_type={reading.shown(kind)}: rotary frequencies are converted as "
      "default, llama3 or yarn"
    )
  names = {"llama3": ("low_freq_factor", "high_freq_factor")}
  slow, fast = names.get(kind, ("beta_slow", "beta_fast"))
  extra = [name for name in _YARN_EXTRA if rope.get(name) is not None]
  if extra or rope.get("truncate") is False:
    raise ValueError(
      f"rope_type={kind!r}: {(*extra, 'truncate')[0]} is not converted; YaRN "
      "has its usual form here"
    )
  length = rope.get("original_max_position_embeddings")
  if kind == "yarn":
    length = length or tree["max_position_embeddings"]
  if not length or not rope.get("factor"):
    raise ValueError(
      f"rope_type={kind!r}: needs factor and original_max_position_embeddings"
    )
  return fields | {
    "rope_scaling": kind,
    "rope_factor": float(rope["factor"]),
    "rope_original_T": length,
    "rope_slow_turns": float(rope.get(slow) or 1.0),
    "rope_fast_turns": float(rope.get(fast) or 0.0),
  }


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
  for name, wanted, why in (
    ("mechanism", "causal", "its models predict from left to right"),
    ("sentinels", 1, "its models know no token behind the text"),
    ("mlp", "swiglu", "Llama and Qwen3 have no other MLP"),
  ):
    if getattr(model, name) != wanted:
      return (
        f"config.model.{name}={getattr(model, name)!r}: the layout of Hugging "
        f"Face needs {wanted!r}: {why}"
      )
  return ""


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
  names = {is_normed: name for name, is_normed in _QK_NORM.items()}
  architecture = names[model.qk_norm]
  rope: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": model.rope_base,
  }
  if model.rope_scaling != "none":
    low, high = ("low_freq_factor", "high_freq_factor")
    if model.rope_scaling == "yarn":
      low, high = ("beta_slow", "beta_fast")
    rope |= {
      "rope_type": model.rope_scaling,
      "factor": model.rope_factor,
      "original_max_position_embeddings": model.rope_original_T,
      low: model.rope_slow_turns,
      high: model.fast_turns,
    }
  scaled = max(model.T, math.ceil(model.rope_original_T * model.rope_factor))
  return {
    "architectures": [architecture],
    "model_type": _MODEL_TYPES[architecture],
    "hidden_size": model.D,
    "intermediate_size": model.F,
    "num_hidden_layers": model.L,
    "num_attention_heads": model.N,
    "num_key_value_heads": model.key_heads,
    "head_dim": model.H,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rms_norm_eps": model.norm_epsilon,
    "max_position_embeddings": scaled,
    "rope_theta": model.rope_base,
    "rope_scaling": None if model.rope_scaling == "none" else rope,
    "rope_parameters": rope,
    "tie_word_embeddings": model.tied,
    "vocab_size": vocabulary,
    "bos_token_id": bos,
    "eos_token_id": eos,
    "pad_token_id": None,
    "torch_dtype": "float32",
    "use_cache": True,
  }
