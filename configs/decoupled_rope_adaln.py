"""Ablation: decoupled_rope with the conditioning of ao_gpt.

  python -m aoarm_jax.main --config=configs/decoupled_rope_adaln.py

Hardware, time, validation result (books27, one seed):
  default  one H100, 2,000 steps: 2.129 bits/char
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     not run yet; 12.0M parameters, 2.1M of them in embedding and head
  :124m    not run yet; 131.0M parameters, 38.6M of them in the embedding; needs
           a large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_adaln", variant, model={"mechanism": "decoupled_rope_adaln"}
  )
