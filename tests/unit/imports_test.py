"""The arrows between the rooms of the house, read from the imports."""

import ast
import pathlib
import re
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Rooms are the folders, and the modules beside them. From top to bottom: a room
# may import itself and what is on the floors below its own.
FLOORS = (
  "launch configs",
  "main",
  "command_line",
  "study benchmark",
  "tools",
  "aoarm_jax",
  "api",
  "training",
  "evaluation",
  "generation",
  "runs",
  "model",
  "objective devices",
  "lengths",
  "orders data",
  "config pallas_kernels",
)
# Rooms that may not import all that is below.
ONLY = {
  "launch": "config",
  "command_line": "config",
  "configs": "config",
  "objective": "lengths orders config",
  "lengths": "orders",
  "devices": "config pallas_kernels",
  "orders": "config",
}

# Libraries that are kept in some rooms; () keeps them out of all.
KEPT_IN = {
  r"absl\.(flags|app)": ("main", "command_line"),
  r"ml_collections\.config_flags": ("main", "command_line"),
  r"ml_collections": ("main", "command_line", "config"),
  r"orbax": ("runs",),
  r"grain": ("data",),
  r"array_record": ("data",),
  r"tokenizers": ("data",),
  r"pyarrow": ("data",),
  r"flax": ("model",),
  r"matplotlib": ("runs",),
  r"safetensors|huggingface_hub": ("runs",),
  r"tensorboardX|wandb": ("runs",),
  r"lm_eval": ("benchmark",),
  r"tensorflow|torch|clu": (),
}
OWN = ("aoarm_jax", "pallas_kernels", "configs", "launch")


def floors() -> dict[str, int]:
  """The floor of every room, 0 at the top."""
  return {room: i for i, rooms in enumerate(FLOORS) for room in rooms.split()}


def below(room: str) -> set[str]:
  """The rooms that `room` may import besides itself."""
  if room in ONLY:
    return set(ONLY[room].split())
  floor = floors()
  return {other for other in floor if floor[other] > floor[room]}


def imports(source: str) -> list[str]:
  """Dotted names of all that is imported, wherever in the file."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      found += [f"{module}.{alias.name}" for alias in node.names]
  return found


def room_of(dotted: str) -> str:
  """The room of a module of our own, as in aoarm_jax.model.layers."""
  parts = dotted.split(".")
  if parts[0] != "aoarm_jax":
    return parts[0]
  return parts[1] if len(parts) > 1 and parts[1] != "__init__" else parts[0]


def complaints(room: str, source: str) -> list[str]:
  """What in the imports of a file of `room` the floors do not allow."""
  if room not in floors():
    return [f"{room}: a room on no floor of FLOORS"]
  allowed = {room, *below(room)}
  wrong = []
  for name in imports(source):
    if name.split(".")[0] in OWN:
      if room == "pallas_kernels" and room_of(name) != room:
        wrong.append(f"{room} imports {name}: it may import jax only")
      elif room_of(name) not in allowed:
        wrong.append(f"{room} imports {name}: not one of {sorted(allowed)}")
    elif name.startswith("."):
      wrong.append(f"{room} imports {name}: relative")
    elif room == "pallas_kernels" and name.split(".")[0] not in (
      "jax",
      *sys.stdlib_module_names,
    ):
      wrong.append(f"{room} imports {name}: it may import jax only")
    for pattern, rooms in KEPT_IN.items():
      if re.match(rf"({pattern})(\.|$)", name) and room not in rooms:
        wrong.append(f"{room} imports {name}: kept in {rooms or 'no room'}")
  return wrong


def files():
  for folder in OWN:
    for path in sorted((ROOT / folder).rglob("*.py")):
      yield path.relative_to(ROOT).as_posix()


class ImportsTest(parameterized.TestCase):
  @parameterized.parameters(*files())
  def test_arrows(self, name):
    room = room_of(name.removesuffix(".py").replace("/", "."))
    self.assertEqual(complaints(room, (ROOT / name).read_text()), [])

  @parameterized.parameters(*files())
  def test_modules_are_imported_and_not_names(self, name):
    packages = ("pallas_kernels", "aoarm_jax", "aoarm_jax/api")
    if name.removesuffix("/__init__.py") in packages:
      self.skipTest("the package's interface")
    for dotted in imports((ROOT / name).read_text()):
      if dotted.split(".")[0] in OWN:
        path = ROOT / dotted.replace(".", "/")
        self.assertTrue(
          path.is_dir() or path.with_suffix(".py").exists(),
          f"{name} imports {dotted}: no module",
        )

  def test_arrows_point_downward(self):
    rooms = " ".join(FLOORS).split()
    self.assertLen(rooms, len(set(rooms)))
    floor = floors()
    for room in ONLY:
      for other in below(room):
        self.assertGreater(floor[other], floor[room], f"{room} -> {other}")

  def test_every_room_is_there(self):
    there = {
      room_of(name.removesuffix(".py").replace("/", ".")) for name in files()
    }
    self.assertEqual(there, set(floors()))

  @parameterized.parameters(
    ("model", "from aoarm_jax.training import state"),
    ("model", "def f():\n  from aoarm_jax.training import loop"),
    ("model", "from aoarm_jax.runs import manifest"),
    ("orders", "import aoarm_jax.model.layers"),
    ("data", "from aoarm_jax.model import rotary"),
    ("evaluation", "from aoarm_jax.training import loop"),
    ("generation", "from aoarm_jax.evaluation import evaluate"),
    ("runs", "from aoarm_jax.generation import texts"),
    ("config", "from aoarm_jax import orders"),
    ("objective", "from aoarm_jax.devices import sharding"),
    ("devices", "from aoarm_jax.data import corpora"),
    ("evaluation", "from aoarm_jax import api"),
    ("api", "import aoarm_jax.tools.scaling"),
    ("tools", "from aoarm_jax import main"),
    ("configs", "from aoarm_jax.training import loop"),
    ("training", "from absl import app"),
    ("training", "import absl.flags as f"),
    ("training", "from orbax import checkpoint"),
    ("training", "import grain.python"),
    ("training", "from flax import nnx"),
    ("objective", "import flax.nnx"),
    ("data", "import tensorflow as tf"),
    ("runs", "import tokenizers"),
    ("tools", "import pyarrow.parquet as pq"),
    ("tools", "import lm_eval.api.model"),
    ("pallas_kernels", "import numpy as np"),
    ("pallas_kernels", "from aoarm_jax.config import schema"),
    ("data", "from . import corpora"),
    ("attic", "import jax"),
  )
  def test_what_is_wrong_is_seen(self, room, source):
    self.assertLen(complaints(room, source), 1)

  def test_what_is_right_is_not(self):
    for room in floors():
      source = (
        "import re\n"
        if room == "pallas_kernels"
        else ("import re\nfrom absl import logging\n")
      )
      for other in (room, *below(room)):
        source += f"import {other if other in OWN else f'aoarm_jax.{other}'}\n"
      self.assertEqual(complaints(room, source), [])


if __name__ == "__main__":
  absltest.main()
