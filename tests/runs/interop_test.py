"""Parity with transformers, on tiny random models that it saves itself.

Run it where the extra interop is installed: python -m pytest -m interop
"""

import json
import tempfile

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized
from etils import epath

import aoarm_jax
from aoarm_jax import orders
from aoarm_jax.config import errors
from aoarm_jax.model import cached

# Each version of transformers has another name for the cache.
pytestmark = [
  pytest.mark.interop,
  pytest.mark.filterwarnings("ignore:`past_key_values` is dep:FutureWarning"),
]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")

_T, _V, _BOS, _EOS = 20, 300, 290, 291
_ATOL = 1e-4
_SMALL = dict(
  **dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3),
  **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12),
  **dict(vocab_size=_V, max_position_embeddings=64, initializer_range=0.3),
  **dict(bos_token_id=_BOS, eos_token_id=_EOS, pad_token_id=None),
)
_SMALL_GPT2 = dict(
  **dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=_V),
  **dict(bos_token_id=_BOS, eos_token_id=_EOS, initializer_range=0.3),
)
_LLAMA3 = dict(
  **dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0),
  **dict(high_freq_factor=4.0, original_max_position_embeddings=16),
)
_YARN = dict(
  **dict(rope_type="yarn", rope_theta=1e4, factor=4.0),
  original_max_position_embeddings=16,
)
_CASES = {
  "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
  "qwen3_untied": ("Qwen3", dict(tie_word_embeddings=False)),
  "qwen3_yarn": (
    "Qwen3",
    dict(tie_word_embeddings=False, rope_parameters=_YARN),
  ),
  "llama": ("Llama", dict(tie_word_embeddings=False, rms_norm_eps=1e-5)),
  "llama3": (
    "Llama",
    dict(tie_word_embeddings=True, rope_parameters=_LLAMA3),
  ),
  "gpt2": ("GPT2", {}),
  "gpt2_untied": ("GPT2", dict(tie_word_embeddings=False, n_inner=40)),
}
# The case and the mechanism; GPT-2 has no rotations.
_WAYS = [
  (case, mechanism)
  for case in _CASES
  for mechanism in ("causal", "two_stream", "decoupled_rope")
  if not (case.startswith("gpt2") and mechanism == "decoupled_rope")
]
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


