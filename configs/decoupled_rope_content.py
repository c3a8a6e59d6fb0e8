"""Ablation: decoupled_rope whose query turns by its content position too.

  python -m aoarm_jax.main --config=configs/decoupled_rope_content.py

Hardware, time, validation result: not measured yet. `:base` needs text8,
--config.data.path=text8.zip; `:tiny` is for a CPU.
"""

from aoarm_jax import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_content",
    variant,
    model={"mechanism": "decoupled_rope_content"},
  )
