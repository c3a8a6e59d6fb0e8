"""Two streams that generate groups of tokens together (A3, arXiv 2601.13228).

A group holds 16 tokens in the mean. A content row sees to the end of its group,
and a query row to its start. The estimator `training_order` is the likelihood
with groups, and `any_order` that of one token after the other. Texts are drawn
and scored in groups of 16.

  python -m aoarm_jax.main --config=configs/any_subset.py

Hardware, time, validation result (books27, one seed):
  default  one H100, 2,000 steps: 2.070 bits/char
  :base    not run yet; needs text8, --config.data.path=text8.zip
  :bpe     not run yet; 10.0M parameters, 2.1M of them in embedding and head
  :124m    not run yet; 123.6M parameters, 38.6M of them in the embedding; needs
           a large text, as in --config.data.path=prepared/texts
  :tiny    for a CPU
"""

from aoarm_jax.config import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "any_subset",
    variant,
    model={"mechanism": "two_stream"},
    orders={"groups": "random", "group_width": 16},
    eval={"estimators": ("any_order", "training_order")},
    # A width of 0 is that of the groups in training.
    sample={"method": "parallel", "width": 0},
    score={"width": 0},
  )
