"""Parameters of modules: how they are drawn, and how rows use them."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parallel, vocabulary
from pallas_kernels import rowwise

_INIT_SCALE = 0.02


def normal(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  scale: float = _INIT_SCALE,
) -> nnx.Param:
  """Return a parameter of normal random numbers.

  Args:
    rngs: gives the key.
    shape: the shape of the parameter.
    axes: its logical axes, see devices/sharding.py.
    scale: the standard deviation.
  """
  # Without a type, the switch JAX_ENABLE_X64 would make it float64.
  values = jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(scale * values, axes=axes)


def used(param: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Return a parameter for a matmul: in compute dtype, whole along fsdp."""
  return sharding.gathered(param[...].astype(dtype), *param.axes)


def scale_of_updates(model: config_lib.Model) -> float:
  """Return the standard deviation of the weights that make updates.

  There are 2 L updates of the residual stream. So its variance does not grow
  with the depth.
  """
  return _INIT_SCALE / (2 * model.L) ** 0.5


def biases(
  model: config_lib.Model, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, nnx.Param]:
  """Return the biases of products, by the names of the weights.

  Args:
    model: the model's section of the config. If it has no biases, the result is
      empty.
    shapes: the shape of a row of each product.
  """
  return {
    name: nnx.Param(
      jnp.zeros(shape, jnp.float32), axes=(None,) * len(shape[1:]) + ("vector",)
    )
    for name, shape in shapes.items()
    if model.biases
  }


def matmuls(
  equation: str,
  streams: Sequence[jax.Array],
  param: nnx.Param,
  dtype: jax.typing.DTypeLike,
  adapter: Callable[..., jax.Array] | None = None,
  bias: nnx.Param | None = None,
) -> list[jax.Array]:
  """Return the product of every stream with a parameter.

  Args:
    equation: see parallel.matmuls.
    streams: arrays of the same shape.
    param: the weight.
    dtype: the compute dtype.
    adapter: the adapters.Adapter of the weight.
    bias: is added to every row of the product.
  """
  weight = param[...].astype(dtype)
  products = parallel.matmuls(equation, streams, weight, param.axes)
  if adapter is not None:
    products = [y + adapter(x, dtype) for x, y in zip(streams, products)]
  return biased(products, bias)


def biased(
  products: Sequence[jax.Array], bias: nnx.Param | None
) -> list[jax.Array]:
  """Return products plus a bias, rounded like the products.

  Args:
    products: arrays of the same shape.
    bias: is added to every row. None means no bias.
  """
  if bias is None:
    return list(products)
  return [y + bias[...].astype(y.dtype) for y in products]


@jax.custom_vjp
def look_up(table: jax.Array, position: jax.Array) -> jax.Array:
  """Return the rows of `table` [P, D] at `position`: [B, S, D].

  Positions must differ within a sequence, as those of slots do. Then the
  gradient is a gather and a sum over B. It needs no contended scatter. It also
  needs no one-hot matmul, which would cost P / D of a square layer.

  Args:
    table: [P, D].
    position: int32 [B, S].
  """
  # The table is pinned so that each row is contiguous. XLA's GPU layout pass
  # would put positions innermost. The numbers of a row would then lie far
  # apart, and with a large P no cache hides this.
  return vocabulary.pin(table)[position]


def _look_up_forward(table, position):
  return look_up(table, position), (position, table.shape[0])


def _look_up_backward(residuals, gradient):
  position, P = residuals
  B, S = position.shape
  slot = jnp.full((B, P), S, jnp.int32)
  slot = slot.at[jnp.arange(B)[:, None], position].set(
    jnp.arange(S, dtype=jnp.int32), unique_indices=True
  )
  by_position = jnp.take_along_axis(
    gradient, slot[..., None], axis=1, mode="fill", fill_value=0
  )
  total = by_position.sum(0, dtype=jnp.float32)
  return vocabulary.pin(total.astype(gradient.dtype)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class RMSNorm(nnx.Module):
  """The scale of x / rms(x) * scale, a norm over the last axis."""

  def __init__(self, width: int, epsilon: float):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=("vector",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the normed rows, float32."""
    return rowwise.normalised(x, self.scale[...], self.epsilon)


class LayerNorm(RMSNorm):
  """An RMSNorm of x - mean(x), plus a bias (arXiv 1607.06450)."""

  def __init__(self, width: int, epsilon: float):
    super().__init__(width, epsilon)
    self.bias = nnx.Param(jnp.zeros(width, jnp.float32), axes=("vector",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the normed rows, float32."""
    return _centred(x, self.scale[...], self.epsilon) + self.bias[...]


# The norm is recomputed in the backward pass, like rowwise.normalised.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _centred(x, scale, epsilon):
  """Return the RMSNorm of x - mean(x), float32."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x -= jnp.mean(x, axis=-1, keepdims=True)
  return rowwise.normalised(x, scale, epsilon)


def norm_of_rows(model: config_lib.Model) -> RMSNorm:
  """Return the norm of rows [..., D] that config.model.norm names."""
  kind = LayerNorm if model.norm == "layer" else RMSNorm
  return kind(model.D, model.norm_epsilon)
