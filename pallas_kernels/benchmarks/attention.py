"""Speed of attention on one NVIDIA GPU.

  python -m pallas_kernels.benchmarks.attention

All implementations are measured in one process, in interleaved rounds. Each
time is a median in milliseconds; beside it stands the relative error against
float32. A row has two streams (two query heads in a group) unless its name says
otherwise. `floor` is the time that an H200 needs for the bytes or the FLOPs,
whichever is longer (hopper/peaks.py). It counts no masked-out or repeated work.
"""

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import reference, tuning
from pallas_kernels.benchmarks import timing
from pallas_kernels.hopper import attention as hopper
from pallas_kernels.hopper import peaks

# The plain implementation is left out where it would have more scores.
_MOST_SCORES = 6e9
_COLUMNS = ("xla", "blockwise", "cudnn", "cudnn x2", "ours")
# A call of decoding takes as long as its dispatch. So a program has this many.
_CHAIN = 16
_SWEEP = dict(
  short=(0, 128),
  consumers=(2, 3),
  keys=(64, 128, 192, 256),
  stages=(2, 3, 4),
  pingpong=(True, False),
  fused=(0, 128),
  fused_stages=(2, 3, 4, 5, 6),
  key_consumers=(2, 3),
  key_stages=(2, 3, 4, 6),
  query_consumers=(2, 3),
  query_keys=(64, 128),
  query_stages=(2, 3, 4),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table: B sequences, T rows, N key heads of size H.

  Attributes:
    mask: "causal", "all", "prompt" (of T / 4 slots) or "groups" (of 16 slots),
      or "ragged" (T rows at the ends of prefixes of S slots and less).
    S: slots; 0 is T.
    group: query heads of a key head.
  """

  B: int
  T: int
  N: int
  H: int
  mask: str = "causal"
  S: int = 0
  group: int = 2

  def __str__(self):
    slots = f"@{self.S}" if self.S else ""
    single = " one stream" if self.group == 1 else ""
    return f"{self.mask} {self.B}x{self.T}{slots}x{self.N}x{self.H}{single}"

  @property
  def slots(self) -> int:
    return self.S or self.T

  def visible(self) -> jax.Array | None:
    """int32 [B, T] or [B, T, group]."""
    i = jnp.arange(self.T, dtype=jnp.int32)
    match self.mask:
      case "causal":
        return None
      case "all":
        counts = jnp.full(self.T, self.slots, jnp.int32)
      case "prompt":
        counts = jnp.maximum(i + 1, self.T // 4)
      case "groups":
        # Content rows see their group, query rows what is before it.
        first = i // 16 * 16
        counts = jnp.stack([first + 16, first][: self.group], axis=-1)
      case "ragged":
        ends = self.slots - self.slots // 2 * jnp.arange(self.B) // self.B
        counts = ends[:, None] - self.T + 1 + i
        return counts.astype(jnp.int32)
      case _:
        raise ValueError(f"mask {self.mask!r} is unknown")
    return jnp.broadcast_to(counts, (self.B, *counts.shape))

  def floor(self, backward: bool) -> float:
    """Returns the least milliseconds of a forward (and backward) pass."""
    visible = self.visible()
    if visible is None:
      pairs = self.B * self.T * (self.T + 1) / 2 * self.group
    else:
      heads = self.group if visible.ndim == 2 else 1
      pairs = float(visible.sum(dtype=jnp.float32)) * heads
    flops = pairs * self.N * self.H * 4 * (3.5 if backward else 1)
    rows = self.B * self.T * self.N * self.group * self.H * 2
    keys: float = self.B * self.slots * self.N * self.H * 2
    if visible is not None and self.mask == "ragged":
      keys = float(visible.max(axis=1).sum()) * self.N * self.H * 2
    # Forward: q, k, v, out. Backward: q, k, v, out, d_out, dq, dk, dv.
    moved = 2 * rows + 2 * keys + backward * (4 * rows + 4 * keys)
    return 1e3 * max(
      moved / peaks.BYTES_PER_SECOND, flops / peaks.FLOPS_PER_SECOND
    )


_TRAINING = (
  Row(512, 128, 8, 64),
  Row(256, 256, 8, 64),
  Row(128, 512, 8, 64),
  Row(64, 1024, 12, 64),
  Row(64, 1024, 8, 128),
  Row(16, 4096, 12, 64),
  Row(8, 4096, 16, 128),
  Row(8, 8192, 12, 64),
)
_ONE_STREAM = tuple(
  Row(B, T, N, 64, mask, group=1)
  for B, T, N in ((512, 128, 8), (64, 1024, 12))
  for mask in ("causal", "all")
)
_MASKED = tuple(
  Row(B, T, N, 64, mask)
  for B, T, N in (
    (512, 128, 8),
    (64, 1024, 12),
    (16, 4096, 12),
    (4, 16384, 12),
  )
  for mask in ("prompt", "groups")
)
_DECODING = tuple(
  Row(B, T, 8, 128, "ragged", S)
  for B, S in ((64, 1024), (64, 4096), (32, 32768))
  for T in (1, 2, 16)
)


def _arrays(row: Row) -> tuple[jax.Array, ...]:
  """(q, k, v, cotangent), bfloat16."""
  keys = jax.random.split(jax.random.key(0), 4)
  rows = (row.B, row.T, row.N * row.group, row.H)
  slots = (row.B, row.slots, row.N, row.H)
  return tuple(
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, (rows, slots, slots, rows))
  )


def _plain(name, row, q, k, v):
  return pallas_kernels.any_order_attention(
    q, k, v, row.visible(), implementation=name
  )


def _cudnn(row, q, k, v):
  """Calls cuDNN once. A mask that is not causal becomes an array."""
  attend = functools.partial(
    jax.nn.dot_product_attention, implementation="cudnn"
  )
  if row.mask in ("causal", "all"):
    return attend(q, k, v, is_causal=row.mask == "causal")
  if row.mask == "ragged":
    lengths = row.visible().max(axis=1)
    rows = jnp.full(row.B, row.T, jnp.int32)
    # cuDNN lets every row see the whole prefix, which is a little more work.
    return attend(
      q, k, v, query_seq_lengths=rows, key_value_seq_lengths=lengths
    )
  seen = reference.mask(row.T, row.slots, row.visible()[:1], None)
  if seen.shape[1] > 1:
    seen = jnp.tile(seen, (1, row.N, 1, 1))
  return attend(q, k, v, mask=seen)


def _cudnn_twice(row, q, k, v):
  """Calls cuDNN once for each head of the group.

  Args:
    row: of the table.
    q: tuple of arrays, as `_apart` returns it.
    k: keys.
    v: values.
  """
  attend = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
  )
  return tuple(attend(x, k, v) for x in q)


def _apart(row, x):
  """Returns a tuple with an array for each head of the group."""
  return tuple(jnp.array(x[:, :, g :: row.group]) for g in range(row.group))


def _together(x):
  """Inverts `_apart`; returns an array that is no tuple as it is."""
  if not isinstance(x, tuple):
    return x
  B, T, N, H = x[0].shape
  return jnp.stack(x, axis=3).reshape(B, T, N * len(x), H)


def _ours(row, q, k, v, config=None):
  visible = row.visible()
  return hopper.attention(q, k, v, visible, None, row.H**-0.5, config)[0]


def _candidates(
  row: Row, config: tuning.Hopper
) -> dict[str, Callable[..., Any]]:
  scores = 2.0 * row.B * row.N * row.group * row.T * row.slots
  found: dict[str, Callable[..., Any]] = {}
  if scores <= _MOST_SCORES:
    found["xla"] = functools.partial(_plain, "xla")
  found["blockwise"] = functools.partial(_plain, "blockwise")
  found["cudnn"] = _cudnn
  if row.mask == "causal" and row.group > 1:
    found["cudnn x2"] = _cudnn_twice
  found["ours"] = functools.partial(_ours, config=config)
  return {
    name: functools.partial(function, row) for name, function in found.items()
  }


def _program(
  attend: Callable[..., Any], backward: bool, chain: int = 1
) -> Callable[..., Any]:
  """Returns a jitted function (q, k, v, cotangent) -> outputs.

  Args:
    attend: (q, k, v) -> out.
    backward: whether gradients are outputs too.
    chain: number of forward calls. Each takes the output of the call before as
      its q.
  """

  def both(q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent)

  def forward(q, k, v, cotangent):
    del cotangent
    if chain == 1:
      return (attend(q, k, v),)
    return (jax.lax.fori_loop(0, chain, lambda _, q: attend(q, k, v), q),)

  return jax.jit(both if backward else forward)


def _error(
  row: Row, results: Sequence[jax.Array], arrays: Sequence[jax.Array]
) -> float:
  """Returns the largest relative error over the outputs.

  One sequence and one key head are compared.
  """
  q, k, v, cotangent = (
    x[-1:, :, : row.group if x.shape[2] > row.N or row.group == 1 else 1]
    for x in arrays
  )
  visible = row.visible()
  visible = None if visible is None else visible[-1:]

  @jax.jit
  def expected(*arrays):
    q, k, v, cotangent = (x.astype(jnp.float32) for x in arrays)
    out, pull = jax.vjp(
      lambda q, k, v: reference.attention(q, k, v, visible, None, row.H**-0.5)[
        0
      ],
      q,
      k,
      v,
    )
    return out, *pull(cotangent)

  with jax.default_matmul_precision("highest"):
    wants = expected(q, k, v, cotangent)
  errors = []
  for got, want in zip(results, wants):
    got = got[-1:, :, : want.shape[2]].astype(jnp.float32)
    error = jnp.linalg.norm((got - want).ravel())
    errors.append(float(error / jnp.linalg.norm(want.ravel())))
  return max(errors)


def measure(
  row: Row,
  candidates: Mapping[str, Callable[..., Any]],
  backward: bool,
  rounds: int,
) -> dict[str, tuple[float, float] | str]:
  """Returns name -> (median milliseconds, relative error), or why it failed."""
  arrays = _arrays(row)
  found: dict[str, tuple[float, float] | str] = {}
  programs: dict[str, tuple[Callable[..., Any], float]] = {}
  chain = _CHAIN if row.mask == "ragged" else 1
  given: dict[str, tuple[Any, ...]] = {name: arrays for name in candidates}
  if "cudnn x2" in candidates:
    q, k, v, cotangent = arrays
    apart = _apart(row, q), k, v, _apart(row, cotangent)
    given["cudnn x2"] = apart
  for name, attend in candidates.items():
    program = _program(attend, backward)
    try:
      results = [_together(x) for x in program(*given[name])]
      error = _error(row, results, arrays)
    # If a compiler or a library refuses a row, the table goes on.
    except (ValueError, NotImplementedError, RuntimeError) as problem:
      message = str(problem).strip() or type(problem).__name__
      found[name] = message.splitlines()[0][:90]
      continue
    if chain > 1:
      program = _program(attend, backward, chain)
    programs[name] = program, error
  times = timing.interleaved(
    {name: program for name, (program, _) in programs.items()}, given, rounds
  )
  for name, (_, error) in programs.items():
    found[name] = 1e3 * times[name] / chain, error
  return found


def _show(row, title, results, floor, less=None):
  """Prints the measurements of a row.

  Args:
    row: of the table.
    title: of the passes that were measured.
    results: as `measure` returns them.
    floor: least milliseconds.
    less: results of the forward pass alone. If they are given, the time of the
      backward pass is shown too.
  """
  print(f"{row} {title}: floor {floor:.3f}")
  rival = results.get("cudnn")
  for name, result in results.items():
    if isinstance(result, str):
      print(f"  {name:10} {result}")
      continue
    milliseconds, error = result
    ratio = ""
    if isinstance(rival, tuple) and name != "cudnn":
      ratio = f"  {rival[0] / milliseconds:5.2f} of cudnn's speed"
    if less and isinstance(less.get(name), tuple):
      ratio += f"  backward alone {milliseconds - less[name][0]:.3f} ms"
    print(
      f"  {name:10} {milliseconds:8.3f} ms  error {error:.1e}  "
      f"{milliseconds / floor:6.2f} floors{ratio}"
    )
  sys.stdout.flush()


def sweep(row: Row, config: tuning.Hopper, rounds: int) -> tuning.Hopper:
  """Returns the best choice that changing one field after another finds."""

  def cost(config):
    ours = {"ours": functools.partial(_ours, row, config=config)}
    result = measure(row, ours, row.mask != "ragged", rounds)["ours"]
    print(f"  {config}: {result}", flush=True)
    good = isinstance(result, tuple) and result[1] < 2e-2
    return result[0] if good else float("inf")

  best, least = config, cost(config)
  for field, values in _SWEEP.items():
    for value in values:
      if value == getattr(best, field):
        continue
      change: dict[str, Any] = {field: value}
      tried = dataclasses.replace(best, **change)
      if (milliseconds := cost(tried)) < least:
        best, least = tried, milliseconds
  print(f"{row}: {least:.3f} ms with {best}")
  return best


def _pattern(text: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as error:
    raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _change(text: str) -> tuple[str, int | bool]:
  """The type of an argument name=number that sets a field of tuning.Hopper."""
  name, _, value = text.partition("=")
  fields = [field.name for field in dataclasses.fields(tuning.Hopper)]
  if name not in fields or not value.isdecimal():
    raise argparse.ArgumentTypeError(
      f"{text!r}: give name=number, of: {', '.join(fields)}"
    )
  kind = type(getattr(tuning.Hopper(), name))
  return name, kind(int(value))


def _options(arguments):
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.benchmarks.attention",
    usage=argparse.SUPPRESS,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--quick", action="store_true", help="few shapes")
  parser.add_argument(
    "--only",
    type=_pattern,
    default="",
    help="rows that match this regular expression, as in '^causal 64x1024'",
  )
  parser.add_argument(
    "--skip",
    nargs="+",
    default=(),
    choices=_COLUMNS,
    help="columns to leave out",
  )
  parser.add_argument(
    "--rounds",
    type=timing.rounds,
    default=7,
    help="of interleaved measurements",
  )
  parser.add_argument(
    "--sweep", action="store_true", help="try tile sizes of ours, row by row"
  )
  parser.add_argument(
    "--set",
    nargs="*",
    type=_change,
    default=[],
    metavar="NAME=NUMBER",
    help="fields of tuning.Hopper",
  )
  options = parser.parse_args(arguments)
  rows = (*_TRAINING, *_ONE_STREAM, *_MASKED, *_DECODING)
  if options.quick:
    rows = (_TRAINING[0], _TRAINING[3], _MASKED[0], _DECODING[4])
  options.rows = [row for row in rows if options.only.search(str(row))]
  if not options.rows:
    parser.error(f"--only: no row of: {'; '.join(map(str, rows))}")
  return options


def main(arguments: Sequence[str] | None = None) -> None:
  options = _options(arguments)
  device = timing.gpu("pallas_kernels.benchmarks.attention")
  print(f"jax {jax.__version__}, {device.device_kind}, bfloat16")
  for row in options.rows:
    config = dataclasses.replace(
      tuning.hopper(row.T, row.slots, row.H), **dict(options.set)
    )
    if options.sweep:
      sweep(row, config, options.rounds)
      continue
    candidates = _candidates(row, config)
    for name in options.skip:
      candidates.pop(name, None)
    forward = measure(row, candidates, False, options.rounds)
    _show(row, "forward", forward, row.floor(False))
    if row.mask == "ragged":
      continue
    both = measure(row, candidates, True, options.rounds)
    _show(row, "forward and backward", both, row.floor(True), forward)


if __name__ == "__main__":
  main()
