"""Explains the fields of a config to people: --help and --mode=config."""

import dataclasses
import shlex
import textwrap
from typing import Any

from aoarm_jax.config import schema

_WIDTH = 80
_BINDS = {
  "model": "a checkpoint is bound to it",
  "run": "a run is bound to it",
}


def limits(field: dataclasses.Field[Any]) -> list[str]:
  """Return the bounds of a field's values, such as ["≥ 1"]."""
  signs = {"above": ">", "low": "≥", "below": "<", "high": "≤"}
  return [
    f"{sign} {field.metadata[name]:g}"
    for name, sign in signs.items()
    if field.metadata.get(name) is not None
  ]


def table(config: schema.Config) -> str:
  """Return every field with its value, type, default, range and meaning.

  Args:
    config: its values are shown, beside the defaults.

  Returns:
    Lines of at most 80 characters, where words allow it. Fields stand in their
    sections, and are written as on the command line.
  """
  groups: dict[str, list[str]] = {}
  defaults = (value for _, _, value in schema.leaves(schema.Config()))
  for (path, field, value), default in zip(schema.leaves(config), defaults):
    section = path.removeprefix("config.").rpartition(".")[0]
    groups.setdefault(section, [_title(config, section)])
    groups[section].append(_field(path, field, value, default))
  return "\n\n".join("\n".join(lines) for lines in groups.values())


def _title(config, section):
  """Return the first sentence about a section."""
  node = getattr(config, section) if section else config
  words = (node.__doc__ or "").strip().splitlines()[0]
  return f"{section}: {words}" if section else words


def _field(path, field, value, default):
  """Return the lines of one field."""
  data = field.metadata
  facts = [schema.KINDS[type(default)], *limits(field)]
  facts.append(f"default {_written(default)}")
  if data["binds"]:
    facts.append(_BINDS[data["binds"]])
  lines = [
    f"  --{path}={_written(value)}",
    _wrapped(data["doc"]),
    _wrapped(", ".join(facts)),
  ]
  if choices := data.get("choices"):
    some = "any of" if isinstance(default, tuple) else "one of"
    lines.append(_wrapped(f"{some}: {', '.join(choices)}"))
  return "\n".join(lines)


def _written(value):
  """Return a value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, str):
    return repr(value) if "\n" in value else shlex.quote(value)
  return f'"{value}"' if isinstance(value, tuple) else repr(value)


def _wrapped(text):
  indent = " " * 6
  return textwrap.fill(
    " ".join(text.split()),
    _WIDTH,
    initial_indent=indent,
    subsequent_indent=indent,
    break_long_words=False,
    break_on_hyphens=False,
  )
