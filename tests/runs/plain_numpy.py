"""The logits of an exported model, by safetensors and numpy alone.

This is an independent reading of docs/exporting.md: nothing of aoarm_jax or JAX
is imported. The computation is in float64.

  python plain_numpy.py FOLDER IN.npz OUT.npz

IN has tokens and order, int [B, T]. OUT has logits, float64 [B, T, V], by rank,
and loaded, the names of all modules that were imported.
"""

import json
import pathlib
import sys

import numpy as np
import safetensors

EPSILON = 1e-6  # Is added to the mean square of a norm.


def read(folder):
  """The config and the arrays of a folder, in float64."""
  folder = pathlib.Path(folder)
  config = json.loads((folder / "config.json").read_text())
  arrays = {}
  content = (folder / "model.safetensors").read_bytes()
  for name, view in safetensors.deserialize(content):
    if view["dtype"] == "BF16":  # The upper half of a float32.
      upper = np.frombuffer(view["data"], "<u2").astype("<u4")
      values = (upper << 16).view("<f4")
    else:
      values = np.frombuffer(view["data"], "<f4")
    arrays[name] = values.reshape(view["shape"]).astype(np.float64)
  return config, arrays


def norm(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON) * scale


def rotate(x, position, base):
  """Turn x [B, S, N, H] by position [B, S]."""
  half = x.shape[-1] // 2
  angle = position[..., None] * base ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
  first, second = x[..., :half], x[..., half:]
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def logits(config, arrays, tokens, order, seen=None):
  """The logits of every rank: float64 [B, T, V].

  The list `seen` takes a pair (weights [B, N, S, S], rows [B, S, D] after the
  layer) of each stream, one list for each layer.
  """
  model, V = config["config"]["model"], config["vocabulary"]
  T, base, s = model["T"], model["rope_base"], model["sentinels"]
  B = len(tokens)

  # Slots: the sentinels, and all tokens but the last, in generation order.
  known = np.take_along_axis(tokens, order - 1, 1)[:, :-1]
  start = np.broadcast_to([V, V + 1][:s], (B, s))
  ends = np.broadcast_to([0, T + 1][:s], (B, s))
  content = arrays["embedding"][np.concatenate([start, known], 1)]
  position = np.concatenate([ends, order[:, :-1]], 1)
  target = np.concatenate([np.zeros((B, s - 1), int), order], 1)

  if model.get("content_sees", "prefix") != "prefix":
    raise ValueError("other masks are not read here")
  if model["mechanism"] == "two_stream":
    query = np.broadcast_to(arrays["start.query_start"], content.shape)
    streams = [(content, position), (query, target)]
  elif model["mechanism"] == "decoupled_rope":
    streams = [(content, target)]
  else:
    raise ValueError(f"{model['mechanism']} is not read here")

  S = content.shape[1]
  for layer in range(model["L"]):
    w = {
      name.removeprefix("blocks."): values[layer]
      for name, values in arrays.items()
      if name.startswith("blocks.")
    }
    rows = norm(streams[0][0], w["attention_norm.scale"])
    key = np.einsum("bsd,dnh->bsnh", rows, w["attention.key"])
    key = norm(key, w["attention.key_norm.scale"])
    key = rotate(key, position, base)
    value = np.einsum("bsd,dnh->bsnh", rows, w["attention.value"])

    updated, of_layer = [], []
    for x, turn in streams:
      rows = norm(x, w["attention_norm.scale"])
      query = np.einsum("bsd,dnh->bsnh", rows, w["attention.query"])
      query = norm(query, w["attention.query_norm.scale"])
      query = rotate(query, turn, base)
      score = np.einsum("bqnh,bknh->bnqk", query, key) / query.shape[-1] ** 0.5
      score = np.where(np.tri(S, dtype=bool), score, -np.inf)
      weight = np.exp(score - score.max(-1, keepdims=True))
      weight /= weight.sum(-1, keepdims=True)
      mixed = np.einsum("bnqk,bknh->bqnh", weight, value)
      x = x + np.einsum("bqnh,nhd->bqd", mixed, w["attention.out"])
      rows = norm(x, w["mlp_norm.scale"])
      x = x + gelu(rows @ w["mlp.up"]) @ w["mlp.down"]
      updated.append((x, turn))
      of_layer.append((weight, x))
    streams = updated
    if seen is not None:
      seen.append(of_layer)

  rows = norm(streams[-1][0], arrays["norm.scale"])
  head = arrays["embedding"][:V].T if model["tied"] else arrays["head"]
  return (rows @ head)[:, s - 1 :]


def main(folder, source, out):
  config, arrays = read(folder)
  given = np.load(source)
  found = logits(config, arrays, given["tokens"], given["order"])
  np.savez(out, logits=found, loaded=[*sys.modules])


if __name__ == "__main__":
  main(*sys.argv[1:])
