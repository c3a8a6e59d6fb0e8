"""Ablation: decoupled_rope with two rows per slot, which share all tasks.

Both rows of a slot are rows of decoupled_rope: they have the same content,
positions and mask, both are keys, and the mean of the two makes the prediction.
A learned vector is added to the input of the second row. So this arm has the
rows of two streams, and nothing divides the tasks between them.

  python -m aoarm_jax.main --config=configs/register.py

Hardware, time, validation result: not run yet.
  :bpe     10.0M parameters, 2.1M of them in embedding and head
  :124m    123.6M parameters, 38.6M of them in the embedding; needs a
           large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "register", variant, model={"mechanism": "register"}
  )