def save(folder, kind, **changes):
  """Save a random model and a tokenizer; return the model."""
  torch.manual_seed(0)
  small = _SMALL_GPT2 if kind == "GPT2" else _SMALL
  config = getattr(transformers, f"{kind}Config")(**small | changes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "norm" in name or "ln_" in name:
        weight.copy_(1 + 0.3 * torch.randn_like(weight))
      if name.endswith(".bias"):
        weight.copy_(0.3 * torch.randn_like(weight))
  # Several files.
  model.save_pretrained(folder, max_shard_size="40KB")
  whole = library.Tokenizer(library.models.BPE())
  split = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  whole.pre_tokenizer = split
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  trainer = library.trainers.BpeTrainer(
    vocab_size=_BOS, show_progress=False, initial_alphabet=alphabet
  )
  text = "the quick brown fox said nothing to her mother and other brothers. "
  whole.train_from_iterator([text * 3], trainer)
  marks = [f"<|mark_{i}|>" for i in range(whole.get_vocab_size(), _BOS)]
  whole.add_special_tokens([*marks, "<|bos|>", "<|eos|>"])
  whole.save(str(folder / "tokenizer.json"))
  return model


def read(folder):
  """The model that transformers reads from a folder."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()


def logits_of(model, ids, **more):
  with torch.no_grad():
    return model(torch.tensor(ids), **more).logits.numpy()


class InteropTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = epath.Path(folder)
    self.tokens = tiny.tokens(3, _T, _V)
    first = np.full((3, 1), _BOS)
    self.ids = np.concatenate([first, self.tokens[:, :-1]], axis=1)

  def source(self, case):
    kind, changes = _CASES[case]
    return save(self.folder / "source", kind, **changes)

  def load(self, mechanism="causal"):
    """The converted model, which computes in float32."""
    run = self.folder / mechanism
    aoarm_jax.convert(
      self.folder / "source", run, mechanism=mechanism, T=_T, progress=False
    )
    tree = json.loads((run / "config.json").read_text())
    tree["compute"]["dtype"] = "float32"
    (run / "config.json").write_text(json.dumps(tree))
    return aoarm_jax.load(run)

  def slots(self, network):
    natural = np.tile(np.arange(1, _T + 1, dtype=np.int32), (3, 1))
    return orders.to_slots(self.tokens, natural, network.layout)

  def assert_close(self, got, want):
    self.assertGreater(np.std(want), 0.5)
    np.testing.assert_allclose(got, want, rtol=0, atol=_ATOL)

  @parameterized.parameters(*_WAYS)
  def test_full_sequences(self, case, mechanism):
    want = logits_of(self.source(case), self.ids)
    model = self.load(mechanism)
    got = jax.jit(model.network.apply)(model._params, self.slots(model.network))
    self.assert_close(got, want)

  @parameterized.product(
    case=("qwen3", "llama3", "gpt2"), mechanism=("causal", "two_stream")
  )
  def test_with_the_cache(self, case, mechanism):
    """Both prefill seven tokens, and then take one at a time."""
    source, want, past = self.source(case), [], None
    for first, last in ((0, 7), *((i, i + 1) for i in range(7, _T))):
      with torch.no_grad():
        out = source(
          torch.tensor(self.ids[:, first:last]),
          past_key_values=past,
          use_cache=True,
        )
      past = out.past_key_values
      want.append(out.logits.numpy())
    model = self.load(mechanism)
    network = model.network

    @jax.jit
    def run(params, slots):
      of_params = cached.Cached(network.bind(params))
      cache, logits = of_params.empty_cache(3, _T), []
      for first, last in ((0, 7), *((i, i + 1) for i in range(7, _T))):
        part = jax.tree.map(lambda x: x[:, first:last], slots)  # noqa: B023
        start = np.full(3, first, np.int32)
        new, cache = of_params.extend(part, cache, start)
        logits.append(new)
      return jax.numpy.concatenate(logits, axis=1)

    got = run(model._params, self.slots(network))
    self.assert_close(got, np.concatenate(want, axis=1))

  @parameterized.product(
    case=("qwen3", "llama3", "gpt2"), side=("left", "right")
  )
  def test_with_padding(self, case, side):
    """Padding of transformers changes nothing, and ours sees no later token."""
    source, sizes = self.source(case), (_T, 13, 5)
    ids, mask = np.zeros((3, _T), int), np.zeros((3, _T), int)
    places = [
      slice(_T - n, _T) if side == "left" else slice(0, n) for n in sizes
    ]
    for row, (n, place) in enumerate(zip(sizes, places)):
      ids[row, place], mask[row, place] = self.ids[row, :n], 1
    position = np.maximum(mask.cumsum(axis=1) - 1, 0)
    want = logits_of(
      source,
      ids,
      attention_mask=torch.tensor(mask),
      position_ids=torch.tensor(position),
    )
    for n, row in zip(sizes, self.tokens):
      row[n:] = 0
    model = self.load("two_stream")
    got = np.asarray(
      jax.jit(model.network.apply)(model._params, self.slots(model.network))
    )
    for row, (n, place) in enumerate(zip(sizes, places)):
      self.assert_close(got[row, :n], want[row, place])

  @parameterized.parameters(*_CASES)
  def test_back_to_transformers(self, case):
    want = logits_of(self.source(case), self.ids)
    self.load()
    out = self.folder / "back"
    aoarm_jax.export(self.folder / "causal", out, layout="hugging_face")
    model = read(out)
    self.assertStartsWith(type(model).__name__, _CASES[case][0])
    np.testing.assert_array_equal(logits_of(model, self.ids), want)

  @parameterized.parameters(
    {"model.mlp": "swiglu", "model.kv_heads": 1},
    {
      **{"model.norm": "layer", "model.biases": True, "model.qk_norm": False},
      **{"model.positions": "learned", "model.tied": True},
    },
  )
  def test_a_model_of_our_own(self, **model):
    """BOS is an id of its own there, which is never generated."""
    workdir, out = self.folder / "run", self.folder / "out"
    helpers.write_text(self.folder / "text")
    changes = {
      **{"data.path": self.folder / "text", "train.steps": 30},
      **model,
      **{"eval.batches": 1, "sample.count": 1},
    }
    experiment = f"{helpers.ROOT / 'configs' / 'causal.py'}:tiny"
    command = helpers.arguments(workdir, changes, experiment=experiment)
    helpers.run(command)
    aoarm_jax.export(workdir, out, layout="hugging_face")
    ours, model = aoarm_jax.load(workdir), read(out)
    tokens = tiny.tokens(3, 16, 27)
    natural = np.tile(np.arange(1, 17, dtype=np.int32), (3, 1))
    slots = orders.to_slots(tokens, natural, ours.network.layout)
    want = jax.jit(ours.network.apply)(ours._params, slots)
    ids = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=27)
    np.testing.assert_allclose(
      logits_of(model, ids)[..., :27], want, rtol=0, atol=_ATOL
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "she said noth"
    want = [27, *ours.tokenizer.encode(text)]
    self.assertEqual(tokenizer(text).input_ids, want)
    written = model.generate(torch.tensor([want]), max_new_tokens=2)
    got = ours.generate(prompt=text, length=15, temperature=0.0)[0]
    self.assertEqual(tokenizer.decode(written[0, 1:]), got.text)

  @parameterized.parameters("qwen3", "llama3", "gpt2")
  def test_texts(self, case):
    """Symbols, greedy texts and scores are those of transformers."""
    source, ours = self.source(case), self.load("two_stream")
    path = self.folder / "source" / "tokenizer.json"
    tokenizer = library.Tokenizer.from_file(str(path))
    text = "her brother"
    ids = tokenizer.encode(text).ids
    self.assertEqual(ours.tokenizer.encode(text).tolist(), ids)
    start = torch.tensor([[_BOS, *ids]])
    # Ours knows no token that ends a text.
    source.generation_config.eos_token_id = None
    written = source.generate(
      start, max_new_tokens=_T - len(ids), do_sample=False
    )
    greedy = ours.generate(prompt=text, temperature=0.0, order="left_to_right")[
      0
    ]
    self.assertEqual(list(greedy.tokens), written[0, 1:].tolist())
    with torch.no_grad():
      laws = torch.log_softmax(source(start).logits[0, :-1], -1)
    want = laws[range(len(ids)), ids].sum().item()
    got = ours.score(text, marks="", blank="").log_p
    self.assertAlmostEqual(got, want, delta=1e-3)

  @parameterized.parameters(
    ("Llama", dict(attention_bias=True), "attention_bias=True: a converted"),
    ("Qwen3", dict(attention_bias=True), "attention_bias=True: a converted"),
    (
      "Qwen3",
      dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
      "no attention in sliding windows",
    ),
    (
      "Llama",
      dict(
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)
      ),
      "rope_type='linear'",
    ),
    ("Qwen2", dict(), "'Qwen2ForCausalLM'"),
    ("GPT2", dict(activation_function="gelu"), "no another activation than GE"),
  )
  def test_what_the_backbone_lacks(self, kind, changes, regex):
    save(self.folder / "source", kind, **changes)
    with self.assertRaisesRegex(errors.UserError, regex) as raised:
      self.load()
    self.assertNotIn("\n", str(raised.exception))


if __name__ == "__main__":
  absltest.main()
