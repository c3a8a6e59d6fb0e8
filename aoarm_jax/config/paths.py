"""Turn what a user typed into a path.

Flags, fields of the config and arguments of the Python interface all go through
`of`. So a text names the same place everywhere.
"""

import os
import re

from etils import epath

from aoarm_jax.config import schema as config_lib

BUCKETS = ("gs", "s3", "az")
# Two letters at least, since C:\ is a drive. pathlib makes one slash of two.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/+", re.IGNORECASE)


def of(text: os.PathLike | str, name: str) -> epath.Path:
  """Return the path that a text means; look at no file.

  A leading `~` or `~user` is the home folder. Paths in buckets begin with
  gs://, s3:// or az://.

  Args:
    text: what the user typed.
    name: the flag or field that it was given for, for messages.

  Raises:
    ConfigError: the text is the address of something else than a bucket, or
      its home folder is unknown; or it is no text and no path.
  """
  if isinstance(text, os.PathLike):
    text = os.fspath(text)
  if not isinstance(text, str):
    raise config_lib.ConfigError(
      f"{name}={text!r}: is no path; give a str or a pathlib.Path"
    )
  address = scheme(text)
  if address and not text.startswith(tuple(f"{s}://" for s in BUCKETS)):
    buckets = ", ".join(f"{bucket}://" for bucket in BUCKETS)
    download = "; download the file first" * address.lower().startswith("http")
    raise config_lib.ConfigError(
      f"{name}={text}: addresses that begin with {address} are not read: "
      f"name a place on this machine or in a bucket ({buckets}){download}"
    )
  path = epath.Path(text).expanduser()
  if text.startswith("~") and str(path).startswith("~"):
    raise config_lib.ConfigError(
      f"{name}={text}: the home folder of {path.parts[0]} is unknown; write "
      f"./{text} for a folder of that name"
    )
  return path


def scheme(text: str) -> str:
  """Return how an address begins, as in "https://", or "" for a path."""
  match = _SCHEME.match(text)
  return match[0] if match else ""


def reached(path: epath.Path, name: str) -> epath.Path:
  """Return the path after a first look, which finds that a client is missing.

  Args:
    path: the path, as `of` returns it.
    name: the flag or field that it was given for, for messages.

  Raises:
    ConfigError: a bucket cannot be reached.
  """
  if "://" in str(path):
    try:
      path.exists()
    except (ImportError, OSError) as error:
      line = str(error).splitlines()[0] if str(error) else repr(error)
      raise config_lib.ConfigError(f"{name}={path}: {line}") from error
  return path
