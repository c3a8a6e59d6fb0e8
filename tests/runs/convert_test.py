"""Models of Hugging Face become runs, and `causal` runs such models again."""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import tempfile
import tracemalloc

import chex
import foreign
import helpers
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import absltest, parameterized
from etils import epath
from safetensors import numpy as safetensors_numpy

import aoarm_jax
from aoarm_jax import orders
from aoarm_jax.config import errors, hugging_face
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import alphabets, tokenizers
from aoarm_jax.data import foreign as foreign_symbols
from aoarm_jax.model import cached
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import converting, foreign_layout
from aoarm_jax.runs import hugging_face as arrays_lib

PAGE = (helpers.ROOT / "docs" / "converting.md").read_text()
_T = 9
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())
_CASES = {
  "llama3": foreign.config(
    tie_word_embeddings=True, rope_parameters=foreign.LLAMA3
  ),
  "qwen3": foreign.config(foreign.QWEN3),
  "gpt2": foreign.config(foreign.GPT2),
}


def slots_of(tokens, network):
  """Slots from left to right."""
  natural = np.tile(np.arange(1, _T + 1, dtype=np.int32), (len(tokens), 1))
  return orders.to_slots(tokens, natural, network.layout)


def in_float32(model):
  """(network that computes in float32, parameters) of a loaded model."""
  config = model.config.replace("compute.dtype", "float32")
  return network_lib.Network(config, None, model.tokenizer), model._params


def names_of(params):
  return arrays_lib.exported.names(params)


class FolderTest(parameterized.TestCase):
  """Each test has a folder of its own, and one line for every error."""

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = epath.Path(folder)
    self.source = self.folder / "source"

  def convert(self, mechanism="causal", name="run", **options):
    options = {"T": _T} | options
    workdir = self.folder / name
    got = aoarm_jax.convert(
      self.source, workdir, mechanism=mechanism, **options
    )
    self.assertEqual(got, os.fspath(workdir))
    return workdir

  @contextlib.contextmanager
  def refused(self, regex, kind=errors.UserError):
    with self.assertRaisesRegex(kind, regex) as raised:
      yield
    self.assertNotIn("\n", str(raised.exception))


