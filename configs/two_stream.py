"""Two-stream attention: content rows and query rows over the same keys.

  python -m aoarm_jax.main --config=configs/two_stream.py

Hardware, time, validation result (any order; docs/results has the runs):
  default  one H200, 2,000 steps in 110 s: 2.062 bits/char (books27, 2 seeds)
  :long    one H200, 2,000 steps in 125 s: 2.038 bits/char (books27, 2 seeds)
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :tiny    2 CPU cores, 800 steps in 2 minutes: 2.92 bits/char (built-in text: a
           smoke test, not a benchmark; its unigram entropy is 4.12)
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "two_stream", variant, model={"mechanism": "two_stream"}
  )
