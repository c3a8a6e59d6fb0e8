"""Ablation: decoupled_rope with the conditioning of ao_gpt.

  python -m aoarm_jax.main --config=configs/decoupled_rope_adaln.py

Hardware, time, validation result: not measured yet. `:base` needs text8,
--config.data.path=text8.zip; `:tiny` is for a CPU.
"""

from aoarm_jax import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_adaln", variant, model={"mechanism": "decoupled_rope_adaln"}
  )
