"""AO-GPT: one stream, the target conditions every layer (arXiv 2506.19935).

  python -m aoarm_jax.main --config=configs/ao_gpt.py

Starts as published: the target's embedding is small, all gates are nearly
closed, and for about 2,000 steps the model learns little more than the unigram
law (docs/results). `--config.model.condition_scale=1` or
`--config.orders.family=curriculum` shorten that.

Hardware, time, validation result (any order, books27, one seed):
  default  one H100, 2,000 steps: 4.020 bits/char; condition_scale=1: 2.370
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     not run yet; 12.1M parameters, 2.1M of them in embedding and head
  :124m    never trained; 131.8M parameters, 38.6M of them in the embedding;
           needs a large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "ao_gpt", variant, model={"mechanism": "ao_gpt"}
  )
