"""A second implementation of the network: numpy, one sequence, any mask.

The numbers are float64, the two streams are computed one after the other, and
rotations are complex numbers.
"""

import jax
import numpy as np
import tiny


class Written:
  """The mathematics of one sequence, by hand."""

  def __init__(self, model, params):
    self.model, self.params = model, tiny.as_numpy(params)
    self.blocks = [
      jax.tree.map(lambda p, i=i: p[i], self.params["blocks"])
      for i in range(model.L)
    ]
    self.V = len(self.params["embedding"]) - (3 if model.kind.masked else 2)

  def rms(self, x, node):
    power = (x**2).mean(axis=-1, keepdims=True) + self.model.norm_epsilon
    return x / np.sqrt(power) * node["scale"]

  def norm(self, x, node):
    if self.model.norm == "rms":
      return self.rms(x, node)
    return self.rms(x - x.mean(axis=-1, keepdims=True), node) + node["bias"]

  def product(self, equation, x, node, name):
    """The product of rows with a weight, and its bias."""
    bias = node["biases"][name] if self.model.biases else 0
    return np.einsum(equation, x, node[name]) + bias

  def head_normed(self, x, attention, name):
    return self.rms(x, attention[name]) if self.model.qk_norm else x

  def speeds(self):
    """Radians for each position, by rotary pair; and the factor of scores."""
    m, half = self.model, self.model.H // 2
    speeds, factor = [], 1.0
    for pair in range(half):
      speed = m.rope_base ** (-pair / half)
      length = 2 * np.pi / speed  # In positions.
      slow = speed / m.rope_factor
      if m.rope_scaling == "llama3":
        if length > m.rope_original_T:
          speed = slow
        elif length > m.rope_original_T / 4:
          share = (m.rope_original_T / length - 1) / (4 - 1)
          speed = share * speed + (1 - share) * slow
      if m.rope_scaling == "yarn":
        # The pairs, as real numbers, that turn 32 times and once.
        ends = [
          half * np.log(m.rope_original_T / (2 * np.pi * turns))
          for turns in (32, 1)
        ] / np.log(m.rope_base)
        first, last = max(np.floor(ends[0]), 0), np.ceil(ends[1])
        share = min(max((pair - first) / (last - first), 0), 1)
        speed = share * slow + (1 - share) * speed
        factor = (0.1 * np.log(m.rope_factor) + 1) ** 2
      speeds.append(speed)
    return np.array(speeds), factor

  def content(self, ids, position, target):
    x = self.params["embedding"][ids]
    index = {"content": position, "target": target}
    if names := self.model.kind.added:
      tables = self.params["start"]["added"]
      parts = [table[index[name]] for name, table in zip(names, tables)]
      x = x + np.concatenate(parts, axis=-1)
    return x

  def modulation(self, node, target):
    """[count, R, D] of the rows' targets, zero where there is none."""
    if "modulation" not in node:
      return np.zeros((6, 1, 1)) + np.array([0, 0, 1, 0, 0, 1])[:, None, None]
    c = self.params["start"]["target"][target]
    c = c / (1 + np.exp(-c))
    m = node["modulation"]
    return np.einsum("rc,cmd->mrd", c, m["weight"]) + m["bias"][:, None]

  def rotate(self, x, position):
    """x [R, N, H] by position [R], or by several [R, K] in turn."""
    if not self.model.kind.query:
      return x
    half = self.model.H // 2
    speed, _ = self.speeds()
    position = np.reshape(position, (len(x), -1))
    by = [position[:, j % position.shape[1]] for j in range(half)]
    turn = np.exp(1j * np.stack(by, axis=1) * speed)[:, None]
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)

  def normed(self, node, x, m):
    return self.norm(x, node) * (1 + m[1]) + m[0]

  def keys(self, block, x, position, target=None):
    """Rotated keys and values [S, N, H] of content rows [S, D]."""
    a = block["attention"]
    x = self.normed(block["attention_norm"], x, self.modulation(block, target))
    k, v = (
      self.product("sd,dnh->snh", x, a, name) for name in ("key", "value")
    )
    return self.rotate(self.head_normed(k, a, "key_norm"), position), v

  def update(self, block, x, position, keys, seen, target=None):
    """One block on rows [R, D] over keys; seen is bool [R, S]."""
    a, (k, v) = block["attention"], keys
    m = self.modulation(block, target)
    normed = self.normed(block["attention_norm"], x, m)
    q = self.product("rd,dnh->rnh", normed, a, "query")
    q = self.rotate(self.head_normed(q, a, "query_norm"), position)
    serves = [n * k.shape[1] // q.shape[1] for n in range(q.shape[1])]
    k, v = k[:, serves], v[:, serves]
    score = np.einsum("rnh,snh->nrs", q, k) / np.sqrt(self.model.H)
    score *= self.speeds()[1]
    score = np.where(seen, score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    out = np.einsum("nrs,snh->rnh", weight, v)
    x = x + m[2] * self.product("rnh,nhd->rd", out, a, "out")
    x_normed = self.normed(block["mlp_norm"], x, m[3:])
    return x + m[5] * self.mlp(block["mlp"], x_normed)

  def mlp(self, node, x):
    up = self.product("rd,df->rf", x, node, "up")
    if self.model.mlp == "swiglu":
      gate = self.product("rd,df->rf", x, node, "gate")
      hidden = gate / (1 + np.exp(-gate)) * up
    else:
      tanh = np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))
      hidden = 0.5 * up * (1 + tanh)
    return self.product("rf,fd->rd", hidden, node, "down")

  def read_out(self, x, target=None):
    m = self.modulation(self.params, target)
    x = self.normed(self.params["norm"], x, m)
    # The mean over the rows of a slot.
    x = x.reshape(-1, self.model.kind.copies, self.model.D).mean(axis=1)
    if self.model.tied:
      return x @ self.params["embedding"][: self.V].T
    return x @ self.params["head"]

  def one_stream(self, ids, query_position, key_position, seen, target=None):
    """Logits [S, V], and the keys and values of every layer."""
    copies, cache = self.model.kind.copies, []
    x, query_position, key_position = (
      np.repeat(rows, copies, axis=0)
      for rows in (
        self.content(ids, key_position, target),
        query_position,
        key_position,
      )
    )
    if copies > 1:
      x[1::2] += self.params["start"]["copy_start"]
    seen = np.kron(seen, np.ones((copies, copies))).astype(bool)
    for block in self.blocks:
      cache.append(self.keys(block, x, key_position, target))
      x = self.update(block, x, query_position, cache[-1], seen, target)
    return self.read_out(x, target), cache

  def query_stream(self, target_position, cache, seen, ids=(), position=()):
    """Logits [R, V] of query rows, from the content stream's keys alone.

    Shifted rows also know ids [S] and position [S], the slots' content.
    """
    place = target_position - self.model.shifted
    start = self.params["start"]["query_start"]
    x = np.tile(start, (len(target_position), 1))
    if self.model.shifted:
      for row, before in enumerate(place):
        for slot in np.flatnonzero(seen[row]):
          if position[slot] == before:
            x[row] = self.params["embedding"][ids[slot]]
    if self.model.positions == "learned":
      x += self.params["start"]["added"][0, place]
    for block, keys in zip(self.blocks, cache):
      own = block.get("of_queries", block)
      x = self.update(own, x, place, keys, seen)
    return self.read_out(x)
