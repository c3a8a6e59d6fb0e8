"""The model card of an exported model: a README.md for people and hubs."""

from typing import Any

from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import text as text_lib

_CARD = """---
library_name: aoarm_jax
pipeline_tag: text-generation
tags: {tags}
# license: fill in the licence, as in apache-2.0
---

# {name}

{what}
The library aoarm_jax has trained and written it.

**Licence: to be filled in by whoever publishes this model.**

## How to load it

```python
import aoarm_jax

model = aoarm_jax.load("path/of/this/folder")
print(model.generate()[0].text)
```

From the Hugging Face hub, the path is `"hf:owner/name"`.

`model.safetensors` can be read without aoarm_jax. The page "Exporting" of its
documentation lists the names of all arrays, and the mathematics.

## The model

{facts}

## Training

{training}

## Evaluation

{evaluation}
"""
_NO_EVALUATION = """The run has no evaluation of these weights. To add one, run
`--mode=eval` on the run and export it again."""
_ANY_ORDER = """This is an any-order language model of the mechanism `{}`.
It generates texts, fills blanks and scores texts in any order of the tokens."""
_LEFT_TO_RIGHT = """This is a language model of the mechanism `{}`. It generates
and scores texts from left to right."""


def text(record: dict[str, Any]) -> str:
  """Return the model card of an exported model.

  Args:
    record: the values of its config.json, see exported.py.
  """
  config = config_lib.from_dict(record["config"])
  model, weights = config.model, record["weights"]
  part = "the moving average (EMA) of the weights"
  if weights["part"] == "params":
    part = "the last weights of training"
  facts = {
    "mechanism": f"`{model.mechanism}`",
    "parameters": f"{weights['parameters']:,}",
    "weights": f"{part}, {weights['dtype']}",
    "tokens of a text (T)": f"{model.T:,}",
    "width, layers, heads": f"{model.D:,}, {model.L}, {model.N}",
    "tokenizer": f"`{config.data.tokenizer}`, {record['vocabulary']:,} symbols",
    "documents": f"`{config.data.documents}`",
    "written by": record["written_by"],
  }
  what, tags = _ANY_ORDER, ["jax", "any-order", "infilling"]
  if model.kind.left_to_right:
    what, tags = _LEFT_TO_RIGHT, ["jax"]
  return _CARD.format(
    name=f"{config.name}-{config.variant}",
    tags=f"[{', '.join(tags)}]",
    what=what.format(model.mechanism),
    facts=text_lib.markdown_table(("property", "value"), facts.items()),
    training=text_lib.markdown_table(
      ("property", "value"), _training(record).items()
    ),
    evaluation=_evaluation(record["evaluations"]),
  )


def _training(record):
  """Return what is known about the training, by its names."""
  training = record["training"]
  source = training["path"] or "the built-in English novels"
  facts = {
    "text": f"{source} (`data.corpus={training['corpus']}`)",
    "optimizer steps": f"{training['step']:,}",
    "tokens read": f"{training['tokens']:,}",
    "first weights": training["started_from"] or "random",
    "sha256 of the checkpoint": f"`{training['checkpoint']}`",
  }
  for split, sha256 in training["text"].items():
    facts[f"sha256 of the split {split}"] = f"`{sha256}`"
  return facts


def _evaluation(rows):
  """Return the table of estimates."""
  if not rows:
    return _NO_EVALUATION
  bits = [f"bits_per_{unit}" for unit in ("token", "char", "byte")]
  bits = [name for name in bits if any(name in row for row in rows)]

  def cells(row):
    values = [f"{row[name]:.4f}" if name in row else "" for name in bits]
    error = row.get("standard_error_bits")
    return (
      row["source"],
      row["split"],
      f"`{row['estimator']}`",
      *values,
      "" if error is None else f"{error:.4f}",
      f"{row['tokens']:,}",
    )

  head = [name.replace("_", " ") for name in bits]
  table = text_lib.markdown_table(
    ("source", "split", "estimator", *head, "±", "tokens"),
    map(cells, rows),
  )
  return (
    f"{table}\n\nAn evaluation is from `--mode=eval`, a validation from "
    "training at this step,\nand a study from `--mode=study`. The sign ± is "
    "one standard error."
  )
