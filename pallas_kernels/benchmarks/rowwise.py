"""Speed of the work on rows between matrix products, on one NVIDIA GPU.

  python -m pallas_kernels.benchmarks.rowwise

Plain JAX, compiled by XLA, and the kernels are measured in one process, in
interleaved rounds. Each time is a median in milliseconds; beside it stands the
relative error against float32. `floor` is the time that an H200 needs for the
bytes (hopper/peaks.py).
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import products, rowwise
from pallas_kernels.benchmarks import timing
from pallas_kernels.hopper import peaks


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table: a function on rows [B, T, D].

  Attributes:
    function: "norm" (with the residual addition), "heads" (queries, keys and
      values, D each), "gelu" or "mlp" (with 4 D hidden units).
    H: the width of a head.
  """

  function: str
  B: int
  T: int
  D: int
  H: int = 64

  def __str__(self):
    return f"{self.function} {self.B}x{self.T}x{self.D}"

  def call(self, implementation: str) -> Callable[..., Any]:
    """Return the function of the arrays, with an implementation."""
    functions: dict[str, Callable[..., Any]] = dict(
      norm=rowwise.rms_norm,
      heads=rowwise.split_heads,
      gelu=rowwise.gelu,
      mlp=products.gelu_mlp,
    )
    return functools.partial(
      functions[self.function], implementation=implementation
    )

  def arrays(self) -> tuple[Any, ...]:
    """Return the arguments of the function."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = self.B, self.T, self.D
    x = jax.random.normal(keys[0], shape, jnp.bfloat16)
    if self.function == "gelu":
      return (x,)
    if self.function == "mlp":
      up = jax.random.normal(keys[1], (self.D, 4 * self.D), x.dtype)
      down = jax.random.normal(keys[2], (4 * self.D, self.D), x.dtype)
      return x, up * self.D**-0.5, down * self.D**-0.5
    if self.function == "norm":
      return x, jax.random.uniform(keys[1], (self.D,), jnp.float32, 0.5, 2), x
    x = x[:, :, None].reshape(self.B, self.T, 1, -1, self.H)
    position = jax.random.randint(keys[2], (self.B, self.T, 1), 0, self.T)
    scale = jax.random.uniform(keys[1], (self.H,), jnp.float32, 0.5, 2)
    part = rowwise.Part(scale, rowwise.rotation(position, self.H, 1e4))
    return jnp.tile(x, (1, 1, 3, 1, 1)), [part, part, None]

  def floor(self, backward: bool) -> float:
    """Return the least milliseconds of the forward or the backward pass."""
    moved = self.B * self.T * self.D * 2
    if self.function == "mlp":
      # The rows of each product, D or 4 D wide, that are read or written. Of
      # the backward pass, three products; what it recomputes is not counted.
      products = ((9, 5), (9, 5, 5, 5))[backward]
      seconds = 2 * self.B * self.T * 4 * self.D**2 / peaks.FLOPS_PER_SECOND
      return 1e3 * sum(
        max(arrays * moved / peaks.BYTES_PER_SECOND, seconds)
        for arrays in products
      )
    arrays = {
      "norm": (4, 4),
      # The values are copied: the backward pass does not read them.
      "heads": (6, 8),
      "gelu": (2, 3),
    }[self.function][backward]
    return 1e3 * arrays * moved / peaks.BYTES_PER_SECOND


_ROWS = tuple(
  Row(function, B, T, 4 * D if function == "gelu" else D)
  for function in ("norm", "heads", "gelu", "mlp")
  for B, T, D in ((512, 128, 256), (32, 1024, 768))
)


def _backward(call: Callable[..., Any]) -> Callable[..., Any]:
  """Return the function from arguments and cotangents to gradients."""

  def gradients(arrays, cotangents):
    pulled = jax.vjp(call, *arrays)[1](cotangents)
    # Positions have none, and angles only in plain JAX.
    shapes = {x.shape for x in arrays if isinstance(x, jax.Array)}
    shapes.add(arrays[0].shape[-1:])
    return [x for x in jax.tree.leaves(pulled) if x.shape in shapes]

  return gradients


def _error(got: Any, wanted: Any) -> float:
  """Return the largest relative error of the arrays."""

  def of(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

  return max(map(of, jax.tree.leaves(got), jax.tree.leaves(wanted)))


def _show(
  title: str,
  floor: float,
  times: dict[str, float],
  errors: dict[str, float],
) -> None:
  print(f"{title}: floor {floor:.4f}")
  for name, value in times.items():
    print(
      f"  {name:10} {1e3 * value:8.4f} ms  error {errors[name]:.1e}  "
      f"{1e3 * value / floor:5.2f} floors"
    )


def _measure(row: Row, rounds: int) -> None:
  """Measure both passes of a row, and print them."""
  arrays = row.arrays()
  wide = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays
  )
  cotangents = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype),
    jax.eval_shape(row.call("xla"), *arrays),
  )
  forward = {
    name: jax.jit(row.call(name)) for name in rowwise.ROWWISE_IMPLEMENTATIONS
  }
  backward = {
    name: jax.jit(_backward(row.call(name)))
    for name in rowwise.ROWWISE_IMPLEMENTATIONS
  }
  exact = jax.jit(row.call("xla"))(*wide)
  errors = {name: _error(f(*arrays), exact) for name, f in forward.items()}
  times = timing.interleaved(forward, dict.fromkeys(forward, arrays), rounds)
  _show(f"{row} forward", row.floor(False), times, errors)
  exact = jax.jit(_backward(row.call("xla")))(
    wide, jax.tree.map(lambda x: x.astype(jnp.float32), cotangents)
  )
  given = arrays, cotangents
  errors = {name: _error(f(*given), exact) for name, f in backward.items()}
  times = timing.interleaved(backward, dict.fromkeys(backward, given), rounds)
  _show(f"{row} backward", row.floor(True), times, errors)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measure the rows that the command line asks for."""
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.benchmarks.rowwise",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--rounds", type=timing.rounds, default=7, help="interleaved measurements"
  )
  parser.add_argument(
    "--only", default="", help="a part of the names of the rows, such as mlp"
  )
  options = parser.parse_args(arguments)
  device = timing.gpu("pallas_kernels.benchmarks.rowwise")
  print(f"jax {jax.__version__}, {device.device_kind}, bfloat16")
  for row in _ROWS:
    if options.only in str(row):
      _measure(row, options.rounds)


if __name__ == "__main__":
  main()
