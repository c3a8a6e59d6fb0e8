"""The budget curve: does a second stream pay, and from which budget on?

  python -m aoarm_jax.main --mode=study --config=configs/study_budget.py --config.data.path=books27

Declared before the runs. The primary question: at equal training FLOPs, how
does the difference in bits per character between decoupled_rope and two_stream
depend on the budget and on the length T? The primary outcome is the delay, the
ratio of steps to equal loss, against the FLOP ratio of a step.

Budgets are 1,000, 4,000 and 16,000 steps of two_stream, 65,536 characters each:
66 million, 262 million and 1.05 billion characters. decoupled_rope takes as
many steps as give the same FLOPs. Lengths are 128 and 1,024; orders are
uniform; seeds are 11, 12 and 13, which were used for nothing before. Bits are
those of the last parameters, any order, on the same 1,536 windows (12,288 at
T = 128) and the same orders for all runs; those of the average (EMA 0.999) are
reported beside them. Differences within 0.01 bits count as equal.

A run is a trunk at a constant rate after its warmup, and a linear decay to zero
over the last 20% of its steps. Its runs at all three budgets share the trunk,
so an arm has one rate at all budgets. The rule for it, see
aoarm_jax/study/rates.py: it is searched at 262 million characters for each arm
and length by factors of 2 on seed 101, from 0.004 for two_stream and from
0.0014 for decoupled_rope on; the two best also run on seed 102; the lowest mean
wins. Then half of the rate is tried at 1.05 billion characters, and twice the
rate at 66 million, both at T = 1,024 on seed 101. If that is better by more
than 0.005 bits there, all runs of that arm and budget, at both lengths, use it.

The sceptic's control is exploratory (seeds 21 and 22, T = 128, 5,000 steps of
two_stream, 0.33 billion characters): does another recipe give decoupled_rope
the gain that two_stream has from its higher rate?

Variants, each a sweep of its own:
  default  the primary runs; a few hours of one H200, in pieces by
           --config.study.limit_seconds=500, with the same command again
  :control the sceptic's control
  :tiny    2 CPU cores, built-in text: two budgets of a tiny trunk, a smoke test
"""  # noqa: E501

from aoarm_jax.config import experiments

_TWO, _ONE = "mechanism=two_stream", "mechanism=decoupled_rope"
_STEPS = "steps=1000,4000,16000"


def _primary(T, seeds):
  """Both arms at the searched rate, all budgets."""
  shared = f"budget=flops T={T} seed={seeds}"
  return (
    f"{_TWO} {shared} rate=search:0.004 {_STEPS}",
    f"{_ONE} {shared} rate=search:0.0014 {_STEPS}",
    # Below the least budget at equal FLOPs, for the delay and for equal steps.
    f"{_ONE} T={T} seed={seeds} rate=search:0.0014 steps=1000 budget=steps",
  )


def _checked():
  """The primary runs as the checks of the rate want them."""
  shared = "budget=flops T=1024,128 seed=11,12,13"
  return (
    f"{_TWO} {shared} rate=checked:0.004*2 steps=1000",
    f"{_ONE} {shared} rate=checked:0.0014*2 steps=1000",
    f"{_TWO} {shared} rate=checked:0.004*0.5 steps=16000",
    f"{_ONE} {shared} rate=checked:0.0014*0.5 steps=16000",
  )


def _control():
  """decoupled_rope by other recipes, two_stream by its own."""
  shared = "budget=flops T=128 steps=5000 seed=21,22"
  recipes = (
    "optimizer.warmup_steps:2000",
    "optimizer.b2:0.95",
    "optimizer.b2:0.999",
    "optimizer.clip_norm:0.3",
    "train.batch_size:2048",
  )
  return (
    f"{_TWO} {shared} rate=search:0.004",
    f"{_ONE} {shared} rate=search:0.0014",
    f"{_ONE} {shared} rate=0.004",
    *(f"{_ONE} {shared} rate=0.004 with={recipe}" for recipe in recipes),
  )


_SWEEP = "\n".join(
  (
    *_primary(1024, "11"),
    *_primary(128, "11"),
    *_primary(1024, "12,13"),
    *_primary(128, "12,13"),
    *_checked(),
  )
)
_TINY = "mechanism=two_stream,decoupled_rope budget=flops T=16 steps=40,80"

_CURVE = {
  "optimizer.ema_decay": 0.999,
  "checkpoint.every": 2000,
  "study.sweep": _SWEEP,
  "study.decay_share": 0.2,
  "study.characters": 0,
  "study.profile_sequences": 0,
  "study.keep_weights": True,
}
_VARIANTS = {
  "default": _CURVE,
  "control": _CURVE | {"study.sweep": "\n".join(_control())},
  "tiny": _CURVE
  | {
    "model.D": 32,
    "model.L": 2,
    "model.N": 2,
    "optimizer.warmup_steps": 10,
    "optimizer.peak_learning_rate": 1e-2,
    "optimizer.ema_decay": 0.9,
    "checkpoint.every": 10,
    "eval.batches": 2,
    "compute.dtype": "float32",
    "study.sweep": _TINY,
    "study.tokens_per_step": 1024,
    "study.bootstrap": 50,
  },
}


def get_config(variant: str = "default"):
  return experiments.experiment("study_budget", variant, _VARIANTS)
