"""A tiny folder of Hugging Face written by hand, and its model in numpy.

The names, the shapes and the mathematics are those of transformers, which is
not needed here. tests/runs/interop_test.py compares with transformers itself.
"""

import json
import pathlib
import re

import foreign_gpt2
import numpy as np
from safetensors import numpy as safetensors_numpy

LLAMA, QWEN3 = "LlamaForCausalLM", "Qwen3ForCausalLM"
GPT2 = foreign_gpt2.GPT2
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 3.0,
  "original_max_position_embeddings": 12,
}
V, BOS, EOS = 262, 258, 257


def config(architecture=LLAMA, **changes):
  """The value of a config.json, with sizes that are all different."""
  ends = {"vocab_size": V, "bos_token_id": BOS, "eos_token_id": EOS}
  if architecture == GPT2:
    return foreign_gpt2.config(**ends | changes)
  return {
    "architectures": [architecture],
    "hidden_size": 10,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    **ends,
  } | changes


def _shapes(tree):
  """The shapes of the arrays of a config.json, by their names."""
  if tree["architectures"] == [GPT2]:
    return foreign_gpt2.shapes(tree)
  D, F = tree["hidden_size"], tree["intermediate_size"]
  H, N = tree["head_dim"], tree["num_attention_heads"]
  M = tree["num_key_value_heads"]
  layer = {
    "input_layernorm": (D,),
    "post_attention_layernorm": (D,),
    "self_attn.q_proj": (N * H, D),
    "self_attn.k_proj": (M * H, D),
    "self_attn.v_proj": (M * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
  }
  if tree["architectures"] == [QWEN3]:
    layer |= {"self_attn.q_norm": (H,), "self_attn.k_norm": (H,)}
  shapes = {"embed_tokens": (tree["vocab_size"], D), "norm": (D,)}
  for i in range(tree["num_hidden_layers"]):
    shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
  shapes = {f"model.{name}.weight": shape for name, shape in shapes.items()}
  if not tree["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (tree["vocab_size"], D)
  return shapes


def arrays(tree, seed=0):
  """Random arrays of a config.json, by the names of transformers."""
  rng = np.random.default_rng(seed)

  def draw(name, shape):
    x = rng.normal(size=shape)
    is_scale = re.search(r"(norm|ln_.)\.weight$", name)
    return (1 + 0.3 * x if is_scale else 0.5 * x).astype(np.float32)

  return {name: draw(name, shape) for name, shape in _shapes(tree).items()}


def tokenizer():
  """The value of a tokenizer.json: all bytes, one merge and two marks."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  names = {byte: chr(byte) for byte in printable}
  names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
  return {
    "added_tokens": [
      {"id": EOS, "content": "<|end|>", "special": True},
      {"id": BOS, "content": "<|start|>", "special": True},
    ],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {
      "type": "BPE",
      "vocab": {names[byte]: byte for byte in range(256)} | {"th": 256},
      "merges": [["t", "h"]],
    },
  }


def write(folder, tree=None, weights=None, *, shards=1):
  """Write a folder; return the value of config.json and the arrays."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  tree = tree or config()
  weights = weights or arrays(tree)
  (folder / "config.json").write_text(json.dumps(tree))
  (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
  if shards == 1:
    safetensors_numpy.save_file(weights, folder / "model.safetensors")
    return tree, weights
  files = [
    f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)
  ]
  places = {name: files[i % shards] for i, name in enumerate(weights)}
  for file in files:
    part = {n: x for n, x in weights.items() if places[n] == file}
    safetensors_numpy.save_file(part, folder / file)
  index = {"metadata": {}, "weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return tree, weights


def _speeds(tree):
  """Radians for each position, by rotary pair, as transformers has them."""
  H, rope = tree["head_dim"], tree.get("rope_parameters") or {}
  base = rope.get("rope_theta", tree.get("rope_theta"))
  speeds = base ** (-np.arange(0, H, 2) / H)
  if rope.get("rope_type", "default") == "default":
    return speeds
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  original = rope["original_max_position_embeddings"]
  length = 2 * np.pi / speeds
  smooth = (original / length - low) / (high - low)
  between = (1 - smooth) * speeds / rope["factor"] + smooth * speeds
  scaled = np.where(length > original / low, speeds / rope["factor"], between)
  return np.where(length < original / high, speeds, scaled)


def logits(tree, weights, ids):
  """float64 [n, V]: the logits at every token of ids [n]."""
  if tree["architectures"] == [GPT2]:
    return foreign_gpt2.logits(tree, weights, ids)
  w = {name: x.astype(np.float64) for name, x in weights.items()}
  H, n = tree["head_dim"], len(ids)
  angle = np.arange(n)[:, None] * _speeds(tree)
  cos, sin = (np.tile(f(angle), 2)[:, None] for f in (np.cos, np.sin))

  def norm(x, name):
    power = (x**2).mean(axis=-1, keepdims=True) + tree["rms_norm_eps"]
    return x / np.sqrt(power) * w[f"{name}.weight"]

  def heads(x, name, is_rotated=True):
    x = (x @ w[f"{name}_proj.weight"].T).reshape(n, -1, H)
    if not is_rotated:
      return x
    x = norm(x, f"{name}_norm") if f"{name}_norm.weight" in w else x
    turned = np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], axis=-1)
    return x * cos + turned * sin

  x = w["model.embed_tokens.weight"][ids]
  for i in range(tree["num_hidden_layers"]):
    at = f"model.layers.{i}"
    y = norm(x, f"{at}.input_layernorm")
    q = heads(y, f"{at}.self_attn.q")
    k = heads(y, f"{at}.self_attn.k")
    v = heads(y, f"{at}.self_attn.v", is_rotated=False)
    k, v = (np.repeat(z, q.shape[1] // z.shape[1], axis=1) for z in (k, v))
    score = np.einsum("inh,jnh->nij", q, k) / np.sqrt(H)
    score = np.where(np.tri(n, dtype=bool), score, -np.inf)
    share = np.exp(score - score.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    out = np.einsum("nij,jnh->inh", share, v).reshape(n, -1)
    x = x + out @ w[f"{at}.self_attn.o_proj.weight"].T
    y = norm(x, f"{at}.post_attention_layernorm")
    gate = y @ w[f"{at}.mlp.gate_proj.weight"].T
    up = y @ w[f"{at}.mlp.up_proj.weight"].T
    silu = gate / (1 + np.exp(-gate))
    x = x + (silu * up) @ w[f"{at}.mlp.down_proj.weight"].T
  table = w.get("lm_head.weight", w["model.embed_tokens.weight"])
  return norm(x, "model.norm") @ table.T
