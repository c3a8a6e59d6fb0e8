"""The built-in text: docstrings of the Python, numpy and jax at hand.

Needs no download, so that every command runs on a fresh machine. The sources
are read by ast and never imported. What comes out depends on the installed
versions: a smoke test, not a benchmark.
"""

import ast
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence

from absl import logging

from aoarm_jax.data import tokenizers

# Raise it whenever the same sources would give another text or another file.
FORMAT = 1
SPLITS = ("train", "valid", "test")
# Tests, and what lies in the standard library's folder but is not of it.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_FIX = "give a text of your own with --config.data.path="
_DIGITS = b"zero one two three four five six seven eight nine".split()


@dataclasses.dataclass(frozen=True)
class Source:
  """A package, or the standard library (prefix "").

  Attributes:
    title: name and version, for messages and the name of the cache file.
    prefix: of the names of its modules, with a dot at the end.
    root: the folder of its source files.
  """

  title: str
  prefix: str
  root: pathlib.Path


def installed() -> list[Source]:
  """The standard library, numpy and jax of the running interpreter.

  Raises:
    DataError: numpy or jax is not installed as files.
  """
  stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
  sources = [Source(f"python{platform.python_version()}", "", stdlib)]
  for name in ("numpy", "jax"):
    # Of a top-level name find_spec does not import anything.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
      raise tokenizers.DataError(
        f"the built-in text is made from {name}'s docstrings, and {name} is "
        f"not installed here: install it, or {_FIX}"
      )
    root = pathlib.Path(spec.submodule_search_locations[0])
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # Found on PYTHONPATH.
      version = "-unknown"
    sources.append(Source(f"{name}{version}", f"{name}.", root))
  return sources


def modules(source: Source) -> list[tuple[str, pathlib.Path]]:
  """(dotted name, file) of a source's modules, sorted by name.

  Raises:
    DataError: there is none.
  """
  found = []
  for folder, subfolders, files in os.walk(source.root):
    subfolders[:] = sorted(set(subfolders) - _LEFT_OUT)
    for file in files:
      if file.endswith(".py"):
        path = pathlib.Path(folder, file)
        parts = path.relative_to(source.root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found.append(((source.prefix + ".".join(parts)).rstrip("."), path))
  if not found:
    raise tokenizers.DataError(
      f"the built-in text is made from docstrings, and {source.root} holds no "
      f".py files of {source.title}: install its sources, or {_FIX}"
    )
  return sorted(found)


def normal_form(text: str) -> bytes:
  """Text8 form: a to z and single spaces, digits spelled out.

  As Matt Mahoney's wikifil.pl does: lower case, each digit as a word, each run
  of anything else (so also of letters beyond a to z) as one space.
  """
  data = text.encode("utf-8", errors="replace").lower()
  data = re.sub(rb"\d", lambda m: b" %b " % _DIGITS[int(m[0])], data)
  return re.sub(rb"[^a-z]+", b" ", data).strip()


def of_source(code: bytes) -> Iterator[str]:
  """Docstrings of a module and of its classes and functions, in their order.

  Raises:
    SyntaxError, ValueError, RecursionError, MemoryError: as ast.parse does.
  """
  with warnings.catch_warnings():
    # Other people's invalid escapes: Deprecation- before 3.12, Syntax- since.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", SyntaxWarning)
    stack: list[ast.AST] = [ast.parse(code)]
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  while stack:
    node = stack.pop()
    if isinstance(node, documented):
      text = ast.get_docstring(node)
      if text:
        yield text
    # Statements only: no expression holds a docstring, and most nodes are
    # expressions.
    for field in ("finalbody", "orelse", "handlers", "cases", "body"):
      children = getattr(node, field, [])
      if isinstance(children, list):  # A lambda's body is an expression.
        stack.extend(reversed(children))


def split_of(module: str) -> str:
  """The split of a module, by a hash of its name: 90/5/5% of the modules."""
  digest = hashlib.sha256(module.encode()).digest()
  percent = int.from_bytes(digest[:8], "big") % 100
  return SPLITS[(percent >= 90) + (percent >= 95)]


def build(files: Sequence[tuple[str, pathlib.Path]]) -> dict[str, bytes]:
  """Makes the text of each split.

  Docstrings of equal normal form are kept once, where they come first (order
  of `files`, then of the source), whichever splits the others are in: so no
  docstring is in two splits either.

  Args:
    files: (module, file) pairs, see `modules`.

  Returns:
    Split to text in normal form; docstrings are joined by a space.
  """
  start, skipped = time.monotonic(), 0
  logging.info("building the built-in text from %d modules ...", len(files))
  texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
  seen = {b""}
  for module, path in files:
    try:
      found = [normal_form(text) for text in of_source(path.read_bytes())]
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
      skipped += 1
      continue
    for text in found:
      if text not in seen:
        seen.add(text)
        texts[split_of(module)].append(text)
  splits = {split: b" ".join(texts[split]) for split in SPLITS}
  logging.info(
    "built it: %d docstrings, %d characters, %d files skipped, %.1f s",
    len(seen) - 1, sum(map(len, splits.values())), skipped,
    time.monotonic() - start,
  )  # fmt: skip
  return splits


def load(sources: Sequence[Source] | None = None) -> dict[str, bytes]:
  """The splits, from the user's cache folder if they lie there.

  The cache file's name holds the versions, and a digest of names and sizes of
  the source files: two builds of one version may differ.

  Args:
    sources: the packages read; None: `installed`.

  Returns:
    Split to text in normal form.

  Raises:
    DataError: a source is missing.
  """
  sources = installed() if sources is None else sources
  files = [pair for source in sources for pair in modules(source)]
  listing = [
    (name, path.stat().st_size) for name, path in files if path.exists()
  ]
  digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
  titles = "-".join(source.title for source in sources)
  try:
    cache = cache_folder() / f"docstrings{FORMAT}-{titles}-{digest}.txt"
  except RuntimeError as error:  # No home folder.
    logging.warning("the built-in text is not cached: %s", error)
    return build(files)
  splits = _read_cache(cache)
  if splits is None:
    splits = build(files)
    _write_cache(cache, splits)
  return splits


def cache_folder() -> pathlib.Path:
  """$XDG_CACHE_HOME/aoarm_jax, by default ~/.cache/aoarm_jax."""
  folder = os.environ.get("XDG_CACHE_HOME", "")
  # The XDG specification: a relative path is invalid and to be ignored.
  if os.path.isabs(folder):
    return pathlib.Path(folder, "aoarm_jax")
  return pathlib.Path.home() / ".cache" / "aoarm_jax"


def _read_cache(path: pathlib.Path) -> dict[str, bytes] | None:
  """The splits, or None where there is no good file."""
  try:
    checksum, content = path.read_bytes().split(b"\n", 1)
    if hashlib.sha256(content).hexdigest().encode() != checksum:
      raise ValueError("wrong checksum")
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    logging.warning("%s is not usable (%s): building it again", path, error)
    return None
  return dict(zip(SPLITS, content.split(b"\n")))


def _write_cache(path: pathlib.Path, splits: dict[str, bytes]):
  """Writes atomically: whoever reads finds a whole file or none."""
  content = b"\n".join(splits[split] for split in SPLITS)
  checksum = hashlib.sha256(content).hexdigest().encode()
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as file:
      file.write(checksum + b"\n" + content)
    os.replace(temporary, path)
  except OSError as error:
    logging.warning("the built-in text is not cached in %s: %s", path, error)
    if temporary is not None:
      pathlib.Path(temporary).unlink(missing_ok=True)
