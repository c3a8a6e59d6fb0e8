"""Ablation: decoupled_rope whose query turns by its content position too.

  python -m aoarm_jax.main --config=configs/decoupled_rope_content.py

Hardware, time, validation result (books27, one seed):
  default  one H100, 2,000 steps: 2.125 bits/char
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_content",
    variant,
    model={"mechanism": "decoupled_rope_content"},
  )
