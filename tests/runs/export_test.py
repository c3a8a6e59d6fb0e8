"""Exported models: what is written, what is read, and what is refused."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import helpers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import absltest, parameterized
from etils import epath
from safetensors import numpy as safetensors_numpy

import aoarm_jax
from aoarm_jax import command_line, orders
from aoarm_jax.config import errors
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, tokenizers
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import (
  checkpoint,
  disk,
  exported,
  exporting,
  identity,
  metrics,
  places,
)
from aoarm_jax.training import loop, starting

PAGE = (helpers.ROOT / "docs" / "exporting.md").read_text()
TEXT = {"train": "1" * 64, "valid": "2" * 64}
STEP = 5
_folder = epath.Path(tempfile.mkdtemp())
_made = {}
setUpModule, _leave = helpers.around_module(helpers.quick_compilation())


def tearDownModule():
  _leave()
  shutil.rmtree(_folder)


def config_of(mechanism="two_stream", *, ema=0.0, tokenizer="char27", **model):
  sizes = dict(T=9, D=12, L=2, N=3) | model
  order = "left_to_right" if mechanism == "causal" else "uniform"
  return config_rules.validate(
    config_lib.Config(
      name="tiny",
      model=config_lib.Model(mechanism=mechanism, **sizes),
      data=config_lib.Data(path="/home/me/novels", tokenizer=tokenizer),
      compute=config_lib.Compute(dtype="float32"),
      optimizer=config_lib.Optimizer(ema_decay=ema),
      train=config_lib.Train(steps=8, batch_size=2),
      orders=config_lib.Orders(family=order),
      sample=config_lib.Sample(order=order),
      eval=config_lib.Eval(estimators=("left_to_right",)),
    )
  )


def make_run(workdir, config, symbols=None):
  """A run of one save, which no training made: {part: parameters}."""
  network = network_lib.Network(config, None, symbols)
  state = {"params": tiny.sharp(network)}
  if config.optimizer.ema_decay:
    state["ema"] = tiny.sharp(network, seed=1)
  text = config_lib.to_json(config)
  disk.write_atomically(workdir / "config.json", text)
  with checkpoint.Checkpoints(
    workdir / "checkpoints", keep_last=1, keep_best=0
  ) as checkpoints:
    checkpoints.save(
      STEP,
      state,
      data_state=identity.record(TEXT, symbols.sha256 if symbols else ""),
      config_json=text,
      tokenizer=symbols.state if symbols else b"",
    )
  return network, state


def record_of(folder):
  return json.loads((folder / "config.json").read_text())


def write_record(folder, record, *, is_sealed=True):
  """Writes config.json with the checksums of what now stands there."""
  if is_sealed:
    for name, file in record["files"].items():
      data = (folder / name).read_bytes()
      file |= {"bytes": len(data), "sha256": exported.sha256(data)}
    record |= {"sha256": exported.checksum(record)}
  (folder / "config.json").write_text(json.dumps(record))


class FolderTest(parameterized.TestCase):
  """Each test has a folder of its own, and one line for every error."""

  def setUp(self):
    super().setUp()
    self.folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.run = self.folder / "run"

  def make_run(self, config=None, symbols=None):
    """A copy of the run of a config, which is made once."""
    config = config or config_of()
    made = _folder / f"{abs(hash((config, symbols)))}"
    if made not in _made:
      _made[made] = make_run(made, config, symbols)
    shutil.copytree(made, self.run)
    return _made[made]

  def export(self, name="out", source=None, **options):
    folder = self.folder / name
    got = aoarm_jax.export(source or self.run, folder, **options)
    self.assertEqual(got, os.fspath(folder))
    return folder

  @contextlib.contextmanager
  def refused(self, regex, kind=errors.UserError):
    with self.assertRaisesRegex(kind, regex) as raised:
      yield
    self.assertNotIn("\n", str(raised.exception))


class ExportTest(FolderTest):
  @parameterized.product(
    mechanism=("two_stream", "decoupled_rope"),
    case=(("float32", 1, False), ("bfloat16", 2, True)),
  )
  def test_numpy_alone_computes_the_logits(self, mechanism, case):
    """The script reads the folder as the page says, without this package."""
    dtype, sentinels, tied = case
    config = config_of(mechanism, sentinels=sentinels, tied=tied)
    network, state = self.make_run(config)
    folder = self.export(dtype=dtype)
    tokens = tiny.tokens(4, 9, 27)
    order = tiny.orders_of(mechanism, 4, 9)
    np.savez(self.folder / "in.npz", tokens=tokens, order=order)
    script = pathlib.Path(__file__).with_name("plain_numpy.py")
    files = (folder, self.folder / "in.npz", self.folder / "out.npz")
    subprocess.run([sys.executable, script, *files], check=True)
    got = np.load(self.folder / "out.npz")
    self.assertIn("safetensors", got["loaded"])
    self.assertNoCommonElements(
      {name.partition(".")[0] for name in got["loaded"]},
      ("aoarm_jax", "pallas_kernels", "jax", "jaxlib", "flax", "ml_dtypes"),
    )
    params = state["params"]
    if dtype == "bfloat16":
      params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
      params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    slots = orders.to_slots(tokens, order, network.layout)
    want = jax.jit(network.apply)(params, slots)[:, sentinels - 1 :]
    self.assertEqual(got["logits"].dtype, np.float64)
    self.assertGreater(np.abs(want).max(), 2)
    tiny.assert_same(got["logits"], want)

  @parameterized.parameters("float32", "bfloat16")
  def test_a_round_trip_is_equal_to_the_bit(self, dtype):
    _, state = self.make_run()
    folder = self.export(dtype=dtype)
    want = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), state)
    got = aoarm_jax.load(folder)._params
    jax.tree.map(np.testing.assert_array_equal, got, want["params"])
    again = self.export("again", folder, dtype=dtype)
    self.assertEqual(
      sorted(path.name for path in again.iterdir()),
      ["README.md", "config.json", "model.safetensors"],
    )
    for path in folder.iterdir():
      self.assertEqual(path.read_bytes(), (again / path.name).read_bytes())

  def test_a_folder_is_used_like_its_run(self):
    self.make_run()
    run = aoarm_jax.load(self.run)
    model = aoarm_jax.load(self.export())
    self.assertEqual(model.step, STEP)
    self.assertIn("step 5, two_stream, 4,216 parameters", repr(model))
    for call in (
      lambda model: model.infill("a_c_e", count=2, seed=3),
      lambda model: model.score("a[bc]d", order="uniform"),
      lambda model: model.generate(prompt="ab", seed=4),
    ):
      self.assertEqual(call(model), call(run))
    aoarm_jax.load(self.folder / "out", step=STEP)
    with self.refused("no checkpoint of step 4 in .*out; steps there: 5$"):
      aoarm_jax.load(self.folder / "out", step=4)
    with self.refused("read='best': .*out is an exported model"):
      aoarm_jax.load(self.folder / "out", read="best")

  @parameterized.parameters(
    *((mechanism, {}) for mechanism in tiny.MECHANISMS),
    ("two_stream", tiny.LEARNED | {"kv_heads": 0, "tied": False}),
  )
  def test_the_page_names_every_array(self, mechanism, fields):
    """The names are part of the format."""
    self.make_run(config_of(mechanism, **fields))
    folder = self.export()
    arrays = safetensors_numpy.load_file(folder / "model.safetensors")
    rows = re.findall(r"^\| `([\w.]+)` \| (\[.*?\]) \|", PAGE, re.M)
    letters = dict(T=9, D=12, L=2, N=3, H=4, F=48, V=27, C=128, A=1)
    letters["A"] = 2 if mechanism == "sigma_gpt" else 1
    letters["s"] = 3 if mechanism == "mdlm" else 2
    shapes = {
      name: eval(shape, letters | {"D_A": 12 // letters["A"]})
      for name, shape in rows
    }
    self.assertContainsSubset(arrays, shapes)
    for name, array in arrays.items():
      self.assertEqual([*array.shape], shapes[name], name)
      self.assertEqual(array.dtype, np.float32)

  def test_the_moving_average_or_the_last_weights(self):
    _, state = self.make_run(config_of(ema=0.9))
    for weights, part in (("ema", "ema"), ("last", "params")):
      folder = self.export(weights, weights=weights)
      jax.tree.map(
        np.testing.assert_array_equal,
        aoarm_jax.load(folder)._params,
        state[part],
      )
      self.assertEqual(record_of(folder)["weights"]["part"], part)
    with self.refused("holds the moving average of the weights only"):
      self.export("no", self.folder / "ema", weights="last")
    card = (self.folder / "ema" / "README.md").read_text()
    self.assertIn("| the moving average (EMA) of the weights, float32 |", card)
    card = (self.folder / "last" / "README.md").read_text()
    self.assertIn("| the last weights of training, float32 |", card)

  def test_what_stands_in_config_json(self):
    config = dataclasses.replace(
      config_of(),
      telemetry=config_lib.Telemetry(wandb="secret/project"),
      mesh=config_lib.Mesh(data=1),
    )
    self.make_run(config)
    folder = self.export(dtype="bfloat16")
    record, text = record_of(folder), (folder / "config.json").read_text()
    self.assertEqual(record["format_version"], 1)
    self.assertEqual(
      record["config"]["model"], dataclasses.asdict(config.model)
    )
    self.assertEqual(record["config"]["data"]["tokenizer"], "char27")
    self.assertEqual(record["vocabulary"], 27)
    training = record["training"]
    self.assertEqual(training["tokens"], STEP * 2 * 9)
    self.assertEqual((training["step"], training["text"]), (STEP, TEXT))
    self.assertRegex(training["checkpoint"], "^[0-9a-f]{64}$")
    self.assertEqual(record["weights"]["dtype"], "bfloat16")
    # The name of the text is told, and not where it lies on this machine.
    self.assertEqual(training["path"], "novels")
    for private in ("/home/me", "secret", os.fspath(self.folder)):
      self.assertNotIn(private, text)
      self.assertNotIn(private, (folder / "README.md").read_text())

  @parameterized.parameters("join", "stream", "pad")
  def test_symbols_go_along(self, documents):
    symbols = alphabets.learn(
      config_lib.Data(tokenizer="chars"), [[b"abc \xc3\xa4"]]
    )
    config = config_of(tokenizer="chars")
    self.make_run(config.replace("data.documents", documents), symbols)
    folder = self.export()
    state = (folder / "tokenizer.json").read_bytes()
    self.assertEqual(state, symbols.state)
    again = self.export("again", folder)
    self.assertEqual((again / "tokenizer.json").read_bytes(), state)
    model = aoarm_jax.load(again)
    self.assertEqual(model.tokenizer.symbols, symbols.symbols)
    self.assertEqual(model.tokenizer.has_end, documents != "join")
    self.assertEqual(record_of(again)["vocabulary"], model.tokenizer.V)
    np.testing.assert_array_equal(
      model._params["head"], aoarm_jax.load(self.run)._params["head"]
    )
    (folder / "tokenizer.json").write_bytes(state.replace(b"a", b"d"))
    with self.refused("tokenizer.json: is not what was exported"):
      aoarm_jax.load(folder)
    (folder / "tokenizer.json").unlink()
    with self.refused("tokenizer.json: missing"):
      aoarm_jax.load(folder)

  def test_numbers_of_evaluations(self):
    """The newest of each estimator at this step, of these weights."""
    self.make_run(config_of(ema=0.5))
    estimate = dict(
      estimator="any_order",
      unit="char",
      bits_per_token=2.0,
      bits_per_byte=None,
      tokens=90,
    )
    reports = (
      ("step_00000005_test_20250101T1.json", 5, 2.0),
      ("step_00000005_test_20250102T1.json", 5, 1.5),
      ("step_00000004_test_20250103T1.json", 4, 1.0),
    )
    for name, step, bits in reports:
      report = dict(step=step, split="test", sha256="3" * 64)
      report["estimates"] = [estimate | {"bits_per_token": bits}]
      path = self.run / "evaluations" / name
      disk.write_atomically(path, json.dumps(report))
    broken = "step_00000005_valid_20250104T1.json"
    (self.run / "evaluations" / broken).write_text("{")
    with metrics.Writer(self.run, start_step=0, primary=True) as writer:
      for step in (4, 5):
        record = estimate | {"bits_per_token": float(step)}
        writer.write(step, "valid", **record, standard_error_bits=0.25)
    with self.assertLogs("absl", "WARNING") as logs:
      folder = self.export()
    self.assertIn(broken, logs.output[0])
    rows = record_of(folder)["evaluations"]
    self.assertEqual(
      [(row["source"], row["split"], row["bits_per_token"]) for row in rows],
      [("evaluation", "test", 1.5), ("validation", "valid", 5.0)],
    )
    self.assertEqual(rows[1]["sha256"], TEXT["valid"])
    card = (folder / "README.md").read_text()
    self.assertIn(
      "| validation | valid | `any_order` | 5.0000 | 0.2500 |", card
    )
    # Nobody has evaluated the last weights.
    with self.assertNoLogs("absl", "WARNING"):
      folder = self.export("last", weights="last")
    self.assertEqual(record_of(folder)["evaluations"], [])
    self.assertIn("no evaluation", (folder / "README.md").read_text())

  def test_a_new_run_begins_with_exported_weights(self):
    _, state = self.make_run()
    folder = self.export()
    config = config_of().replace("train.start_from", os.fspath(folder))
    symbols = tokenizers.get("char27")
    network = network_lib.Network(config, None, symbols)
    weights = starting.read(network, symbols, self.folder / "new")
    jax.tree.map(np.testing.assert_array_equal, weights.params, state["params"])
    self.assertEqual((weights.step, weights.part), (STEP, "params"))
    with self.refused("is an exported model, which training would overwrite"):
      loop.train(config_of(), folder, [])

  def test_the_command(self):
    self.make_run(config_of(ema=0.9))
    out = self.folder / "out"
    command = [
      f"--config={helpers.ROOT / 'configs' / 'two_stream.py'}:tiny",
      f"--workdir={self.run}",
      "--mode=export",
      "--config.export.weights=last",
      "--config.export.dtype=bfloat16",
    ]
    helpers.run([*command, f"--out={out}"])
    record = record_of(out)
    self.assertEqual(record["weights"]["part"], "params")
    self.assertEqual(record["weights"]["dtype"], "bfloat16")
    self.assertEqual(
      (out / "model.safetensors").read_bytes(),
      (
        self.export("same", weights="last", dtype="bfloat16")
        / "model.safetensors"
      ).read_bytes(),
    )
    with self.refused(f"--out={out}: the folder is not empty"):
      helpers.run([*command, f"--out={out}"])
    with self.assertRaisesRegex(flags.Error, "--mode=export needs the folder"):
      helpers.run(command)
    with self.refused("config.export.dtype='float16'"):
      helpers.run([*command, "--config.export.dtype=float16", f"--out={out}-2"])
    self.assertIn("export", command_line.MODES)

  @pytest.mark.thorough
  def test_every_mode_reads_a_folder(self):
    helpers.write_text(self.folder / "text")
    fields = {
      "data.path": self.folder / "text",
      "train.steps": 2,
      "eval.batches": 1,
      "sample.count": 1,
    }
    out = self.folder / "out"
    helpers.run(helpers.arguments(self.run, fields))
    helpers.run(helpers.arguments(self.run, fields, "--mode=eval"))
    helpers.run(
      helpers.arguments(self.run, fields, "--mode=export", f"--out={out}")
    )
    self.assertLen(record_of(out)["evaluations"], 3)
    printed = []
    for workdir in (self.run, out):
      text = io.StringIO()
      with contextlib.redirect_stdout(text):
        for more in (["--mode=sample"], ["--mode=score", "--text=ab[c]"]):
          helpers.run(helpers.arguments(workdir, fields, *more))
      printed.append(text.getvalue())
    self.assertEqual(*printed)
    helpers.run(helpers.arguments(out, fields, "--mode=eval"))
    (here,), (there,) = (
      sorted((workdir / "evaluations").iterdir()) for workdir in (self.run, out)
    )
    same = [json.loads(path.read_text())["estimates"] for path in (here, there)]
    self.assertEqual(*same)


class PlaceTest(FolderTest):
  def test_a_folder_is_whole_or_absent(self):
    """Whatever fails at whatever file, and a kill that cleans nothing up."""
    self.make_run()
    write = disk.write_atomically
    errors_seen = (OSError(28, "No space left"), KeyboardInterrupt())
    for error in errors_seen:
      for fails in range(3):
        calls = mock.Mock(side_effect=[None] * fails + [error])

        def failing(path, data, calls=calls):
          calls(path)
          write(path, data)

        with (
          mock.patch.object(disk, "write_atomically", failing),
          self.assertRaises(type(error)) as raised,
        ):
          self.export()
        if isinstance(error, OSError):
          self.assertEqual(raised.exception.filename, f"{self.folder / 'out'}")
        self.assertEqual([*self.folder.iterdir()], [self.run])
    with (
      mock.patch.object(os, "rename", side_effect=KeyboardInterrupt),
      mock.patch.object(exporting.shutil, "rmtree"),
      self.assertRaises(KeyboardInterrupt),
    ):
      self.export()
    self.assertLen([*self.folder.iterdir()], 2)
    with self.refused("out/config.json: no such file"):
      aoarm_jax.load(self.folder / "out")
    self.export()
    self.assertLen([*self.folder.iterdir()], 2)

  def test_in_a_bucket_config_json_comes_last(self):
    self.make_run()
    written = []
    with (
      mock.patch.object(
        disk, "write_atomically", lambda path, data: written.append(path)
      ),
      mock.patch.object(exporting, "_check_place"),
    ):
      aoarm_jax.export(self.run, "gs://bucket/out")
    self.assertEqual(
      [path.name for path in written],
      ["model.safetensors", "README.md", "config.json"],
    )

  def test_what_stands_there_stays(self):
    self.make_run()
    (self.folder / "out").mkdir()
    folder = self.export()  # It was empty.
    with self.refused("folder=.*/out: the folder is not empty; name a new"):
      self.export()
    (self.folder / "file").write_text("")
    with self.refused("folder=.*/file: .*/file is a file; name a folder"):
      self.export("file")
    aoarm_jax.load(folder)

  def test_values_that_are_wrong(self):
    self.make_run()
    with self.refused("config.export.weights='best': .* not one of ema, last"):
      self.export(weights="best")
    with self.refused("config.export.dtype='int8': .* float32, bfloat16"):
      self.export(dtype="int8")
    with self.refused("step='5': must be a whole number"):
      self.export(step="5")
    with self.refused("no checkpoint of step 4 in .*/checkpoints; .* there: 5"):
      self.export(step=4)
    with self.refused("absent/config.json: no such file"):
      self.export(source=self.folder / "absent")


def _cut(data):
  return data[: len(data) // 2]


def _flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class DamageTest(FolderTest):
  def setUp(self):
    super().setUp()
    self.make_run()
    self.out = self.export()

  def load(self):
    # A broken folder is told before any program is compiled.
    return aoarm_jax.load(self.out)

  @parameterized.parameters(
    ("model.safetensors", _cut, "safetensors: has [0-9,]+ bytes, and not .*: "),
    ("model.safetensors", _flip, "safetensors: is not what was exported"),
    ("model.safetensors", lambda data: data + b"x", "has .* bytes, and not"),
    ("model.safetensors", None, "safetensors: missing: copy or download"),
    (
      "model.safetensors",
      lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
      "safetensors: a pointer of Git LFS and not the file; run git lfs pull",
    ),
    ("config.json", _cut, "config.json: no JSON: "),
    ("config.json", lambda data: b"", "config.json: no JSON: "),
    ("config.json", None, "config.json: no such file"),
    (
      "config.json",
      lambda data: data.replace(b'"rope_base": 1', b'"rope_base": 2'),
      "config.json: is not what was exported .its sha256 differs.",
    ),
    (
      "config.json",
      lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
      "has format version 2, .* reads version 1: install a later version",
    ),
    (
      "config.json",
      lambda data: b'{"model_type": "llama", "architectures": ["Llama"]}',
      "neither of a run nor of an exported model of aoarm_jax",
    ),
    ("config.json", lambda data: b"[1]", "neither of a run nor of an exported"),
  )
  def test_a_changed_file(self, name, change, regex):
    path = self.out / name
    if change is None:
      path.unlink()
    else:
      data = path.read_bytes()
      self.assertNotEqual(change(data), data)
      path.write_bytes(change(data))
    with self.refused(regex):
      self.load()

  @parameterized.parameters(
    (lambda arrays: arrays.pop("norm.scale"), "'norm.scale' is absent, .*12."),
    (
      lambda arrays: arrays.update(extra=np.zeros(3, np.float32)),
      r"array extra is \[3\], and the model of config.json has absent",
    ),
    (
      lambda arrays: arrays.update(head=np.zeros((27, 12), np.float32)),
      r"array head is \[27,12\], and the model of config.json has \[12,27\]",
    ),
    (
      lambda arrays: arrays.update(head=np.zeros((12, 27), np.int32)),
      "array head has dtype I32, and exports have F32 or BF16",
    ),
  )
  def test_other_arrays(self, change, regex):
    """A stranger's folder, whose checksums are right."""
    path = self.out / "model.safetensors"
    arrays = safetensors_numpy.load_file(path)
    change(arrays)
    safetensors_numpy.save_file(arrays, path)
    write_record(self.out, record_of(self.out))
    with self.refused(regex):
      self.load()

  def test_no_safetensors_file(self):
    (self.out / "model.safetensors").write_bytes(b"x" * 100)
    write_record(self.out, record_of(self.out))
    with self.refused("model.safetensors: no safetensors file: .*copy"):
      self.load()

  @parameterized.parameters(
    (lambda record: record.pop("training"), "training is missing"),
    (lambda record: record.update(vocabulary="x"), "vocabulary is 'x', and"),
    (lambda record: record["weights"].update(part="opt_state"), "weights.part"),
    (
      lambda record: record["config"].update(model={"color": 1}),
      "config.model.color: no such field.*written by aoarm_jax .*later one$",
    ),
    (
      lambda record: record["config"]["model"].update(D=10**9, N=1),
      "array .* is .*and the model of config.json has",
    ),
    (lambda record: record["files"].clear(), "no checksum of model.safetens"),
  )
  def test_other_values(self, change, regex):
    record = record_of(self.out)
    change(record)
    write_record(self.out, record)
    with self.refused(regex):
      self.load()

  def test_a_link_out_of_the_folder_is_not_followed(self):
    path = self.out / "model.safetensors"
    os.rename(path, self.folder / "elsewhere")
    os.symlink(self.folder / "elsewhere", path)
    with self.refused("is a link out of .*/out; copy the file there"):
      self.load()

  def test_a_large_file_is_not_read(self):
    with open(self.out / "model.safetensors", "ab") as file:
      file.truncate(1 << 40)
    with self.refused("model.safetensors: has more than [0-9,]+ bytes"):
      self.load()


