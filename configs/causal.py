"""The autoregressive baseline: plain RoPE, left to right only.

  python -m aoarm_jax.main --config=configs/causal.py

Hardware, time, validation result (left to right: never compare it with an
any-order number; docs/results has the run):
  default  one H200, 2,000 steps in 85 s: 1.608 bits/char (books27, 1 seed)
  :long    not run yet
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     10.0M parameters, 2.1M of them in embedding and head;
           one H200, 8,000 steps: 1.405 bits/byte (books as written, 1 seed)
  :124m    not run yet; 123.6M parameters, 38.6M of them in the embedding; needs
           a large text, as in --config.data.path=prepared/texts
  :qwen3-0.6b, :qwen3-1.7b, :qwen3-8b  not run yet; 596M, 1,721M and 8,191M
           parameters, 156M, 311M and 1,245M of them of symbols
  :tiny    for a CPU; not run yet on the built-in novels
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "causal",
    variant,
    model={"mechanism": "causal"},
    orders={"family": "left_to_right"},
    sample={"order": "left_to_right"},
    eval={"estimators": ("left_to_right",)},
  )
