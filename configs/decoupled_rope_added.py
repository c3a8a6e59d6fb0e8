"""Ablation: decoupled_rope whose input carries its content's position.

A learned vector of the position of the content is added to the input. The query
still turns by the position of the target alone, and the key by that of the
content, so no rotary pair is taken from the target.

  python -m aoarm_jax.main --config=configs/decoupled_rope_added.py

Hardware, time, validation result: not run yet.
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_added", variant, model={"mechanism": "decoupled_rope_added"}
  )
