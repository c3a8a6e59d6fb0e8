"""Run directories made by strangers: only errors of our own, soon and small."""

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import tempfile
import time
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import errors, reading
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import (
  checkpoint,
  exported,
  exporting,
  identity,
  manifest,
  metrics,
  opening,
)
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import steps as steps_lib
from aoarm_jax.study import measure
from aoarm_jax.training import resuming

_SECONDS, _MEGABYTES = 2.0, 200
CONFIG = config_rules.validate(
  config_lib.Config(
    model=config_lib.Model(T=8, D=8, L=1, N=1),
    compute=config_lib.Compute(dtype="float32"),
    train=config_lib.Train(steps=8, batch_size=2),
  )
)
TEXT = {"train": "1" * 64, "valid": "2" * 64}
# Values that no field expects; some of them fit some fields.
VALUES = (
  *(None, True, -1, 0, 3, 2**40, 2**70, 10**400, 1.5, float("nan"), 1e308),
  *("", "x", "../../etc/passwd", "\x1b[2J\n", "\ud800", "y" * 3_000_000),
  *([], [[]], [None] * 3, {}, {"a": 1}, {"": {"": {}}}),
)


def make_run(workdir: pathlib.Path):
  """A run of one save at step 5, with the files of a run directory."""
  network = network_lib.Network(CONFIG)
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), network.abstract_params
  )
  run_dir.describe_run(
    workdir,
    config_json=config_lib.to_json(CONFIG),
    argv=["main.py"],
    params=network.abstract_params,
  )
  with metrics.Writer(workdir, start_step=0, primary=True) as writer:
    writer.write(5, "train", loss_nats_per_token=3.0)
    writer.write(5, "valid", estimator="any_order", slot_curve_bits=[4.0, None])
  sums = {"loss": 3.0, "learning_rate": 0.1, "gradient_norm": 1.0}
  with checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  ) as checkpoints:
    checkpoints.save(
      5,
      {"params": zeros},
      data_state={
        "iterator": {"next_batch": 5},
        "interval": [sums],
        **identity.record(TEXT),
      },
      config_json=config_lib.to_json(CONFIG),
      metric=3.0,
    )
  folder = workdir / "cells" / "one"
  folder.mkdir(parents=True)
  (folder / "windows.npz").write_bytes(measure._npz(nats=np.zeros(9)))
  digest = measure._hash((folder / "windows.npz").read_bytes())
  result = {
    "cell": {
      **dict.fromkeys(("mechanism", "size", "orders", "budget", "rate"), ""),
      **dict.fromkeys(("T", "steps", "seed"), 5),
    },
    "config": {"train": {"steps": 5}},
    "estimate": {"bits_per_char": 2.0},
    "text": TEXT,
    "files": {"windows.npz": digest},
  }
  (folder / "result.json").write_text(json.dumps(result))


def use(workdir: pathlib.Path):
  """Read everything that score, load and train read."""
  folder = epath.Path(workdir)
  config = config_rules.validate(opening.read_config(folder))
  checkpoints = checkpoint.Checkpoints(
    folder / "checkpoints", keep_last=1, keep_best=0
  )
  checkpoints.best()
  saved = checkpoints.newest()
  if saved:
    identity.check_same_model(saved, config, folder)
    resuming.check_resume(saved, config, TEXT, folder)
    config_lib.from_json(saved.config_json)
    abstract = network_lib.Network(config).abstract_params
    checkpoints.restore(saved, {"params": abstract})
  metrics.read(folder)
  run_dir.describe_run(
    folder,
    config_json=config_lib.to_json(config),
    argv=["main.py"],
    params={},
  )
  result = measure.read_result(folder / "cells" / "one" / "result.json")
  measure.read_arrays(folder / "cells" / "one", "windows.npz", result)


def use_export(folder):
  """Read an exported model, as a command does."""
  folder = epath.Path(folder)
  config = config_rules.validate(opening.config_here(folder, "newest", None))
  opening.open_run(folder, config)


def places(tree, path=()):
  """Yields the path of every value in a tree of JSON."""
  items = ()
  if isinstance(tree, dict | list):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, child in items:
    yield (*path, key)
    yield from places(child, (*path, key))


