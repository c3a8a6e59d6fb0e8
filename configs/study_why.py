"""Why does the second stream help? Arms that each change one choice.

  python -m aoarm_jax.main --mode=study --config=configs/study_why.py --config.data.path=books27

Declared before any run. The hypothesis of arXiv 2602.16092: one hidden state has
two tasks. It attends to tokens near its target in position, to predict the
target, and to tokens near it in the order, to summarise the context. The two
compete in one stream, and two streams split them. Two rival explanations are
capacity (a second row per token is more computation) and position (one stream
does not know where its own content stands).

Runs: T = 128, 2,000 steps of 65,536 characters (131 million), books27, uniform
orders, seeds 11, 12 and 13. An arm runs at equal steps and at the steps that
have the FLOPs of 2,000 steps of two_stream. The recipe is that of
configs/study_budget.py. Rates are given by family: 0.004 for two streams, and
0.0028 for one stream, the best of its trials at T = 128 (seed 101, 262 million
characters).

Let gap be the bits of decoupled_rope minus those of two_stream. At equal steps
the hypothesis of the paper predicts:

  arm                                 prediction
  two_stream content_sees=self        worse than two_stream by more than 0.01
                                      bits: its content rows cannot summarise
  two_stream content_sees=last:8      equal to two_stream: it keeps the tokens
                                      that are near in the order
  two_stream content_sees=nearest:8   worse than last:8 by more than 0.01
  two_stream content_sees=random:8    worse than last:8 by more than 0.01
  two_stream_untied                   equal to two_stream or better: the split of
                                      tasks is there already
  register                            worse than two_stream by more than 0.01:
                                      both of its rows have both tasks
  decoupled_rope L=18, D=344          worse than two_stream by more than 0.01,
                                      at its FLOPs a step within 3%; L=18 is
                                      better than D=344, since layers can share
                                      out the two tasks
  decoupled_rope N=8                  a smaller gap to two_stream N=8 than at
                                      N=4: heads can share out the two tasks
  decoupled_rope_added                equal to decoupled_rope: position is not
                                      what one stream lacks

Capacity predicts instead that register, L=18 and D=344 are equal to two_stream
or better, and that self loses little. Position predicts that
decoupled_rope_added closes the gap. If self is equal to two_stream, summarising
is not what content rows are for, and the hypothesis is refuted at this size.

Two arms are equal if the whole 95% interval of their difference, paired by seed
and window, lies within 0.01 bits. An arm is worse or better if the whole
interval lies on one side of 0 and the difference exceeds 0.01 bits. There are
12 arms beside the reference at two budgets, 24 differences, and no correction
for their number. Everything that the table does not predict is exploratory.

The sceptic's control (:rates): each arm at half and at double its rate, at equal
steps on seed 101. If another rate is better by more than 0.005 bits, the arm
runs again at this rate, and its outcome is taken from these runs.

Parameters: two_stream, decoupled_rope and register have 7.9 million,
two_stream_untied, L=18 and D=344 have 14.2 to 14.4 million. So if untied is
better than two_stream, this shows no use of the split beyond the parameters;
and L=18 and D=344 are compared at equal FLOPs, with more parameters.

Attention: query rows and one-stream arms use the kernels. The content rows of a
mask use dense attention by XLA. A step of register costs 1.18 times as much as
a step of two_stream at T = 128, and 1.40 times at T = 1,024.

Variants, each a sweep of its own; a cell is chosen by words of its label, as in
--config.study.cells="two_stream content_sees=self T=128 seed=11":
  default  the runs above, seed by seed; in pieces by
           --config.study.limit_seconds=500, with the same command again
  :rates   the sceptic's control
  :long    the runs at T = 1,024, at rates 0.004 and 0.0056; exploratory
  :tiny    2 CPU cores, built-in text: every arm of a tiny model, a smoke test
"""  # noqa: E501

from aoarm_jax.config import experiments

_TWO, _ONE = "mechanism=two_stream", "mechanism=decoupled_rope"


def _arms(two, one, looks, sizes, heads, shared):
  """Return the lines of all arms, the most telling first.

  Args:
    two: the words of arms with two streams, such as "rate=0.004".
    one: the words of arms with one stream.
    looks: values of model.content_sees.
    sizes: changes that make one stream as costly as two streams.
    heads: a change of the number of heads.
    shared: the words of all arms. The budgets are in ascending order of steps
      for arms that cost no more than two_stream.
  """
  # The runs of a trunk ascend, and these arms take fewer steps at equal FLOPs.
  costly = shared.replace("steps,flops", "flops,steps")
  masks = ",".join(f"model.content_sees:{look}" for look in looks)
  return "\n".join(
    (
      f"{_TWO} {two} {shared}",
      f"{_ONE} {one} {shared}",
      f"{_TWO} {two} with={masks} {shared}",
      f"mechanism=register {one} {costly}",
      f"mechanism=decoupled_rope_added {one} {shared}",
      f"{_ONE} {one} with={','.join(sizes)} {costly}",
      f"mechanism=two_stream_untied {two} {shared}",
      f"{_ONE} {one} with={heads} {shared}",
      f"{_TWO} {two} with={heads} {shared}",
    )
  )


_LOOKS = ("self", "last:8", "nearest:8", "random:8")
_SIZES = ("model.L:18", "model.D:344")


def _at(T, two, one, seeds=(11, 12, 13), budgets="steps,flops"):
  """Return the sweep of all arms at full size, seed by seed."""
  return "\n".join(
    _arms(
      two,
      one,
      _LOOKS,
      _SIZES,
      "model.N:8",
      f"T={T} steps=2000 seed={seed} budget={budgets}",
    )
    for seed in seeds
  )


_RUNS = {
  "optimizer.ema_decay": 0.999,
  "optimizer.peak_learning_rate": 4e-3,
  "checkpoint.every": 2000,
  "study.sweep": _at(128, "rate=0.004", "rate=0.0028"),
  "study.decay_share": 0.2,
  "study.characters": 0,
  "study.profile_sequences": 0,
  "study.keep_weights": True,
}
_VARIANTS = {
  "default": _RUNS,
  "rates": _RUNS
  | {
    "study.sweep": _at(
      128,
      "rate=0.004,0.002,0.008",
      "rate=0.0028,0.0014,0.0056",
      seeds=(101,),
      budgets="steps",
    )
  },
  "long": _RUNS | {"study.sweep": _at(1024, "rate=0.004", "rate=0.0056")},
  "tiny": _RUNS
  | {
    "model.D": 32,
    "model.L": 2,
    "model.N": 2,
    "optimizer.warmup_steps": 4,
    "optimizer.peak_learning_rate": 1e-2,
    "optimizer.ema_decay": 0.9,
    "checkpoint.every": 10,
    "eval.batches": 2,
    "compute.dtype": "float32",
    "compute.scan_layers": True,
    "study.sweep": _arms(
      "",
      "",
      ("self", "last:2", "nearest:2", "random:2"),
      ("model.L:4", "model.D:44"),
      "model.N:4",
      "T=16 steps=20 budget=steps,flops",
    ),
    "study.tokens_per_step": 512,
    "study.bootstrap": 50,
  },
}


def get_config(variant: str = "default"):
  return experiments.experiment("study_why", variant, _VARIANTS)
