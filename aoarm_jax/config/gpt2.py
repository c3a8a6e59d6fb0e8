"""The config.json of GPT-2 in Hugging Face's transformers."""

from typing import Any

from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib

NAMES = "GPT-2 has"
MODEL_TYPES = {"GPT2LMHeadModel": "gpt2"}
# The field of config.json with the number of positions.
POSITIONS = "n_positions"
_count = (reading.Count(), None)
# The types of config.json, see reading.check.
TYPES = {
  "n_embd": reading.Count(),
  "n_layer": reading.Count(),
  "n_head": reading.Count(),
  "n_inner?": _count,
  "n_positions": reading.Count(),
  "layer_norm_epsilon?": (float, None),
}
# Settings that change the mathematics of a backbone, and what each must be.
PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
  "activation_function": (
    ("gelu_new", "gelu_pytorch_tanh"),
    "another activation than GELU in its tanh form (gelu_new)",
  ),
  "scale_attn_weights": ((True,), "scores of attention without a scale"),
  "scale_attn_by_inverse_layer_idx": ((False,), "scales of scores by layer"),
  "add_cross_attention": ((False,), "attention to another text"),
}
# The fields of config.model that all its models have.
FIELDS = {
  "positions": "learned",
  "norm": "layer",
  "biases": True,
  "mlp": "gelu",
  "qk_norm": False,
  "kv_heads": 0,
  "head_size": 0,
}


def fields(tree: dict[str, Any], architecture: str) -> dict[str, Any]:
  """Return the fields of config.model that a config.json means.

  Args:
    tree: its JSON value, with the types of TYPES.
    architecture: a key of MODEL_TYPES.
  """
  del architecture
  D = tree["n_embd"]
  return FIELDS | {
    "D": D,
    "L": tree["n_layer"],
    "N": tree["n_head"],
    "mlp_width": tree.get("n_inner") or 4 * D,
    "norm_epsilon": float(tree.get("layer_norm_epsilon") or 1e-5),
    "tied": tree.get("tie_word_embeddings") is not False,
  }


def architecture(model: config_lib.Model) -> str:
  """Return the architecture that a model with FIELDS is written as."""
  del model
  (name,) = MODEL_TYPES
  return name


def written(model: config_lib.Model) -> dict[str, Any]:
  """Return what config.json says about the backbone of a model.

  Args:
    model: the model's section of the config, with FIELDS.
  """
  return {
    "n_embd": model.D,
    "n_layer": model.L,
    "n_head": model.N,
    "n_inner": model.F,
    "n_positions": model.T,
    "n_ctx": model.T,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": model.norm_epsilon,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
  }