class Hub:
  """The hub: a folder for each model, and a cache as its library has it."""

  def __init__(self, test):
    self.remote, self.cache = test.folder / "remote", test.folder / "cache"
    self.private, self.messages = {}, []
    for name, method in (
      ("create_repo", self.create_repo),
      ("upload_folder", self.upload_folder),
    ):
      patch = mock.patch.object(
        huggingface_hub.HfApi, name, autospec=True, side_effect=method
      )
      test.enterContext(patch)
    test.enterContext(
      mock.patch.object(
        huggingface_hub,
        "snapshot_download",
        autospec=True,
        side_effect=self.snapshot_download,
      )
    )

  def create_repo(self, api, repo_id, *, private, exist_ok):
    assert exist_ok
    (self.remote / repo_id).mkdir(parents=True, exist_ok=True)
    self.private.setdefault(repo_id, private)
    return f"https://hub.test/{repo_id}"

  def upload_folder(
    self, api, *, repo_id, folder_path, allow_patterns, commit_message
  ):
    self.messages.append(commit_message)
    for path in pathlib.Path(folder_path).iterdir():
      if path.name in allow_patterns:
        (self.remote / repo_id / path.name).write_bytes(path.read_bytes())

  def snapshot_download(self, repo_id, *, revision, allow_patterns):
    if not (self.remote / repo_id).exists() or revision not in (None, "v1"):
      raise ValueError("404 of this test.\nRequest 1234")
    folder = self.cache / f"models--{repo_id.replace('/', '--')}"
    snapshot, blobs = folder / "snapshots" / "0123abc", folder / "blobs"
    for path in (snapshot, blobs):
      path.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate((self.remote / repo_id).iterdir()):
      if path.name in allow_patterns:
        (blobs / str(i)).write_bytes(path.read_bytes())
        with contextlib.suppress(FileExistsError):
          os.symlink(f"../../blobs/{i}", snapshot / path.name)
    return str(snapshot)


