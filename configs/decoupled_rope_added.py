"""Ablation: decoupled_rope whose input carries its content's position.

A learned vector of the position of the content is added to the input. The query
still turns by the position of the target alone, and the key by that of the
content, so no rotary pair is taken from the target.

  python -m aoarm_jax.main --config=configs/decoupled_rope_added.py

Hardware, time, validation result: not run yet.
  :bpe     10.0M parameters, 2.1M of them in embedding and head
  :124m    124.3M parameters, 38.6M of them in the embedding; needs a
           large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope_added", variant, model={"mechanism": "decoupled_rope_added"}
  )
