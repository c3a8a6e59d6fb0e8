"""Attention cases that every fused kernel must pass, and how they are judged.

A kernel is a function (q, k, v, visible, key_rank, scale) -> (out, lse), as
those of pallas_kernels. `check(run(kernel, case), case)` compares its out and
lse, and its gradients for a given cotangent, with float64.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import api, reference, shards

MASKS = (
  "causal",
  "prompt",
  "groups",
  "ragged",
  "empty",
  "ranks_random",
  "ranks_structured",
  "ranks_tied",
)
# Relative Frobenius norm of the error.
_FORWARD, _GRADIENT = {"bfloat16": 4e-3}, {"bfloat16": 8e-3}
_FLOAT32 = 2e-6
# Twice the error of the XLA path is allowed, and never less than what rounding
# alone can do: of one stored bfloat16, or of float32 sums in another order.
_FLOOR = {"bfloat16": 2.0**-9, "float32": 2.0**-20}


class Case(NamedTuple):
  """One call; every array follows from these fields.

  Attributes:
    T: rows.
    S: slots.
    N: key heads.
    group: query heads of a key head.
    H: head dim.
    mask: one of MASKS.
    dtype: of q, k, v and the cotangent of out.
    B: sequences.
    logits: factor of the scores, whose standard deviation is 1.
    constant_v: whether all slots of a head have the same value.
    lse_cotangent: whether the loss reads lse too.
    P: devices that keys and values are gathered from; see `dealt`.
    seed: of all arrays.
  """

  T: int
  S: int
  N: int = 1
  group: int = 2
  H: int = 64
  mask: str = "causal"
  dtype: str = "bfloat16"
  B: int = 2
  logits: float = 1.0
  constant_v: bool = False
  lse_cotangent: bool = False
  P: int = 1
  seed: int = 0

  def __str__(self):
    """Short, and fit for the name of a test."""
    usual = Case(self.T, self.S)
    return "_".join(
      f"{name}_{value}"
      for name, value, default in zip(self._fields, self, usual)
      if name in "TS" or value != default
    )


class Inputs(NamedTuple):
  """Arguments of a call and the cotangents of what it returns."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  visible: np.ndarray | None
  key_rank: np.ndarray | None
  scale: float
  d_out: np.ndarray
  d_lse: np.ndarray


class Result(NamedTuple):
  out: np.ndarray
  lse: np.ndarray
  dq: np.ndarray
  dk: np.ndarray
  dv: np.ndarray


def gathered(x, P: int):
  """Keys or values [B, S, ...] as gathered from P devices."""
  return jnp.moveaxis(shards.deal(x, P), 1, 0)


def dealt(kernel, P: int):
  """The kernel, given keys and values as gathered from P devices."""
  if P == 1:
    return kernel

  def call(q, k, v, *arguments):
    return kernel(q, gathered(k, P), gathered(v, P), *arguments)

  return call


def inputs(case: Case) -> Inputs:
  generator = np.random.default_rng(case.seed)
  B, T, S, N, H = case.B, case.T, case.S, case.N, case.H
  rows = (B, T, N * case.group, H)

  def normal(*shape, factor=1.0):
    # Rounded to the dtype here: the reference sees what the kernel sees.
    return (factor * generator.normal(size=shape)).astype(jnp.dtype(case.dtype))

  q = normal(*rows, factor=case.logits**0.5)
  k = normal(B, S, N, H, factor=case.logits**0.5)
  v = normal(B, 1 if case.constant_v else S, N, H)
  visible, key_rank = mask(case)
  return Inputs(
    q,
    k,
    np.array(np.broadcast_to(v, k.shape)),
    visible,
    key_rank,
    H**-0.5,
    normal(*rows),
    case.lse_cotangent * generator.normal(size=rows[:3]).astype(np.float32),
  )


