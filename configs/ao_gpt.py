"""AO-GPT: one stream, the target conditions every layer (arXiv 2506.19935).

  python -m aoarm_jax.main --config=configs/ao_gpt.py

Hardware, time, validation result: not measured yet. `:base` needs text8,
--config.data.path=text8.zip; `:tiny` is for a CPU.
"""

from aoarm_jax import experiments


def get_config(variant: str = "default"):
  return experiments.experiment(
    "ao_gpt", variant, model={"mechanism": "ao_gpt"}
  )
