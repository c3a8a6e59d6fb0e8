"""Any-order autoregressive language models in JAX.

  model = aoarm_jax.load("runs/two_stream-tiny")
  model.generate(count=4)
  model.generate(prompt="the quick ", length=40)
  model.infill("the qu___ brown fox", count=4)
  model.score("the [qu]ick brown fox")
  model.logits("the quick brown fox")

All methods are documented in aoarm_jax.api.Model. An error that a user can mend
is a UserError, and its message is one line. Importing this package is fast: JAX
is imported when `load` is called.
"""

import importlib
import os
import typing

if typing.TYPE_CHECKING:
  from aoarm_jax.api import Model as Model
  from aoarm_jax.config.errors import UserError as UserError
  from aoarm_jax.config.reading import ReadError as ReadError
  from aoarm_jax.config.schema import ConfigError as ConfigError
  from aoarm_jax.data.tokenizers import DataError as DataError
  from aoarm_jax.data.tokenizers import TokenizerError as TokenizerError
  from aoarm_jax.devices.rendezvous import NeighbourError as NeighbourError
  from aoarm_jax.devices.stopping import Stopped as Stopped
  from aoarm_jax.devices.switches import ForkError as ForkError
  from aoarm_jax.evaluation.inside import Attention as Attention
  from aoarm_jax.evaluation.inside import HiddenStates as HiddenStates
  from aoarm_jax.evaluation.log_prob import LogProb as LogProb
  from aoarm_jax.evaluation.score import Score as Score
  from aoarm_jax.generation.prompts import PromptError as PromptError
  from aoarm_jax.generation.streaming import Token as Token
  from aoarm_jax.generation.texts import Text as Text
  from aoarm_jax.runs.checkpoint import ForeignStepError as ForeignStepError
  from aoarm_jax.runs.locking import EvictedError as EvictedError
  from aoarm_jax.runs.manifest import CheckpointError as CheckpointError
  from aoarm_jax.runs.places import HubError as HubError
  from aoarm_jax.runs.telemetry import NonFiniteError as NonFiniteError
  from aoarm_jax.training.loop import Preempted as Preempted

__version__ = "0.1.0"

# The modules of names that are imported at their first use.
_MODULES = {
  "Model": "aoarm_jax.api",
  "Text": "aoarm_jax.generation.texts",
  "Token": "aoarm_jax.generation.streaming",
  "Score": "aoarm_jax.evaluation.score",
  "HiddenStates": "aoarm_jax.evaluation.inside",
  "Attention": "aoarm_jax.evaluation.inside",
  "LogProb": "aoarm_jax.evaluation.log_prob",
  "UserError": "aoarm_jax.config.errors",
  "CheckpointError": "aoarm_jax.runs.manifest",
  "ConfigError": "aoarm_jax.config.schema",
  "DataError": "aoarm_jax.data.tokenizers",
  "EvictedError": "aoarm_jax.runs.locking",
  "ForeignStepError": "aoarm_jax.runs.checkpoint",
  "ForkError": "aoarm_jax.devices.switches",
  "HubError": "aoarm_jax.runs.places",
  "NeighbourError": "aoarm_jax.devices.rendezvous",
  "NonFiniteError": "aoarm_jax.runs.telemetry",
  "Preempted": "aoarm_jax.training.loop",
  "PromptError": "aoarm_jax.generation.prompts",
  "ReadError": "aoarm_jax.config.reading",
  "Stopped": "aoarm_jax.devices.stopping",
  "TokenizerError": "aoarm_jax.data.tokenizers",
}


def load(
  workdir: os.PathLike | str,
  *,
  read: str = "newest",
  step: int | None = None,
  progress: bool = True,
) -> "Model":
  """Return a trained model.

  Args:
    workdir: run directory, as training wrote it, or the folder of an exported
      model. Its config.json says what the model is. "hf:owner/name" downloads
      an exported model from the Hugging Face hub (extra hub);
      "hf:owner/name@revision" downloads one of its revisions. The name of a
      model that comes with the package loads that model, if no folder here has
      this name.
    read: "newest" or "best", the checkpoint to load.
    step: training steps of the checkpoint to load, in place of `read`.
    progress: whether loading and later calls write a line on stderr when they
      take longer than 2 seconds (config.telemetry.patience_seconds). Most of
      such time is compilation, once for each of a few shapes.

  Raises:
    CheckpointError: there is no run, no complete checkpoint, or none of this
      step; or an exported model is damaged, foreign or of a later version.
    HubError: the model cannot be downloaded.
    ConfigError: config.json cannot be read, or does not fit the devices.
  """
  from aoarm_jax import api

  return api.Model(workdir, read=read, step=step, progress=progress)