def mask(case: Case) -> tuple[np.ndarray | None, np.ndarray | None]:
  """(visible, key_rank) of the case."""
  generator = np.random.default_rng(case.seed + 1)
  B, T, S, group = case.B, case.T, case.S, case.group
  i = np.arange(T)
  causal = np.minimum(i + 1, S)
  # Sequence b is shorter than the one before.
  length = (S // (1 + np.arange(B)))[:, None]
  key_rank = None
  match case.mask:
    case "causal":
      return None, None
    case "prompt":
      visible = np.maximum(length // 4, causal)
    case "groups":
      # Content rows see their whole group, query rows what is before it.
      width = 16 if T > 32 else 3
      first = i // width * width
      ends = [first + 1, np.minimum(first + width, T) + 1]
      visible = np.stack([ends[(g + 1) % 2] for g in range(group)], axis=-1)
      visible = np.tile(np.minimum(visible, S), (B, 1, 1))
    case "ragged":
      visible = np.minimum(causal, length)
    case "empty":
      # Every third row, some at random, and a whole sequence; also counts
      # beyond the last slot.
      visible = generator.integers(0, S + 3, (B, T))
      visible[:, ::3] = 0
      visible[-1] = 0
    case "ranks_random" | "ranks_structured" | "ranks_tied":
      key_rank = np.stack([_ranks(case, generator) for _ in range(B)])
      key_rank = key_rank.astype(np.int32)
      own = key_rank[:, i % S]
      # Content rows see their own slot, query rows do not.
      visible = np.stack([own + (g + 1) % 2 for g in range(group)], axis=-1)
    case _:
      raise ValueError(f"mask {case.mask!r} is none of {MASKS}")
  return visible.astype(np.int32), key_rank


def _ranks(case, generator):
  """The ranks of one sequence's slots, [S]."""
  S = case.S
  if case.mask == "ranks_tied":
    return generator.integers(-2, S // 2 + 1, S)
  if case.mask == "ranks_random":
    return generator.permutation(S)
  # A prompt, then windows that are generated one after another, inside which
  # the order is random.
  starts = np.arange(S // 4, S, max(S // 4, 1))
  windows = np.split(np.arange(S), starts)
  return np.concatenate([generator.permutation(w) for w in windows])


def run(kernel: Callable, case: Case) -> Result:
  """The kernel's results for the case, under jit."""
  return program(kernel, inputs(case))()


def program(kernel: Callable, given) -> Callable[[], Result]:
  """What gives the results for `inputs`, compiled once."""

  @functools.partial(jax.jit, static_argnums=0)
  def both(scale, q, k, v, visible, key_rank, cotangents):
    outputs, pull = jax.vjp(
      lambda q, k, v: kernel(q, k, v, visible, key_rank, scale), q, k, v
    )
    return *outputs, *pull(cotangents)

  def results():
    q, k, v, visible, key_rank, scale, *cotangents = given
    found = both(scale, q, k, v, visible, key_rank, tuple(cotangents))
    return Result(*(np.asarray(x) for x in found))

  return results


@functools.cache
def expected(case: Case) -> Result:
  """The same in float64; compare, never write."""

  def wide(x):
    floating = np.ndim(x) and x.dtype != np.int32
    return x.astype(np.float64) if floating else x

  with jax.enable_x64(True):
    return program(reference.attention, [wide(x) for x in inputs(case)])()


@functools.cache
def xla_errors(case: Case) -> dict[str, float]:
  """Relative errors of the plain XLA path, by the fields of Result."""

  def kernel(q, k, v, visible, key_rank, scale):
    return api.any_order_attention(
      q,
      k,
      v,
      visible,
      key_rank=key_rank,
      scale=scale,
      return_lse=True,
      implementation="xla",
    )

  return errors(run(kernel, case), case)


def errors(got: Result, case: Case) -> dict[str, float]:
  """Error norms over the reference's norm, or over `_sizes` if it vanishes."""
  want = expected(case)
  sizes = _sizes(case)
  found = {}
  for name in Result._fields:
    a, b = (np.asarray(getattr(x, name), np.float64) for x in (got, want))
    assert a.shape == b.shape, f"{name} {a.shape}, expected {b.shape}"
    if name == "lse":
      np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), name)
      a, b = (np.where(np.isneginf(b), 0.0, x) for x in (a, b))
    norm = np.linalg.norm(b)
    scale = norm if norm > 1e-6 * sizes[name] else sizes[name]
    found[name] = float(np.linalg.norm(a - b) / scale)
  return found


def _sizes(case):
  """What each result's norm would be if nothing cancelled."""
  given = inputs(case)

  def norm(x):
    return np.linalg.norm(x.astype(np.float64))

  def row(x):
    return norm(x) / np.prod(x.shape[:-1]) ** 0.5

  slope = norm(given.d_out) * row(given.v) + norm(given.d_lse)
  return dict(
    out=norm(given.v),
    lse=np.prod(given.q.shape[:3]) ** 0.5,
    dq=given.scale * slope * row(given.k),
    dk=given.scale * slope * row(given.q),
    dv=norm(given.d_out),
  )


def bounds(case: Case) -> dict[str, float]:
  """What `errors` may be, by the fields of Result."""
  plain = xla_errors(case)
  return {
    name: min(most, max(2 * plain[name], floor))
    for name, (floor, most) in _limits(case).items()
  }


def _limits(case):
  """{field of Result: the least and the most that a bound can be}."""
  given = inputs(case)
  q = given.q.astype(np.float32).reshape(case.B, case.T, case.N, -1, case.H)
  k = given.k.astype(np.float32)
  score = given.scale * np.einsum("btngh,bsnh->bngts", q, k)
  float32 = max(1.0, np.abs(score).max() / 10)
  found = {}
  for name in Result._fields:
    table = _FORWARD if name in ("out", "lse") else _GRADIENT
    most = table.get(case.dtype, _FLOAT32 * float32)
    # The log-sum-exp is float32 whatever the inputs are.
    floor = _FLOOR["float32" if name == "lse" else case.dtype]
    if floor == _FLOOR["float32"]:
      floor *= float32
    found[name] = floor, most
  return found


def check(got: Result, case: Case) -> None:
  """Raises AssertionError where a result is farther off than allowed."""
  for name, x in got._asdict().items():
    wrong = np.isnan(x) | (np.isposinf(x) if name == "lse" else np.isinf(x))
    assert not wrong.any(), f"{case}: {wrong.sum()} of {name} are not finite"
  found = errors(got, case)
  allowed = {name: min(limits) for name, limits in _limits(case).items()}
  if any(not found[name] <= allowed[name] for name in found):
    # The error of the XLA path counts. Its program takes long to compile.
    allowed = bounds(case)
  far = {
    name: f"{found[name]:.2e}, allowed {allowed[name]:.2e}"
    for name in Result._fields
    if not found[name] <= allowed[name]
  }
  assert not far, f"{case}: relative errors {far}"
  _check_empty_rows(got, case)


def _check_empty_rows(got, case):
  empty = np.isneginf(expected(case).lse)
  assert not got.out[empty].any(), f"{case}: out of a row that sees nothing"
  assert not got.dq[empty].any(), f"{case}: dq of a row that sees nothing"