class ConvertTest(FolderTest):
  @parameterized.parameters(
    ("llama3", "causal", 2),
    ("llama3", "two_stream", 2),
    ("llama3", "decoupled_rope", 1),
    ("qwen3", "causal", 1),
    ("qwen3", "two_stream", 3),
    ("gpt2", "causal", 2),
    ("gpt2", "two_stream", 1),
  )
  def test_logits_left_to_right_are_those_of_the_source(
    self, case, mechanism, shards
  ):
    tree, weights = foreign.write(self.source, _CASES[case], shards=shards)
    network, params = in_float32(aoarm_jax.load(self.convert(mechanism)))
    tokens = tiny.tokens(2, _T, foreign.V)
    got = jax.jit(network.apply)(params, slots_of(tokens, network))
    self.assertEqual(got.shape, (2, _T, foreign.V))
    for row, logits in zip(tokens, got):
      ids = [foreign.BOS, *row[:-1]]
      want = foreign.logits(tree, weights, ids)
      self.assertGreater(np.std(want), 0.5)
      tiny.assert_same(logits, want, roundings=256)

  def test_content_rows_of_two_streams_are_those_of_the_source(self):
    """Keys and values of every layer, in a pass and from a cache."""
    foreign.write(self.source)
    tokens, caches = tiny.tokens(2, _T, foreign.V), []
    for mechanism in ("causal", "two_stream"):
      model = aoarm_jax.load(self.convert(mechanism, mechanism))
      network, params = in_float32(model)

      @jax.jit
      def fill(params, slots, network=network):
        of_params = cached.Cached(network.bind(params))
        cache = of_params.empty_cache(2, _T)
        first = jax.tree.map(lambda x: x[:, :4], slots)
        last = jax.tree.map(lambda x: x[:, 4:], slots)
        start = np.full(2, 4, np.int32)
        cache = of_params.prefill(first, cache)
        return of_params.extend(last, cache, start)

      logits, cache = fill(params, slots_of(tokens, network))
      caches.append((logits, cache.k, cache.v))
    chex.assert_trees_all_close(*caches, atol=1e-5, rtol=1e-5)

  @parameterized.parameters(
    (foreign.QWEN3, dict(rope_parameters=foreign.LLAMA3)),
    (foreign.GPT2, dict(n_positions=_T, tie_word_embeddings=False)),
  )
  def test_a_round_trip_is_equal_to_the_bit(self, architecture, changes):
    """Arrays, config.json and symbols, also for weights of 16 bits."""
    tree = foreign.config(architecture, **changes)
    weights = foreign.arrays(tree)
    weights = {n: x.astype(ml_dtypes.bfloat16) for n, x in weights.items()}
    foreign.write(self.source, tree, weights)
    run = self.convert()
    back = self.folder / "back"
    aoarm_jax.export(run, back, layout="hugging_face", dtype="bfloat16")
    got = safetensors_numpy.load_file(back / "model.safetensors")
    self.assertEqual(got.keys(), weights.keys())
    for name, array in got.items():
      self.assertEqual(array.dtype, ml_dtypes.bfloat16)
      np.testing.assert_array_equal(array, weights[name], name)
    self.assertEqual(
      hugging_face.read(json.loads((back / "config.json").read_text()))[:3],
      hugging_face.read(tree)[:3],
    )
    # The second time around, nothing changes at all.
    self.source = back
    again = self.convert(name="again")
    model, other = aoarm_jax.load(run), aoarm_jax.load(again)
    self.assertEqual(model.tokenizer.state, other.tokenizer.state)
    jax.tree.map(np.testing.assert_array_equal, model._params, other._params)
    self.assertEqual(model.config.model, other.config.model)

  def test_ids_without_a_name_and_the_ends(self):
    _, weights = foreign.write(self.source)
    model = aoarm_jax.load(self.convert("two_stream", sentinels=2))
    self.assertEqual(model.tokenizer.V, foreign.V)
    self.assertEqual(
      model.tokenizer.decode([259, 261]), "<|unused_259|><|unused_261|>"
    )
    np.testing.assert_array_equal(
      model.tokenizer.encode("that"), [256, ord("a"), ord("t")]
    )
    table = weights["model.embed_tokens.weight"]
    embedding = model._params["embedding"]
    np.testing.assert_array_equal(embedding[: foreign.V], table)
    ends = table[[foreign.BOS, foreign.EOS]]
    np.testing.assert_array_equal(embedding[foreign.V :], ends)
    start = model._params["start"]["query_start"]
    np.testing.assert_array_equal(start, table[foreign.BOS])

  def test_a_run_like_any_other(self):
    """It fills blanks, gives scores, is exported, and is not trained on."""
    foreign.write(self.source)
    run = self.convert("two_stream")
    model = aoarm_jax.load(run)
    self.assertEqual((model.step, model.config.model.shifted), (0, True))
    text = model.infill("t_at", count=1, blank="_", seed=0)[0]
    self.assertEqual(len(text.tokens), 4)
    self.assertLess(model.score("a[b]c", marks="[]").log_p, 0)
    aoarm_jax.export(run, self.folder / "out")
    same = aoarm_jax.load(self.folder / "out")
    jax.tree.map(np.testing.assert_array_equal, model._params, same._params)
    facts = json.loads((run / "converted.json").read_text())
    self.assertEqual(facts["from"], os.fspath(self.source))
    helpers.write_text(self.folder / "text")
    command = [
      f"--config={run / 'adapt.py'}",
      f"--workdir={run}",
      f"--config.data.path={self.folder / 'text'}",
    ]
    self.assertEqual(
      helpers.config_of(command).replace("train.start_from", ""),
      model_config(model).replace("data.path", str(self.folder / "text")),
    )
    with self.refused("holds converted weights without an optimizer"):
      helpers.run([*command, "--config.train.start_from="])
    with self.refused("run: holds a model already; .*workdir=.*run-2"):
      self.convert()
    with self.refused("becomes a run by aoarm_jax.convert$"):
      aoarm_jax.load(self.source)

  def test_gpt2_as_the_hub_has_it(self):
    """Names without a prefix, and masks among the arrays of attention."""
    tree, weights = foreign.write(self.source, _CASES["gpt2"])
    first = aoarm_jax.load(self.convert("two_stream", name="first"))
    self.source = self.folder / "hub"
    prefix = "transformer."
    weights = {n.removeprefix(prefix): x for n, x in weights.items()}
    mask = np.tri(10, dtype=np.uint8)[None, None]
    weights |= {f"h.{i}.attn.bias": mask for i in range(tree["n_layer"])}
    foreign.write(self.source, tree, weights)
    other = aoarm_jax.load(self.convert("two_stream", name="other"))
    jax.tree.map(np.testing.assert_array_equal, first._params, other._params)
    # T + 2 positions here, and the last one of the source again.
    (positions,) = first._params["start"]["added"]
    want = weights["wpe.weight"][[*range(10), 9]]
    np.testing.assert_array_equal(positions, want)

  @parameterized.parameters("llama3", "gpt2")
  def test_pieces_are_those_of_the_whole(self, case):
    """Whatever a device asks for, it gets, and reads no other numbers."""
    foreign.write(self.source, _CASES[case], shards=2)
    source = arrays_lib.read_config(self.source)
    config = aoarm_jax.load(self.convert("two_stream")).config
    shapes = names_of(network_lib.Network(config, None).abstract_params)
    D = source.fields["D"]
    shapes |= {"embedding": jax.ShapeDtypeStruct((foreign.V + 2, D), "f4")}
    with arrays_lib.Arrays(self.source, source, shapes) as arrays:
      for name, leaf in shapes.items():
        whole = arrays.piece(name, leaf.shape, (slice(None),) * leaf.ndim)
        self.assertEqual(whole.shape, leaf.shape)
        for first in (0, 1):
          index = [slice(None)] * leaf.ndim
          for axis, size in enumerate(leaf.shape):
            if size % 2 == 0:  # Heads and widths are cut by a mesh.
              index[axis] = slice(first * size // 2, (first + 1) * size // 2)
          index = tuple(index)
          reads = []
          arrays._slices = {
            key: Counting(value, reads) for key, value in arrays._slices.items()
          }
          got = arrays.piece(name, leaf.shape, index)
          np.testing.assert_array_equal(got, whole[index], name)
          if name != "embedding":
            # A head has an axis of its own, and mesh axes do not cut it.
            ratio = 2 if ".attention.q" in name or ".attention.k" in name else 1
            self.assertLessEqual(sum(reads), 2 * ratio * got.size, name)
          arrays._slices = {k: v.inner for k, v in arrays._slices.items()}

  def test_memory_is_that_of_one_parameter(self):
    tree = foreign.config(
      hidden_size=160, intermediate_size=640, num_hidden_layers=6
    )
    foreign.write(self.source, tree, shards=3)
    source = arrays_lib.read_config(self.source)
    config = aoarm_jax.load(self.convert("two_stream")).config
    tokenizer = alphabets.of_hugging_face(
      self.source / "tokenizer.json", foreign.V
    )
    shapes = names_of(
      network_lib.Network(config, None, tokenizer).abstract_params
    )
    with arrays_lib.Arrays(self.source, source, shapes) as arrays:
      peak = 0
      tracemalloc.start()
      try:
        for name, leaf in shapes.items():
          arrays.piece(name, leaf.shape, (slice(None),) * leaf.ndim)
          peak = max(peak, tracemalloc.get_traced_memory()[1])
      finally:
        tracemalloc.stop()
    largest = max(4 * leaf.size for leaf in shapes.values())
    everything = sum(4 * leaf.size for leaf in shapes.values())
    self.assertLess(2 * largest, everything)
    self.assertLess(peak, 1.6 * largest)


class Counting:
  """A slice of a file that notes how many numbers are read."""

  def __init__(self, inner, reads):
    self.inner, self.reads = inner, reads

  def get_shape(self):
    return self.inner.get_shape()

  def __getitem__(self, index):
    array = self.inner[index]
    self.reads.append(array.size)
    return array


def model_config(model):
  """The config that converting made, as adapt.py has it."""
  path = pathlib.Path(model.workdir)
  tree = json.loads((path / "config.json").read_text())
  config = config_lib.from_dict(tree)
  return config.replace("name", path.name)


_GATED = dict(mlp="swiglu", kv_heads=2, N=4, head_size=6)


class LayoutTest(FolderTest):
  """Runs of our own in the layout of Hugging Face."""

  @parameterized.parameters(
    _GATED,
    _GATED
    | dict(qk_norm=False, tied=True, rope_scaling="llama3")
    | dict(rope_factor=4.0, rope_original_T=12),
    tiny.LEARNED | dict(kv_heads=0, shifted=False, mlp_width=20),
  )
  def test_numpy_reads_what_is_written(self, **options):
    """BOS has an embedding of its own here, so there is one more id."""
    network = tiny.make("causal", 1, V=11, T=_T, **options)
    params = tiny.sharp(network)
    files = foreign_layout.files(network, params, "float32")
    self.source.mkdir()
    for name, data in files.items():
      (self.source / name).write_bytes(data)
    tree = json.loads(files["config.json"])
    self.assertEqual(tree["vocab_size"], 12)
    self.assertIsNone(tree["eos_token_id"])
    generation = json.loads(files["generation_config.json"])
    self.assertEqual(generation["suppress_tokens"], [11])
    weights = safetensors_numpy.load_file(self.source / "model.safetensors")
    tokens = tiny.tokens(2, _T, 11)
    want = jax.jit(network.apply)(params, slots_of(tokens, network))
    for row, logits in zip(tokens, want):
      got = foreign.logits(tree, weights, [11, *row[:-1]])[:, :11]
      self.assertGreater(np.std(got), 0.5)
      tiny.assert_same(logits, got, roundings=256)

  @parameterized.parameters(
    ("byte", "say é\n"), ("char27", "say it"), ("chars", "säy ü")
  )
  def test_fixed_symbols_are_read_as_bpe(self, name, text):
    if name == "chars":
      data = config_lib.Data(tokenizer="chars")
      tokenizer = alphabets.learn(data, [[text.encode()]])
    else:
      tokenizer = tokenizers.get(name)
    for before in (tokenizer, tokenizers.with_end(tokenizer)):
      V = before.V
      marks = {V: "<|bos|>"} | ({V - 1: "<|end|>"} if before.has_end else {})
      tree, _ = foreign_symbols.to_hugging_face(before, V, marks)
      path = self.folder / "tokenizer.json"
      path.write_text(json.dumps(tree))
      after = alphabets.of_hugging_face(path, V + 1)
      self.assertEqual(after.V, V + 1)
      want = before.encode(text)
      np.testing.assert_array_equal(after.encode(text), want)
      self.assertEqual(after.decode(want), text)

  @parameterized.parameters(
    ("two_stream", {}, "mechanism='two_stream': .* needs 'causal'"),
    ("causal", {"mlp": "gelu"}, "mlp='gelu': .* needs 'swiglu'"),
    ("causal", {"sentinels": 2}, "sentinels=2: .* needs 1"),
    (
      "causal",
      {"biases": True},
      "biases=True: .* needs False: Llama and Qwen3",
    ),
    ("causal", tiny.LEARNED, "mlp='swiglu': .* needs 'gelu': GPT-2 has no oth"),
    ("causal", tiny.LEARNED | {"mlp": "gelu"}, "kv_heads=1: .* needs 0: GPT-2"),
  )
  def test_what_transformers_has_not_is_refused(self, mechanism, more, regex):
    model = config_lib.Model(**{"mechanism": mechanism, "mlp": "swiglu"} | more)
    with self.refused(f"layout='hugging_face': config.model.{regex}"):
      foreign_layout.check(model)


def _without(name):
  def change(folder):
    (folder / name).unlink()

  return change


def _weights(change):
  def changed(folder):
    path = folder / "model.safetensors"
    weights = safetensors_numpy.load_file(path)
    change(weights)
    safetensors_numpy.save_file(weights, path)

  return changed


def _cut_short(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])