def export(
  workdir: os.PathLike | str,
  folder: os.PathLike | str,
  *,
  weights: str = "ema",
  dtype: str = "float32",
  layout: str = "aoarm_jax",
  read: str = "newest",
  step: int | None = None,
  progress: bool = True,
) -> str:
  """Write a trained model as a folder that other tools can read.

  The folder has model.safetensors, config.json, a model card README.md, and
  tokenizer.json unless the config fixes the tokenizer. `load` reads it. It
  appears at once, when all its files are whole.

  Args:
    workdir: what to export; all that `load` takes.
    folder: the folder to be made, here or in a bucket. It must be absent or
      empty.
    weights: "ema" writes the moving average of the weights if the run has one,
      and else the last weights. "last" writes the last weights.
    dtype: "float32" or "bfloat16", the dtype of the weights in the file.
    layout: "aoarm_jax", or "hugging_face" for a folder that transformers reads
      and `convert` reads back. It needs a `causal` model with mlp="swiglu".
    read: see `load`.
    step: see `load`.
    progress: see `load`.

  Returns:
    The path of the folder.

  Raises:
    CheckpointError, ConfigError: see `load`; or `folder` is not empty.
    OSError: the folder cannot be written.
  """
  from aoarm_jax.runs import exporting

  return exporting.of_workdir(
    workdir,
    folder,
    dtype=dtype,
    layout=layout,
    weights=weights,
    read=read,
    step=step,
    progress=progress,
  )


def convert(
  folder: os.PathLike | str,
  workdir: os.PathLike | str,
  *,
  mechanism: str = "two_stream",
  T: int | None = None,
  sentinels: int = 1,
  progress: bool = True,
) -> str:
  """Make a run of a left-to-right model of Hugging Face; torch is not needed.

  The run has one checkpoint, of step 0. `load` reads it, and a new run begins
  with its weights by config.train.start_from. Before any training, the model
  predicts from left to right what the source predicts, with every mechanism.

  Args:
    folder: folder with config.json, tokenizer.json and model.safetensors, or
      several such files with model.safetensors.index.json. The model is of
      LlamaForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel.
    workdir: the run directory to be made, here or in a bucket.
    mechanism: "two_stream", "causal" or, for models with rotary positions,
      "decoupled_rope".
    T: number of positions to generate. None means 1,024, or as many as the
      source has if they are fewer.
    sentinels: 1, or 2 for a model that knows the token behind the text.
    progress: see `load`.

  Returns:
    The path of the run directory.

  Raises:
    CheckpointError: the folder is damaged or foreign, or its model has parts
      that the backbone lacks.
    DataError: tokenizer.json does not fit the model.
    ConfigError: an argument is wrong, or `workdir` holds a model already.
  """
  from aoarm_jax.runs import converting

  return converting.of_folder(
    folder,
    workdir,
    mechanism=mechanism,
    T=T,
    sentinels=sentinels,
    progress=progress,
  )


def push(
  folder: os.PathLike | str,
  repository: str,
  *,
  private: bool = True,
  message: str = "",
) -> str:
  """Upload an exported model to the Hugging Face hub (extra hub).

  All files are verified first. huggingface_hub logs in by itself, after `hf
  auth login`. Fill in the licence in README.md before.

  Args:
    folder: folder of an exported model. Its other files are left out.
    repository: "owner/name" of the model there. It is made if it is absent.
    private: whether a new repository is private. An existing one stays as it
      is.
    message: message of the commit.

  Returns:
    The address of the model.

  Raises:
    CheckpointError: the folder holds no exported model, or a damaged one.
    HubError: the model cannot be uploaded.
    ConfigError: huggingface_hub is not installed, or `repository` has another
      form.
  """
  from aoarm_jax.runs import places

  return places.push(folder, repository, private=private, message=message)


def __getattr__(name: str) -> typing.Any:
  """Import a class of the interface at its first use."""
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  """Return the names of the interface, for completion."""
  return sorted({*globals(), *_MODULES})
