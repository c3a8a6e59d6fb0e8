"""A field of a section: its default, meaning, unit, range and binding."""

import dataclasses
from typing import Any


def field(
  default: Any,
  doc: str,
  *,
  low: float | None = None,
  high: float | None = None,
  above: float | None = None,
  below: float | None = None,
  choices: tuple[str, ...] | None = None,
  of: type = int,
  binds: str = "",
) -> Any:
  """Return a dataclass field with its documentation, range, and binding.

  Args:
    default: the default value. Its type is the type of the field.
    doc: the meaning and the unit, for users.
    low: the least allowed value, inclusive.
    high: the greatest allowed value, inclusive.
    above: the lower bound, exclusive.
    below: the upper bound, exclusive.
    choices: the allowed values.
    of: the type of a tuple's items, for tuples without choices.
    binds: "model" if another value makes a checkpoint unusable. "run" if
      another value only prevents resuming a run. "" if the value may change at
      any time.
  """
  metadata = dict(
    doc=doc,
    low=low,
    high=high,
    above=above,
    below=below,
    choices=choices,
    of=of,
    binds=binds,
  )
  return dataclasses.field(default=default, metadata=metadata)
