"""Decoupled RoPE: one stream whose query leads and whose key lags.

  python -m aoarm_jax.main --config=configs/decoupled_rope.py

Hardware, time, validation result (any order; docs/results has the runs):
  default  one H200, 2,000 steps in 80 s: 2.128 bits/char (books27, 2 seeds)
  :long    one H200, 2,000 steps in 95 s: 2.110 bits/char (books27, 2 seeds)
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :tiny    for a CPU; not run yet on the built-in novels
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope", variant, model={"mechanism": "decoupled_rope"}
  )
