"""sigma-GPT: one stream, both positions added to the input (arXiv 2404.09562).

  python -m aoarm_jax.main --config=configs/sigma_gpt.py

Hardware, time, validation result (books27):
  default  one H100, 2,000 steps: 2.255 bits/char (2 seeds)
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     not run yet; 10.0M parameters, 2.1M of them in embedding and head
  :124m    not run yet; 124.3M parameters, 38.6M of them in the embedding; needs
           a large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "sigma_gpt", variant, model={"mechanism": "sigma_gpt"}
  )
