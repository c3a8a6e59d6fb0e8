"""The arrows between the rooms of the house, read from the imports."""

import ast
import pathlib
import re
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Room: what it may import besides itself. Rows only point to rows below. All
# may import the leaves, and the leaves import each other only.
ARROWS = {
  "launch": "",
  "configs": "experiments",
  "experiments": "",
  "strip": "aoarm_jax checkpoint data figures",
  "aoarm_jax": "api",
  "api": "generate score prompts restore data",
  "main": "study matching pod train evaluate generate score prompts restore "
  "export checkpoint data pallas_kernels",
  "pod": "train train_state model pallas_kernels",
  "scaling": "train train_state model pallas_kernels",
  "decode_benchmark": "decode_timing restore checkpoint figures pallas_kernels",
  "decode_timing": "decode decode_steps diffusion sampling restore train_state "
  "model orders",
  "study": "matching train evaluate estimators checkpoint decode diffusion "
  "sampling data train_state model optimizer orders figures pallas_kernels",
  "export": "restore checkpoint data train_state model",
  "train": "evaluate generate restore checkpoint data objective train_state "
  "model optimizer orders figures",
  "evaluate": "estimators restore checkpoint data train_state figures",
  "estimators": "objective train_state orders",
  "generate": "prompts decode diffusion sampling restore checkpoint data "
  "train_state model orders",
  "score": "prompts objective restore data train_state orders",
  "prompts": "data",
  "decode": "decode_steps sampling objective model orders",
  "decode_steps": "sampling orders",
  "diffusion": "sampling objective model orders",
  "sampling": "",
  "matching": "train_state model",
  "restore": "checkpoint data train_state optimizer",
  "train_state": "model optimizer",
  "objective": "model orders",
  "model": "orders pallas_kernels",
  "orders": "",
  "optimizer": "",
  "checkpoint": "manifest",
  "manifest": "",
  "data": "",
  "figures": "",
  "pallas_kernels": "",
}
LEAVES = (
  "arguments",
  "config",
  "config_rules",
  "mechanisms",
  "distributed",
  "sharding",
  "telemetry",
  "hlo",
  "run_dir",
)

# Libraries that are kept in some rooms; () keeps them out of all.
KEPT_IN = {
  r"absl\.(flags|app)": ("main",),
  r"ml_collections\.config_flags": ("main",),
  r"ml_collections": ("main", "config", "experiments"),
  r"orbax": ("checkpoint",),
  r"grain": ("data",),
  r"flax": ("model", "train_state"),
  r"matplotlib": ("figures", "study"),
  r"tensorboardX": ("run_dir",),
  r"tensorflow|torch|clu": (),
}
OWN = ("aoarm_jax", "pallas_kernels", "configs", "launch")


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
  """What in the imports of a file of `room` the table does not allow."""
  if room in LEAVES:
    allowed = set(LEAVES)
  elif room in ARROWS:
    allowed = {room, *ARROWS[room].split(), *LEAVES}
  else:
    return [f"{room}: a room without a row in ARROWS"]
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
    if name == "pallas_kernels/__init__.py":
      self.skipTest("the package's interface")
    for dotted in imports((ROOT / name).read_text()):
      if dotted.split(".")[0] in OWN:
        path = ROOT / dotted.replace(".", "/")
        self.assertTrue(path.is_dir() or path.with_suffix(".py").exists(),
                        f"{name} imports {dotted}: no module")  # fmt: skip

  def test_arrows_point_downward(self):
    rooms = list(ARROWS)
    for i, (room, below) in enumerate(ARROWS.items()):
      for other in below.split():
        self.assertIn(other, rooms[i + 1 :], f"{room} -> {other}")

  @parameterized.parameters(
    ("model", "from aoarm_jax import train_state"),
    ("model", "def f():\n  from aoarm_jax import train"),
    ("orders", "import aoarm_jax.model.layers"),
    ("data", "from aoarm_jax.model import rotary"),
    ("evaluate", "from aoarm_jax import train"),
    ("generate", "from aoarm_jax import evaluate"),
    ("restore", "from aoarm_jax import generate"),
    ("config", "from aoarm_jax import orders"),
    ("telemetry", "from aoarm_jax import manifest"),
    ("sharding", "from aoarm_jax.data import corpora"),
    ("configs", "from aoarm_jax import train"),
    ("train", "from absl import app"),
    ("train", "import absl.flags as f"),
    ("train", "from orbax import checkpoint"),
    ("train", "import grain.python"),
    ("train", "from flax import nnx"),
    ("objective", "import flax.nnx"),
    ("data", "import tensorflow as tf"),
    ("pallas_kernels", "import numpy as np"),
    ("pallas_kernels", "from aoarm_jax import config"),
    ("data", "from . import corpora"),
    ("attic", "import jax"),
  )
  def test_what_is_wrong_is_seen(self, room, source):
    self.assertLen(complaints(room, source), 1)

  def test_what_is_right_is_not(self):
    source = "import re\nfrom absl import logging\nfrom aoarm_jax import config"
    for room in (*ARROWS, *LEAVES):
      if room != "pallas_kernels":
        self.assertEqual(complaints(room, source), [])


if __name__ == "__main__":
  absltest.main()
