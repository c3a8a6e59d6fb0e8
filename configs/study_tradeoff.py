"""The study: is there a structural-semantic tradeoff, and do two streams escape?

  python -m aoarm_jax.main --mode=study --config=configs/study_tradeoff.py --config.data.path=books27

Variants, each a sweep of its own (aoarm_jax/study/cells.py says how to read it);
hardware, time:
  default  66M characters a cell; about 3 hours of one H200 in all (estimated);
           in shares, by --config.study.limit_seconds=500 and started again
  :quick   the most telling cells, short; about 8 minutes of one H200 (estimated)
  :repeat  the main comparison on another, smaller text, such as a prefix of text8, at the
           rates that were chosen on books27; 26M characters a cell
  :tiny    2 CPU cores, built-in text: a smoke test of the machinery, its numbers
           say nothing
"""  # noqa: E501

from aoarm_jax.config import experiments

_MAIN = "mechanism=two_stream,decoupled_rope,mdlm,ao_gpt"
# The most telling first: the missing arm at both lengths and at equal FLOPs.
_SWEEP = f"""
T=128,1024 budget=steps,flops mechanism=two_stream,decoupled_rope rate=tuned
T=128,1024 mechanism=mdlm,ao_gpt,causal rate=tuned
T=128,1024 budget=flops mechanism=mdlm,ao_gpt rate=tuned
seed=1,2 T=128,1024 budget=steps,flops {_MAIN} rate=tuned
seed=0,1,2 orders=block1,block16 T=1024 budget=steps,flops mechanism=two_stream,decoupled_rope rate=tuned
orders=block128 T=1024 budget=steps,flops mechanism=two_stream,decoupled_rope rate=tuned
T=256,512,2048,4096 budget=steps,flops mechanism=two_stream,decoupled_rope rate=tuned
seed=1,2 T=2048,4096 budget=steps,flops mechanism=two_stream,decoupled_rope rate=tuned
seed=0,1,2 T=128,1024 budget=parameters {_MAIN} rate=tuned
seed=0,1,2 T=128,1024 mechanism=decoupled_rope_content rate=tuned
T=128,1024 orders=curriculum mechanism=ao_gpt rate=tuned
seed=1,2 T=128,1024 mechanism=causal rate=tuned
T=128,1024 size=512x10x8 budget=steps,flops mechanism=two_stream,decoupled_rope rate=tuned
T=256,512 {_MAIN} rate=tuned
T=2048,4096 mechanism=mdlm,ao_gpt rate=0.002
"""  # noqa: E501
_QUICK = """
T=128,1024 mechanism=two_stream,decoupled_rope
budget=flops,parameters T=128,1024 mechanism=decoupled_rope
T=128,1024 mechanism=mdlm,ao_gpt
seed=1 T=128,1024 budget=steps,flops,parameters mechanism=two_stream,decoupled_rope
"""  # noqa: E501
_REPEAT = """
T=128,1024 budget=steps,flops mechanism=two_stream rate=0.004 seed=0,1,2
T=128,1024 budget=steps,flops mechanism=decoupled_rope rate=0.002 seed=0,1,2
T=128,1024 budget=steps,flops mechanism=mdlm rate=0.002 seed=0,1,2
T=128 mechanism=causal rate=0.002 seed=0,1,2
T=1024 mechanism=causal rate=0.004 seed=0,1,2
"""
_TINY = """
mechanism=two_stream,mdlm,decoupled_rope T=16
budget=flops mechanism=decoupled_rope T=16
"""

_VARIANTS = {
  "default": {
    "study.sweep": _SWEEP,
    "study.tune_lengths": (128, 1024, 2048, 4096),
    "study.tokens_per_step": 32768,
    "study.characters": 8192,
  },
  "quick": {
    "train.steps": 600,
    "optimizer.warmup_steps": 100,
    "study.sweep": _QUICK,
    "study.characters": 4096,
  },
  "repeat": {
    "train.steps": 800,
    "study.sweep": _REPEAT,
    "study.tokens_per_step": 32768,
    "study.characters": 8192,
  },
  "tiny": {
    "model.D": 32,
    "model.L": 2,
    "model.N": 2,
    "train.steps": 200,
    "optimizer.warmup_steps": 10,
    "optimizer.peak_learning_rate": 1e-2,
    "eval.batches": 2,
    "compute.dtype": "float32",
    "study.sweep": _TINY,
    "study.tokens_per_step": 1024,
    "study.temperatures": 4,
    "study.characters": 128,
    "study.profile_sequences": 4,
    "study.bootstrap": 50,
  },
}


def get_config(variant: str = "default"):
  return experiments.experiment(
    "study_tradeoff",
    variant,
    _VARIANTS,
    # As published, ao_gpt would stay at the letters' entropy for most of a
    # cell; at T = 1024 it does even so.
    model={"condition_scale": 1.0},
  )
