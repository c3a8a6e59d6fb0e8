"""GPT-2 in numpy: config.json, arrays and logits, as transformers has them."""

import numpy as np

GPT2 = "GPT2LMHeadModel"


def config(**changes):
  """The value of a config.json, with sizes that are all different."""
  return {
    "architectures": [GPT2],
    "n_embd": 12,
    "n_inner": 14,
    "n_layer": 4,
    "n_head": 3,
    "n_positions": 10,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-3,
  } | changes


def shapes(tree):
  """The shapes of all arrays, by their names."""
  D, F, V = tree["n_embd"], tree["n_inner"], tree["vocab_size"]
  layer = {
    "ln_1.weight": (D,),
    "ln_1.bias": (D,),
    "attn.c_attn.weight": (D, 3 * D),
    "attn.c_attn.bias": (3 * D,),
    "attn.c_proj.weight": (D, D),
    "attn.c_proj.bias": (D,),
    "ln_2.weight": (D,),
    "ln_2.bias": (D,),
    "mlp.c_fc.weight": (D, F),
    "mlp.c_fc.bias": (F,),
    "mlp.c_proj.weight": (F, D),
    "mlp.c_proj.bias": (D,),
  }
  every = {"wte.weight": (V, D), "wpe.weight": (tree["n_positions"], D)}
  for i in range(tree["n_layer"]):
    every |= {f"h.{i}.{name}": shape for name, shape in layer.items()}
  every |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
  every = {f"transformer.{name}": shape for name, shape in every.items()}
  if not tree.get("tie_word_embeddings", True):
    every["lm_head.weight"] = (V, D)
  return every


def logits(tree, weights, ids):
  """float64 [n, V]: the logits at every token of ids [n]."""
  w = {
    name.removeprefix("transformer."): x.astype(np.float64)
    for name, x in weights.items()
  }
  n, N = len(ids), tree["n_head"]

  def norm(x, name):
    x = x - x.mean(axis=-1, keepdims=True)
    variance = (x**2).mean(axis=-1, keepdims=True)
    x = x / np.sqrt(variance + tree["layer_norm_epsilon"])
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]

  def conv(x, name):
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

  x = w["wte.weight"][ids] + w["wpe.weight"][:n]
  for i in range(tree["n_layer"]):
    packed = conv(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
    q, k, v = packed.reshape(n, 3, N, -1).transpose(1, 2, 0, 3)
    score = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    score = np.where(np.tri(n, dtype=bool), score, -np.inf)
    share = np.exp(score - score.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    out = (share @ v).transpose(1, 0, 2).reshape(n, -1)
    x = x + conv(out, f"h.{i}.attn.c_proj")
    u = conv(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
    u *= 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    x = x + conv(u, f"h.{i}.mlp.c_proj")
  return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T
