"""Ablation: decoupled_rope with the conditioning of ao_gpt.

  python -m aoarm_jax.main --config=configs/decoupled_rope_adaln.py

Hardware, time, validation result (books27, one seed):
  default  one H100, 2,000 steps: 2.129 bits/char
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_adaln", variant, model={"mechanism": "decoupled_rope_adaln"}
  )
