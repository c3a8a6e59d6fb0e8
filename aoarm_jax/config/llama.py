"""The config.json of Llama and Qwen3 in Hugging Face's transformers."""

import math
from typing import Any

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib

NAMES = "Llama and Qwen3 have"
MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
# Qwen3 norms the heads of queries and keys, and Llama does not.
_QK_NORM = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}
# The field of config.json with the number of positions.
POSITIONS = "max_position_embeddings"
# The fields of config.model that all its models have.
FIELDS = {
  "positions": "rotary",
  "norm": "rms",
  "biases": False,
  "mlp": "swiglu",
}
_number = (float, None)
_count = (reading.Count(), None)
# The types of config.json, see reading.check.
TYPES = {
  "hidden_size": reading.Count(),
  "intermediate_size": reading.Count(),
  "num_hidden_layers": reading.Count(),
  "num_attention_heads": reading.Count(),
  "num_key_value_heads?": _count,
  "head_dim?": _count,
  "max_position_embeddings": reading.Count(),
  "rms_norm_eps?": _number,
  "rope_theta?": _number,
  "rope_parameters?": (dict, None),
  "rope_scaling?": (dict, None),
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
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
  "attention_bias": ((False,), "biases of attention"),
  "mlp_bias": ((False,), "biases of the MLP"),
  "hidden_act": (("silu",), "another activation than silu"),
  "use_sliding_window": ((False,), "attention in sliding windows"),
  "partial_rotary_factor": ((1, 1.0), "heads that are rotated in part"),
}
_YARN_EXTRA = ("attention_factor", "mscale", "mscale_all_dim")


def fields(tree: dict[str, Any], architecture: str) -> dict[str, Any]:
  """Return the fields of config.model that a config.json means.

  Args:
    tree: its JSON value, with the types of TYPES.
    architecture: a key of MODEL_TYPES.

  Raises:
    ValueError: the backbone has no such model. The message names the setting.
  """
  D, N = tree["hidden_size"], tree["num_attention_heads"]
  heads = tree.get("num_key_value_heads") or N
  size = tree.get("head_dim") or D // N
  return {
    **FIELDS,
    "D": D,
    "L": tree["num_hidden_layers"],
    "N": N,
    "kv_heads": 0 if heads == N else heads,
    "head_size": 0 if size * N == D else size,
    "qk_norm": _QK_NORM[architecture],
    "mlp_width": tree["intermediate_size"],
    "norm_epsilon": float(tree.get("rms_norm_eps") or 1e-6),
    "tied": bool(tree.get("tie_word_embeddings")),
    **_rotary(tree),
  }


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


def architecture(model: config_lib.Model) -> str:
  """Return the architecture that a model with FIELDS is written as."""
  names = {is_normed: name for name, is_normed in _QK_NORM.items()}
  return names[model.qk_norm]


def written(model: config_lib.Model) -> dict[str, Any]:
  """Return what config.json says about the backbone of a model.

  Args:
    model: the model's section of the config, with FIELDS.
  """
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
  }