def change_json(rng, tree):
  """Changes one value of a tree of JSON in one of several ways."""
  path = rng.choice(list(places(tree)))
  node = tree
  for key in path[:-1]:
    node = node[key]
  match rng.randrange(4) if isinstance(node, dict) else 0:
    case 0 | 1:
      node[path[-1]] = rng.choice(VALUES)
    case 2:
      del node[path[-1]]
    case 3:
      node[rng.choice(("x", "..", "/etc/passwd", "\n"))] = rng.choice(VALUES)
  return tree


def change_manifest(rng, folder):
  """Changes a record, with a checksum that is right."""
  directory = epath.Path(folder / "checkpoints" / "5")
  record = change_json(rng, manifest.read(directory))
  (directory / manifest.NAME).write_bytes(manifest._encode(record))


def change_config_in_manifest(rng, folder):
  directory = epath.Path(folder / "checkpoints" / "5")
  record = manifest.read(directory)
  record["config"] = json.dumps(change_json(rng, json.loads(record["config"])))
  (directory / manifest.NAME).write_bytes(manifest._encode(record))


def change_record(rng, folder):
  """Changes config.json of an export, with a checksum that is right."""
  path = folder / exported.CONFIG
  record = change_json(rng, json.loads(path.read_text()))
  record["sha256"] = exported.checksum(record)
  path.write_text(json.dumps(record))


def change_values(name):
  def change(rng, folder):
    path = folder / name
    path.write_text(json.dumps(change_json(rng, json.loads(path.read_text()))))

  return change


def change_line(rng, folder):
  path = folder / "metrics.jsonl"
  first, *others = path.read_text().splitlines()
  lines = [json.dumps(change_json(rng, json.loads(first))), *others]
  path.write_text("\n".join(lines) + "\n")


def change_bytes(rng, folder):
  """Puts other bytes in place of a file."""
  path = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file()])
  path.write_bytes(
    rng.choice(
      (
        b"",
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b"[" + b"[]," * 3_000_000 + b"[]]",
        b"9" * 100_000,
        b'{"record": {"format_version": 1}, "record": 1}',
        b"\0\xff\xfe" * 100,
        rng.randbytes(10_000),
      )
    )
  )


def change_kind(rng, folder):
  """Puts something that is no regular file in place of a file or a folder."""
  path = rng.choice(sorted(folder.rglob("*")))
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  match rng.randrange(6):
    case 0:
      os.mkfifo(path)
    case 1:
      path.symlink_to("/dev/zero")
    case 2:
      path.symlink_to("/nowhere/at/all")
    case 3:
      path.symlink_to(path.name)
    case 4:
      path.mkdir()
    case 5:
      with path.open("wb") as file:
        file.truncate(1 << 40)


def add_name(rng, folder):
  """Adds something that nobody asked for."""
  places = [folder, *(p for p in sorted(folder.rglob("*")) if p.is_dir())]
  path = rng.choice(places) / rng.choice(
    ("7", "9" * 200, "007", "-1", "manifest.ocdbt", "x", ".lock")
  )
  if path.exists():
    return
  match rng.randrange(4):
    case 0:
      os.mkfifo(path)
    case 1:
      path.symlink_to("/nowhere/at/all")
    case 2:
      path.symlink_to(".")
    case 3:
      path.mkdir()


CHANGES = (
  change_manifest,
  change_config_in_manifest,
  change_values("config.json"),
  change_values("cells/one/result.json"),
  change_line,
  change_bytes,
  change_kind,
  add_name,
)


class StrangersTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    temporary = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(temporary)
    cls.enterClassContext(helpers.quick_compilation())
    make_run(cls.folder / "run")
    use(cls.folder / "run")
    run, out = (epath.Path(cls.folder / name) for name in ("run", "out"))
    exporting.export(CONFIG, run, out)
    use_export(cls.folder / "out")

  def setUp(self):
    super().setUp()
    # The state of git takes longer than all else.
    self.enter_context(
      mock.patch.object(run_dir, "_git_state", return_value=(None, None))
    )

  def copy(self, name, source="run"):
    shutil.copytree(self.folder / source, self.folder / name)
    self.addCleanup(shutil.rmtree, self.folder / name, ignore_errors=True)
    return self.folder / name

  @parameterized.parameters(enumerate(CHANGES))
  def test_changed(self, kind, change):
    # Metrics never keep a run from being resumed.
    self.check_changed("run", use, kind, change, change is not change_line)

  @pytest.mark.thorough
  @parameterized.parameters(
    enumerate((change_record, change_bytes, change_kind, add_name))
  )
  def test_changed_export(self, kind, change):
    # Files that nobody asked for are not looked at.
    least = change is not add_name
    self.check_changed("out", use_export, kind, change, least)

  def check_changed(self, source, use, kind, change, least):
    """26 mutations of each kind: our own errors only, soon and small."""
    rng = random.Random(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for case in range(26):
      workdir = self.copy(f"{kind}-{case}", source)
      change(rng, workdir)
      start = time.thread_time()
      # A read that never ends would hang the test, so it gets a time limit.
      with self.subTest(case=case), _alarm(60):
        try:
          use(workdir)
        # The program says an OSError in one line, if it names its file.
        except (errors.UserError, OSError) as error:
          refused += 1
          if isinstance(error, OSError):
            self.assertStartsWith(str(error.filename), str(workdir))
          self.assertNotIn("\n", str(error))
          self.assertLess(len(str(error)), 3000)
      self.assertLess(time.thread_time() - start, _SECONDS, case)
      shutil.rmtree(workdir)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    self.assertLess((after - before) / 1024, _MEGABYTES)
    self.assertBetween(refused, least, 26)

  @parameterized.parameters("../other", "/etc/hostname", "state/../../x", "")
  def test_a_name_that_leaves_the_step(self, name):
    workdir = self.copy("leaves")
    directory = epath.Path(workdir / "checkpoints" / "5")
    record = manifest.read(directory)
    record["files"][name] = {"bytes": 3, "blake2b": "0" * 64}
    manifest.write(directory, record)
    opened = []
    with (
      mock.patch.object(
        reading, "open_file", lambda path, *args: opened.append(path)
      ),
      self.assertRaisesRegex(manifest.BrokenError, "not a name inside"),
    ):
      manifest.verify(directory, record)
    self.assertEmpty(opened)

  @parameterized.parameters("config.json", "checkpoints/5/manifest.json")
  def test_a_link_out_of_the_folder(self, name):
    workdir, outside = self.copy("linked"), self.folder / "outside"
    (workdir / name).rename(outside)
    (workdir / name).symlink_to(outside)
    with self.assertRaisesRegex(errors.UserError, "is a link out of"):
      use(workdir)

  def test_a_step_that_leads_nowhere(self):
    """Every reader comes to an end, and says what it found."""
    workdir = self.copy("dangling")
    (workdir / "checkpoints" / "7").symlink_to("/nowhere/at/all")
    with _alarm(60):
      use(workdir)
      shutil.rmtree(workdir / "checkpoints" / "5")
      with self.assertRaisesRegex(checkpoint.CheckpointError, "no checkpoint"):
        opening.open_run(epath.Path(workdir), CONFIG)

  def test_steps_that_always_vanish(self):
    workdir = self.copy("vanishing")
    steps = steps_lib.Steps(epath.Path(workdir / "checkpoints"))
    with (
      _alarm(60),
      mock.patch.object(steps, "folders", return_value=[6, 7]),
      self.assertRaisesRegex(checkpoint.CheckpointError, "vanish while"),
    ):
      steps.newest()

  def test_a_link_is_deleted_and_not_what_it_leads_to(self):
    workdir = self.copy("links")
    (workdir / "checkpoints" / "5").rename(workdir / "mine")
    (workdir / "checkpoints" / "5").symlink_to(workdir / "mine")
    steps_lib.Steps(epath.Path(workdir / "checkpoints")).delete(5)
    self.assertFalse((workdir / "checkpoints" / "5").is_symlink())
    self.assertTrue((workdir / "mine" / "manifest.json").exists())


@contextlib.contextmanager
def _alarm(seconds):
  """Raises in the main thread if the time inside is longer."""

  def ring(*_):
    raise AssertionError(f"longer than {seconds} s")

  former = signal.signal(signal.SIGALRM, ring)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


if __name__ == "__main__":
  absltest.main()
