"""Ablation: decoupled_rope whose query turns by its content position too.

  python -m aoarm_jax.main --config=configs/decoupled_rope_content.py

Hardware, time, validation result (books27, one seed):
  default  one H100, 2,000 steps: 2.125 bits/char
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     not run yet; 10.0M parameters, 2.1M of them in embedding and head
  :124m    not run yet; 123.6M parameters, 38.6M of them in the embedding; needs
           a large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_content",
    variant,
    model={"mechanism": "decoupled_rope_content"},
  )
