"""The MLP of a block, in each of its forms."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parallel, parameters


class MLP(nnx.Module):
  """Matmuls with GELU or SwiGLU (arXiv 2002.05202), with or without biases."""

  def __init__(
    self,
    model: config_lib.Model,
    compute: config_lib.Compute,
    *,
    rngs: nnx.Rngs,
  ):
    self.dtype, self.rowwise = jnp.dtype(compute.dtype), compute.rowwise
    into, axes = (model.D, model.F), ("embed", "hidden")
    self.gates = model.mlp == "swiglu"
    if self.gates:
      self.gate = parameters.normal(rngs, into, axes)
    self.up = parameters.normal(rngs, into, axes)
    self.down = parameters.normal(
      rngs,
      (model.F, model.D),
      ("hidden", "embed"),
      parameters.scale_of_updates(model),
    )
    shapes = {"gate": (model.F,)} if self.gates else {}
    shapes |= {"up": (model.F,), "down": (model.D,)}
    self.biases = nnx.data(parameters.biases(model, shapes))
    # The adapters.Adapter of weights that have one, by the weight's name.
    self.adapters: dict[str, Any] = nnx.data({})

  def __call__(self, streams: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the update of every normalised stream, [B, R, D] each."""
    is_plain = not (self.gates or self.adapters or self.biases)
    if is_plain and not sharding.spread():
      up, down = (parameters.used(x, self.dtype) for x in (self.up, self.down))
      return [parallel.mlp(x, up, down, self.rowwise) for x in streams]
    hidden = self._into_hidden(streams, "up")
    if self.gates:
      gates = self._into_hidden(streams, "gate")
      hidden = [_gated(gate, x) for gate, x in zip(gates, hidden)]
    else:
      hidden = [parallel.gelu(x, self.rowwise) for x in hidden]
    return self._product("brf,fd->brd", hidden, "down")

  def _product(self, equation, streams, name):
    """Return the product of every stream with a weight, adapter and bias."""
    weight, adapter = getattr(self, name), self.adapters.get(name)
    bias = self.biases.get(name)
    return parameters.matmuls(
      equation, streams, weight, self.dtype, adapter, bias
    )

  def _into_hidden(self, streams, name):
    """Return the product of every stream with a weight, [B, R, F] each."""
    hidden = self._product("brd,df->brf", streams, name)
    return [sharding.constrain(x, *parallel.ROWS[:2], "hidden") for x in hidden]


# The value is recomputed in the backward pass, like that of GELU.
@jax.checkpoint
def _gated(gate: jax.Array, x: jax.Array) -> jax.Array:
  """Return SiLU(gate) * x, computed in float32 and rounded once, like x."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return (jax.nn.silu(gate.astype(wide)) * x.astype(wide)).astype(x.dtype)
