"""Tiny sharp networks, enumerations and statistics shared by the tests."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from aoarm_jax import orders
from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import tokenizers
from aoarm_jax.model import network as network_lib

# A mechanism added to the schema is tested from then on.
MECHANISMS = next(
  field.metadata["choices"]
  for path, field, _ in config_lib.leaves(config_lib.Config())
  if path == "config.model.mechanism"
)
# Those that predict by the chain rule from a cache, and those that never do.
CHAIN = tuple(m for m in MECHANISMS if not mechanisms.MECHANISMS[m].masked)
MASKED = tuple(m for m in MECHANISMS if m not in CHAIN)
# Every such mechanism once, in turn with one and two sentinels.
ALTERNATING = tuple((m, 2 - i % 2) for i, m in enumerate(CHAIN))
# An ablation is made of pieces that another mechanism has with both.
CASES = tuple(
  case
  for case in itertools.product(CHAIN, (1, 2))
  if case in ALTERNATING
  or not mechanisms.MECHANISMS[case[0]].changes_one_thing_of
)
ANY_ORDER = tuple(
  case for case in CASES if not mechanisms.MECHANISMS[case[0]].left_to_right
)

# Backbones that differ from the default in every option.
GROUPED = dict(
  **dict(N=4, kv_heads=2, head_size=6, mlp="swiglu", tied=True),
  **dict(norm_epsilon=0.1, rope_factor=4.0, rope_original_T=16),
  rope_scaling="llama3",
  shifted=True,
)
UNNORMED = dict(
  **dict(N=6, kv_heads=2, head_size=8, qk_norm=False, rope_base=10.0),
  **dict(rope_scaling="yarn", rope_factor=4.0, rope_original_T=16),
  shifted=True,
)
LEARNED = dict(  # That of GPT-2, with fewer heads of keys.
  **dict(norm="layer", biases=True, positions="learned", qk_norm=False),
  **dict(norm_epsilon=0.1, tied=True, shifted=True, kv_heads=1),
)
BACKBONES = (
  ("two_stream", 1, GROUPED),
  ("decoupled_rope", 2, UNNORMED),
  ("two_stream", 2, LEARNED),
)


# Compiles in half the time: for what is compiled often and run a few times.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def tokenizer(V: int) -> tokenizers.Tokenizer:
  """An alphabet of V bytes."""
  return tokenizers.Tokenizer(f"first{V}", bytes(range(V)))


@functools.cache
def make(
  mechanism="two_stream",
  sentinels=1,
  *,
  T=7,
  V=5,
  D=12,
  L=2,
  N=3,
  mesh=None,
  **fields,
) -> network_lib.Network:
  """A float32 network with XLA's attention, unless `fields` say otherwise.

  They are of config.model and of config.compute.
  """
  names = {field.name for field in dataclasses.fields(config_lib.Model)}
  sizes = dict(T=T, D=D, L=L, N=N)
  sizes |= {name: fields[name] for name in names & fields.keys()}
  model = config_lib.Model(mechanism=mechanism, sentinels=sentinels, **sizes)
  compute = {name: fields[name] for name in fields.keys() - names}
  compute = dict(dtype="float32", attention="xla") | compute
  config = config_lib.Config(model=model, compute=config_lib.Compute(**compute))
  return network_lib.Network(config, mesh, tokenizer(V))


def layout(sentinels: int, V: int, T: int) -> orders.Layout:
  """The layout of a network of T positions that is not masked."""
  return orders.Layout(sentinels, V, T + 1)


def sharp(network: network_lib.Network, seed=0):
  """Parameters whose laws are far from uniform and norm scales far from 1.

  Drawn by numpy: to compile the library's own draw takes seconds.
  """
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    normal = generator.normal(size=leaf.shape).astype(np.float32)
    match path[-1].key:
      case "scale":
        return 1 + 0.3 * normal
      case "head":
        return 1.5 * normal
    return 0.5 * normal

  return jax.device_put(
    jax.tree_util.tree_map_with_path(draw, network.abstract_params)
  )


@functools.cache
def jitted(*args, **kwargs):
  """(model, sharp parameters, jitted (params, slots) -> logits)."""
  made = make(*args, **kwargs)
  return made.model, sharp(made), jax.jit(made.apply)


def tokens(B: int, T: int, V: int, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, V, (B, T), np.int32)


def all_sequences(V: int, T: int) -> np.ndarray:
  """int32 [V ** T, T]."""
  return np.array(list(itertools.product(range(V), repeat=T)), np.int32)


def all_orders(T: int) -> np.ndarray:
  """int32 [T!, T]."""
  return np.array(list(itertools.permutations(range(1, T + 1))), np.int32)


def orders_of(mechanism: str, B: int, T: int, seed=0) -> np.ndarray:
  """int32 [B, T]: random, or left to right where nothing else is defined."""
  natural = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
  if mechanisms.MECHANISMS[mechanism].left_to_right:
    return natural
  return np.random.default_rng(seed + 50).permuted(natural, axis=1)


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
  """Chi-square test of counts [n] against probabilities [n].

  The cells that expect least are pooled, until none expects fewer than 10. What
  cannot be and is makes it 0.
  """
  counts, expected = np.asarray(counts), counts.sum() * np.asarray(law)
  if counts[expected == 0].any():
    return 0.0
  counts, expected = counts[expected > 0], expected[expected > 0]
  if len(expected) == 1:  # It was certain.
    return 1.0
  by_size = np.argsort(expected)
  counts, expected = counts[by_size], expected[by_size]
  # As many of the least as are below 10, and more until together they are not.
  pool = max(
    np.searchsorted(expected, 10), 1 + np.searchsorted(expected.cumsum(), 10)
  )
  counts = np.append(counts[:pool].sum(), counts[pool:])
  expected = np.append(expected[:pool].sum(), expected[pool:])
  assert len(expected) > 1, "so few counts test nothing"
  statistic = np.sum((counts - expected) ** 2 / expected)
  freedom = len(counts) - 1.0
  return float(jax.scipy.special.gammaincc(freedom / 2, statistic / 2))


def assert_same(got, want, roundings: int = 64):
  """Fails where two float32 results of one formula differ beyond rounding.

  An entry is the end of sums whose terms may be as large as the largest entry.
  So it may be off by that entry's rounding, once for each of some 64 roundings
  on the way; another order of summation has shown up to 9 of them.

  Args:
    got: float [...].
    want: float [...], of the same shape.
    roundings: how many roundings of the largest entry are allowed.
  """
  got, want = np.asarray(got), np.asarray(want)
  largest = np.abs(want).max(initial=0.0)
  np.testing.assert_allclose(
    got, want, rtol=0, atol=roundings * np.finfo(np.float32).eps * largest
  )


def rank_promotion_raises():
  """A context in which implicit rank promotion is an error."""
  return jax.numpy_rank_promotion("raise")


def as_numpy(tree):
  """Leaves as float64."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
