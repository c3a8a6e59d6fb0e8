"""The sweep of a study, and its measurements."""

import dataclasses

from aoarm_jax.config import mechanisms
from aoarm_jax.config.sections import fields


@dataclasses.dataclass(frozen=True)
class Study:
  """A sweep over many runs and its measurements (aoarm_jax/study)."""

  sweep: str = fields.field(
    "",
    "the cells of the sweep, as products of values, such as "
    "mechanism=two_stream,mdlm T=128,1024 seed=0,1; a newline or ';' separates "
    "products; aoarm_jax/study/cells.py explains the keys and the order",
  )
  reference: str = fields.field(
    "two_stream",
    "mechanism that budgets are matched to and differences are taken from",
    choices=tuple(mechanisms.MECHANISMS),
  )
  tokens_per_step: int = fields.field(
    65536, "number of tokens per step, at every T", low=1
  )
  rates: tuple[float, ...] = fields.field(
    (1e-3, 2e-3, 4e-3, 8e-3),
    "peak learning rates that are tried for rate=tuned",
    of=float,
  )
  tune_lengths: tuple[int, ...] = fields.field(
    (128, 1024),
    "lengths T at which learning rates are tried; () tries them at each length",
    of=int,
  )
  tune_seeds: tuple[int, ...] = fields.field(
    (101, 102),
    "the two seeds on which rate=search tries learning rates; no other run "
    "uses them",
    of=int,
  )
  tune_steps: int = fields.field(
    4000,
    "rate=search only: number of steps of the reference mechanism in a trial",
    low=1,
  )
  check_T: int = fields.field(
    1024,
    "length T at which rate=checked tries another learning rate",
    low=1,
  )
  decay_share: float = fields.field(
    0.0,
    "share of a run's steps in which the learning rate decays linearly to "
    "zero; before, the rate is constant, and runs that differ in their number "
    "of steps only share this trunk; 0 uses the optimizer's own schedule",
    low=0.0,
    below=1.0,
  )
  keep_weights: bool = fields.field(
    False, "also write the last parameters of every run, in bfloat16"
  )
  temperature_low: float = fields.field(
    0.1, "lowest temperature of generation", above=0.0
  )
  temperature_high: float = fields.field(
    2.0, "highest temperature of generation", above=0.0
  )
  temperatures: int = fields.field(
    30, "number of evenly spaced temperatures", low=2
  )
  characters: int = fields.field(
    16384,
    "number of characters generated at each temperature; 0 generates nothing",
    low=0,
  )
  vocabulary_split: str = fields.field(
    "valid",
    "split whose words and n-grams the generated text is compared with",
    choices=("train", "valid", "test"),
  )
  ngram: int = fields.field(
    6, "number of characters of an n-gram", low=1, high=8
  )
  profile_sequences: int = fields.field(
    32,
    "number of windows whose attention is profiled; 0 profiles nothing",
    low=0,
  )
  bootstrap: int = fields.field(
    1000, "number of resamplings for an error band", low=2
  )
  cells: str = fields.field(
    "",
    "run selected cells only: those whose label has all words of one of these "
    "comma-separated groups, such as 'mdlm,decoupled_rope T=128 seed=1'",
  )
  share_index: int = fields.field(
    0, "index of the share of the cells that runs here", low=0
  )
  share_count: int = fields.field(
    1, "number of shares that the cells are divided into", low=1
  )
  limit_seconds: int = fields.field(
    0,
    "no cell starts if it would end after this time; 0 means no limit",
    low=0,
  )
  part: str = fields.field(
    "all",
    "part of the work to do: cells runs missing cells, report writes the "
    "report, all does the two in turn; measure takes measures of runs with "
    "kept weights (aoarm_jax/study/dissection.py) and writes the report; "
    "export writes these runs as models into WORKDIR/exports",
    choices=("all", "cells", "report", "measure", "export"),
  )
  measure_windows: int = fields.field(
    64, "part=measure only: number of windows that are measured", low=2
  )
  knockouts: str = fields.field(
    "",
    "part=measure only: slots that attention is barred from in all layers, as "
    "in 'own last:8'; 'none' bars none, '' takes the list of "
    "aoarm_jax/study/knockouts.py, which explains the words",
  )
  layer_knockouts: str = fields.field(
    "",
    "part=measure only: slots that attention is barred from in one layer "
    "alone, written like study.knockouts",
  )
  report: str = fields.field(
    "", "folder of the report; '' means report/ in the workdir"
  )
  also: str = fields.field(
    "",
    "further directories of studies, separated by commas, whose cells the "
    "report shows as well",
  )
