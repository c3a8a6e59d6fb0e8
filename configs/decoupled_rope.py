"""Decoupled RoPE: queries turn by the target, and keys by their own position.

  python -m aoarm_jax.main --config=configs/decoupled_rope.py

Hardware, time, validation result (any order; docs/results has the runs):
  default  one H200, 2,000 steps in 80 s: 2.128 bits/char (books27, 2 seeds)
  :long    one H200, 2,000 steps in 95 s: 2.110 bits/char (books27, 2 seeds)
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     10.0M parameters, 2.1M of them in embedding and head;
           one H200, 8,000 steps: 1.583 bits/byte (books as written, 1 seed)
  :124m    never trained; 123.6M parameters, 38.6M of them in the embedding;
           needs a large text, as in --config.data.path=prepared/texts
  :qwen3-0.6b  never trained; one H200: 179 ms a step of 16,384 tokens; 596M
           parameters, 156M of them of symbols
  :qwen3-1.7b, :qwen3-8b  not run yet; 1,721M and 8,191M parameters, 311M and
           1,245M of them of symbols
  :tiny    for a CPU; not run yet on the built-in novels
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "decoupled_rope", variant, model={"mechanism": "decoupled_rope"}
  )
