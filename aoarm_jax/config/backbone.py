"""Rules for the fields of config.model that give the backbone its form."""

from typing import Any

from aoarm_jax.config import schema as config_lib

# Fields that scale the rotary frequencies.
SCALING = (
  "rope_scaling",
  "rope_factor",
  "rope_original_T",
  "rope_slow_turns",
  "rope_fast_turns",
)


def has_default(model: config_lib.Model, name: str) -> bool:
  """Return whether a field of a model has its default."""
  return getattr(model, name) == getattr(config_lib.Model(), name)


def rules(config: config_lib.Config) -> list[tuple[str, Any, str]]:
  """Return the rules for heads and for the scaling of rotary frequencies.

  Args:
    config: the config to check.

  Returns:
    For each rule the path of a field, whether the rule holds, and the fix.
  """
  m = config.model
  return [
    (
      "model.N",
      m.head_size or (m.D % m.N == 0 and (m.D // m.N) % 2 == 0),
      f"must divide config.model.D={m.D} into heads of even width (rotary "
      "pairs); or set config.model.head_size",
    ),
    (
      "model.head_size",
      m.head_size % 2 == 0,
      "must be even (rotary pairs), or 0 for config.model.D / config.model.N",
    ),
    (
      "model.kv_heads",
      not m.kv_heads or m.N % m.kv_heads == 0,
      f"must divide the config.model.N={m.N} attention heads, or be 0 for as "
      "many",
    ),
    *(
      (
        "compute.rowwise",
        has_default(m, name) or config.compute.rowwise != "mosaic_gpu",
        f"has no kernel for {what} (config.model.{name}={getattr(m, name)}); "
        "take auto, which uses the kernels for all other rows",
      )
      for name, what in (
        ("qk_norm", "heads without a norm"),
        ("norm", "LayerNorm"),
        ("biases", "products with biases"),
      )
    ),
    *_of_scaling(m),
  ]


def _of_scaling(model):
  """Return the rules for the fields that scale rotary frequencies."""
  if model.rope_scaling == "none":
    return [
      (
        f"model.{name}",
        has_default(model, name),
        "has no effect with config.model.rope_scaling=none; leave it out, or "
        "take llama3 or yarn",
      )
      for name in SCALING
    ]
  return [
    (
      "model.rope_original_T",
      model.rope_original_T > 0,
      f"config.model.rope_scaling={model.rope_scaling} needs the number of "
      "positions that the frequencies were made for, such as 8192",
    ),
    (
      "model.rope_slow_turns",
      model.rope_slow_turns < model.fast_turns,
      f"must be below the {model.fast_turns:g} of config.model.rope_fast_turns",
    ),
    (
      "model.rope_base",
      model.rope_base > 1,
      "must be above 1 where frequencies are scaled",
    ),
  ]
