"""The budget curve: does a second stream pay, and from which budget on?

  python -m aoarm_jax.main --mode=study --config=configs/study_budget.py --config.data.path=books27

Declared before the primary runs. The primary question: at equal training FLOPs,
how does the difference in bits per character between decoupled_rope and
two_stream depend on the budget and on the length T?

Budgets are 1,000, 4,000 and 16,000 steps of two_stream, 65,536 characters each:
66 million, 262 million and 1.05 billion characters. decoupled_rope takes as
many steps as give the same FLOPs, and runs of equal steps as well. Lengths are
128 and 1,024; orders are uniform; seeds are 11, 12 and 13, which were used for
nothing before.

Outcomes. For each length and budget: the difference at equal FLOPs, paired by
seed and window, with a 95% interval by Student's law over seeds and stretches
of the text; and the delay, the ratio of steps to equal loss, against the ratio
of the FLOPs of a step. The longest run of decoupled_rope has the FLOPs of the
longest run of two_stream, so at the largest budget a delay above the cost ratio
is a bound, and the difference decides. For each length one contrast answers
how the difference depends on the budget: the difference at 1.05 billion
characters minus the difference at 66 million, paired by seed. Two arms are
called equal if the whole interval lies within 0.01 bits. There are six
differences, six delays and two contrasts, and no correction for their number;
all other numbers are exploratory.

Bits are those of the last parameters, any order, on the same 1,536 windows of
the validation split (12,288 at T = 128) and the same orders for all runs; the
trials of rates read these windows too. Bits of the average (EMA 0.999), left to
right, and of the last 2% of training are reported beside them.

A run is a trunk at a constant rate after its warmup, and a linear decay to zero
over the last 20% of its steps. Runs of one arm, length, seed and rate share the
trunk. The rule for the rate, see aoarm_jax/study/rates.py: it is searched at 262
million characters for each arm and length by factors of 2 on seed 101, from
0.004 for two_stream and from 0.0014 for decoupled_rope on, until the best rate
lies inside; the two best also run on seed 102; the lowest mean wins. Then half
of the rate is tried at 1.05 billion characters, and twice the rate at 66
million, both at T = 1,024 on seed 101. If that is better by more than 0.005 bits
there, the arm's runs at equal FLOPs of that budget, at both lengths, use it.

The sceptic's control is exploratory (seeds 21 and 22, T = 128, 5,000 steps of
two_stream, 0.33 billion characters): does another recipe give decoupled_rope
the gain that two_stream has from its rate? It was planned when the best rate of
decoupled_rope was thought to lie below 0.002; the trials at T = 1,024 have since
found 0.0056 on one seed.

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
  """Both arms at the searched rate, all budgets; a trunk's runs ascend."""
  shared = f"T={T} seed={seeds}"
  return (
    f"{_TWO} budget=flops {shared} rate=search:0.004 {_STEPS}",
    f"{_ONE} {shared} rate=search:0.0014 {_STEPS} budget=steps,flops",
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