class HubTest(FolderTest):
  def setUp(self):
    super().setUp()
    self.make_run()

  def test_up_and_down_again(self):
    hub, out = Hub(self), self.export()
    (out / "samples").write_text("ours alone")
    url = aoarm_jax.push(out, "me/tiny")
    self.assertEqual(url, "https://hub.test/me/tiny")
    self.assertEqual(hub.private, {"me/tiny": True})
    self.assertEqual(hub.messages, ["aoarm_jax: a model of 5 steps"])
    self.assertEqual(
      sorted(path.name for path in (hub.remote / "me/tiny").iterdir()),
      ["README.md", "config.json", "model.safetensors"],
    )
    want = aoarm_jax.load(out)
    for place in ("hf:me/tiny", "hf:me/tiny@v1"):
      model = aoarm_jax.load(place)
      jax.tree.map(np.testing.assert_array_equal, model._params, want._params)
    again = self.export("again", "hf:me/tiny")
    self.assertEqual(record_of(again), record_of(out))
    aoarm_jax.push(out, "me/open", private=False, message="again")
    self.assertFalse(hub.private["me/open"])
    self.assertEqual(hub.messages[-1], "again")

  def test_a_damaged_download_is_seen(self):
    hub, out = Hub(self), self.export()
    aoarm_jax.push(out, "me/tiny")
    path = hub.remote / "me/tiny/model.safetensors"
    path.write_bytes(_flip(path.read_bytes()))
    with self.refused("model.safetensors: is not what was exported"):
      aoarm_jax.load("hf:me/tiny")

  def test_only_whole_exports_are_pushed(self):
    hub, out = Hub(self), self.export()
    with self.refused("run: is a run: export it first"):
      aoarm_jax.push(self.run, "me/tiny")
    with self.refused("absent/config.json: no such file"):
      aoarm_jax.push(self.folder / "absent", "me/tiny")
    path = out / "model.safetensors"
    path.write_bytes(_flip(path.read_bytes()))
    with self.refused("model.safetensors: is not what was exported"):
      aoarm_jax.push(out, "me/tiny")
    self.assertEqual(hub.private, {})

  def test_errors_are_one_line(self):
    Hub(self)
    with self.refused(
      "^hf:me/none: cannot be downloaded: 404 of this test$",
      aoarm_jax.HubError,
    ):
      aoarm_jax.load("hf:me/none")
    for wrong in ("hf:books", "hf:a/b/c", "hf:", "hf:../b"):
      with self.refused("a model of the hub has the form owner/name"):
        aoarm_jax.load(wrong)
    with self.refused("repository='books': a model of the hub has the form"):
      aoarm_jax.push(self.run, "books")
    missing = huggingface_hub.errors.LocalTokenNotFoundError("Token\nrequired")
    with (
      mock.patch.object(
        huggingface_hub.HfApi, "create_repo", side_effect=missing
      ),
      self.refused("hf:me/x: cannot be uploaded: nobody is logged in: log in"),
    ):
      aoarm_jax.push(self.export(), "me/x")

  def test_every_meaning_is_of_an_error_that_there_is(self):
    for name in places._MEANINGS:
      self.assertTrue(hasattr(huggingface_hub.errors, name), name)

  def test_a_missing_library_names_the_extra(self):
    with (
      mock.patch.dict(sys.modules, huggingface_hub=None),
      self.refused(r"hf:me/x: .* pip install 'aoarm_jax\[hub\]'"),
    ):
      aoarm_jax.load("hf:me/x")


