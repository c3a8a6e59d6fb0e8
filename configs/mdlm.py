"""Masked diffusion: all rows see all rows, some are MASK (arXiv 2406.07524).

Training minimises the negative ELBO. Sampling keeps no cache. The method
`sequential` (exact) takes one full pass for each token, and the methods
`ancestral` and `confidence` (not exact) take one for each step.

  python -m aoarm_jax.main --config=configs/mdlm.py

Hardware, time, validation result (books27, one seed):
  default  one H100, 2,000 steps: 2.149 bits/char (ELBO), 2.148 (any order)
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     10.0M parameters, 2.1M of them in embedding and head;
           one H200, 8,000 steps: 1.591 bits/byte (ELBO; books as written)
  :124m    not run yet; 123.6M parameters, 38.6M of them in the embedding; needs
           a large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "mdlm", variant, model={"mechanism": "mdlm"}, eval={"estimators": ("elbo",)}
  )
