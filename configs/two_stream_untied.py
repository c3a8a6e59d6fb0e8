"""Ablation: two streams, and each stream has its own weights.

The content stream has its own queries, keys, values, outputs and MLPs. The
query stream has its own queries, outputs and MLPs. A step costs as much as with
two_stream.

  python -m aoarm_jax.main --config=configs/two_stream_untied.py

Hardware, time, validation result: not run yet.
  :bpe     16.5M parameters, 2.1M of them in embedding and head
  :124m    194.4M parameters, 38.6M of them in the embedding; needs a
           large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "two_stream_untied", variant, model={"mechanism": "two_stream_untied"}
  )