class BooksTest(absltest.TestCase):
  """The model of the package, as it is shipped."""

  def test_the_packaged_model_knows_english(self):
    self.assertEqual(places.packaged(), ["books-8m"])
    model = aoarm_jax.load("books-8m")
    prose = "there was no possibility of taking a walk that day"
    scores = model.score([prose, prose[::-1]], order="left_to_right")
    prose_bits, reversed_bits = (score.bits / len(prose) for score in scores)
    self.assertLess(prose_bits, 2.3)
    self.assertGreater(reversed_bits, prose_bits + 1.5)

  def test_the_card_has_the_numbers_of_the_config(self):
    folder = places.find("books-8m")
    card = (folder / "README.md").read_text()
    record = exported.Exported(folder).record
    for row in record["evaluations"]:
      bits, error = row["bits_per_char"], row["standard_error_bits"]
      self.assertIn(f"{bits:.4f} ± {error:.4f}", card)
    for sha256 in record["training"]["text"].values():
      self.assertIn(sha256, card)
    self.assertIn(f"{record['weights']['parameters']:,}", card)


class PackagedTest(FolderTest):
  def setUp(self):
    super().setUp()
    self.make_run()
    self.enterContext(
      mock.patch.object(places, "MODELS", pathlib.Path(self.folder / "models"))
    )

  def test_by_name(self):
    with self.refused(
      r"^workdir=books-tiny: there is no such folder here, .* \(it has none\)"
    ):
      aoarm_jax.load("books-tiny")
    self.export("models/books-tiny", dtype="bfloat16")
    self.assertEqual(places.packaged(), ["books-tiny"])
    model = aoarm_jax.load("books-tiny")
    self.assertEqual(model.step, STEP)
    with self.refused(r"^workdir=books: there is no .* \(it has books-tiny\)"):
      aoarm_jax.load("books")
    network = network_lib.Network(
      config_of().replace("train.start_from", "books-tiny")
    )
    weights = starting.read(network, network.tokenizer, self.folder / "new")
    self.assertEqual(weights.step, STEP)
    # A folder here goes first.
    make_run(self.folder / "books-tiny", config_of(T=5))
    with contextlib.chdir(self.folder):
      self.assertEqual(aoarm_jax.load("books-tiny").config.model.T, 5)


class PageTest(FolderTest):
  def test_the_page_runs(self):
    self.make_run(config_of(T=40))
    Hub(self)
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for shown, name in (
      ('"runs/two_stream-tiny"', "run"),
      ('"models/novels"', "novels"),
    ):
      self.assertIn(shown, code)
      code = code.replace(shown, repr(os.fspath(self.folder / name)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(code, {})
    lines = printed.getvalue().splitlines()
    self.assertStartsWith(lines[0], "she said ")
    self.assertEqual(lines[1], "https://hub.test/me/novels")
    self.assertEqual(lines[2], "(29, 12) float32")
    self.assertLen(lines, 3)


if __name__ == "__main__":
  absltest.main()