def _as_pointer(folder):
  path = folder / "model.safetensors"
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


_NORM = "model.norm.weight"
_BIAS = "model.layers.0.self_attn.q_proj.bias"


class StrangersTest(FolderTest):
  @parameterized.parameters(
    (_without("config.json"), "config.json: no such file; name the folder of"),
    (_without("tokenizer.json"), "tokenizer.json: no such file"),
    (_without("model.safetensors"), "has neither model.safetensors nor"),
    (_cut_short, "model.safetensors: no whole safetensors file: .*: copy or"),
    (_as_pointer, "a pointer of Git LFS and not the file"),
    (_weights(lambda w: w.pop(_NORM)), f"array {_NORM} is missing"),
    (
      _weights(lambda w: w.update({_NORM: w[_NORM][:-1]})),
      rf"array {_NORM} is \[9\], and config.json asks for \[10\]",
    ),
    (
      _weights(lambda w: w.update({_NORM: w[_NORM].astype(np.int32)})),
      f"array {_NORM} has dtype I32, and F32, F16, BF16 are read",
    ),
    (
      _weights(lambda w: w.update({_BIAS: np.zeros(4, "f4")})),
      "q_proj.bias.* belongs to no part of the backbone that config.json",
    ),
  )
  def test_damaged_folders(self, change, regex):
    foreign.write(self.source)
    change(self.source)
    with self.refused(regex):
      self.convert()
    self.assertFalse((self.folder / "run").exists())

  @parameterized.parameters(
    ({"architectures": ["Qwen2ForCausalLM"]}, r"=\['Qwen2ForCausalLM'\]: mo"),
    ({"architectures": None}, "architectures=None: models of Llama"),
    (
      {"attention_bias": True},
      "attention_bias=True: a converted Llama.* has no bias",
    ),
    ({"mlp_bias": True}, "mlp_bias=True: .* has no biases of the MLP"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu': .*another activation"),
    ({"use_sliding_window": True}, "no attention in sliding windows"),
    ({"layer_types": ["sliding_attention"]}, "layer_types: .*sliding windows"),
    ({"quantization_config": {"bits": 4}}, "has no quantized weights"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type='linear': rotary"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn': needs factor and"),
    (
      {"rope_parameters": foreign.LLAMA3 | {"rope_type": "yarn", "mscale": 1}},
      "rope_type='yarn': mscale is not converted",
    ),
    ({"hidden_size": "10"}, "hidden_size is '10', and a whole number"),
    ({"num_attention_heads": 0}, "a size is 0"),
    ({"bos_token_id": None, "eos_token_id": None}, "neither bos_token_id nor"),
    ({"bos_token_id": 262}, "bos_token_id=262, .*not below vocab_size=262"),
    ({"vocab_size": 258, "bos_token_id": 1}, "has the id 258, .* predicts 258"),
    ({"hidden_size": 8}, r"is \[12, 10\], and config.json asks for \[12, 8\]"),
  )
  def test_other_models(self, changes, regex):
    foreign.write(self.source)
    tree = foreign.config() | changes
    (self.source / "config.json").write_text(json.dumps(tree))
    with self.refused(regex):
      self.convert()

  @parameterized.parameters(
    ({"activation_function": "relu"}, "no another activation than GELU in its"),
    ({"scale_attn_by_inverse_layer_idx": True}, "no scales of scores by layer"),
    ({"n_positions": 8}, "model.T=9: the source was made for 8 positions"),
    ({"n_head": 5}, "model.N=5: must divide config.model.D=12"),
    ({"n_layer": None}, "n_layer is None, and a whole number"),
    ({"n_inner": 15}, r"mlp.c_fc.bias is \[14\], .* asks for \[15\]"),
  )
  def test_other_models_of_gpt2(self, changes, regex):
    foreign.write(self.source, _CASES["gpt2"])
    tree = _CASES["gpt2"] | changes
    (self.source / "config.json").write_text(json.dumps(tree))
    with self.refused(regex):
      self.convert()

  def test_gpt2_has_no_rotation(self):
    foreign.write(self.source, _CASES["gpt2"])
    with self.refused("positions='learned': mechanism decoupled_rope tells a"):
      self.convert("decoupled_rope")

  def test_a_missing_shard(self):
    foreign.write(self.source, shards=3)
    (self.source / "model-00002-of-00003.safetensors").unlink()
    with self.refused("00002-of-00003.safetensors: missing, and .*index.json"):
      self.convert()
    index = self.source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with self.refused("'../b.safetensors' is no name of a file"):
      self.convert()

  @parameterized.parameters(
    (dict(mechanism="sigma_gpt"), "mechanism='sigma_gpt': left-to-right mod"),
    (dict(T=41), "model.T=41: the source was made for 40 positions"),
    (dict(T=1.5), "T=1.5: must be a whole number"),
  )
  def test_arguments(self, options, regex):
    foreign.write(self.source)
    with self.refused(regex):
      self.convert(**options)

  def test_a_bucket(self):
    foreign.write(self.source)
    config = aoarm_jax.load(self.convert()).config
    with self.refused("gs://a/b: models of Hugging Face are read from a folde"):
      converting.convert(config, epath.Path("gs://a/b"), self.folder / "x", [])

  def test_the_command(self):
    foreign.write(self.source)
    command = [
      f"--config={helpers.ROOT / 'configs' / 'causal.py'}",
      f"--workdir={self.folder / 'run'}",
      "--mode=convert",
      "--config.model.T=9",
    ]
    with self.assertRaisesRegex(flags.Error, "--mode=convert needs the folder"):
      helpers.run(command)
    command.append(f"--input={self.source}")
    with self.refused("config.model.D=64: the source decides it, and has 10"):
      helpers.run([*command, "--config.model.D=64"])
    with self.refused("config.data.documents='pad': the end of a document"):
      helpers.run([*command, "--config.data.documents=pad"])
    helpers.run(command)
    run = self.folder / "run"
    self.assertIn("--mode=convert", (run / "command.txt").read_text())
    params = aoarm_jax.load(run)._params
    other = aoarm_jax.load(self.convert(name="other"))._params
    jax.tree.map(np.testing.assert_array_equal, params, other)


class PageTest(FolderTest):
  @pytest.mark.thorough
  def test_what_the_page_shows(self):
    """Every command and the Python, on a tiny model, in this order."""
    self.enterContext(contextlib.chdir(self.folder))
    tree = foreign.config(foreign.QWEN3, max_position_embeddings=4096)
    foreign.write("models/Qwen3-0.6B", tree)
    helpers.write_text(self.folder / "texts")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.M | re.S)
    self.assertGreaterEqual(len(blocks), 4)
    small = [
      *("model.T=40", "train.batch_size=8", "train.steps=3"),
      *("eval.batches=1", "eval.batch_size=8", "sample.count=1"),
      *("compute.dtype=float32", "optimizer.warmup_steps=1"),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      for language, content in blocks:
        if language == "python":
          content = content.replace("T=1024", "T=40")
          exec(content, {})
          continue
        for line in content.replace("\\\n", " ").splitlines():
          if not line.startswith("python -m aoarm_jax.main "):
            self.assertStartsWith(line, "pip install")
            continue
          words = shlex.split(line)[3:]
          is_read = any(
            f"--mode={mode}" in words for mode in ("sample", "score", "export")
          )
          more = [] if is_read else [f"--config.{x}" for x in small]
          words = [
            word.replace(
              "--config=configs/", f"--config={helpers.ROOT}/configs/"
            )
            for word in words
            if not any(word.startswith(m.partition("=")[0] + "=") for m in more)
          ]
          helpers.run([*words, *more])
    out = safetensors_numpy.load_file("models/causal/model.safetensors")
    want = safetensors_numpy.load_file("models/Qwen3-0.6B/model.safetensors")
    chex.assert_trees_all_equal(out, want)

  @pytest.mark.slow
  def test_a_mesh_reads_its_own_pieces(self):
    """Four devices make the same run, and no array is whole on any."""
    foreign.write(self.source, foreign.config(hidden_size=32), shards=2)
    command = [
      f"--config={helpers.ROOT / 'configs' / 'two_stream.py'}",
      "--mode=convert",
      "--config.model.T=9",
      f"--input={self.source}",
    ]
    runs = []
    for name, more in (
      ("one", []),
      ("four", ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]),
    ):
      runs.append(self.folder / name)
      process = helpers.start(
        [*command, *more, f"--workdir={runs[-1]}"],
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
      )
      _, complaint = process.communicate(timeout=200)
      self.assertEqual(process.returncode, 0, complaint)
    one, four = (aoarm_jax.load(run)._params for run in runs)
    jax.tree.map(np.testing.assert_array_equal, one, four)


if __name__ == "__main__":
  absltest.main()
