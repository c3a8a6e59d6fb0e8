"""The files of a `causal` model for transformers: export.layout=hugging_face.

converting.py reads such a folder back.
"""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from aoarm_jax.config import hugging_face
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import foreign
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import exported, foreign_names

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
_BOS, _END = "<|bos|>", "<|endoftext|>"


class Ends(NamedTuple):
  """The ids at the ends of a text.

  Attributes:
    bos: the id before every text. It is V if no symbol has the embedding of
      BOS.
    eos: the id of the end of a text, or None.
  """

  bos: int
  eos: int | None


def check(model: config_lib.Model) -> None:
  """Raise ConfigError if transformers has no such model."""
  if why := hugging_face.missing(model):
    raise config_lib.ConfigError(
      f"config.export.layout='hugging_face': {why}; leave the layout out"
    )


def files(
  network: network_lib.Network,
  params: Any,
  dtype: str,
) -> dict[str, bytes]:
  """Return the content of all files by their names.

  Args:
    network: the network of a run that `check` lets pass.
    params: nested dict of its parameters.
    dtype: of the weights in the file, "float32" or "bfloat16".
  """
  by_name = {
    name: jax.device_get(leaf) for name, leaf in exported.names(params).items()
  }
  V, ends = network.vocabulary, _ends(network, by_name["embedding"])
  more = (V,) if ends.bos == V else ()
  architecture = hugging_face.architecture(network.model)
  number = np.dtype(jax.numpy.dtype(dtype))
  arrays = {
    name: np.ascontiguousarray(array.astype(number))
    for name, array in foreign_names.of_params(architecture, by_name, V, more)
  }
  marks = {V: _BOS} if more else {}
  if network.tokenizer.has_end:
    marks[network.tokenizer.end] = _END
  tokenizer, marks = foreign.to_hugging_face(network.tokenizer, ends.bos, marks)
  config = hugging_face.written(network.model, V + len(more), *ends)
  config["torch_dtype"] = dtype
  generation = {"bos_token_id": ends.bos, "eos_token_id": ends.eos}
  if more:  # It is never predicted, and its logit means nothing.
    generation["suppress_tokens"] = [*more]
  options = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": marks.get(ends.bos),
    "eos_token": None if ends.eos is None else marks.get(ends.eos),
    "clean_up_tokenization_spaces": False,
    "model_max_length": network.model.T,
  }
  return {
    exported.WEIGHTS: safetensors_numpy.save(arrays, {"format": "pt"}),
    exported.TOKENIZER: json.dumps(tokenizer).encode(),
    TOKENIZER_CONFIG: _json(options),
    GENERATION: _json(generation),
    # The last file, since a folder without it is no model.
    exported.CONFIG: _json(config),
  }


def _json(value):
  return (json.dumps(value, indent=2) + "\n").encode()


def _ends(network, embedding):
  """Return the ids of BOS and EOS: symbols that have their embeddings."""
  V = network.vocabulary

  def same(row):
    (found,) = np.nonzero((embedding[:V] == embedding[row]).all(axis=1))
    return int(found[0]) if len(found) else None

  bos, eos = same(V), same(V + 1)
  if network.tokenizer.has_end:
    eos = network.tokenizer.end
  return Ends(V if bos is None else bos, eos)
