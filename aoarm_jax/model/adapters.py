"""Low-rank adapters (LoRA, arXiv 2106.09685), and which arrays are trained.

An adapter of a weight W is a pair of arrays A and B. Training uses x W + (alpha
/ rank) (x A) B and never computes a gradient of W. Evaluation, generation and
exports use the merged weight W + (alpha / rank) A B, see `reader`.

The arrays of a run are named by their path, as in blocks/attention/query.
"""

import fnmatch
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.model import parameters

# The weights that each word of config.train.lora_targets stands for.
_GROUPS = {
  "attention": ("query", "key", "value", "out"),
  "mlp": ("gate", "up", "down"),
}
# The name of a module's adapters in the tree of parameters.
_NAME = "adapters"


class Adapter(nnx.Module):
  """The low-rank update of one weight in all layers.

  Its second array begins at zero, so at first the update is exactly zero.
  """

  def __init__(
    self,
    weight: nnx.Param,
    inputs: int,
    train: config_lib.Train,
    rngs: nnx.Rngs,
  ):
    """Draw the arrays.

    Args:
      weight: [L, *in, *out], the weight of all layers.
      inputs: number of dimensions of a row of inputs.
      train: gives the rank and the scale.
      rngs: gives the key.
    """
    layers, shape, axes = weight.shape[0], weight.shape[1:], weight.axes
    rank = train.lora_rank
    self.scale = train.lora_alpha / rank
    self.into = parameters.normal(
      rngs,
      (layers, *shape[:inputs], rank),
      (*axes[:inputs], None),
      1 / math.sqrt(math.prod(shape[:inputs])),
    )
    self.out = nnx.Param(
      jnp.zeros((layers, rank, *shape[inputs:]), jnp.float32),
      axes=(None, *axes[inputs:]),
    )

  def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the update of the product of a layer: [B, R, *out].

    Args:
      x: [B, R, *in], in compute dtype. The adapter is that of one layer.
      dtype: the compute dtype.
    """
    into = parameters.used(self.into, dtype)
    low = jnp.tensordot(x, into, into.ndim - 1)
    return self.scale * jnp.tensordot(low, parameters.used(self.out, dtype), 1)


def attach(blocks: Any, train: config_lib.Train, rngs: nnx.Rngs) -> None:
  """Give the targeted weights of all layers an adapter.

  Args:
    blocks: the layers.Block of all layers.
    train: gives the rank, the scale and the targets.
    rngs: gives the keys.
  """
  names = [
    name for word in train.lora_targets for name in _GROUPS.get(word, (word,))
  ]
  owners = [blocks, blocks.of_queries] if blocks.untied else [blocks]
  for module in (each for b in owners for each in (b.attention, b.mlp)):
    for name in dict.fromkeys(names):
      if (weight := getattr(module, name, None)) is not None:
        inputs = 2 if name == "out" else 1
        module.adapters[name] = Adapter(weight, inputs, train, rngs)


def patterns(train: config_lib.Train) -> tuple[str, ...]:
  """Return the patterns of frozen arrays; the last that matches decides.

  With adapters, all other arrays are frozen first, apart from those that the
  mechanism adds to the backbone (start/*).

  Args:
    train: the section of the config.
  """
  others = ("*", "!start/*") if train.lora_rank else ()
  return others + train.frozen


def is_frozen(name: str, train: config_lib.Train) -> bool:
  """Return whether an array is not trained.

  Args:
    name: the path of the array, such as blocks/attention/query.
    train: the section of the config.
  """
  if f"/{_NAME}/" in name:
    return False
  frozen = False
  for pattern in patterns(train):
    if fnmatch.fnmatchcase(name, pattern.removeprefix("!")):
      frozen = not pattern.startswith("!")
  return frozen


def check(params: Any, train: config_lib.Train) -> None:
  """Raise ConfigError if a pattern matches no array, or nothing is trained.

  Args:
    params: nested dict with the names of all parameters.
    train: the section of the config.
  """
  names = [name for name, _ in _named(params)]
  for pattern in train.frozen:
    if not fnmatch.filter(names, pattern.removeprefix("!")):
      raise config_lib.ConfigError(
        f"config.train.frozen={train.frozen!r}: {pattern!r} matches no array; "
        f"there are: {', '.join(n for n in names if f'/{_NAME}/' not in n)}"
      )
  if all(is_frozen(name, train) for name in names):
    raise config_lib.ConfigError(
      f"config.train.frozen={train.frozen!r}: leaves no array to train; exempt "
      "some by a later pattern that begins with !, as in '!norm/*'"
    )


def split(params: Any, train: config_lib.Train) -> tuple[Any, Any]:
  """Return the trained and the frozen part of a nested dict of parameters.

  Args:
    params: nested dict; its leaves may be of any kind.
    train: says which arrays are frozen.
  """
  halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}
  for name, leaf in _named(params):
    *folders, last = name.split("/")
    node = halves[is_frozen(name, train)]
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return halves


def joined(params: Any, others: Any) -> Any:
  """Return the union of two nested dicts; a leaf of `others` replaces one."""
  union = dict(params)
  for name, node in others.items():
    is_shared = isinstance(node, dict) and name in union
    union[name] = joined(union[name], node) if is_shared else node
  return union


def merged(params: Any, train: config_lib.Train) -> Any:
  """Return parameters whose weights contain their adapters.

  Args:
    params: nested dict of arrays, with the adapters of all layers.
    train: gives the scale.

  Returns:
    The nested dict without adapters, as in a network that has none.
  """
  whole = {
    name: merged(node, train) if isinstance(node, dict) else node
    for name, node in params.items()
    if name != _NAME
  }
  for name, pair in params.get(_NAME, {}).items():
    scale = train.lora_alpha / train.lora_rank
    update = jax.vmap(lambda into, out: jnp.tensordot(into, out, 1))(
      pair["into"], pair["out"]
    )
    whole[name] = whole[name] + scale * update
  return whole


def reader(axes: Any, train: config_lib.Train) -> Callable[[Any, Any], Any]:
  """Return the function that makes a network's parameters of a run's arrays.

  It takes the trained and the frozen arrays, and returns the parameters of a
  network without adapters. Evaluation, generation and exports read a run
  through this function.

  Args:
    axes: the logical axes of the result, see Network.axes.
    train: the section of the config that the run was trained with.
  """
  if not train.lora_rank:
    return joined

  @jax.jit
  def read(trained, frozen):
    whole = merged(joined(trained, frozen), train)
    return sharding.constrain_parameters(whole, axes)

  return read


def _named(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yield (path, leaf) of a nested dict, as in blocks/attention/query."""
  for name, node in tree.items():
    if isinstance(node, dict):
      yield from _named(node, f"{prefix}{name}/")
    else:
      yield prefix + name, node
