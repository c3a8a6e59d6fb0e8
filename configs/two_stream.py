"""Two-stream attention: content rows and query rows over the same keys.

  python -m aoarm_jax.main --config=configs/two_stream.py

Hardware, time, validation result (any order; docs/results has the runs):
  default  one H200, 2,000 steps in 110 s: 2.062 bits/char (books27, 2 seeds)
  :long    one H200, 2,000 steps in 125 s: 2.038 bits/char (books27, 2 seeds)
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     10.0M parameters, 2.1M of them in embedding and head;
           one H200, 8,000 steps: 1.530 bits/byte (books as written, 1 seed)
  :124m    never trained; 123.6M parameters, 38.6M of them in the embedding;
           needs a large text, as in --config.data.path=prepared/texts
  :qwen3-0.6b  never trained; one H200: 294 ms a step of 16,384 tokens; 596M
           parameters, 156M of them of symbols
  :qwen3-1.7b, :qwen3-8b  not run yet; 1,721M and 8,191M parameters, 311M and
           1,245M of them of symbols
  :tiny    2 CPU cores, 2,400 steps in about 4 minutes: 2.639 bits/char (the
           built-in novels, whose unigram entropy is 4.041; 1 seed)
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "two_stream", variant, model={"mechanism": "two_stream"}
  )
